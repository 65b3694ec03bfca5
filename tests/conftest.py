"""What the tests share: a tiny data set, a tiny configuration, and ranks that talk over gloo."""

import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # the kernels run in Triton's interpreter; before Triton loads
    os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train_gpt import BOS, Config, Runtime  # noqa: E402

torch.set_num_threads(1)  # the models are tiny; two threads would mostly wait for each other
# The options of the public SP tokenizers.
TOKENIZER_OPTIONS = dict(
    vocab_size=384,
    model_type="bpe",
    character_coverage=0.999,
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="nmt_nfkc",
    add_dummy_prefix=False,
    hard_vocab_limit=False,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
)


def pytest_collection_modifyitems(items: list) -> None:
    """The file with the longest test first: what two cores share must not end by waiting for it."""
    items.sort(key=lambda item: "test_sample_run" not in item.nodeid)


def documents(count: int, seed: int) -> list[str]:
    """Made-up text with words, numbers, capitals, and letters too rare for the vocabulary."""
    draw = random.Random(seed)
    words = "the a cat dog bird sees hears old young river house of in and walked to under".split()
    rare = ["caf\u00e9", "\u6771\u4eac", "\U0001f600", "na\u00efve", "z\u0142oty"]
    texts = []
    for _ in range(count):
        sentences = []
        for _ in range(draw.randint(1, 6)):
            chosen = draw.choices(words, k=draw.randint(3, 12))
            chosen += draw.choices([str(draw.randint(0, 2030)), *rare], k=draw.random() < 0.2)
            sentences.append(" ".join(chosen).capitalize() + ".")
        texts.append(" ".join(sentences))
    return texts


def train_tokenizer(path: Path, texts: list[str] | None = None, **options) -> Path:
    """Train a SentencePiece model with the options of the public sets, or others."""
    import sentencepiece

    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts or documents(1000, seed=0)),
        model_writer=blob,
        minloglevel=2,
        **(TOKENIZER_OPTIONS | options),
    )
    path.write_bytes(blob.getvalue())
    return path


def tokenize(tokenizer: Path, texts: list[str]) -> list[int]:
    """BOS and pieces of each document."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return [token for text in texts for token in (BOS, *model.encode(text))]


def write_shard(path: Path, tokens, **header: int) -> Path:
    """Write a shard; header may lie about magic, version or count."""
    words = np.zeros(256, "<i4")
    words[:3] = 20240520, 1, len(tokens)
    for place, name in enumerate(("magic", "version", "count")):
        words[place] = header.get(name, words[place])
    path.write_bytes(words.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A folder with tokenizer.model (384 pieces), 20,000+ training and 2,000+ validation tokens."""
    folder = tmp_path_factory.mktemp("dataset")
    tokenizer = train_tokenizer(folder / "tokenizer.model")
    for split, count in (("train", 1000), ("val", 100)):
        tokens = tokenize(tokenizer, documents(count, seed=count))
        write_shard(folder / f"fineweb_{split}_000000.bin", tokens)
    return folder


def tiny_settings(dataset: Path, folder: Path) -> dict[str, str]:
    """Environment variables of a run of seconds: 11 layers, 32 wide; logs in folder / "logs"."""
    values = dict(
        SMOKE=1,
        DATA_PATH=dataset,
        TOKENIZER_PATH=dataset / "tokenizer.model",
        LOG_DIR=folder / "logs",
        VOCAB_SIZE=384,
        MODEL_DIM=32,
        NUM_HEADS=4,
        NUM_KV_HEADS=2,
        ROPE_DIMS=4,
        TRAIN_SEQ_LEN=32,
        ROPE_TRAIN_SEQ_LEN=32,
        EVAL_SEQ_LEN=32,
        EVAL_STRIDE=8,
        TRAIN_BATCH_TOKENS=256,
        MICRO_BATCH_TOKENS=128,
        VAL_TOKENS=500,
        ITERATIONS=6,
        WARMUP_STEPS=1,
        MAX_WALLCLOCK_SECONDS=0,
        GPTQ_CALIBRATION_BATCHES=2,
        TTT_CHUNK_TOKENS=128,
    )
    return {name: str(value) for name, value in values.items()}


@pytest.fixture
def tiny_env(dataset, tmp_path) -> dict[str, str]:
    return tiny_settings(dataset, tmp_path)


@pytest.fixture
def tiny_cfg(tiny_env) -> Config:
    return Config.from_env(tiny_env, cuda=False)


@pytest.fixture
def rt() -> Runtime:
    """One process on the CPU; its log is silent."""
    runtime = Runtime(Config(compute_dtype="float32", compile="0"), {})
    runtime.device = torch.device("cpu")  # also where there is a GPU
    return runtime


def gloo(world_size: int, function, *args, timeout: float = 120.0) -> list:
    """Run function(rt, *args) on gloo ranks; returns their results by rank.

    `function` is defined at a test module's top level; arguments and results can be pickled. A rank
    that raises, or a run past the timeout, fails the test.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "train_gpt"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, ranks = [], []
    for rank in range(world_size):
        here, there = context.Pipe(duplex=False)
        env = dict(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        ranks.append(context.Process(target=gloo_rank, args=(there, env, function, args)))
        ranks[-1].start()
        there.close()
        pipes.append(here)
    deadline, results = time.monotonic() + timeout, [None] * world_size
    waiting = dict(zip(pipes, range(world_size), strict=True))
    try:
        while waiting:  # whichever rank answers first: the others may wait for one that failed
            ready = multiprocessing.connection.wait(waiting, max(deadline - time.monotonic(), 0))
            assert ready, f"ranks {sorted(waiting.values())} hang"
            for pipe in ready:
                rank = waiting.pop(pipe)
                error, results[rank] = pickle.loads(pipe.recv_bytes())
                assert not error, f"rank {rank} failed\n{error}"
    finally:
        for process in ranks:
            process.join(0 if waiting else 10)
            process.kill()
    return results


def gloo_rank(pipe, env: dict[str, str], function, args) -> None:
    """The main function of one rank."""
    os.environ.update(env, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    try:
        with Runtime(Config(compute_dtype="float32", compile="0"), env) as rt:
            result = function(rt, *args)
        answer = "", result
    except BaseException:
        answer = traceback.format_exc(), None
    pipe.send_bytes(pickle.dumps(answer))  # whole: Pipe.send would share a tensor's memory
