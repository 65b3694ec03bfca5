"""The house rules that a machine can check: limits of the file, and names that must be real.

A check reads a source and returns its faults, one readable line each.
"""

import ast
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import train_gpt as t

ROOT = Path(t.__file__).parent
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
# Code lines of each section. A section that wants more takes the lines from itself.
CEILINGS = dict(
    Settings=470,
    Runtime=315,
    Data=285,
    Kernels=450,
    Tensors=100,
    Model=330,
    Optimizer=150,
    Training=270,
    Quantization=260,
    Artifact=300,
    Evaluation=430,
    Main=205,
)
TOTAL, FORWARD_LINES, POSITIONAL, FUNCTION_LINES, COLUMNS = 3500, 250, 5, 60, 100


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def headings(source):
    """Line, number and name of each section."""
    found = re.finditer(r"^# (\d+)  (\w+)$", source, flags=re.M)
    return [(source.count("\n", 0, m.start()) + 1, int(m[1]), m[2]) for m in found]


def section_of(line, heads):
    """The name of the section that holds a line, or nothing above the first one."""
    return next((name for start, _, name in reversed(heads) if start <= line), "")


def code_lines(source):
    """Numbers of the lines that hold code: no blanks, comments or docstrings."""
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
    return lines


def global_names(node, local=frozenset()):
    """Each name that a node reads and no function around it binds; annotations included."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
        yield node.id
    body, inner = [], local
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        body = node.body if isinstance(node.body, list) else [node.body]
        inside = [n for part in (node.args, *body) for n in ast.walk(part)]
        stored = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        named = {getattr(n, key, None) for n in inside for key in ("arg", "name", "asname")}
        inner = local | stored | named  # parameters; inner functions, imports, caught errors
    for child in ast.iter_child_nodes(node):
        yield from global_names(child, inner if child in body else local)


# --- the checks ---


def wrong_sections(source):
    found = [(number, name) for _, number, name in headings(source)]
    expected = list(enumerate(CEILINGS, 1))
    return [f"sections {found}, expected {expected}"] if found != expected else []


def sections_over_their_ceiling(source):
    heads, count = headings(source), dict.fromkeys(CEILINGS, 0)
    lines = code_lines(source)
    for line in lines:
        name = section_of(line, heads)
        count[name] = count.get(name, 0) + 1
    count["the file"] = len(lines)
    limits = CEILINGS | {"the file": TOTAL}
    over = {name: n for name, n in count.items() if n > limits.get(name, n)}
    return [f"{name} has {n} code lines of {limits[name]}" for name, n in over.items()]


def names_used_above_their_section(source):
    tree, heads, home = ast.parse(source), headings(source), {}
    order = {name: number for _, number, name in heads} | {"": 0}

    def place(node):
        return order[section_of(node.lineno, heads)]

    for node in tree.body:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and is_stored(n)}
        for name in [node.name] if hasattr(node, "name") else names:
            home.setdefault(name, place(node))
    return [
        f"{getattr(node, 'name', f'line {node.lineno}')} uses {name}"
        for node in tree.body
        for name in dict.fromkeys(global_names(node))
        if home.get(name, 0) > place(node)
    ]


def is_stored(name):
    return isinstance(name.ctx, ast.Store)


def a_forward_far_from_its_heading(source):
    (line,) = (
        function.lineno
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "GPT"
        for function in functions(node)
        if function.name == "forward"
    )
    far = line - max(start for start, _, _ in headings(source) if start <= line)
    return [f"GPT.forward is {far} lines below its heading"] if far > FORWARD_LINES else []


def functions_with_many_positional_parameters(source):
    faults = []
    for function in functions(ast.parse(source)):
        names = [a.arg for a in function.args.posonlyargs + function.args.args]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        on_a_gpu = any(ast.unparse(d).startswith("triton.jit") for d in function.decorator_list)
        if count > POSITIONAL and not on_a_gpu:
            faults.append(f"{function.name} has {count} positional parameters")
    return faults


def long_functions(source):
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions(ast.parse(source))}
    return [f"{name} has {n} lines" for name, n in lengths.items() if n > FUNCTION_LINES]


def long_lines(source):
    lines = enumerate(source.splitlines(), 1)
    return [f"line {n} has {len(text)} columns" for n, text in lines if len(text) > COLUMNS]


def phases_outside_the_closed_list(source):
    """Names given to a budget's phase or total."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and re.fullmatch(r"(.*\.)?budget\.(phase|total)", ast.unparse(node.func))
    ]
    named = [n.value for call in calls for n in ast.walk(call) if isinstance(n, ast.Constant)]
    return [f"phase {name}" for name in named if name not in t.Budget.PHASES]


OF_EVERY_FILE = (long_lines, long_functions)
OF_EVERY_PROGRAM = (functions_with_many_positional_parameters,)
OF_TRAIN_GPT = (
    wrong_sections,
    sections_over_their_ceiling,
    names_used_above_their_section,
    a_forward_far_from_its_heading,
    phases_outside_the_closed_list,
)


def python_files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("check", [*OF_EVERY_FILE, *OF_EVERY_PROGRAM, *OF_TRAIN_GPT])
def test_the_sources_keep_each_rule_of_the_house(check):
    folders = [""]
    folders += ["data", "records"] if check not in OF_TRAIN_GPT else []
    folders += ["tests"] if check in OF_EVERY_FILE else []
    sources = {path: path.read_text(encoding="utf-8") for path in python_files(*folders)}
    assert SOURCE in sources.values()
    faults = [f"{path.name}: {fault}" for path, text in sources.items() for fault in check(text)]
    assert not faults


def made_up(**bodies):
    """A program of all sections; `bodies` are the sources of some, by name."""
    parts = [f"# {n}  {name}\n{bodies.get(name, '')}\n" for n, name in enumerate(CEILINGS, 1)]
    return "".join(parts)


def filled(name, count):
    return made_up(**{name: "x = 1\n" * count})


def gpt(lines):
    """A model whose forward begins so many lines below the heading of its section."""
    body = "class GPT:\n" + "\n" * (lines - 2) + "    def forward(self):\n        pass"
    return made_up(Model=body)


def signature(text):
    return f"class A:\n    def f({text}): pass"


# A check, a source that keeps its rule, and one that breaks it, with the fault.
CASES = [
    (long_lines, "x" * 100, "\n" + "x" * 101, "line 2 has 101 columns"),
    (long_functions, "def f():" + "\n    1" * 59, "def f():" + "\n    1" * 60, "f has 61 lines"),
    (
        functions_with_many_positional_parameters,
        signature("self, a, b, c, d, e, *, g, h"),
        signature("self, a, b, c, /, d, e, g=0"),
        "f has 6 positional parameters",
    ),
    (
        functions_with_many_positional_parameters,
        "@triton.jit\ndef f(a, b, c, d, e, g): pass",
        "@other\ndef f(a, b, c, d, e, g): pass",
        "f has 6 positional parameters",
    ),
    (wrong_sections, made_up(), made_up().replace("# 3  Data\n", ""), "sections [(1, 'Settings')"),
    (wrong_sections, made_up(), made_up().replace("Data", "Text"), "sections [(1, 'Settings')"),
    (
        wrong_sections,
        made_up(),
        made_up() + "# 13  Extras\n",
        "sections [(1, 'Settings'), (2, 'Runtime')",
    ),
    (
        sections_over_their_ceiling,
        filled("Tensors", 100),
        filled("Tensors", 101),
        "Tensors has 101 code lines of 100",
    ),
    (
        sections_over_their_ceiling,
        made_up(Main="x = 1\n" * 205 + "# no code\n\n" * 9),
        made_up(Main="x = (\n" + "1,\n" * 204 + ")\n"),
        "Main has 206 code lines of 205",
    ),
    (
        sections_over_their_ceiling,
        "x = 1\n" * 3500 + made_up(),
        "x = 1\n" * 3501 + made_up(),
        "the file has 3501 code lines of 3500",
    ),
    (
        names_used_above_their_section,
        made_up(Data="def f(late): return late\nlate = 1", Model="def g(): return f"),
        made_up(Data="def g(): return f", Model="def f(): pass"),
        "g uses f",
    ),
    (
        names_used_above_their_section,
        made_up(Data="def f(a):\n for B in a: B"),
        made_up(Data="def f(a: B): pass", Kernels="B = int"),
        "f uses B",
    ),
    (
        names_used_above_their_section,
        made_up(Data="x = 1", Main="x = 2\ndef f() -> x: pass"),
        made_up(Data="x = late", Main="late: int = 2"),
        "uses late",
    ),
    (a_forward_far_from_its_heading, gpt(250), gpt(251), "GPT.forward is 251 lines below"),
    (
        phases_outside_the_closed_list,
        'rt.budget.phase("train" if a else "data"), other.phase("x"), rt.budget.phase(name)',
        'self.rt.budget.phase("train" if a else "trian")',
        "phase trian",
    ),
    (
        phases_outside_the_closed_list,
        'budget.total("train", "calibration")',
        'budget.total("train", "calibrations")',
        "phase calibrations",
    ),
]


@pytest.mark.parametrize(("check", "good", "bad", "fault"), CASES)
def test_each_check_names_what_breaks_its_rule_and_lets_its_neighbour_pass(check, good, bad, fault):
    assert check(good) == []
    (found,) = check(bad)
    assert fault in found


def test_every_check_has_a_source_that_breaks_it():
    checks = {*OF_EVERY_FILE, *OF_EVERY_PROGRAM, *OF_TRAIN_GPT}
    assert {check for check, *_ in CASES} == checks


def test_code_lines_are_counted_without_blanks_comments_and_docstrings():
    source = '"""Doc\nstring."""\n\n# comment\nx = 1  # end\n\n\n'
    source += 'def f():\n    "doc"\n    return (\n        x\n    )\n'
    assert sorted(code_lines(source)) == [5, 8, 10, 11, 12]


def test_every_public_function_and_class_has_a_docstring_and_types():
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef) and node.name != "knob":
            assert node.returns is not None, node.name
            args = node.args.args + node.args.kwonlyargs
            assert all(a.annotation for a in args), node.name


def places(pattern, *owners):
    """Lines where a pattern stands outside these classes and functions."""
    tree = ast.parse(SOURCE)
    inside = {
        line
        for node in tree.body
        if getattr(node, "name", "") in owners
        for line in range(node.lineno, node.end_lineno + 1)
    }
    guard = tree.body[-1].lineno  # the main guard, the end of the file
    lines = enumerate(SOURCE.splitlines()[: guard - 1], 1)
    return [text for n, text in lines if re.search(pattern, text) and n not in inside]


def test_only_config_and_runtime_and_main_read_the_environment():
    pattern = r"os\.environ|\benv\b\.get|getenv"
    assert places(pattern, "Config", "Runtime", "main") == []
    assert places(pattern, "Config", "main"), "Runtime reads its rank"


def test_only_runtime_talks_to_torch_distributed():
    assert places(r"\bdist\.", "Runtime") == []
    assert places(r"\bdist\.")


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
