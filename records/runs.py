"""Read runs and submissions, and test whether one beats another.

A Run is the JSON and log that train_gpt.py writes. A Submission is any submission.json of this
field, in any of its formats. Samples of bits per byte are compared by Welch's test.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from report import Report, exit_status  # noqa: E402, F401 -- for the other tools of this folder

from train_gpt import EVALUATION_SECONDS, TRAINING_SECONDS, Budget, UserError  # noqa: E402

RECORD_TRACK, OTHER_TRACK = TRACKS = ("track_10min_16mb", "track_non_record_16mb")
# The parts of a run that have a time limit: their phases, and the limits of the competition.
PARTS = {"training": Budget.TRAINING, "evaluation": Budget.EVALUATION}
LIMIT_SECONDS = {"training": TRAINING_SECONDS, "evaluation": EVALUATION_SECONDS}
OWN = {"SEED", "RUN_ID", "LOG_DIR"}  # variables in which the seeds of a record differ
PLACES = ("DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "CHECKPOINT", "ARTIFACT")  # paths
MARGIN_NATS, P_LIMIT = 0.005, 0.01  # requirements of a claim; the margin is per token
NOISE = "run-to-run noise is about 0.0003 to 0.001 bpb, so n = 1 cannot show a smaller difference"
# Stage of a run: (its field in seed_results, its name in a table).
STAGES = {
    "pre-quantization post-ema": ("pre_quant_val_bpb", "before quantization"),
    "quantized": ("quantized_val_bpb", "quantized"),
    "quantized_sliding_window": ("sliding_window_val_bpb", "sliding"),
    "quantized_ttt": ("ttt_val_bpb", "adapted"),
}


class RecordError(UserError):
    """A folder, run or submission that a tool of records/ cannot use."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises RecordError if the file does not contain one."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; expected a JSON file") from error
    except ValueError as error:
        raise RecordError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(facts, dict):
        raise RecordError(f"{path}: found a {type(facts).__name__}, expected a JSON object")
    return facts


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table: the first column left, the others right aligned."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    lines = (f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *rows))
    return [line.replace("|  |", "| |") for line in lines]


@dataclass(frozen=True)
class Run:
    """A run of train_gpt.py: facts of its JSON, its log and its audit; None if missing."""

    path: Path
    facts: Mapping[str, Any]
    log: str | None
    audit: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run: JSON, log and audit. Raises RecordError if the run did not finish."""
        facts = read_json(path)
        log, audit = path.with_suffix(".txt"), path.with_suffix(".audit.json")
        for key in ("config", "code", "data", "stages", "budget", "result"):
            if not isinstance(facts.get(key), dict):
                why = facts.get("error", "the run did not finish")
                raise RecordError(f"{path}: lacks {key} ({why}); run that seed again or remove it")
        if not isinstance(facts["result"].get("seed"), int):
            raise RecordError(f"{path}: the result lacks a seed; copy the file again")
        return cls(
            path,
            facts,
            log.read_text(encoding="utf-8") if log.is_file() else None,
            read_json(audit) if audit.is_file() else None,
        )

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def seed(self) -> int:
        return self.facts["result"]["seed"]

    @property
    def result(self) -> Mapping[str, Any]:
        return self.facts["result"]

    @property
    def settings(self) -> dict[str, Any]:
        """The value of each setting."""
        return {name: entry["value"] for name, entry in self.facts["config"].items()}

    @property
    def bpb(self) -> dict[str, float]:
        """{stage: bits per byte}, in order."""
        return {name: stage["val_bpb"] for name, stage in self.facts["stages"].items()}

    @property
    def last(self) -> Mapping[str, Any]:
        """The stage whose score is the result."""
        return list(self.facts["stages"].values())[-1]

    @property
    def hardware(self) -> str:
        runtime = self.facts["runtime"]
        return f"{runtime['world_size']}x{runtime['device']}"

    @property
    def marks(self) -> list[str]:
        """Why the run cannot be a record; empty if it can."""
        marked = self.result.get("invalid_for_records")
        return list(self.facts.get("invalid_for_records") or []) or ["marked"] * bool(marked)

    def booked(self, part: str) -> float:
        """Seconds in the phases of a part."""
        phases = self.facts["budget"]["phases"]
        return sum(phases.get(name, 0.0) for name in PARTS[part])

    def seconds(self, part: str) -> float:
        """Seconds that count against the limit of a part, with all time that is in no phase."""
        budget = self.facts["budget"]
        lost = budget.get("unbooked_seconds", 0.0)
        return max(budget[part]["seconds"], self.booked(part) + lost)


def find_runs(folder: Path, *, copies: bool = False) -> list[Run]:
    """The runs of a record, sorted by seed: those in runs/, else the copies beside its README.

    Args:
        copies: use the copies only.
    Raises: RecordError if there are none, or one did not finish or is named after another seed.
    """
    found = [] if copies else [p for p in folder.glob("runs/*/*.json") if p.stem == p.parent.name]
    found = [Run.read(p) for p in found or folder.glob("seed*.json") if ".audit." not in p.name]
    for run in found:
        if run.name != f"seed{run.seed}":
            raise RecordError(
                f"{run.path}: a run of seed {run.seed}, expected the name seed{run.seed}; set "
                "RUN_ID and LOG_DIR as the loop over the seeds does"
            )
    if not found:
        raise RecordError(
            f"{folder}: contains no run, expected runs/seed<N>/seed<N>.json; run the seeds"
        )
    return sorted(found, key=lambda run: run.seed)


def source_digest(runs: Sequence[Run]) -> str:
    """SHA-256 of all facts of some runs; pictures store the digest of the runs they show."""
    facts = json.dumps([run.facts for run in runs], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


# --- statistics ---


@dataclass(frozen=True)
class Sample:
    """Size, mean and sample standard deviation (n - 1) of some runs; None if unknown."""

    n: int | None
    mean: float | None
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        mean = statistics.fmean(values) if values else None
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(len(values), mean, std)

    @property
    def can_be_tested(self) -> bool:
        return bool(self.n and self.n > 1 and self.std is not None)

    def text(self, digits: int = 4) -> str:
        """`1.0810 +- 0.0002`, or the mean alone if the standard deviation is unknown."""
        spread = "" if self.std is None else f" \u00b1 {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def welch(new: Sample, old: Sample) -> tuple[float, float] | None:
    """Welch's one-sided test that `new` has the lower mean: (t, p); None if not applicable."""
    from scipy.stats import ttest_ind_from_stats

    if not (new.can_be_tested and old.can_be_tested and (new.std or old.std)):
        return None
    test = ttest_ind_from_stats(
        *(new.mean, new.std, new.n),
        *(old.mean, old.std, old.n),
        equal_var=False,
        alternative="less",
    )
    return float(test.statistic), float(test.pvalue)


def standard_error(new: Sample, old: Sample) -> float | None:
    """Standard error of the difference of two means; None if a standard deviation is unknown."""
    if not (new.can_be_tested and old.can_be_tested):
        return None
    return math.sqrt(new.std**2 / new.n + old.std**2 / old.n)


def bpb_of_nats(nats: float, tokens: int, text_bytes: int) -> float:
    """Nats per token -> bits per byte, of a text of `tokens` and `text_bytes`."""
    return nats / math.log(2) * tokens / text_bytes


# --- submissions ---


def present(value: Any) -> float | None:
    """The value if it is a positive number; 0.0 is a placeholder for a missing run."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and value > 0 and math.isfinite(value) else None


def seed_entries(results: Any) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
    """(seed, fields) of seed_results: a dict by seed or a list, of dicts or of scores."""
    pairs = results.items() if isinstance(results, Mapping) else enumerate(results or [])
    by_name = isinstance(results, Mapping)
    for key, entry in pairs:
        entry = entry if isinstance(entry, Mapping) else {"val_bpb": entry}
        digits = re.search(r"\d+", str(entry.get("seed", key if by_name else "")))
        yield (int(digits[0]) if digits else None), entry


def stated_mean(facts: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(mean, standard deviation) that a submission.json states, under any of the usual names."""
    nested = facts.get("val_bpb")
    nested = nested if isinstance(nested, Mapping) else {"mean": nested}
    names = ("val_bpb_mean", "mean_val_bpb", "three_seed_mean_val_bpb")
    means = [present(nested.get("mean")), *(present(facts.get(name)) for name in names)]
    spreads = nested.get("std"), facts.get("val_bpb_std"), facts.get("std_val_bpb")
    first = next((mean for mean in means if mean is not None), None)
    return first, next((s for s in map(present, spreads) if s is not None), None)


@dataclass(frozen=True)
class Submission:
    """The content of any submission.json. Fields of bpb are None if the file lacks them.

    Attributes: stages, {stage: bits per byte of each seed}; facts, the whole content.
    """

    name: str
    bpb: Sample
    seeds: tuple[int, ...] = ()
    stages: Mapping[str, list[float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], name: str = "?") -> Submission:
        """Scores of the seeds take precedence over a stated mean.

        Scores are read from `seed_results` only: other fields may hold scores before a correction.
        """
        entries = [(s, e) for s, e in seed_entries(facts.get("seed_results")) if present_bpb(e)]
        values, (mean, std) = [present_bpb(e) for _, e in entries], stated_mean(facts)
        stages = {
            stage: [v for _, e in entries if (v := present(e.get(key))) is not None]
            for stage, (key, _) in STAGES.items()
        }
        listed = facts.get("seeds") if isinstance(facts.get("seeds"), list) else []
        seeds = tuple(seed for seed, _ in entries if seed is not None) or tuple(listed)
        three = 3 if "three_seed_mean_val_bpb" in facts else None
        stated = Sample(len(listed) or three, mean, std)
        return cls(
            str(facts.get("name") or name),
            Sample.of(values) if values else stated,
            seeds,
            {stage: values for stage, values in stages.items() if values},
            facts,
        )

    @classmethod
    def read(cls, path: Path) -> Submission:
        """Read a submission.json, or the one in a folder."""
        path = path / "submission.json" if path.is_dir() else path
        return cls.from_facts(read_json(path), path.parent.name)

    @property
    def track(self) -> str:
        """One of TRACKS; files of others spell it differently, or omit the main track."""
        words = re.findall("[a-z0-9]+", str(self.facts.get("track")).lower())
        return OTHER_TRACK if "non" in words else RECORD_TRACK

    def size(self, key: str) -> int | None:
        """A whole number, such as val_bytes: of the file, else the largest of its seeds."""
        entries = [entry for _, entry in seed_entries(self.facts.get("seed_results"))]
        found = [n for n in (present(entry.get(key)) for entry in entries) if n is not None]
        stated = present(self.facts.get(key))
        return int(stated or max(found)) if stated or found else None


def present_bpb(entry: Mapping[str, Any]) -> float | None:
    """The score of one seed."""
    return present(entry.get("val_bpb"))


def judge(new: Sample, run: Run, old: Submission | None) -> dict[str, Any]:
    """Whether the new sample beats its predecessor: fields of submission.json.

    The claim stands if p < 0.01 and the difference is at least 0.005 nats per token.
    """
    tokens, size = run.facts["data"]["val_tokens"], run.facts["data"]["val_bytes"]
    margin = bpb_of_nats(MARGIN_NATS, tokens, size)
    found: dict[str, Any] = dict(margin_bpb=round(margin, 8))
    if old is None:
        return found | dict(claim=False, claim_reason="no predecessor was named")
    against, reasons = [], []
    found |= dict(comparison_baseline=old.name, comparison_baseline_n=old.bpb.n)
    if old.bpb.mean is None:
        return found | dict(claim=False, claim_reason=f"{old.name} does not record a score")
    found |= dict(comparison_baseline_bpb=round(old.bpb.mean, 8))
    found |= dict(comparison_baseline_std=old.bpb.std and round(old.bpb.std, 8))
    better = old.bpb.mean - new.mean
    nats = better * math.log(2) * size / tokens
    found |= dict(delta_bpb=round(-better, 8), delta_nats=round(-nats, 8))
    if better < margin:
        against.append(f"the gain of {better:.5f} bpb is below the margin of {margin:.5f}")
    else:
        reasons.append(f"the gain of {better:.5f} bpb reaches the margin of {margin:.5f}")
    test = welch(new, old.bpb)
    if test:
        found |= dict(t_statistic=round(test[0], 4), p_value=float(f"{test[1]:.4g}"))
        verdict = against if test[1] >= P_LIMIT else reasons
        verdict.append(f"p = {test[1]:.4g}, required is p < {P_LIMIT}")
    elif new.n < 2:
        against.append(f"n = {new.n} allows no test: {NOISE}")
    else:
        against.append(f"no test: {old.name} states no standard deviation with n >= 2")
    theirs = old.size("val_bytes")
    if theirs and abs(theirs - size) > size / 1000:  # a tail shorter than a window may be dropped
        against.append(f"{old.name} was scored on {theirs:,} bytes of text, this on {size:,}")
    elif not theirs:
        reasons.append(f"{old.name} does not record the bytes of its text")
    if old.facts.get("invalid_for_records"):
        against.append(f"{old.name} breaks the rules, so it cannot be the predecessor")
    return found | dict(claim=not against, claim_reason="; ".join(against or reasons))


# --- commands ---


def read_command(path: Path) -> dict[str, str]:
    """The variables that a command.sh exports. Raises RecordError for other commands."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; expected a file of exports") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            words = shlex.split(line)
        except ValueError:
            words = []
        name, equals, value = words[1].partition("=") if len(words) == 2 else ("", "", "")
        if not equals or words[0] != "export" or name in found:
            raise RecordError(f"{path}: line {number} is {line!r}, expected export NAME=VALUE once")
        found[name] = value
    return found
