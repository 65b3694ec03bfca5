#!/usr/bin/env python3
"""Build a tokenizer and token shards for train_gpt.py from documents.

    python data/build_dataset.py docs.jsonl.zst --out data/datasets/mine --vocab-size 8192
    python data/build_dataset.py a.parquet b.parquet --out DIR --model tokenizer.model
    python data/build_dataset.py docs.jsonl --out DIR --byte260

Documents are read in the given order. The first --val-docs documents are validation, the others
training, except those that equal a validation document up to case and white space. A document is
stored as BOS and its pieces, without EOS. The tool writes fineweb_{train,val}_NNNNNN.bin, the
tokenizer and manifest.json to the folder; set DATA_PATH to the folder and TOKENIZER_PATH to the
tokenizer. The same documents and options give the same bytes, with any number of workers. Files get
their final names only when all of them are complete.
"""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import json
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import caseops
import numpy as np
import sentencepiece
from codec import (
    EOS,
    MANIFEST_FORMAT,
    NORMALIZER,
    PAD,
    UNK,
    Codec,
    byte_tokenizer,
    cores,
    file_facts,
    fingerprint,
    map_in_order,
    normalize,
)
from report import exit_status
from tqdm import tqdm

from train_gpt import BOS, SHARD_HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION, DataError

BATCH_BYTES, PARQUET_ROWS = 1 << 20, 128
CHUNK_LETTERS = 1000  # SentencePiece skips training sentences longer than 4,192 bytes
TRAINER = dict(
    NORMALIZER,
    model_type="bpe",
    character_coverage=0.999,
    byte_fallback=True,
    split_digits=True,
    hard_vocab_limit=False,
    pad_id=PAD,
    bos_id=BOS,
    eos_id=EOS,
    unk_id=UNK,
)


# Reading documents -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of one file, as JSON lines or as texts."""

    path: Path
    first: int  # number of the first line or row
    items: list[bytes | str]
    read: int  # bytes of the file that were read for this batch


def open_lines(path: Path, raw: io.BufferedReader) -> Iterable[bytes]:
    """The lines of a JSONL file, decompressed according to its suffix; DataError if unknown."""
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(
            zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(
                raw, read_across_frames=True, closefd=False
            )
        )
    openers = {".jsonl": lambda stream: stream, ".gz": gzip.open, ".xz": lzma.open}
    if path.suffix not in openers:
        raise DataError(f"{path}: expected .jsonl, .jsonl.zst, .jsonl.gz, .jsonl.xz or .parquet")
    return openers[path.suffix](raw)


def read_lines(path: Path) -> Iterator[Batch]:
    """Batches of JSON lines, each of about BATCH_BYTES."""
    with open(path, "rb") as raw:
        items, size, first, start = [], 0, 1, 0
        for line in open_lines(path, raw):
            items.append(line)
            size += len(line)
            if size >= BATCH_BYTES:
                yield Batch(path, first, items, raw.tell() - start)
                items, size, first, start = [], 0, first + len(items), raw.tell()
        yield Batch(path, first, items, raw.tell() - start)


def read_parquet(path: Path, field: str) -> Iterator[Batch]:
    """Batches of the texts in one column of a Parquet file."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        if field not in table.schema_arrow.names:
            raise DataError(
                f"{path}: found columns {', '.join(table.schema_arrow.names)}, expected {field}; "
                "choose the column with --field"
            )
        first, row_bytes = 1, path.stat().st_size / max(table.metadata.num_rows, 1)
        for part in table.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
            yield Batch(path, first, part.column(0).to_pylist(), round(len(part) * row_bytes))
            first += len(part)


def read_batches(paths: Sequence[Path], field: str) -> Iterator[Batch]:
    """All documents in order. Raises DataError if a file cannot be read to its end."""
    import pyarrow
    import zstandard

    damage = (
        EOFError,
        lzma.LZMAError,
        zlib.error,
        gzip.BadGzipFile,
        zstandard.ZstdError,
        pyarrow.ArrowException,
    )
    for path in paths:
        try:
            yield from read_parquet(path, field) if path.suffix == ".parquet" else read_lines(path)
        except damage as error:
            raise DataError(f"{path}: damaged or truncated ({error}); download it again") from error


def texts(batch: Batch, field: str) -> Iterator[tuple[str, str]]:
    """(text, normalized text) of each document in a batch, without the empty ones.

    Raises: DataError that names file and line if an item is not a document.
    """
    for number, item in enumerate(batch.items, batch.first):
        if isinstance(item, bytes) and not item.strip():
            continue
        text = item
        try:
            if isinstance(item, bytes):
                text = json.loads(item)[field]
            text.encode()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            shown = item[:60] if isinstance(item, (bytes, str)) else item
            raise DataError(
                f"{batch.path}:{number}: expected an object with a string under {field!r}, "
                f"found {shown!r} ({type(error).__name__}: {error})"
            ) from error
        if normalized := normalize(text):
            yield text, normalized


# Tokenizer ---------------------------------------------------------------------------------------


def training_text(args: argparse.Namespace, bar: tqdm) -> Iterator[str]:
    """Chunks of the first training documents, about --tokenizer-bytes in total."""
    documents = (
        text
        for batch in read_batches(args.documents, args.field)
        for _, text in texts(batch, args.field)
    )
    size = 0
    for text in itertools.islice(documents, args.val_docs, None):
        text = caseops.encode(text) if args.transform == "caseops" else text
        start = 0
        while start < len(text):
            stop = text.find(" ", start + CHUNK_LETTERS)
            stop = start + CHUNK_LETTERS if stop > start + 2 * CHUNK_LETTERS else stop
            stop = len(text) if stop < 0 else stop
            yield text[start:stop]
            start = stop
        size += len(text.encode())
        bar.update(len(text.encode()))
        if size >= args.tokenizer_bytes:
            return


def train_tokenizer(args: argparse.Namespace) -> bytes:
    """Train a SentencePiece model with the options of the public challenge on training documents.

    Raises: DataError if there are too few documents for the vocabulary.
    """
    model, faults = io.BytesIO(), []

    def sentences(bar: tqdm) -> Iterator[str]:
        try:
            yield from training_text(args, bar)
        except DataError as error:  # the trainer would replace it by its own error
            faults.append(error)
            raise

    symbols = list(caseops.MARKS) if args.transform == "caseops" else []
    with tqdm(desc="tokenizer text", unit="B", unit_scale=True, disable=args.quiet) as bar:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences(bar),
                model_writer=model,
                minloglevel=2,
                vocab_size=args.vocab_size,
                user_defined_symbols=symbols,
                **TRAINER,
            )
            size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
            found = f"{size:,} pieces"
        except RuntimeError as error:
            if faults:
                raise faults[0] from error
            size, found = None, str(error).rpartition("] ")[2]
    if size != args.vocab_size:
        raise DataError(
            f"--vocab-size={args.vocab_size:,}: the training documents do not give a tokenizer of "
            f"this size (found: {found}); add documents or choose another --vocab-size"
        )
    return model.getvalue()


def make_tokenizer(args: argparse.Namespace, folder: Path) -> tuple[Path, dict]:
    """Write the tokenizer to a folder; returns its path and its entry for the manifest."""
    if args.byte260:
        path, blob, facts = folder / "tokenizer.json", byte_tokenizer(), dict(kind="byte260")
    elif args.model:
        # Reject an unsuitable model here, so that the error names the user's file.
        Codec(args.model, transform=args.transform, fuse=args.fuse_markers)
        path, blob, facts = folder / "tokenizer.model", args.model.read_bytes(), dict(kind="given")
    else:
        path, blob = folder / "tokenizer.model", train_tokenizer(args)
        facts = dict(
            kind="trained",
            sentencepiece=sentencepiece.__version__,
            tokenizer_bytes=args.tokenizer_bytes,
        )
    path.write_bytes(blob)
    return path, facts


# Encoding ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Encoded documents, in order."""

    tokens: np.ndarray  # uint16, of all documents, concatenated
    lengths: np.ndarray  # tokens per document
    charged: np.ndarray  # byte count per document
    prints: list[bytes]  # fingerprint per document
    skipped: int  # documents without text
    read: int  # bytes of the source file

    def select(self, keep: np.ndarray) -> Encoded:
        """The documents for which `keep`, (documents,) bool, is true."""
        return Encoded(
            self.tokens[np.repeat(keep, self.lengths)],
            self.lengths[keep],
            self.charged[keep],
            [name for name, kept in zip(self.prints, keep, strict=True) if kept],
            0,
            0,
        )


def encode_batch(codec: Codec, batch: Batch, field: str) -> Encoded:
    """Encode a batch of documents."""
    parts, prints = [], []
    for text, normalized in texts(batch, field):
        parts.append(codec.encode(codec.prepare(text, normalized)))
        prints.append(fingerprint(normalized))
    tokens = np.concatenate([np.empty(0, np.uint16), *parts])
    lengths = np.array([len(part) for part in parts], np.int64)
    charge = codec.charge(np.concatenate([np.array([BOS], np.uint16), tokens])).astype(np.int64)
    charged = np.add.reduceat(charge, np.cumsum(lengths) - lengths) if parts else lengths
    found = sum(1 for item in batch.items if isinstance(item, str) or item.strip())
    return Encoded(tokens, lengths, charged, prints, found - len(parts), batch.read)


class Worker:
    """The state of a worker process."""

    codec: Codec
    field: str

    @classmethod
    def start(cls, path: Path, transform: str, fuse: bool, field: str) -> None:
        cls.codec, cls.field = Codec(path, transform=transform, fuse=fuse), field

    @classmethod
    def encode(cls, batch: Batch) -> Encoded:
        return encode_batch(cls.codec, batch, cls.field)


def encode_all(args: argparse.Namespace, tokenizer: Path) -> Iterator[Encoded]:
    """Encode all documents on all workers, in order."""
    return map_in_order(
        Worker.encode,
        read_batches(args.documents, args.field),
        workers=args.workers,
        start=Worker.start,
        setup=(tokenizer, args.transform, args.fuse_markers, args.field),
    )


# Writing shards ----------------------------------------------------------------------------------


class ShardWriter:
    """Writes uint16 values as shards STEM_NNNNNN.bin of a fixed length; the last may be shorter."""

    def __init__(self, folder: Path, stem: str, shard_tokens: int):
        self.folder, self.stem = folder, stem
        self.buffer, self.used, self.shards = np.empty(shard_tokens, "<u2"), 0, 0

    def add(self, values: np.ndarray) -> None:
        while len(values):
            room = min(len(self.buffer) - self.used, len(values))
            self.buffer[self.used : self.used + room] = values[:room]
            self.used, values = self.used + room, values[room:]
            if self.used == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Write the buffer as the next shard, unless it is empty."""
        if self.used:
            header = np.zeros(SHARD_HEADER_BYTES // 4, "<i4")
            header[:3] = SHARD_MAGIC, SHARD_VERSION, self.used
            with open(self.folder / f"{self.stem}_{self.shards:06d}.bin", "wb") as stream:
                stream.write(header)
                stream.write(self.buffer[: self.used])
            self.used, self.shards = 0, self.shards + 1


class Split:
    """Shards and totals of one split; validation gets a byte sidecar if the codec has marks."""

    def __init__(self, name: str, folder: Path, codec: Codec, shard_tokens: int):
        self.documents = self.tokens = self.bytes = 0
        self.writer = ShardWriter(folder, f"fineweb_{name}", shard_tokens)
        self.sidecar, self.codec = None, codec
        if codec.marks and name == "val":
            self.sidecar = ShardWriter(folder, f"fineweb_{name}_bytes", shard_tokens)

    def add(self, part: Encoded) -> None:
        self.documents += len(part.lengths)
        self.tokens += len(part.tokens)
        self.bytes += int(part.charged.sum())
        self.writer.add(part.tokens)
        if self.sidecar:
            self.sidecar.add(self.codec.charge(np.concatenate([[BOS], part.tokens])))

    def finish(self) -> dict[str, int]:
        """Write the last shard; returns the totals for the manifest."""
        self.writer.flush()
        if self.sidecar:
            self.sidecar.flush()
        return dict(documents=self.documents, tokens=self.tokens, bytes=self.bytes)


def write_shards(args: argparse.Namespace, folder: Path, tokenizer: Path) -> dict:
    """Encode all documents into a folder; returns counts and validation hashes for the manifest.

    Raises: DataError unless there are more than --val-docs documents.
    """
    codec = Codec(tokenizer, transform=args.transform, fuse=args.fuse_markers)
    val, train = (Split(name, folder, codec, args.shard_tokens) for name in ("val", "train"))
    held_out: set[bytes] = set()
    skipped = repeated = 0
    total = sum(path.stat().st_size for path in args.documents)
    with tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, disable=args.quiet) as bar:
        for part in encode_all(args, tokenizer):
            skipped += part.skipped
            first = np.arange(len(part.lengths)) < args.val_docs - val.documents
            val.add(part.select(first))
            held_out.update(itertools.compress(part.prints, first))
            known = np.array([name in held_out for name in part.prints], bool)
            repeated += int((known & ~first).sum())
            train.add(part.select(~first & ~known))
            bar.update(part.read)
            bar.set_postfix_str(f"{val.tokens + train.tokens:,} tokens")
    if val.documents < args.val_docs or not train.documents:
        raise DataError(
            f"{', '.join(map(str, args.documents))}: found {val.documents + train.documents:,} "
            f"documents with text, expected more than --val-docs={args.val_docs:,}; add "
            "documents or lower --val-docs"
        )
    return dict(
        validation=dict(documents_asked=args.val_docs, **val.finish()),
        train=train.finish(),
        documents_without_text=skipped,
        training_documents_left_out_as_validation=repeated,
        vocab_size=codec.vocab_size,
        fused_pairs=codec.marks.fused_names() if codec.marks else {},
        validation_hashes=sorted(name.hex() for name in held_out),
    )


# Main --------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="build_dataset.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_tokenizer_options(parser)
    add_set_options(parser)
    args = parser.parse_args(argv)
    if args.transform == "caseops" and args.byte260:
        parser.error("--transform caseops needs a SentencePiece tokenizer, found --byte260")
    if args.fuse_markers and args.transform != "caseops":
        parser.error("--fuse-markers needs --transform caseops")
    return args


def add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--vocab-size",
        type=positive,
        help="train a SentencePiece BPE tokenizer of this many pieces on the training documents",
    )
    kind.add_argument(
        "--model", type=Path, help="use this SentencePiece model (nmt_nfkc, no dummy prefix)"
    )
    kind.add_argument(
        "--byte260", action="store_true", help="use raw UTF-8 bytes after four control ids"
    )
    parser.add_argument(
        "--tokenizer-bytes",
        type=positive,
        default=500_000_000,
        help="text to train a tokenizer on, kept in memory [bytes] (default: %(default)s)",
    )
    parser.add_argument(
        "--transform",
        choices=("none", "caseops"),
        default="none",
        help="caseops: encode capitals as marks, and write a byte sidecar",
    )
    parser.add_argument(
        "--fuse-markers",
        action="store_true",
        help="with caseops: encode a space and the mark after it as one token",
    )


def add_set_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "documents",
        nargs="+",
        type=Path,
        help=".jsonl, .jsonl.zst, .jsonl.gz, .jsonl.xz or .parquet files, read in this order",
    )
    parser.add_argument(
        "--field", default="text", help="JSON key or Parquet column (default: %(default)s)"
    )
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    parser.add_argument("--replace", action="store_true", help="replace the set in --out")
    parser.add_argument(
        "--val-docs",
        type=positive,
        default=50_000,
        help="validation documents (default: %(default)s, as in the challenge; with fewer, "
        "documents of the public validation set end up in training)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=positive,
        default=100_000_000,
        help="tokens per shard (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=cores(),
        help="number of processes (default: all cores, %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def positive(text: str) -> int:
    """Parse a positive whole number, in which underscores and commas are allowed."""
    digits = text.replace(",", "").replace("_", "")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number greater than 0")
    return int(digits)


def set_files(folder: Path) -> list[Path]:
    """The files of a set in a folder."""
    names = (
        "fineweb_train_*.bin",
        "fineweb_val_*.bin",
        "tokenizer.model",
        "tokenizer.json",
        "manifest.json",
        "verified.json",
    )
    return sorted(path for name in names for path in folder.glob(name))


def build(args: argparse.Namespace) -> int:
    """Build the set in a temporary folder, then move its files into place, the manifest last."""
    missing = [
        str(path) for path in [*args.documents, *filter(None, [args.model])] if not path.is_file()
    ]
    if missing:
        raise DataError(f"{', '.join(missing)}: no such file")
    if not args.replace and set_files(args.out):
        raise DataError(
            f"{args.out}: already contains a set ({set_files(args.out)[0].name}, ...); choose "
            "another --out, or use --replace"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".building-", dir=args.out))
    try:
        tokenizer, facts = make_tokenizer(args, staging)
        counts = write_shards(args, staging, tokenizer)
        vocab_size = counts.pop("vocab_size")
        manifest = dict(
            format=MANIFEST_FORMAT,
            tokenizer=dict(file=tokenizer.name, vocab_size=vocab_size, **facts),
            transform=args.transform,
            **counts,
            shard_tokens=args.shard_tokens,
            sources=[dict(name=path.name, **file_facts(path)) for path in args.documents],
            files={path.name: file_facts(path) for path in set_files(staging)},
        )
        (staging / "manifest.json").write_text(
            json.dumps(manifest, indent=1) + "\n", encoding="utf-8"
        )
        for path in reversed(set_files(args.out)):
            path.unlink()
        for path in sorted(set_files(staging), key=lambda path: path.name == "manifest.json"):
            path.replace(args.out / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for name in ("validation", "train"):
        print(f"{name}: " + " ".join(f"{key}={value:,}" for key, value in manifest[name].items()))
    print(f"wrote the set to {args.out}; check it with: python data/verify_dataset.py {args.out}")
    return 0


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    return exit_status(lambda: build(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
