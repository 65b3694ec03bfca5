"""Documents to tokens and back, and what they are charged: shared by the tools in this folder.

One rule says which text a document stands for, in every SentencePiece set, transformed or not: the
document after SentencePiece's `nmt_nfkc` normalisation, in which white space of any kind and length
is one space, none at either end, and compatible characters are one (NFKC). Its UTF-8 length is what
a document is charged. A byte260 set keeps the text as it is and charges all of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import caseops  # noqa: E402 -- beside this file

import train_gpt  # noqa: E402 -- in the folder above
from train_gpt import BYTE_OFFSET, ByteTable, DataError  # noqa: E402

SPACE = ByteTable.SPACE
PAD, BOS, EOS, UNK = range(4)
ITEMS_IN_FLIGHT = 3  # per worker
NORMALIZER = dict(normalization_rule_name="nmt_nfkc", add_dummy_prefix=False)


@functools.cache
def _normalizer() -> sentencepiece.SentencePieceNormalizer:
    return sentencepiece.SentencePieceNormalizer(
        rule_name=NORMALIZER["normalization_rule_name"],
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=True,
    )


def normalize(text: str) -> str:
    """The text that a document stands for in a SentencePiece set."""
    return _normalizer().normalize(text)


def fingerprint(normalized: str) -> bytes:
    """16 bytes that name a document whatever its case and white space: BLAKE2b of the folded text.

    Args:
        normalized: the output of `normalize`, or the text that tokens decode to.
    """
    folded = "".join(normalized.casefold().split())
    return hashlib.blake2b(folded.encode(), digest_size=16).digest()


class Codec:
    """One tokenizer, and the transform before it: documents to tokens, tokens to text and bytes.

    Attributes: path of the tokenizer's file; table, train_gpt's ByteTable; marks, caseops.Marks or
    None; normalizes, whether text is normalised; surfaces, the bytes that each id writes.
    """

    def __init__(self, path: Path, *, transform: str = "none", fuse: bool = False):
        """Read `tokenizer.model` (SentencePiece) or `tokenizer.json` (byte260).

        Raises: DataError if it cannot be read, would break the byte count, or lacks the marks.
        """
        self.path, self.marks = path, None
        self.normalizes = path.suffix != ".json"
        if self.normalizes:
            self._read_sentencepiece(transform, fuse)
        else:
            self._read_bytes(transform)

    def _read_sentencepiece(self, transform: str, fuse: bool) -> None:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        try:
            proto.ParseFromString(self.path.read_bytes())
        except (OSError, DecodeError) as error:
            raise DataError(f"{self.path}: no SentencePiece model ({error})") from error
        self.table = ByteTable.from_file(self.path, len(proto.pieces))
        spec, pieces = proto.normalizer_spec, [piece.piece for piece in proto.pieces]
        if (spec.name, spec.add_dummy_prefix) != ("nmt_nfkc", False) or self.table.bos != BOS:
            raise DataError(
                f"{self.path}: normalises by {spec.name or 'nothing'} with "
                f"add_dummy_prefix={spec.add_dummy_prefix}, BOS={self.table.bos}; expected "
                f"nmt_nfkc, False and {BOS}: it would charge other bytes than other sets"
            )
        if transform == "caseops":
            self.marks = caseops.Marks.find(pieces, fuse=fuse)
            if self.marks is None:
                raise DataError(
                    f"{self.path}: lacks the CaseOps marks U+E001 to U+E004 among its pieces; "
                    "use a tokenizer made with --transform caseops"
                )
        # Documents are normalised before the transform. A second pass would compose a lowered
        # letter with a mark after it (U+0331 after H but not after h), so this copy of the model
        # does none.
        spec.name, spec.precompiled_charsmap, spec.remove_extra_whitespaces = "identity", b"", False
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        kinds = proto.SentencePiece
        surfaces = [
            bytes([int(p.piece[3:5], 16)])
            if p.type == kinds.BYTE
            else b""
            if p.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.UNUSED)
            else p.piece.replace(SPACE, " ").encode()
            for p in proto.pieces
        ]
        self.surfaces = self.marks.surfaces(surfaces) if self.marks else surfaces

    def _read_bytes(self, transform: str) -> None:
        if transform != "none":
            raise DataError(f"{self.path}: byte260 takes no transform; expected --transform none")
        self.table = ByteTable.from_file(self.path, BYTE_OFFSET + 256)
        self.surfaces = [b""] * BYTE_OFFSET + [bytes([value]) for value in range(256)]

    @property
    def vocab_size(self) -> int:
        return len(self.table.base_bytes)

    def encode(self, text: str) -> np.ndarray:
        """BOS and the pieces of one document, whose text `prepare` returned: (n,) uint16."""
        if not self.normalizes:
            raw = np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + np.uint16(BYTE_OFFSET)
            return np.concatenate([np.array([BOS], np.uint16), raw])
        tokens = np.array([BOS, *self.model.encode(text)], np.uint16)
        return self.marks.fuse(tokens) if self.marks and self.marks.fused else tokens

    def prepare(self, text: str, normalized: str) -> str:
        """What the tokenizer is given for a document `text` and its `normalize(text)`."""
        if not self.normalizes:
            return text
        return caseops.encode(normalized) if self.marks else normalized

    def raw(self, tokens: np.ndarray) -> bytes:
        """The bytes that tokens write, before CaseOps is undone."""
        surfaces = self.surfaces
        return b"".join([surfaces[token] for token in tokens.tolist()])

    def decode(self, tokens: np.ndarray) -> str:
        """The text of one document's tokens, BOS included or not.

        Raises: ValueError if they write no UTF-8, or a CaseOps mark without a letter.
        """
        text = self.raw(tokens).decode()
        if self.normalizes:
            text = text.removeprefix(" ")
        return caseops.decode(text) if self.marks else text

    @functools.cached_property
    def _folded_surfaces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each id adds to a folded text: all bytes in a row, and start and length per id."""
        marks = [mark.encode() for mark in (caseops.TITLE, caseops.ALLCAPS, caseops.CAPNEXT)]
        pieces = self.surfaces
        if self.normalizes:
            pieces = [surface.replace(b" ", b"") for surface in pieces]
        if self.marks:
            pieces = [b"" if surface in marks else surface for surface in pieces]
        lengths = np.array([len(surface) for surface in pieces])
        return np.frombuffer(b"".join(pieces), np.uint8), np.cumsum(lengths) - lengths, lengths

    def fingerprints(self, tokens: np.ndarray, starts: np.ndarray) -> list[bytes | None]:
        """`fingerprint` of the documents that begin at `starts`; the last one ends with `tokens`.

        None for a document of white space alone. Text that is no UTF-8, as at the cut end of the
        last shard, is named by what can be read of it.
        """
        row, begins, sizes = self._folded_surfaces
        lengths = sizes[tokens]
        ends = np.cumsum(lengths)
        index = np.repeat(begins[tokens] - (ends - lengths), lengths)
        index += np.arange(len(index))
        written = row[index].tobytes()
        cuts = [*np.append(0, ends)[starts].tolist(), len(written)]
        texts = [written[cut:end].decode(errors="replace") for cut, end in itertools.pairwise(cuts)]
        if not self.normalizes:
            texts = [normalize(text) for text in texts]
        elif self.marks:
            for at in [at for at, text in enumerate(texts) if caseops.ESC in text]:
                document = tokens[starts[at] : [*starts, len(tokens)][at + 1]]
                with contextlib.suppress(ValueError):  # of a text that can only be read in part
                    texts[at] = self.decode(document)
        return [fingerprint(text) if text else None for text in texts]

    def charge(self, tokens: np.ndarray) -> np.ndarray:
        """(n + 1,) ids -> (n,) int16 bytes charged to tokens[1:], by train_gpt's one rule."""
        return self.marks.charge(self.table, tokens) if self.marks else self.table.charge(tokens)


def byte_tokenizer() -> bytes:
    """The file of the byte260 tokenizer, in the layout of the public challenge."""
    config = dict(
        pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK, byte_offset=BYTE_OFFSET, byte_count=256
    )
    facts = dict(tokenizer_type="pure_byte", config=config, vocab_size=BYTE_OFFSET + 256)
    return (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode()


def map_in_order(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int,
    start: Callable[..., None],
    setup: tuple,
) -> Iterator[Any]:
    """function(item) for every item, in order, with a bounded number of items in memory.

    Args:
        workers: processes; 1 works in this one.
        start, setup: each process calls start(*setup) before its first item.
    """
    if workers == 1:
        start(*setup)
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, initializer=start, initargs=setup) as pool:
        queue = deque()
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) >= ITEMS_IN_FLIGHT * workers:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def exit_status(job: Callable[[], int]) -> int:
    """Run a tool: its own status, or 2 after one line on stderr for what the user can mend."""
    try:
        return job()
    except train_gpt.UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'disk'}: {error.strerror or error}", file=sys.stderr)
    return 2


def file_facts(path: Path) -> dict[str, int | str]:
    """Size and sha256 of a file, as manifests record them."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return dict(bytes=path.stat().st_size, sha256=digest.hexdigest())


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
