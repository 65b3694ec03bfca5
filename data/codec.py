"""Convert documents to tokens and back, and count their bytes; shared by the tools in this folder.

In every SentencePiece set, with or without CaseOps, the text of a document is the text after
SentencePiece's `nmt_nfkc` normalisation: runs of white space become one space, leading and trailing
white space is removed, and compatibility characters are replaced (NFKC). The byte count of a
document is the UTF-8 length of that text. A byte260 set keeps the raw text and counts all of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import caseops
import numpy as np
import sentencepiece

from train_gpt import BOS, BYTE_OFFSET, ByteTable, DataError, file_sha256

PAD, EOS, UNK = 0, 2, 3  # with BOS, the control ids of every tokenizer
MANIFEST_FORMAT = 1
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
    """The text of a document in a SentencePiece set."""
    return _normalizer().normalize(text)


def fingerprint(normalized: str) -> bytes:
    """128-bit BLAKE2b of a document's text, case folded and without white space.

    Args:
        normalized: the output of `normalize`, or decoded tokens.
    """
    folded = "".join(normalized.casefold().split())
    return hashlib.blake2b(folded.encode(), digest_size=16).digest()


class Codec:
    """A tokenizer and the transform before it: encodes and decodes documents, counts their bytes.

    Attributes: path, the tokenizer's file; table, its ByteTable; marks, None without CaseOps;
    normalizes, whether text is normalised first; surfaces, the bytes that each id decodes to.
    """

    def __init__(self, path: Path, *, transform: str = "none", fuse: bool = False):
        """Read `tokenizer.model` (SentencePiece) or `tokenizer.json` (byte260).

        Raises: DataError if it cannot be read, would make byte counts wrong, or lacks the marks.
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
            raise DataError(f"{self.path}: not a SentencePiece model ({error})") from error
        self.table = ByteTable.from_file(self.path, len(proto.pieces))
        spec, pieces = proto.normalizer_spec, [piece.piece for piece in proto.pieces]
        if (spec.name, spec.add_dummy_prefix) != ("nmt_nfkc", False):
            raise DataError(
                f"{self.path}: found normalisation {spec.name or 'none'}, "
                f"add_dummy_prefix={spec.add_dummy_prefix}; expected nmt_nfkc and False, so that "
                "bytes are counted as in other sets; use another tokenizer"
            )
        if transform == "caseops":
            self.marks = caseops.Marks.find(pieces, fuse=fuse)
            if self.marks is None:
                raise DataError(
                    f"{self.path}: lacks the CaseOps marks, pieces U+E001 to U+E004; use a "
                    "tokenizer built with --transform caseops"
                )
        # Documents are normalised before the transform. Normalising again after it would compose a
        # lowered letter with a combining character after it (U+0331 composes with h, not with H),
        # so this copy of the model does not normalise.
        spec.name, spec.precompiled_charsmap, spec.remove_extra_whitespaces = "identity", b"", False
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        kinds = proto.SentencePiece
        surfaces = [
            bytes([int(p.piece[3:5], 16)])
            if p.type == kinds.BYTE
            else b""
            if p.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.UNUSED)
            else p.piece.replace(ByteTable.SPACE, " ").encode()
            for p in proto.pieces
        ]
        self.surfaces = self.marks.surfaces(surfaces) if self.marks else surfaces

    def _read_bytes(self, transform: str) -> None:
        if transform != "none":
            raise DataError(
                f"{self.path}: byte260 cannot be combined with a transform; use --transform none"
            )
        self.table = ByteTable.from_file(self.path, BYTE_OFFSET + 256)
        self.surfaces = [b""] * BYTE_OFFSET + [bytes([value]) for value in range(256)]

    @property
    def vocab_size(self) -> int:
        return len(self.table.base_bytes)

    def encode(self, text: str) -> np.ndarray:
        """BOS and the pieces of one document, given as `prepare` returns it: (n,) uint16."""
        if not self.normalizes:
            raw = np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + np.uint16(BYTE_OFFSET)
            return np.concatenate([np.array([BOS], np.uint16), raw])
        tokens = np.array([BOS, *self.model.encode(text)], np.uint16)
        return self.marks.fuse(tokens) if self.marks and self.marks.fused else tokens

    def prepare(self, text: str, normalized: str) -> str:
        """The tokenizer's input for a document; normalized: its `normalize(text)`."""
        if not self.normalizes:
            return text
        return caseops.encode(normalized) if self.marks else normalized

    def raw(self, tokens: np.ndarray) -> bytes:
        """The bytes that tokens decode to, before CaseOps is undone."""
        surfaces = self.surfaces
        return b"".join([surfaces[token] for token in tokens.tolist()])

    def decode(self, tokens: np.ndarray) -> str:
        """The text of one document's tokens, with or without BOS.

        Raises: ValueError if the bytes are not UTF-8, or a CaseOps mark lacks its letter.
        """
        text = self.raw(tokens).decode()
        if self.normalizes:
            text = text.removeprefix(" ")
        return caseops.decode(text) if self.marks else text

    @functools.cached_property
    def _folded_surfaces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The bytes of each id in a folded text: all concatenated; start and length per id."""
        marks = [mark.encode() for mark in (caseops.TITLE, caseops.ALLCAPS, caseops.CAPNEXT)]
        pieces = self.surfaces
        if self.normalizes:
            pieces = [surface.replace(b" ", b"") for surface in pieces]
        if self.marks:
            pieces = [b"" if surface in marks else surface for surface in pieces]
        lengths = np.array([len(surface) for surface in pieces])
        return np.frombuffer(b"".join(pieces), np.uint8), np.cumsum(lengths) - lengths, lengths

    def fingerprints(self, tokens: np.ndarray, starts: np.ndarray) -> list[bytes | None]:
        """`fingerprint` of each document; they begin at `starts`, the last ends with `tokens`.

        None for a document that is all white space. Invalid UTF-8, as where the last shard cuts a
        document, is replaced before hashing.
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
                with contextlib.suppress(ValueError):  # of a document that was cut off
                    texts[at] = self.decode(document)
        return [fingerprint(text) if text else None for text in texts]

    def charge(self, tokens: np.ndarray) -> np.ndarray:
        """(n + 1,) ids -> (n,) int16 byte counts of tokens[1:], as train_gpt.py counts them."""
        return self.marks.charge(self.table, tokens) if self.marks else self.table.charge(tokens)


def byte_tokenizer() -> bytes:
    """The content of the byte260 tokenizer file, in the format of the public challenge."""
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
    """Yield function(item) for each item, in order, with a bounded number of items in memory.

    Args:
        workers: number of processes; 1 means this process.
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


def file_facts(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, as manifests record them."""
    return dict(bytes=path.stat().st_size, sha256=file_sha256(path))


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
