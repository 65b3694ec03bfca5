#!/usr/bin/env python3
"""Bundle train_gpt.py into a small file that runs alone: code counts against 16,000,000 bytes.

    python records/bundle.py SOURCE OUT [--whole]

OUT runs, and is imported, like SOURCE, with Python 3.10 or later, and keeps nothing on disk. It is
a short head and the program, compressed by lzma: without comments, docstrings, annotations and the
imports that these alone used, and with short names for local variables. Names of functions, classes
and constants stay, so that a traceback can be read.

A bundle is made for a record: it does not contain the code that trains on text before that text is
scored, and does not know its settings. --whole keeps that code.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import hashlib
import lzma
import re
import string
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

LIMIT_BYTES = 45_000  # of a bundle
# The step that is illegal in a record: fields of Config that begin so, and a function.
SETTINGS, FUNCTION = "prequant_ttt", "fine_tune_on_validation"
# Annotations that change what a dataclass or a Triton kernel does.
MEANT = {"ClassVar", "InitVar", "KW_ONLY", "constexpr"}

# --- what a record must not contain ---


class Legal(ast.NodeTransformer):
    """Removes FUNCTION, its SETTINGS in Config, and each `if` whose test asks for its epochs."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if node.name == "Config":
            illegal = [p for p in node.body if any(n.startswith(SETTINGS) for n in bound_names(p))]
            node.body = [part for part in node.body if part not in illegal]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        return None if node.name == FUNCTION else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if f"cfg.{SETTINGS}_epochs" not in ast.unparse(node.test):
            return self.generic_visit(node)
        if node.orelse:
            raise ValueError(f"line {node.lineno}: an if of the illegal step has an else")
        return None


def imported_name(alias: ast.alias) -> str:
    """The name that an import gives a module or a part of one."""
    return (alias.asname or alias.name).partition(".")[0]


def bound_names(node: ast.AST) -> set[str]:
    """Names that a statement of a module or class, or a part of one, gives a meaning to."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.alias):
        return {imported_name(node)}
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return own.union(*map(bound_names, ast.iter_child_nodes(node)))


def read_names(tree: ast.AST) -> set[str]:
    """Names whose value some code takes."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return {node.id for node in names if not isinstance(node.ctx, ast.Store)}


def remove_unused(tree: ast.Module, before: set[str]) -> None:
    """Remove what the module defines or imports under a name of `before` and no longer reads.

    It goes on until nothing changes: what was removed may have been all that read another name.
    """
    imports = ast.Import, ast.ImportFrom
    definitions = ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, *imports
    unused, last = before - read_names(tree), None
    while unused != last:
        body, tree.body = tree.body, []
        for node in body:
            if not (isinstance(node, definitions) and set() < bound_names(node) <= unused):
                tree.body.append(node)
            if isinstance(node, imports):
                node.names = [a for a in node.names if imported_name(a) not in unused]
        unused, last = before - read_names(tree), unused


# --- the same program in fewer characters ---


def means_nothing(annotation: ast.AST | None) -> bool:
    """Whether a program without this annotation does the same."""
    return not annotation or not MEANT & set(re.findall(r"\w+", ast.unparse(annotation)))


class Stripper(ast.NodeTransformer):
    """Removes docstrings of functions and classes, and annotations.

    A class attribute keeps a placeholder annotation: dataclasses and NamedTuples count those.
    """

    def __init__(self) -> None:
        self.attributes: set[ast.AST] = set()

    def without_docstring(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.attributes.update(part for part in node.body if isinstance(part, ast.AnnAssign))
        return self.without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.without_docstring(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None if means_nothing(node.annotation) else node.annotation
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if not means_nothing(node.annotation):
            return node
        if node.value and node not in self.attributes:
            return ast.Assign([node.target], node.value)
        node.annotation = ast.Name("int", ast.Load())
        return node


def outer_functions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Functions and methods that stand in no other function."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from outer_functions(node)


def in_order(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, in an order that does not depend on the version of Python."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from in_order(child)


def rename_locals(function: ast.FunctionDef, fixed: set[str]) -> None:
    """Give the local variables of an outer function names of one letter, in place.

    A name changes in the inner functions too, so that closures hold together. Untouched: `fixed`,
    parameters, attributes, functions, imports, global and nonlocal names.
    """
    kept, places = set(fixed), []
    for node in in_order(function):
        if isinstance(node, ast.Name):
            places.append((node, "id"))
        elif isinstance(node, ast.ExceptHandler) and node.name:
            places.append((node, "name"))
        elif not isinstance(node, (ast.Attribute, ast.keyword, ast.Constant)):
            for _, value in ast.iter_fields(node):
                texts = value if isinstance(value, list) else [value]
                kept.update(t.partition(".")[0] for t in texts if isinstance(t, str))
        if isinstance(node, ast.ClassDef):
            kept.update(*map(bound_names, node.body))
    names = dict.fromkeys(getattr(*place) for place in places)
    stored = {getattr(*p) for p in places if not isinstance(getattr(p[0], "ctx", None), ast.Load)}
    local = [name for name in names if name in stored - kept]
    taken = kept | (set(names) - set(local))
    letters = (letter for letter in string.ascii_letters if letter not in taken)
    short = dict(zip(local, letters, strict=False))
    for node, field in places:
        setattr(node, field, short.get(getattr(node, field), getattr(node, field)))


def small_source(source: str, *, for_record: bool) -> str:
    """The text of the program in a bundle. Raises: ValueError, see `bundle`."""
    tree = ast.parse(source)
    if for_record:
        before = read_names(tree)
        tree = Legal().visit(tree)
        remove_unused(tree, before)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    before = read_names(tree) & set().union(*map(bound_names, imports))
    tree = ast.fix_missing_locations(Stripper().visit(tree))
    remove_unused(tree, before)
    fixed = set(dir(builtins)).union(*map(bound_names, tree.body))
    for function in outer_functions(tree):
        rename_locals(function, fixed)
    text = ast.unparse(tree) + "\n"
    assert ast.dump(ast.parse(text)) == ast.dump(tree), "the small source is another program"
    if for_record and (found := re.search(f"{FUNCTION}|{SETTINGS}", text, re.IGNORECASE)):
        raise ValueError(f"{found[0]} is still named in a bundle for a record; remove it")
    return text


# --- the file ---

# What a person and Python read of a bundle; a comment follows that holds the program.
HEAD = """\
# -*- coding: latin-1 -*-
# Made by records/bundle.py from the readable program with sha256
# {digest}{without}.
# The last line is that program: a CRC, then lzma with NUL, LF, CR and = escaped.
def unbundled():
    import linecache, lzma, sys, traceback, zlib
    head, _, data = open(__file__, "rb").read().partition(b"\\n#:")
    crc, data = data[:8], data[8:]
    if crc != b"%08x" % zlib.crc32(head + data):
        print(__file__ + ": damaged, it must be copied or bundled again", file=sys.stderr)
        sys.exit(2)
    for code, byte in zip(b"abcd", b"\\0\\n\\r="):
        data = data.replace(b"=%c" % code, b"%c" % byte)
    above, text = head.decode() + "\\n#:\\n", lzma.decompress(data).decode()
    # Tracebacks and inspect find the program's lines below this head. Without a time of change
    # they stay known: linecache would read this file instead.
    lines = [line + "\\n" for line in (above + text).split("\\n")]
    linecache.cache[__file__] = len(text), None, lines, __file__
    if __name__ == "__main__":  # before Python 3.13 the built-in hook reads this file
        sys.excepthook = traceback.print_exception
    return compile("\\n" * above.count("\\n") + text, __file__, "exec")
exec(unbundled())"""
MARK = b"\n#:"
LEGAL = ",\n# without the code that trains on text before that text is scored"


def bundle(source: str, *, for_record: bool) -> bytes:
    """A file of at most LIMIT_BYTES that does what the program does.

    for_record: leave out the code that trains on text before that text is scored.
    Raises: SyntaxError; ValueError if the file would be too large, or still named that code.
    """
    text = small_source(source, for_record=for_record).encode()
    options = dict(preset=9 | lzma.PRESET_EXTREME, lc=3, lp=0, pb=0, nice_len=273)
    filters = [dict(id=lzma.FILTER_LZMA1, dict_size=1 << 20, **options)]
    data = lzma.compress(text, format=lzma.FORMAT_ALONE, filters=filters)
    for byte, code in zip(b"=\0\n\r", b"dabc", strict=True):
        data = data.replace(bytes([byte]), b"=%c" % code)
    digest = hashlib.sha256(source.encode()).hexdigest()
    head = HEAD.format(digest=digest, without=LEGAL if for_record else "").encode()
    made = b"%b%b%08x%b" % (head, MARK, zlib.crc32(head + data), data)
    if len(made) > LIMIT_BYTES:
        raise ValueError(f"bundled: {len(made):,} bytes, limit {LIMIT_BYTES:,}")
    return made


def unbundle(made: bytes) -> tuple[bytes, str]:
    """The head of a bundle and the text of its program.

    Raises: ValueError if it is not a bundle, or a damaged one.
    """
    head, _, data = made.partition(MARK)
    crc, data = data[:8], data[8:]
    if crc != b"%08x" % zlib.crc32(head + data) or set(b"\0\n\r") & set(data):
        raise ValueError("not a bundle, or a damaged one")  # code could follow a line's end
    for code, byte in zip(b"abcd", b"\0\n\r=", strict=True):
        data = data.replace(b"=%c" % code, bytes([byte]))
    try:
        return head, lzma.decompress(data).decode()
    except lzma.LZMAError as error:
        raise ValueError(f"not a bundle: {error}") from error


def main(argv: list[str]) -> int:
    """Bundle a file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the readable program")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--whole", action="store_true", help="keep what a record must not contain")
    args = parser.parse_args(argv)
    try:
        if args.out.exists() and args.out.samefile(args.source):
            raise ValueError(f"{args.out}: is the readable source; name another file to write")
        readable = args.source.read_bytes()
        made = bundle(readable.decode("utf-8"), for_record=not args.whole)
        part = args.out.with_name(f".{args.out.name}.part")
        part.write_bytes(made)
        part.replace(args.out)
    except (OSError, SyntaxError, ValueError) as error:
        print(f"bundle.py: {args.source}: {error}", file=sys.stderr)
        return 2
    print(f"{args.source}: {len(readable):,} bytes, bundled {len(made):,} bytes: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
