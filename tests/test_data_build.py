"""data/build_dataset.py against SentencePiece itself and a builder of ten lines."""

import gzip
import json
import lzma
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import build_dataset  # noqa: E402
import codec  # noqa: E402

from train_gpt import ByteTable, find_shards, read_shard  # noqa: E402

SAMPLE = ROOT / "data" / "sample"
OPTIONS = ["--model", str(SAMPLE / "tokenizer.model"), "--quiet"]


def sample_texts(count: int) -> list[str]:
    import zstandard

    with open(SAMPLE / "documents.jsonl.zst", "rb") as raw:
        lines = zstandard.ZstdDecompressor().stream_reader(raw).read().splitlines()
    return [json.loads(line)["text"] for line in lines[:count]]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sample_texts(240)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def build(source, out: Path, *extra: str) -> int:
    """Run the tool in this process; its exit status."""
    sources = source if isinstance(source, list) else [source]
    kind = [] if {"--vocab-size", "--byte260", "--model"} & set(extra) else OPTIONS
    return build_dataset.main([*map(str, sources), "--out", str(out), "--quiet", *kind, *extra])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens_of(folder: Path, split: str) -> list[int]:
    return np.concatenate([read_shard(path) for path in find_shards(folder, split)]).tolist()


def test_shards_hold_bos_and_sentencepieces_own_pieces_of_each_document(tmp_path, texts):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(SAMPLE / "tokenizer.model"))
    assert build(write_jsonl(tmp_path / "d.jsonl", texts), tmp_path / "out", "--val-docs", "7") == 0
    for split, part in (("val", texts[:7]), ("train", texts[7:])):
        wanted = [token for text in part for token in [1, *model.encode(text)]]
        assert tokens_of(tmp_path / "out", split) == wanted


def test_a_shard_is_the_documented_bytes_and_the_last_one_is_shorter(tmp_path, texts):
    source = write_jsonl(tmp_path / "d.jsonl", texts[:20])
    assert build(source, tmp_path / "one", "--val-docs", "2") == 0
    assert build(source, tmp_path / "many", "--val-docs", "2", "--shard-tokens", "5,000") == 0
    whole, many = tokens_of(tmp_path / "one", "train"), find_shards(tmp_path / "many", "train")
    assert [path.name for path in many] == [f"fineweb_train_{i:06d}.bin" for i in range(len(many))]
    assert len(many) == -(-len(whole) // 5000)
    for number, path in enumerate(many):
        part = whole[number * 5000 : (number + 1) * 5000]
        header = struct.pack("<256i", 20240520, 1, len(part), *[0] * 253)
        assert path.read_bytes() == header + struct.pack(f"<{len(part)}H", *part)


@pytest.mark.parametrize(
    "extra",
    [
        ["--vocab-size", "600"],
        ["--transform", "caseops", "--vocab-size", "700", "--fuse-markers"],
        ["--byte260"],
    ],
)
def test_the_bytes_of_a_set_do_not_depend_on_the_number_of_workers(
    tmp_path, texts, extra, monkeypatch
):
    monkeypatch.setattr(build_dataset, "BATCH_BYTES", 1 << 16)
    source = write_jsonl(tmp_path / "d.jsonl", texts[50:110])
    for workers in ("1", "2", "3"):
        flags = ["--val-docs", "5", "--shard-tokens", "30000", "--workers", workers, *extra]
        assert build(source, tmp_path / workers, *flags) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_every_format_gives_the_same_set(tmp_path, texts):
    import pyarrow
    import zstandard
    from pyarrow import parquet

    (tmp_path / "in").mkdir()
    plain = write_jsonl(tmp_path / "in" / "d.jsonl", texts[:30])
    blob = plain.read_bytes()
    halves = zstandard.ZstdCompressor()  # two frames, as parallel compressors write
    frames = halves.compress(blob[:9999]) + halves.compress(blob[9999:])
    packed = {
        "d.jsonl.gz": gzip.compress(blob),
        "d.jsonl.xz": lzma.compress(blob),
        "d.jsonl.zst": frames,
    }
    for name, data in packed.items():
        (tmp_path / "in" / name).write_bytes(data)
    parquet.write_table(pyarrow.table({"text": texts[:30]}), tmp_path / "in" / "d.parquet")
    sets = []
    for number, path in enumerate(sorted((tmp_path / "in").iterdir())):
        assert build(path, tmp_path / str(number), "--val-docs", "3") == 0
        made = contents(tmp_path / str(number))
        del made["manifest.json"]
        sets.append(made)
    assert len(sets) == 5
    assert all(each == sets[0] for each in sets)


def test_documents_keep_their_order_over_several_files(tmp_path, texts):
    whole = write_jsonl(tmp_path / "whole.jsonl", texts[:20])
    parts = [
        write_jsonl(tmp_path / f"{start}.jsonl", texts[start : start + 10]) for start in (0, 10)
    ]
    assert build(whole, tmp_path / "one", "--val-docs", "12") == 0
    assert build(parts, tmp_path / "two", "--val-docs", "12") == 0
    for split in ("val", "train"):
        assert tokens_of(tmp_path / "one", split) == tokens_of(tmp_path / "two", split)


def test_the_manifest_tells_what_is_in_the_set(tmp_path, texts):
    import hashlib

    source = write_jsonl(tmp_path / "d.jsonl", texts[:40])
    assert build(source, tmp_path / "out", "--val-docs", "6") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for split, key, part in (("val", "validation", texts[:6]), ("train", "train", texts[6:40])):
        assert manifest[key]["documents"] == len(part)
        assert manifest[key]["tokens"] == len(tokens_of(tmp_path / "out", split))
        assert manifest[key]["bytes"] == sum(len(codec.normalize(text).encode()) for text in part)
    assert manifest["validation"]["documents_asked"] == 6
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    for name, facts in manifest["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    folded = ["".join(codec.normalize(text).casefold().split()).encode() for text in texts[:6]]
    wanted = sorted(hashlib.blake2b(text, digest_size=16).hexdigest() for text in folded)
    assert manifest["validation_hashes"] == wanted
    assert manifest["sources"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_a_validation_document_never_gets_into_training_in_any_case_or_spacing(tmp_path, texts):
    val, train = texts[:4], texts[4:10]
    copies = [val[0], val[1].upper(), "\n\t " + val[2].replace(" ", "  ") + " ", val[3].title()]
    mixed = [train[0], copies[0], train[1], *copies[1:], *train[2:]]
    assert (
        build(
            write_jsonl(tmp_path / "mixed.jsonl", val + mixed),
            tmp_path / "mixed",
            "--val-docs",
            "4",
        )
        == 0
    )
    assert (
        build(
            write_jsonl(tmp_path / "pure.jsonl", val + train), tmp_path / "pure", "--val-docs", "4"
        )
        == 0
    )
    assert tokens_of(tmp_path / "mixed", "train") == tokens_of(tmp_path / "pure", "train")
    manifest = json.loads((tmp_path / "mixed" / "manifest.json").read_text())
    assert manifest["training_documents_left_out_as_validation"] == 4


def test_documents_without_text_and_blank_lines_are_left_out_and_counted(tmp_path, texts):
    source = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": text}) for text in ("", texts[0], " \n\u3000", texts[1])]
    source.write_text("\n\n".join(lines))
    assert build(source, tmp_path / "out", "--val-docs", "1") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents_without_text"] == 2
    assert tokens_of(tmp_path / "out", "val").count(1) == 1


def test_a_trained_tokenizer_has_the_options_of_the_public_challenge(tmp_path, texts):
    from sentencepiece import sentencepiece_model_pb2

    source = write_jsonl(tmp_path / "d.jsonl", texts)
    assert build(source, tmp_path / "out", "--val-docs", "5", "--vocab-size", "640") == 0
    blob = (tmp_path / "out" / "tokenizer.model").read_bytes()
    proto = sentencepiece_model_pb2.ModelProto.FromString(blob)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert (trainer.model_type, trainer.byte_fallback, trainer.split_digits) == (2, True, True)
    assert (round(trainer.character_coverage, 6), trainer.hard_vocab_limit) == (0.999, False)
    assert (trainer.pad_id, trainer.bos_id, trainer.eos_id, trainer.unk_id) == (0, 1, 2, 3)
    assert (normalizer.name, normalizer.add_dummy_prefix) == ("nmt_nfkc", False)
    assert str(tmp_path).encode() not in blob
    table = ByteTable.from_file(tmp_path / "out" / "tokenizer.model", 640)
    assert table.charge(np.array(tokens_of(tmp_path / "out", "val"))).sum() == sum(
        len(codec.normalize(text).encode()) for text in texts[:5]
    )


def test_byte260_is_the_raw_bytes_after_four_control_ids(tmp_path):
    texts = ["Tabs\tand  spaces \u00e9\u200d", "\ufb01 raw", "more"]
    source = write_jsonl(tmp_path / "d.jsonl", texts)
    assert build(source, tmp_path / "out", "--val-docs", "2", "--byte260") == 0
    wanted = [token for text in texts[:2] for token in [1, *(b + 4 for b in text.encode())]]
    assert tokens_of(tmp_path / "out", "val") == wanted
    made = codec.Codec(tmp_path / "out" / "tokenizer.json")
    assert made.charge(np.array(wanted)).sum() == sum(len(text.encode()) for text in texts[:2])
    assert made.vocab_size == 260


def test_the_sample_is_rebuilt_byte_for_byte_by_the_command_in_its_readme(tmp_path):
    readme = (SAMPLE / "README.md").read_text()
    command = re.search(r"^ {4}python data/build_dataset.py (.*)$", readme, re.M)[1].split()
    assert command[:3] == ["data/sample/documents.jsonl.zst", "--out", "data/sample"]
    arguments = [str(SAMPLE / "documents.jsonl.zst"), "--out", str(tmp_path), *command[3:]]
    assert build_dataset.main([*arguments, "--quiet"]) == 0
    for name, data in contents(tmp_path).items():
        assert (SAMPLE / name).read_bytes() == data, name


def test_the_sample_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 12_000_000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"body": "x"}', "2: expected an object with a string under 'text'"),
        ('{"text": 7}', "2: expected an object"),
        ('{"text": null}', "2: expected an object"),
        ("[1]", "2: expected an object"),
        ('{"text": "cut', "2: expected an object"),
        ('{"text": "\\ud800"}', "2: expected an object"),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bad_line_is_named_and_nothing_is_left_behind(tmp_path, capsys, line, words, workers):
    source = tmp_path / "d.jsonl"
    source.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    assert build(source, tmp_path / "out", "--val-docs", "1", "--workers", workers) == 2
    message = capsys.readouterr().err
    assert f"d.jsonl:{words}" in message
    assert len(message.splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("values", [["fine", None], [1, 2]])
def test_a_parquet_row_without_text_is_named(tmp_path, capsys, values):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "d.parquet")
    assert build(tmp_path / "d.parquet", tmp_path / "out", "--val-docs", "1") == 2
    assert "d.parquet:" in capsys.readouterr().err


def test_a_bad_line_is_named_while_the_tokenizer_is_trained(tmp_path, texts, capsys):
    source = write_jsonl(tmp_path / "d.jsonl", texts[:9])
    with open(source, "a") as stream:
        stream.write("{}\n")
    assert build(source, tmp_path / "out", "--val-docs", "1", "--vocab-size", "400") == 2
    assert "d.jsonl:10: expected an object" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.xz", "d.jsonl.zst", "d.parquet"])
def test_a_damaged_source_is_named_and_nothing_is_left_behind(tmp_path, texts, capsys, name):
    import pyarrow
    import zstandard
    from pyarrow import parquet

    blob = write_jsonl(tmp_path / "d.jsonl", texts[:30]).read_bytes()
    if name == "d.parquet":
        parquet.write_table(pyarrow.table({"text": texts[:30]}), tmp_path / "whole")
        packed = (tmp_path / "whole").read_bytes()
    else:
        pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}
        packed = pack[name.rpartition(".")[2]](blob)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    assert build(tmp_path / name, tmp_path / "out", "--val-docs", "1") == 2
    assert name in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_fewer_documents_than_asked_for_is_an_error(tmp_path, texts, capsys):
    source = write_jsonl(tmp_path / "d.jsonl", texts[:10])
    for flags in ([], ["--val-docs", "11"], ["--val-docs", "10"]):
        assert build(source, tmp_path / "out", *flags) == 2
        asked = flags[1] if flags else "50,000"
        assert f"10 documents with text, expected more than --val-docs={asked}" in (
            capsys.readouterr().err
        )
    assert not list((tmp_path / "out").iterdir())


def test_too_little_text_for_the_vocabulary_is_an_error(tmp_path, capsys):
    source = write_jsonl(tmp_path / "d.jsonl", ["one", "two", "three"])
    assert build(source, tmp_path / "out", "--val-docs", "1", "--vocab-size", "8192") == 2
    assert "--vocab-size=8,192: the training documents do not give" in capsys.readouterr().err


def test_a_set_is_replaced_only_when_asked_and_then_completely(tmp_path, texts, capsys):
    source = write_jsonl(tmp_path / "d.jsonl", texts[:20])
    assert build(source, tmp_path / "out", "--val-docs", "2", "--shard-tokens", "4000") == 0
    before = contents(tmp_path / "out")
    assert build(source, tmp_path / "out", "--val-docs", "2") == 2
    assert "already contains a set" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert build(source, tmp_path / "out", "--val-docs", "2", "--replace") == 0
    assert sorted(contents(tmp_path / "out")) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
        "manifest.json",
        "tokenizer.model",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [("d.txt", "expected .jsonl"), ("gone.jsonl", "no such file"), ("d.parquet", "columns body")],
)
def test_a_source_of_another_kind_is_refused(tmp_path, capsys, name, words):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "d.txt").write_text("{}")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "d.parquet")
    assert build(tmp_path / name, tmp_path / "out") == 2
    assert words in capsys.readouterr().err


def test_a_foreign_tokenizer_is_refused(tmp_path, texts, capsys):
    import io

    import sentencepiece

    source = write_jsonl(tmp_path / "d.jsonl", texts[:20])
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="nmt_nfkc_cf",
        add_dummy_prefix=False,
    )
    (tmp_path / "fold.model").write_bytes(model.getvalue())
    (tmp_path / "junk.model").write_bytes(b"junk")
    for name in ("fold.model", "junk.model"):
        flags = ["--model", str(tmp_path / name)]
        assert build(source, tmp_path / "out", "--val-docs", "1", *flags) == 2
        assert name in capsys.readouterr().err


def test_reading_holds_a_bounded_number_of_batches(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(build_dataset, "BATCH_BYTES", 1 << 12)
    source = write_jsonl(tmp_path / "d.jsonl", texts)
    read = []
    original = build_dataset.read_batches

    def counted(*args):
        for batch in original(*args):
            read.append(batch)
            yield batch

    monkeypatch.setattr(build_dataset, "read_batches", counted)
    flags = [str(source), "--out", "x", *OPTIONS, "--workers", "2"]
    results = build_dataset.encode_all(build_dataset.parse(flags), SAMPLE / "tokenizer.model")
    for taken, _ in enumerate(results, 1):
        assert len(read) - taken <= 3 * 2
    assert len(read) > 50
