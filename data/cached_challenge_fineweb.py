#!/usr/bin/env python3
"""Download the token shards and the tokenizer of a public challenge set.

    python data/cached_challenge_fineweb.py --variant sp1024
    MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf \\
        python data/cached_challenge_fineweb.py --variant sp8192 --train-shards 80

The tool downloads all validation shards, the first --train-shards training shards, the byte sidecar
if there is one, and the tokenizer to datasets/ and tokenizers/ in this folder, where train_gpt.py
looks for them. Each file is checked (size, SHA-256, shard header) before it gets its final name.
After an interruption run the same command again: it keeps complete files, resumes partial ones, and
downloads damaged ones again.

Environment:
    MATCHED_FINEWEB_REPO_ID             dataset repository (willdepueoai/parameter-golf)
    MATCHED_FINEWEB_REMOTE_ROOT_PREFIX  folder of manifest.json in the repository (datasets)
    HF_ENDPOINT, HF_TOKEN               as in other Hugging Face tools
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from codec import file_facts
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.errors import RepositoryNotFoundError as NoRepository
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from report import exit_status
from tqdm import tqdm

from train_gpt import DataError, read_shard

ATTEMPTS, FIRST_WAIT_SECONDS = 4, 1.0
FILES_AT_ONCE, DEFAULT_TRAIN_SHARDS = 8, 80
SHA256_LETTERS = 64
DOCUMENT_FILES = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
AGAIN = "run the same command again; complete and partial files are kept"


@dataclass(frozen=True)
class Source:
    """The remote repository and the folder in it."""

    repo: str
    prefix: str

    @classmethod
    def from_env(cls) -> Source:
        prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
        return cls(os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf"), prefix)

    def url(self, name: str) -> str:
        """The URL of a file; name: relative to the prefix."""
        path = str(PurePosixPath(self.prefix, name))
        return huggingface_hub.hf_hub_url(
            self.repo, path, repo_type="dataset", endpoint=constants.ENDPOINT
        )


@dataclass(frozen=True)
class Item:
    """A file to download. size: None if unknown; etag: its SHA-256 if the server states one."""

    url: str
    path: Path
    size: int | None
    etag: str

    @property
    def part(self) -> Path:
        """The partial file; named after the content, so that two versions never mix."""
        return self.path.with_name(f".{self.path.name}.{self.etag[:16]}.part")

    def fault(self, path: Path) -> str | None:
        """What is wrong with a local copy, or None if it is complete."""
        if not path.is_file():
            return "missing"
        facts = file_facts(path)
        if self.size is not None and facts["bytes"] != self.size:
            return f"{facts['bytes']:,} bytes, expected {self.size:,}"
        if len(self.etag) == SHA256_LETTERS and facts["sha256"] != self.etag:
            return f"sha256 {facts['sha256'][:16]}, expected {self.etag[:16]}"
        if self.path.suffix == ".bin":
            try:
                read_shard(path)
            except DataError as error:
                return str(error)
        return None


class Meter:
    """Stands in for a progress bar in http_get: adds the bytes of one file to the common bar."""

    lock = threading.Lock()

    def __init__(self, bar: tqdm):
        self.bar, self.counted = bar, 0

    def __call__(self, **_: Any) -> Meter:
        return self

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        with self.lock:
            self.bar.update(count)
        self.counted += count

    def settle(self, size: int) -> None:
        """Set the count to the bytes on disk."""
        self.update(size - self.counted)


def http_status(error: Exception) -> int | None:
    """The HTTP status code, or None if the server did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: Exception, source: Source) -> str:
    """A one-line message for an error of the hub or the network."""
    status = http_status(error)
    place = f"{constants.ENDPOINT}/datasets/{source.repo}"
    if isinstance(error, NoRepository):
        return f"{place}: no such dataset, or no access; check MATCHED_FINEWEB_REPO_ID and HF_TOKEN"
    if status == 429:
        return f"{place}: too many requests (429); wait a few minutes and {AGAIN}"
    if status is not None:
        return f"{place}: the server answered {status}; {AGAIN}"
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return f"{place}: {reason}; check the network and {AGAIN}"


def look_up(source: Source, name: str, path: Path) -> Item | None:
    """Ask the server for size and SHA-256 of a file; None if the repository lacks the file.

    Raises: DataError if the request still fails after the hub library's retries.
    """
    url = source.url(name)
    try:
        facts = huggingface_hub.get_hf_file_metadata(url, retry_on_errors=True)
    except (HTTPError, OSError) as error:
        if http_status(error) == 404 and not isinstance(error, NoRepository):
            return None
        raise DataError(explain(error, source)) from error
    return Item(url, path, facts.size, facts.etag or "unknown")


def download(source: Source, item: Item, bar: tqdm) -> None:
    """Download one file: resume the partial file, check it, and rename it.

    Raises: DataError after ATTEMPTS failures; a partial file that can be resumed is kept.
    """
    item.path.parent.mkdir(parents=True, exist_ok=True)
    meter, fault = Meter(bar), ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            fetch_rest(item, meter)
        except (HTTPError, OSError) as error:
            if getattr(error, "errno", None):  # the disk, not the network
                raise
            fault = explain(error, source)
            continue
        damage = item.fault(item.part)
        if damage is None:
            for stale in item.path.parent.glob(f".{item.path.name}.*.part"):
                if stale != item.part:
                    stale.unlink()
            item.part.replace(item.path)
            return
        fault = f"{item.url}: damaged in {attempt + 1} downloads: {damage}"
        item.part.unlink(missing_ok=True)
        meter.settle(0)
    raise DataError(fault)


def fetch_rest(item: Item, meter: Meter) -> None:
    """Download the rest of a partial file. Raises the errors of the network and the disk."""
    have = item.part.stat().st_size if item.part.exists() else 0
    if item.size is not None and have > item.size:
        item.part.unlink()
        have = 0
    meter.settle(have)
    with open(item.part, "ab") as stream:
        http_get(
            item.url,
            stream,
            resume_size=have,
            headers=build_hf_headers(),
            expected_size=item.size,
            tqdm_class=meter,
        )


def in_parallel(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Apply a function to all items, FILES_AT_ONCE at a time; raises one DataError for all."""
    results, faults = [], []
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                try:
                    results.append(future.result())
                except DataError as error:
                    faults.append(str(error))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if faults:
        more = f" ({len(faults) - 1} more files failed)" if len(faults) > 1 else ""
        raise DataError(faults[0] + more)
    return results


# Choosing files ----------------------------------------------------------------------------------


def read_manifest(path: Path, source: Source) -> dict:
    """Read the manifest of a public set. Raises DataError if the file is not one."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        list(manifest["datasets"]), list(manifest["tokenizers"])
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; run without --skip-manifest to download it") from error
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}: not a manifest with datasets and tokenizers (from {source.repo}, "
            f"{source.prefix}); check MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"
        ) from error
    return manifest


def find_entry(entries: Sequence[dict], name: str, where: str) -> dict:
    """The manifest entry of this name. Raises DataError that lists the names that exist."""
    for entry in entries:
        if entry.get("name") == name:
            return entry
    there = ", ".join(sorted(str(entry.get("name")) for entry in entries)) or "nothing"
    raise DataError(
        f"{where}: lacks {name}, contains {there}; choose another --variant, or another repository "
        "with MATCHED_FINEWEB_REPO_ID"
    )


def wanted_files(manifest: dict, args: argparse.Namespace, source: Source) -> list[str]:
    """Names, relative to the prefix, of all files to download."""
    dataset = find_entry(manifest["datasets"], f"fineweb10B_{args.variant}", source.repo)
    try:
        counts = {split: int(dataset["stats"][f"files_{split}"]) for split in ("val", "train")}
        tokenizer_name = dataset["tokenizer_name"]
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{source.repo}: the manifest entry of {dataset['name']} lacks {error}"
        ) from error
    asked = DEFAULT_TRAIN_SHARDS if args.train_shards is None else args.train_shards
    if args.train_shards and asked > counts["train"]:
        raise DataError(
            f"--train-shards {asked}: {dataset['name']} in {source.repo} has {counts['train']} "
            f"training shards; ask for at most {counts['train']}"
        )
    counts["train"] = min(asked, counts["train"])
    names = [
        f"datasets/{dataset['name']}/fineweb_{split}_{number:06d}.bin"
        for split, count in counts.items()
        for number in range(count)
    ]
    tokenizer = find_entry(manifest["tokenizers"], tokenizer_name, source.repo)
    names += [tokenizer[key] for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)]
    return names + list(DOCUMENT_FILES) * args.with_docs


def local_path(root: Path, name: str) -> Path:
    """The local path of a remote file. Raises DataError if it would be outside of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DataError(
            f"manifest: file name {name!r} leaves the folder; do not use this repository"
        )
    return root / path


def sidecar_files(names: Sequence[str], source: Source, root: Path) -> list[str]:
    """Names of the byte sidecars of the validation shards, empty if the repository has none."""
    sidecars = [
        name.replace("fineweb_val_", "fineweb_val_bytes_")
        for name in names
        if "/fineweb_val_" in name
    ]
    there = sidecars and look_up(source, sidecars[0], local_path(root, sidecars[0]))
    return sidecars if there else []


def fetch(args: argparse.Namespace) -> int:
    """Download missing and damaged files; returns 0 when all files are complete."""
    source, root = Source.from_env(), args.data_dir
    quiet = tqdm(disable=True)
    if not args.skip_manifest:
        item = look_up(source, "manifest.json", root / "manifest.json")
        if item is None:
            raise DataError(
                f"{source.url('manifest.json')}: not found; check MATCHED_FINEWEB_REPO_ID and "
                "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"
            )
        if item.fault(item.path):
            download(source, item, quiet)
    manifest = read_manifest(root / "manifest.json", source)
    names = wanted_files(manifest, args, source)
    names += sidecar_files(names, source, root)
    paths = [local_path(root, name) for name in names]
    items = in_parallel(lambda pair: look_up(source, *pair), zip(names, paths, strict=True))
    if missing := [name for name, item in zip(names, items, strict=True) if item is None]:
        raise DataError(
            f"{source.repo}: {len(missing)} of the {len(names)} files that its manifest lists are "
            f"missing, the first is {missing[0]}; choose another repository with "
            "MATCHED_FINEWEB_REPO_ID"
        )
    faults = in_parallel(lambda item: item.fault(item.path), items)
    todo = [item for item, fault in zip(items, faults, strict=True) if fault]
    for item, fault in zip(items, faults, strict=True):
        if fault and fault != "missing":
            print(f"{item.path}: {fault}; downloading it again", file=sys.stderr)
    total = sum(item.size or 0 for item in todo)
    with tqdm(total=total, desc=args.variant, unit="B", unit_scale=True, disable=args.quiet) as bar:
        in_parallel(lambda item: download(source, item, bar), todo)
    print(f"{len(items)} files in {root} are complete, {len(todo)} of them downloaded now")
    print(f"check the set with: python data/verify_dataset.py {paths[0].parent}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cached_challenge_fineweb.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--variant",
        default="sp1024",
        metavar="NAME",
        help="sp1024, sp4096, sp8192, byte260, ...: the set fineweb10B_NAME (default: %(default)s)",
    )
    parser.add_argument(
        "--train-shards",
        type=shard_count,
        metavar="N",
        help="number of training shards of 100 million tokens, 200 MB each (default: "
        f"{DEFAULT_TRAIN_SHARDS}, or all if there are fewer)",
    )
    parser.add_argument(
        "--with-docs",
        action="store_true",
        help="also download docs_selected.jsonl, the source documents",
    )
    parser.add_argument("--skip-manifest", action="store_true", help="use the local manifest.json")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder of datasets/ and tokenizers/, for train_gpt.py's DATA_DIR "
        "(default: the folder of this file)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def shard_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 0 or more")
    return int(text)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    return exit_status(lambda: fetch(args))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(f"interrupted; {AGAIN}")
