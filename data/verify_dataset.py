#!/usr/bin/env python3
"""Verify a folder of token shards before trusting a score on it.

    python data/verify_dataset.py data/datasets/fineweb10B_sp8192
    python data/verify_dataset.py data/sample
    python data/verify_dataset.py DIR --held-out canonical/manifest.json

Prints a table; exit status 0 if the set is clean, 1 if a check failed, 2 if the set could not be
checked. For a clean set the tool writes DIR/verified.json, with the fingerprint by which
train_gpt.py recognises the set (data_verified).

Checks: headers and sizes; the SHA-256 of each file against the manifest; token ids; one BOS before
each document and no other control ids; that the tokenizer made these shards (decoded documents are
encoded again); that the byte count of each validation document is the length of its text; that no
validation document is in the training shards, up to case and white space; and the counts of
published sets.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from codec import MANIFEST_FORMAT, Codec, cores, file_facts, map_in_order, normalize
from report import Report, Row, exit_status
from tqdm import tqdm

from train_gpt import (
    BOS,
    BYTE_OFFSET,
    ArtifactError,
    DataError,
    atomic_write,
    find_shards,
    read_shard,
    set_fingerprint,
)

PROOF_FORMAT = 1
SPAN_TOKENS = 1 << 19  # tokens that a worker scans at a time; limits its memory
ENCODED_AGAIN, ENCODED_ALIKE = 500, 0.98  # documents; a wrong tokenizer agrees on none of them
CHALLENGE_DOCUMENTS = 50_000
WINDOW_TOKENS = 2048  # published counts cover whole windows of this length


@dataclass(frozen=True)
class Published:
    """Validation counts of a published set: scored targets and, if known, bytes."""

    name: str
    vocab_size: int
    transform: str
    targets: int
    bytes: int | None = None


PUBLISHED = (
    Published("fineweb10B_sp1024 (willdepueoai/parameter-golf)", 1024, "none", 62_021_632),
    Published("fineweb10B_sp8192 (kevclark/parameter-golf)", 8192, "none", 40_540_160),
    Published(
        "CaseOps sp8192 (romeerp/parameter-golf-caseops-v1)",
        8192,
        "caseops",
        47_851_520,
        151_074_499,
    ),
)


@dataclass(frozen=True)
class TokenSet:
    """The files of a set. manifest: empty if there is no manifest.json."""

    folder: Path
    val: list[Path]
    train: list[Path]
    sidecars: list[Path]
    tokenizer: Path
    manifest: Mapping
    transform: str
    fuse: bool

    @classmethod
    def find(cls, folder: Path, tokenizer: Path | None) -> TokenSet:
        """Raises: DataError if the folder, its shards or its tokenizer do not exist."""
        manifest = {}
        if (folder / "manifest.json").exists():
            manifest = read_manifest(folder / "manifest.json")
        sidecars = sorted(folder.glob("fineweb_val_bytes_*.bin"))
        transform = manifest.get("transform", "caseops" if sidecars else "none")
        return cls(
            folder,
            find_shards(folder, "val"),
            find_shards(folder, "train"),
            sidecars,
            tokenizer or find_tokenizer(folder),
            manifest,
            transform,
            bool(manifest.get("fused_pairs")),
        )

    @property
    def all_shards(self) -> list[Path]:
        return [*self.val, *self.train, *self.sidecars]

    def codec(self) -> Codec:
        return Codec(self.tokenizer, transform=self.transform, fuse=self.fuse)


def read_manifest(path: Path) -> dict:
    """Read a manifest of build_dataset.py. Raises DataError if the file is not one."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if (
            manifest["format"] == MANIFEST_FORMAT
            and manifest["files"]
            and manifest["validation_hashes"]
        ):
            return manifest
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}: not a manifest of build_dataset.py ({type(error).__name__}: {error})"
        ) from error
    raise DataError(
        f"{path}: found manifest format {manifest['format']}, expected {MANIFEST_FORMAT}; "
        "build the set again"
    )


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer in the folder, or in its place in the public layout.

    Raises: DataError if neither exists.
    """
    variant = folder.resolve().name.rpartition("_")[2]
    public = folder.resolve().parent.parent / "tokenizers"
    places = [
        folder / "tokenizer.model",
        folder / "tokenizer.json",
        public / "fineweb_pure_byte_260.json"
        if variant == "byte260"
        else public / f"fineweb_{variant.removeprefix('sp')}_bpe.model",
    ]
    for place in places:
        if place.exists():
            return place
    raise DataError(
        f"{folder}: no tokenizer at {', '.join(map(str, places))}; give its path with --tokenizer"
    )


# Validation --------------------------------------------------------------------------------------


def check_files(report: Report, found: TokenSet, bar: tqdm) -> None:
    """Compare each file with the manifest, if there is one."""
    promised = found.manifest.get("files")
    if promised is None:
        report.add("manifest", None, "none", "optional: counts and SHA-256 are not compared")
        return
    present = {path.name: path for path in found.all_shards}
    present[found.manifest["tokenizer"]["file"]] = found.tokenizer
    wrong = [f"{name} missing" for name in promised if name not in present]
    wrong += [f"{name} unknown" for name in present if name not in promised]
    for name in set(present) & set(promised):
        facts = file_facts(present[name])
        bar.update(facts["bytes"])
        if facts != promised[name]:
            wrong.append(f"{name}: {facts['bytes']:,} bytes, sha256 {facts['sha256'][:12]}")
    report.add(
        "manifest", not wrong, some(wrong) or f"{len(present)} files", "the SHA-256 of each file"
    )


def check_headers(report: Report, found: TokenSet) -> bool:
    """Check header and size of every shard; False if a shard cannot be read."""
    wrong, tokens = [], 0
    for path in found.all_shards:
        try:
            tokens += len(read_shard(path))
        except DataError as error:
            wrong.append(str(error))
    report.add(
        "headers and sizes",
        not wrong,
        some(wrong) or f"{len(found.all_shards)} shards, {tokens:,} tokens",
        "header, count and size agree",
    )
    return not wrong


def check_validation(report: Report, found: TokenSet, codec: Codec) -> dict[bytes, bytes]:
    """Check structure, text, byte counts and number of the validation documents.

    Returns: {fingerprint: digest of the exact text} of the documents.
    """
    tokens = np.concatenate([read_shard(path) for path in found.val])
    largest, size = int(tokens.max()), codec.vocab_size
    report.add("validation ids", largest < size, f"0 to {largest:,}", f"below {size:,}")
    if largest >= size:
        return {}
    starts = np.flatnonzero(tokens == BOS)
    odd = int((tokens < BYTE_OFFSET).sum()) - len(starts)
    report.rows.append(structure("validation", tokens[0] == BOS, odd, len(starts)))
    charged = charged_bytes(report, found, codec, tokens)
    documents = np.split(tokens, starts)[1:]
    known, alike, unequal = {}, 0, []
    for number, (document, paid) in enumerate(
        zip(documents, np.add.reduceat(charged, starts) if len(starts) else [], strict=True)
    ):
        try:
            text = codec.decode(document)
        except ValueError as error:
            unequal.append(f"document {number}: {error}")
            continue
        if len(text.encode()) != paid:
            unequal.append(
                f"document {number}: {paid:,} counted, {len(text.encode()):,} in its text"
            )
        if number < ENCODED_AGAIN:
            again = codec.encode(codec.prepare(text, normalize(text)))
            alike += np.array_equal(again, document)
        name = codec.fingerprints(document, np.array([0]))[0]
        if name is not None:
            known[name] = text_digest(text)
    compared = min(len(documents), ENCODED_AGAIN)
    report.add(
        "tokenizer",
        alike >= ENCODED_ALIKE * compared,
        f"{alike} of {compared} documents encode to their tokens",
        f"at least {ENCODED_ALIKE:.0%}",
    )
    counts = dict(documents=len(documents), tokens=len(tokens), bytes=int(charged.sum()))
    published = check_counts(report, found, codec, counts, scored_bytes(charged))
    total = f"{counts['bytes']:,} for {len(documents):,} documents"
    # The published sidecar counts the source text, but its tokens hold the normalised text.
    verdict = True if not unequal else None if published else False
    report.add("bytes", verdict, some(unequal) or total, "the UTF-8 length of each document's text")
    if found.manifest:
        hashes = sorted(name.hex() for name in known)
        same = hashes == found.manifest["validation_hashes"]
        report.add("validation hashes", same, f"{len(hashes):,}", "those in the manifest")
    return known


def structure(split: str, opens: bool, odd: int, documents: int) -> Row:
    """The row on control ids. opens: whether BOS is first; odd: number of other control ids."""
    first = "BOS first" if opens else "BOS not first"
    return Row(
        f"{split} structure",
        bool(opens) and not odd and documents > 0,
        f"{first}, {odd:,} other control ids, {documents:,} documents",
        "BOS first, 0 other control ids",
    )


def charged_bytes(report: Report, found: TokenSet, codec: Codec, tokens: np.ndarray) -> np.ndarray:
    """(n,) byte counts that scoring uses: of the sidecar if the set needs one, else of the table.

    Unlike in scoring, the first token is included.
    """
    own = codec.charge(np.concatenate([np.array([BOS], tokens.dtype), tokens])).astype(np.int32)
    if codec.marks is None:
        return own
    parts = [read_shard(path) for path in found.sidecars]
    count = sum(map(len, parts))
    report.add(
        "byte sidecar", count == len(tokens), f"{count:,} values", f"one per token: {len(tokens):,}"
    )
    return np.concatenate(parts).astype(np.int32) if count == len(tokens) else own


def scored_bytes(charged: np.ndarray) -> tuple[int, int]:
    """(targets, bytes) in whole windows of WINDOW_TOKENS, as in published scores."""
    targets = (len(charged) - 1) // WINDOW_TOKENS * WINDOW_TOKENS
    return targets, int(charged[1 : targets + 1].sum())


def check_counts(
    report: Report,
    found: TokenSet,
    codec: Codec,
    counts: Mapping[str, int],
    scored: tuple[int, int],
) -> bool:
    """Compare with the manifest, the challenge and published sets; True if a published set."""
    if found.manifest:
        promised = {key: found.manifest["validation"][key] for key in counts}
        report.add("validation counts", counts == promised, describe(counts), describe(promised))
    documents = counts["documents"]
    report.add(
        "validation documents",
        True if documents == CHALLENGE_DOCUMENTS else None,
        f"{documents:,}",
        f"{CHALLENGE_DOCUMENTS:,} in the challenge",
    )
    transform = found.transform + "+fused" * found.fuse
    seen, expected, verdict = recognise(codec.vocab_size, transform, documents, *scored)
    # A manifest states what the set is, so that a likeness to a published set is only a remark.
    report.add("published set", verdict or (None if found.manifest else verdict), seen, expected)
    return verdict is True


def recognise(
    vocab_size: int, transform: str, documents: int, targets: int, scored_bytes: int
) -> tuple[str, str, bool | None]:
    """(found, expected, verdict) of the comparison with published sets.

    targets and scored_bytes count whole windows of WINDOW_TOKENS. A set resembles a published one
    if it has the same vocabulary size and transform, and the challenge's number of documents, or
    10,000 (a common mistake), or nearly as many targets.
    """
    for known in PUBLISHED:
        if (known.vocab_size, known.transform) != (vocab_size, transform):
            continue
        counts = f"{documents:,} documents, {targets:,} targets, {scored_bytes:,} bytes"
        expected = f"{known.name}: {CHALLENGE_DOCUMENTS:,} documents, {known.targets:,} targets" + (
            f", {known.bytes:,} bytes" if known.bytes else ""
        )
        same = (documents, targets, scored_bytes) == (
            CHALLENGE_DOCUMENTS,
            known.targets,
            known.bytes or scored_bytes,
        )
        if same:
            return counts, expected, True
        if documents in (CHALLENGE_DOCUMENTS, 10_000) or abs(targets / known.targets - 1) < 0.02:
            return f"resembles a published set but differs: {counts}", expected, False
    return "none", "scores are comparable on this set only", None


# Training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """The result of scanning one span of a training shard."""

    path: Path
    start: int
    tokens: int
    documents: int
    odd: int  # control ids other than BOS
    largest: int  # token id
    head: np.ndarray  # tokens before the first BOS
    tail: np.ndarray | None  # tokens from the last BOS on; None without BOS
    hits: list[tuple[str, str, bool]]  # (place, text, exact) of held-out documents


class Scanner:
    """Searches token spans for held-out documents; the state of a worker process."""

    codec: Codec
    held_out: Mapping[bytes, bytes | None]

    @classmethod
    def start(cls, make: functools.partial, held_out: Mapping[bytes, bytes | None]) -> None:
        cls.codec, cls.held_out = make(), held_out

    @classmethod
    def look(
        cls, tokens: np.ndarray, starts: np.ndarray, place: Callable[[int], str]
    ) -> list[tuple[str, str, bool]]:
        """Held-out documents among those that begin at `starts`; the first of them is 0.

        place(start) names the location of a document.
        """
        hits, bounds = [], [*starts.tolist(), len(tokens)]
        for number, name in enumerate(cls.codec.fingerprints(tokens, starts)):
            if name in cls.held_out:
                start, stop = bounds[number : number + 2]
                text = ""
                with contextlib.suppress(ValueError):  # an undecodable text is not an exact copy
                    text = cls.codec.decode(tokens[start:stop])
                exact = text_digest(text) == cls.held_out[name]
                hits.append((place(start), text[:50], exact))
        return hits

    @classmethod
    def scan(cls, span: tuple[Path, int]) -> Scan:
        path, start = span
        tokens = np.array(read_shard(path)[start : start + SPAN_TOKENS])
        largest, nothing = int(tokens.max()), tokens[:0]
        if largest >= cls.codec.vocab_size:
            return Scan(path, start, len(tokens), 0, 0, largest, nothing, nothing, [])
        starts = np.flatnonzero(tokens == BOS)
        odd = int((tokens < BYTE_OFFSET).sum()) - len(starts)
        head, tail, hits = tokens, None, []
        if len(starts):
            first, last = starts[0], starts[-1]
            head, tail = tokens[:first].copy(), tokens[last:].copy()
            hits = cls.look(
                tokens[first:last],
                starts[:-1] - first,
                lambda at: f"{path.name} token {start + first + at:,}",
            )
        return Scan(path, start, len(tokens), len(starts), odd, largest, head, tail, hits)


def check_training(
    report: Report, found: TokenSet, held_out: Mapping[bytes, bytes | None], workers: int, bar: tqdm
) -> None:
    """Scan the training shards: token ids, structure, and absence of held-out documents."""
    make = functools.partial(Codec, found.tokenizer, transform=found.transform, fuse=found.fuse)
    Scanner.start(make, held_out)  # for documents that cross the edge of a span
    spans = (
        (path, start)
        for path in found.train
        for start in range(0, len(read_shard(path)), SPAN_TOKENS)
    )
    documents = tokens = odd = largest = 0
    hits: list[tuple[str, str, bool]] = []
    pieces, place = [], ""  # parts and location of the open document; "" before the first
    opens = False

    def close() -> None:
        if place:
            document = np.concatenate(pieces)
            hits.extend(Scanner.look(document, np.array([0]), lambda _: place))

    setup = dict(start=Scanner.start, setup=(make, held_out))
    for scan in map_in_order(Scanner.scan, spans, workers=workers, **setup):
        if scan.start == 0 and scan.path == found.train[0]:
            opens = scan.tail is not None and not len(scan.head)
        pieces.append(scan.head)
        if scan.tail is not None:
            close()
            at = scan.start + scan.tokens - len(scan.tail)
            pieces, place = [scan.tail], f"{scan.path.name} token {at:,}"
        hits += scan.hits
        documents, tokens = documents + scan.documents, tokens + scan.tokens
        odd, largest = odd + scan.odd, max(largest, scan.largest)
        bar.update(2 * scan.tokens)
    close()
    size = Scanner.codec.vocab_size
    report.add("training ids", largest < size, f"0 to {largest:,}", f"below {size:,}")
    report.rows.append(structure("training", opens, odd, documents))
    if found.manifest:
        counts, promised = dict(documents=documents, tokens=tokens), found.manifest["train"]
        promised = {key: promised[key] for key in counts}
        report.add("training counts", counts == promised, describe(counts), describe(promised))
    exact = sum(hit[2] for hit in hits)
    note = "none"
    if hits:
        places = some([f"{where}: {text!r}" for where, text, _ in hits])
        note = f"{exact:,} exact, {len(hits) - exact:,} with other case or white space; {places}"
    report.add("held-out documents in training", not hits, note, f"none of {len(held_out):,}")


# Main --------------------------------------------------------------------------------------------


def some(items: Sequence[str], limit: int = 3) -> str:
    """The first items of a list, and the number of others."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more


def describe(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} {key}" for key, value in counts.items())


def text_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def verify(args: argparse.Namespace) -> int:
    """Run every check, print the table, write or remove verified.json; returns the exit status."""
    found = TokenSet.find(args.folder, args.tokenizer)
    others = [read_manifest(path) for path in args.held_out]
    codec, report = found.codec(), Report()
    proof = args.folder / "verified.json"
    proof.unlink(missing_ok=True)
    work = sum(path.stat().st_size for path in [*found.all_shards, found.tokenizer])
    work = (work if found.manifest else 0) + sum(path.stat().st_size for path in found.train)
    with tqdm(total=work, desc="verifying", unit="B", unit_scale=True, disable=args.quiet) as bar:
        check_files(report, found, bar)
        if check_headers(report, found):
            known: dict[bytes, bytes | None] = {
                bytes.fromhex(name): None for other in others for name in other["validation_hashes"]
            }
            known |= check_validation(report, found, codec)
            check_training(report, found, known, args.workers, bar)
    print(report.text())
    if not report.clean:
        print(f"{args.folder}: NOT clean; do not trust scores on this set", flush=True)
        return report.status
    fingerprint = set_fingerprint(found.all_shards, found.tokenizer)
    facts = dict(
        format=PROOF_FORMAT,
        fingerprint=fingerprint,
        # For a machine without training shards, which only scores.
        validation_fingerprint=set_fingerprint([*found.val, *found.sidecars], found.tokenizer),
        checks=[dict(check=r.check, found=r.found, expected=r.expected) for r in report.rows],
    )
    text = json.dumps(facts, indent=1) + "\n"
    try:
        atomic_write(proof, text.encode())
    except ArtifactError as error:
        raise DataError(
            f"{proof}: the set is clean, but this file cannot be written; copy the set to a "
            "writable folder"
        ) from error
    print(f"{args.folder}: clean, fingerprint {fingerprint}; wrote {proof}")
    return report.status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verify_dataset.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder of fineweb_{train,val}_*.bin"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer of the set (default: tokenizer.model or "
        "tokenizer.json in DIR, or DIR/../../tokenizers/fineweb_N_bpe.model)",
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        action="append",
        default=[],
        metavar="MANIFEST",
        help="manifest.json of another set, whose validation documents must not be in these "
        "training shards either; may be repeated",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=cores(),
        choices=range(1, 1025),
        metavar="N",
        help="number of processes (default: all cores, %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    return exit_status(lambda: verify(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
