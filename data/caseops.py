"""CaseOps: capital letters are written as marks, so that a word has one spelling; lossless.

Each maximal run of ASCII letters is encoded as follows (`lossless_caps_caseops_v1` of PR #1729):

    word   -> word                      no capitals: unchanged
    WORD   -> ALLCAPS word              two letters or more, all capitals
    Word   -> TITLE word                also a single capital
    iPhone -> i CAPNEXT phone           any other mix: TITLE if the first letter is a capital, then
    McCoy  -> TITLE mc CAPNEXT coy      CAPNEXT before each later capital

A mark character that already occurs in the text is preceded by ESC. All other characters are
unchanged. `decode(encode(text)) == text` for every text. Bits per byte count the bytes of the
original text: a mark counts 0 bytes, and an ASCII letter has the same length in either case. Only
an escaped mark (the three bytes of its UTF-8) and a fused pair (its space) need a special rule: see
`Marks.charge`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import ByteTable  # noqa: E402 -- in the folder above

TITLE, ALLCAPS, CAPNEXT, ESC = MARKS = "\ue001", "\ue002", "\ue003", "\ue004"
MARK_BYTES = len(ESC.encode())
# Byte values that never occur in UTF-8: their byte pieces are free for use as fused pairs.
# (#2109 used 0x00-0x02, but a text can contain NUL.)
FREE_BYTES = dict(zip((TITLE, ALLCAPS, CAPNEXT), (0xC0, 0xC1, 0xF5), strict=True))

# The lookbehind starts matches only at the beginning of a run, so that long runs take linear time.
CAPITALIZED = re.compile(r"(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*|[\ue001-\ue004]")
CAPITAL = re.compile("[A-Z]")
MARKED = re.compile(r"\ue004([\ue001-\ue004])|\ue002([a-z]+)|[\ue001\ue003]([a-z])|[\ue001-\ue004]")


def encode(text: str) -> str:
    """Write capitals as marks. `decode` is the inverse."""
    return CAPITALIZED.sub(_encode_match, text)


def _encode_match(match: re.Match) -> str:
    run = match[0]
    if run in MARKS:
        return ESC + run
    if len(run) > 1 and run.isupper():
        return ALLCAPS + run.lower()
    head = TITLE + run[0].lower() if run[0].isupper() else run[0]
    return head + CAPITAL.sub(lambda letter: CAPNEXT + letter[0].lower(), run[1:])


def decode(text: str) -> str:
    """Invert `encode`.

    A capital letter without a mark is kept: tokenizers that fold full-width letters after the
    transform, as the published one does, produce it.

    Raises: ValueError if a mark is at a position where `encode` never writes one.
    """
    return MARKED.sub(_decode_match, text)


def _decode_match(match: re.Match) -> str:
    if match[1]:
        return match[1]
    if match.lastindex is None:
        raise ValueError(f"CaseOps mark U+{ord(match[0]):04X} without a letter at {match.start()}")
    return match[match.lastindex].upper()


@dataclass(frozen=True)
class Marks:
    """Token ids of the marks, and of the pairs (space, mark) if these are fused.

    Attributes: space, title, allcaps, capnext, esc: ids. fused: {id of mark: id of pair}, empty
    without fusion.
    """

    space: int
    title: int
    allcaps: int
    capnext: int
    esc: int
    fused: dict[int, int]

    @classmethod
    def find(cls, pieces: Sequence[str], *, fuse: bool) -> Marks | None:
        """The marks in a list of pieces; None unless all four are in it."""
        ids = [pieces.index(mark) for mark in MARKS if mark in pieces]
        if len(ids) != len(MARKS):
            return None
        pairs = (
            {
                pieces.index(mark): pieces.index(f"<0x{byte:02X}>")
                for mark, byte in FREE_BYTES.items()
            }
            if fuse
            else {}
        )
        return cls(pieces.index(ByteTable.SPACE), *ids, fused=pairs)

    def fuse(self, tokens: np.ndarray) -> np.ndarray:
        """Replace each pair (space, TITLE / ALLCAPS / CAPNEXT) by one token, in a new array."""
        second = np.isin(tokens[1:], list(self.fused)) & (tokens[:-1] == self.space)
        alias = np.arange(int(tokens.max(initial=0)) + 1, dtype=tokens.dtype)
        for mark, pair in self.fused.items():
            alias[mark : mark + 1] = pair
        out = tokens.copy()
        out[:-1][second] = alias[tokens[1:][second]]
        return out[~np.r_[False, second]]

    def fused_names(self) -> dict[str, int]:
        """{name: id} of the fused pairs, for the manifest."""
        names = {
            self.title: "space+TITLE",
            self.allcaps: "space+ALLCAPS",
            self.capnext: "space+CAPNEXT",
        }
        return {names[mark]: pair for mark, pair in self.fused.items()}

    def surfaces(self, pieces: list[bytes]) -> list[bytes]:
        """The bytes of each token id before `decode`: `pieces`, with those of the fused pairs."""
        out = list(pieces)
        for mark, pair in self.fused.items():
            out[pair] = b" " + pieces[mark]
        return out

    def charge(self, table: ByteTable, tokens: np.ndarray) -> np.ndarray:
        """Bytes of the original text per target: `ByteTable.charge`, with 0 bytes for marks.

        Args:
            table: the tokenizer's ByteTable.
            tokens: (n + 1,) ids; the first one is context only.
        Returns: (n,) int16.
        """
        base, leading = table.base_bytes.copy(), table.leading_space.copy()
        base[[self.title, self.allcaps, self.capnext, self.esc]] = 0
        for pair in self.fused.values():
            base[pair], leading[pair] = 0, True
        out = dataclasses.replace(table, base_bytes=base, leading_space=leading).charge(tokens)
        escaped = -1  # position of the last escaped mark, which may itself be an ESC
        for at in np.flatnonzero(tokens[:-1] == self.esc):
            if at != escaped:
                escaped = at + 1
                out[at] = MARK_BYTES
        return out
