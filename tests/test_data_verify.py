"""data/verify_dataset.py: a clean set passes, and every way to spoil one is found."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import build_dataset  # noqa: E402
import codec  # noqa: E402
import verify_dataset  # noqa: E402
from test_data_build import sample_texts, write_jsonl  # noqa: E402

from train_gpt import BOS, BYTE_OFFSET, find_shards, read_shard, set_fingerprint  # noqa: E402

SAMPLE = ROOT / "data" / "sample"
VAL_DOCUMENTS, SHARD_TOKENS = 9, 20_000


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sample_texts(90)


@pytest.fixture(scope="module")
def clean_sets(tmp_path_factory, texts) -> dict[str, Path]:
    """A plain and a CaseOps set over several shards, and one of raw bytes."""
    folder = tmp_path_factory.mktemp("clean")
    source = write_jsonl(folder / "documents.jsonl", texts)
    kinds = {
        "plain": ["--model", str(SAMPLE / "tokenizer.model")],
        "caseops": ["--vocab-size", "700", "--transform", "caseops"],
        "fused": ["--vocab-size", "700", "--transform", "caseops", "--fuse-markers"],
        "bytes": ["--byte260"],
    }
    for name, extra in kinds.items():
        arguments = [str(source), "--out", str(folder / name), "--val-docs", str(VAL_DOCUMENTS)]
        sizes = ["--shard-tokens", str(SHARD_TOKENS), "--quiet", "--workers", "1"]
        assert build_dataset.main([*arguments, *sizes, *extra]) == 0
    return {name: folder / name for name in kinds}


@pytest.fixture
def copy_of(tmp_path, clean_sets):
    """A function that gives a copy of a clean set, to be spoiled."""

    def copy(name: str, *, manifest: bool = False) -> Path:
        shutil.copytree(clean_sets[name], tmp_path / name)
        (tmp_path / name / "verified.json").unlink(missing_ok=True)
        if not manifest:
            (tmp_path / name / "manifest.json").unlink()
        return tmp_path / name

    return copy


def verify(folder: Path, capsys, *extra: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit status, and {check: (verdict, the rest of its row)}."""
    capsys.readouterr()
    workers = [] if "--workers" in extra else ["--workers", "1"]
    status = verify_dataset.main([str(folder), "--quiet", *workers, *extra])
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        if match := re.match(r"(ok|FAIL|remark) +(\S+(?: \S+)*)  +(.*)", line):
            rows[match[2]] = (match[1].strip(), match[3])
    return status, rows


def failed(rows: dict[str, tuple[str, str]]) -> list[str]:
    return [check for check, (verdict, _) in rows.items() if verdict == "FAIL"]


def write_shard(path: Path, tokens) -> None:
    writer = build_dataset.ShardWriter(path.parent, path.stem.rpartition("_")[0], len(tokens))
    writer.shards = int(path.stem.rpartition("_")[2])
    writer.add(np.asarray(tokens, np.uint16))


def add_training_text(folder: Path, text: str, *, transform: str = "none") -> None:
    """Put one document into the middle of the training tokens, shard lengths as before."""
    made = codec.Codec(codec_file(folder), transform=transform)
    tokens = np.concatenate([read_shard(path) for path in find_shards(folder, "train")])
    starts = np.flatnonzero(tokens == BOS)
    at = starts[len(starts) // 2]
    added = made.encode(made.prepare(text, codec.normalize(text)))
    tokens = np.concatenate([tokens[:at], added, tokens[at:]])
    for path in find_shards(folder, "train"):
        path.unlink()
    for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        part = tokens[start : start + SHARD_TOKENS]
        write_shard(folder / f"fineweb_train_{number:06d}.bin", part)


def codec_file(folder: Path) -> Path:
    return next(folder.glob("tokenizer.*"))


@pytest.mark.parametrize("name", ["plain", "caseops", "fused", "bytes"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_set_just_built_is_clean_and_gets_its_proof(copy_of, capsys, name, workers):
    folder = copy_of(name, manifest=True)
    status, rows = verify(folder, capsys, "--workers", workers)
    assert (status, failed(rows)) == (0, [])
    proof = json.loads((folder / "verified.json").read_text())
    paths = [path for path in folder.glob("fineweb_*.bin")]
    assert proof["fingerprint"] == set_fingerprint(paths, codec_file(folder))


def test_the_sample_is_clean(tmp_path, capsys):
    shutil.copytree(SAMPLE, tmp_path / "sample")
    status, rows = verify(tmp_path / "sample", capsys)
    assert (status, failed(rows)) == (0, [])
    wanted = (SAMPLE / "verified.json").read_text()
    assert (tmp_path / "sample" / "verified.json").read_text() == wanted


@pytest.mark.parametrize("span", [700, 4096, 1 << 20])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("plain", str, "1 exact, 0 with"),
        ("plain", str.upper, "0 exact, 1 with"),
        ("plain", lambda text: " ".join(text), "0 exact, 1 with"),
        ("caseops", str, "1 exact, 0 with"),
        ("caseops", str.swapcase, "0 exact, 1 with"),
        ("bytes", str, "1 exact, 0 with"),
        ("bytes", lambda text: text.lower().replace(" ", "\t\n"), "0 exact, 1 with"),
    ],
)
def test_a_validation_document_in_training_is_found(
    copy_of, capsys, texts, monkeypatch, span, name, change, words
):
    monkeypatch.setattr(verify_dataset, "SPAN_TOKENS", span)
    folder = copy_of(name)
    transform = "caseops" if name == "caseops" else "none"
    add_training_text(folder, change(texts[3]), transform=transform)
    status, rows = verify(folder, capsys)
    assert (status, failed(rows)) == (1, ["held-out documents in training"])
    assert words in rows["held-out documents in training"][1]
    assert not (folder / "verified.json").exists()


def test_a_leak_is_found_wherever_shards_and_spans_cut_it(copy_of, capsys, texts, monkeypatch):
    monkeypatch.setattr(verify_dataset, "SPAN_TOKENS", 1500)
    folder = copy_of("plain")
    made = codec.Codec(codec_file(folder))
    leak = made.encode(codec.normalize(texts[0]))
    other = made.encode(codec.normalize(texts[20]))
    for cut in (1, 2, len(leak) // 2, len(leak) - 1, len(leak)):
        for path in find_shards(folder, "train"):
            path.unlink()
        write_shard(folder / "fineweb_train_000000.bin", np.concatenate([other, leak[:cut]]))
        rest = np.concatenate([leak[cut:], other])
        write_shard(folder / "fineweb_train_000001.bin", rest)
        status, rows = verify(folder, capsys)
        assert (status, failed(rows)) == (1, ["held-out documents in training"]), cut
        assert "fineweb_train_000000.bin token" in rows["held-out documents in training"][1]


def test_a_leak_at_the_very_end_of_training_is_found(copy_of, capsys, texts):
    folder = copy_of("plain")
    made = codec.Codec(codec_file(folder))
    last = find_shards(folder, "train")[-1]
    write_shard(last, np.concatenate([read_shard(last), made.encode(codec.normalize(texts[8]))]))
    status, rows = verify(folder, capsys)
    assert failed(rows) == ["held-out documents in training"]


def test_the_validation_documents_of_another_manifest_are_looked_for_too(
    copy_of, capsys, texts, tmp_path
):
    folder = copy_of("plain")
    canonical = tmp_path / "canonical"
    source = write_jsonl(tmp_path / "all.jsonl", texts)
    more = str(VAL_DOCUMENTS + 11)  # the notorious mistake: fewer held out than the canon says
    flags = ["--val-docs", more, "--byte260", "--quiet", "--workers", "1"]
    assert build_dataset.main([str(source), "--out", str(canonical), *flags]) == 0
    assert verify(folder, capsys)[0] == 0
    status, rows = verify(folder, capsys, "--held-out", str(canonical / "manifest.json"))
    assert (status, failed(rows)) == (1, ["held-out documents in training"])
    assert "11 with other case" in rows["held-out documents in training"][1]


def spoil_flip(folder: Path) -> None:
    path = folder / "fineweb_train_000001.bin"
    blob = bytearray(path.read_bytes())
    blob[5000] ^= 1
    path.write_bytes(blob)


def spoil_cut(folder: Path) -> None:
    path = folder / "fineweb_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_range(folder: Path) -> None:
    tokens = np.array(read_shard(folder / "fineweb_train_000000.bin"))
    tokens[77] = 1024
    write_shard(folder / "fineweb_train_000000.bin", tokens)


def spoil_val_range(folder: Path) -> None:
    tokens = np.array(read_shard(folder / "fineweb_val_000000.bin"))
    tokens[77] = 60_000
    write_shard(folder / "fineweb_val_000000.bin", tokens)


def spoil_eos(folder: Path) -> None:
    tokens = np.array(read_shard(folder / "fineweb_train_000000.bin"))
    tokens[77] = codec.EOS
    write_shard(folder / "fineweb_train_000000.bin", tokens)


def spoil_val_pad(folder: Path) -> None:
    tokens = np.array(read_shard(folder / "fineweb_val_000000.bin"))
    write_shard(folder / "fineweb_val_000000.bin", [*tokens, codec.PAD, codec.PAD])


def spoil_first_bos(folder: Path) -> None:
    tokens = np.array(read_shard(folder / "fineweb_train_000000.bin"))
    write_shard(folder / "fineweb_train_000000.bin", tokens[1:])


def spoil_val_first_bos(folder: Path) -> None:
    tokens = np.array(read_shard(folder / "fineweb_val_000000.bin"))
    write_shard(folder / "fineweb_val_000000.bin", tokens[1:])


def spoil_utf8(folder: Path) -> None:
    tokens = np.array(read_shard(folder / "fineweb_val_000000.bin"))
    tokens[50] = BYTE_OFFSET + 0xFF
    write_shard(folder / "fineweb_val_000000.bin", tokens)


def spoil_tokenizer(folder: Path) -> None:
    """Another model with as many pieces."""
    source = write_jsonl(folder.parent / "other.jsonl", sample_texts(400)[300:])
    out = folder.parent / "other"
    flags = ["--vocab-size", "1024", "--val-docs", "1", "--quiet", "--workers", "1"]
    assert build_dataset.main([str(source), "--out", str(out), *flags]) == 0
    shutil.copy(out / "tokenizer.model", folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("spoil", "checks"),
    [
        (spoil_cut, {"headers and sizes"}),
        (spoil_range, {"training ids"}),
        (spoil_val_range, {"validation ids"}),
        (spoil_eos, {"training structure"}),
        (spoil_val_pad, {"validation structure"}),
        (spoil_first_bos, {"training structure"}),
        (spoil_val_first_bos, {"validation structure"}),
        (spoil_utf8, {"bytes"}),
        (spoil_tokenizer, {"tokenizer"}),
    ],
)
def test_a_spoiled_set_fails_the_check_that_names_the_fault(copy_of, capsys, spoil, checks):
    folder = copy_of("plain")
    assert verify(folder, capsys)[0] == 0
    spoil(folder)
    status, rows = verify(folder, capsys)
    assert status == 1
    assert checks <= set(failed(rows)), rows
    assert not (folder / "verified.json").exists()


@pytest.mark.parametrize("spoil", [spoil_flip, spoil_range, spoil_eos, spoil_tokenizer])
def test_the_manifest_shows_every_changed_file(copy_of, capsys, spoil):
    folder = copy_of("plain", manifest=True)
    spoil(folder)
    status, rows = verify(folder, capsys)
    assert status == 1
    assert "manifest" in failed(rows)


def test_the_manifest_shows_missing_and_added_shards(copy_of, capsys):
    folder = copy_of("plain", manifest=True)
    last = find_shards(folder, "train")[-1]
    last.rename(last.with_name("fineweb_train_000777.bin"))
    _, rows = verify(folder, capsys)
    assert f"{last.name} missing" in rows["manifest"][1]
    assert "fineweb_train_000777.bin unknown" in rows["manifest"][1]


@pytest.mark.parametrize("name", ["caseops", "fused"])
def test_a_sidecar_that_charges_other_bytes_is_found(copy_of, capsys, name):
    folder = copy_of(name, manifest=True)
    path = folder / "fineweb_val_bytes_000000.bin"
    values = np.array(read_shard(path))
    values[100] += 1
    write_shard(path, values)
    _, rows = verify(folder, capsys)
    assert {"bytes", "manifest", "validation counts"} <= set(failed(rows))
    write_shard(path, values[:-1])
    assert "byte sidecar" in failed(verify(folder, capsys)[1])


def test_a_caseops_set_without_its_sidecar_fails(copy_of, capsys):
    folder = copy_of("caseops", manifest=True)
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    assert {"byte sidecar", "manifest"} <= set(failed(verify(folder, capsys)[1]))


@pytest.mark.parametrize(
    ("counts", "verdict", "words"),
    [
        ((8192, "none", 50_000, 40_540_160, 151_000_000), True, "kevclark"),
        ((8192, "caseops", 50_000, 47_851_520, 151_074_499), True, "romeerp"),
        ((8192, "caseops", 50_000, 47_851_520, 164_594_398), False, "resembles"),
        ((8192, "caseops", 10_000, 9_662_464, 30_000_000), False, "resembles"),
        ((8192, "none", 50_000, 40_540_161, 151_000_000), False, "resembles"),
        ((8192, "none", 49_999, 40_539_000, 151_000_000), False, "resembles"),
        ((1024, "none", 50_000, 62_021_632, 151_000_000), True, "willdepueoai"),
        ((1024, "none", 50, 110_000, 265_000), None, "this set only"),
        ((777, "none", 50_000, 40_540_160, 151_000_000), None, "this set only"),
    ],
)
def test_published_sets_are_known_by_their_counts_and_copies_are_not(counts, verdict, words):
    found, expected, said = verify_dataset.recognise(*counts)
    assert said is verdict
    assert words in found + expected


@pytest.mark.parametrize(
    ("kind", "folder", "tokenizer"),
    [
        ("plain", "fineweb10B_sp1024", "fineweb_1024_bpe.model"),
        ("bytes", "fineweb10B_byte260", "fineweb_pure_byte_260.json"),
    ],
)
def test_a_set_in_the_public_layout_is_checked_with_its_tokenizer(
    copy_of, capsys, tmp_path, kind, folder, tokenizer
):
    made = copy_of(kind)
    (tmp_path / "tokenizers").mkdir()
    codec_file(made).rename(tmp_path / "tokenizers" / tokenizer)
    (tmp_path / "datasets").mkdir()
    made.rename(tmp_path / "datasets" / folder)
    assert verify(tmp_path / "datasets" / folder, capsys)[0] == 0


def test_the_fingerprint_follows_content_and_not_folder_or_date(copy_of, tmp_path):
    folder = copy_of("plain")
    paths = sorted(folder.glob("fineweb_*.bin"))
    name = set_fingerprint(paths, codec_file(folder))
    shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    moved = sorted((tmp_path / "moved").glob("fineweb_*.bin"), reverse=True)
    assert set_fingerprint(moved, codec_file(folder)) == name
    assert set_fingerprint(paths[:-1], codec_file(folder)) != name
    spoil_flip(folder)
    assert set_fingerprint(paths, codec_file(folder)) != name


def test_the_fingerprint_of_a_long_shard_reads_part_of_it_but_sees_its_ends(tmp_path):
    path, model = tmp_path / "fineweb_train_000000.bin", tmp_path / "tokenizer.model"
    model.write_bytes(b"model")
    with open(path, "wb") as stream:
        stream.truncate(200_001_024)
    names = {set_fingerprint([path], model)}
    for at in (0, 200_001_023):
        with open(path, "r+b") as stream:
            stream.seek(at)
            stream.write(b"x")
        names.add(set_fingerprint([path], model))
    assert len(names) == 3


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        ("tokenizer.model", "no tokenizer"),
        ("fineweb_val_*.bin", "no fineweb_val_"),
        ("fineweb_train_*.bin", "no fineweb_train_"),
    ],
)
def test_what_cannot_be_checked_ends_with_status_2_and_one_line(copy_of, capsys, remove, words):
    folder = copy_of("plain")
    for path in folder.glob(remove):
        path.unlink()
    assert verify_dataset.main([str(folder), "--quiet"]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1


def test_a_broken_manifest_is_named(copy_of, capsys):
    folder = copy_of("plain", manifest=True)
    for text in ("{", "[]", '{"format": 9, "files": {}, "validation_hashes": []}'):
        (folder / "manifest.json").write_text(text)
        assert verify_dataset.main([str(folder), "--quiet"]) == 2
        assert "manifest.json: " in capsys.readouterr().err
