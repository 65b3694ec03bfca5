"""The house rules that a machine can check: limits of the file, and names that must be real."""

import ast
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import train_gpt as t

ROOT = Path(t.__file__).parent
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
# The count may only grow with a feature that a user would name.
CODE_LINES = 3150


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def code_lines(source):
    """Lines that hold code: no blanks, comments or docstrings."""
    lines, silent = set(), (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT)
    docs = {
        (node.body[0].lineno, node.body[0].end_lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node)
    }
    for token in tokenize.generate_tokens(iter(source.splitlines(True)).__next__):
        counts = token.type not in (*silent, tokenize.DEDENT, tokenize.ENDMARKER)
        if counts and (token.start[0], token.end[0]) not in docs:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def python_files():
    return [p for f in ("", "data", "records", "tests") for p in sorted((ROOT / f).glob("*.py"))]


def test_no_line_is_longer_than_100_characters():
    for path in python_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number} has {len(line)}"


def test_no_function_is_longer_than_60_lines():
    for path in python_files():
        for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            length = function.end_lineno - function.lineno + 1
            assert length <= 60, f"{path.name}: {function.name} has {length} lines"


def test_the_file_does_not_grow_unnoticed(capsys):
    count = code_lines(SOURCE)
    with capsys.disabled():
        print(f"\ntrain_gpt.py: {count} lines of code", end=" ")
    assert count <= CODE_LINES


def test_code_lines_are_counted_without_blanks_comments_and_docstrings():
    source = '"""Doc\nstring."""\n\n# comment\nx = 1  # end\n\n\n'
    source += 'def f():\n    "doc"\n    return (\n        x\n    )\n'
    assert code_lines(source) == 5


def test_every_public_function_and_class_has_a_docstring_and_types():
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef) and node.name != "knob":
            assert node.returns is not None, node.name
            args = node.args.args + node.args.kwonlyargs
            assert all(a.annotation for a in args), node.name


def test_the_sections_stand_in_the_order_the_program_runs():
    found = re.findall(r"^# (\d+)  (\w+)", SOURCE, flags=re.M)
    names = (
        "Settings Runtime Data Kernels Tensors Model Optimizer Training Quantization Artifact "
        "Evaluation Main"
    )
    assert found == [(str(i), name) for i, name in enumerate(names.split(), 1)]


def test_only_config_and_runtime_and_main_read_the_environment():
    readers = [m.start() for m in re.finditer(r"os\.environ|\benv\b\.get|getenv", SOURCE)]
    config = range(SOURCE.index("class Config:"), SOURCE.index("SAMPLE_DIR ="))
    runtime = range(SOURCE.index("class Runtime:"), SOURCE.index("def cpu_name"))
    main = range(SOURCE.index("def main("), len(SOURCE))
    for place in readers:
        assert any(place in part for part in (config, runtime, main)), SOURCE[place:][:60]


def test_only_runtime_talks_to_torch_distributed():
    inside = range(SOURCE.index("class Runtime:"), SOURCE.index("def cpu_name"))
    assert all(m.start() in inside for m in re.finditer(r"\bdist\.", SOURCE))


def capital_names(text):
    """Words that look like settings: capitals with an underscore."""
    return set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", text))


# Variables of other programs, and constants, that our texts may name.
FOREIGN = set("WORLD_SIZE LOCAL_RANK CUDA_VISIBLE_DEVICES OMP_NUM_THREADS".split())


def known_names():
    settings = {s.name.upper() for s in t.knobs()} | set(t.ALIASES) | set(t.RETIRED)
    return settings | {name for name in vars(t) if name.isupper()} | FOREIGN


def test_every_setting_that_an_error_message_or_sentence_names_exists():
    strings = [n.value for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.Constant)]
    text = " ".join(s for s in strings if isinstance(s, str))
    unknown = capital_names(text) - known_names() - set(t.FAMILIES)
    assert unknown <= {"PGLM"} | {f.rstrip("_") for f in t.FAMILIES}, unknown


def test_every_setting_that_the_readme_names_exists_and_its_table_tells_the_truth():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    data_tools = set(
        "MATCHED_FINEWEB_REPO_ID MATCHED_FINEWEB_REMOTE_ROOT_PREFIX HF_ENDPOINT".split()
    )
    assert capital_names(text) - known_names() - data_tools == set()
    rows = re.findall(r"^\| `([A-Z_0-9]+)` \| `?([^|`]*)`? \|", text, flags=re.M)
    defaults = {s.name.upper(): s.default for s in t.knobs()}
    assert len(rows) >= 20
    for name, value in rows:
        default = defaults[name]
        default = int(default) if isinstance(default, bool) else default
        assert value.strip() == (str(default) or "(empty)"), name


def test_the_linter_and_the_formatter_have_nothing_to_say():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
