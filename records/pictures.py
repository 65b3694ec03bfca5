"""Pictures of a record, drawn from its runs only; the same runs give the same bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt  # noqa: E402
from runs import LIMIT_SECONDS, PARTS, STAGES, Run, source_digest  # noqa: E402

from train_gpt import TOTAL_BYTES  # noqa: E402

SMALL_FRAC = 0.01  # groups with a smaller fraction of the bytes share a row
UP, DOWN, WHOLE, LIMIT = "#c44e52", "#55a868", "#4c72b0", "#222222"


def canvas(title: str, rows: float = 3.6) -> tuple[Any, Any]:
    """A figure and its axes, in the common width and style."""
    figure, axes = plt.subplots(figsize=(8, rows), dpi=110, layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path, runs: Sequence[Run] = ()) -> None:
    """Write a PNG with the digest of its runs, and without the name of the software."""
    figure.savefig(path, metadata={"Software": None, "Source": source_digest(runs)})
    plt.close(figure)


def draw_loss(runs: Sequence[Run], path: Path) -> None:
    """Draw training loss over training time, one line per seed."""
    figure, axes = canvas("training loss")
    for run in runs:
        curve = run.facts.get("curve", [])
        points = curve[5:] or curve  # each of the first five steps is logged, and off the scale
        seconds, losses = ([p[key] for p in points] for key in ("train_seconds", "train_loss"))
        axes.plot(seconds, losses, label=f"seed {run.seed}", linewidth=1.2)
    axes.set(xlabel="seconds of training", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path, runs)


def draw_waterfall(runs: Sequence[Run], path: Path) -> None:
    """Draw bits per byte from the first stage to the result, mean of the seeds."""
    names = [stage for stage in STAGES if all(stage in run.bpb for run in runs)]
    means = [statistics.fmean(run.bpb[name] for run in runs) for name in names]
    figure, axes = canvas(f"bits per byte by stage, mean of {len(runs)}")
    steps = [b - a for a, b in zip(means, means[1:], strict=False)]
    bars = [(0.0, means[0], WHOLE)]
    bars += [(a, b, UP if b > a else DOWN) for a, b in zip(means, means[1:], strict=False)]
    bars += [(0.0, means[-1], WHOLE)]
    texts = [f"{means[0]:.5f}", *(f"{step:+.5f}" for step in steps), f"{means[-1]:.5f}"]
    for place, ((start, stop, colour), text) in enumerate(zip(bars, texts, strict=True)):
        axes.bar(place, stop - start, bottom=start, color=colour, width=0.6)
        axes.text(place, max(start, stop), text, ha="center", va="bottom", fontsize=9)
    room = max(max(means) - min(means), 1e-4)
    axes.set_ylim(min(means) - room, max(means) + 0.3 * room)
    labels = [STAGES[name][1] for name in names]
    axes.set_xticks(range(len(bars)), [*labels, "result"])
    axes.set_ylabel("bits per byte (axis cut)")
    save(figure, path, runs)


def group_bytes(run: Run) -> dict[str, float]:
    """Bytes of the artifact by group of tensors, largest first; small groups are combined.

    Entropies are scaled so that the groups add up to the size of the artifact.
    """
    groups: dict[str, float] = {}
    for entry in run.facts.get("storage") or []:
        name = entry["group"].removeprefix("blocks.*.").removesuffix(".weight")
        groups[name] = groups.get(name, 0) + entry["entropy_bytes"]
    whole, artifact = sum(groups.values()), run.result["artifact_bytes"]
    if not whole:
        return {"artifact": artifact}
    small = [name for name, part in groups.items() if part < SMALL_FRAC * whole]
    if len(small) > 1:
        groups[f"{len(small)} small groups"] = sum(groups.pop(name) for name in small)
    ordered = sorted(groups, key=lambda name: groups[name], reverse=True)
    return {name: groups[name] * artifact / whole for name in ordered}


def draw_bytes(runs: Sequence[Run], path: Path) -> None:
    """Draw bytes of code and of each tensor group, and the limit, for the largest seed."""
    run = max(runs, key=lambda run: run.result["total_bytes"])
    total = run.result["total_bytes"]
    rows = {**group_bytes(run), "code": run.result["code_bytes"], "total": total}
    figure, axes = canvas(f"bytes, seed {run.seed}", 1.2 + 0.32 * len(rows))
    for place, (name, size) in enumerate(rows.items()):
        axes.barh(place, size, color=LIMIT if name == "total" else WHOLE, height=0.65)
        axes.text(size, place, f" {size:,.0f}", va="center", fontsize=9)
    axes.axvline(TOTAL_BYTES, color=UP, linestyle="--", linewidth=1)
    axes.text(TOTAL_BYTES, -0.75, f"limit {TOTAL_BYTES:,} ", color=UP, ha="right", fontsize=9)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -1.2)
    axes.set_xlim(0, 1.12 * max(TOTAL_BYTES, total))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    save(figure, path, runs)


def draw_time(runs: Sequence[Run], path: Path) -> None:
    """Draw the time of each phase, and both limits, for the slowest seed."""
    figure, axes = canvas("seconds by phase, slowest seed")
    for row, (part, names) in enumerate(PARTS.items()):
        run = max(runs, key=lambda run, part=part: run.seconds(part))
        budget, begin = run.facts["budget"], 0.0
        spent = {**budget["phases"], "unbooked": budget.get("unbooked_seconds", 0.0)}
        for name in (*names, "unbooked"):
            if (seconds := spent.get(name, 0.0)) > 0:
                label = f"{name}: {seconds:.1f}"
                axes.barh(row, seconds, left=begin, height=0.5, edgecolor="white", label=label)
                begin += seconds
        limit = budget[part]["limit"] or LIMIT_SECONDS[part]
        axes.plot([limit] * 2, [row - 0.32, row + 0.32], color=UP, linestyle="--")
        axes.text(limit, row - 0.36, f"limit {limit:g}", color=UP, ha="center", fontsize=9)
        axes.text(begin, row + 0.45, f"{begin:.1f}", ha="center", fontsize=9)
    axes.set_yticks(range(len(PARTS)), list(PARTS))
    axes.set_ylim(1.7, -0.7)
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path, runs)


def draw_differences(rows: Mapping[str, Mapping[str, tuple[float, float]]], path: Path) -> None:
    """Draw differences of stages with standard errors; rows: {group: {row: (mean, error)}}."""
    labels = list(dict.fromkeys(name for found in rows.values() for name in found))
    figure, axes = canvas("difference from the first [bpb]", 1.6 + 0.4 * len(labels))
    for number, (group, found) in enumerate(rows.items()):
        places = [labels.index(name) + 0.16 * number for name in found]
        means, errors = zip(*found.values(), strict=True)
        axes.errorbar(means, places, xerr=errors, fmt="o", capsize=3, label=group)
    axes.axvline(0, color=LIMIT, linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)
