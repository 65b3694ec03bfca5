"""The linter for the folder of a record: what a maintainer would check before merging it.

Each check is a function that adds rows to a Report. No code of the folder is executed.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import page
from bundle import bundle, unbundle
from runs import (
    LIMIT_SECONDS,
    OWN,
    PARTS,
    PLACES,
    RECORD_TRACK,
    RECORDS,
    TRACKS,
    RecordError,
    Report,
    Run,
    Submission,
    bpb_of_nats,
    find_runs,
    read_command,
    read_json,
    source_digest,
)

from train_gpt import ALIASES, TOTAL_BYTES, file_sha256

ROUNDING = 0.1  # seconds by which two sums of the same phases may differ


@dataclass(frozen=True)
class Record:
    """The content of a folder; missing files are None, and `check_files` reports them."""

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
    """All files of a record exist."""
    names = ["README.md", "submission.json", "train_gpt.py", "command.sh"]
    for run in record.runs:
        names += [f"{run.name}.json", f"{run.name}.txt", f"{run.name}.audit.json"]
    missing = [name for name in [*names, *page.PICTURES] if not (record.folder / name).is_file()]
    problems = [f"{name} is missing" for name in missing]
    track = record.folder.parent.name
    if track not in TRACKS:
        problems.append(f"the folder is in {track}, expected one of {', '.join(TRACKS)}")
    for run in record.runs:
        for suffix in ("json", "txt"):
            source = record.folder / "runs" / run.name / f"{run.name}.{suffix}"
            copy = record.folder / source.name
            if source.is_file() and copy.is_file() and source.read_bytes() != copy.read_bytes():
                problems.append(f"{copy.name} differs from the one in runs/{run.name}")
    report.faults("files", problems, "complete")


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
    """submission.json conforms to submission.schema.json."""
    from jsonschema import Draft202012Validator

    if record.submission is None:
        return
    validator = Draft202012Validator(read_json(RECORDS / "submission.schema.json"))
    errors = sorted(validator.iter_errors(record.submission), key=lambda e: e.json_path)
    problems = [f"submission.json: {e.json_path.removeprefix('$.')}: {e.message}" for e in errors]
    report.faults("schema", problems, "submission.json conforms to its schema")


def check_settings(record: Record, report: Report) -> None:
    """All seeds were trained with the same settings on the same kind of machine."""
    first, problems = record.runs[0], []
    for run in record.runs[1:]:
        for name in sorted(first.settings.keys() | run.settings.keys()):
            one, other = first.settings.get(name), run.settings.get(name)
            if name.upper() not in OWN and one != other:
                problems.append(
                    f"{name.upper()} is {one} in {first.name} and {other} in {run.name}"
                )
        for name in ("device", "world_size", "compute_dtype", "compiled", "torch", "cuda"):
            one, other = (r.facts["runtime"].get(name) for r in (first, run))
            if one != other:
                problems.append(f"{name} is {one} in {first.name} and {other} in {run.name}")
    for run in record.runs:
        problems += [
            f"{run.name} loaded its weights from {name.upper()}={run.settings[name]}"
            for name in ("artifact", "checkpoint")
            if run.settings.get(name)
        ]
    fits = first.facts["runtime"]["world_size"] == 8 and "H100" in first.hardware
    if record.for_record and not fits:
        problems.append(f"ran on {first.hardware}, expected 8xH100 in {RECORD_TRACK}")
    report.faults("settings", problems, f"the same in {len(record.runs)} runs on {first.hardware}")


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
    digest, size = file_sha256(shipped), shipped.stat().st_size
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
    """Beginnings of the log lines that repeat facts of the JSON."""
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
    for part in PARTS:
        yield f"budget {part}: {facts['budget'][part]['seconds']:.1f}s"
    yield "result " + " ".join(f"{key}={value}" for key, value in run.result.items())


def check_logs(record: Record, report: Report) -> None:
    """Every log ends with the result and agrees with its JSON."""
    problems = []
    for run in record.runs:
        if run.log is None:
            problems.append(f"{run.name}.txt is missing")
            continue
        lines = run.log.splitlines()
        for start in log_lines(run):
            if not any(line.startswith(start.rstrip()) for line in lines):
                problems.append(f"{run.name}.txt lacks {start.strip()!r}, {run.name}.json has it")
        if not lines or not lines[-1].startswith("result "):
            problems.append(f"{run.name}.txt does not end with its result")
    report.faults("logs", problems, "each agrees with its JSON")


def check_sums(record: Record, report: Report) -> None:
    """Figures of a run that follow from other figures of that run."""
    problems = []
    for run in record.runs:
        for name, stage in run.facts["stages"].items():
            bpb = bpb_of_nats(stage["nats"] / stage["tokens"], stage["tokens"], stage["bytes"])
            for key, value in (("val_bpb", bpb), ("val_loss", stage["nats"] / stage["tokens"])):
                if not math.isclose(stage[key], value, rel_tol=1e-9):
                    problems.append(
                        f"{run.name}: {name} {key} is {stage[key]}, its sums give {value}"
                    )
            for key in ("tokens", "bytes"):
                if stage[key] != (whole := run.facts["data"][f"val_{key}"]):
                    problems.append(f"{run.name}: {name} scored {stage[key]:,} of {whole:,} {key}")
        result, last = run.result, run.last["val_bpb"]
        if result["val_bpb"] != round(last, 8):
            problems.append(f"{run.name}: the result is {result['val_bpb']}, the last stage {last}")
        if result["total_bytes"] != result["artifact_bytes"] + result["code_bytes"]:
            problems.append(f"{run.name}: total_bytes is not artifact_bytes + code_bytes")
        if result["code_bytes"] != run.facts["code"]["bytes"]:
            problems.append(f"{run.name}: code_bytes is not the size of the code that ran")
    report.faults("sums", problems, "scores and byte counts follow from their parts")


def check_data(record: Record, report: Report) -> None:
    """All seeds used the same verified data and scoring order; a record scores the whole text."""
    first, problems = record.runs[0], []
    for run in record.runs:
        data = run.facts["data"]
        if data.get("data_verified") is not True:
            problems.append(
                f"{run.name}: data not verified; run data/verify_dataset.py before the run"
            )
        for key in sorted(first.facts["data"].keys() | data.keys()):
            if first.facts["data"].get(key) != data.get(key):
                problems.append(f"{key} differs between {first.name} and {run.name}")
        for name, stage in run.facts["stages"].items():
            theirs = first.facts["stages"].get(name, {}).get("order_sha256")
            if stage.get("order_sha256") != theirs:
                problems.append(f"{run.name} scored {name} in another order than {first.name}")
    limited = first.settings.get("val_tokens")
    if record.for_record and limited:
        problems.append(f"VAL_TOKENS={limited}: only part of the validation text is scored")
    name = first.facts["data"].get("data_fingerprint", "not recorded")
    report.faults("data", problems, f"verified, fingerprint {name}")
    if not all("order_sha256" in stage for stage in first.facts["stages"].values()):
        report.add("data", None, "scoring order: not recorded")


def check_budgets(record: Record, report: Report) -> None:
    """Training and evaluation stay within the limits, and the phases add up."""
    problems, most = [], {}
    for run in record.runs:
        budget = run.facts["budget"]
        unbooked = budget.get("unbooked_seconds", 0.0)
        for part in PARTS:
            spent, said, booked = run.seconds(part), budget[part]["seconds"], run.booked(part)
            limit = budget[part]["limit"] or math.inf
            limit = min(limit, LIMIT_SECONDS[part]) if record.for_record else limit
            if min(abs(said - booked), abs(said - booked - unbooked)) > ROUNDING:
                problems.append(f"{run.name}: {part} {said:.1f} s, its phases {booked:.1f} s")
            if spent > limit:
                problems.append(f"{run.name}: {part} took {spent:.1f} s, the limit is {limit:g} s")
            most[part] = max(most.get(part, 0.0), spent)
        total = sum(budget["phases"].values()) + unbooked
        if abs(budget.get("wall_seconds", total) - total) > ROUNDING:
            problems.append(f"{run.name}: phases and unbooked time do not add up to wall_seconds")
        if "unbooked_seconds" not in budget:
            report.add("budgets", None, f"{run.name}: unbooked time: not recorded")
        if run.facts.get("ttt", {}).get("complete") is False:
            report.add("budgets", None, f"{run.name}: adaptation stopped early to stay within time")
    says = ", ".join(f"{part} at most {seconds:.1f} s" for part, seconds in most.items())
    report.faults("budgets", problems, says)


def check_bytes(record: Record, report: Report) -> None:
    """Code and artifact, as they are on disk, are within the limit."""
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
            elif wrote and wrote["sha256"] != file_sha256(blob):
                problems.append(f"{blob.name} is not the artifact that {run.name} wrote")
        total = max(code, run.facts["code"]["bytes"]) + size
        if total > TOTAL_BYTES:
            problems.append(f"{run.name}: {total:,} bytes, the limit is {TOTAL_BYTES:,}")
        most = max(most, total)
    report.faults("bytes", problems, f"at most {most:,} of {TOTAL_BYTES:,}")


def check_audits(record: Record, report: Report) -> None:
    """Every artifact has its own audit, which found it legal."""
    problems, tool = [], file_sha256(RECORDS / "audit.py")
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
        used = audit.get("tool", {}).get("sha256", "not recorded")
        if used != tool:
            says = f"{run.name}: audited with another audit.py (sha256 {used[:16]}), "
            report.add("audits", None, f"{says}records/audit.py has {tool[:16]}")
        failed = [n for n, c in audit.get("conditions", {}).items() if c["verdict"] == "fail"]
        if failed and verdict != "illegal":
            problems.append(f"{run.name}: the audit says {verdict}, but {', '.join(failed)} failed")
        if audit.get("code", {}).get("sha256") != run.facts["code"]["sha256"]:
            problems.append(f"{run.name}: audited with other code than the run used")
        audited = audit.get("artifact", {})
        if wrote is None:
            report.add("audits", None, f"{run.name}: sha256 of its artifact: not recorded")
        if audited.get("bytes") != run.result["artifact_bytes"] or (
            wrote and audited.get("sha256") != wrote["sha256"]
        ):
            problems.append(f"{run.name}: the audit is of another artifact")
    report.faults("audits", problems, "every artifact is legal")


def same_value(text: str, value: Any) -> bool:
    """Whether the text of a variable gives this value of a setting."""
    if isinstance(value, bool):
        return text.lower() in (("1", "true") if value else ("0", "false"))
    try:
        return text == value if isinstance(value, str) else float(text) == value
    except ValueError:
        return False


def check_command(record: Record, report: Report) -> None:
    """command.sh sets existing settings, and the runs had no other variables."""
    if record.command is None:
        return
    given = {ALIASES.get(name, name.lower()): name for name in record.command}
    problems = []
    for run in record.runs:
        for setting, name in given.items():
            text, entry = record.command[name], run.facts["config"].get(setting)
            if entry is None or name != name.upper():
                problems.append(f"command.sh: {name} is not a setting")
            elif setting.upper() not in PLACES and not same_value(text, entry["value"]):
                problems.append(f"command.sh: {name}={text}, {run.name} ran with {entry['value']}")
        for setting, entry in run.facts["config"].items():
            known = setting in given or setting.upper() in (*OWN, *PLACES)
            if entry["source"] == "environment" and not known:
                problems.append(
                    f"{run.name}: {setting.upper()}={entry['value']} was set, but not by command.sh"
                )
    text = (record.folder / "command.sh").read_text(encoding="utf-8")
    if found := re.search(r"nproc_per_node=(\d+)", text):
        ranks = record.runs[0].facts["runtime"]["world_size"]
        if int(found[1]) != ranks:
            problems.append(f"command.sh starts {found[1]} processes, the runs had {ranks}")
    problems = list(dict.fromkeys(problems))
    report.faults("command", problems, "the runs had the settings of command.sh")


NUMBER = re.compile(r"(?<![\w#./%-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?=(?:ms|s|kB|MB|MiB)?(?![\w/]))")


def numbers(text: str) -> Iterator[tuple[str, float]]:
    """(as written, value) of the numbers in a text, except in names (int6, #1493), dates, paths."""
    for match in NUMBER.finditer(text):
        written = match[0].rstrip(",")
        yield written, float(written.replace(",", ""))


def check_hand(record: Record, report: Report, known_text: str) -> None:
    """Numbers in texts written by hand occur in log or JSON, perhaps with more digits."""
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
                problems.append(f"{where}: {written} is not in any log or JSON of the runs")
    report.faults("figures", problems, "figures written by hand occur in log or JSON")


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Yield a sentence for each difference of two JSON values."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in [*expected, *(key for key in found if key not in expected)]:
            path = f"{where}.{key}" if where else str(key)
            yield from differences(found.get(key), expected.get(key), path)
    elif found != expected:
        yield f"submission.json: {where} is {found}, the runs give {expected}"


def check_figures(record: Record, report: Report) -> None:
    """README.md and submission.json equal those that `finish` would write."""
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
        problems.append("README.md: its lines are in another order; run finish again")
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
    """Run every check on a folder. Raises RecordError if it does not contain readable runs."""
    report, doing = Report(), "the runs"
    try:
        record = Record.read(folder)
        for check in CHECKS:
            doing = check.__name__
            check(record, report)
    except (KeyError, TypeError, AttributeError) as error:  # JSON of another structure
        raise RecordError(
            f"{folder}: {doing} cannot read a JSON ({error!r}); copy the files of the runs again"
        ) from error
    return report
