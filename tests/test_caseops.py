"""data/caseops.py and the byte sidecar, against a transform written letter by letter."""

import json
import string
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import build_dataset  # noqa: E402
import caseops  # noqa: E402
import codec  # noqa: E402

from train_gpt import BOS, ByteTable, DataError, read_shard  # noqa: E402

TITLE, ALLCAPS, CAPNEXT, ESC = caseops.MARKS
SAMPLE = ROOT / "data" / "sample"
# Letters, marks and the characters that break careless transforms, so that they meet often.
SPITEFUL = st.sampled_from(
    [
        *"abzABZIiHhJ",
        *caseops.MARKS,
        *" \t\n\u2581\u00a0\u3000.'-0",
        "\u0130",
        "\u0131",
        "\u017f",
        "\u00df",
        "\u00c9",
        "\u0301",
        "\u0331",
        "\u030c",
        "\u200d",
        "\ufb01",
        "\uff21",
        "\u212a",
        "\U0001f468",
        "\x00",
        "\x1f",
        "\ue000",
        "\ue005",
        "\uffff",
    ]
)
ANY_TEXT = st.text(st.one_of(SPITEFUL, st.characters(codec="utf-8")), max_size=60)


def naive_encode(text: str) -> str:
    """The definition in the head of data/caseops.py, one letter at a time."""
    out, at = "", 0
    while at < len(text):
        stop = at
        while stop < len(text) and text[stop] in string.ascii_letters:
            stop += 1
        run = text[at:stop]
        if not run:
            out += ESC + text[at] if text[at] in caseops.MARKS else text[at]
            at += 1
            continue
        if len(run) >= 2 and all(letter in string.ascii_uppercase for letter in run):
            out += ALLCAPS + run.lower()
        else:
            for place, letter in enumerate(run):
                if letter in string.ascii_uppercase:
                    out += TITLE if place == 0 else CAPNEXT
                out += letter.lower()
        at = stop
    return out


def documents() -> list[str]:
    """Real documents and spiteful ones."""
    import zstandard

    with open(SAMPLE / "documents.jsonl.zst", "rb") as raw:
        lines = zstandard.ZstdDecompressor().stream_reader(raw).read().splitlines()[:160]
    return [json.loads(line)["text"] for line in lines] + [
        "\ue001\ue002 ESC\ue004\ue004\ue004X \ue003",
        "H\u0331J\u030cT\u0308 \uff21bc \ufb01\u0323",
        "A",
        "AB aB Ab",
        "  Two  Spaces\n\n\nHERE\u3000\u2581 Now\u2581",
        "\u0130stanbul I\u0131i NASA's iPhone McCOY \x00\x01",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 E\u0301",
        "\ue004",
    ]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """The same documents as a plain set, a CaseOps set, and one with fused pairs."""
    folder = tmp_path_factory.mktemp("sets")
    source = folder / "documents.jsonl"
    texts = documents()
    source.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts[-60:] + texts[:-60])
    )
    flags = dict(
        plain=[],
        caseops=["--transform", "caseops"],
        fused=["--transform", "caseops", "--fuse-markers"],
    )
    for name, extra in flags.items():
        assert (
            build_dataset.main(
                [
                    str(source),
                    "--out",
                    str(folder / name),
                    "--vocab-size",
                    "700",
                    "--val-docs",
                    "60",
                    "--workers",
                    "1",
                    "--quiet",
                    *extra,
                ]
            )
            == 0
        )
    return {name: folder / name for name in flags}


def opened(folder: Path, name: str) -> tuple[codec.Codec, np.ndarray]:
    transform = "none" if name == "plain" else "caseops"
    made = codec.Codec(folder / "tokenizer.model", transform=transform, fuse=name == "fused")
    return made, np.array(read_shard(folder / "fineweb_val_000000.bin"))


def split_documents(tokens: np.ndarray) -> list[np.ndarray]:
    return np.split(tokens, np.flatnonzero(tokens == BOS)[1:])


@settings(max_examples=1500, deadline=None)
@given(ANY_TEXT)
def test_decoding_undoes_encoding_for_every_text(text):
    assert caseops.decode(caseops.encode(text)) == text


@settings(max_examples=1500, deadline=None)
@given(ANY_TEXT)
def test_encoding_is_the_letter_by_letter_definition(text):
    assert caseops.encode(text) == naive_encode(text)


@settings(max_examples=500, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_no_two_texts_are_encoded_alike_and_no_capital_is_left(one, other):
    assert (one == other) == (caseops.encode(one) == caseops.encode(other))
    assert not set(caseops.encode(one)) & set(string.ascii_uppercase)


@settings(max_examples=500, deadline=None)
@given(ANY_TEXT)
def test_encoding_adds_only_marks_and_keeps_every_other_length(text):
    encoded = caseops.encode(text)
    kept = caseops.decode(encoded)
    assert len(encoded) - len(kept) == sum(encoded.count(mark) for mark in caseops.MARKS) - sum(
        text.count(mark) for mark in caseops.MARKS
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("word", "word"),
        ("Word", f"{TITLE}word"),
        ("WORD", f"{ALLCAPS}word"),
        ("A", f"{TITLE}a"),
        ("AB", f"{ALLCAPS}ab"),
        ("iPhone", f"i{CAPNEXT}phone"),
        ("McCoy", f"{TITLE}mc{CAPNEXT}coy"),
        ("ABc", f"{TITLE}a{CAPNEXT}bc"),
        ("É I\u0130", f"É {TITLE}i\u0130"),
        (TITLE, ESC + TITLE),
        (ESC + ESC + "A", ESC * 4 + TITLE + "a"),
    ],
)
def test_the_published_cases_come_out_as_published(text, expected):
    assert caseops.encode(text) == expected


@pytest.mark.parametrize(
    "text", [TITLE, TITLE + "A", ALLCAPS + "1", CAPNEXT + ESC + ESC, ESC, ESC + "a"]
)
def test_a_mark_without_a_letter_is_refused(text):
    with pytest.raises(ValueError, match=r"mark U\+E00"):
        caseops.decode(text)


def test_a_run_of_a_hundred_thousand_letters_takes_linear_time():
    text = "a" * 100_000 + "1" + "aB" * 100_000
    assert caseops.decode(caseops.encode(text)) == text


@pytest.mark.parametrize("name", ["plain", "caseops", "fused"])
def test_every_document_decodes_to_its_normalised_text(sets, name):
    made, tokens = opened(sets[name], name)
    lines = (sets[name].parent / "documents.jsonl").read_text().splitlines()
    source = [json.loads(line)["text"] for line in lines]
    wanted = [codec.normalize(text) for text in source if codec.normalize(text)][:60]
    assert [made.decode(part) for part in split_documents(tokens)] == wanted


@pytest.mark.parametrize("name", ["caseops", "fused"])
def test_the_sidecar_charges_each_document_what_the_plain_set_charges(sets, name):
    plain, tokens = opened(sets["plain"], "plain")
    wanted = [int(plain.table.charge(part).sum()) for part in split_documents(tokens)]
    made, tokens = opened(sets[name], name)
    sidecar = np.array(read_shard(sets[name] / "fineweb_val_bytes_000000.bin"))
    assert len(sidecar) == len(tokens)
    parts = np.split(sidecar, np.flatnonzero(tokens == BOS)[1:])
    assert [int(part.sum()) for part in parts] == wanted
    assert wanted == [
        len(plain.decode(part).encode())
        for part in split_documents(opened(sets["plain"], "plain")[1])
    ]


@pytest.mark.parametrize("name", ["caseops", "fused"])
def test_the_sidecar_charges_each_token_the_growth_of_the_original_text(sets, name):
    made, tokens = opened(sets[name], name)
    sidecar = read_shard(sets[name] / "fineweb_val_bytes_000000.bin")
    start = 0
    for part in split_documents(tokens)[:8]:
        grown = [
            made.raw(part[:stop]).removeprefix(b" ") for stop in range(1, min(len(part), 400) + 1)
        ]
        lengths = np.array([naive_original_bytes(raw) for raw in grown])
        np.testing.assert_array_equal(
            np.diff(lengths, prepend=0), sidecar[start : start + len(lengths)]
        )
        start += len(part)


def naive_original_bytes(raw: bytes) -> int:
    """Original bytes of a transformed text that may be cut anywhere, read byte by byte."""
    marks, total, at = [mark.encode() for mark in caseops.MARKS], 0, 0
    while at < len(raw):
        if raw[at : at + 3] in marks:
            escaped = raw[at : at + 3] == marks[3] and raw[at + 3 : at + 6] in marks
            total, at = total + 3 * escaped, at + 3 + 3 * escaped
        else:
            total, at = total + 1, at + 1
    return total


def test_transform_and_tokenizer_agree_with_plain_text_for_any_text(sets):
    plain, _ = opened(sets["plain"], "plain")
    made = [opened(sets[name], name)[0] for name in ("caseops", "fused")]

    @settings(max_examples=600, deadline=None)
    @given(ANY_TEXT)
    def agree(text):
        normalized = codec.normalize(text)
        charged = int(plain.table.charge(plain.encode(normalized)).sum())
        assert charged == len(normalized.encode())
        for each in made:
            tokens = each.encode(each.prepare(text, normalized))
            assert each.decode(tokens) == normalized
            assert int(each.charge(tokens).sum()) == charged

    agree()


def test_the_tokens_of_a_set_name_each_document_as_its_text_does(sets):
    made = [opened(sets[name], name)[0] for name in ("plain", "caseops", "fused")]

    @settings(max_examples=400, deadline=None)
    @given(st.lists(ANY_TEXT, min_size=1, max_size=3))
    def agree(texts):
        normalized = [codec.normalize(text) for text in texts]
        wanted = [codec.fingerprint(text) if text else None for text in normalized]
        for each in made:
            pairs = zip(texts, normalized, strict=True)
            parts = [each.encode(each.prepare(*pair)) for pair in pairs]
            starts = np.cumsum([0, *map(len, parts[:-1])])
            assert each.fingerprints(np.concatenate(parts), starts) == wanted

    agree()


def test_a_fused_pair_is_charged_its_space_except_at_the_start_of_a_document(sets):
    fused = opened(sets["fused"], "fused")[0]
    pair = fused.marks.fused[fused.marks.title]
    letter = fused.encode("a")[1]
    tokens = np.array([BOS, pair, letter, pair, letter], np.uint16)
    assert fused.charge(tokens).tolist() == [0, 1, 1, 1]


def test_the_plain_encoder_is_sentencepieces_own(sets):
    import sentencepiece

    plain, _ = opened(sets["plain"], "plain")
    model = sentencepiece.SentencePieceProcessor(model_file=str(sets["plain"] / "tokenizer.model"))

    @settings(max_examples=600, deadline=None)
    @given(ANY_TEXT)
    def agree(text):
        assert plain.encode(codec.normalize(text)).tolist() == [BOS, *model.encode(text)]

    agree()


def test_fusion_replaces_exactly_the_pairs_of_a_space_and_a_mark(sets):
    marked, tokens = opened(sets["caseops"], "caseops")
    fused, short = opened(sets["fused"], "fused")
    wanted, ids = [], marked.marks
    for token in tokens.tolist():
        if wanted and wanted[-1] == ids.space and token in (ids.title, ids.allcaps, ids.capnext):
            wanted[-1] = fused.marks.fused[token]
        else:
            wanted.append(token)
    assert short.tolist() == wanted
    assert len(short) < len(tokens)
    manifest = json.loads((sets["fused"] / "manifest.json").read_text())
    assert sorted(manifest["fused_pairs"].values()) == sorted(fused.marks.fused.values())
    assert not set(tokens.tolist()) & set(manifest["fused_pairs"].values())


def test_marks_have_the_published_ids(sets):
    marks = opened(sets["caseops"], "caseops")[0].marks
    assert (marks.title, marks.allcaps, marks.capnext, marks.esc) == (4, 5, 6, 7)
    table = ByteTable.from_file(sets["caseops"] / "tokenizer.model", 700)
    assert table.base_bytes[8] == 1


def test_a_tokenizer_without_marks_is_refused_for_caseops():
    with pytest.raises(DataError, match="lacks the CaseOps marks"):
        codec.Codec(SAMPLE / "tokenizer.model", transform="caseops")
