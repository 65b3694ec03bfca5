"""records/make_record.py: from three runs to a folder, and every fault its linter must find."""

import json
import lzma
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

import conftest
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import train_gpt as t

ROOT = Path(t.__file__).parent
sys.path.insert(0, str(ROOT / "records"))
import bundle  # noqa: E402
import linter  # noqa: E402
import make_record  # noqa: E402
import page  # noqa: E402
import pictures  # noqa: E402
import runs  # noqa: E402

SAMPLE = next((ROOT / "records" / "track_non_record_16mb").glob("*_Sample_CPU"))
SEEDS = {42: 0.0, 314: 0.0004, 999: -0.0003}  # how much worse than the real run
EXPORT = "export EMA_DECAY=0.97\n"
PROGRAM = b"class Config:\n    pass\n"  # stands for the program: it is never run


# --- runs as the program leaves them, from one real run ---


def real_path():
    """The JSON of the committed run."""
    return min(path for path in SAMPLE.glob("seed*.json") if ".audit." not in path.name)


def real_run():
    """(facts, log) of the committed run."""
    return json.loads(real_path().read_text()), real_path().with_suffix(".txt").read_text()


FACTS, _ = real_run()
BPB, STEPS = (FACTS["result"][name] for name in ("val_bpb", "steps"))
LIMIT = FACTS["budget"]["training"]["limit"]
SPENT = {part: FACTS["budget"][part]["seconds"] for part in runs.PARTS}
QUANTIZED = f"val_bpb:{FACTS['stages']['quantized']['val_bpb'] + SEEDS[314]:.8f}"
WORSE = [BPB + 0.0185, BPB + 0.0197, BPB + 0.0190]
OLD = {"name": "Older", "seed_results": {"1": WORSE[0], "2": {"val_bpb": WORSE[1]}, "3": WORSE[2]}}


def write_run(folder, seed, worse, change=None, audit="legal"):
    """Write log, JSON, artifact and audit of a seed whose scores are `worse` bpb than the real
    run's. change(facts, swap): alters facts; swap(old, new) alters the log."""
    facts, log = real_run()

    def swap(old, new):
        nonlocal log
        assert old in log, old
        log = log.replace(old, new)

    def settle(name, value, source):
        entry = facts["config"][name]
        swap(f"  {name}: {entry['value']}\n", f"  {name}: {value}\n")
        facts["config"][name] = dict(value=value, source=source)

    old_result, code = log.splitlines()[-1], facts["code"]
    facts["code"] = dict(bytes=len(PROGRAM), sha256=t.hashlib.sha256(PROGRAM).hexdigest())
    swap(
        "code_bytes: {bytes} code_sha256: {sha256}".format(**code),
        "code_bytes: {bytes} code_sha256: {sha256}".format(**facts["code"]),
    )
    total = facts["result"]["artifact_bytes"] + len(PROGRAM)
    facts["result"] |= dict(code_bytes=len(PROGRAM), total_bytes=total)
    for name, stage in facts["stages"].items():
        scored = f"{name} val_loss:{stage['val_loss']:.8f} val_bpb:{stage['val_bpb']:.8f}"
        stage["nats"] += worse * np.log(2) * stage["bytes"]
        stage["val_loss"] = stage["nats"] / stage["tokens"]
        stage["val_bpb"] = stage["nats"] / np.log(2) / stage["bytes"]
        stage["order_sha256"] = "0" * 64
        swap(scored, f"{name} val_loss:{stage['val_loss']:.8f} val_bpb:{stage['val_bpb']:.8f}")
    facts["result"] |= dict(val_bpb=round(stage["val_bpb"], 8), seed=seed)
    facts["run_id"] = f"seed{seed}"
    settle("run_id", facts["run_id"], "environment")
    settle("seed", seed, "environment")
    settle("log_dir", f"runs/seed{seed}", "environment")
    settle("ema_decay", 0.97, "environment")
    settle("smoke", "auto", "default")  # whatever the committed run was told
    for name in ("data_path", "tokenizer_path"):
        settle(name, facts["config"][name]["value"], "smoke")
    booked = sum(facts["budget"]["phases"].values())
    facts["budget"] |= dict(unbooked_seconds=0.0, wall_seconds=booked)
    if change:
        change(facts, swap)
    blob = bytes(facts["result"]["artifact_bytes"])
    facts["artifact"] = dict(bytes=len(blob), sha256=t.hashlib.sha256(blob).hexdigest())
    result = " ".join(f"{key}={value}" for key, value in facts["result"].items())
    swap(old_result, f"result {result}")
    place = folder / "runs" / f"seed{seed}"
    place.mkdir(parents=True)
    (place / f"seed{seed}.bin").write_bytes(blob)
    (place / f"seed{seed}.txt").write_text(log)
    (place / f"seed{seed}.json").write_text(json.dumps(facts, indent=1))
    if audit:
        write_audit(place / f"seed{seed}.audit.json", facts, audit)


def write_audit(path, facts, verdict):
    passed = {"C1": {"verdict": "pass", "says": "causal"}}
    audit = dict(verdict=verdict, reasons=[] if verdict == "legal" else ["C1: reads ahead"])
    audit |= dict(conditions=passed, artifact=facts["artifact"], code=facts["code"], run={})
    tool = ROOT / "records" / "audit.py"
    audit["tool"] = dict(bytes=tool.stat().st_size, sha256=t.file_sha256(tool))
    path.write_text(json.dumps(audit))


def record(tmp_path, *, track="track_non_record_16mb", changes=None, audit="legal", old=OLD):
    """A folder as `new` and three runs leave it; changes: {seed: change}."""
    folder = tmp_path / track / "2026-11-21_Trial"
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes(PROGRAM)
    (folder / "command.sh").write_text(f"# Trial\n{EXPORT}# python train_gpt.py\n")
    if old:
        (tmp_path / "old.json").write_text(json.dumps(old))
    for seed, worse in SEEDS.items():
        write_run(folder, seed, worse, (changes or {}).get(seed), audit)
    return folder


HAND = ["--author=A. Person", "--github-id=a-person", f"--blurb=Trains {STEPS} steps"]


def finish(folder, *options):
    old = folder.parent.parent / "old.json"
    predecessor = [f"--predecessor={old}"] if old.exists() else []
    return make_record.main(["finish", str(folder), *HAND, *predecessor, *options])


def quickly(folder, monkeypatch):
    """`finish` with pictures of one point."""

    def draw(found, folder):
        info = PngInfo()
        info.add_text("Source", runs.source_digest(found))
        for name in page.PICTURES:
            Image.new("L", (1, 1)).save(folder / name, pnginfo=info)

    with monkeypatch.context() as patch:
        patch.setattr(make_record, "draw_pictures", draw)
        assert finish(folder) == 0
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A clean record, finished once."""
    folder = record(tmp_path_factory.mktemp("records"))
    assert finish(folder) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(finished.parent.parent, tmp_path / "copy")
    return tmp_path / "copy" / finished.parent.name / finished.name


def faults(folder):
    """{check: what it says}, faults only."""
    found = {}
    for row in linter.lint(folder).rows:
        if row.verdict is False:
            found.setdefault(row.check, []).append(row.found)
    return {check: "\n".join(says) for check, says in found.items()}


# --- finish ---


def test_a_finished_folder_is_clean(finished, capsys):
    assert make_record.main(["check", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{finished}: clean"
    assert {line.split()[1] for line in lines[:-1]} == {
        *(check.__name__.removeprefix("check_") for check in linter.CHECKS),
        "claim",
    }


def test_a_committed_folder_is_clean_without_its_run_folders(copy):
    shutil.rmtree(copy / "runs")
    assert faults(copy) == {}


def test_submission_json_holds_what_the_runs_say(finished):
    found = json.loads((finished / "submission.json").read_text())
    facts, _ = real_run()
    values = [facts["result"]["val_bpb"] + worse for worse in SEEDS.values()]
    assert found["val_bpb"] == pytest.approx(statistics.fmean(values), abs=2e-8)
    assert found["val_bpb_std"] == pytest.approx(statistics.stdev(values), abs=2e-8)
    assert found["seeds"] == [42, 314, 999]
    seed = found["seed_results"]["314"]
    before = facts["stages"]["pre-quantization post-ema"]["val_bpb"]
    assert seed["pre_quant_val_bpb"] == pytest.approx(before + 0.0004, abs=2e-8)
    assert seed["steps"] == STEPS
    assert found["bytes_total"] == facts["result"]["artifact_bytes"] + len(PROGRAM)
    assert all(found["compliance"].values())
    data = facts["data"]
    margin = 0.005 / np.log(2) * data["val_tokens"] / data["val_bytes"]
    assert found["margin_bpb"] == pytest.approx(margin, abs=1e-8)
    from scipy.stats import ttest_ind

    test = ttest_ind(values, WORSE, equal_var=False, alternative="less")
    assert found["p_value"] == pytest.approx(test.pvalue, rel=1e-3)
    assert found["delta_bpb"] == pytest.approx(np.mean(values) - np.mean(WORSE), abs=2e-8)
    assert found["claim"] is True


def test_the_readme_has_fixed_headings_and_keeps_what_was_written_by_hand(copy):
    readme = copy / "README.md"
    text = readme.read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## What it is",
        "## Command",
        "## Results",
        "## Claim",
        "## Budgets and audit",
        "## Data and machine",
        "## Pictures",
    ]
    assert "**The claim stands:**" in text
    readme.write_text(text.replace(f"Trains {STEPS} steps", f"By hand, {STEPS} steps.\n\nMore."))
    assert finish(copy) == 0
    kept = f"\n## What it is\n\nBy hand, {STEPS} steps.\n\nMore.\n\n## Command\n"
    assert kept in readme.read_text()
    assert faults(copy) == {}


def test_pictures_are_equal_to_the_byte_when_drawn_again(finished, tmp_path):
    make_record.draw_pictures(runs.find_runs(finished), tmp_path)
    for name in page.PICTURES:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
        assert b"tIME" not in (tmp_path / name).read_bytes()


def bars(monkeypatch, draw, *args):
    """The axes that a picture is saved with."""
    kept = []
    monkeypatch.setattr(pictures, "save", lambda figure, *_: kept.append(figure.axes[0]))
    draw(*args, None)
    return kept[0]


def test_the_groups_of_the_bytes_picture_add_up_to_the_artifact(monkeypatch):
    facts, _ = real_run()
    facts["storage"] = [
        dict(group=group, kind="int6", tensors=1, parameters=9, entropy_bytes=size)
        for group, size in {
            "head.weight": 300,
            "blocks.*.mlp.up.weight": 600,
            "blocks.*.attn.q.weight": 290,
            "skip_gates": 4,
            "skip_weights": 6,
        }.items()
    ]
    axes = bars(monkeypatch, pictures.draw_bytes, [runs.Run(Path("x"), facts, "", None)])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["mlp.up", "head", "attn.q", "2 small groups", "code", "total"]
    artifact, code = (facts["result"][f"{name}_bytes"] for name in ("artifact", "code"))
    parts = [artifact * size / 1200 for size in (600, 300, 290, 10)]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([*parts, code, artifact + code])


def test_the_waterfall_leads_from_the_first_stage_to_the_result(monkeypatch):
    facts, _ = real_run()
    axes = bars(monkeypatch, pictures.draw_waterfall, [runs.Run(Path("x"), facts, "", None)])
    scores = [stage["val_bpb"] for stage in facts["stages"].values()]
    first, *steps, last = axes.patches
    assert first.get_height() == pytest.approx(scores[0])
    assert [step.get_height() for step in steps] == pytest.approx(list(np.diff(scores)))
    assert last.get_height() == pytest.approx(facts["result"]["val_bpb"], abs=1e-8)


def test_finish_needs_to_know_who_made_it(tmp_path, capsys):
    folder = record(tmp_path)
    assert make_record.main(["finish", str(folder)]) == 2
    assert "--author is missing" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_finish_refuses_a_run_that_is_marked_invalid(tmp_path, capsys):
    def mark(facts, swap):
        facts["invalid_for_records"] = ["trained on the validation text"]

    folder = record(tmp_path, changes={314: mark})
    assert finish(folder) == 2
    assert (
        "seed314.json: trained on the validation text; it cannot be a record"
        in capsys.readouterr().err
    )
    assert not (folder / "submission.json").exists()


def test_finish_refuses_an_unfinished_run_and_a_run_under_the_name_of_another(tmp_path, capsys):
    folder = record(tmp_path)
    path = folder / "runs" / "seed42" / "seed42.json"
    whole = path.read_text()
    facts = json.loads(whole)
    del facts["result"]
    path.write_text(json.dumps(facts | {"error": "KeyboardInterrupt: "}))
    assert finish(folder) == 2
    assert "lacks result (KeyboardInterrupt: )" in capsys.readouterr().err
    path.write_text(whole.replace('"seed": 42', '"seed": 43'))
    assert finish(folder) == 2
    assert "seed42.json: a run of seed 43, expected the name seed43" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


# --- faults that the linter must find ---


def edit(path, change):
    """Change a JSON file."""
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts, indent=1))


def both(folder, name, change):
    """Change a seed's JSON, and its original under runs/."""
    edit(folder / f"{name}.json", change)
    edit(folder / "runs" / name / f"{name}.json", change)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_both_logs(folder, old, new):
    for path in (folder / "seed314.txt", folder / "runs" / "seed314" / "seed314.txt"):
        replace(path, old, new)


def set_verdict(folder, verdict):
    path = folder / "seed42.audit.json"
    edit(path, lambda a: a.update(verdict=verdict, reasons=["C1: reads ahead"]))


def claim_more(folder):
    edit(folder / "submission.json", lambda s: s.update(val_bpb=0.5))


def change_seed(folder):
    def set_rate(facts):
        facts["config"]["matrix_lr"]["value"] = 0.03

    both(folder, "seed314", set_rate)
    edit_both_logs(folder, "  matrix_lr: 0.022\n", "  matrix_lr: 0.03\n")


AFTER = {  # what is done to a clean folder: (checks that fail, what they say)
    "a setting that differs in one seed": (
        change_seed,
        {"settings": "MATRIX_LR is 0.022 in seed42 and 0.03 in seed314"},
    ),
    "a shipped file that is not what ran": (
        lambda f: (f / "train_gpt.py").open("a").write("\n"),
        {"code": "seed42 ran code"},
    ),
    "another code hash in one seed": (
        lambda f: both(f, "seed314", lambda r: r["code"].update(sha256="1" * 64)),
        {"code": "seed314 ran code 1111", "logs": "code_sha256", "audits": "other code"},
    ),
    "an edited figure in the README": (
        lambda f: replace(f / "README.md", f"| {STEPS:,} |", "| 9,999 |"),
        {"figures": "README.md line"},
    ),
    "a figure by hand that no log shows": (
        lambda f: replace(f / "README.md", f"Trains {STEPS} steps", "It reached 1.0499 once"),
        {"figures": "README.md: 1.0499 is not in any log"},
    ),
    "an edited figure in submission.json": (
        claim_more,
        {"figures": f"submission.json: val_bpb is 0.5, the runs give {str(BPB)[:4]}"},
    ),
    "an edited p value": (
        lambda f: edit(f / "submission.json", lambda s: s.update(p_value=1e-9)),
        {"figures": "submission.json: p_value is 1e-09"},
    ),
    "an edited result in a JSON": (
        lambda f: both(f, "seed42", lambda r: r["result"].update(val_bpb=0.5)),
        {"logs": "val_bpb=0.5", "sums": "the result is 0.5", "figures": "seed_results.42.val_bpb"},
    ),
    "an edited stage in JSON and log": (
        lambda f: (
            both(f, "seed314", lambda r: r["stages"]["quantized"].update(val_bpb=2.0)),
            edit_both_logs(f, QUANTIZED, "val_bpb:2.00000000"),
        ),
        {"sums": "seed314: quantized val_bpb is 2.0", "figures": "quantized_val_bpb"},
    ),
    "an edited loss of training": (
        lambda f: both(f, "seed42", lambda r: r["curve"][7].update(train_loss=1.0)),
        {"logs": "train_loss: 1.0000"},
    ),
    "an edited time of a step": (
        lambda f: both(f, "seed42", lambda r: r["step_ms"].update({"11_visits": 90.0})),
        {"logs": "11_visits:90.0"},
    ),
    "an edited log": (
        lambda f: edit_both_logs(f, QUANTIZED, "val_bpb:2.00000000"),
        {"logs": "seed314.txt lacks 'quantized val_loss:"},
    ),
    "a log that goes on after its result": (
        lambda f: [
            (place / "seed42.txt").write_text((f / "seed42.txt").read_text() + "more\n")
            for place in (f / "runs" / "seed42", f)
        ],
        {"logs": "seed42.txt does not end with its result"},
    ),
    "a missing log": (
        lambda f: (f / "seed999.txt").unlink(),
        {"files": "seed999.txt is missing", "logs": "seed999.txt is missing"},
    ),
    "a picture of other runs": (
        lambda f: both(f, "seed42", lambda r: r.pop("baselines")),
        {"pictures": "loss.png, stages.png, bytes.png, time.png: not drawn from these runs"},
    ),
    "a picture that is none": (
        lambda f: (f / "loss.png").write_text("loss"),
        {"pictures": "loss.png: not drawn from these runs"},
    ),
    "a submission.json that is missing": (
        lambda f: (f / "submission.json").unlink(),
        {"files": "submission.json is missing"},
    ),
    "a program that is missing": (
        lambda f: (f / "train_gpt.py").unlink(),
        {"files": "train_gpt.py is missing"},
    ),
    "a page and a command that are missing": (
        lambda f: ((f / "README.md").unlink(), (f / "command.sh").unlink()),
        {"files": "README.md is missing\ncommand.sh is missing"},
    ),
    "a seed that is left out": (
        lambda f: (f / "seed42.json").unlink(),
        {"figures": "submission.json: seeds is [42, 314, 999], the runs give [314, 999]"},
    ),
    "a copy that is not what the run left": (
        lambda f: edit(f / "seed42.json", lambda r: r["baselines"].clear()),
        {"files": "seed42.json differs from the one in runs/seed42"},
    ),
    "a mark in a JSON": (
        lambda f: both(f, "seed42", lambda r: r.update(invalid_for_records=["peeked"])),
        {"audits": "seed42: invalid_for_records: peeked"},
    ),
    "an illegal artifact": (
        lambda f: set_verdict(f, "illegal"),
        {"audits": "seed42: the audit says illegal: C1: reads ahead", "figures": "audit"},
    ),
    "a missing audit": (
        lambda f: (f / "seed42.audit.json").unlink(),
        {"files": "audit", "audits": "seed42.audit.json is missing", "figures": "audit"},
    ),
    "an audit of another artifact": (
        lambda f: edit(f / "seed42.audit.json", lambda a: a["artifact"].update(sha256="2")),
        {"audits": "seed42: the audit is of another artifact"},
    ),
    "an audit that hides a failed condition": (
        lambda f: edit(
            f / "seed42.audit.json", lambda a: a["conditions"]["C1"].update(verdict="fail")
        ),
        {"audits": "says legal, but C1 failed"},
    ),
    "an artifact of another size than the result says": (
        lambda f: both(f, "seed42", lambda r: r["artifact"].update(bytes=1)),
        {"bytes": "seed42: wrote 1 bytes, its result says"},
    ),
    "another artifact on disk": (
        lambda f: (f / "runs" / "seed42" / "seed42.bin").write_bytes(
            b"1" * FACTS["result"]["artifact_bytes"]
        ),
        {"bytes": "seed42.bin is not the artifact that seed42 wrote"},
    ),
    "a setting that does not exist": (
        lambda f: replace(f / "command.sh", EXPORT, EXPORT + "export MATRIX_LRR=1\n"),
        {"command": "MATRIX_LRR is not a setting", "figures": "MATRIX_LRR=1"},
    ),
    "a variable that command.sh does not set": (
        lambda f: both(f, "seed42", lambda r: r["config"]["ttt_lr"].update(source="environment")),
        {"command": "seed42: TTT_LR=0.005 was set, but not by command.sh"},
    ),
    "a command with another value": (
        lambda f: replace(f / "command.sh", EXPORT, "export EMA_DECAY=0.98\n"),
        {"command": "EMA_DECAY=0.98, seed42 ran with 0.97", "figures": "EMA_DECAY=0.98"},
    ),
    "a missing field": (
        lambda f: edit(f / "submission.json", lambda s: s.pop("github_id")),
        {"schema": "'github_id' is a required property", "figures": "github_id"},
    ),
    "a field that is not in the schema": (
        lambda f: edit(f / "submission.json", lambda s: s.update(mean_val_bpb=2.0)),
        {"schema": "mean_val_bpb", "figures": "mean_val_bpb"},
    ),
    "a field of another type": (
        lambda f: edit(f / "submission.json", lambda s: s.update(seeds="42, 314, 999")),
        {"schema": "seeds: '42, 314, 999' is not of type 'array'", "figures": "seeds"},
    ),
    "other data in one seed": (
        lambda f: both(f, "seed999", lambda r: r["data"].update(data_fingerprint="0")),
        {"data": "data_fingerprint differs between seed42 and seed999", "logs": "fingerprint: 0"},
    ),
    "another order of scoring in one seed": (
        lambda f: both(f, "seed999", lambda r: r["stages"]["quantized"].update(order_sha256="1")),
        {"data": "seed999 scored quantized in another order than seed42"},
    ),
    "a predecessor that is gone": (
        lambda f: (f.parent.parent / "old.json").unlink(),
        {"figures": "predecessor: "},
    ),
    "another machine in one seed": (
        lambda f: both(f, "seed999", lambda r: r["runtime"].update(torch="2.9")),
        {
            "settings": f"torch is {FACTS['runtime']['torch']} in seed42 and 2.9 in seed999",
            "logs": "torch=2.9",
        },
    ),
    "a track that does not exist": (
        lambda f: f.parent.rename(f.parent.with_name("track_2")),
        {"files": "the folder is in track_2", "figures": "track"},
    ),
}


@pytest.mark.parametrize("fault", AFTER)
def test_the_linter_names_a_fault_in_a_finished_folder(fault, copy, capsys):
    spoil, expected = AFTER[fault]
    spoil(copy)
    if not copy.exists():
        copy = copy.parent.with_name("track_2") / copy.name
    found = faults(copy)
    # The pictures name the JSONs that they were drawn from, so they know any change of one.
    assert set(found) - {"pictures"} == set(expected) - {"pictures"}
    for check, words in expected.items():
        assert words in found[check]
    assert make_record.main(["check", str(copy)]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert out.endswith("NOT clean\n")


def slow(facts, swap):
    spent, phases = SPENT["evaluation"], facts["budget"]["phases"]
    swap(f"budget evaluation: {spent:.1f}s", f"budget evaluation: {spent + 600:.1f}s")
    seconds = phases["quantized_ttt"]
    swap(f"quantized_ttt={seconds:.1f}s", f"quantized_ttt={seconds + 600:.1f}s")
    phases["quantized_ttt"] += 600
    facts["budget"]["evaluation"]["seconds"] += 600
    facts["budget"]["wall_seconds"] += 600
    facts["result"]["eval_seconds"] += 600


def unbooked(facts, swap):
    facts["budget"]["unbooked_seconds"] = 530.0
    facts["budget"]["wall_seconds"] += 530.0


def large(facts, swap):
    facts["result"] |= dict(artifact_bytes=16_000_000, total_bytes=16_000_000 + len(PROGRAM))


def unverified(facts, swap):
    swap("data_verified: True", "data_verified: False")
    facts["data"]["data_verified"] = False


def lost_time(facts, swap):
    facts["budget"]["wall_seconds"] += 100.0


def lighter(facts, swap):
    facts["result"] |= dict(code_bytes=1, total_bytes=facts["result"]["artifact_bytes"] + 1)


def from_checkpoint(facts, swap):
    swap("  checkpoint: \n", "  checkpoint: base.ckpt\n")
    facts["config"]["checkpoint"]["value"] = "base.ckpt"


def bad_sum(facts, swap):
    swap(f"budget evaluation: {SPENT['evaluation']:.1f}s", "budget evaluation: 5.0s")
    facts["budget"]["evaluation"]["seconds"] = 5.0


BEFORE = {  # what all runs are like: (checks that fail, what they say)
    "over the limit of evaluation": (
        slow,
        {"budgets": f"evaluation took {SPENT['evaluation'] + 600:.1f} s, the limit is 600 s"},
    ),
    "unbooked time over both limits": (
        unbooked,
        {
            "budgets": f"seed42: training took {SPENT['training'] + 530:.1f} s, "
            f"the limit is {LIMIT:g} s"
        },
    ),
    "time that nothing accounts for": (
        lost_time,
        {"budgets": "phases and unbooked time do not add up to wall_seconds"},
    ),
    "phases that do not add up": (bad_sum, {"budgets": "evaluation 5.0 s, its phases"}),
    "too many bytes": (
        large,
        {"bytes": f"{16_000_000 + len(PROGRAM):,} bytes, the limit is 16,000,000"},
    ),
    "code that weighs less than it did": (
        lighter,
        {"sums": "seed42: code_bytes is not the size of the code that ran"},
    ),
    "data without a proof": (unverified, {"data": "seed42: data not verified"}),
    "weights of another run": (from_checkpoint, {"settings": "from CHECKPOINT=base.ckpt"}),
}


@pytest.mark.parametrize("fault", BEFORE)
def test_the_linter_names_a_fault_that_all_runs_have(fault, tmp_path, monkeypatch):
    change, expected = BEFORE[fault]
    folder = record(tmp_path, changes=dict.fromkeys(SEEDS, change))
    found = faults(quickly(folder, monkeypatch))
    assert set(found) == set(expected)
    for check, words in expected.items():
        assert words in found[check]


def test_the_record_track_is_for_eight_h100_and_the_whole_text(tmp_path, monkeypatch):
    def part(facts, swap):
        swap("  val_tokens: 0\n", "  val_tokens: 100000\n")
        facts["config"]["val_tokens"] = dict(value=100_000, source="default")

    folder = record(tmp_path, track="track_10min_16mb", changes=dict.fromkeys(SEEDS, part))
    found = faults(quickly(folder, monkeypatch))
    assert set(found) == {"settings", "data"}
    device = FACTS["runtime"]["device"]
    assert f"ran on 1x{device}, expected 8xH100 in track_10min_16mb" in found["settings"]
    assert "VAL_TOKENS=100000" in found["data"]


def test_a_single_run_without_a_predecessor_makes_a_clean_folder_and_no_claim(
    tmp_path, monkeypatch
):
    folder = record(tmp_path, old=None)
    for seed in (314, 999):
        shutil.rmtree(folder / "runs" / f"seed{seed}")
    assert faults(quickly(folder, monkeypatch)) == {}
    text = (folder / "README.md").read_text()
    assert text.startswith(f"# Trial: {BPB:.5f} bpb, n = 1\n")
    assert "| mean |" not in text
    assert "| difference |" not in text
    assert "**There is no claim:** no predecessor was named." in text


def test_a_command_may_use_the_other_name_of_a_setting(tmp_path, monkeypatch):
    folder = record(tmp_path)
    replace(folder / "command.sh", EXPORT, EXPORT + "export GPTQ_CALIB_BATCHES=64\n")
    assert faults(quickly(folder, monkeypatch)) == {}


def test_what_a_run_did_not_record_or_finish_is_a_remark(tmp_path, monkeypatch):
    folder = quickly(record(tmp_path), monkeypatch)
    for seed in SEEDS:
        for path in (folder, folder / "runs" / f"seed{seed}"):
            edit(path / f"seed{seed}.json", lambda r: r.pop("artifact"))
            for stage in ("pre-quantization post-ema", "quantized"):
                edit(
                    path / f"seed{seed}.json", lambda r, s=stage: r["stages"][s].pop("order_sha256")
                )
    edit(folder / "runs" / "seed999" / "seed999.json", lambda r: r["ttt"].update(complete=False))
    audit = folder / "runs" / "seed314" / "seed314.audit.json"
    edit(audit, lambda a: a["tool"].update(sha256="3" * 64))
    text = linter.lint(quickly(folder, monkeypatch)).text()
    assert faults(folder) == {}
    assert "seed999: adaptation stopped early to stay within time" in text
    assert "scoring order: not recorded" in text
    assert "seed42: sha256 of its artifact: not recorded" in text
    assert "seed314: audited with another audit.py (sha256 3333333333333333)" in text
    assert text.count("another audit.py") == 1


READABLE = "class Config:\n    pass\n\n\nx = 1  # a comment\n"
BUNDLE = bundle.bundle(READABLE, for_record=True)
OTHER_TEXT = "class Config: pass\nx = 1\n"  # the same program, as another Python may write it


def rebuilt(text, head=b"", tail=b"", preset=0):
    """BUNDLE by another lzma, perhaps with another text, more in the head or after the program."""
    data = lzma.compress(text.encode(), format=lzma.FORMAT_ALONE, preset=preset)
    for byte, code in zip(b"=\0\n\r", b"dabc", strict=True):
        data = data.replace(bytes([byte]), b"=%c" % code)
    head, data = bundle.unbundle(BUNDLE)[0] + head, data + tail
    return head + bundle.MARK + b"%08x" % zlib.crc32(head + data) + data


TEXT = bundle.unbundle(BUNDLE)[1]
NOT_MADE = "is not what records/bundle.py makes"


@pytest.mark.parametrize(
    ("shipped", "verdict", "says"),
    [
        (BUNDLE, True, "every run ran train_gpt.py"),
        (rebuilt(TEXT), True, "every run ran train_gpt.py"),
        (rebuilt(OTHER_TEXT), None, "bundled by another version of Python"),
        (rebuilt(TEXT + "x = 2\n"), False, NOT_MADE),
        (rebuilt(TEXT, head=b"\nx = 2"), False, NOT_MADE),
        (rebuilt(OTHER_TEXT, head=b"\nx = 2"), False, NOT_MADE),
        (rebuilt(TEXT, tail=b"\nx = 2"), False, NOT_MADE),
        (rebuilt(TEXT) + b"\nx = 2", False, NOT_MADE),
        (bundle.bundle(READABLE, for_record=False), False, NOT_MADE),
        (bundle.bundle(READABLE + "#", for_record=True), False, NOT_MADE),
        (b"exec(download())\n", False, NOT_MADE),
    ],
)
def test_a_bundle_must_be_what_bundling_its_readable_source_gives(shipped, verdict, says, copy):
    (copy / "train_gpt.py").write_bytes(shipped)
    (copy / "train_gpt_readable.py").write_text(READABLE)
    facts = dict(bytes=len(shipped), sha256=t.hashlib.sha256(shipped).hexdigest())
    for seed in SEEDS:
        edit(copy / f"seed{seed}.json", lambda r: r.update(code=facts))
    report = linter.Report()
    linter.check_code(linter.Record.read(copy), report)
    assert any(row.verdict == verdict and says in row.found for row in report.rows)
    assert any(row.verdict is None for row in report.rows) == (verdict is None)
    assert report.clean == (verdict is not False)


def test_a_bundle_without_its_readable_source_is_a_fault(copy):
    (copy / "train_gpt.py").write_bytes(BUNDLE)
    assert "train_gpt_readable.py is missing" in faults(copy)["code"]


@pytest.mark.parametrize(
    "what", ["no folder", "no runs", "cut off", "a list", "no keys", "no seed"]
)
def test_what_cannot_be_checked_ends_with_status_2_and_one_line(what, copy, capsys):
    if what == "no folder":
        copy = copy / "nowhere"
    elif what == "no runs":
        shutil.rmtree(copy / "runs")
        for path in copy.glob("seed*.json"):
            path.unlink()
    elif what == "cut off":
        (copy / "seed42.json").write_text((copy / "seed42.json").read_text()[:1000])
    elif what == "a list":
        (copy / "seed42.json").write_text("[]")
    elif what == "no keys":
        edit(copy / "seed42.json", lambda r: r.pop("runtime"))
    else:
        edit(copy / "seed42.json", lambda r: r["result"].pop("seed"))
    assert make_record.main(["check", str(copy)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")


# --- new ---


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """records/ in a folder of the test."""
    monkeypatch.setattr(make_record, "RECORDS", tmp_path / "records")
    return tmp_path / "records"


def test_new_makes_a_folder_whose_command_a_shell_can_source(elsewhere, capsys):
    source = ROOT / "records" / "track_10min_16mb" / "2026-03-23_System578"
    words = ["new", "Wide", f"--from={source}", "--no-bundle", "MLP_MULT=3.5", "DATA_DIR=my data"]
    assert make_record.main(words) == 0
    (folder,) = elsewhere.glob("track_10min_16mb/*_Wide")
    assert sorted(path.name for path in folder.iterdir()) == ["command.sh", "train_gpt.py"]
    assert (folder / "train_gpt.py").read_bytes() == Path(t.__file__).read_bytes()
    script = ". ./command.sh && env -0"
    done = subprocess.run(["sh", "-c", script], env={}, cwd=folder, capture_output=True, text=True)
    seen = dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)
    expected = runs.read_command(source / "command.sh") | {"MLP_MULT": "3.5"}
    assert {name: seen[name] for name in expected} == expected
    assert (folder / seen["DATA_DIR"]).resolve() == Path("my data").resolve()
    out = capsys.readouterr().out
    assert (
        "for seed in 42 314 999; do ( . ./command.sh; SEED=$seed RUN_ID=seed$seed "
        "LOG_DIR=runs/seed$seed torchrun --standalone --nproc_per_node=8 train_gpt.py ); done\n"
    ) in out


def places(folder):
    """The data of a command, as whole paths."""
    found = runs.read_command(folder / "command.sh")
    return {name: (folder / found[name]).resolve() for name in runs.PLACES if name in found}


def test_new_says_where_the_data_is_from_inside_the_folder(elsewhere):
    assert make_record.main(["new", "Full", "--no-bundle"]) == 0
    assert make_record.main(["new", "Sample", "--no-bundle", "--nproc=1", "SMOKE=1"]) == 0
    full, sample = (next(elsewhere.glob(f"*/*_{name}")) for name in ("Full", "Sample"))
    assert places(full) == {"DATA_DIR": ROOT / "data"}
    data = ROOT / "data" / "sample"
    assert places(sample) == {"DATA_PATH": data, "TOKENIZER_PATH": data / "tokenizer.model"}
    words = ["new", "Other", "--no-bundle", "--nproc=1", f"--from={sample}"]
    assert make_record.main(words) == 0
    assert places(next(elsewhere.glob("*/*_Other"))) == places(sample)


def test_new_bundles_the_program_and_keeps_its_readable_source(elsewhere):
    assert make_record.main(["new", "Small"]) == 0
    (folder,) = elsewhere.glob("track_10min_16mb/*_Small")
    source = Path(t.__file__).read_text(encoding="utf-8")
    assert (folder / "train_gpt.py").read_bytes() == bundle.bundle(source, for_record=True)
    assert (folder / "train_gpt_readable.py").read_text(encoding="utf-8") == source


def test_new_refuses_a_program_that_cannot_be_bundled(elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(bundle, "LIMIT_BYTES", 10_000)
    assert make_record.main(["new", "Small"]) == 2
    assert "bytes, limit 10,000" in capsys.readouterr().err
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["Bad/Name"], ["Bad/Name: expected a name of letters"]),
        (["N", "MATRIX_LRR=1", "MATRIX_LR=x"], ["did you mean MATRIX_LR?", "expected a number"]),
        (["N", "SEED=1"], ["SEED: the loop over the seeds sets it"]),
        (["N", "MATRIX_LR"], ["MATRIX_LR: expected VARIABLE=VALUE"]),
        (["N", "NUM_LAYRS=3"], ["NUM_LAYRS is not a setting"]),
        (["N", "--nproc=7"], ["equally many for 7 ranks"]),
        (["N", "--from=nowhere"], ["nowhere/command.sh: No such file"]),
    ],
)
def test_new_refuses_in_one_line_each_and_leaves_nothing(words, says, elsewhere, capsys):
    assert make_record.main(["new", "--no-bundle", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(says)
    assert all(words in line for words, line in zip(says, lines, strict=True))
    assert not elsewhere.exists()


def test_new_does_not_touch_a_folder_that_exists(elsewhere, capsys):
    assert make_record.main(["new", "--no-bundle", "Twice"]) == 0
    (folder,) = elsewhere.glob("track_10min_16mb/*_Twice")
    (folder / "command.sh").write_text("mine")
    assert make_record.main(["new", "--no-bundle", "Twice"]) == 2
    assert "already exists; choose another name" in capsys.readouterr().err
    assert (folder / "command.sh").read_text() == "mine"
    assert len(list(folder.parent.iterdir())) == 1


# --- from the first command to the last, with real runs ---


def test_the_commands_that_new_prints_lead_to_a_clean_folder(dataset, tmp_path, elsewhere, capsys):
    shutil.copytree(dataset, tmp_path / "set")
    proof = t.data_proof(tmp_path / "set", tmp_path / "set" / "tokenizer.model", trains=True)
    verified = dict(fingerprint=proof["data_fingerprint"])
    (tmp_path / "set" / "verified.json").write_text(json.dumps(verified))
    small = conftest.tiny_settings(tmp_path / "set", tmp_path) | {"TTT_EPOCHS": "1"}
    del small["LOG_DIR"]
    words = ["Tiny", "--track=track_non_record_16mb", "--nproc=1", "--seeds=1,2"]
    assert make_record.main(["new", *words, *(f"{k}={v}" for k, v in small.items())]) == 0
    change_folder, loop, _, finishing, checking = capsys.readouterr().out.splitlines()[2:]
    folder = Path(shlex.split(change_folder)[1]).resolve()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    packages = str(Path(np.__file__).parent.parent)  # a link to python is in no environment
    env = dict(PATH=path, PYTHONPATH=packages, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run(["sh", "-c", loop], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for seed in (1, 2):
        facts = json.loads((folder / "runs" / f"seed{seed}" / f"seed{seed}.json").read_text())
        blob = (folder / "runs" / f"seed{seed}" / f"seed{seed}.bin").read_bytes()
        facts["artifact"] = dict(bytes=len(blob), sha256=t.hashlib.sha256(blob).hexdigest())
        write_audit(folder / "runs" / f"seed{seed}" / f"seed{seed}.audit.json", facts, "legal")
    assert finishing.startswith("python ")
    assert make_record.main(["finish", str(folder), *HAND[:2], "--blurb=Tiny"]) == 0
    assert make_record.main(["check", str(folder)]) == 0, capsys.readouterr().out
    assert checking.endswith(" check .")
    text = (folder / "README.md").read_text()
    assert "**There is no claim:** no predecessor was named." in text


# --- the index ---


def test_the_committed_index_is_up_to_date(capsys):
    assert make_record.main(["index", "--check"]) == 0, capsys.readouterr().out


def test_the_index_lists_records_and_published_systems_and_keeps_what_is_by_hand(
    finished, elsewhere, capsys
):
    shutil.copytree(finished.parent.parent, elsewhere)
    shutil.copytree(ROOT / "records" / "published", elsewhere / "published")
    older = dict(name="Older", mean_val_bpb=1.07, track="10min_16mb", val_loss=0.0)
    (elsewhere / "published" / "older.json").write_text(json.dumps(older))
    readme = elsewhere / "README.md"
    by_hand = "\n\n## Tried and dropped\n\n2026-01-02: a thing, +0.003 bpb.\n"
    readme.write_text(f"old\n{make_record.MARK}{by_hand}")
    assert make_record.main(["index", "--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert make_record.main(["index"]) == 0
    text = readme.read_text()
    assert text.endswith(by_hand)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "\u00b1" in line]
    assert [row.split("|")[1].strip().split("]")[0] for row in rows] == [
        "#2135, the public state of the art",
        "[#1487",
        "[#1493",
        "[#578",
        "[Trial",
    ]
    assert "| 1.0810 \u00b1 0.0002 | 3 | 15,993,232 | 40,540,160 | 8xH100 |" in rows[2]
    assert "breaks the rules" in rows[1]
    gaps = " | ".join(["not recorded"] * 4)
    assert f"| Older | 1.0700 | {gaps} | published |\n" in text.partition("non_record")[0]
    mean = BPB + statistics.fmean(SEEDS.values())
    assert f"2026-11-21_Trial/README.md) | {mean:.4f} \u00b1 0.0004 | 3 |" in rows[4]
    assert make_record.main(["index", "--check"]) == 0
    readme.write_text(text.replace("1.0810", "1.0811"))
    assert make_record.main(["index", "--check"]) == 1
    readme.write_text("# Records\n")
    assert make_record.main(["index"]) == 2
    assert readme.read_text() == "# Records\n"


# --- what others write ---

THREE = {"42": {"val_bpb": 1.06, "val_bytes": 151}, "314": {"val_bpb": 1.061}}
DIALECTS = {  # shapes of submission.json in the public records: (n, mean, sample deviation, seeds)
    "a number": ({"val_bpb": 1.07}, (None, 1.07, None, ())),
    "nested": ({"val_bpb": {"mean": 1.07, "std": 0.001}}, (None, 1.07, 0.001, ())),
    "val_bpb_mean": ({"val_bpb_mean": 1.07, "val_bpb_std": 0.002}, (None, 1.07, 0.002, ())),
    "mean_val_bpb": ({"mean_val_bpb": 1.07, "seeds": [1, 2]}, (2, 1.07, None, (1, 2))),
    "three seeds": ({"three_seed_mean_val_bpb": 1.07}, (3, 1.07, None, ())),
    "dict by seed": ({"val_bpb": 1.05, "seed_results": THREE}, (2, 1.0605, 5e-4, (42, 314))),
    "dict by name": (
        {"seed_results": {"seed_42": 1.06, "seed_314": 1.061}},
        (2, 1.0605, 5e-4, (42, 314)),
    ),
    "list": (
        {"seed_results": [{"seed": 7, "val_bpb": 1.06}, {"seed": 8, "val_bpb": 1.061}]},
        (2, 1.0605, 5e-4, (7, 8)),
    ),
    "list of numbers": (
        {"seed_results": [1.06, 1.061], "seeds": [7, 8]},
        (2, 1.0605, 5e-4, (7, 8)),
    ),
    "before a correction": (
        {"seed_results_pre_fix": THREE, "val_bpb": 1.07, "seeds": [1]},
        (1, 1.07, None, (1,)),
    ),
    "placeholders": (
        {"val_bpb": 0.0, "seed_results": {"1": {"val_bpb": 0.0}, "2": {"val_bpb": 1.06}}},
        (1, 1.06, None, (2,)),
    ),
    "nothing but placeholders": ({"val_bpb": 0.0, "val_bpb_std": 0.0}, (None, None, None, ())),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_of_submission_json_is_read(dialect, tmp_path):
    facts, (n, mean, std, seeds) = DIALECTS[dialect]
    (tmp_path / "submission.json").write_text(json.dumps(facts))
    found = runs.Submission.read(tmp_path)
    spread = std and pytest.approx(std * np.sqrt(2) if n == 2 else std)
    assert (found.bpb.n, found.bpb.mean, found.bpb.std) == (n, mean and pytest.approx(mean), spread)
    assert found.seeds == seeds


def test_published_figures_are_those_of_the_systems_own_pages():
    for path in (ROOT / "records" / "published").glob("*.json"):
        found = runs.Submission.read(path)
        if "folder" in found.facts:
            text = (ROOT / "records" / found.facts["folder"] / "README.md").read_text()
            for entry in found.facts["seed_results"].values():
                for value in entry.values():
                    assert f" {value:,} " in text or f" {value:.8f} " in text, (path.name, value)


# --- statistics ---


def sample(*values):
    return runs.Sample.of(values)


def test_welch_agrees_with_the_closed_form_for_two_pairs():
    # Equal spreads of two pairs: two degrees of freedom, where F(t) = 1/2 + t / (2 sqrt(2 + t^2)).
    t_value, p = runs.welch(sample(1.0, 1.2), sample(1.5, 1.7))
    expected = -0.5 / np.sqrt(0.02 / 2 + 0.02 / 2)
    assert t_value == pytest.approx(expected)
    assert p == pytest.approx(0.5 + expected / (2 * np.sqrt(2 + expected**2)))


def test_welch_agrees_with_scipy_on_the_raw_samples():
    from scipy.stats import ttest_ind

    draw = np.random.default_rng(0)
    for n, m in ((3, 3), (2, 5), (8, 3)):
        new, old = draw.normal(1.05, 1e-3, n), draw.normal(1.051, 3e-4, m)
        expected = ttest_ind(new, old, equal_var=False, alternative="less")
        found = runs.welch(sample(*new), sample(*old))
        assert found == pytest.approx((expected.statistic, expected.pvalue))


def test_there_is_no_test_without_two_runs_on_both_sides_or_without_any_spread():
    assert runs.welch(sample(1.0), sample(1.1, 1.2)) is None
    assert runs.welch(sample(1.0, 1.1), sample(1.1)) is None
    assert runs.welch(sample(1.0, 1.0), sample(1.1, 1.1)) is None


def facts_of(tokens, size):
    facts = {"data": dict(val_tokens=tokens, val_bytes=size)}
    return runs.Run(Path("x"), facts, None, None)


def test_the_margin_is_five_thousandths_of_a_nat_per_token():
    # The case-folded SP8192 set: 47,851,520 tokens of 151,074,499 bytes, 0.00228 bpb.
    found = runs.judge(sample(1.0), facts_of(47_851_520, 151_074_499), None)
    assert found["margin_bpb"] == pytest.approx(0.0022849, abs=1e-7)


@pytest.mark.parametrize(
    ("values", "old", "claim", "says"),
    [
        ((1.0500, 1.0502), {"seed_results": [1.0600, 1.0602]}, True, "does not record the bytes"),
        ((1.0500, 1.0502), None, False, "no predecessor was named"),
        ((1.0500,), {"seed_results": [1.0600, 1.0602]}, False, "n = 1 allows no test"),
        ((1.0500, 1.0502), {"val_bpb": 1.06}, False, "states no standard deviation with n >= 2"),
        ((1.0500, 1.0502), {"val_bpb": 0.0}, False, "does not record a score"),
        ((1.0590, 1.0592), {"seed_results": [1.0600, 1.0602]}, False, "below the margin"),
        ((1.04, 1.06), {"seed_results": [1.0600, 1.0602]}, False, "required is p < 0.01"),
        (
            (1.0500, 1.0502),
            {"seed_results": [1.0600, 1.0602], "val_bytes": 10_500_000},
            False,
            "was scored on 10,500,000 bytes",
        ),
        (
            (1.0500, 1.0502),
            {"seed_results": [1.0600, 1.0602], "invalid_for_records": ["x"]},
            False,
            "breaks the rules",
        ),
    ],
)
def test_a_claim_stands_only_on_a_test_a_margin_and_a_comparable_predecessor(
    values, old, claim, says
):
    old = old and runs.Submission.from_facts(old)
    found = runs.judge(sample(*values), facts_of(3_000_000, 10_000_000), old)
    assert found["claim"] is claim
    assert says in found["claim_reason"]
