"""The texts of a record's folder, submission.json and README.md, as pure functions of its runs.

`finish` writes them and `check` generates them again to find figures that were edited by hand.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import (
    LIMIT_SECONDS,
    MARGIN_NATS,
    P_LIMIT,
    PARTS,
    STAGES,
    Run,
    Sample,
    Submission,
    judge,
    markdown_table,
    read_command,
)

from train_gpt import TOTAL_BYTES

# Fields of submission.json that are written by hand; all others follow from the runs.
BY_HAND = ("author", "github_id", "blurb", "comparison_baseline_path")
HAND_HEADING, NEXT_HEADING = "## What it is", "## Command"
PICTURES = {  # file name: caption
    "loss.png": "Training loss over time, one line per seed.",
    "stages.png": "Bits per byte by stage, mean of the seeds.",
    "bytes.png": "Bytes and their limit, largest seed.",
    "time.png": "Seconds by phase and both limits, slowest seed.",
}
GROUPS = (
    "Bytes of a group of tensors: the order-0 entropy of its codes, plus its scales, scaled so "
    "that all groups add up to the size of the artifact on disk."
)


def seed_facts(run: Run) -> dict[str, Any]:
    """The figures of one seed in submission.json."""
    result, phases = run.result, run.facts["budget"]["phases"]
    train = phases.get("train", 0.0)
    facts = dict(val_bpb=result["val_bpb"], val_loss=round(run.last["val_loss"], 8))
    facts |= {
        field: round(run.bpb[stage], 8) for stage, (field, _) in STAGES.items() if stage in run.bpb
    }
    return facts | dict(
        artifact_bytes=result["artifact_bytes"],
        bytes_total=result["total_bytes"],
        steps=result["steps"],
        step_avg_ms=round(1e3 * train / max(result["steps"], 1), 2),
        train_wallclock_ms=round(1e3 * run.seconds("training")),
        eval_time_s=round(run.seconds("evaluation"), 1),
        val_tokens=run.facts["data"]["val_tokens"],
        val_bytes=run.facts["data"]["val_bytes"],
        audit=run.audit["verdict"] if run.audit else "missing",
    )


def make_submission(
    folder: Path, runs: Sequence[Run], by_hand: Mapping[str, Any], old: Submission | None
) -> dict[str, Any]:
    """submission.json of a folder <track>/<date>_<Name>; schema: submission.schema.json."""
    date, _, name = folder.name.partition("_")
    seeds = {str(run.seed): seed_facts(run) for run in runs}
    bpb, loss, size = (
        Sample.of([facts[key] for facts in seeds.values()])
        for key in ("val_bpb", "val_loss", "artifact_bytes")
    )
    first = runs[0].facts
    worst = {part: max(run.seconds(part) for run in runs) for part in PARTS}
    total = max(facts["bytes_total"] for facts in seeds.values())
    return dict(
        **{key: by_hand.get(key, "") for key in BY_HAND},
        name=name,
        date=date,
        track=folder.parent.name,
        val_bpb=round(bpb.mean, 8),
        val_bpb_std=bpb.std if bpb.std is None else round(bpb.std, 8),
        val_loss=round(loss.mean, 8),
        val_loss_std=loss.std if loss.std is None else round(loss.std, 8),
        seeds=[run.seed for run in runs],
        seed_results=seeds,
        bytes_total=total,
        bytes_code=first["code"]["bytes"],
        code_sha256=first["code"]["sha256"],
        artifact_bytes_mean=round(size.mean, 1),
        artifact_bytes_max=max(facts["artifact_bytes"] for facts in seeds.values()),
        hardware=runs[0].hardware,
        pytorch_version=first["runtime"]["torch"],
        cuda_version=first["runtime"]["cuda"],
        tokenizer_sha256=first["data"]["tokenizer_sha256"],
        data_fingerprint=first["data"].get("data_fingerprint"),
        compliance=dict(
            artifact_under_16mb=total <= TOTAL_BYTES,
            train_under_600s=worst["training"] <= LIMIT_SECONDS["training"],
            eval_under_600s=worst["evaluation"] <= LIMIT_SECONDS["evaluation"],
            data_verified=all(run.facts["data"].get("data_verified") is True for run in runs),
            audited=all((run.audit or {}).get("verdict", "illegal") != "illegal" for run in runs),
        ),
        **judge(bpb, runs[0], old),
    )


def results_table(submission: Mapping[str, Any]) -> list[str]:
    """One row per seed, then mean and sample standard deviation."""
    seeds = submission["seed_results"]
    shown = [s for s in STAGES.values() if all(s[0] in facts for facts in seeds.values())]
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("steps", "steps", "{:,.0f}".format),
        *((key, name, "{:.8f}".format) for key, name in shown),
        ("val_loss", "nats per token", "{:.8f}".format),
        ("bytes_total", "code and artifact [bytes]", "{:,.0f}".format),
    ]
    rows = [[seed, *(f(facts[key]) for key, _, f in columns)] for seed, facts in seeds.items()]
    for label, function in (("mean", statistics.fmean), ("standard deviation", statistics.stdev)):
        if len(seeds) > 1:
            values = [[facts[key] for facts in seeds.values()] for key, *_ in columns]
            cells = [f(function(v)) for v, (*_, f) in zip(values, columns, strict=True)]
            rows.append([label, *cells])
    return markdown_table(["seed", *(name for _, name, _ in columns)], rows)


def claim_lines(submission: Mapping[str, Any], tokens: int, size: int) -> list[str]:
    """The section on the claim: comparison with the predecessor."""
    n, margin = len(submission["seeds"]), submission["margin_bpb"]
    lines = [
        f"A claim requires p < {P_LIMIT} in Welch's one-sided test and a gain of {MARGIN_NATS} "
        f"nats per token: {MARGIN_NATS} / ln 2 x {tokens:,} tokens / {size:,} bytes = "
        f"{margin:.8f} bpb.",
        "",
    ]
    if submission.get("comparison_baseline_bpb"):
        theirs = submission["comparison_baseline_std"]
        spread = "not recorded" if theirs is None else f"{theirs:.8f}"
        ours = submission["val_bpb_std"]
        rows = [
            [
                f"this, n = {n}",
                f"{submission['val_bpb']:.8f}",
                "none, n = 1" if ours is None else f"{ours:.8f}",
            ],
            [
                f"{submission['comparison_baseline']}, n = {submission['comparison_baseline_n']}",
                f"{submission['comparison_baseline_bpb']:.8f}",
                spread,
            ],
            ["difference", f"{submission['delta_bpb']:+.8f}", ""],
        ]
        lines += markdown_table(["", "mean [bpb]", "sample standard deviation"], rows)
        lines += ["", f"In nats per token: {submission['delta_nats']:+.8f}."]
        if "p_value" in submission:
            lines[-1] += f" t = {submission['t_statistic']:.4f}, p = {submission['p_value']:.4g}."
        lines.append("")
    verdict = "The claim stands" if submission["claim"] else "There is no claim"
    return [*lines, f"**{verdict}:** {submission['claim_reason']}."]


def budget_table(runs: Sequence[Run]) -> list[str]:
    """Seconds of each seed, with the limits of its run, and time that is in no phase."""
    rows = []
    for run in runs:
        budget = run.facts["budget"]
        cells = [str(run.seed)]
        for part in PARTS:
            limit = budget[part]["limit"]
            of = f"of {limit:g}" if limit else "without a limit"
            cells.append(f"{run.seconds(part):.1f} {of}")
        for key in ("unbooked_seconds", "wall_seconds"):
            seconds = round(budget[key], 1) + 0.0 if key in budget else None  # never -0.0
            cells.append("not recorded" if seconds is None else f"{seconds:.1f}")
        verdict = run.audit["verdict"] if run.audit else "missing"
        rows.append([*cells, verdict])
    names = ["training [s]", "evaluation [s]", "in no phase [s]", "whole run [s]", "audit"]
    return markdown_table(["seed", *names], rows)


def start_line(processes: int) -> str:
    """The command that starts the program with so many processes on one machine."""
    if processes == 1:
        return "python train_gpt.py"
    return f"torchrun --standalone --nproc_per_node={processes} train_gpt.py"


def instructions(seeds: Sequence[int], processes: int, folder: Path) -> list[str]:
    """The commands from the first run to the check, for a shell in the record's folder."""
    program = os.path.relpath(Path(__file__).with_name("make_record.py"), folder)
    listed = " ".join(map(str, seeds))
    files = "RUN_ID=seed$seed LOG_DIR=runs/seed$seed"
    audit = f"AUDIT=1 ARTIFACT=runs/seed$seed/seed$seed.bin {files} python train_gpt.py"
    return [
        f"for seed in {listed}; do ( . ./command.sh; SEED=$seed {files} "
        f"{start_line(processes)} ); done",
        f"for seed in {listed}; do ( . ./command.sh; {audit} ); done",
        f"python {program} finish .",
        f"python {program} check .",
    ]


def make_readme(
    folder: Path, runs: Sequence[Run], submission: Mapping[str, Any], by_hand: str
) -> str:
    """README.md of a folder; by_hand: the text under "What it is"."""
    facts, variables = runs[0].facts, read_command(folder / "command.sh")
    data, runtime = facts["data"], facts["runtime"]
    mean, std = submission["val_bpb"], submission["val_bpb_std"]
    spread = "" if std is None else f" \u00b1 {std:.5f}"
    n = len(runs)
    verified = "verified" if submission["compliance"]["data_verified"] else "NOT verified"
    exports = [f"{name}={value}" for name, value in variables.items()] or ["none: the defaults"]
    loop = instructions(submission["seeds"], runtime["world_size"], folder)[:2]
    lines = [
        f"# {submission['name']}: {mean:.5f}{spread} bpb, n = {n}",
        "",
        HAND_HEADING,
        "",
        by_hand.strip(),
        "",
        NEXT_HEADING,
        "",
        "In this folder, with the variables of `command.sh`:",
        "",
        *(f"    {line}" for line in exports),
        "",
        *(f"    {line}" for line in loop),
        "",
        "## Results",
        "",
        *results_table(submission),
        "",
        "Bits per byte by stage; the last stage is the result, also given in nats per token.",
        "",
        "## Claim",
        "",
        *claim_lines(submission, data["val_tokens"], data["val_bytes"]),
        "",
        "## Budgets and audit",
        "",
        *budget_table(runs),
        "",
        f"Code {facts['code']['bytes']:,} bytes; code and largest artifact "
        f"{submission['bytes_total']:,} of {TOTAL_BYTES:,}.",
        "",
        "## Data and machine",
        "",
        f"{data['val_tokens']:,} targets, {data['val_bytes']:,} bytes of validation text; data "
        f"fingerprint `{data.get('data_fingerprint', 'not recorded')}`, {verified}; tokenizer "
        f"sha256 `{data['tokenizer_sha256']}`.",
        f"{runs[0].hardware}, torch {runtime['torch']}, CUDA {runtime['cuda'] or 'none'}; code "
        f"sha256 `{facts['code']['sha256']}`.",
        "",
        "## Pictures",
        "",
    ]
    for name, caption in PICTURES.items():
        lines += [f"![{caption}]({name})", ""]
    lines.append(GROUPS if facts.get("storage") else "Bytes by group of tensors: not recorded.")
    lines.append("")
    return "\n".join(lines)


def to_json(submission: Mapping[str, Any]) -> bytes:
    """The content of the file submission.json."""
    return (json.dumps(submission, indent=1, ensure_ascii=False) + "\n").encode()


def hand_text(readme: str) -> str:
    """The text under "What it is", which is written by hand."""
    _, found, rest = readme.partition(HAND_HEADING + "\n")
    return rest.partition(NEXT_HEADING + "\n")[0].strip() if found else ""
