"""Section 3: shards are what they say, every window comes once, and every byte is charged once."""

import contextlib
import itertools
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import BOS, documents, tokenize, train_tokenizer, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t
from train_gpt import ByteTable, Config, DataError, Loader, Runtime, ValidationTokens

# --- shards ---


def test_a_shard_is_read_as_it_was_written_without_a_copy(tmp_path):
    tokens = [1, 0, 65535, 256, 7]
    shard = t.read_shard(write_shard(tmp_path / "a.bin", tokens))
    assert shard.tolist() == tokens
    assert shard.dtype == np.uint16
    assert isinstance(shard, np.memmap)
    assert not shard.flags.writeable


def test_a_shard_of_many_gigabytes_opens_without_being_read(tmp_path):
    path, count = tmp_path / "a.bin", 2**31 - 1
    write_shard(path, [], count=count)
    with open(path, "r+b") as file:
        file.truncate(1024 + 2 * count)  # a hole: no disk is used
        file.seek(-2, 2)
        file.write((777).to_bytes(2, "little"))
    shard = t.read_shard(path)
    assert (len(shard), shard[0], shard[-1]) == (count, 0, 777)


def raw(blob):
    return lambda path: path.write_bytes(blob)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write_shard(p, [1, 2], magic=20240521), "not a token shard: expected 1024"),
        (raw(b""), "not a token shard: expected 1024"),
        (raw(b"x"), "not a token shard: expected 1024"),
        (raw(np.array([20240520, 1, 3], "<i4").tobytes()), "not a token shard"),
        (raw(np.array([20240520, 1], ">i4").tobytes() + bytes(1024)), "not a token shard"),
        (lambda p: write_shard(p, [1, 2], version=2), "shard version 2, expected 1"),
        (lambda p: write_shard(p, [1, 2], count=3), "promises 3 tokens, file holds 2;"),
        (lambda p: write_shard(p, [1, 2], count=1), "promises 1 tokens, file holds 2;"),
        (lambda p: write_shard(p, []), "promises 0 tokens, file holds 0;"),
        (lambda p: write_shard(p, [1, 2], count=-2), "promises -2 tokens, file holds 2;"),
        (lambda p: p.write_bytes(write_shard(p, [1]).read_bytes() + b"x"), "file holds 1.5;"),
        (lambda p: p.mkdir(), "Is a directory"),
        (lambda p: None, "No such file or directory"),
        (lambda p: p.symlink_to(p.parent / "gone"), "No such file or directory"),
    ],
)
def test_a_faulty_shard_is_one_clear_data_error_that_names_it(tmp_path, make, message):
    path = tmp_path / "a.bin"
    make(path)
    with pytest.raises(DataError) as caught:
        t.read_shard(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_cut_and_every_changed_header_word_is_found(tmp_path):
    path = write_shard(tmp_path / "a.bin", range(20))
    blob = path.read_bytes()
    for length in (*range(0, 1024, 97), *range(1024, len(blob))):
        path.write_bytes(blob[:length])
        with pytest.raises(DataError):
            t.read_shard(path)
    for place, bit in itertools.product(range(12), range(8)):
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 1 << bit]) + blob[place + 1 :])
        with pytest.raises(DataError):
            t.read_shard(path)


def test_shards_are_found_by_split_and_in_the_order_of_their_numbers(tmp_path):
    names = "train_000010 train_000002 val_000000 train_000000 val_bytes_000000".split()
    for name in names:
        write_shard(tmp_path / f"fineweb_{name}.bin", [1])
    (tmp_path / "fineweb_train_000001.txt").write_text("")
    names = [path.name for path in t.find_shards(tmp_path, "train")]
    assert names == [f"fineweb_train_{n:06}.bin" for n in (0, 2, 10)]
    assert [p.name for p in t.find_shards(tmp_path, "val")] == ["fineweb_val_000000.bin"]


def test_no_shards_are_a_data_error_with_the_folder_and_what_to_do(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [1])
    for folder in (tmp_path, tmp_path / "gone", tmp_path / "fineweb_val_000000.bin"):
        with pytest.raises(DataError) as caught:
            t.find_shards(folder, "train")
        assert str(caught.value).startswith(f"{folder}: no fineweb_train_*.bin there; fetch it")
        assert "SMOKE=1" in str(caught.value)


# --- the loader ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def make_loader(folder, lengths, seq_len=8, seed=0, order="shuffled"):
    """A loader of shards in which no token occurs twice, so a window tells where it lies."""
    paths, ends = [], np.cumsum([0, *lengths])
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        path = folder / f"fineweb_train_{number:06}.bin"
        path.unlink(missing_ok=True)  # another loader may have mapped it
        paths.append(write_shard(path, np.arange(start, stop)))
    size = int(ends[-1])
    return Loader(paths, Config(train_seq_len=seq_len, vocab_size=size, seed=seed, loader=order))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    seq_len=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_an_epoch_cuts_each_shard_from_its_phase_and_gives_each_window_once(
    folder, lengths, seq_len, seed
):
    if max(lengths) <= seq_len:
        lengths = [*lengths, seq_len + 1]
    loader = make_loader(folder, lengths, seq_len, seed)
    first = 0
    for _ in range(3):  # epochs
        found, expected = {}, 0
        while first + expected < loader.epoch_ends[-1] or not expected:
            window = loader.windows(first + expected, 1)[0].astype(int)
            assert (np.diff(window) == 1).all()
            shard = int(np.searchsorted(np.cumsum(lengths), window[0], side="right"))
            start = int(window[0]) - sum(lengths[:shard])
            assert start + seq_len < lengths[shard], "the last target lies in the same shard"
            found.setdefault(shard, []).append(start)
            expected += 1
        for shard, length in enumerate(lengths):
            starts = sorted(found.get(shard, []))
            if length <= seq_len:
                assert not starts
            else:
                assert starts[0] < seq_len
                assert starts == list(range(starts[0], length - seq_len, seq_len))
        first += expected


def test_over_many_epochs_a_shard_is_cut_at_every_phase(folder):
    loader = make_loader(folder, [41, 12], 8)
    phases = [tuple(loader.epoch(number)[0]) for number in range(300)]
    assert {p[0] for p in phases} == set(range(8))
    assert {p[1] for p in phases} == set(range(4))  # 12 tokens hold a window and 3 to spare


def test_epochs_and_seeds_differ_in_order_and_the_same_seed_repeats_it(folder):
    order = {}
    for seed in (1, 2, 1):
        loader = make_loader(folder, [200, 100], 8, seed)
        order.setdefault(seed, []).append(loader.windows(0, 200).tolist())
    assert order[1][0] == order[1][1]
    assert order[1][0] != order[2][0]
    count = loader.epoch_ends[0]
    assert order[1][0][:count] != order[1][0][count : 2 * count]
    starts = [row[0] for row in order[1][0][:count]]
    assert starts != sorted(starts)


def test_any_window_can_be_asked_for_at_any_time(folder):
    order = make_loader(folder, [50, 31], 8).windows(0, 60)
    loader = make_loader(folder, [50, 31], 8)
    for index in (59, 0, 33, 8, 9, 10, 58):  # back and forth over several epochs
        assert loader.windows(index, 1)[0].tolist() == order[index].tolist()
    assert loader.windows(7, 20).tolist() == order[7:27].tolist()
    assert loader.windows(5, 0).shape == (0, 9)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_sequential_loader_gives_the_windows_as_they_stand_again_and_again(tmp_path, seed):
    loader = make_loader(tmp_path, [41, 30, 8], seed=seed, order="sequential")
    starts = [*range(0, 33, 8), *range(41, 41 + 22, 8)]  # the last shard holds no target more
    found = loader.windows(0, 3 * len(starts))
    assert found[:, 0].tolist() == 3 * starts
    assert (np.diff(found.astype(int), axis=1) == 1).all()


def test_a_coprime_loader_walks_each_shard_with_one_stride_and_misses_nothing(tmp_path):
    loader = make_loader(tmp_path, [230, 120, 5], seed=3, order="coprime")
    first, strides = 0, set()
    for number in range(6):
        _, firsts, order = loader.epoch(number)
        assert sorted(order) == list(range(len(order))), "every window once per epoch"
        for low, high in itertools.pairwise(firsts[:2].tolist() + [len(order)]):
            walk = [window - low for window in order if low <= window < high]
            steps = set((np.diff(walk) % (high - low)).tolist())
            assert len(steps) == 1
            assert math.gcd(*steps, high - low) == 1
            strides |= steps
        assert len(set(loader.windows(first, len(order))[:, 0].tolist())) == len(order)
        half = order[: len(order) // 2] < firsts[1]
        share = firsts[1] / len(order)
        assert abs(half.mean() - share) < 0.1, "the shards are interleaved"
        first += len(order)
    assert len(strides) > 3
    other = make_loader(tmp_path, [230, 120, 5], seed=4, order="coprime")
    assert other.windows(0, 30).tolist() != loader.windows(0, 30).tolist()


def ranks(world):
    for rank in range(world):
        runtime = Runtime(Config(), dict(RANK=str(rank), WORLD_SIZE=str(world)))
        runtime.device = torch.device("cpu")
        yield runtime


@pytest.mark.parametrize("rows", [8, 5])
@pytest.mark.parametrize("first", [0, 13])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(folder, rows, first):
    loader = make_loader(folder, [90, 40], 8)
    steps = 6
    expected = loader.windows(first, steps * rows).reshape(steps, rows, -1)
    for world in (1, 2, 4, 7):
        parts = []
        for runtime in ranks(world):
            with contextlib.closing(loader.batches(runtime, rows, first)) as batches:
                parts.append(list(itertools.islice(batches, steps)))
        for step in range(steps):
            together = torch.cat([part[step] for part in parts])
            assert together.dtype == torch.int64
            assert together.tolist() == expected[step].tolist()


def test_batches_are_read_ahead_and_given_in_order(folder, rt):
    loader, asked = make_loader(folder, [90], 8), []
    windows = loader.windows
    loader.windows = lambda first, count: asked.append(first) or windows(first, count)
    alive = threading.active_count()
    with contextlib.closing(loader.batches(rt, 2)) as batches:
        for step in range(4):
            assert next(batches).tolist() == windows(2 * step, 2).tolist()
        assert threading.active_count() == alive + 1
    assert threading.active_count() == alive
    assert asked == list(range(0, 2 * len(asked), 2))
    assert len(asked) == 4 + loader.PREFETCH_STEPS


def test_training_shards_shorter_than_a_window_are_a_data_error(folder):
    assert make_loader(folder, [8, 9], 8).windows(0, 1).tolist() == [list(range(8, 17))]
    with pytest.raises(DataError, match=r"no training shard is longer than .*TRAIN_SEQ_LEN=8;"):
        make_loader(folder, [8, 3], 8)


def test_a_foreign_token_in_a_training_shard_is_a_data_error_that_names_the_shard(folder):
    loader = make_loader(folder, [9, 9], 8)
    loader.windows(0, 2)
    loader.vocab_size = 17
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin: token id 17, .*SIZE=17;"):
        loader.windows(0, 2)


def test_a_fault_found_while_reading_ahead_reaches_the_trainer(folder, rt):
    loader = make_loader(folder, [99], 8)
    loader.vocab_size = 17
    with (
        contextlib.closing(loader.batches(rt, 12)) as batches,
        pytest.raises(DataError, match="token id"),
    ):
        next(batches)


def test_training_shards_stay_on_disk(folder):
    loader = make_loader(folder, [90, 40], 8)
    assert all(isinstance(shard, np.memmap) for shard in loader.shards)


# --- bytes ---

SPITEFUL = [
    *" abzAZ09.'\t\n\r\v\f\x00\x1f\x7f\x85\u00a0\u00ad\u2028\u3000\u200b\u200d\u200e\ufeff",
    *"\u2581\u00a8\u00b4\u0301\u0308\u0323\u1e9b\uff9e\uff76\ufb01\u2460\u0130\ufdfa\ufffd\u2047",
    *"\ue000\uffff\U0010ffff\U0001f468\U0001f469\u00e9\u6771",
    *(
        "  ",
        "\u2581\u2581",
        " \u2581",
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<0x41>",
        "the cat",
        " dog",
    ),
]
ANY_TEXT = st.one_of(
    st.lists(st.sampled_from(SPITEFUL), max_size=12).map("".join), st.text(max_size=20)
)
# Unlike the field's tokenizers, but counted right by the field's rules all the same.
HARMLESS = {
    "field": {},
    "case folding": dict(normalization_rule_name="nmt_nfkc_cf"),
    "space before all": dict(add_dummy_prefix=True),
    "space before all, none removed": dict(add_dummy_prefix=True, remove_extra_whitespaces=False),
    "unigram": dict(model_type="unigram"),
    "symbols": dict(user_defined_symbols=["<foo>", "\n", "cat", "\ue000"]),
}


@pytest.fixture(scope="module", params=HARMLESS)
def harmless(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "harmless.model"
    train_tokenizer(path, documents(300, seed=0), **HARMLESS[request.param])
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return model, ByteTable.from_file(path, model.vocab_size())


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=3))
def test_documents_are_charged_the_bytes_that_their_tokens_decode_to(harmless, texts):
    model, table = harmless
    encoded = [model.encode(text) for text in texts]
    stream = np.array([id for ids in encoded for id in (BOS, *ids)], np.uint16)
    assert table.charge(stream).sum() == sum(len(model.decode(ids).encode()) for ids in encoded)


def test_clean_text_is_charged_its_own_bytes(dataset):
    table = ByteTable.from_file(dataset / "tokenizer.model", 384)
    model = sentencepiece.SentencePieceProcessor(model_file=str(dataset / "tokenizer.model"))
    texts = documents(50, seed=5)
    stream = np.array([id for text in texts for id in (BOS, *model.encode(text))])
    assert table.charge(stream).sum() == sum(len(text.encode()) for text in texts)
    assert any(model.is_byte(int(id)) for id in stream), "no byte piece was tried"


def test_the_table_follows_the_rules_of_the_field_entry_by_entry(dataset):
    """The rule of this field, one id at a time, in every context."""
    path = dataset / "tokenizer.model"
    table = ByteTable.from_file(path, 384)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    rules = []
    for id in range(384):
        boundary, size, space = True, 0, False
        if model.is_byte(id):
            boundary, size = False, 1
        elif not (model.is_control(id) or model.is_unknown(id) or model.is_unused(id)):
            boundary, piece = False, model.id_to_piece(id)
            space = piece[0] == "\u2581"
            size = len((piece[1:] if space else piece).encode("utf-8"))
        rules.append((boundary, size, space))
    naive = [
        [size + 1 if space and not boundary else size for _, size, space in rules]
        for boundary, _, _ in rules
    ]
    pairs = np.array(list(itertools.product(range(384), repeat=2)), np.uint16)
    charged = [table.charge(np.array([p, q]))[0] for p, q in pairs[::61]]
    assert charged == [naive[p][q] for p, q in pairs[::61]]
    stream = table.charge(pairs.ravel())[::2]  # all pairs at once
    assert stream.tolist() == list(itertools.chain(*naive))
    assert naive[5][BOS] == 0


# Tokenizers under which the rule would charge other bytes than the text has.
MISCOUNTING = {
    "no byte fallback": (dict(byte_fallback=False), "byte fallback"),
    "leading spaces kept": (dict(remove_extra_whitespaces=False), "' a' is miscounted"),
    "no normalisation": (dict(normalization_rule_name="identity"), "a' is miscounted"),
    "nfkc alone": (dict(normalization_rule_name="nfkc"), "a' is miscounted"),
    "spaces at the end": (dict(treat_whitespace_as_suffix=True), "a space past its beginning"),
    "pieces of several words": (dict(split_by_whitespace=False), "a space past its beginning"),
    "words, no letters": (dict(model_type="word", byte_fallback=False), "bare space"),
    "its own mark as a symbol": (dict(user_defined_symbols=["\u2581"]), "is miscounted"),
    "no BOS": (dict(bos_id=-1, eos_id=1, unk_id=2), "its BOS is -1, expected 1"),
    "another BOS": (dict(bos_id=2, eos_id=1), "its BOS is 2, expected 1"),
    "BOS that can be typed": (dict(user_defined_symbols=["<s>"]), "its BOS is -1, expected 1"),
}


@pytest.mark.parametrize("name", MISCOUNTING)
def test_a_tokenizer_that_would_break_the_count_is_refused(name, tmp_path):
    options, reason = MISCOUNTING[name]
    texts = documents(100, seed=0) + ["in the house"] * 300
    path = train_tokenizer(tmp_path / "bad.model", texts, **options)
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    with pytest.raises(DataError) as caught:
        ByteTable.from_file(path, size)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "bytes would be counted wrong" in str(caught.value)


def test_a_tokenizer_that_rewrites_what_it_decodes_is_refused(tmp_path):
    (tmp_path / "rules.tsv").write_text("7A\t7A 7A\n")  # z becomes zz
    path = tmp_path / "bad.model"
    train_tokenizer(path, denormalization_rule_tsv=str(tmp_path / "rules.tsv"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert model.decode(model.encode("z")) == "zz"
    with pytest.raises(DataError, match="bytes would be counted wrong"):
        ByteTable.from_file(path, model.vocab_size())


def test_a_file_that_is_no_tokenizer_or_another_one_is_a_data_error(dataset, tmp_path):
    tokenizer = dataset / "tokenizer.model"
    with pytest.raises(DataError, match="384 pieces, expected VOCAB_SIZE=1024; set TOKENIZER_PATH"):
        ByteTable.from_file(tokenizer, 1024)
    with pytest.raises(DataError, match="No such file or directory: the tokenizer; fetch"):
        ByteTable.from_file(tmp_path / "gone.model", 384)
    for number, blob in enumerate((b"", b"no model", tokenizer.read_bytes()[:1000])):
        path = tmp_path / f"{number}.model"
        path.write_bytes(blob)
        with pytest.raises(DataError) as caught:
            ByteTable.from_file(path, 384)
        assert str(caught.value).startswith(f"{path}: ")


def test_bytes_as_tokens_are_charged_one_each_and_their_controls_nothing(tmp_path):
    path = tmp_path / "fineweb_pure_byte_260.json"
    path.write_text('{"tokenizer_type": "pure_byte", "vocab_size": 260}')
    table = ByteTable.from_file(path, 260)
    text = "z\u0142oty \u2581 \U0001f600\x00".encode()
    stream = np.array([BOS, *(4 + byte for byte in text), 2, BOS, 0, 3, 259], np.uint16)
    assert table.charge(stream).tolist() == [1] * len(text) + [0, 0, 0, 0, 1]
    with pytest.raises(DataError, match="expected the byte260 tokenizer and VOCAB_SIZE=260"):
        ByteTable.from_file(path, 1024)
    path.write_text('{"tokenizer_type": "bpe"}')
    with pytest.raises(DataError, match="expected the byte260 tokenizer"):
        ByteTable.from_file(path, 260)


# --- validation text ---


@pytest.fixture
def table():
    """A vocabulary of 100 in which token i has i bytes."""
    sizes = np.arange(100, dtype=np.int16)
    return ByteTable(sizes, np.zeros(100, bool), sizes < 4, "digest")


def val_shards(tmp_path, *parts):
    return [write_shard(tmp_path / f"fineweb_val_{i:06}.bin", p) for i, p in enumerate(parts)]


@pytest.mark.parametrize(
    ("count", "seq_len", "limit", "kept"),
    [
        (41, 8, 0, 40),  # 40 targets: five windows
        (40, 8, 0, 32),  # 39 targets: four windows and a tail of 7
        (9, 8, 0, 8),
        (8, 8, 0, 7),  # shorter than a window: kept whole
        (2, 8, 0, 1),
        (41, 8, 10, 10),  # a limit is exact
        (41, 8, 3, 3),
        (41, 8, 39, 39),
    ],
)
def test_whole_windows_of_the_validation_text_are_kept(
    tmp_path, table, count, seq_len, limit, kept
):
    tokens = [BOS, *(4 + i % 90 for i in range(count - 1))]
    val = ValidationTokens.load(
        val_shards(tmp_path, tokens[:1], tokens[1:]), table, seq_len=seq_len, limit=limit
    )
    if not limit and count > seq_len:
        assert kept == (count - 1) // seq_len * seq_len  # whole windows
    assert val.tokens.tolist() == tokens[: kept + 1]
    assert val.target_bytes.tolist() == tokens[1 : kept + 1]
    assert val.dropped == count - 1 - kept
    assert val.tokenizer_sha256 == "digest"


def test_a_limit_beyond_the_text_changes_nothing(tmp_path, table):
    paths = val_shards(tmp_path, [BOS, *range(4, 43)])
    unlimited = ValidationTokens.load(paths, table, seq_len=8)
    generous = ValidationTokens.load(paths, table, seq_len=8, limit=10**9)
    assert len(generous.tokens) == len(unlimited.tokens)


def test_documents_are_decoded_to_the_texts_they_were_encoded_from(dataset):
    texts = documents(30, seed=6)
    tokens = np.array(tokenize(dataset / "tokenizer.model", texts), np.uint16)
    expected = [text.encode() for text in texts]
    assert list(t.decode_documents(tokens, dataset / "tokenizer.model")) == expected
    model = sentencepiece.SentencePieceProcessor(model_file=str(dataset / "tokenizer.model"))
    cut = tokens[4:]  # of the first document only a part
    first = model.decode(model.encode(texts[0])[3:]).encode()
    assert list(t.decode_documents(cut, dataset / "tokenizer.model")) == [first, *expected[1:]]


def test_documents_of_bytes_are_decoded_to_their_bytes():
    texts = ["z\u0142oty \x00".encode(), b"", bytes(range(256))]
    stream = np.array([id for text in texts for id in (BOS, *(4 + b for b in text))], np.uint16)
    assert list(t.decode_documents(stream, Path("tokenizer.json"))) == texts


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[5, BOS, 6]], "begins with token 5, expected BOS=1"),
        ([[BOS, 99], [100, 5]], r"token id 100, expected ids below VOCAB_SIZE=100"),
        ([[BOS]], "1 validation tokens, expected at least 2"),
        ([[BOS, 5], []], "promises 0 tokens"),
    ],
)
def test_a_faulty_validation_text_is_a_data_error(tmp_path, table, parts, message):
    with pytest.raises(DataError, match=message):
        ValidationTokens.load(val_shards(tmp_path, *parts), table, seq_len=8)
