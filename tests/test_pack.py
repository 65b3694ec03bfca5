"""records/pack.py: the packed file is the same program, small, and fails in one line if damaged."""

import ast
import json
import lzma
import re
import subprocess
import symtable
import sys
from pathlib import Path

import conftest
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

ROOT = Path(t.__file__).parent
sys.path.insert(0, str(ROOT / "records"))
import pack  # noqa: E402 -- a tool beside the records

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
# Every kind of thing that stripping and renaming must get right.
PROGRAM = '''"""What --help prints: é, ≤, tab\\t."""
from __future__ import annotations
import sys
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

def knob(default, sentence, *, low=None) -> Any:
    """Doc."""
    return field(default=default, metadata=dict(sentence=sentence, low=low))

@dataclass(frozen=True)
class Config:
    """Doc."""
    steps: int = knob(3, "how many steps")
    name: Any = field(default="é…", repr=False)
    kind: ClassVar[str] = "class"

class Pair(NamedTuple):
    left: int
    right: float = 2.5

def ratio(count: int, *, rows: float = 1.0) -> str:
    """Doc."""
    quotient: float = rows / count  # a comment
    later: int
    later = [quotient * row for row in range(3)][-1]

    def inner(total):
        nonlocal later
        later += total + quotient
        return f"{later:.{count}f} {count!r}  {'a  b'}"

    try:
        return inner(total=count)
    except ValueError as error:
        raise SystemExit(str(error)) from error

def empty():
    """Only a docstring."""

__all__ = ["Config", "Pair", "ratio"]
if __name__ == "__main__":
    print(__doc__, Config(), Config.kind, len(fields(Config)), Pair(1), Config().name, empty())
    print(fields(Config)[0].metadata["sentence"], ratio(2, rows=3.0), __name__)
    ratio(int(sys.argv[1]))
'''


def run(path, *args, **env):
    return subprocess.run(
        [sys.executable, str(path), *args],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", **env},
    )


def write(folder, source, name="program.py"):
    path = folder / name
    path.write_bytes(pack.pack_source(source))
    return path


# --- the coder ------------------------------------------------------------------------------


@given(st.text(st.characters(max_codepoint=127), max_size=60) | st.text("ab (\n", max_size=200))
@settings(max_examples=30, deadline=None)
def test_what_is_compressed_is_expanded_to_the_same_text_by_bytes_of_a_comment(text):
    data = pack.compress(text)
    assert pack.expand(data) == text
    assert not {0, 10, 13} & set(data), "they would end the comment, or Python would refuse them"


def test_a_text_that_is_not_ascii_is_refused():
    with pytest.raises(ValueError, match="ASCII"):
        pack.compress("é")


def test_a_text_of_one_repeated_line_costs_nearly_nothing():
    line = "def forward(self, x): return self.norm(x)\n"
    assert len(pack.compress(line * 40)) < len(pack.compress(line)) + 40


def test_the_logistic_tables_are_the_logistic_function():
    squash, stretch, _, _ = pack.tables()
    for x in range(-2047, 2048, 89):
        assert squash[x + 2047] / 65536 == pytest.approx(1 / (1 + t.math.exp(-x / 256)), abs=2e-3)
    assert all(abs(squash[stretch[p >> 4] + 2047] - p) < 600 for p in range(40, 65500, 333))


# --- the program ----------------------------------------------------------------------------


def bare(source, *, sentences=True):
    """The tree without docstrings and annotations, and without the texts of --help if so asked."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kind = type(node)
        if kind in (ast.FunctionDef, ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if kind is ast.FunctionDef:
            node.returns = None
        if kind is ast.arg:
            node.annotation = None
        if kind is ast.AnnAssign:
            node.annotation = ast.Name("int", ast.Load())
        for block in (b for _, b in ast.iter_fields(node) if isinstance(b, list)):
            for place, part in enumerate(block):
                if kind is not ast.ClassDef and isinstance(part, ast.AnnAssign) and part.value:
                    block[place] = ast.Assign([part.target], part.value, lineno=1)
        if not sentences and kind is ast.Call and ast.unparse(node.func) == "knob":
            node.args[1].value = ""
        if not sentences and kind is ast.Module:
            node.body[0].value.value = ""
    return tree


def outer_functions(tree):
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    return [node for scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef)]


def variables(function):
    """Every place of the function that names a variable: (node, attribute)."""
    fields = {ast.Name: "id", ast.ExceptHandler: "name"}
    nodes = [node for node in ast.walk(function) if type(node) in fields]
    return [(n, fields[type(n)]) for n in nodes if getattr(n, fields[type(n)])]


def scopes(table):
    """What each scope says of its names: those of parameters and globals, and how many others."""
    kinds = [
        [s.get_name() for s in table.get_symbols() if s.is_parameter() or s.is_global()],
        [(s.is_local(), s.is_free(), s.is_assigned()) for s in table.get_symbols()],
    ]
    return table.get_name(), [sorted(k) for k in kinds], [scopes(c) for c in table.get_children()]


def top_names(tree):
    """Every name that the top of a file gives a function or a variable, in order."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and stored(n))


def stored(name):
    return isinstance(name.ctx, ast.Store)


def name_back(tree, other):
    """Undo the short names of functions and constants: one to one, and never another's name."""
    pairs = dict(zip(top_names(other), top_names(tree), strict=True))
    assert len(set(pairs.values())) == len(pairs)
    changed = {short: name for short, name in pairs.items() if short != name}
    text = ast.unparse(other)
    assert not {name for name in changed.values() if re.search(rf"\b{name}\b", text)}
    for node in ast.walk(other):
        if isinstance(node, ast.Name):
            node.id = changed.get(node.id, node.id)
        elif node in other.body and isinstance(node, ast.FunctionDef):
            node.name = changed.get(node.name, node.name)
        else:
            texts = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
            assert not changed.keys() & {word for text in texts for word in text.split(".")}
    return changed


def drop_unused_imports(tree, other):
    """Imports that only annotations used are not in the packed file, all others are."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node, packed in zip(tree.body, other.body, strict=True):
        if isinstance(node, ast.ImportFrom):
            left = {alias.name for alias in packed.names}
            assert not used & {(a.asname or a.name) for a in node.names if a.name not in left}
            node.names = [alias for alias in node.names if alias.name in left]


def assert_same_program(readable, packed, *, sentences=True):
    """Named back, function by function and one to one, the packed tree is the readable one."""
    tree, other = bare(readable, sentences=sentences), bare(packed, sentences=sentences)
    name_back(tree, other)
    drop_unused_imports(tree, other)
    found = [scopes(symtable.symtable(ast.unparse(t), "", "exec")) for t in (tree, other)]
    assert found[0] == found[1]
    for function, renamed in zip(outer_functions(tree), outer_functions(other), strict=True):
        pairs = list(zip(variables(function), variables(renamed), strict=True))
        names = {(getattr(*a), getattr(*b)) for a, b in pairs}
        assert len({a for a, _ in names}) == len(names) == len({b for _, b in names})
        for a, b in pairs:
            setattr(*b, getattr(*a))
    assert ast.dump(tree) == ast.dump(other)


def test_the_small_source_of_every_python_file_here_is_the_same_program():
    for path in [*ROOT.glob("data/*.py"), *ROOT.glob("records/*.py")]:
        source = path.read_text(encoding="utf-8")
        small = pack.small_source(source)
        assert_same_program(source, small)
        assert len(small) < 0.8 * len(source)


def test_a_name_that_others_can_reach_stays_and_all_other_functions_get_short_ones():
    source = "limit = 1\nplace = 2\ndef helper(x): return x + limit\n"
    source += "def shown(x): return helper(x)\nprint('shown', helper(place=1).limit)"
    small = pack.small_source(source)
    assert_same_program(source, small)
    tops = list(top_names(ast.parse(small)))
    assert (tops[0], tops[1], tops[3]) == ("limit", "place", "shown")
    assert len(tops[2]) == 2


def test_what_records_and_data_use_of_the_program_keeps_its_name():
    tops, used = set(top_names(ast.parse(SOURCE))), {"main"}
    for path in [*ROOT.glob("data/*.py"), *ROOT.glob("records/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "train_gpt":
                used |= {alias.name for alias in node.names}
            if isinstance(node, ast.Attribute) and isinstance(
                node.value, (ast.Name, ast.Attribute)
            ):
                name = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                used |= {node.attr} if name in ("t", "program", "train_gpt") else set()
    assert used & tops == pack.PUBLIC - {"program"}
    assert used & tops <= set(top_names(ast.parse(pack.small_source(SOURCE))))


@pytest.mark.parametrize(
    ("old", "new"),
    [("a+b", "a+a"), ("return x", "return y"), ("x:int=0", "x:int=1"), ("c=2", "a=2")],
)
def test_the_comparison_of_programs_sees_a_wrong_one(old, new):
    source = "x:int=0\ny:int=0\ndef f(p):\n a=p\n b=1\n c=2\n print(a+b+c)\n return x"
    assert_same_program(source, source.replace("b", "g"))
    with pytest.raises(AssertionError):
        assert_same_program(source, source.replace(old, new))


def test_a_small_program_of_every_kind_of_thing_says_the_same_packed(tmp_path):
    readable = tmp_path / "readable.py"
    readable.write_text(PROGRAM, encoding="utf-8")
    packed = write(tmp_path, PROGRAM)
    done, again = run(readable, "2"), run(packed, "2")
    assert done.returncode == again.returncode == 0, again.stderr
    assert done.stdout == again.stdout
    assert "Config(steps=3) class 2 Pair(left=1, right=2.5)" in again.stdout
    assert pack.pack_source(PROGRAM) == packed.read_bytes(), "packing twice gives the same bytes"


def test_an_error_inside_shows_its_own_line(tmp_path):
    done = run(write(tmp_path, PROGRAM), "0")
    assert done.returncode == 1
    number, line = re.findall(r"line (\d+), in ratio\n +(.*)\n", done.stderr)[-1]
    assert line == "a=rows/count"
    assert "ZeroDivisionError" in done.stderr
    small = pack.small_source(PROGRAM).splitlines()
    head = (tmp_path / "program.py").read_bytes().split(b"\n#:")[0].count(b"\n") + 2
    assert small[int(number) - head - 1].strip() == line, "the number counts from the file's head"


def test_importing_runs_no_main_and_functions_can_be_pickled_and_read(tmp_path):
    write(tmp_path, PROGRAM)
    script = tmp_path / "use.py"
    script.write_text(
        "import inspect, pickle, program as p\n"
        "assert pickle.loads(pickle.dumps(p.ratio)) is p.ratio\n"
        "assert pickle.loads(pickle.dumps(p.Pair(3))) == p.Pair(3)\n"
        "assert p.__file__.endswith('program.py') and p.__name__ == 'program'\n"
        "print(inspect.getsource(p.ratio).splitlines()[0], inspect.getsource(p.Pair))"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "def ratio(count,*,rows=1.0): class Pair(NamedTuple):\n left:int\n right:int=2.5\n\n"
    )


KERNEL = """
import torch, triton
import triton.language as tl

@triton.jit
def double_kernel(x, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, 2 * tl.load(x + place, mask=place < size), mask=place < size)

def double(x):
    out = torch.empty_like(x)
    double_kernel[(triton.cdiv(x.numel(), 16),)](x, out, x.numel(), BLOCK=16)
    return out

print(double(torch.arange(20.0)).tolist() == [2.0 * i for i in range(20)])
"""


def test_a_triton_kernel_of_a_packed_file_runs(tmp_path):
    pytest.importorskip("triton")
    done = run(write(tmp_path, KERNEL), TRITON_INTERPRET="1", HOME=str(tmp_path))
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("damage", ["a byte", "the end", "a line more"])
def test_a_damaged_file_fails_in_one_line(tmp_path, damage):
    path = write(tmp_path, "print(1)\n")
    packed = bytearray(path.read_bytes())
    packed[-9] ^= 64 if damage == "a byte" else 0
    path.write_bytes({"the end": packed[:-5], "a line more": packed + b"\n#"}.get(damage, packed))
    done = run(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{path}: damaged, it must be copied or packed again\n"
    with pytest.raises(ValueError, match="damaged"):
        pack.unpack_source(path.read_bytes())


def test_the_command_writes_a_whole_file_or_nothing(tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "readable.py", tmp_path / "packed.py"
    source.write_text("print(1)\n")
    assert pack.main([str(source), str(out)]) == 0
    assert f"9 bytes, packed {out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert pack.unpack_source(out.read_bytes()) == "print(1)\n"
    out.unlink()
    for argv in ([], [source, source], [tmp_path / "none.py", out], [tmp_path, out]):
        assert pack.main([str(word) for word in argv]) == 2
    monkeypatch.setattr(pack, "LIMIT_BYTES", 100)
    assert pack.main([str(source), str(out)]) == 2
    source.write_text("print(")
    assert pack.main([str(source), str(out)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["readable.py"]


def test_without_sentences_help_points_at_the_readable_source():
    small = pack.small_source(PROGRAM, sentences=False)
    assert "how many steps" not in small
    assert "the readable one" in ast.get_docstring(ast.parse(small))
    assert_same_program(PROGRAM, small, sentences=False)


# --- train_gpt.py ---------------------------------------------------------------------------

USE = """
import inspect, json, linecache, sys
import train_gpt as p
assert p.main(["--help"], {}) == 0
assert p.main(["--nonsense"], {}) == 2
assert "return" in inspect.getsource(p.GPT.forward)
open(sys.argv[2], "w").writelines(linecache.getlines(p.__file__))
sys.exit(p.main([], json.loads(sys.argv[1])))
"""


def test_the_packed_train_gpt_is_small_and_the_same_program_to_the_artifact(dataset, tmp_path):
    packed = write(tmp_path, SOURCE, "train_gpt.py")
    size = packed.stat().st_size
    assert size <= 25_000
    assert size < 0.9 * len(lzma.compress(pack.small_source(SOURCE).encode(), preset=9))
    small = dict(NUM_LAYERS=3, LOOP_START=1, LOOP_END=1, NUM_LOOPS=1, ITERATIONS=3, VAL_TOKENS=100)
    small |= dict(TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0, GPTQ_CALIBRATION_BATCHES=1)
    env = conftest.tiny_settings(dataset, tmp_path) | {k: str(v) for k, v in small.items()}
    assert t.main([], {**env, "RUN_ID": "readable"}) == 0
    (tmp_path / "use.py").write_text(USE)
    settings_text = json.dumps({**env, "RUN_ID": "packed"})
    done = run(tmp_path / "use.py", settings_text, str(tmp_path / "lines"))
    assert done.returncode == 0, done.stderr
    assert "  MATRIX_BITS " in done.stdout
    assert f" code_bytes={size} " in done.stdout
    assert "--nonsense: expected no arguments" in done.stderr
    blobs = [(tmp_path / "logs" / f"{name}.bin").read_bytes() for name in ("readable", "packed")]
    assert blobs[0] == blobs[1]
    text = (tmp_path / "lines").read_text().partition("\n#:\n")[2]
    assert_same_program(SOURCE, text, sentences=ast.get_docstring(ast.parse(text)) == t.__doc__)
