"""records/bundle.py: a bundle is the same program, small, legal, and refused if damaged."""

import ast
import json
import re
import subprocess
import symtable
import sys
import zlib
from pathlib import Path

import conftest
import pytest

import train_gpt as t

ROOT = Path(t.__file__).parent
sys.path.insert(0, str(ROOT / "records"))
import bundle  # noqa: E402 -- a tool beside the records

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


def write(folder, source, name="program.py", *, for_record=False):
    path = folder / name
    path.write_bytes(bundle.bundle(source, for_record=for_record))
    return path


# --- the program ----------------------------------------------------------------------------


def bare(source):
    """The tree without docstrings and annotations."""
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


def drop_unused_imports(tree, other):
    """Imports that only annotations used are not in the bundle, all others are."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    kept = {ast.dump(node) for node in ast.walk(other) if isinstance(node, ast.alias)}
    for node in [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]:
        gone = [alias for alias in node.names if ast.dump(alias) not in kept]
        assert not used & {a.asname or a.name for a in gone}
        node.names = [alias for alias in node.names if alias not in gone]
        if not node.names:
            tree.body.remove(node)


def assert_same_program(readable, small):
    """Named back, function by function and one to one, the bundled tree is the readable one."""
    tree, other = bare(readable), bare(small)
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


def small_source(source):
    return bundle.small_source(source, for_record=False)


def test_the_small_source_of_every_python_file_here_is_the_same_program():
    for path in [ROOT / "train_gpt.py", *ROOT.glob("data/*.py"), *ROOT.glob("records/*.py")]:
        source = path.read_text(encoding="utf-8")
        small = small_source(source)
        assert_same_program(source, small)
        assert len(small) < 0.95 * len(source)


def test_a_class_inside_a_function_and_a_match_keep_the_names_that_others_see():
    source = "def f(value):\n    class Inner:\n        attribute = 1\n    match value:\n"
    source += "        case {'a': first, **rest}:\n            pass\n        case [*_, last]:\n"
    source += "            first = rest = last\n    return Inner.attribute, first, rest, value\n"
    found, expected = {}, {}
    exec(small_source(source), found)
    exec(source, expected)
    for value in ({"a": 1, "b": 2}, [3, 4]):
        assert found["f"](value) == expected["f"](value)


def test_a_name_that_is_global_outside_an_inner_function_stays_in_all_of_the_outer_one():
    source = (
        "try:\n    import json\n    def double(x):\n        return 2 * x\nexcept ImportError:\n"
    )
    source += "    pass\ndef f(value):\n    def inner():\n        json = double = 1\n"
    source += "        return json + double\n    return json.dumps(double(value)), inner()\n"
    found = {}
    exec(small_source(source), found)
    assert found["f"](2) == ("4", 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [("a+b", "a+a"), ("return x", "return y"), ("x:int=0", "x:int=1"), ("c=2", "a=2")],
)
def test_the_comparison_of_programs_sees_a_wrong_one(old, new):
    source = "x:int=0\ny:int=0\ndef f(p):\n a=p\n b=1\n c=2\n print(a+b+c)\n return x"
    assert_same_program(source, source.replace("b", "g"))
    with pytest.raises(AssertionError):
        assert_same_program(source, source.replace(old, new))


def test_a_small_program_of_every_kind_of_thing_says_the_same_bundled(tmp_path):
    readable = tmp_path / "readable.py"
    readable.write_text(PROGRAM, encoding="utf-8")
    bundled = write(tmp_path, PROGRAM)
    done, again = run(readable, "2"), run(bundled, "2")
    assert done.returncode == again.returncode == 0, again.stderr
    assert done.stdout == again.stdout
    assert "Config(steps=3) class 2 Pair(left=1, right=2.5)" in again.stdout
    assert write(tmp_path, PROGRAM, "again.py").read_bytes() == bundled.read_bytes()


def test_an_error_inside_shows_its_own_line(tmp_path):
    done = run(write(tmp_path, PROGRAM), "0")
    assert done.returncode == 1
    number, line = re.findall(r"line (\d+), in ratio\n +(.*)\n", done.stderr)[-1]
    assert line == "a = rows / count"
    assert "ZeroDivisionError" in done.stderr
    small = small_source(PROGRAM).splitlines()
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
        "def ratio(count, *, rows=1.0): "
        "class Pair(NamedTuple):\n    left: int\n    right: int = 2.5\n\n"
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


def test_a_triton_kernel_of_a_bundle_runs(tmp_path):
    pytest.importorskip("triton")
    done = run(write(tmp_path, KERNEL), TRITON_INTERPRET="1", HOME=str(tmp_path))
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("damage", ["a byte", "the head", "the end", "a line more"])
def test_a_damaged_file_fails_in_one_line(tmp_path, damage):
    path = write(tmp_path, "print(1)\n")
    made = bytearray(path.read_bytes())
    made[{"a byte": -9, "the head": 50}.get(damage, 0)] ^= 2 * (damage in ("a byte", "the head"))
    path.write_bytes({"the end": made[:-5], "a line more": made + b"\n#"}.get(damage, made))
    done = run(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{path}: damaged, it must be copied or bundled again\n"
    with pytest.raises(ValueError, match="damaged"):
        bundle.unbundle(path.read_bytes())


def test_code_that_follows_the_program_under_a_right_crc_is_no_bundle():
    head, _, tail = bundle.bundle("print(1)\n", for_record=False).partition(bundle.MARK)
    for end in (b"\n", b"\r"):
        data = tail[8:] + end + b"print(2)"
        forged = b"%b%b%08x%b" % (head, bundle.MARK, zlib.crc32(head + data), data)
        with pytest.raises(ValueError, match="not a bundle"):
            bundle.unbundle(forged)


def test_the_command_writes_a_whole_file_or_nothing(tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "readable.py", tmp_path / "bundled.py"
    source.write_text("print(1)\n")
    assert bundle.main([str(source), str(out)]) == 0
    assert f"9 bytes, bundled {out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert bundle.unbundle(out.read_bytes())[1] == "print(1)\n"
    out.unlink()
    for words in ([source, source], [tmp_path / "none.py", out], [tmp_path, out]):
        assert bundle.main([str(word) for word in words]) == 2
    monkeypatch.setattr(bundle, "LIMIT_BYTES", 100)
    assert bundle.main([str(source), str(out)]) == 2
    source.write_text("print(")
    assert bundle.main([str(source), str(out)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["readable.py"]


# --- what a record must not contain ---

ILLEGAL = """
import math, sys
from itertools import chain, count
MARK = "illegal"
KEPT, COUNT = 1, 2
UNREAD = 3
class Config:
    steps: int = 5
    prequant_ttt_epochs: int = 0
    prequant_ttt_lr: float = 1.0
class Helper: pass
def deepest(): return Helper, math.pi
def deeper(): return deepest(), KEPT
def shared(): return COUNT
def fine_tune_on_validation(cfg): return deeper(), shared(), chain(), cfg.prequant_ttt_lr
def run(cfg):
    if cfg.steps > 9:
        if cfg.prequant_ttt_epochs:
            fine_tune_on_validation(cfg)
    elif cfg.prequant_ttt_epochs > 0 and cfg.steps:
        print(MARK)
    return shared(), next(count(cfg.steps)), sys.byteorder
"""
LEGAL = """
import sys
from itertools import count
KEPT, COUNT = 1, 2
UNREAD = 3
class Config:
    steps: int = 5
def shared(): return COUNT
def run(cfg):
    if cfg.steps > 9:
        pass
    return shared(), next(count(cfg.steps)), sys.byteorder
"""


def test_a_bundle_for_a_record_lacks_the_illegal_step_and_what_only_that_used():
    found = bundle.small_source(ILLEGAL, for_record=True)
    assert ast.dump(ast.parse(found)) == ast.dump(ast.parse(LEGAL))
    assert_same_program(ILLEGAL, small_source(ILLEGAL))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("SEEN = 'PREQUANT_TTT_LR'", "PREQUANT_TTT is still named"),
        ("step = Config.prequant_ttt_lr", "prequant_ttt is still named"),
        ("def other(): fine_tune_on_validation", "fine_tune_on_validation is still named"),
        ("if cfg.prequant_ttt_epochs:\n    pass\nelse:\n    x = 1", "line 23: .* has an else"),
    ],
)
def test_a_bundle_for_a_record_that_would_still_name_the_illegal_step_is_refused(more, says):
    with pytest.raises(ValueError, match=says):
        bundle.bundle(ILLEGAL + more + "\n", for_record=True)
    bundle.bundle(ILLEGAL + more + "\n", for_record=False)


# --- train_gpt.py ---------------------------------------------------------------------------

USE = """
import inspect, json, linecache, sys
import train_gpt as p
assert p.main(["--help"], {}) == 0
assert p.main(["--nonsense"], {}) == 2
assert p.main([], {"PREQUANT_TTT_EPOCHS": "0", "SMOKE": "1"}) == 2
assert "return" in inspect.getsource(p.GPT.forward)
open(sys.argv[2], "w").writelines(linecache.getlines(p.__file__))
sys.exit(p.main([], json.loads(sys.argv[1])))
"""


def test_a_bundle_of_train_gpt_for_a_record_is_small_legal_and_makes_the_same_artifact(
    dataset, tmp_path, capsys
):
    made = write(tmp_path, SOURCE, "train_gpt.py", for_record=True)
    size = made.stat().st_size
    assert size <= 45_000
    small = dict(NUM_LAYERS=3, LOOP_START=1, LOOP_END=1, NUM_LOOPS=1, ITERATIONS=3, VAL_TOKENS=100)
    small |= dict(TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0, GPTQ_CALIBRATION_BATCHES=1)
    env = conftest.tiny_settings(dataset, tmp_path) | {k: str(v) for k, v in small.items()}
    assert t.main([], {**env, "RUN_ID": "readable"}) == 0
    capsys.readouterr()
    assert t.main(["--help"], {}) == 0
    sentences = capsys.readouterr().out.splitlines()
    (tmp_path / "use.py").write_text(USE)
    settings_text = json.dumps({**env, "RUN_ID": "bundled"})
    done = run(tmp_path / "use.py", settings_text, str(tmp_path / "lines"))
    assert done.returncode == 0, done.stderr
    missing = [line for line in sentences if line not in done.stdout.splitlines()]
    assert missing, "the settings of the illegal step"
    assert all(line.strip().startswith("PREQUANT_TTT_") for line in missing), missing
    assert f" code_bytes={size} " in done.stdout
    assert "--nonsense: expected no arguments" in done.stderr
    assert "PREQUANT_TTT_EPOCHS: not a setting" in done.stderr
    blobs = [(tmp_path / "logs" / f"{name}.bin").read_bytes() for name in ("readable", "bundled")]
    assert blobs[0] == blobs[1]
    text = (tmp_path / "lines").read_text().partition("\n#:\n")[2]
    assert text.rstrip() == bundle.small_source(SOURCE, for_record=True).rstrip()
    assert not re.search("prequant_ttt|fine_tune_on_validation", text, re.IGNORECASE)
