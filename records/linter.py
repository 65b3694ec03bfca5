"""The linter of a record's folder: what a maintainer would check by hand before a merge.

Each check is a function that adds rows to a Report. Nothing of the folder is executed.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import page
from bundle import bundle, unbundle
from runs import (
    LIMIT_BYTES,
    LIMIT_SECONDS,
    RECORD_TRACK,
    RECORDS,
    TRACKS,
    RecordError,
    Run,
    Submission,
    bpb_of_nats,
    file_digest,
    find_runs,
    read_command,
    read_json,
    source_digest,
)

from train_gpt import ALIASES

OWN = {"seed", "run_id", "log_dir"}  # settings in which the seeds of a record differ
PLACES = {"data_dir", "data_path", "tokenizer_path"}  # may differ from command.sh: see the data
ROUNDING = 0.1  # seconds between two ways to add the same phases


@dataclass
class Report:
    """Rows of (check, verdict, what was seen); a verdict of None is a remark."""

    rows: list[tuple[str, bool | None, str]] = field(default_factory=list)

    def add(self, check: str, verdict: bool | None, says: str) -> None:
        self.rows.append((check, verdict, says))

    def faults(self, check: str, problems: Sequence[str], fine: str) -> None:
        """One row for each problem, or one that says what is fine."""
        for problem in problems:
            self.add(check, False, problem)
        if not problems:
            self.add(check, True, fine)

    @property
    def clean(self) -> bool:
        return all(verdict is not False for _, verdict, _ in self.rows)

    def text(self) -> str:
        words = {True: "ok", False: "FAULT", None: "remark"}
        return "\n".join(f"{words[v]:<7} {check:<11} {says}" for check, v, says in self.rows)


@dataclass(frozen=True)
class Record:
    """A folder as the checks see it; what is missing is None and a fault of `check_files`."""

    folder: Path
    runs: Sequence[Run]
    submission: Mapping[str, Any] | None
    readme: str | None
    command: Mapping[str, str] | None

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Raises: RecordError if the runs cannot be read at all."""
        readme, submission = folder / "README.md", folder / "submission.json"
        finished = any(folder.glob("seed*.json"))
        return cls(
            folder.resolve(),
            find_runs(folder, copies=finished),
            read_json(submission) if submission.is_file() else None,
            readme.read_text(encoding="utf-8") if readme.is_file() else None,
            read_command(folder / "command.sh") if (folder / "command.sh").is_file() else None,
        )

    @property
    def for_record(self) -> bool:
        return self.folder.parent.name == RECORD_TRACK


def check_files(record: Record, report: Report) -> None:
    """All files of a record are there, under their names."""
    names = ["README.md", "submission.json", "train_gpt.py", "requirements.txt", "command.sh"]
    for run in record.runs:
        names += [f"{run.name}.json", f"{run.name}.txt", f"{run.name}.audit.json"]
    missing = [name for name in [*names, *page.PICTURES] if not (record.folder / name).is_file()]
    problems = [f"{name} is missing" for name in missing]
    track = record.folder.parent.name
    if track not in TRACKS:
        problems.append(f"lies in {track}, expected one of {', '.join(TRACKS)}")
    for run in record.runs:
        for suffix in ("json", "txt"):
            source = record.folder / "runs" / run.name / f"{run.name}.{suffix}"
            copy = record.folder / source.name
            if source.is_file() and copy.is_file() and source.read_bytes() != copy.read_bytes():
                problems.append(f"{copy.name} is not what runs/{run.name} holds")
    report.faults("files", problems, "all there")


def check_pictures(record: Record, report: Report) -> None:
    """Every picture was drawn from these runs."""
    from PIL import Image, UnidentifiedImageError

    expected, stale = source_digest(record.runs), []
    for name in page.PICTURES:
        if (record.folder / name).is_file():
            try:
                with Image.open(record.folder / name) as picture:
                    source = picture.info.get("Source")
            except UnidentifiedImageError:
                source = None
            if source != expected:
                stale.append(name)
    problems = [f"{', '.join(stale)}: not drawn from these runs; run finish again"] if stale else []
    report.faults("pictures", problems, "drawn from these runs")


def check_schema(record: Record, report: Report) -> None:
    """submission.json has the fields of submission.schema.json."""
    from jsonschema import Draft202012Validator

    if record.submission is None:
        return
    validator = Draft202012Validator(read_json(RECORDS / "submission.schema.json"))
    errors = sorted(validator.iter_errors(record.submission), key=lambda e: e.json_path)
    problems = [f"submission.json: {e.json_path.removeprefix('$.')}: {e.message}" for e in errors]
    report.faults("schema", problems, "submission.json has all fields")


def check_settings(record: Record, report: Report) -> None:
    """All seeds ran with the same settings, on the same kind of machine, and trained."""
    first, problems = record.runs[0], []
    for run in record.runs[1:]:
        for name in sorted(first.settings.keys() | run.settings.keys()):
            one, other = first.settings.get(name), run.settings.get(name)
            if name not in OWN and one != other:
                problems.append(
                    f"{name.upper()} is {one} in {first.name} and {other} in {run.name}"
                )
        for name in ("device", "world_size", "compute_dtype", "compiled", "torch", "cuda"):
            one, other = (r.facts["runtime"].get(name) for r in (first, run))
            if one != other:
                problems.append(f"{name} is {one} in {first.name} and {other} in {run.name}")
    for run in record.runs:
        problems += [
            f"{run.name} took its weights from {name.upper()}={run.settings[name]}"
            for name in ("artifact", "checkpoint")
            if run.settings.get(name)
        ]
    fits = first.facts["runtime"]["world_size"] == 8 and "H100" in first.hardware
    if record.for_record and not fits:
        problems.append(f"ran on {first.hardware}, {RECORD_TRACK} is for 8xH100")
    report.faults("settings", problems, f"equal in {len(record.runs)} runs on {first.hardware}")


def bundled(shipped: bytes, source: str) -> bool | None:
    """Whether a file is the bundle for a record that is made of this source.

    None: the same program below the same head, but written by another version of Python.
    """
    try:
        again = bundle(source, for_record=True)
        if shipped == again:
            return True
        (head, text), (expected_head, expected) = unbundle(shipped), unbundle(again)
        if head != expected_head or text == expected:  # equal texts: another lzma made them
            return head == expected_head
        return None if ast.dump(ast.parse(text)) == ast.dump(ast.parse(expected)) else False
    except (ValueError, SyntaxError):
        return False


def check_code(record: Record, report: Report) -> None:
    """The shipped file is the one that ran, and its readable source is its own."""
    shipped, readable = (record.folder / n for n in ("train_gpt.py", "train_gpt_readable.py"))
    if not shipped.is_file():
        return
    digest, size = file_digest(shipped), shipped.stat().st_size
    problems = [
        f"{run.name} ran code {run.facts['code']['sha256'][:16]}... of "
        f"{run.facts['code']['bytes']:,} bytes, train_gpt.py is {digest[:16]}... of {size:,}"
        for run in record.runs
        if run.facts["code"] != dict(bytes=size, sha256=digest)
    ]
    if readable.is_file():
        same = bundled(shipped.read_bytes(), readable.read_text(encoding="utf-8"))
        if same is False:
            problems.append(
                "train_gpt.py is not what records/bundle.py makes of its readable source"
            )
        elif same is None:
            report.add("code", None, "train_gpt.py was bundled by another version of Python")
    elif "class Config" not in shipped.read_text(encoding="utf-8", errors="replace"):
        problems.append("train_gpt_readable.py is missing: train_gpt.py is bundled")
    report.faults("code", problems, f"every run ran train_gpt.py, sha256 {digest[:16]}...")


def log_lines(run: Run) -> Iterator[str]:
    """How lines of the log begin that say what the JSON says."""
    facts, settings = run.facts, run.settings
    yield f"code_bytes: {facts['code']['bytes']} code_sha256: {facts['code']['sha256']}"
    yield "runtime: " + " ".join(f"{key}={value}" for key, value in facts["runtime"].items())
    for name, value in settings.items():
        yield f"  {name}: {value}"
    yield " ".join(f"{key}: {value}" for key, value in facts["data"].items())
    for point in facts.get("curve", []):
        yield (
            f"{point['step']}/{settings['iterations']} train_loss: {point['train_loss']:.4f} "
            f"train_time: {point['train_seconds'] / 60:.1f}m"
        )
    if "step_ms" in facts:
        yield "step_ms " + " ".join(f"{key}:{value}" for key, value in facts["step_ms"].items())
    for name, stage in facts["stages"].items():
        yield f"{name} val_loss:{stage['val_loss']:.8f} val_bpb:{stage['val_bpb']:.8f} "
    phases = facts["budget"]["phases"].items()
    yield "budget " + " ".join(f"{name}={seconds:.1f}s" for name, seconds in phases)
    for part in page.PARTS:
        yield f"budget {part}: {facts['budget'][part]['seconds']:.1f}s"
    yield "result " + " ".join(f"{key}={value}" for key, value in run.result.items())


def check_logs(record: Record, report: Report) -> None:
    """Every log ends with a result and says what its JSON says."""
    problems = []
    for run in record.runs:
        if run.log is None:
            problems.append(f"{run.name}.txt is missing")
            continue
        lines = run.log.splitlines()
        for start in log_lines(run):
            if not any(line.startswith(start.rstrip()) for line in lines):
                problems.append(f"{run.name}.json says {start.strip()!r}, {run.name}.txt does not")
        if not lines or not lines[-1].startswith("result "):
            problems.append(f"{run.name}.txt does not end with its result")
    report.faults("logs", problems, "each says what its JSON says")


def check_sums(record: Record, report: Report) -> None:
    """Figures of a run that follow from others of the same run."""
    problems = []
    for run in record.runs:
        for name, stage in run.facts["stages"].items():
            bpb = bpb_of_nats(stage["nats"] / stage["tokens"], stage["tokens"], stage["bytes"])
            for key, value in (("val_bpb", bpb), ("val_loss", stage["nats"] / stage["tokens"])):
                if not math.isclose(stage[key], value, rel_tol=1e-9):
                    problems.append(f"{run.name}: {name} {key} is {stage[key]}, its sums: {value}")
            for key in ("tokens", "bytes"):
                if stage[key] != run.facts["data"][f"val_{key}"]:
                    problems.append(f"{run.name}: {name} scored {stage[key]:,} {key}, not all")
        result, last = run.result, run.last["val_bpb"]
        if result["val_bpb"] != round(last, 8):
            problems.append(f"{run.name}: the result is {result['val_bpb']}, its last stage {last}")
        if result["total_bytes"] != result["artifact_bytes"] + result["code_bytes"]:
            problems.append(f"{run.name}: total_bytes is not artifact_bytes + code_bytes")
        if result["code_bytes"] != run.facts["code"]["bytes"]:
            problems.append(f"{run.name}: code_bytes is not the size of the code that ran")
    report.faults("sums", problems, "scores and bytes follow from their parts")


def check_data(record: Record, report: Report) -> None:
    """The same verified data and scoring order in every seed, scored whole for a record."""
    first, problems = record.runs[0], []
    for run in record.runs:
        data = run.facts["data"]
        if data.get("data_verified") is not True:
            problems.append(f"{run.name}: data not verified; see data/verify_dataset.py")
        for key in sorted(first.facts["data"].keys() | data.keys()):
            if first.facts["data"].get(key) != data.get(key):
                problems.append(f"{key} differs between {first.name} and {run.name}")
        for name, stage in run.facts["stages"].items():
            theirs = first.facts["stages"].get(name, {}).get("order_sha256")
            if stage.get("order_sha256") != theirs:
                problems.append(f"{run.name} scored {name} in another order than {first.name}")
    limited = first.settings.get("val_tokens")
    if record.for_record and limited:
        problems.append(f"VAL_TOKENS={limited}: only a part of the validation text is scored")
    name = first.facts["data"].get("data_fingerprint", "not recorded")
    report.faults("data", problems, f"verified, fingerprint {name}")
    if not all("order_sha256" in stage for stage in first.facts["stages"].values()):
        report.add("data", None, "order of scoring: not recorded")


def check_budgets(record: Record, report: Report) -> None:
    """Training and evaluation within the limits, and phases that add up."""
    problems, most = [], {}
    for run in record.runs:
        budget = run.facts["budget"]
        unbooked = budget.get("unbooked_seconds", 0.0)
        for part, names in page.PARTS.items():
            spent, said = run.seconds(part, names), budget[part]["seconds"]
            own = budget[part]["limit"] or (LIMIT_SECONDS if record.for_record else math.inf)
            limit = min(own, LIMIT_SECONDS) if record.for_record else own
            booked = sum(budget["phases"].get(name, 0.0) for name in names)
            if min(abs(said - booked), abs(said - booked - unbooked)) > ROUNDING:
                problems.append(f"{run.name}: {part} {said:.1f} s, its phases {booked:.1f} s")
            if spent > limit:
                problems.append(f"{run.name}: {part} took {spent:.1f} s of {limit:g} s")
            most[part] = max(most.get(part, 0.0), spent)
        total = sum(budget["phases"].values()) + unbooked
        if abs(budget.get("wall_seconds", total) - total) > ROUNDING:
            problems.append(f"{run.name}: phases and unbooked time are not wall_seconds")
        if "unbooked_seconds" not in budget:
            report.add("budgets", None, f"{run.name}: unbooked time: not recorded")
        if run.facts.get("ttt", {}).get("complete") is False:
            report.add("budgets", None, f"{run.name}: adaptation stopped early, to stay in time")
    says = ", ".join(f"{part} at most {seconds:.1f} s" for part, seconds in most.items())
    report.faults("budgets", problems, says)


def check_bytes(record: Record, report: Report) -> None:
    """The files on disk, code and artifact, are within the limit."""
    shipped, problems, most = record.folder / "train_gpt.py", [], 0
    code = shipped.stat().st_size if shipped.is_file() else 0
    for run in record.runs:
        size, wrote = run.result["artifact_bytes"], run.facts.get("artifact")
        if wrote and wrote["bytes"] != size:
            problems.append(f"{run.name}: wrote {wrote['bytes']:,} bytes, its result says {size:,}")
        blob = record.folder / "runs" / run.name / f"{run.name}.bin"
        if blob.is_file():
            if blob.stat().st_size != size:
                problems.append(f"{blob.name} has {blob.stat().st_size:,} bytes, not {size:,}")
            elif wrote and wrote["sha256"] != file_digest(blob):
                problems.append(f"{blob.name} is not the artifact that {run.name} wrote")
        total = max(code, run.facts["code"]["bytes"]) + size
        if total > LIMIT_BYTES:
            problems.append(f"{run.name}: {total:,} bytes, the limit is {LIMIT_BYTES:,}")
        most = max(most, total)
    report.faults("bytes", problems, f"at most {most:,} of {LIMIT_BYTES:,}")


def check_audits(record: Record, report: Report) -> None:
    """Every artifact has an audit of its own that found it legal."""
    problems = []
    for run in record.runs:
        problems += [f"{run.name}: invalid_for_records: {reason}" for reason in run.marks]
        audit, wrote = run.audit, run.facts.get("artifact")
        if audit is None:
            problems.append(f"{run.name}.audit.json is missing; run AUDIT=1 on its artifact")
            continue
        verdict, reasons = audit.get("verdict"), "; ".join(audit.get("reasons", []))
        if verdict not in ("legal", "legal with remarks"):
            problems.append(f"{run.name}: the audit says {verdict}: {reasons}")
        elif reasons:
            report.add("audits", None, f"{run.name}: {verdict}: {reasons}")
        failed = [n for n, c in audit.get("conditions", {}).items() if c["verdict"] == "fail"]
        if failed and verdict != "illegal":
            problems.append(f"{run.name}: the audit says {verdict}, but {', '.join(failed)} failed")
        if audit.get("code", {}).get("sha256") != run.facts["code"]["sha256"]:
            problems.append(f"{run.name}: audited with other code than it ran with")
        audited = audit.get("artifact", {})
        if wrote is None:
            report.add("audits", None, f"{run.name}: sha256 of its artifact: not recorded")
        if audited.get("bytes") != run.result["artifact_bytes"] or (
            wrote and audited.get("sha256") != wrote["sha256"]
        ):
            problems.append(f"{run.name}: the audit is of another artifact")
    report.faults("audits", problems, "every artifact was found legal")


def same_value(text: str, value: Any) -> bool:
    """Whether a variable's text gives this value of a setting."""
    if isinstance(value, bool):
        return text.lower() in (("1", "true") if value else ("0", "false"))
    try:
        return text == value if isinstance(value, str) else float(text) == value
    except ValueError:
        return False


def check_command(record: Record, report: Report) -> None:
    """command.sh sets real settings, and is all that the runs were told."""
    if record.command is None:
        return
    given = {ALIASES.get(name, name.lower()): name for name in record.command}
    problems = []
    for run in record.runs:
        for setting, name in given.items():
            text, entry = record.command[name], run.facts["config"].get(setting)
            if entry is None or name != name.upper():
                problems.append(f"command.sh: {name} is no setting of the program")
            elif setting not in PLACES and not same_value(text, entry["value"]):
                problems.append(f"command.sh: {name}={text}, {run.name} ran with {entry['value']}")
        for setting, entry in run.facts["config"].items():
            if entry["source"] == "environment" and setting not in OWN | PLACES | given.keys():
                problems.append(
                    f"{run.name}: {setting.upper()}={entry['value']} was set, not by command.sh"
                )
    text = (record.folder / "command.sh").read_text(encoding="utf-8")
    if found := re.search(r"nproc_per_node=(\d+)", text):
        ranks = record.runs[0].facts["runtime"]["world_size"]
        if int(found[1]) != ranks:
            problems.append(f"command.sh starts {found[1]} processes, the runs had {ranks}")
    problems = list(dict.fromkeys(problems))
    report.faults("command", problems, "real settings, as the runs had them")


NUMBER = re.compile(r"(?<![\w#./%-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?=(?:ms|s|kB|MB|MiB)?(?![\w/]))")


def numbers(text: str) -> Iterator[tuple[str, float]]:
    """(as written, value) of the numbers in a text; no names (int6, #1493), dates or paths."""
    for match in NUMBER.finditer(text):
        written = match[0].rstrip(",")
        yield written, float(written.replace(",", ""))


def check_hand(record: Record, report: Report, known_text: str) -> None:
    """Numbers in what was written by hand occur, perhaps with more digits, in log or JSON."""
    if record.readme is None or record.submission is None:
        return
    known, problems = [value for _, value in numbers(known_text)], []
    texts = {
        "README.md": page.hand_text(record.readme),
        "blurb": str(record.submission.get("blurb", "")),
    }
    for where, text in texts.items():
        for written, value in numbers(text):
            digits = len(written.partition(".")[2])
            half = 0.5000001 * 10.0**-digits if "." in written else 0.0
            if not any(abs(value - other) <= half for other in known):
                problems.append(f"{where}: {written} occurs in no log or JSON of the runs")
    report.faults("figures", problems, "those written by hand occur in log or JSON")


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, by path."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in [*expected, *(key for key in found if key not in expected)]:
            path = f"{where}.{key}" if where else str(key)
            yield from differences(found.get(key), expected.get(key), path)
    elif found != expected:
        yield f"submission.json: {where} is {found}, the runs say {expected}"


def check_figures(record: Record, report: Report) -> None:
    """README.md and submission.json are what the runs give, made again."""
    if record.submission is None or record.readme is None or record.command is None:
        return
    folder, runs, submission = record.folder, record.runs, record.submission
    place, old, problems = submission.get("comparison_baseline_path"), None, []
    if place:
        try:
            old = Submission.read(folder / place)
        except RecordError as error:
            report.add("figures", False, f"predecessor: {error}")
            return
    again = page.make_submission(folder, runs, submission, old)
    problems += differences(submission, json.loads(json.dumps(again)))
    text = page.make_readme(folder, runs, again, page.hand_text(record.readme))
    lines, expected = record.readme.splitlines(), text.splitlines()
    spare = set(expected) - set(lines)
    for number, line in enumerate(lines, 1):
        if line not in expected:
            problems.append(f"README.md line {number}: {line!r} does not follow from the runs")
    problems += [f"README.md lacks the line {line!r}" for line in expected if line in spare]
    if not problems and lines != expected:
        problems.append("README.md: its lines stand in another order; run finish again")
    report.faults("figures", problems, "README.md and submission.json follow from the runs")
    known = [json.dumps(run.facts) + (run.log or "") for run in runs]
    check_hand(record, report, " ".join([*known, json.dumps(again), str(record.command)]))
    claim = "stands" if again["claim"] else "none"
    report.add("claim", None, f"{claim}: {again['claim_reason']}")


CHECKS: tuple[Callable[[Record, Report], None], ...] = (
    check_files,
    check_pictures,
    check_schema,
    check_settings,
    check_code,
    check_command,
    check_logs,
    check_sums,
    check_data,
    check_budgets,
    check_bytes,
    check_audits,
    check_figures,
)


def lint(folder: Path) -> Report:
    """Run every check on a folder. Raises RecordError if it holds no readable runs."""
    report, doing = Report(), "the runs"
    try:
        record = Record.read(folder)
        for check in CHECKS:
            doing = check.__name__
            check(record, report)
    except (KeyError, TypeError, AttributeError) as error:  # JSON of another shape than ours
        raise RecordError(
            f"{folder}: {doing} cannot read a JSON ({error!r}); copy the files of the runs again"
        ) from error
    return report
