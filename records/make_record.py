#!/usr/bin/env python3
"""Make the folder of a record from its runs, without copying figures by hand.

    python records/make_record.py new NAME [--track TRACK] [VARIABLE=VALUE ...]
    python records/make_record.py finish FOLDER --author A --github-id B --blurb TEXT
    python records/make_record.py check FOLDER
    python records/make_record.py index [--check]

`new` makes the folder and prints the commands to run; `finish` reads the runs and writes README.md,
submission.json and the pictures; `check` is the linter (exit status 0: clean, 1: not clean, 2:
could not check); `index` writes records/README.md above its mark, or checks that it is up to date.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import page
from bundle import bundle
from linter import lint
from runs import (
    OWN,
    PLACES,
    RECORD_TRACK,
    RECORDS,
    ROOT,
    TRACKS,
    RecordError,
    Run,
    Submission,
    exit_status,
    find_runs,
    markdown_table,
    read_command,
    read_json,
)

from train_gpt import SMOKE, Config, atomic_write

MARK = "<!-- Above: written by `make_record.py index`. Below: by hand, kept as it is. -->"


# --- new ---


def chosen_variables(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The variables of a record: those of --from, then the given ones. Paths: from the folder.

    Raises: RecordError or ConfigError that lists every problem.
    """
    given = read_command(args.source / "command.sh") if args.source else {}
    given |= {name: str(args.source / given[name]) for name in PLACES if given.get(name)}
    problems = []
    for pair in args.variables:
        name, equals, value = pair.partition("=")
        if not (equals and re.fullmatch("[A-Z][A-Z0-9_]*", name)):
            problems.append(f"{pair}: expected VARIABLE=VALUE")
        given[name] = value
    problems += [f"{name}: the loop over the seeds sets it" for name in sorted(OWN & given.keys())]
    if problems:
        raise RecordError("\n".join(problems))
    cfg = Config.from_env({**given, "WORLD_SIZE": str(args.nproc)}, cuda=True)
    if cfg.warnings:
        raise RecordError("\n".join(cfg.warnings))
    if "DATA_PATH" not in given and cfg.smoke == "1":
        given |= {name: SMOKE[name.lower()] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    elif "DATA_PATH" not in given:
        given.setdefault("DATA_DIR", str(ROOT / "data"))
    for name in PLACES:
        if given.get(name):
            given[name] = os.path.relpath(given[name], folder)
    return given


def new(args: argparse.Namespace) -> int:
    """Make the folder of a record, completely or not at all, and print the commands to run."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", args.name):
        raise RecordError(f"{args.name}: expected a name of letters, digits, - and _")
    folder = RECORDS / args.track / f"{datetime.date.today()}_{args.name}"
    if folder.exists():
        raise RecordError(f"{folder}: already exists; choose another name or remove the folder")
    variables = chosen_variables(args, folder)
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    title, last = f"# {args.name}: what differs from the defaults.", page.start_line(args.nproc)
    files = {
        "command.sh": "\n".join([title, *exports, f"# {last}", ""]).encode(),
        "train_gpt.py": source.encode(),
    }
    if not args.no_bundle:
        try:
            files["train_gpt.py"] = bundle(source, for_record=True)
        except ValueError as error:
            raise RecordError(f"train_gpt.py: {error}") from error
        files["train_gpt_readable.py"] = source.encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as made:
        inside = Path(made) / folder.name
        inside.mkdir()
        for name, content in files.items():
            (inside / name).write_bytes(content)
        inside.rename(folder)
    print(f"{folder}: made, code {len(files['train_gpt.py']):,} bytes. Now:\n")
    steps = page.instructions(args.seeds, args.nproc, folder)
    steps[2] += " --author NAME --github-id ID --blurb 'one sentence'"
    print("\n".join([f"cd {shlex.quote(os.path.relpath(folder))}", *steps]))
    return 0


# --- finish ---


def said_by_hand(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The fields that are written by hand: from the arguments, or from an earlier `finish`."""
    path = folder / "submission.json"
    before = read_json(path) if path.is_file() else {}
    said = {key: getattr(args, key, None) or before.get(key, "") for key in page.BY_HAND}
    if args.predecessor:
        said["comparison_baseline_path"] = os.path.relpath(args.predecessor, folder)
    for key in ("author", "github_id", "blurb"):
        if not said[key]:
            raise RecordError(f"finish: --{key.replace('_', '-')} is missing; add it")
    return said


def draw_pictures(runs: Sequence[Run], folder: Path) -> None:
    """Draw the four pictures of a record."""
    import pictures

    pictures.draw_loss(runs, folder / "loss.png")
    pictures.draw_waterfall(runs, folder / "stages.png")
    pictures.draw_bytes(runs, folder / "bytes.png")
    pictures.draw_time(runs, folder / "time.png")


def finish(args: argparse.Namespace) -> int:
    """Write README.md, submission.json, pictures and copies of the runs to a record's folder."""
    folder = args.folder.resolve()
    runs = find_runs(folder)
    if marked := [f"{run.path}: {reason}" for run in runs for reason in run.marks]:
        raise RecordError("\n".join(f"{line}; it cannot be a record" for line in marked))
    said = said_by_hand(args, folder)
    place = said["comparison_baseline_path"]
    old = Submission.read(folder / place) if place else None
    submission = page.make_submission(folder, runs, said, old)
    readme = folder / "README.md"
    kept = page.hand_text(readme.read_text(encoding="utf-8")) if readme.is_file() else ""
    text = page.make_readme(folder, runs, submission, kept or said["blurb"])
    for run in runs:
        for suffix in (".json", ".txt", ".audit.json"):
            source = run.path.with_suffix(suffix)
            if source.is_file() and source.parent != folder:
                atomic_write(folder / source.name, source.read_bytes())
    draw_pictures(runs, folder)
    atomic_write(folder / "submission.json", page.to_json(submission))
    atomic_write(readme, text.encode())
    verdict = "the claim stands" if submission["claim"] else "no claim"
    print(f"{folder}: {len(runs)} runs, {verdict}: {submission['claim_reason']}")
    return 0


# --- check ---


def check(args: argparse.Namespace) -> int:
    """Print the report of the linter; returns the exit status."""
    report = lint(args.folder)
    print(report.text())
    print(f"{args.folder}: {'clean' if report.clean else 'NOT clean'}")
    return report.status


# --- index ---


def own_submission(folder: Path) -> Submission | None:
    """The submission.json of a folder, else one made of its runs; None without runs."""
    if (folder / "submission.json").is_file():
        return Submission.read(folder)
    if not any(folder.glob("seed*.json")):
        return None
    runs = find_runs(folder, copies=True)
    facts: dict[str, Any] = dict(
        name=folder.name.partition("_")[2],
        hardware=runs[0].hardware,
        cuda_version=runs[0].facts["runtime"]["cuda"],
        bytes_total=max(run.result["total_bytes"] for run in runs),
        seed_results={str(run.seed): page.seed_facts(run) for run in runs},
    )
    return Submission.from_facts(facts)


def index_rows(track: str) -> Iterator[list[str]]:
    """The rows of a track, sorted by hardware and score: our runs and published systems."""
    entries = []
    for folder in sorted((RECORDS / track).glob("*/")):
        if sub := own_submission(folder):
            entries.append((sub, f"{track}/{folder.name}/README.md", "log and JSON in the folder"))
    for path in sorted((RECORDS / "published").glob("*.json")):
        sub = Submission.read(path)
        if sub.track == track:
            place, link = sub.facts.get("folder"), sub.facts.get("link", "")
            note = f"[published]({link})" if link else "published"
            note += ", breaks the rules" * bool(sub.facts.get("invalid_for_records"))
            entries.append((sub, f"{place}/README.md" if place else "", note))
    unknown, rows = "not recorded", []
    for sub, link, note in entries:
        hardware, mean = sub.facts.get("hardware", unknown), sub.bpb.mean
        cells = [f"[{sub.name}]({link})" if link else sub.name]
        cells += [sub.bpb.text() if mean else unknown, str(sub.bpb.n or unknown)]
        sizes = sub.size("bytes_total"), sub.size("val_tokens")
        cells += [f"{size:,}" if size else unknown for size in sizes]
        rows.append((hardware, mean or math.inf, [*cells, hardware, note]))
    yield from (cells for *_, cells in sorted(rows))


INTRODUCTION = """# Records

Scores of this program and scores that others published. Each of our figures has a log and a JSON
in its folder. Scores are mean \u00b1 sample standard deviation of n runs; bytes are code plus
artifact, of the largest run; targets are the scored tokens, which depend on the tokenizer. Scores
are comparable on the same text only.
"""


def make_index() -> str:
    """The generated part of records/README.md."""
    ours = [own_submission(f) for track in TRACKS for f in sorted((RECORDS / track).glob("*/"))]
    lines = [INTRODUCTION]
    if not any(sub and sub.facts.get("cuda_version") for sub in ours):
        lines += ["None of our runs used a GPU yet, so none of our figures is for a GPU.", ""]
    for track in TRACKS:
        head = ["system", "bpb", "n", "bytes", "targets", "hardware", "source"]
        lines += [f"## {track}", "", *markdown_table(head, list(index_rows(track))), ""]
    return "\n".join([*lines, MARK])


def index(args: argparse.Namespace) -> int:
    """Write the top of records/README.md, or with --check compare it with what would be written.

    The text after the mark is written by hand and kept.
    """
    path = RECORDS / "README.md"
    text = path.read_text(encoding="utf-8")
    _, found, by_hand = text.partition(MARK)
    if not found:
        raise RecordError(f"{path}: lacks the line {MARK!r}; add it above the text written by hand")
    again = make_index() + by_hand
    if not args.check:
        atomic_write(path, again.encode())
        return 0
    lines, expected = text.splitlines(), again.splitlines()
    stale = [f"- {line}" for line in lines if line not in expected]
    stale += [f"+ {line}" for line in expected if line not in lines]
    if text != again:
        print("\n".join(stale or ["its lines are in another order"]))
        print(f"{path}: out of date; run python records/make_record.py index")
    return int(text != again)


def seed_list(text: str) -> list[int]:
    """Parse `42,314,999`."""
    return [int(word) for word in text.split(",")]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="new|finish|check|index")
    sub = commands.add_parser("new", help="make the folder of a record")
    sub.set_defaults(job=new)
    sub.add_argument("name", metavar="NAME", help="letters, digits, - and _")
    sub.add_argument("variables", nargs="*", metavar="VARIABLE=VALUE", help="settings of the runs")
    sub.add_argument("--track", choices=TRACKS, default=RECORD_TRACK)
    sub.add_argument(
        "--from", dest="source", type=Path, metavar="FOLDER", help="start from its command.sh"
    )
    sub.add_argument("--nproc", type=int, default=8, help="processes per run (default 8)")
    sub.add_argument("--seeds", type=seed_list, default=[42, 314, 999], metavar="N,N,...")
    sub.add_argument("--no-bundle", action="store_true", help="ship the readable source itself")
    sub = commands.add_parser("finish", help="write README.md, submission.json and pictures")
    sub.set_defaults(job=finish)
    sub.add_argument("folder", type=Path, metavar="FOLDER")
    sub.add_argument("--author", help="who made the record")
    sub.add_argument("--github-id", help="name on GitHub")
    sub.add_argument("--blurb", help="one sentence about what is new")
    sub.add_argument("--predecessor", type=Path, help="folder or JSON of the record to beat")
    sub = commands.add_parser("check", help="run the linter")
    sub.set_defaults(job=check)
    sub.add_argument("folder", type=Path, metavar="FOLDER")
    sub = commands.add_parser("index", help="write the tables of records/README.md")
    sub.set_defaults(job=index)
    sub.add_argument("--check", action="store_true", help="only check that they are up to date")
    args, rest = parser.parse_known_args(argv)
    if args.job is not new or any(word.startswith("-") for word in rest):
        args = parser.parse_args(argv)  # reports the error
    else:
        args.variables += rest  # variables after an option
    return args


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    args = parse(argv)
    return exit_status(lambda: args.job(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
