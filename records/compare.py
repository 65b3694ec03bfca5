#!/usr/bin/env python3
"""Compare runs stage by stage: what changed, by how much, and whether it exceeds the noise.

    python records/compare.py A B ... [--out PICTURE.png]

A, B, ...: folders of records, JSON files of single runs, or submission.json files. Each is compared
with the first: mean difference, its standard error, and p of Welch's one-sided test that the other
is lower. Differences between stages vary far less from run to run than the scores of the stages.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from runs import (
    NOISE,
    STAGES,
    RecordError,
    Run,
    Sample,
    Submission,
    exit_status,
    find_runs,
    markdown_table,
    read_json,
    standard_error,
    welch,
)


def read_stages(path: Path) -> dict[str, list[float]]:
    """{stage: bits per byte of each run at a path}. Raises RecordError if there are no runs."""
    try:
        runs = find_runs(path) if path.is_dir() else [Run.read(path)]
    except RecordError:  # not a run of ours: perhaps the submission.json of another system
        path = path / "submission.json" if path.is_dir() else path
        if not path.is_file() or "seed_results" not in read_json(path):
            raise
        return dict(Submission.read(path).stages)
    return {name: [run.bpb[name] for run in runs if name in run.bpb] for name in STAGES}


def measures(stages: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The scores of the stages, and of each stage minus the one before, per run."""
    known = [name for name in STAGES if stages.get(name)]
    found = {STAGES[name][1]: list(stages[name]) for name in known}
    for before, after in itertools.pairwise(known):
        if len(stages[before]) == len(stages[after]):
            pairs = zip(stages[before], stages[after], strict=True)
            found[f"{STAGES[after][1]} - {STAGES[before][1]}"] = [b - a for a, b in pairs]
    return found


Row = tuple[str, Sample, Sample, float, float | None, float | None]


def compare(
    first: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]
) -> list[Row]:
    """(measure, first, other, difference, its standard error, p) of each measure in both."""
    rows = []
    for name in (name for name in first if name in other):
        old, new = Sample.of(first[name]), Sample.of(other[name])
        test = welch(new, old)
        p = test[1] if test else None
        rows.append((name, old, new, new.mean - old.mean, standard_error(new, old), p))
    return rows


def table(label: str, base: str, rows: Sequence[Row]) -> str:
    """The rows as a Markdown table under a heading."""
    cells = [
        (
            name,
            f"{old.n}, {new.n}",
            f"{difference:+.5f}",
            "-" if error is None else f"{error:.5f}",
            "-" if p is None else f"{p:.2g}",
        )
        for name, old, new, difference, error, p in rows
    ]
    head = ("bits per byte", "n", "difference", "standard error", "p")
    lines = [f"{label} minus {base}", "", *markdown_table(head, cells)]
    if any(min(old.n, new.n) < 2 for _, old, new, *_ in rows):
        lines += ["", f"One side has a single run: {NOISE}."]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Print the tables and draw the picture."""
    base, *others = [measures(read_stages(path)) for path in args.paths]
    drawn = {}
    for path, other in zip(args.paths[1:], others, strict=True):
        rows = compare(base, other)
        if not rows:
            raise RecordError(f"{path}: no stage in common with {args.paths[0]}")
        print(table(str(path), str(args.paths[0]), rows), end="\n\n")
        drawn[path.name] = {name: (delta, error or 0.0) for name, _, _, delta, error, _ in rows}
    if args.out:
        from pictures import draw_differences

        draw_differences(drawn, args.out)
    return 0


def main(argv: Sequence[str]) -> int:
    """Run with these arguments; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="A B", help="folders or JSON files")
    parser.add_argument("--out", type=Path, metavar="PNG", help="also draw the differences")
    args = parser.parse_args(argv)
    if len(args.paths) < 2:
        parser.error("expected at least two folders or JSON files")
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
