#!/usr/bin/env python3
"""Write train_gpt.py as a small file that unpacks itself: code counts against the 16,000,000 bytes.

    python records/pack.py train_gpt.py OUT

OUT runs, and is imported, like the readable file, with Python 3.10 or later; it keeps nothing on
disk. It has no comments, docstrings or annotations, nor imports that these alone used, and short
names for local variables and for functions and constants that nothing else can reach by name.
Sentences of the settings go only if OUT would be larger than LIMIT_BYTES with them.

Why a coder of our own: train_gpt.py of 198,500 bytes is 100,146 characters when stripped, and takes

                 bytes   seconds to unpack, one core
    lzma        31,220   0.01
    bz2         31,109   0.01
    brotli 11   30,316   0.01, and a package
    this model  22,321   10

To all of them come the bytes that a Python file needs to hold data: base 85 adds a quarter, digits
to base 253 in a comment (in the last row already) 0.3 %. The decoder and the head add 2,540.
"""

from __future__ import annotations

import ast
import builtins
import collections
import hashlib
import inspect
import io
import itertools
import keyword
import linecache
import re
import string
import sys
import tokenize
import traceback
import zlib
from collections.abc import Callable, Generator, Iterator
from operator import add, mul
from pathlib import Path
from types import CodeType

# ---------------------------------------------------------------------------------------------
# 1  Stripping: the same program in fewer characters
# ---------------------------------------------------------------------------------------------

LIMIT_BYTES = 25_000  # of a packed file
HELP_NOTE = "\n\nThis is the packed file; the readable one beside it says what the settings mean."
# What records/ and data/ use of the program, and what the head below uses of this one.
PUBLIC = set(
    """ALIASES BYTE_OFFSET SHARD_HEADER_BYTES SHARD_MAGIC SHARD_VERSION SMOKE
    apply_gradients atomic_write code_bytes data_proof decode_documents
    depth_plan evaluate file_sha256 find_shards inputs_and_targets main make_optimizers
    open_artifact parameter_groups read_shard select_attention select_kernels
    program set_fingerprint set_schedule sliding_windows stored_config""".split()
)
# Annotations that change what a dataclass or a Triton kernel does.
MEANT = {"ClassVar", "InitVar", "KW_ONLY", "constexpr"}


def means_nothing(annotation: ast.AST | None) -> bool:
    """Whether a program without this annotation does the same."""
    return not annotation or not MEANT & set(re.findall(r"\w+", ast.unparse(annotation)))


class Stripper(ast.NodeTransformer):
    """Removes docstrings of functions and classes, and annotations.

    A class attribute keeps a placeholder annotation: dataclasses and NamedTuples count those.
    sentences=False: also what only --help prints, the sentences of the settings and all but the
    first line of the module; --help says so.
    """

    def __init__(self, sentences: bool):
        self.sentences, self.attributes = sentences, []

    def visit_Module(self, node: ast.Module) -> ast.AST:
        self.generic_visit(node)
        if not self.sentences and ast.get_docstring(node):
            first = ast.get_docstring(node).partition("\n")[0]
            node.body[0].value.value = first + HELP_NOTE
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not self.sentences and ast.unparse(node.func) == "knob" and len(node.args) > 1:
            node.args[1] = ast.Constant("")
        return node

    def without_docstring(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.attributes += [part for part in node.body if isinstance(part, ast.AnnAssign)]
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


def stripped(tree: ast.Module, *, sentences: bool = True) -> ast.Module:
    """A copy of the program without docstrings (but the module's) and annotations.

    Nor does it import what annotations alone used.
    """
    copy = ast.parse(ast.unparse(tree))
    before = names_used(copy)
    copy = ast.fix_missing_locations(Stripper(sentences).visit(copy))
    unused = before - names_used(copy)
    for node in copy.body:
        if isinstance(node, ast.ImportFrom):
            kept = [alias for alias in node.names if (alias.asname or alias.name) not in unused]
            node.names = kept or node.names[:1]
    return copy


def names_used(tree: ast.AST) -> set[str]:
    """Names that the program reads or sets."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def bound_names(tree: ast.AST) -> Iterator[str]:
    """Names that assignments, loops, imports, handlers and definitions give a meaning to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name


def outer_functions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Functions and methods that stand in no other function."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from outer_functions(node)


def rename_globals(tree: ast.Module) -> ast.Module:
    """Give functions and constants of the module names of two letters, in place; returns the tree.

    Only those that no other code can reach by name: without decorators, not PUBLIC, in no string,
    attribute, keyword, parameter or import, and bound at the top of the file alone.
    """
    own, fixed, places = {}, set(PUBLIC), []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            own[node] = node.name
        for target in node.targets if isinstance(node, ast.Assign) else ():
            own |= {n: n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        if node in own or isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            places.append((node, "id" if isinstance(node, ast.Name) else "name"))
            continue
        for _, value in ast.iter_fields(node):
            texts = [
                v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)
            ]
            fixed.update(*(re.findall(r"\w+", text) for text in texts))
    taken = fixed | {getattr(*place) for place in places} | {*dir(builtins), *keyword.kwlist}
    pairs = map("".join, itertools.product(string.ascii_letters, repeat=2))
    local = [name for name in dict.fromkeys(own.values()) if name not in fixed]
    names = dict(zip(local, (pair for pair in pairs if pair not in taken), strict=False))
    for node, field in places:
        setattr(node, field, names.get(getattr(node, field), getattr(node, field)))
    return tree


def rename_locals(tree: ast.Module) -> ast.Module:
    """Give local variables names of one letter, in place; returns the tree.

    A name changes in a whole outer function at once, inner functions included, so that closures
    hold together. Untouched: parameters, attributes, functions, imports, and whatever is global or
    built in, here or in a function that names it so.
    """
    fixed = set(dir(builtins))
    for node in tree.body:
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        fixed |= {node.name} if named else set(bound_names(node))
    for function in outer_functions(tree):
        kept, uses = set(fixed), []
        for node in ast.walk(function):
            if isinstance(node, ast.arg):
                kept.add(node.arg)
            elif isinstance(node, (ast.Global, ast.Nonlocal)):
                kept.update(node.names)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.alias)):
                kept.update(bound_names(node) if isinstance(node, ast.ClassDef) else ())
                kept.add((getattr(node, "asname", None) or node.name).partition(".")[0])
            elif isinstance(node, (ast.MatchAs, ast.MatchStar)):
                kept.add(node.name)
            elif isinstance(node, ast.Name):
                uses.append(node)
        handlers = [n for n in ast.walk(function) if isinstance(n, ast.ExceptHandler) and n.name]
        stored = [n.id for n in uses if isinstance(n.ctx, ast.Store)] + [n.name for n in handlers]
        uses.sort(key=lambda n: (n.lineno, n.col_offset))  # so that new names come in order
        order = [n.id for n in uses] + [n.name for n in handlers]
        local = [name for name in dict.fromkeys(order) if name in set(stored) - kept]
        taken = kept | ({n.id for n in uses} - set(local))
        names = dict(zip(local, (c for c in string.ascii_letters if c not in taken), strict=False))
        for node in uses:
            node.id = names.get(node.id, node.id)
        for handler in handlers:
            handler.name = names.get(handler.name, handler.name)
    return tree


def without_blanks(source: str) -> str:
    """The same tokens with one blank per level of indentation and none that can be spared."""
    lines, out, depth, inside = source.splitlines(keepends=True), [], 0, 0
    last, line_end = "\n", (0, 0)
    starts, ends = ("FSTRING_START", "TSTRING_START"), ("FSTRING_END", "TSTRING_END")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text = tokenize.tok_name[token.type], token.string
        if kind in ("NL", "COMMENT", "ENDMARKER"):
            continue
        if kind in ("INDENT", "DEDENT"):
            depth += 1 if kind == "INDENT" else -1
            continue
        if kind in starts:
            inside, line_end = inside + 1, line_end if inside else token.start
        if inside:  # from Python 3.12 on an f-string is many tokens; its blanks are its own
            inside -= kind in ends
            if inside:
                continue
            (row, column), (end_row, end) = line_end, token.end
            part = lines[row - 1 : end_row]
            part[-1] = part[-1][:end]
            text = "".join(part)[column:]
        if kind == "NEWLINE":
            out.append("\n")
        else:
            words = re.match(r"\w", text) and re.search(r"\w$", last)
            out.append(" " * depth if last == "\n" else " " * bool(words))
            out.append(text)
        last = "\n" if kind == "NEWLINE" else text
    return "".join(out)


def small_source(source: str, *, sentences: bool = True) -> str:
    """The program in as few characters as its syntax tree allows; ASCII."""
    tree = stripped(ast.parse(source), sentences=sentences)
    tree = rename_locals(rename_globals(tree))
    text = without_blanks(ast.unparse(tree) + "\n")
    text = text.encode("ascii", "backslashreplace").decode()  # only strings hold other characters
    assert ast.dump(ast.parse(text)) == ast.dump(tree), "the small source is another program"
    return text


# ---------------------------------------------------------------------------------------------
# 2  The model: which bit comes next, from what followed in sixteen kinds of context
# A text is coded symbol by symbol, each a walk down one binary tree. Integers only, so that every
# machine and Python predicts the same. The packed file contains these functions.
# ---------------------------------------------------------------------------------------------

BASE = 253  # the bytes of a comment: all but NUL, LF and CR
COMMON = " ,.()=_'a:ecb0tidrfson[]l1g{}*pmhu2-k+/xjvq634"  # by falling frequency
# Symbols from 128 on: a line's end and the blanks after it, frequent words, other words.
BLANKS, FREQUENT, WORDS = 12, 24, 640


def contexts() -> Generator[tuple, str, None]:
    """What has been read, in two tuples, first of nothing and then after each symbol sent.

    The keys under which the predictors keep what followed, and those of the sets of weights.
    """
    text = word = token = quote = kinds = ""
    calls, first, last, start = [("", 0)], {}, {}, True
    indent = match = 0
    while True:
        recent, inside, call = text[-1:], word != "", calls[-1]
        ahead = text[match] if match else ""
        keys = "", recent, text[-2:], text[-3:], text[-4:-1], (ahead, recent), word, (word, quote)
        keys += text[-5:], (word, indent, start), (word, token, first.get(indent))
        keys += (word, call), (word, token, call[0]), (inside, kinds[-2:], first.get(indent))
        weights = recent, text[-2:-1], ahead, (inside, kinds[-2:]), (indent, len(calls), quote)
        symbol = yield (*keys, (inside, kinds[-4:]), (inside, kinds)), weights
        text += symbol
        match = match + 1 if ahead == symbol else last.get(text[-4:], 0)
        last[text[-4:]] = len(text)
        line_end = 0 <= ord(symbol) - 128 < BLANKS
        if not line_end and (symbol > "~" or symbol.isalnum() or symbol == "_"):
            word += symbol
            continue
        for token in filter(None, (word, "\n" if line_end else symbol.strip(" "))):
            if start:
                first[indent], start = token, False
            kinds = (kinds + ("w" if token == word else token))[-6:]
        if symbol in "'\"":
            quote = "" if quote == symbol else quote or symbol
        if line_end:
            quote, calls, start, indent = "", [("", 0)], True, symbol
        elif quote:
            pass
        elif symbol in "([{":
            calls.append((word or symbol, 0))
        elif symbol in ")]}":
            calls = calls[:-1] or [("", 0)]
        elif symbol == ",":
            calls[-1] = call[0], call[1] + 1
        word = ""


def symbol_tree() -> list[list[int]]:
    """Nodes, the root first: two children and the first symbol of the second.

    A child is the number of a node, or -1 - symbol for a leaf.

    The symbols stand in order of their codes, so that neighbours share a path, and common ones
    are near the root.
    """
    weight = [25] * 128 + [200] * BLANKS + [100] * FREQUENT + [10] * (WORDS - FREQUENT)
    for place, symbol in enumerate(COMMON, 11):
        weight[ord(symbol)] = 44000 // place - 600
    nodes, todo = [], [(0, len(weight), [0], 0)]
    for low, high, parent, side in todo:
        if high - low < 2:
            parent[side] = -1 - low
            continue
        balance = [abs(2 * sum(weight[low:m]) - sum(weight[low:high])) for m in range(low, high)]
        middle = max(low + 1, low + balance.index(min(balance)))
        parent[side] = len(nodes)
        nodes.append([0, 0, middle])
        todo += [(low, middle, nodes[-1], 0), (middle, high, nodes[-1], 1)]
    return nodes


def tables() -> tuple:
    """Logistic function and its inverse (x in 256ths, p in 65536ths), and the steps of a count.

    A count is 13 bits: how often the context was seen (up to 127), and the last bits that followed
    (up to 5, after a leading 1).
    """
    half, p = [], 1 << 31
    for _ in range(2048):
        half.append(p >> 16)
        p += p * ((1 << 32) - p) >> 40
    squash = [65536 - p for p in half[:0:-1]] + half
    stretch, x = [], 0
    for p in range(8, 65536, 16):
        while x < 4094 and squash[x] < p:
            x += 1
        stretch.append(x - 2047)
    step = [[], []]
    for count in range(8192):
        for bit in (0, 1):
            seen = count % 64 * 2 + bit
            seen = seen % 32 + 32 if seen > 63 else seen
            step[bit].append(min(count // 64 + 1, 127) * 64 + seen)
    rate = [131072 // (2 * (count // 64) + 3) for count in range(8192)]
    return squash, stretch, step, rate


def spell(choose: Callable[[int], int], size: int, known: str) -> str:
    """The text of `size` symbols after `known`, whose bits `choose` gives, one at a time.

    Args:
        choose: gets the probability that the next bit is 1, in 65536ths, and returns that bit.
        known: symbols to learn from beforehand.
    Source: context mixing after M. Mahoney's PAQ: counts and bit histories, mixed in the logistic
    domain by the sum of six sets of weights that learn on the way: one of the node of the tree,
    five of the context. What was all but certain teaches nothing, and is passed over to save time.
    """
    squash, stretch, step, rate = tables()
    nodes, context, text = symbol_tree(), contexts(), ""
    keys, chosen = next(context)
    maps, sets, inputs = [{} for _ in keys], [{} for _ in chosen], 2 * len(keys) + 1
    histories = [[32768] * 64 for _ in keys]
    node_weights = [[70000] * inputs for _ in nodes]
    for place in range(-len(known), size):
        counts = [m.setdefault(key, {}) for m, key in zip(maps, keys)]  # noqa: B905
        rows = [s.setdefault(key, [70000] * inputs) for s, key in zip(sets, chosen)]  # noqa: B905
        before = common = list(map(sum, zip(*rows)))  # noqa: B905
        node = 0
        while node >= 0:
            found = [c.get(node, 32768 << 13 | 1) for c in counts]
            x = [stretch[f >> 17] for f in found]
            x += [stretch[h[f & 63] >> 4] for h, f in zip(histories, found)]  # noqa: B905
            x.append(256)
            own = node_weights[node]
            dot = sum(map(mul, map(add, own, common), x)) >> 22
            p = squash[dot + 2047 if -2048 < dot < 2048 else 4094 * (dot > 0)]
            bit = choose(p) if place >= 0 else ord(known[place]) >= nodes[node][2]
            goal, steps = bit << 16, step[bit]
            error = goal - p
            if not -1300 < error < 1300:
                change = [i * error >> 11 for i in x]
                own[:] = map(add, own, change)
                common = [w + len(rows) * c for w, c in zip(common, change)]  # noqa: B905
                for c, f, h in zip(counts, found, histories):  # noqa: B905
                    p, state, s = f >> 13, f & 8191, f & 63
                    c[node] = p + ((goal - p) * rate[state] >> 16) << 13 | steps[state]
                    h[s] += goal - h[s] >> 7
            node = nodes[node][bit]
        learnt = [(new - old) // len(rows) for new, old in zip(common, before)]  # noqa: B905
        for row in rows:
            row[:] = map(add, row, learnt)
        text += chr(-1 - node)
        keys, chosen = context.send(text[-1])
    return text[len(known) :]


def joined_lines(text: str) -> str:
    """The text with one symbol for each line's end and the blanks after it."""
    for count in range(BLANKS)[::-1]:
        text = text.replace("\n" + " " * count, chr(128 + count))
    return text


def expand(data: bytes, known: str = "") -> str:
    """The text that `compress` made these bytes of, with the same `known`."""
    digits = iter([c - 1 - (c > 10) - (c > 13) for c in data])

    def number(places: int) -> int:
        value = 0
        for _ in range(places):
            value = value * BASE + next(digits, 0)
        return value

    def choose(p: int) -> int:
        nonlocal value, width
        part = width * p >> 16
        bit = value < part
        value, width = (value, part) if bit else (value - part, width - part)
        while width < BASE**3:
            value, width = value * BASE + next(digits, 0), width * BASE
        return bit

    size, value, width = number(3), number(4), BASE**4
    words, _, body = spell(choose, size, joined_lines(known)).partition("\n")
    blanks = ["\n" + " " * count for count in range(BLANKS)]
    return body.translate(dict(enumerate(blanks + words.split(" "), 128)))


def program(scope: dict, head: str, data: bytes, codec: str) -> CodeType:
    """The code of a packed file; its lines are made known to tracebacks and `inspect`.

    Args:
        scope: variables of the module, which has not yet.
        head: the packed file's own lines; the program's are numbered from there.
        data: what `compress` gave, which knew `codec`.
    """
    name, text = scope["__file__"], expand(data, codec)
    # Without a time of change the lines stay: linecache would read the packed file instead.
    linecache.cache[name] = (len(text), None, (head + text).splitlines(True), name)
    if scope["__name__"] == "__main__":  # before Python 3.13 the built-in one reads the file
        sys.excepthook = traceback.print_exception
    return compile("\n" * head.count("\n") + text, name, "exec")


# ---------------------------------------------------------------------------------------------
# 3  Packing: the way back, and the file
# ---------------------------------------------------------------------------------------------


def comment_bytes(digits: list[int]) -> bytes:
    """Digits 0 to 252 as the bytes of a comment."""
    return bytes(d + 1 + (d > 8) + (d > 10) for d in digits)


def with_words(text: str) -> str:
    """A list of words, then the text with one character (128 and up) for each and for a line's end.

    The list is alphabetical, first the frequent ones and then the others.
    """
    counts = collections.Counter(re.findall("[A-Za-z]{2,}", text))
    gain = {word: (n - 1) * (2 * len(word) - 1) for word, n in counts.items() if n > 2}
    words = sorted(sorted(gain), key=gain.get, reverse=True)[:WORDS]
    words = sorted(sorted(words), key=counts.get, reverse=True)
    words = sorted(words[:FREQUENT]) + sorted(words[FREQUENT:])
    codes = {word: chr(code) for code, word in enumerate(words, 128 + BLANKS)}
    body = re.sub("[A-Za-z]+", lambda found: codes.get(found[0], found[0]), text)
    return " ".join(words) + "\n" + joined_lines(body)


def symbol_paths() -> dict[str, list[int]]:
    """The bits from the root of `symbol_tree` to each symbol."""
    nodes, paths = symbol_tree(), {0: []}
    for node, children in enumerate(nodes):
        paths |= {child: [*paths[node], bit] for bit, child in enumerate(children[:2])}
    return {chr(-1 - leaf): path for leaf, path in paths.items() if leaf < 0}


def compress(text: str, known: str = "") -> bytes:
    """An ASCII text as bytes that a comment can hold; `expand` is the inverse.

    known: an ASCII text to learn from, which `expand` must be given too.
    """
    if not text.isascii():
        raise ValueError("only ASCII text can be compressed; escape other characters")
    paths, text = symbol_paths(), with_words(text)
    bits = (bit for symbol in text for bit in paths[symbol])
    low, width, digits = 0, BASE**4, []

    def choose(p: int) -> int:
        nonlocal low, width
        bit, part = next(bits), width * p >> 16
        low, width = (low, part) if bit else (low + part, width - part)
        while width < BASE**3:
            digits.append(low // BASE**3)
            low, width = low % BASE**3 * BASE, width * BASE
        return bit

    spell(choose, len(text), joined_lines(known))
    digits += [0] * 4
    for place in range(1, 5):
        low, digits[-place] = divmod(low, BASE)
    digits[-5:-4] = [digits[-5] + low] if len(digits) > 4 else []
    for place in range(len(digits) - 1, 0, -1):  # carries
        carry, digits[place] = divmod(digits[place], BASE)
        digits[place - 1] += carry
    size = [len(text) // BASE**2, len(text) // BASE % BASE, len(text) % BASE]
    return comment_bytes(size + digits)


def codec_source() -> str:
    """What the packed file needs of this one."""
    parts = (contexts, symbol_tree, tables, spell, joined_lines, expand, program)
    source = "import linecache, sys, traceback\nfrom operator import add, mul\n"
    source += f"{BASE=}\n{COMMON=}\n{BLANKS=}\n{FREQUENT=}\n{WORDS=}\n"
    return small_source(source + "\n".join(inspect.getsource(part) for part in parts))


# What a person and Python read of the packed file; two comments of data follow.
HEAD = """\
# -*- coding: latin-1 -*-
# Packed by records/pack.py from the readable source beside this file, sha256 {digest}
def unpacked():
 import sys,zlib
 head,*data=open(__file__,"rb").read().split(b"\\n#:")
 if zlib.crc32(b"".join(data))!={crc}:
  print(__file__+": damaged, it must be copied or packed again",file=sys.stderr)
  sys.exit(2)
 n,codec=0,{{}}
 for c in data[0]:n=n*253+c-1-(c>10)-(c>13)
 text=zlib.decompress(n.to_bytes({size},"big")).decode()
 exec(text,codec)
 return codec["program"](globals(),head.decode()+"\\n#:\\n",data[1],text)
exec(unpacked())"""


def pack_source(source: str) -> bytes:
    """The source of a program as a smaller file that does the same.

    Sentences of the settings are kept if the file is within LIMIT_BYTES with them. That is tried,
    as it takes long, only if there is room for a bit per character of theirs; they need more.
    """
    known = codec_source()
    codec = zlib.compress(known.encode(), 9)
    number, digits = int.from_bytes(codec, "big"), []
    while number:
        number, digit = divmod(number, BASE)
        digits.append(digit)

    def packed(small: str) -> bytes:
        data = [comment_bytes(digits[::-1]), compress(small, known)]
        crc, digest = zlib.crc32(b"".join(data)), hashlib.sha256(source.encode()).hexdigest()[:16]
        head = HEAD.format(digest=digest, crc=crc, size=len(codec)).encode()
        return b"\n#:".join([head, *data])

    short, whole = (small_source(source, sentences=wanted) for wanted in (False, True))
    least = packed(short)
    if len(least) + (len(whole) - len(short)) // 8 > LIMIT_BYTES:
        return least
    most = packed(whole)
    return most if len(most) <= LIMIT_BYTES else least


def unpack_source(packed: bytes) -> str:
    """The program in a packed file: `small_source` of the readable one.

    Raises: ValueError if it is no packed file, or a damaged one.
    """
    head, *data = packed.split(b"\n#:")
    crc = re.search(rb"!=(\d+):", head)
    if not crc or len(data) != 2 or int(crc[1]) != zlib.crc32(b"".join(data)):
        raise ValueError("not a packed file, or a damaged one")
    return expand(data[1], codec_source())


def main(argv: list[str]) -> int:
    """Pack a file; returns the exit status."""
    try:
        if len(argv) != 2:
            raise ValueError("expected two arguments: the readable source, the file to write")
        source, out = Path(argv[0]), Path(argv[1])
        if out.exists() and out.samefile(source):
            raise ValueError(f"{out}: is the readable source; name another file to write")
        readable = source.read_bytes()
        packed = pack_source(readable.decode("utf-8"))
        if len(packed) > LIMIT_BYTES:
            raise ValueError(f"{source}: packed {len(packed):,} bytes, limit {LIMIT_BYTES:,}")
        part = out.with_name(f".{out.name}.part")
        part.write_bytes(packed)
        part.replace(out)
    except (OSError, SyntaxError, ValueError) as error:
        print(f"pack.py: {error}", file=sys.stderr)
        return 2
    print(f"{source}: {len(readable):,} bytes, packed {len(packed):,} bytes: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
