#!/usr/bin/env python3
"""Train a small GPT for ten minutes, squeeze it into 16,000,000 bytes, score it in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py    # the competition, on 8xH100
    python train_gpt.py                                      # one GPU, or a laptop: one code path
    python train_gpt.py --help                               # every setting, no GPU, no data

Every setting is an environment variable. The file reads in the order the program runs:
Configuration, Runtime, Data, Model, Optimizer, Training, Quantization, Artifact, Evaluation, Main.
Importing it does nothing; torch and numpy are enough to import it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, library, nn

# ---------------------------------------------------------------------------------------------
# 1  Configuration
# A setting is one line of Config; its environment variable is the field's name in capitals. All
# problems are found before anything is loaded, and reported together. Defaults: system #1493.
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: one readable line, exit status 2.

    on_all_ranks: every rank raises it, so that rank 0 can speak for all.
    """

    on_all_ranks = False


class ConfigError(UserError):
    """A setting that cannot be used; says which, what was found and what was expected."""

    on_all_ranks = True


class DataError(UserError):
    """A shard, tokenizer or folder that is not what it should be."""


class ArtifactError(UserError):
    """An artifact that cannot be written, read, or trusted."""


class DivergenceError(UserError):
    """The loss stopped being a number."""

    on_all_ranks = True


class LedgerError(RuntimeError):
    """Scoring broke a rule of the game: our mistake, or somebody's trick. condition: C3 or C4."""

    def __init__(self, condition: str, message: str):
        super().__init__(message)
        self.condition = condition


def knob(default, sentence, *, low=None, high=None, choices=None, model=False) -> Any:
    """Declare one setting.

    Args:
        default: also decides the type: bool, int, float or str.
        sentence: what it sets; its unit in brackets.
        low, high: inclusive range of a number.
        choices: allowed values of a string.
        model: True if a stored model cannot be rebuilt without it; such settings travel in the
        artifact.
    """
    return field(
        default=default,
        metadata=dict(sentence=sentence, low=low, high=high, choices=choices, model=model),
    )


# Limits of the competition, for the program and its tools.
TRAINING_SECONDS = 600.0
EVALUATION_SECONDS = 600.0
TOTAL_BYTES = 16_000_000  # of code and artifact together


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Build it with `Config.from_env`; derived values are properties."""

    # Run
    run_id: str = knob("", "name of the run's files under LOG_DIR; empty: date, time and seed")
    seed: int = knob(1337, "seed of initial weights and data order", low=0, high=2**63 - 1)
    log_dir: str = knob("logs", "folder of the run's log, JSON and artifact")
    smoke: str = knob(
        "auto",
        "small run on the embedded sample; auto: without a GPU, unless a data path or size is set",
        choices=("auto", "0", "1"),
    )
    compile: str = knob("auto", "torch.compile; auto: on CUDA", choices=("auto", "0", "1"))
    compute_dtype: str = knob(
        "auto",
        "type of activations; auto: bfloat16 on CUDA, else float32",
        choices=("auto", "bfloat16", "float32"),
    )
    attention: str = knob(
        "auto",
        "attention kernel; auto: fa3 if installed, else sdpa, PyTorch's own choice",
        choices=("auto", "fa3", "fa4", "cudnn", "flash", "sdpa", "plain"),
    )
    kernels: str = knob(
        "auto",
        "fused Triton kernels; auto: on CUDA, if they agree there with what they replace",
        choices=("auto", "0", "1"),
    )
    artifact: str = knob("", "score this artifact instead of training one")
    checkpoint: str = knob("", "quantize and score this checkpoint instead of training")
    save_checkpoint: bool = knob(False, "keep the float32 weights too, for CHECKPOINT")
    # Data
    data_dir: str = knob("./data", "folder that holds datasets/ and tokenizers/")
    data_path: str = knob("", "folder of the shards; empty: the one of VOCAB_SIZE in DATA_DIR")
    tokenizer_path: str = knob("", "SentencePiece model; empty: the one of VOCAB_SIZE in DATA_DIR")
    loader: str = knob(
        "shuffled", "order of the windows", choices=("shuffled", "sequential", "coprime")
    )
    val_tokens: int = knob(0, "score only so many validation targets, 0: all [tokens]", low=0)
    # Model
    vocab_size: int = knob(8192, "tokens in the vocabulary", low=8, high=65536, model=True)
    num_layers: int = knob(11, "physical layers", low=1, high=256, model=True)
    model_dim: int = knob(512, "width of the residual stream", low=8, model=True)
    num_heads: int = knob(8, "query heads", low=1, model=True)
    num_kv_heads: int = knob(4, "key and value heads; divides NUM_HEADS", low=1, model=True)
    mlp_mult: float = knob(4.0, "hidden width of the MLP over MODEL_DIM", low=0.25, model=True)
    leaky_relu_slope: float = knob(0.5, "of the MLP; 0: relu squared", low=0.0, model=True)
    xsa_last_n: int = knob(11, "so many last layers have XSA", low=0, model=True)
    parallel_residual_start: int = knob(
        7, "first layer in parallel form; NUM_LAYERS: none", low=0, model=True
    )
    parallel_residual_form: str = knob(
        "gptj", "one stream or two", choices=("gptj", "lanes"), model=True
    )
    skip_gates_enabled: bool = knob(True, "skips are mixed by a gate, else added", model=True)
    max_skips: int = knob(256, "most skip connections", low=0, model=True)
    smear_gate_enabled: bool = knob(False, "mix each input with the one before", model=True)
    bigram_vocab_size: int = knob(0, "buckets of the bigram hash, 0: none", low=0, model=True)
    bigram_dim: int = knob(128, "width of the bigram table", low=1, model=True)
    ve_dim: int = knob(0, "width of the value embedding, 0: none", low=0, model=True)
    ve_layers: str = knob("9,10", "layers with the value embedding", model=True)
    loop_start: int = knob(3, "first layer of the loop", low=0, model=True)
    loop_end: int = knob(5, "last layer of the loop", low=0, model=True)
    num_loops: int = knob(2, "extra visits of the looped layers, 0: no loop", low=0, model=True)
    rope_base: float = knob(10000.0, "base of the rotary frequencies", low=1.0, model=True)
    rope_dims: int = knob(16, "dimensions of a head that are rotated; even", low=2, model=True)
    rope_train_seq_len: int = knob(
        2048, "longest text without NTK rescale [tokens]", low=1, model=True
    )
    logit_softcap: float = knob(30.0, "logits stay within plus or minus this", low=1.0, model=True)
    qk_gain_init: float = knob(5.25, "initial gain of the normalised queries")
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial embedding", low=0.0)
    # Training
    iterations: int = knob(20000, "steps at most", low=1)
    max_wallclock_seconds: float = knob(
        TRAINING_SECONDS, "limit of training and calibration, 0: none [s]", low=0.0
    )
    gptq_reserve_seconds: float = knob(
        0.0, "part of that limit kept for calibration and quantization, 0: measured [s]", low=0.0
    )
    train_batch_tokens: int = knob(786432, "tokens of one step, over all ranks [tokens]", low=1)
    train_seq_len: int = knob(2048, "length of a training sequence [tokens]", low=2)
    doc_packing: bool = knob(
        False, "in a training step no position sees another document; scoring reads on"
    )
    micro_batch_tokens: int = knob(
        98304, "most tokens of one forward on one device [tokens]", low=1
    )
    warmup_steps: int = knob(20, "steps per depth plan before the clock, undone", low=0)
    warmdown_frac: float = knob(0.72, "part of training in which rates fall", low=0.0, high=1.0)
    warmdown_iters: int = knob(0, "steps in which rates fall, 0: WARMDOWN_FRAC", low=0)
    min_lr: float = knob(0.0, "floor of the learning-rate multiplier", low=0.0, high=1.0)
    enable_looping_at: float = knob(0.35, "part of training before the loop", low=0.0, high=1.0)
    enable_looping_at_step: int = knob(0, "step of the loop, 0: ENABLE_LOOPING_AT", low=0)
    late_qat_threshold: float = knob(
        0.0, "rate multiplier below which matrices train rounded", low=0.0, high=1.0
    )
    ema_decay: float = knob(0.9965, "decay of the weight average, each step", low=0.0, high=1.0)
    grad_clip_norm: float = knob(0.3, "largest norm of the gradient, 0: any", low=0.0)
    train_log_every: int = knob(500, "steps between two lines of the training log", low=1)
    val_loss_every: int = knob(4000, "steps between two validations, 0: none", low=0)
    # Optimizer
    matrix_lr: float = knob(0.022, "Muon's learning rate", low=0.0)
    muon_momentum: float = knob(0.99, "Muon's momentum", low=0.0, high=1.0)
    muon_momentum_warmup_start: float = knob(0.92, "Muon's momentum at step 0", low=0.0, high=1.0)
    muon_momentum_warmup_steps: int = knob(1500, "steps until MUON_MOMENTUM", low=0)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", low=1)
    muon_row_normalize: bool = knob(True, "divide each row of an update by its norm (MuonEq-R)")
    muon_wd: float = knob(0.095, "Muon's decoupled weight decay", low=0.0)
    tied_embed_lr: float = knob(0.03, "AdamW's learning rate of the embedding", low=0.0)
    embed_wd: float = knob(0.085, "AdamW's weight decay of the embedding", low=0.0)
    scalar_lr: float = knob(0.02, "AdamW's learning rate of vectors and scalars", low=0.0)
    adam_wd: float = knob(0.02, "AdamW's weight decay of vectors and scalars", low=0.0)
    beta1: float = knob(0.9, "AdamW's first beta", low=0.0, high=1.0)
    beta2: float = knob(0.95, "AdamW's second beta", low=0.0, high=1.0)
    adam_eps: float = knob(1e-8, "AdamW's epsilon", low=0.0)
    # Fine-tuning on the validation text before quantization: never in a record
    prequant_ttt_epochs: int = knob(0, "epochs over the validation text, 0: none", low=0)
    prequant_ttt_lr: float = knob(4.5e-4, "its learning rate in the first epoch", low=0.0)
    prequant_ttt_freeze_blocks: int = knob(1, "so many first layers stay as they are", low=0)
    prequant_ttt_batch_tokens: int = knob(524288, "tokens of a step [tokens]", low=1)
    # Quantization and artifact
    gptq_calibration_batches: int = knob(64, "batches, each an eighth of TRAIN_BATCH_TOKENS", low=1)
    matrix_bits: int = knob(6, "width of a matrix entry [bits]", low=2, high=8)
    matrix_clip_sigmas: float = knob(
        12.85, "half the range of a row, in its standard deviations", low=0.1
    )
    embed_bits: int = knob(8, "width of an embedding entry [bits]", low=2, high=8)
    embed_clip_sigmas: float = knob(
        20.0, "half the range of a row, in its standard deviations", low=0.1
    )
    clip_rule: str = knob("sigmas", "how a row's range is found", choices=("sigmas", "percentile"))
    scale_floor: bool = knob(False, "a row's step is at least 1 over the largest code")
    gptq_order: str = knob(
        "descending", "columns by their Hessian's diagonal", choices=("descending", "ascending")
    )
    embed_quantizer: str = knob("gptq", "of the embedding", choices=("gptq", "nearest"))
    int8_sensitive: str = knob("", "matrices with one of these words get EMBED_BITS; by commas")
    control_dtype: str = knob(
        "float16", "stored vectors and scalars", choices=("float16", "float32")
    )
    fit_rule: str = knob(
        "tightest", "what makes an artifact fit", choices=("tightest", "wider", "prune")
    )
    compressor: str = knob("brotli", "of the artifact", choices=("brotli", "zstd", "lzma"))
    artifact_limit_bytes: int = knob(
        TOTAL_BYTES, "limit of code and artifact together [bytes]", low=1
    )
    # Evaluation
    eval_seq_len: int = knob(2048, "length of a scoring window [tokens]", low=2)
    eval_stride: int = knob(64, "targets scored per window [tokens]; at most EVAL_SEQ_LEN", low=1)
    sliding_window_enabled: bool = knob(True, "score with sliding windows too")
    ttt_enabled: bool = knob(True, "score with test-time training too")
    ttt_lr: float = knob(0.005, "learning rate of test-time training at the first chunk", low=0.0)
    ttt_epochs: int = knob(3, "steps over each scored chunk", low=1)
    ttt_momentum: float = knob(0.9, "momentum of test-time training", low=0.0, high=1.0)
    ttt_optimizer: str = knob("sgd", "of test-time training", choices=("sgd", "adamw"))
    ttt_train_chunks: int = knob(0, "only so many first chunks adapt, 0: all", low=0)
    ttt_freeze_blocks: int = knob(0, "so many first layers stay as they are", low=0)
    ttt_freeze_embeddings: bool = knob(False, "embeddings stay as they are")
    ttt_ema_decay: float = knob(0.0, "score with an average, 0: without", low=0.0, high=1.0)
    ttt_grad_clip: float = knob(1.0, "largest gradient norm of test-time training", low=0.0)
    ttt_chunk_tokens: int = knob(32768, "targets scored before each adaptation [tokens]", low=1)
    eval_wallclock_seconds: float = knob(
        EVALUATION_SECONDS,
        "limit from reading the artifact to the last score, 0: none [s]",
        low=0.0,
    )
    # Audit
    audit: bool = knob(False, "prove the score of ARTIFACT legal instead of scoring it")
    audit_tokens: int = knob(768, "targets that it scores again and again [tokens]", low=64)
    # Where the values came from (`default`, `smoke`, `environment`, `artifact`); not settings.
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str], *, cuda: bool) -> Config:
        """Read the settings from a mapping of environment variables.

        Args:
            env: normally os.environ; WORLD_SIZE is read too, to check that the batch divides.
            cuda: whether a CUDA device will be used; decides SMOKE=auto.
        Raises: ConfigError that lists every problem, one line each.
        """
        problems, warnings = unknown_variables(env)
        given = {}
        for setting in knobs():
            text = env.get(setting.name.upper())
            for alias in (a for a, name in ALIASES.items() if name == setting.name and a in env):
                if text is not None and text != env[alias]:
                    problems.append(
                        f"{alias}={env[alias]} and {setting.name.upper()}={text} are one "
                        "setting with two values; set one of them"
                    )
                text = env[alias]
            if text is not None:
                try:
                    given[setting.name] = parse_value(setting, text)
                except ValueError as error:
                    problems.append(f"{setting.name.upper()}={text}: {error}")
        smoke = given.get("smoke", "auto")
        if smoke == "1" or (smoke == "auto" and not cuda and not SMOKE_BLOCKERS & given.keys()):
            values = SMOKE | given
        else:
            values = given
        sources = {
            s.name: "environment" if s.name in given else "smoke" if s.name in values else "default"
            for s in knobs()
        }
        cfg = cls(**values, sources=sources, warnings=tuple(warnings))
        problems += cfg.conflicts(world_size=int(env.get("WORLD_SIZE", "1")))
        if problems:
            raise ConfigError("\n".join(problems))
        return cfg

    def conflicts(self, world_size: int = 1) -> list[str]:
        """Rules between settings that this configuration breaks, one readable line each."""
        problems = []

        def expect(setting: str, holds: bool, expected: str) -> None:
            if not holds:
                value = getattr(self, setting)
                problems.append(f"{setting.upper()}={value}: expected {expected}")

        heads, limit = self.num_heads, self.max_wallclock_seconds
        head_dim = self.model_dim // heads
        rows, rest = divmod(self.train_batch_tokens, self.train_seq_len)
        trains = not self.artifact
        longest = max(self.train_seq_len * trains, self.eval_seq_len)
        expect("model_dim", self.model_dim % heads == 0, f"a multiple of NUM_HEADS={heads}")
        expect("num_kv_heads", heads % self.num_kv_heads == 0, f"a divisor of NUM_HEADS={heads}")
        fits = self.rope_dims % 2 == 0 and self.rope_dims <= head_dim
        expect("rope_dims", fits, f"an even number up to the head width {head_dim}")
        if self.num_loops:
            last = self.num_layers - 1
            expect("loop_end", self.loop_end <= last, f"at most {last}; NUM_LOOPS=0: no loop")
            expect("loop_start", self.loop_start <= self.loop_end, f"at most {self.loop_end}")
        whole = not trains or (rest == 0 and rows % world_size == 0)
        share = f"whole sequences of {self.train_seq_len}, equally many for {world_size} ranks"
        expect("train_batch_tokens", whole, share)
        expect("micro_batch_tokens", self.micro_batch_tokens >= longest, f"at least {longest}")
        expect("eval_stride", self.eval_stride <= self.eval_seq_len, f"at most {self.eval_seq_len}")
        fits = not self.ttt_enabled or self.ttt_chunk_tokens >= self.eval_seq_len
        expect("ttt_chunk_tokens", fits, f"at least EVAL_SEQ_LEN={self.eval_seq_len}")
        fits = not limit or self.gptq_reserve_seconds < limit
        expect("gptq_reserve_seconds", fits, f"less than MAX_WALLCLOCK_SECONDS={limit:g}")
        inside = not self.ve_dim or all(layer < self.num_layers for layer in self.value_layers)
        expect("ve_layers", inside, f"layers below NUM_LAYERS={self.num_layers}, by commas")
        fits = self.clip_rule == "sigmas" or self.fit_rule == "prune"
        expect("fit_rule", fits, "prune, as CLIP_RULE=percentile has no wider ranges")
        alike = not (self.int8_sensitive and self.late_qat_threshold)
        expect("int8_sensitive", alike, "nothing: LATE_QAT_THRESHOLD rounds all to MATRIX_BITS")
        expect("bigram_vocab_size", self.bigram_vocab_size != 1, "0, or at least 2")
        code = code_bytes()
        expect(
            "artifact_limit_bytes",
            self.artifact_limit_bytes > code,
            f"more than the code's own {code}",
        )
        expect("checkpoint", not (self.artifact and self.checkpoint), "nothing beside ARTIFACT")
        expect("audit", not self.audit or bool(self.artifact), "ARTIFACT, the file to audit")
        expect("audit", not self.audit or world_size == 1, "one process, without torchrun")
        name = re.fullmatch(r"[\w.+=-]*", self.run_id)
        expect("run_id", bool(name), "letters, digits and ._+=- for a file name")
        return problems

    @property
    def dataset_dir(self) -> Path:
        variant = "byte260" if self.vocab_size == 260 else f"sp{self.vocab_size}"
        default = Path(self.data_dir) / "datasets" / f"fineweb10B_{variant}"
        return Path(self.data_path) if self.data_path else default

    @property
    def tokenizer_file(self) -> Path:
        pure_byte, bpe = "fineweb_pure_byte_260.json", f"fineweb_{self.vocab_size}_bpe.model"
        default = (
            Path(self.data_dir) / "tokenizers" / (pure_byte if self.vocab_size == 260 else bpe)
        )
        return Path(self.tokenizer_path) if self.tokenizer_path else default

    @property
    def mlp_hidden(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Layers whose values get the value embedding; none without VE_DIM."""
        words = self.ve_layers.split(",") if self.ve_dim else []
        return tuple(int(word) if word.strip().isdigit() else sys.maxsize for word in words)

    @property
    def train_seconds(self) -> float:
        """Time for training steps alone; infinite without a limit."""
        limit = self.max_wallclock_seconds
        return limit - self.gptq_reserve_seconds if limit else math.inf

    def micro_batches(self, world_size: int) -> int:
        """Forwards per step and rank: the fewest equal ones that fit MICRO_BATCH_TOKENS."""
        rows = self.train_batch_tokens // self.train_seq_len // world_size
        most = self.micro_batch_tokens // self.train_seq_len
        return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)

    def model_settings(self) -> dict[str, Any]:
        """The settings that a stored model cannot be rebuilt without."""
        return {s.name: getattr(self, s.name) for s in knobs() if s.metadata["model"]}

    def with_model(self, settings: Mapping[str, Any], origin: str) -> Config:
        """This configuration with the model of a stored file.

        Raises: ConfigError if the environment asks for another model than the file holds.
        """
        wrong = [
            f"{name.upper()}={getattr(self, name)}: {origin} holds a model with {value}; unset it"
            for name, value in settings.items()
            if self.sources.get(name) == "environment" and getattr(self, name) != value
        ]
        sources = dict(self.sources) | dict.fromkeys(settings, "artifact")
        cfg = dataclasses.replace(self, **settings, sources=sources)
        if wrong or cfg.conflicts():
            raise ConfigError("\n".join(wrong or cfg.conflicts()))
        return cfg


# Relative to where the program starts, so that a log does not tell whose machine it came from.
SAMPLE_DIR = Path(os.path.relpath(Path(__file__).resolve().parent / "data" / "sample"))
# The small run: the same pipeline and wiring, narrow enough to finish in minutes on two CPU cores.
SMOKE = dict(
    data_path=str(SAMPLE_DIR),
    tokenizer_path=str(SAMPLE_DIR / "tokenizer.model"),
    vocab_size=1024,
    model_dim=64,
    num_heads=4,
    num_kv_heads=2,
    qk_gain_init=2.5,
    train_seq_len=256,
    rope_train_seq_len=256,
    eval_seq_len=256,
    train_batch_tokens=1024,
    micro_batch_tokens=4096,
    max_wallclock_seconds=90.0,
    warmup_steps=1,
    ema_decay=0.97,
    muon_momentum=0.9,
    muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=100,
    train_log_every=50,
    ttt_chunk_tokens=8192,
)
SMOKE_BLOCKERS = frozenset(
    "data_dir data_path tokenizer_path vocab_size num_layers model_dim num_heads num_kv_heads "
    "mlp_mult train_seq_len train_batch_tokens".split()
)
# Two names for one setting, in use by different scripts of this field.
ALIASES = {
    "PARALLEL_START_LAYER": "parallel_residual_start",
    "GPTQ_CALIB_BATCHES": "gptq_calibration_batches",
    "RECUR_START_STEP": "enable_looping_at_step",
}
# Names that other scripts of this field print or read, and what to do instead.
RETIRED = {
    "VAL_BATCH_TOKENS": "MICRO_BATCH_TOKENS sizes every forward, in training and in scoring",
    "EMBED_LR": "the embedding is tied; set TIED_EMBED_LR",
    "HEAD_LR": "the head is tied to the embedding; set TIED_EMBED_LR",
    "MUON_BETA2": "it never had an effect; unset it",
}
# A variable that begins with one of these and is no setting must be a mistake.
FAMILIES = tuple(
    "ADAM_ BIGRAM_ EMA_ EMBED_ EVAL_ GPTQ_ LOOP_ MATRIX_ MUON_ PREQUANT_ QK_ ROPE_ SCALAR_ "
    "SLIDING_ TIED_ TRAIN_ TTT_ VAL_ VE_ WARMDOWN_ WARMUP_ XSA_".split()
)


@functools.cache
def knobs() -> tuple[dataclasses.Field, ...]:
    """The fields of Config that are settings, in order."""
    return tuple(f for f in dataclasses.fields(Config) if "sentence" in f.metadata)


def unknown_variables(env: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Variables that look meant for us and are no setting: (problems, warnings)."""
    known = {s.name.upper() for s in knobs()} | set(ALIASES)
    problems, warnings = [], []
    for name in sorted(set(env) - known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        hint = f"; did you mean {near[0]}?" if near else ""
        if name in RETIRED:
            problems.append(f"{name}: not a setting here: {RETIRED[name]}")
        elif name.startswith(FAMILIES):
            problems.append(f"{name}: not a setting{hint or '; see --help'}")
        elif near:
            warnings.append(f"{name} is not a setting and is ignored{hint}")
    return problems, warnings


def parse_value(setting: dataclasses.Field, text: str) -> Any:
    """The value of a setting from its text. Raises ValueError that says what was expected."""
    kind, meta = type(setting.default), setting.metadata
    if kind is bool:
        if text.lower() not in ("0", "1", "false", "true"):
            raise ValueError("expected 0 or 1")
        return text.lower() in ("1", "true")
    if kind is str:
        if meta["choices"] and text not in meta["choices"]:
            raise ValueError(f"expected one of {', '.join(meta['choices'])}")
        return text
    try:
        value = kind(text)
        finite = math.isfinite(value)
    except (ValueError, OverflowError):
        value, finite = math.nan, False
    low, high = meta["low"], meta["high"]
    in_range = (low is None or value >= low) and (high is None or value <= high)
    if not (finite and in_range):
        noun = "a whole number" if kind is int else "a number"
        raise ValueError(f"expected {noun}{describe_range(setting)}")
    return value


def describe_range(setting: dataclasses.Field) -> str:
    """`` from 1 to 8``, `` of at least 1``, `` one of a, b``, or nothing."""
    low, high, choices = (setting.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        return f" one of {', '.join(choices)}"
    if low is not None:
        return f" from {low} to {high}" if high is not None else f" of at least {low}"
    return ""


def help_text() -> str:
    """Every setting: name, default, range, sentence. What `--help` prints."""
    lines = [__doc__.strip(), "", "Settings (variable, default, range, meaning):", ""]
    for setting in knobs():
        default = int(setting.default) if isinstance(setting.default, bool) else setting.default
        value, limits = str(default) or "(empty)", describe_range(setting).strip()
        lines.append(
            f"  {setting.name.upper():<28}{value:<12}{setting.metadata['sentence']}"
            + (f" ({limits})" if limits else "")
        )
    lines += ["", "Other names for a setting:", ""]
    lines += [f"  {alias:<28}{name.upper()}" for alias, name in ALIASES.items()]
    small = ", ".join(
        f"{name.upper()}={value}"
        for name, value in SMOKE.items()
        if name not in ("data_path", "tokenizer_path")
    )
    return "\n".join([*lines, "", f"SMOKE=1 takes the sample in data/sample and {small}."])


# ---------------------------------------------------------------------------------------------
# 2  Runtime
# Ranks, device, clock and log. Only Runtime talks to torch.distributed, and every collective does
# nothing on one rank, so that one process and many run the same lines. Every rank makes the same
# calls.
# ---------------------------------------------------------------------------------------------

# Dense bf16 operations per second of one device, by the vendor's data sheets.
PEAK_BF16_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 311.9e12}
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)  # rank 0 compresses alone for minutes


class Budget:
    """A ledger of phases on a monotonic clock. An inner phase stops the clock of the outer one.

    Time outside all phases is booked as "other", so that every second is booked once. `finish` is
    called where a phase begins or ends: it waits for the device. started: local date and time.
    """

    TRAINING = ("train", "calibration")  # everything that reads training data inside the clock
    EVALUATION = ("decompression", "quantized", "quantized_sliding_window", "quantized_ttt")

    def __init__(self, finish: Callable[[], None] = lambda: None):
        self.finish, self.seconds, self.open = finish, {}, ["other"]
        self.since, self.started = time.perf_counter(), datetime.datetime.now().astimezone()

    @contextlib.contextmanager
    def phase(self, name: str):
        """Time a block; the time of equal names adds up."""
        self.finish()
        self.tick()
        self.open.append(name)
        try:
            yield
        finally:
            self.finish()
            self.tick()
            self.open.pop()

    def tick(self) -> None:
        """Book the time since the last tick to the innermost open phase."""
        now, name = time.perf_counter(), self.open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def total(self, phases: Iterable[str]) -> float:
        """Seconds of these phases up to now, without waiting for the device."""
        self.tick()
        return sum(self.seconds.get(name, 0.0) for name in phases)

    def report(self, cfg: Config) -> dict[str, Any]:
        """Seconds of each phase, and the two sums that the rules limit beside their limits.

        wall_seconds are those of the calendar's clock; what they exceed the phases by would be time
        that a stopped timer lost.
        """
        wall = (datetime.datetime.now().astimezone() - self.started).total_seconds()
        self.tick()
        sums: dict[str, Any] = dict(
            wall_seconds=wall, unbooked_seconds=wall - sum(self.seconds.values())
        )
        for name, phases, limit in (
            ("training", self.TRAINING, cfg.max_wallclock_seconds),
            ("evaluation", self.EVALUATION, cfg.eval_wallclock_seconds),
        ):
            spent = self.total(phases)
            sums[name] = dict(seconds=spent, limit=limit, within=not limit or spent <= limit)
        return dict(phases=dict(self.seconds), **sums)


class Runtime:
    """Ranks, device and types of this process. A context manager: it owns the process group.

    Attributes: rank, world_size, device, compute_dtype (of activations), is_main; budget, the time
    that this process spends, by phase.
    """

    def __init__(self, cfg: Config, env: Mapping[str, str]):
        self.rank, self.world_size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
        self.is_main = self.rank == 0
        cuda, dtype = torch.cuda.is_available(), cfg.compute_dtype
        self.device = torch.device(f"cuda:{env.get('LOCAL_RANK', '0')}" if cuda else "cpu")
        if dtype == "auto":
            dtype = "bfloat16" if cuda else "float32"
        self.compute_dtype = getattr(torch, dtype)
        self.compiles = cuda if cfg.compile == "auto" else cfg.compile == "1"
        self.budget, self.created = Budget(self.synchronize), time.perf_counter()

    def __enter__(self) -> Runtime:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world_size > 1:
            # Two backends: a host value, such as the clock, is agreed on without stalling the GPU.
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        return self

    def __exit__(self, kind, error, trace) -> None:
        # After an error the other ranks may never come to a meeting point: leave without one.
        if self.world_size > 1 and kind is None:
            dist.barrier()
            dist.destroy_process_group()

    def sum_(self, *tensors: Tensor) -> None:
        """Add tensors of one dtype over all ranks, in place, in one message."""
        self.start_sum(*tensors)()

    # What starts a message returns a function that waits for it; a GPU waits without its host.

    def start_sum(self, *tensors: Tensor) -> Callable[[], None]:
        """Start `sum_`; the tensors have their sums when the function has returned."""
        if self.world_size == 1:
            return lambda: None
        flat = torch.cat([t.reshape(-1) for t in tensors])
        work = dist.all_reduce(flat, async_op=True)

        def finish() -> None:
            work.wait()
            totals = flat.split([t.numel() for t in tensors])
            for tensor, total in zip(tensors, totals, strict=True):
                tensor.copy_(total.view_as(tensor))

        return finish

    def start_sum_parts(self, groups: list[list[Tensor]]) -> Callable[[], list[list[Tensor]]]:
        """Start adding tensors over all ranks; each rank gets the sums of its `part` of each group.

        All groups travel in one message: who clips by the norm waits for the last one anyway.
        """
        if self.world_size == 1:
            return lambda: groups
        ranks = range(self.world_size)
        parts = [[x for g in groups for x in g[self.part(len(g), rank)]] for rank in ranks]
        sizes = [sum(x.numel() for x in part) for part in parts]
        for part, size in zip(parts, sizes, strict=True):  # the first is the largest: pad the rest
            part.append(groups[0][0].new_zeros(sizes[0] - size))
        flat = torch.cat([x.reshape(-1) for part in parts for x in part])
        sums = flat.new_empty(sizes[0])
        # torch 2.13 renamed this, and the one of `start_gather`; gloo has both.
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        work = scatter(sums, flat, async_op=True)

        def finish() -> list[list[Tensor]]:
            work.wait()
            pieces = iter(sums.split([x.numel() for x in parts[self.rank]]))
            own = [g[self.part(len(g))] for g in groups]
            return [[next(pieces).view_as(x) for x in group] for group in own]

        return finish

    def start_gather(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start (n, ...) on each rank -> (world_size * n, ...), in order of ranks."""
        if self.world_size == 1:
            return lambda: tensor
        whole = tensor.new_empty(self.world_size * len(tensor), *tensor.shape[1:])
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        work = gather(whole, tensor.contiguous(), async_op=True)

        def finish() -> Tensor:
            work.wait()
            return whole

        return finish

    def part(self, count: int, rank: int | None = None) -> slice:
        """A rank's part of `count` items, this one's if none is named: equal but for the last."""
        rank, each = self.rank if rank is None else rank, -(-count // self.world_size)
        return slice(rank * each, (rank + 1) * each)

    def agree_max(self, *values: float) -> list[float]:
        """The largest of each value over the ranks, so that all decide alike."""
        if self.world_size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return agreed.tolist()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value (any picklable object), on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def together(self):
        """Turn a UserError of any rank inside the block into the same error on every rank."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        errors = [error]
        if self.world_size > 1:
            errors = [None] * self.world_size
            dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                found.on_all_ranks = True
                raise found

    def compile(self, function: Callable) -> Callable:
        """A module or function, compiled for static shapes where this run compiles."""
        if not self.compiles:
            return function
        # Each plan and shape, with gradients and without, is a graph; torch would stop at eight.
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(function, dynamic=False, fullgraph=True)

    def compilations(self) -> int:
        """Graphs that this process has compiled so far."""
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if self.compiles else 0

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def to_device(self, array: np.ndarray) -> Tensor:
        """Integers on the host -> int64 on the device; the copy overlaps with computation."""
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True).long()

    def share(self, count: int) -> slice:
        """This rank's contiguous part of `count` items; parts differ by one item at most."""
        first, stop = (count * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return slice(first, stop)

    def peak_flops(self) -> float | None:
        """Dense bf16 operations per second of one device by its data sheet, if it is known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)

    def describe(self) -> dict[str, Any]:
        """Hardware and versions: what a stranger needs to know to repeat a run."""
        cuda = self.device.type == "cuda"
        return dict(
            device=torch.cuda.get_device_name(self.device) if cuda else cpu_name(),
            world_size=self.world_size,
            cpu_threads=torch.get_num_threads(),
            compute_dtype=str(self.compute_dtype).removeprefix("torch."),
            compiled=self.compiles,
            torch=torch.__version__,
            cuda=torch.version.cuda,
            numpy=np.__version__,
            python=platform.python_version(),
            system=platform.platform(),
        )


def cpu_name() -> str:
    """The processor's name, from Linux or from Python."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"model name\s*:\s*(.+)", text)[1]
    except (OSError, TypeError):  # another system, or a processor without that line
        return platform.processor() or platform.machine()


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file beside its name and rename it, so that the name never holds a half-written file.

    Raises: ArtifactError if the disk refuses; the part that was written is removed.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        raise ArtifactError(
            f"{path}: could not write {len(data):,} bytes: {error.strerror}; free some "
            "space or set LOG_DIR to another disk"
        ) from error
    finally:  # gone already if all went well; also if the run is interrupted
        with contextlib.suppress(OSError):  # the first error is the one to report
            part.unlink(missing_ok=True)


class Log:
    """Console, text file and JSON of one run; on every rank but the first it says nothing.

    replace: overwrite the text file, which must not exist otherwise.
    Attributes: record, the content of the JSON; path(suffix) names the run's files.
    """

    PLAIN_SECONDS, BAR_SECONDS = 15.0, 0.2  # between two progress lines in a file, on a terminal

    def __init__(
        self, folder: str, run_id: str, *, enabled: bool = True, stream=None, replace: bool = False
    ):
        self.folder, self.run_id, self.enabled = Path(folder), run_id, enabled
        self.stream, self.record, self.file = stream or sys.stdout, {}, None
        self.bar = self.stream.isatty()
        self.pause_seconds = self.BAR_SECONDS if self.bar else self.PLAIN_SECONDS
        if enabled:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                mode = "w" if replace else "x"
                self.file = open(self.path("txt"), mode, encoding="utf-8")  # noqa: SIM115
                lock(self.file)
            except OSError as error:
                raise ConfigError(
                    f"LOG_DIR={folder}, RUN_ID={run_id}: {error.strerror}; choose others"
                ) from error

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.enabled:
            if error is not None:
                with contextlib.suppress(ArtifactError):  # the first error is the one to report
                    self.put(error=f"{kind.__name__}: {error}")
            with contextlib.suppress(OSError):  # what the disk refuses now, it refused before
                self.file.close()

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.run_id}.{suffix}"

    def line(self, text: str) -> None:
        """One event, one line, on the console and in the file."""
        if self.enabled:
            print("\r\x1b[K" * self.bar + text, file=self.stream, flush=True)
            try:
                print(text, file=self.file, flush=True)
            except OSError as error:
                raise ArtifactError(
                    f"{self.path('txt')}: could not write a line: {error.strerror}; free some "
                    "space or set LOG_DIR to another disk"
                ) from error

    def put(self, **facts: Any) -> None:
        """Add facts to the JSON and save it, so that a run that is cut off leaves what it knew."""
        self.record.update(facts)
        if self.enabled:
            text = json.dumps(self.record, indent=1, default=str)
            atomic_write(self.path("json"), text.encode())

    def progress(self, label: str) -> Callable[..., None]:
        """A function of (part done, note="") that shows, now and then, how far and how long."""
        started = shown = time.monotonic()

        def show(part: float, note: str = "") -> None:
            nonlocal shown
            now = time.monotonic()
            if not self.enabled or now - shown < self.pause_seconds:
                return
            shown = now
            left = f"{(now - started) * (1 - part) / part:.0f}s" if part > 0 else "?"
            text = f"{label} {part:4.0%} time_left:{left} {note}".rstrip()
            if self.bar:
                filled = int(24 * min(part, 1.0))
                print(f"\r\x1b[K[{'#' * filled:<24}] {text}", end="", file=self.stream, flush=True)
            else:
                self.line(text)

        return show


# ---------------------------------------------------------------------------------------------
# 3  Data
# A shard is 256 little-endian int32 words (magic, version, count, zeros) and then that many
# little-endian uint16 token ids. The order of the training windows is a pure function of seed and
# shards, the same for any number of ranks. Bytes are charged per target, here and nowhere else.
# ---------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
GET_DATA = (
    "fetch it with data/cached_challenge_fineweb.py or set DATA_PATH and TOKENIZER_PATH; SMOKE=1 "
    "runs on the embedded sample"
)


def read_shard(path: Path) -> np.ndarray:
    """Open a shard: (n,) uint16 token ids, memory-mapped, read-only.

    Raises: DataError unless magic, version, count and size of the file agree.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_BYTES // 4)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if size < SHARD_HEADER_BYTES or header[0] != SHARD_MAGIC:
        raise DataError(
            f"{path}: no token shard: expected {SHARD_HEADER_BYTES} header bytes that begin "
            f"with {SHARD_MAGIC}; fetch or build it again"
        )
    if header[1] != SHARD_VERSION:
        raise DataError(
            f"{path}: shard version {header[1]}, expected {SHARD_VERSION}; build it again"
        )
    promised, found = int(header[2]), (size - SHARD_HEADER_BYTES) / 2
    if promised != found or promised < 1:
        raise DataError(
            f"{path}: header promises {promised:,} tokens, file holds {found:,.12g}; fetch it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(promised,))


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split (`train`, `val`, `val_bytes`), in order; DataError if none."""
    paths = sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))
    if not paths:
        raise DataError(f"{folder}: no fineweb_{split}_*.bin there; {GET_DATA}")
    return paths


def set_fingerprint(shards: Sequence[Path], tokenizer: Path) -> str:
    """A name for the content of a token set, cheap enough for each run: 32 hex digits.

    Covers the tokenizer and every shard below 64 MiB whole; of a longer one its length and 64
    blocks of 64 KiB, evenly spread. Folder names and dates do not matter.
    """
    block, count = 1 << 16, 64
    digest = hashlib.sha256(hashlib.sha256(tokenizer.read_bytes()).digest())
    for path in sorted(shards, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        starts = range(0, size, block)
        if size > 1024 * block:
            starts = [(size - block) * part // (count - 1) for part in range(count)]
        with open(path, "rb") as stream:
            for start in starts:
                stream.seek(start)
                digest.update(stream.read(block))
    return digest.hexdigest()[:32]


def data_proof(folder: Path, tokenizer: Path, *, trains: bool) -> dict[str, Any]:
    """Read the headers of a set, and look for the proof that data/verify_dataset.py leaves.

    Args:
        trains: whether the run reads training shards; else the proof of the validation text counts.
    Returns: data_fingerprint, and data_verified: whether verified.json vouches for just this set.
    Raises: DataError for a shard whose header and size disagree.
    """
    shards = [*find_shards(folder, "val"), *folder.glob("fineweb_val_bytes_[0-9]*.bin")]
    shards += find_shards(folder, "train") if trains else []
    for path in shards:
        read_shard(path)
    fingerprint, proof = set_fingerprint(shards, tokenizer), {}
    if (folder / "verified.json").exists():
        with contextlib.suppress(ValueError, TypeError):  # a damaged proof proves nothing
            proof = dict(json.loads((folder / "verified.json").read_text(encoding="utf-8")))
    vouched = proof.get("fingerprint" if trains else "validation_fingerprint")
    return dict(data_fingerprint=fingerprint, data_verified=vouched == fingerprint)


def check_vocabulary(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises DataError if a token id lies beyond the vocabulary."""
    if tokens.size and (largest := int(tokens.max())) >= vocab_size:
        raise DataError(
            f"{where}: token id {largest}, expected ids below VOCAB_SIZE={vocab_size}; the "
            "shards belong to another tokenizer"
        )


class Loader:
    """Training windows in one global order that no number of ranks changes.

    Each epoch every shard gets a random phase, is cut into windows of `seq_len` inputs and one more
    target, and the windows of all shards are shuffled together. That is the distribution of "pick a
    shard by its remaining windows, then one of them" (system #1493) without any state: window i is
    a function of (seed, i), so going back to the start is asking for i = 0 again.

    The order "sequential" takes the windows as they stand, from the start of each shard. "coprime"
    walks through each shard with a random start and a stride coprime to its windows, and through
    all shards evenly: an order as even as a shuffle, without one.
    """

    PREFETCH_STEPS = 3

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        seq_len: int,
        vocab_size: int,
        seed: int,
        order: str = "shuffled",
    ):
        self.paths, self.shards, self.order = paths, [read_shard(path) for path in paths], order
        self.seq_len, self.vocab_size, self.seed = seq_len, vocab_size, seed
        self.epoch_ends: list[int] = []
        if not any(len(shard) > seq_len for shard in self.shards):
            raise DataError(
                f"{paths[0].parent}: no training shard is longer than one window of "
                f"TRAIN_SEQ_LEN={seq_len}; fetch or build longer ones"
            )
        self.epoch(0)

    @functools.lru_cache(maxsize=2)  # noqa: B019 -- the one loader lives as long as the run
    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Phase and first window of each shard, and the order of all windows."""
        draw = np.random.default_rng([self.seed, number])
        spare = np.array([len(shard) - self.seq_len for shard in self.shards])
        phases = draw.integers(0, np.clip(spare, 1, self.seq_len))
        phases *= self.order != "sequential"
        counts = np.maximum((spare - 1 - phases) // self.seq_len + 1, 0) * (spare > 0)
        firsts = np.cumsum(counts) - counts
        if self.order == "shuffled":
            order = draw.permutation(counts.sum())
        else:
            order = np.arange(counts.sum())
        if self.order == "coprime":
            walks = [coprime_walk(count, draw) for count in counts.tolist()]
            places = [(np.arange(len(walk)) + draw.random()) / max(len(walk), 1) for walk in walks]
            walks = [first + walk for first, walk in zip(firsts, walks, strict=True)]
            order = np.concatenate(walks)[np.argsort(np.concatenate(places), kind="stable")]
        if number == len(self.epoch_ends):
            self.epoch_ends.append(len(order) + (self.epoch_ends[-1] if number else 0))
        return phases, firsts, order

    def windows(self, first: int, count: int) -> np.ndarray:
        """Windows first, first + 1, ... of the global order: (count, seq_len + 1) uint16."""
        out = np.empty((count, self.seq_len + 1), dtype=np.uint16)
        for row, index in enumerate(range(first, first + count)):
            while index >= self.epoch_ends[-1]:
                self.epoch(len(self.epoch_ends))
            number = int(np.searchsorted(self.epoch_ends, index, side="right"))
            phases, firsts, order = self.epoch(number)
            window = order[index - (self.epoch_ends[number - 1] if number else 0)]
            shard = int(np.searchsorted(firsts, window, side="right")) - 1
            start = phases[shard] + (window - firsts[shard]) * self.seq_len
            out[row] = self.shards[shard][start : start + self.seq_len + 1]
            if out[row].max() >= self.vocab_size:
                check_vocabulary(out[row], self.vocab_size, str(self.paths[shard]))
        return out

    def batches(self, rt: Runtime, rows: int, first: int = 0) -> Iterator[Tensor]:
        """This rank's part of step after step, read ahead by a thread.

        Args:
            rows: windows of one step over all ranks.
            first: window with which the first step begins.
        Yields: (this rank's rows, seq_len + 1) int64 on the device. Close it to end the thread.
        """
        mine, queue = rt.share(rows), collections.deque()
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            for start in itertools.count(first + mine.start, rows):
                queue.append(reader.submit(self.windows, start, mine.stop - mine.start))
                if len(queue) > self.PREFETCH_STEPS:
                    yield rt.to_device(queue.popleft().result())


def coprime_walk(count: int, draw: np.random.Generator) -> np.ndarray:
    """0 .. count - 1, each once, from a random start with a random stride coprime to count."""
    if not count:
        return np.empty(0, np.int64)
    strides = (int(stride) for stride in draw.integers(1, count + 1, 1000))
    stride = next((stride for stride in strides if math.gcd(stride, count) == 1), 1)
    return (draw.integers(count) + stride * np.arange(count)) % count


def inputs_and_targets(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows (rows, T + 1) to what a forward reads and what it predicts, (rows, T) each."""
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@dataclass(frozen=True)
class ByteTable:
    """What each token adds to the text: the three tables by which this field charges bytes.

    Attributes (one entry per token id): base_bytes, UTF-8 length without the leading space;
    leading_space, whether the piece begins with a space; is_boundary, control and unused ids, after
    which that space is not written. bos: the id that opens a document. digest: of the tokenizer.
    """

    base_bytes: np.ndarray
    leading_space: np.ndarray
    is_boundary: np.ndarray
    bos: int
    digest: str
    has_marks: bool = False  # CaseOps: only the byte sidecar knows what a token is charged

    SPACE = "\u2581"  # SentencePiece's mark for a space

    @classmethod
    def from_file(cls, path: Path, vocab_size: int) -> ByteTable:
        """Read a SentencePiece model, or the JSON file of the byte260 tokenizer.

        Raises: DataError if the file is missing, has another vocabulary, or would break the count:
        the bytes charged for a document must be those of the text that its tokens decode to.
        """
        try:
            blob = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}: the tokenizer; {GET_DATA}") from error
        read = cls.from_byte260 if path.suffix == ".json" else cls.from_sentencepiece
        return read(path, blob, vocab_size)

    @classmethod
    def from_byte260(cls, path: Path, blob: bytes, vocab_size: int) -> ByteTable:
        """Four control ids, then the 256 byte values; each charged as it is."""
        if vocab_size != BYTE_OFFSET + 256 or b'"pure_byte"' not in blob:
            raise DataError(f"{path}: expected the byte260 tokenizer and VOCAB_SIZE=260")
        control = np.arange(vocab_size) < BYTE_OFFSET
        digest = hashlib.sha256(blob).hexdigest()
        return cls((~control).astype(np.int16), np.zeros_like(control), control, 1, digest)

    @classmethod
    def from_sentencepiece(cls, path: Path, blob: bytes, vocab_size: int) -> ByteTable:
        """The tables of a SentencePiece model with byte fallback."""
        import sentencepiece

        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=blob)
        except RuntimeError as error:
            raise DataError(f"{path}: no SentencePiece model; {GET_DATA}") from error
        if model.vocab_size() != vocab_size:
            raise DataError(
                f"{path}: {model.vocab_size()} pieces, expected VOCAB_SIZE={vocab_size}; set "
                "TOKENIZER_PATH to the tokenizer of the shards"
            )
        pieces = [model.id_to_piece(i) for i in range(vocab_size)]
        is_silent = (model.is_control, model.is_unknown, model.is_unused)
        silent = np.array([any(test(i) for test in is_silent) for i in range(vocab_size)])
        single = np.array([model.is_byte(i) for i in range(vocab_size)])
        space = np.array([p.startswith(cls.SPACE) for p in pieces]) & ~silent & ~single
        base = [
            0 if s else 1 if b else len(p.removeprefix(cls.SPACE).encode())
            for p, s, b in zip(pieces, silent, single, strict=True)
        ]
        digest = hashlib.sha256(blob).hexdigest()
        has_marks = set(pieces) >= CASEOPS_MARKS
        table = cls(np.array(base, np.int16), space, silent, model.bos_id(), digest, has_marks)
        table.refuse_miscounting(model, pieces, path)
        return table

    def refuse_miscounting(self, model, pieces: Sequence[str], path: Path) -> None:
        """Raises DataError if some text would be charged other bytes than its tokens decode to."""
        inner = [
            p
            for p, silent in zip(pieces, self.is_boundary, strict=True)
            if not silent and self.SPACE in p.removeprefix(self.SPACE)
        ]
        faults = [
            (self.SPACE not in pieces, f"the bare space {self.SPACE} is no piece"),
            (sum(map(model.is_byte, range(len(pieces)))) != 256, "it has no byte fallback"),
            (bool(inner), f"piece {inner[:1]} has a space past its beginning"),
            (self.bos < 0, "it has no BOS"),
        ]
        # Piece by piece, after one that opens no word: a decoder may rewrite what it is given.
        plain = [i for i, s in enumerate(self.is_boundary) if not s and not model.is_byte(i)]
        for first in [i for i in plain if not self.leading_space[i]][:1]:
            for i, text in zip(plain, model.decode([[first, i] for i in plain]), strict=True):
                charged = int(self.charge(np.array([self.bos, first, i])).sum())
                fault = f"piece {pieces[i]!r} is miscounted"
                faults.append((charged != len(text.encode()), fault))
        for text in BYTE_PROBES:
            ids = model.encode(text)
            charged = int(self.charge(np.array([self.bos, *ids])).sum())
            faults.append((charged != len(model.decode(ids).encode()), f"{text!r} is miscounted"))
        for found, fault in faults:
            if found:
                raise DataError(
                    f"{path}: {fault}, so bytes would be counted wrong; use a tokenizer made "
                    "by data/build_dataset.py"
                )

    def charge(self, tokens: np.ndarray) -> np.ndarray:
        """(n + 1,) token ids -> (n,) int16 bytes charged to tokens[1:], in their context."""
        previous, target = tokens[:-1], tokens[1:]
        return self.base_bytes[target] + (self.leading_space[target] & ~self.is_boundary[previous])


BYTE_OFFSET = 4  # byte260: pad, bos, eos, unk come before the byte values
CASEOPS_MARKS = frozenset("\ue001\ue002\ue003\ue004")  # as in data/caseops.py
# Short texts on which tokenizers of this field were miscounted: spaces of every kind, everywhere.
BYTE_PROBES = tuple(
    " a|a  b|\u2581a|\u2581\u2581a|a\u2581|\u3000a\u00a0b|\u00a8a|a\tb\nc |<s>a</s>"
    "|\ufb01\u2460\u0130\0|\u200d\u00e9\u0301\U0001f468\u200d\U0001f469".split("|")
)


@dataclass(frozen=True)
class ValidationTokens:
    """The text that is scored: (n + 1,) uint16 tokens, and the bytes of each of n targets."""

    tokens: np.ndarray
    target_bytes: np.ndarray
    dropped: int  # targets at the end that do not fill a window of the plain evaluation

    @classmethod
    def load(
        cls, paths: Sequence[Path], table: ByteTable, *, seq_len: int, limit: int = 0
    ) -> ValidationTokens:
        """Read the validation shards.

        Args:
            seq_len: whole windows of it are kept, as published scores do; less is kept whole.
            limit: keep only so many targets, 0: all.
        Raises: DataError for a bad shard, a foreign token or a text that does not open with BOS.
        """
        tokens = np.concatenate([read_shard(path) for path in paths])
        check_vocabulary(tokens, len(table.base_bytes), str(paths[0].parent / "fineweb_val_*.bin"))
        if tokens[0] != table.bos:
            raise DataError(
                f"{paths[0]}: begins with token {tokens[0]}, expected BOS={table.bos}; the "
                "shards belong to another tokenizer"
            )
        found = len(tokens) - 1
        if found < 1:
            raise DataError(f"{paths[0]}: {len(tokens)} validation tokens, expected at least 2")
        kept = min(found, limit or found)
        if kept == found >= seq_len:
            kept -= kept % seq_len
        charged = cls.charge(paths, tokens, table)
        return cls(tokens[: kept + 1], charged[:kept], found - kept)

    @staticmethod
    def charge(paths: Sequence[Path], tokens: np.ndarray, table: ByteTable) -> np.ndarray:
        """Bytes of tokens[1:]: by the table, or by the sidecar if the tokenizer has CaseOps marks.

        Raises: DataError if there has to be a sidecar and is none, or if it is of another set.
        """
        if not table.has_marks:
            return table.charge(tokens)
        sidecar = np.concatenate([read_shard(p) for p in find_shards(paths[0].parent, "val_bytes")])
        if len(sidecar) != len(tokens) or sidecar[tokens == table.bos].any():
            raise DataError(
                f"{paths[0].parent}: the byte sidecar ({len(sidecar):,} entries) is not of these "
                f"{len(tokens):,} validation tokens; fetch or build both again"
            )
        return sidecar[1:].astype(np.int16)


# ---------------------------------------------------------------------------------------------
# 4  Model
# Which layer is visited when, and what each visit does, is data: a DepthPlan. One forward serves
# training, validation, calibration and test-time training. Matrices are float32, cast at use.
# ---------------------------------------------------------------------------------------------


class Visit(NamedTuple):
    """One visit of a layer. push: keep the output as a skip; pop: mix in a skip, -1: none.

    form: what the MLP reads: "sequential", the output of attention; "gptj", the input of attention;
    "lanes", a stream of its own.
    """

    layer: int
    push: bool
    pop: int
    form: str


class DepthPlan(NamedTuple):
    """The visits of one forward, in order. Immutable: one compiled graph for each plan.

    fake_bits: round the blocks' matrices to codes of so many bits in the forward alone; 0: not.
    packed: no position sees another document than its own; rotary positions count on.
    """

    visits: tuple[Visit, ...]
    fake_bits: int = 0
    packed: bool = False

    @property
    def encoder(self) -> list[int]:
        return [v.layer for v in self.visits[: len(self.visits) // 2]]

    @property
    def decoder(self) -> list[int]:
        return [v.layer for v in self.visits[len(self.visits) // 2 :]]

    @property
    def skips(self) -> int:
        return sum(v.pop >= 0 for v in self.visits)


def depth_plan(cfg: Config, *, looped: bool) -> DepthPlan:
    """The wiring of system #1493, before (`looped=False`) or after recurrence starts.

    The first half of the visits pushes its outputs, the second half pops them, last pushed first;
    so the first skip popped is the running stream itself.
    """
    order = list(range(cfg.num_layers))
    if looped and cfg.num_loops:
        loop = order[cfg.loop_start : cfg.loop_end + 1]
        order[cfg.loop_start : cfg.loop_end + 1] = loop * (cfg.num_loops + 1)
    half = len(order) // 2
    late = cfg.parallel_residual_form
    visits = []
    for place, layer in enumerate(order):
        skip = place - half
        pop = skip if 0 <= skip < min(half, cfg.max_skips) else -1
        form = late if layer >= cfg.parallel_residual_start else "sequential"
        visits.append(Visit(layer, place < half, pop, form))
    return DepthPlan(tuple(visits))


BOS = 1  # the token that opens a document, in every tokenizer of this field


class Documents(NamedTuple):
    """Which document each position belongs to, of rows that hold several.

    ids: (B, T), rising along a row. bounds: (n + 1,) int32, where each document begins in the
    flattened rows, then their length; of fixed size, so that many documents are empty.
    """

    ids: Tensor
    bounds: Tensor


def find_documents(tokens: Tensor) -> Documents:
    """The documents in rows of tokens (B, T); a row's begin is a document's, whatever it holds.

    Shapes depend on B and T alone, so that one graph serves all texts: a row has room for T / 64
    documents (16 in a short one), and any beyond stay one. FineWeb's have 950 tokens on average.
    """
    rows, length = tokens.shape
    room = torch.arange(min(max(length // 64, 16), length), device=tokens.device)
    ids = (tokens == BOS).cumsum(1).clamp(max=len(room) - 1)
    first = (ids[:, None] < room[:, None]).sum(-1)  # (B, room): positions before each document
    first = first + length * torch.arange(rows, device=tokens.device)[:, None]
    return Documents(ids, F.pad(first.flatten(), (0, 1), value=rows * length).int())


def check_documents(bos: int, cfg: Config) -> None:
    """Raises: ConfigError if DOC_PACKING cannot see where this tokenizer's documents begin."""
    if cfg.doc_packing and not cfg.artifact and bos != BOS:
        raise ConfigError(f"DOC_PACKING=1: the tokenizer's BOS is {bos}, expected {BOS}; unset it")


def visible(q: Tensor, documents: Documents | None) -> Tensor:
    """Whether a query (dim -2) sees a key (dim -1): (T, T), or (B, 1, T, T) with documents."""
    past = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    if documents is None:
        return past
    return past & (documents.ids[:, None, :, None] == documents.ids[:, None, None, :])


def plain_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Causal attention by its definition, in float32: the reference of every other kernel.

    Args: q (B, T, H, D); k, v (B, T, K, D) with H a multiple of K; documents: positions see only
    their own; None: all before them. Returns (B, T, H, D).
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (x.float().repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible(q, documents), -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """`plain_attention` by the kernels inside PyTorch."""
    options = dict(is_causal=True, enable_gqa=True)
    if documents is not None:  # those with a mask take no grouped heads
        options = dict(attn_mask=visible(q, documents))
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def wave(*shape: int, like: Tensor, pitch: float = 1.0) -> Tensor:
    """Numbers without a pattern, within plus or minus 1.7, in the type and place of `like`."""
    steps = torch.arange(math.prod(shape), device=like.device, dtype=torch.float64)
    return (1.7 * (steps * pitch).sin()).to(like.dtype).view(shape)


def difference(twin: Callable, kernel: Callable, *inputs: Tensor) -> str:
    """Why a kernel must not stand for its twin; "" if outputs and all gradients agree."""
    results = []
    for function in (twin, kernel):
        own = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*own)
        out = out if isinstance(out, tuple) else (out,)
        upstream = [wave(*x.shape, like=x, pitch=2.0) for x in out]
        results.append([*out, *torch.autograd.grad(out, own, upstream)])
    tolerance = 0.01 if inputs[0].dtype == torch.float32 else 0.04  # of TF32 and of bfloat16
    for expected, got in zip(*results, strict=True):
        error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
        if not error <= tolerance:  # also if it is no number
            return f"it is wrong by {error:.1e} of the largest value on this device"
    return ""


def by_document(
    varlen: Callable, q: Tensor, k: Tensor, v: Tensor, documents: Documents, **options: Any
) -> Tensor:
    """Attention by a kernel for rows of several lengths laid end to end: a row a document."""
    flat, bounds, longest = (x.flatten(0, 1) for x in (q, k, v)), documents.bounds, q.shape[1]
    out = varlen(*flat, bounds, bounds, longest, longest, **options)
    return (out[0] if isinstance(out, tuple) else out).view_as(q)


@functools.lru_cache
def one_backend(choice: str, *, packed: bool) -> Callable:
    """`sdpa_attention` by one kernel inside PyTorch alone.

    "fa4" puts FlashAttention 4 in the place of "flash", for the whole process.
    Raises: AttributeError, ImportError or RuntimeError where that cannot be.
    """
    backends = torch.nn.attention.SDPBackend
    backend = backends.CUDNN_ATTENTION if choice == "cudnn" else backends.FLASH_ATTENTION
    if choice == "fa4":
        torch.nn.attention.activate_flash_attention_impl("FA4")
    varlen = None
    if packed and choice != "cudnn":
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        if documents is not None and varlen is not None:
            options = dict(window_size=(-1, 0), enable_gqa=True)
            return by_document(varlen, q, k, v, documents, **options)
        with torch.nn.attention.sdpa_kernel(backend):
            return sdpa_attention(q, k, v, documents)

    return attention


def flash_attention_3(device: torch.device, dtype: torch.dtype) -> tuple[Callable | None, str]:
    """FlashAttention 3 as an attention kernel, or None and why not.

    It is one module under two names, by the age of the package; it needs a Hopper GPU and 16 bits.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None, "the device is no Hopper GPU"
    if dtype == torch.float32:
        return None, "activations are float32"
    why_not = []
    for name in ("flash_attn_interface", "flash_attn_3.flash_attn_interface"):
        try:
            package = importlib.import_module(name)
            break
        except ImportError as error:
            why_not.append(f"{name} does not import ({error})")
    else:
        return None, why_not[0]

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        if documents is not None:
            return by_document(package.flash_attn_varlen_func, q, k, v, documents, causal=True)
        out = package.flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # older wheels: (out, log-sum-exp)

    return attention, "installed"


def select_attention(
    choice: str, device: torch.device, dtype: torch.dtype, *, packed: bool = False
) -> tuple[str, Callable, str]:
    """Decide once which attention kernel a run uses: (name, function, reason).

    packed: it must be able to keep documents apart.
    Raises: ConfigError if the choice cannot be honoured.
    """
    named = {"plain": plain_attention, "sdpa": sdpa_attention}
    if choice in named:
        return choice, named[choice], "as set"
    if choice in ("auto", "fa3"):
        kernel, why = flash_attention_3(device, dtype)
        if kernel is None and choice == "fa3":
            raise ConfigError(f"ATTENTION=fa3: {why}; unset it or set ATTENTION=sdpa")
        if kernel is None:
            return "sdpa", sdpa_attention, f"no fa3: {why}"
        return "fa3", kernel, "as set" if choice == "fa3" else why
    try:
        kernel = one_backend(choice, packed=packed)
        q = wave(2, 64, 4, 64, like=torch.empty((), device=device, dtype=dtype))
        documents = find_documents((q[:, :, 0, 0] > 1).long()) if packed else None
        problem = difference(
            lambda q: plain_attention(q, q[:, :, :2], q[:, :, 2:], documents),
            lambda q: kernel(q, q[:, :, :2], q[:, :, 2:], documents),
            q,
        )
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        problem = f"{error}".partition(". ")[0].partition("\n")[0]
    if problem:
        raise ConfigError(f"ATTENTION={choice}: {problem}; unset it or set ATTENTION=sdpa")
    return choice, kernel, "as set"


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension; no weight."""
    return F.rms_norm(x, x.shape[-1:])


def rotary_table(length: int, cfg: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, 1, rope_dims / 2) float32.

    Beyond ROPE_TRAIN_SEQ_LEN the base grows by (length / that)^(d / (d - 2)), d = ROPE_DIMS, so
    that the slowest frequency sees the angles of training (NTK-aware scaling).
    """
    dims, stretch = cfg.rope_dims, max(1.0, length / cfg.rope_train_seq_len)
    base = cfg.rope_base * stretch ** (dims / max(dims - 2, 1))
    powers = torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None, None] * base**-powers
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first dimensions of each head (B, T, H, D) by position, in half-split pairs."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    half = cos.shape[-1]
    u, w, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([u * cos + w * sin, w * cos - u * sin, rest], dim=-1)


class Kernels(NamedTuple):
    """The parts of the model that exist twice: as PyTorch operations and as Triton kernels.

    cross_entropy: (logits (N, V) before the cap, targets (N,), cap, reduction) -> nats, float32.
    mlp_up: (x (..., D), weight (H, D), slope) -> LeakyReLU squared of the product, (..., H).
    norm_rotate: (q (B, T, H, D), k (B, T, K, D), gain (H,), rotary table) -> q and k.
    exclude_self: (y (B, T, H, D), v (B, T, K, D)) -> (B, T, H, D).
    mix_norm: (x, x0 (B, T, D), mix (2, D), scale) -> the mix and its scaled norm.
    """

    cross_entropy: Callable
    mlp_up: Callable
    norm_rotate: Callable
    exclude_self: Callable
    mix_norm: Callable


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Logits squeezed smoothly into plus or minus cap, in float32."""
    return cap * torch.tanh(logits.float() / cap)


def cross_entropy(logits: Tensor, targets: Tensor, cap: float, reduction: str) -> Tensor:
    """Loss of the capped logits; see `Kernels`."""
    return F.cross_entropy(softcap(logits, cap), targets, reduction=reduction)


def mlp_up(x: Tensor, weight: Tensor, slope: float) -> Tensor:
    """The MLP up to its second matrix; see `Kernels`."""
    return F.leaky_relu(F.linear(x, weight), slope).square()


def norm_rotate(
    q: Tensor, k: Tensor, gain: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Normalise, rotate, and give each query head its gain; see `Kernels`."""
    q, k = (rotate(rms_norm(heads), rotary) for heads in (q, k))
    return q * gain[:, None].to(q.dtype), k


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self attention: take from y (B, T, H, D) its part along the own v (B, T, K, D)."""
    grouped = y.unflatten(2, (v.shape[2], -1))  # (B, T, K, H / K, D)
    own = F.normalize(v, dim=-1)[:, :, :, None]
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(2, 3)


def mix_norm(x: Tensor, x0: Tensor, mix: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mix the embedding stream into the running one, and normalise; see `Kernels`."""
    mix = mix.to(x.dtype)
    x = mix[0] * x + mix[1] * x0
    return x, rms_norm(x) * scale


EAGER = Kernels(cross_entropy, mlp_up, norm_rotate, exclude_self, mix_norm)


def operator(
    name: str,
    inputs: str,
    wrt: Sequence[int],
    shapes: Callable,
    compute: Callable,
    kept: Sequence[int] = (),
) -> Callable:
    """A differentiable function that is one opaque node of a compiled graph, each way.

    Args:
        inputs: the arguments as an operator's schema names them, tensors first.
        wrt: places of the arguments that get a gradient.
        shapes: (*arguments) -> outputs, unwritten, contiguous.
        compute: (None, *arguments) -> outputs; (gradients of outputs and then kept outputs,
            *arguments) -> gradients. All tensors come contiguous.
        kept: places of the outputs, the last ones, that only the gradient reads.
    """

    def contiguous(x: Any) -> Any:
        if isinstance(x, list):
            return [contiguous(part) for part in x]
        return x.contiguous() if isinstance(x, Tensor) else x

    def define(label: str, signature: str, fake: Callable, real: Callable) -> Any:
        made = library.custom_op(
            f"train_gpt::{label}",
            lambda *args: real(*map(contiguous, args)),
            mutates_args=(),
            schema=f"({signature}) -> Tensor[]",
        )
        made.register_fake(fake)
        return made

    def save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.save_for_backward(*(output[place] for place in kept), *tensors)
        ctx.rest = inputs[len(tensors) :]

    def backward(ctx: Any, ups: list[Tensor]) -> tuple:
        saved, read = ctx.saved_tensors, len(ups) - len(kept)
        args = *saved[len(kept) :], *ctx.rest
        grads = gradient([*ups[:read], *saved[: len(kept)]], *args)
        found = dict(zip(wrt, grads, strict=True))
        return tuple(found.get(place) for place in range(len(args)))

    gradient = define(
        f"{name}_grad",
        f"Tensor[] ups, {inputs}",
        lambda ups, *args: [args[place].new_empty(args[place].shape) for place in wrt],
        compute,
    )
    function = define(name, inputs, shapes, functools.partial(compute, None))
    function.register_autograd(backward, setup_context=save)
    return function


def tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile of whole rows: about 2,048 numbers for four warps."""
    columns = 1 << (width - 1).bit_length()
    return max(2048 // columns, 1), columns


# Below, the name `tl` and the annotations belong to Triton's language, which reads the source of
# its functions. Arithmetic is float32; what is stored takes the type of where it is stored. SHAPE
# holds the rows R and columns C of a tile, then true widths. A norm's small number is F.rms_norm's.


def triton_cross_entropy() -> Callable:
    """`cross_entropy` that reads the logits once each way and stores no float32 ones.

    tanh(x) = 2 s - 1 with s = sigmoid(2 x), of derivative 4 s (1 - s); each lane has a sum of exp.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def losses(loss, lse, logits, targets, cap, width: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        top, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, width, BLOCK):
            inside = first + column < width
            x = tl.load(logits + row * width + first + column, mask=inside, other=0.0)
            capped = cap * (2 * tl.sigmoid(2 * x.to(tl.float32) / cap) - 1)
            capped = tl.where(inside, capped, -1e30)
            higher = tl.maximum(top, capped)
            total = total * tl.exp(top - higher) + tl.exp(capped - higher)
            top = higher
        highest = tl.max(top, 0)
        log_sum = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
        tl.store(lse + row, log_sum)
        x = tl.load(logits + row * width + tl.load(targets + row)).to(tl.float32)
        tl.store(loss + row, log_sum - cap * (2 * tl.sigmoid(2 * x / cap) - 1))

    @triton.jit
    def slopes(out, grad, lse, logits, targets, cap, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        half = tl.sigmoid(2 * x / cap)
        hit = tl.where(column == tl.load(targets + row), 1.0, 0.0)
        slope = tl.exp(cap * (2 * half - 1) - tl.load(lse + row)) - hit
        slope *= tl.load(grad + row) * 4 * half * (1 - half)
        tl.store(out + row * width + column, slope, mask=column < width)

    def shapes(logits: Tensor, *_: Any) -> list[Tensor]:
        return [logits.new_empty(len(logits), dtype=torch.float32) for _ in ("loss", "log sum")]

    def compute(ups: list[Tensor] | None, logits: Tensor, targets: Tensor, cap: float):
        rows, width = logits.shape
        block = min(tile(width)[1], 1024)
        if ups is None:
            outputs = shapes(logits)
            losses[(rows,)](*outputs, logits, targets, cap, width, block)
            return outputs
        out, grid = torch.empty_like(logits), (rows, triton.cdiv(width, block))
        slopes[grid](out, *ups, logits, targets, cap, width, block)
        return [out]

    inputs = "Tensor logits, Tensor targets, float cap"
    score = operator("cross_entropy", inputs, (0,), shapes, compute, kept=(1,))

    def function(logits: Tensor, targets: Tensor, cap: float, reduction: str) -> Tensor:
        each = score(logits, targets, cap)[0]
        return each.mean() if reduction == "mean" else each

    return function


def triton_mlp_up() -> Callable:
    """`mlp_up` as one matrix product that squares what it has in registers.

    It also stores the product itself, for the gradient, whose two products are PyTorch's.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def product(out, pre, x, weight, slope, rows, hidden, width: tl.constexpr, TILE: tl.constexpr):
        # Neighbouring programs read the same rows of x; the whole weight stays in the cache.
        M: tl.constexpr = TILE[0]
        N: tl.constexpr = TILE[1]
        K: tl.constexpr = TILE[2]
        across = tl.cdiv(hidden, N)
        row = (tl.program_id(0) // across * M + tl.arange(0, M)).to(tl.int64)[:, None]
        column = (tl.program_id(0) % across * N + tl.arange(0, N))[None]
        total = tl.zeros((M, N), tl.float32)
        for first in range(0, width, K):
            inner = first + tl.arange(0, K)
            inside = (row < rows) & (inner < width)[None]
            a = tl.load(x + row * width + inner[None], mask=inside, other=0.0)
            inside = (inner < width)[:, None] & (column < hidden)
            b = tl.load(weight + column * width + inner[:, None], mask=inside, other=0.0)
            total = tl.dot(a, b, total)
        inside, place = (row < rows) & (column < hidden), row * hidden + column
        z = total.to(pre.dtype.element_ty)
        tl.store(pre + place, z, mask=inside)
        z = z.to(tl.float32)
        z = tl.where(z > 0, z, slope * z)
        tl.store(out + place, z * z, mask=inside)

    @triton.jit
    def factor(out, grad, pre, slope, size, BLOCK: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(pre + place, mask=place < size, other=0.0).to(tl.float32)
        up = tl.load(grad + place, mask=place < size, other=0.0).to(tl.float32)
        tl.store(out + place, up * tl.where(z > 0, 2.0, 2 * slope * slope) * z, mask=place < size)

    def shapes(x: Tensor, weight: Tensor, slope: float) -> list[Tensor]:
        return [x.new_empty(*x.shape[:-1], len(weight)) for _ in ("squared", "product")]

    def compute(ups: list[Tensor] | None, x: Tensor, weight: Tensor, slope: float):
        (hidden, width), rows = weight.shape, x.numel() // x.shape[-1]
        if ups is None:
            outputs, sizes = shapes(x, weight, slope), (128, 256, 128 // x.element_size())
            grid = (triton.cdiv(rows, sizes[0]) * triton.cdiv(hidden, sizes[1]),)
            args = *outputs, x, weight, slope, rows, hidden, width
            product[grid](*args, sizes, num_warps=8, num_stages=3)
            return outputs
        grad, size = torch.empty_like(ups[0]), ups[0].numel()
        factor[(triton.cdiv(size, 2048),)](grad, *ups, slope, size, 2048)
        return [grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)]

    inputs = "Tensor x, Tensor weight, float slope"
    up = operator("mlp_up", inputs, (0, 1), shapes, compute, kept=(1,))
    return lambda x, weight, slope: up(x, weight, slope)[0]


def triton_norm_rotate() -> Callable:
    """`norm_rotate` in one pass, each way; a row is a head at a position.

    A rotated column meets its partner, `half` columns away, by reading the row a second time.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def turn(out, along, grad, x, cos, sin, gain, rows, length, heads, SHAPE: tl.constexpr):
        R: tl.constexpr = SHAPE[0]
        C: tl.constexpr = SHAPE[1]
        width: tl.constexpr = SHAPE[2]
        half: tl.constexpr = SHAPE[3]
        row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
        column = tl.arange(0, C)[None]
        inside, turned = (row < rows) & (column < width), column < 2 * half
        place = row * width + column
        partner = place + tl.where(turned, tl.where(column < half, half, -half), 0)
        angle = row // heads % length * half + column % half
        c = tl.load(cos + angle, mask=inside & turned, other=1.0)
        s = tl.load(sin + angle, mask=inside & turned, other=0.0)
        s = tl.where(column < half, s, -s)
        scale = tl.load(gain + row % heads, mask=row < rows, other=0.0).to(tl.float32)
        z = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(z * z, 1)[:, None] / width + 1.1920928955078125e-07)
        if grad is None:
            other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + place, scale * inverse * (z * c + other * s), mask=inside)
        else:
            up = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
            other = tl.load(grad + partner, mask=inside, other=0.0).to(tl.float32)
            z, back = z * inverse, up * c - other * s
            own = tl.sum(z * back, 1)[:, None]
            tl.store(along + row, own, mask=row < rows)
            tl.store(out + place, scale * inverse * (back - z * own / width), mask=inside)

    def compute(ups: list[Tensor] | None, x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor):
        (_, length, heads, width), rows = x.shape, x.numel() // x.shape[-1]
        out, along, up = torch.empty_like(x), None, None
        if ups is not None:
            along, up = x.new_empty(x.shape[:-1], dtype=torch.float32), ups[0]
        args = out, along, up, x, cos, sin, gain, rows, length, heads
        turn[(triton.cdiv(rows, tile(width)[0]),)](*args, (*tile(width), width, cos.shape[-1]))
        return [out] if ups is None else [out, along.sum((0, 1)).to(gain.dtype)]

    inputs = "Tensor x, Tensor cos, Tensor sin, Tensor gain"
    one = operator("norm_rotate", inputs, (0, 3), lambda x, *_: [x.new_empty(x.shape)], compute)
    return lambda q, k, gain, rotary: (
        one(q, *rotary, gain)[0],
        one(k, *rotary, gain.new_ones(k.shape[2]))[0],
    )


def triton_exclude_self() -> Callable:
    """`exclude_self` in one pass, each way; a row is a value head at a position."""
    import triton
    import triton.language as tl

    @triton.jit
    def project(out, out_v, grad, y, v, rows, SHAPE: tl.constexpr):
        R: tl.constexpr = SHAPE[0]
        C: tl.constexpr = SHAPE[1]
        width: tl.constexpr = SHAPE[2]
        groups: tl.constexpr = SHAPE[3]
        row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
        column = tl.arange(0, C)[None]
        inside = (row < rows) & (column < width)
        own = tl.load(v + row * width + column, mask=inside, other=0.0).to(tl.float32)
        size = tl.maximum(tl.sqrt(tl.sum(own * own, 1))[:, None], 1e-12)
        own = own / size
        back = tl.zeros((R, C), tl.float32)  # the gradient of `own`
        for group in tl.static_range(groups):
            place = (row * groups + group) * width + column
            z = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
            along = tl.sum(z * own, 1)[:, None]
            if grad is None:
                tl.store(out + place, z - along * own, mask=inside)
            else:
                up = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
                up_along = tl.sum(up * own, 1)[:, None]
                back -= along * up + up_along * z
                tl.store(out + place, up - up_along * own, mask=inside)
        if grad is not None:
            back = (back - tl.sum(back * own, 1)[:, None] * own) / size
            tl.store(out_v + row * width + column, back, mask=inside)

    def compute(ups: list[Tensor] | None, y: Tensor, v: Tensor) -> list[Tensor]:
        width, groups = v.shape[-1], y.shape[2] // v.shape[2]
        out, out_v = torch.empty_like(y), None if ups is None else torch.empty_like(v)
        rows = v.numel() // width
        args = out, out_v, ups and ups[0], y, v, rows, (*tile(width), width, groups)
        project[(triton.cdiv(rows, tile(width)[0]),)](*args)
        return [out] if ups is None else [out, out_v]

    def shapes(y: Tensor, v: Tensor) -> list[Tensor]:
        return [y.new_empty(y.shape)]

    one = operator("exclude_self", "Tensor y, Tensor v", (0, 1), shapes, compute)
    return lambda y, v: one(y, v)[0]


def triton_mix_norm() -> Callable:
    """`mix_norm` in one pass, each way; a program takes 16 tiles of rows, one after the other.

    Each program sums its part of the gradient of `mix`; PyTorch adds up the programs.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def blend(out, out2, sums, up_x, up_normed, x, x0, mix, scale, rows, SHAPE: tl.constexpr):
        R: tl.constexpr = SHAPE[0]
        C: tl.constexpr = SHAPE[1]
        width: tl.constexpr = SHAPE[2]
        column = tl.arange(0, C)[None]
        a = tl.load(mix + column, mask=column < width, other=0.0).to(tl.float32)
        b = tl.load(mix + width + column, mask=column < width, other=0.0).to(tl.float32)
        sum_a = tl.zeros((R, C), tl.float32)
        sum_b = tl.zeros((R, C), tl.float32)
        for step in range(16):
            row = (tl.program_id(0) * 16 + step) * R + tl.arange(0, R)[:, None]
            inside, place = (row < rows) & (column < width), row.to(tl.int64) * width + column
            u = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(x0 + place, mask=inside, other=0.0).to(tl.float32)
            z = a * u + b * w
            inverse = tl.rsqrt(tl.sum(z * z, 1)[:, None] / width + 1.1920928955078125e-07)
            if sums is None:
                tl.store(out + place, z, mask=inside)
                tl.store(out2 + place, z * inverse * scale, mask=inside)
            else:
                z *= inverse
                up = scale * tl.load(up_normed + place, mask=inside, other=0.0).to(tl.float32)
                up = inverse * (up - z * tl.sum(up * z, 1)[:, None] / width)
                up += tl.load(up_x + place, mask=inside, other=0.0).to(tl.float32)
                tl.store(out + place, a * up, mask=inside)
                tl.store(out2 + place, b * up, mask=inside)
                sum_a += up * u
                sum_b += up * w
        if sums is not None:
            first = sums + tl.program_id(0) * 2 * width + column
            tl.store(first, tl.sum(sum_a, 0)[None], mask=column < width)
            tl.store(first + width, tl.sum(sum_b, 0)[None], mask=column < width)

    def compute(ups: list[Tensor] | None, x: Tensor, x0: Tensor, mix: Tensor, scale: float):
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        programs = triton.cdiv(rows, 16 * tile(width)[0])
        outputs = [torch.empty_like(x) for _ in range(2)]
        sums = None if ups is None else mix.new_empty(programs, 2, width, dtype=torch.float32)
        args = *outputs, sums, *(ups or (None, None)), x, x0, mix, scale, rows
        blend[(programs,)](*args, (*tile(width), width))
        return outputs if ups is None else [*outputs, sums.sum(0).to(mix.dtype)]

    def shapes(x: Tensor, *_: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for _ in range(2)]

    inputs = "Tensor x, Tensor x0, Tensor mix, float scale"
    one = operator("mix_norm", inputs, (0, 1, 2), shapes, compute)
    return lambda *args: tuple(one(*args))


@functools.lru_cache(maxsize=1)
def triton_kernels() -> Kernels:
    """The Triton twin of `EAGER`. Raises ImportError where there is no Triton."""
    return Kernels(
        triton_cross_entropy(),
        triton_mlp_up(),
        triton_norm_rotate(),
        triton_exclude_self(),
        triton_mix_norm(),
    )


@functools.lru_cache
def kernel_fault(device: torch.device, dtype: torch.dtype) -> str:
    """What speaks against the Triton kernels on this device, "" for nothing: tries each of them."""
    try:
        kernels, knobs_of_triton = triton_kernels(), importlib.import_module("triton.knobs")
    except ImportError as error:
        return f"triton does not import ({error})"
    if device.type != "cuda" and not knobs_of_triton.runtime.interpret:
        return "the device is no GPU"
    like = torch.empty((), device=device, dtype=dtype)
    targets = torch.arange(96, device=device) * 11
    rotary = tuple(wave(48, 1, 8, like=like.float(), pitch=pitch) for pitch in (1.1, 1.2))
    # Widths as in a model; numbers of rows and outputs that fill no tile.
    x, weight = wave(2, 48, 256, like=like), wave(320, 256, like=like, pitch=1.4)
    q, v = x.view(2, 48, 4, 64), wave(2, 48, 2, 64, like=like, pitch=1.3)
    cases = dict(
        cross_entropy=(lambda f, x: f(x, targets, 5.0, "none"), 10 * wave(96, 1100, like=like)),
        mlp_up=(lambda f, *a: f(*a, 0.5), x, weight),
        norm_rotate=(lambda f, *a: f(*a, rotary), q, v, wave(4, like=like.float())),
        exclude_self=(lambda f, *a: f(*a), q, v),
        mix_norm=(lambda f, *a: f(*a, 0.5), x, x.roll(1), wave(2, 256, like=like.float())),
    )
    for name, (call, *inputs) in cases.items():
        twin, kernel = (functools.partial(call, getattr(k, name)) for k in (EAGER, kernels))
        try:
            problem = difference(twin, kernel, *inputs)
        except Exception as error:  # whatever a compiler may raise on a device it does not know
            problem = f"{type(error).__name__}: " + f"{error}".partition("\n")[0]
        if problem:
            return f"{name}: {problem}"
    return ""


def select_kernels(
    choice: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, Kernels, str]:
    """Decide once which twins a run uses: (name, kernels, reason).

    On a CPU there are Triton kernels in Triton's interpreter alone, and only by KERNELS=1.
    Raises: ConfigError if the choice cannot be honoured.
    """
    if choice == "0":
        return "eager", EAGER, "as set"
    on_gpu = choice == "1" or device.type == "cuda"
    fault = kernel_fault(device, dtype) if on_gpu else "the device is no GPU"
    if fault and choice == "1":
        raise ConfigError(f"KERNELS=1: {fault}; unset it or set KERNELS=0")
    if fault:
        return "eager", EAGER, f"no triton: {fault}"
    return "triton", triton_kernels(), "as set" if choice == "1" else "each agrees with its twin"


class Linear(nn.Linear):
    """A matrix without bias, kept in float32 and cast to the type of its input at use."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor, fake_bits: int = 0, product: Callable = F.linear) -> Tensor:
        weight = fake_quantize(self.weight, fake_bits) if fake_bits else self.weight
        return product(x, weight.to(x.dtype))


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    """A matrix rounded as the percentile rule stores it; its gradient passes straight through."""
    with torch.no_grad():
        smallest = smallest_step(bits, floored=True)
        scales = percentile_scales(weight, bits, QAT_PERCENTILES, smallest)[:, None]
        rounded = (weight / scales).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) * scales
    return weight + (rounded - weight).detach()


class Attention(nn.Module):
    """Causal attention with grouped heads, normalised queries and keys, q-gain and optional XSA."""

    def __init__(self, cfg: Config, layer: int, kernel: Callable, kernels: Kernels):
        super().__init__()
        self.head_dim, self.kernel = cfg.model_dim // cfg.num_heads, kernel
        self.kernels = kernels
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n
        self.q = Linear(cfg.model_dim, cfg.model_dim)
        self.k = Linear(cfg.model_dim, self.head_dim * cfg.num_kv_heads)
        self.v = Linear(cfg.model_dim, self.head_dim * cfg.num_kv_heads)
        self.out = Linear(cfg.model_dim, cfg.model_dim)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        value: Tensor | None = None,
        fake_bits: int = 0,
        documents: Documents | None = None,
    ) -> Tensor:
        q, k, v = (m(x, fake_bits) for m in (self.q, self.k, self.v))
        if value is not None:
            v = v + value
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in (q, k, v))
        q, k = self.kernels.norm_rotate(q, k, self.q_gain, rotary)  # (B, T, H or K, D)
        y = self.kernel(q, k, v, documents)
        if self.exclusive:
            y = self.kernels.exclude_self(y, v)
        return self.out(y.flatten(-2), fake_bits)


class MLP(nn.Module):
    """Up, LeakyReLU squared, down."""

    def __init__(self, cfg: Config, kernels: Kernels):
        super().__init__()
        self.up = Linear(cfg.model_dim, cfg.mlp_hidden)
        self.down = Linear(cfg.mlp_hidden, cfg.model_dim)
        self.product = functools.partial(kernels.mlp_up, slope=cfg.leaky_relu_slope)

    def forward(self, x: Tensor, fake_bits: int = 0) -> Tensor:
        return self.down(self.up(x, fake_bits, self.product), fake_bits)


class Block(nn.Module):
    """One layer: attention and MLP in one of the forms of `Visit`, with learned channel scales.

    `resid_mix` mixes the running stream and the embedding stream x0 at the entry. The norm scale
    1/sqrt(layer + 1) takes the physical layer, also on repeated visits.
    """

    def __init__(self, cfg: Config, layer: int, kernel: Callable, kernels: Kernels):
        super().__init__()
        self.attn, self.mlp = Attention(cfg, layer, kernel, kernels), MLP(cfg, kernels)
        self.mix_norm = kernels.mix_norm
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(
            torch.stack([torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim)])
        )
        self.norm_scale = 1 / math.sqrt(layer + 1)

    def forward(
        self,
        x: Tensor,
        lane: Tensor,
        x0: Tensor,
        rotary: tuple[Tensor, Tensor],
        form: str,
        value: Tensor | None = None,
        fake_bits: int = 0,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The running stream and the second lane, which only the form "lanes" reads and moves."""
        attn_scale, mlp_scale = (p.to(x.dtype) for p in (self.attn_scale, self.mlp_scale))
        x, normed = self.mix_norm(x, x0, self.resid_mix, self.norm_scale)
        mid = x + attn_scale * self.attn(normed, rotary, value, fake_bits, documents)
        source = {"sequential": mid, "gptj": x, "lanes": lane}[form]
        update = mlp_scale * self.mlp(rms_norm(source) * self.norm_scale, fake_bits)
        return (mid, lane + update) if form == "lanes" else (mid + update, lane)


class BigramHash(nn.Module):
    """A table row for each pair of neighbouring tokens, found by a hash; the last row: no pair."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(cfg.bigram_vocab_size, cfg.bigram_dim))
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, tokens: Tensor, dtype: torch.dtype, *, packed: bool = False) -> Tensor:
        last, now = len(self.table) - 1, tokens.int()
        rows = torch.bitwise_xor(36313 * now[:, 1:], 27191 * now[:, :-1]) % last
        rows = F.pad(rows, (1, 0), value=last)  # the first token has no neighbour
        if packed:
            rows = rows.masked_fill(tokens == BOS, last)
        return self.scale.to(dtype) * self.proj(F.embedding(rows, self.table).to(dtype))


class ValueEmbedding(nn.Module):
    """One more embedding of the tokens, added to the values of a few layers."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(cfg.vocab_size, cfg.ve_dim))
        self.proj = Linear(cfg.ve_dim, cfg.model_dim // cfg.num_heads * cfg.num_kv_heads)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scales = nn.Parameter(torch.ones(len(cfg.value_layers)))
        self.layers = cfg.value_layers

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """What each layer adds to its values (B, T, K D), by layer."""
        shared = self.scale.to(dtype) * self.proj(F.embedding(tokens, self.table).to(dtype))
        return {
            layer: self.layer_scales[i].to(dtype) * shared for i, layer in enumerate(self.layers)
        }


class GPT(nn.Module):
    """The model. `head` is tied: its rows are also the token embedding."""

    def __init__(
        self,
        cfg: Config,
        kernel: Callable = plain_attention,
        compute_dtype: torch.dtype = torch.float32,
        kernels: Kernels = EAGER,
    ):
        super().__init__()
        self.cfg, self.compute_dtype, self.kernels = cfg, compute_dtype, kernels
        self.head = Linear(cfg.model_dim, cfg.vocab_size)
        self.blocks = nn.ModuleList(
            Block(cfg, layer, kernel, kernels) for layer in range(cfg.num_layers)
        )
        skips = max(depth_plan(cfg, looped=looped).skips for looped in (False, True))
        self.skip_weights = nn.Parameter(torch.ones(skips, cfg.model_dim))
        # What an option does not need does not exist.
        if cfg.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(skips, cfg.model_dim))
        if cfg.parallel_residual_form == "lanes":
            self.lane_merge = nn.Parameter(torch.tensor(0.5))
        if cfg.smear_gate_enabled:
            self.smear_gate = nn.Parameter(torch.zeros(cfg.model_dim))
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        self.value_embedding = ValueEmbedding(cfg) if cfg.ve_dim else None

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the matrices: normal embedding, zero output projections, the rest orthogonal."""
        draw = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.head.weight, std=self.cfg.tied_embed_init_std, generator=draw)
        for block in self.blocks:
            for module in (block.attn.q, block.attn.k, block.attn.v, block.mlp.up):
                nn.init.orthogonal_(module.weight, generator=draw)
            nn.init.zeros_(block.attn.out.weight)
            nn.init.zeros_(block.mlp.down.weight)
        if self.bigram is not None:
            nn.init.zeros_(self.bigram.proj.weight)
        if self.value_embedding is not None:
            nn.init.normal_(self.value_embedding.table, std=0.01, generator=draw)
            nn.init.zeros_(self.value_embedding.proj.weight)

    def embed(self, tokens: Tensor, *, packed: bool = False) -> Tensor:
        """The input stream (B, T, D); packed: a document's first token has none before it."""
        x = F.embedding(tokens, self.head.weight).to(self.compute_dtype)
        if self.bigram is not None:
            x = x + self.bigram(tokens, x.dtype, packed=packed)
        x = rms_norm(x)
        if self.cfg.smear_gate_enabled:
            gate = self.smear_gate.sigmoid().to(x.dtype)
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
            if packed:
                before = before.masked_fill((tokens == BOS)[..., None], 0)
            x = (1 - gate) * x + gate * before
        return x

    def mix_skip(self, x: Tensor, skip: Tensor, row: int) -> Tensor:
        """The running stream with a skip in it, gated or added."""
        skip = self.skip_weights[row].to(x.dtype) * skip
        if not self.cfg.skip_gates_enabled:
            return x + skip
        gate = self.skip_gates[row].sigmoid().to(x.dtype)
        return gate * x + (1 - gate) * skip

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        plan: DepthPlan,
        reduction: str = "mean",
        tail: int | None = None,
    ) -> Tensor:
        """Logits, or the loss of targets.

        Args:
            tokens, targets: (B, T) int64; targets[b, t] is the token after tokens[b, :t + 1].
            plan: the visits of this forward.
            reduction: "mean", or "none" for a loss per target; in nats.
            tail: score only the last so many positions of each row; None: all.
        Returns: float32; logits (B, tail, V), loss () or losses (B, tail).
        """
        rotary = rotary_table(tokens.shape[1], self.cfg, tokens.device)
        documents = find_documents(tokens) if plan.packed else None
        x = x0 = lane = self.embed(tokens, packed=plan.packed)
        values = self.value_embedding(tokens, x.dtype) if self.value_embedding is not None else {}
        skips, lanes = [], False
        for visit in plan.visits:
            if visit.pop >= 0:
                x = self.mix_skip(x, skips.pop(), visit.pop)
            if visit.form == "lanes" and not lanes:
                lane, lanes = x, True
            block, value = self.blocks[visit.layer], values.get(visit.layer)
            x, lane = block(x, lane, x0, rotary, visit.form, value, plan.fake_bits, documents)
            if visit.push:
                skips.append(x)
        if lanes:
            x = self.lane_merge.to(x.dtype) * x + (1 - self.lane_merge).to(x.dtype) * lane
        if tail is not None:
            x, targets = x[:, -tail:], None if targets is None else targets[:, -tail:]
        cap, logits = self.cfg.logit_softcap, self.head(rms_norm(x))
        if targets is None:
            return softcap(logits, cap)
        rows = logits.flatten(0, 1), targets.flatten()
        losses = self.kernels.cross_entropy(*rows, cap, reduction)
        return losses if reduction == "mean" else losses.view_as(targets)

    def flops_per_token(self, plan: DepthPlan, length: int) -> float:
        """Operations of a forward and backward per token: 6 per weight, causal attention."""
        cfg = self.cfg
        weights = (
            sum(
                m.weight.numel()
                for v in plan.visits
                for m in self.blocks[v.layer].modules()
                if isinstance(m, Linear)
            )
            + self.head.weight.numel()
        )
        return 6.0 * weights + 6.0 * length * cfg.model_dim * len(plan.visits)


# ---------------------------------------------------------------------------------------------
# 5  Optimizer
# One table claims every tensor: optimizer group, quantizer and bits. Muon for matrices, AdamW for
# the rest. The same classes serve one rank and many.
# ---------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """Who optimizes and who stores the tensors whose whole name matches `pattern`.

    quantizer: "gptq" or "nearest" for codes of `bits`, or the float type that is stored (bits 0).
    clip_sigmas, percentiles, smallest: how a row's step is found, see `row_scales`.
    """

    pattern: str
    optimizer: str
    quantizer: str
    bits: int = 0
    clip_sigmas: float = 0.0
    percentiles: tuple[float, ...] = ()
    smallest: float = 0.0


MATRIX_PERCENTILES, TABLE_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0), (0.9999984,)
QAT_PERCENTILES = (0.9995,)


def tensor_rules(cfg: Config) -> tuple[Rule, ...]:
    """The only place that decides how a tensor is optimized and stored."""
    searched = cfg.clip_rule == "percentile"
    steps = [
        smallest_step(bits, floored=searched or cfg.scale_floor)
        for bits in (cfg.matrix_bits, cfg.embed_bits)
    ]
    percentiles = (MATRIX_PERCENTILES, TABLE_PERCENTILES) if searched else ((), ())
    matrix = (cfg.matrix_bits, cfg.matrix_clip_sigmas, percentiles[0], steps[0])
    table = (cfg.embed_bits, cfg.embed_clip_sigmas, percentiles[1], steps[1])
    words = "|".join(re.escape(word) for word in cfg.int8_sensitive.split(",") if word) or "(?!)"
    weights = r"blocks\.\d+\.(attn\.(q|k|v|out)|mlp\.(up|down))\.weight"
    vectors = (
        r"blocks\.\d+\.(attn\.q_gain|attn_scale|mlp_scale|resid_mix)|skip_(weights|gates)"
        r"|lane_merge|smear_gate|bigram\.scale|value_embedding\.(scale|layer_scales)"
    )
    return (
        Rule(r"head\.weight", "embedding", cfg.embed_quantizer, *table),
        Rule(r"(bigram|value_embedding)\.table", "embedding", "nearest", *table),
        Rule(rf"(?!.*({words})){weights}", "matrix", "gptq", *matrix),
        Rule(rf"(?=.*({words})){weights}", "matrix", "gptq", *table),
        Rule(r"(bigram|value_embedding)\.proj\.weight", "matrix", "float16"),
        Rule(vectors, "scalar", cfg.control_dtype),
    )


def rule_of(name: str, rules: Sequence[Rule]) -> Rule:
    """The one rule that claims a tensor; it is our mistake if none or two do."""
    claims = [rule for rule in rules if re.fullmatch(rule.pattern, name)]
    assert len(claims) == 1, f"tensor {name} is claimed by {len(claims)} rules, expected one"
    return claims[0]


def parameter_groups(model: nn.Module, cfg: Config) -> dict[str, list[nn.Parameter]]:
    """The parameters of each optimizer group, in the model's order."""
    groups = {"matrix": [], "embedding": [], "scalar": []}
    for name, parameter in model.named_parameters():
        groups[rule_of(name, tensor_rules(cfg)).optimizer].append(parameter)
    return groups


def newton_schulz(updates: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Push the singular values of matrices (..., rows, cols) towards 1; same shape, in `dtype`.

    Five steps leave them between about 0.7 and 1.2, whatever their size was. Source: Jordan et al.
    2024, Muon, the quintic iteration X <- aX + (bA + cA^2)X with A = X X^T.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = updates.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz, with decoupled weight decay.

    Matrices of one shape travel and are orthogonalised as one batch. Each rank receives the sum of
    its part of the gradients, keeps the momentum of that part only, and sends its updates to the
    others. Source: Jordan et al. 2024; row normalisation: MuonEq-R (system #1493).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        rt: Runtime,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        backend_steps: int,
        row_normalize: bool,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.rt, self.backend_steps, self.row_normalize = rt, backend_steps, row_normalize
        self.orthogonalize = rt.compile(newton_schulz)
        by_shape = collections.defaultdict(list)
        for parameter in self.param_groups[0]["params"]:
            by_shape[parameter.shape].append(parameter)
        # The largest first: only the message of the last batch has nothing to hide behind.
        self.batches = sorted(by_shape.values(), key=lambda p: -len(p) * p[0].numel())

    def reduce(self) -> Callable[[], None]:
        """Start adding the gradients over the ranks; the function that comes back waits.

        Then a parameter of this rank's part has the sum, and any other has no gradient.
        """
        arrive = self.rt.start_sum_parts([[p.grad for p in params] for params in self.batches])

        def finish() -> None:
            for params, sums in zip(self.batches, arrive(), strict=True):
                for parameter in params:
                    parameter.grad = None
                for parameter, total in zip(params[self.rt.part(len(params))], sums, strict=True):
                    parameter.grad = total

        return finish

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters in place, by the gradients of this rank's part and the others'.

        The updates of one shape travel while those of the next are computed; in the type of the
        activations, as Newton-Schulz made them: sending float32 would double the bytes for nothing.
        """
        (group,) = self.param_groups
        coming = [
            self.rt.start_gather(self.orthogonal_update(params, group["momentum"]))
            for params in self.batches
        ]
        for params, arrive in zip(self.batches, coming, strict=True):
            update = arrive()[: len(params)].to(params[0].dtype)
            rows, cols = params[0].shape
            scale = math.sqrt(max(1.0, rows / cols))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * scale)

    def orthogonal_update(self, params: list[nn.Parameter], momentum: float) -> Tensor:
        """(part, rows, cols): the updates of this rank's part, padded to one size by zeros."""
        part = self.rt.part(len(params))
        mine = params[part]
        grads = torch.zeros((part.stop - part.start, *params[0].shape), device=params[0].device)
        if mine:
            torch.stack([p.grad for p in mine], out=grads[: len(mine)])
        state = self.state[params[0]]
        if not state:
            state["momentum"] = torch.zeros_like(grads)
        average = state["momentum"].mul_(momentum).add_(grads)
        update = grads.add_(average, alpha=momentum)  # Nesterov
        if self.row_normalize:
            update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        return self.orthogonalize(update, self.backend_steps, self.rt.compute_dtype)


def make_optimizers(model: nn.Module, cfg: Config, rt: Runtime) -> dict[str, torch.optim.Optimizer]:
    """Fresh optimizers by group name. Their learning rates are set at every step."""
    groups = parameter_groups(model, cfg)
    adam = functools.partial(
        torch.optim.AdamW, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True
    )
    return {
        "matrix": Muon(
            groups["matrix"],
            rt,
            lr=cfg.matrix_lr,
            momentum=cfg.muon_momentum,
            weight_decay=cfg.muon_wd,
            backend_steps=cfg.muon_backend_steps,
            row_normalize=cfg.muon_row_normalize,
        ),
        "embedding": adam(groups["embedding"], lr=cfg.tied_embed_lr, weight_decay=cfg.embed_wd),
        "scalar": adam(groups["scalar"], lr=cfg.scalar_lr, weight_decay=cfg.adam_wd),
    }


def lr_scale(frac: float, cfg: Config, step: int = 0) -> float:
    """Learning-rate multiplier at a part of training: 1, then a line to 0, never below MIN_LR.

    The line takes the last WARMDOWN_FRAC, or the last WARMDOWN_ITERS steps at the speed so far:
    `step` steps in a part `frac` leave step (1 - frac) / frac.
    """
    if cfg.warmdown_iters:
        scale = step * (1 - frac) / frac / cfg.warmdown_iters if frac else 1.0
    else:
        scale = (1 - frac) / cfg.warmdown_frac if cfg.warmdown_frac else 1.0
    return max(min(scale, 1.0), cfg.min_lr)


def muon_momentum(step: int, cfg: Config) -> float:
    """Muon's momentum: a line over the first steps, then constant."""
    part = (
        min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    )
    return (1 - part) * cfg.muon_momentum_warmup_start + part * cfg.muon_momentum


# ---------------------------------------------------------------------------------------------
# 6  Training
# Steps until the wall clock or ITERATIONS ends them. The clock is read once per step and agreed on
# by all ranks, so learning rates, the start of recurrence and the end are the same everywhere.
# ---------------------------------------------------------------------------------------------


class Ema:
    """Exponential moving average of every parameter, in float32, updated in place."""

    def __init__(self, model: nn.Module, decay: float):
        self.params, self.decay = list(model.parameters()), decay
        self.average = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.average, self.params, 1 - self.decay)

    @torch.no_grad()
    def store(self) -> None:
        """Overwrite the model with the average."""
        torch._foreach_copy_(self.params, self.average)


class LossWatch:
    """The loss of the step before, read without making the device wait for the host.

    Reading it waits until that step is done, so the host never runs more than a step ahead and its
    clock tells the device's time.
    """

    def __init__(self):
        self.pending, self.value, self.last_finite = None, 0.0, math.nan

    def push(self, loss: Tensor | None) -> None:
        """Take the newest loss, () or None after the last step, and read the one before."""
        previous, self.pending = self.pending, None
        if loss is not None:
            host, event = loss.detach().to("cpu", non_blocking=True), None
            if loss.is_cuda:
                event = torch.cuda.Event()
                event.record()
            self.pending = host, event
        if previous is not None:
            host, event = previous
            if event is not None:
                event.synchronize()
            self.value = host.item()
            if math.isfinite(self.value):
                self.last_finite = self.value

    def check(self, bad: float, step: int, rates: Mapping[str, float]) -> None:
        """Raises DivergenceError, with the facts, if any rank's loss was bad."""
        if bad:
            raise DivergenceError(
                f"step {step}: the training loss is not finite; last finite loss on this rank "
                f"{self.last_finite:.4f}; learning rates "
                + " ".join(f"{name}={rate:.3g}" for name, rate in rates.items())
                + "; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR"
            )

    @property
    def bad(self) -> float:
        return float(not math.isfinite(self.value))


class Trained(NamedTuple):
    """What training leaves besides the weights in the model."""

    steps: int
    looped: bool  # whether the last step ran the looped plan
    invalid_for_records: tuple[str, ...] = ()  # why a result can never be a record


def training_frac(step: int, seconds: float, cfg: Config) -> float:
    """Part of training done: of the steps or of the time, whichever will end it."""
    return max(step / cfg.iterations, seconds / cfg.train_seconds)


def train_step(
    forward: Callable,
    windows: Tensor,
    plan: DepthPlan,
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    cfg: Config,
    rt: Runtime,
) -> Tensor:
    """One optimizer step on this rank's windows (rows, T + 1).

    Returns: this rank's part of the mean loss, a scalar tensor; all ranks' parts add up to it.
    Changes the model and the optimizers in place.
    """
    plan = plan._replace(packed=cfg.doc_packing)  # here alone: scoring reads on
    count = cfg.micro_batches(rt.world_size) * rt.world_size
    total = torch.zeros((), device=windows.device)
    for micro in windows.chunk(count // rt.world_size):
        loss = forward(*inputs_and_targets(micro), plan=plan) / count
        loss.backward()
        total += loss.detach()
    apply_gradients(model, optimizers.values(), cfg.grad_clip_norm, rt)
    return total


def apply_gradients(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], clip_norm: float, rt: Runtime
) -> None:
    """Add the gradients of all ranks, clip their global norm (0: not), step, drop them.

    A compiled backward hands out all gradients at its end: nothing could leave earlier. Muon takes
    parts of the sums: 255 MB sent by each of 8 ranks, not 402 (records/profile.md).
    """
    optimizers, params = list(optimizers), [p for p in model.parameters() if p.requires_grad]
    for parameter in params:
        if parameter.grad is None:  # this rank had no text
            parameter.grad = torch.zeros_like(parameter)
    muons = [o for o in optimizers if isinstance(o, Muon)]
    apart = {p for muon in muons for p in muon.param_groups[0]["params"]}
    coming = [rt.start_sum(*(p.grad for p in params if p not in apart))]
    coming += [muon.reduce() for muon in muons]
    for arrive in coming:
        arrive()
    if clip_norm:
        nn.utils.clip_grads_with_norm_(params, clip_norm, global_norm(params, apart, rt))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def global_norm(params: Sequence[nn.Parameter], apart: Set[nn.Parameter], rt: Runtime) -> Tensor:
    """The norm of all gradients together, a scalar tensor, the same on every rank.

    Those `apart` lie on one rank each; the others lie on all, and rank 0 alone counts them.
    """
    mine = [p for p in params if p.grad is not None and (p in apart or rt.is_main)]
    grads = [p.grad for p in mine]
    norms = dict(zip(mine, torch._foreach_norm(grads) if grads else grads, strict=True))
    nothing = params[0].new_zeros(())
    each = torch.stack([norms.get(p, nothing) for p in params])
    rt.sum_(each)  # each norm and the zeros of other ranks: no digit depends on who had it
    return torch.linalg.vector_norm(each)


def set_schedule(
    optimizers: Mapping[str, torch.optim.Optimizer], step: int, frac: float, cfg: Config
) -> dict[str, float]:
    """Set the learning rates and Muon's momentum of a step; returns the rates by group."""
    scale = lr_scale(frac, cfg, step)
    rates = {
        "matrix": cfg.matrix_lr * scale,
        "embedding": cfg.tied_embed_lr * scale,
        "scalar": cfg.scalar_lr * scale,
    }
    for name, optimizer in optimizers.items():
        optimizer.param_groups[0]["lr"] = rates[name]
    optimizers["matrix"].param_groups[0]["momentum"] = muon_momentum(step, cfg)
    return rates


def warm_up(
    forward: Callable, model: nn.Module, loader: Loader, cfg: Config, rt: Runtime, log: Log
) -> None:
    """Run real steps of all depth plans, so that all is compiled before the clock, then undo them.

    Nothing outlives it: the weights are put back, the optimizers are its own, the loader has no
    state, and the random state is restored.
    """
    weights = copy.deepcopy(model.state_dict())
    rows = cfg.train_batch_tokens // cfg.train_seq_len
    plans = dict.fromkeys(depth_plan(cfg, looped=looped) for looped in (False, True))
    if cfg.late_qat_threshold:
        plans |= dict.fromkeys(plan._replace(fake_bits=cfg.matrix_bits) for plan in plans)
    with torch.random.fork_rng():
        for plan in plans:
            optimizers = make_optimizers(model, cfg, rt)
            name = "loop_warmup_step" if plan.visits[cfg.num_layers :] else "warmup_step"
            show = log.progress(name)
            with contextlib.closing(loader.batches(rt, rows)) as batches:
                for step in range(cfg.warmup_steps):
                    set_schedule(optimizers, step, 0.0, cfg)
                    train_step(forward, next(batches), plan, model, optimizers, cfg, rt)
                    show((step + 1) / cfg.warmup_steps)
            model.load_state_dict(weights)
            log.line(f"{name}: {cfg.warmup_steps}/{cfg.warmup_steps}")


def measure_reserve(model: GPT, loader: Loader, cfg: Config, rt: Runtime, log: Log) -> Config:
    """The configuration with the time that calibration and quantization of this model will take.

    Two batches of calibration and, on rank 0, one pass of the quantizer tell; a tenth is added.
    """
    silent, plan = Log(".", "", enabled=False), depth_plan(cfg, looped=True)
    trial = dataclasses.replace(cfg, gptq_calibration_batches=2, max_wallclock_seconds=0.0)
    begin = time.perf_counter()
    hessians = collect_hessians(model, loader, 0, plan, trial, rt, silent)
    rt.synchronize()
    middle = time.perf_counter()
    if rt.is_main:
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        quantize_model(weights, hessians, cfg, silent)
        rt.synchronize()
    batches = cfg.gptq_calibration_batches / trial.gptq_calibration_batches
    needed = 1.1 * ((middle - begin) * batches + time.perf_counter() - middle)
    (seconds,) = rt.agree_max(min(needed, 0.5 * cfg.max_wallclock_seconds))
    log.line(f"GPTQ:reserving {seconds:.1f}s for calibration and quantization, as measured")
    log.put(gptq_reserve_seconds=seconds)
    return dataclasses.replace(cfg, gptq_reserve_seconds=seconds)


class StepLog:
    """Writes the training lines: loss, time, throughput, and model-FLOP utilisation.

    Attributes: curve, the losses that were logged; durations, seconds of each step by depth plan;
    waited, seconds from the start of Runtime to the first step.
    """

    def __init__(self, model: GPT, cfg: Config, rt: Runtime, log: Log):
        self.model, self.cfg, self.rt, self.log = model, cfg, rt, log
        self.show, self.curve = log.progress("train"), []
        self.durations, self.begun = collections.defaultdict(list), None
        self.compiled, self.waited = rt.compilations(), time.perf_counter() - rt.created
        log.line(f"time_to_first_step: {self.waited:.1f}s")

    @contextlib.contextmanager
    def off_the_clock(self):
        """What is compiled inside the block is not compiled while the clock of training runs."""
        before = self.rt.compilations()
        yield
        self.compiled += self.rt.compilations() - before

    def begin(self, seconds: float, plan: DepthPlan) -> None:
        """A step begins, or training ends, at this time on the training clock."""
        if self.begun:
            before, last_plan = self.begun
            self.durations[last_plan].append(seconds - before)
        self.begun = seconds, plan

    def end(self, step: int, frac: float, loss: Tensor) -> None:
        """The step was enqueued; `loss` is this rank's part of its mean loss."""
        cfg, (seconds, plan) = self.cfg, self.begun
        self.show(frac, f"step:{step}/{cfg.iterations}")
        if step > 5 and step % cfg.train_log_every:
            return
        mean = loss.clone()
        self.rt.sum_(mean)
        self.curve.append(dict(step=step, train_loss=mean.item(), train_seconds=seconds))
        line = f"{step}/{cfg.iterations} train_loss: {mean.item():.4f} "
        line += f"train_time: {seconds / 60:.1f}m"
        if step > 1:
            line += f" tok/s: {(step - 1) * cfg.train_batch_tokens / max(seconds, 1e-9):.0f}"
        if recent := self.durations[plan][-cfg.train_log_every :]:
            line += " " + self.utilisation(plan, max(float(np.median(recent)), 1e-9))
        self.log.line(line)

    def utilisation(self, plan: DepthPlan, step_seconds: float) -> str:
        """Model-FLOP utilisation of a device, or its speed where its peak is not known."""
        tokens = self.cfg.train_batch_tokens / self.rt.world_size
        work = tokens * self.model.flops_per_token(plan, self.cfg.train_seq_len)
        speed, peak = work / step_seconds, self.rt.peak_flops()
        return f"mfu: {speed / peak:.3f}" if peak else f"tflops: {speed / 1e12:.3f}"

    def close(self) -> None:
        """Say what was compiled too late and how long the steps took; keep the facts."""
        compiled = self.rt.compilations() - self.compiled
        self.log.line(f"compilations after the clock started: {compiled}")
        medians = {
            f"{len(plan.visits)}_visits{'_rounded' * bool(plan.fake_bits)}": round(
                1e3 * float(np.median(times)), 3
            )
            for plan, times in self.durations.items()
        }
        self.log.line("step_ms " + " ".join(f"{key}:{value}" for key, value in medians.items()))
        self.log.put(
            curve=self.curve,
            step_ms=medians,
            compilations_after_start=compiled,
            time_to_first_step_seconds=round(self.waited, 3),
        )


def due_plan(
    plan: DepthPlan, looped: DepthPlan, step: int, frac: float, cfg: Config, log: Log
) -> DepthPlan:
    """The plan of a step: recurrence and rounded training begin when they are due, and stay."""
    at_step, scale = cfg.enable_looping_at_step, lr_scale(frac, cfg, step)
    due = step >= at_step if at_step else frac >= cfg.enable_looping_at
    if due and plan.visits != looped.visits:
        plan = plan._replace(visits=looped.visits)
        log.line(
            f"layer_loop:enabled step:{step} frac:{frac:.3f} encoder:{plan.encoder} "
            f"decoder:{plan.decoder}"
        )
    if scale < cfg.late_qat_threshold and not plan.fake_bits:
        plan = plan._replace(fake_bits=cfg.matrix_bits)
        log.line(f"late_qat:enabled step:{step} scale:{scale:.4f}")
    return plan


def train(
    forward: Callable,
    model: GPT,
    loader: Loader,
    validate: Callable[[DepthPlan, str], None],
    cfg: Config,
    rt: Runtime,
    log: Log,
) -> Trained:
    """Train the model in place and leave the average of its weights in it.

    Args:
        forward: the model, perhaps compiled.
        validate: called every VAL_LOSS_EVERY steps with the plan and a line prefix; it opens a
            phase of its own, so the clock of training stands still.
    Raises: DivergenceError on all ranks once the loss of any is not finite.
    """
    plain, looped = (depth_plan(cfg, looped=on) for on in (False, True))
    plan, step, watch, rates = plain, 0, LossWatch(), {}
    optimizers, ema = make_optimizers(model, cfg, rt), Ema(model, cfg.ema_decay)
    report = StepLog(model, cfg, rt, log)
    batches = loader.batches(rt, cfg.train_batch_tokens // cfg.train_seq_len)
    with contextlib.closing(batches), rt.budget.phase("train"):
        while True:
            seconds, bad = rt.agree_max(rt.budget.total(["train"]), watch.bad)
            watch.check(bad, step - 1, rates)
            frac = training_frac(step, seconds, cfg)
            if frac >= 1:
                report.begin(seconds, plan)
                break
            if cfg.val_loss_every and step and step % cfg.val_loss_every == 0:
                with report.off_the_clock():
                    validate(plan, f"{step}/{cfg.iterations}")
            plan = due_plan(plan, looped, step, frac, cfg, log)
            report.begin(seconds, plan)
            rates = set_schedule(optimizers, step, frac, cfg)
            loss = train_step(forward, next(batches), plan, model, optimizers, cfg, rt)
            ema.update()
            step += 1
            watch.push(loss)
            report.end(step, frac, loss)
        watch.push(None)
        watch.check(rt.agree_max(watch.bad)[0], step, rates)
        ema.store()
    report.close()
    if step < cfg.iterations:
        log.line(
            f"stopping_early: wallclock_cap train_time: {seconds * 1e3:.0f}ms "
            f"step: {step}/{cfg.iterations}"
        )
    return Trained(step, plan.visits != plain.visits)


def fine_tune_on_validation(
    forward: Callable, model: GPT, val: ValidationTokens, cfg: Config, rt: Runtime, log: Log
) -> None:
    """Train on the text that will be scored, as system #1487 did; its result is no record.

    AdamW, cosine over the epochs down to a tenth, first blocks frozen; `forward` has its depth plan
    bound. Changes the model in place.
    """
    length, epochs = cfg.eval_seq_len, cfg.prequant_ttt_epochs
    count = (len(val.tokens) - 1) // length
    places = np.arange(count)[:, None] * length + np.arange(length + 1)
    rows = max(cfg.prequant_ttt_batch_tokens // length, 1)
    freeze(model, cfg.prequant_ttt_freeze_blocks, embeddings=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for epoch in range(epochs):
        floor = 0.1 * cfg.prequant_ttt_lr
        swing = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        optimizer.param_groups[0]["lr"] = floor + (cfg.prequant_ttt_lr - floor) * swing
        losses, begun, show = [], time.perf_counter(), log.progress("prequant_ttt")
        for first in range(0, count, rows):
            batch = val.tokens[places[first : first + rows]]
            losses.append(text_gradients(forward, batch, cfg, rt) * len(batch))
            apply_gradients(model, [optimizer], 1.0, rt)
            show(min(first + rows, count) / count)
        loss = float(torch.stack(losses).sum()) / count
        seconds = time.perf_counter() - begun
        log.line(f"prequant_ttt:epoch {epoch + 1}/{epochs} loss:{loss:.4f} time:{seconds:.1f}s")
    model.requires_grad_(True)


def freeze(model: GPT, blocks: int, *, embeddings: bool) -> None:
    """Keep the first blocks, and perhaps the embeddings, as they are in what follows."""
    for block in model.blocks[:blocks]:
        block.requires_grad_(False)
    if embeddings:
        for name, parameter in model.named_parameters():
            if rule_of(name, tensor_rules(model.cfg)).optimizer == "embedding":
                parameter.requires_grad_(False)


def text_gradients(forward: Callable, rows: np.ndarray, cfg: Config, rt: Runtime) -> Tensor:
    """Add the gradients of the mean loss of rows (n, T + 1), shared by the ranks; returns it."""
    mine, total = rt.to_device(rows[rt.share(len(rows))]), torch.zeros((), device=rt.device)
    for micro in mine.split(max(cfg.micro_batch_tokens // cfg.eval_seq_len, 1)):
        if len(micro):
            loss = forward(*inputs_and_targets(micro)) * (len(micro) / len(rows))
            loss.backward()
            total += loss.detach()
    rt.sum_(total)
    return total


# ---------------------------------------------------------------------------------------------
# 7  Quantization
# GPTQ: round the columns of a matrix one after the other and let the later ones make up for the
# error in the outputs. Hessians come from training text, inside the training budget.
# ---------------------------------------------------------------------------------------------

GPTQ_DAMPING, GPTQ_BLOCK = 0.01, 128
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16: a row of zeros needs some scale


@dataclass(frozen=True)
class Quantized:
    """A matrix as int8 codes (rows, cols) within `bits` and float16 scales (rows,)."""

    codes: Tensor
    scales: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """(rows, cols) float32."""
        return self.codes.float() * self.scales.float()[:, None]


@torch.no_grad()
def collect_hessians(
    model: GPT, loader: Loader, first: int, plan: DepthPlan, cfg: Config, rt: Runtime, log: Log
) -> dict[str, Tensor]:
    """Mean of x x^T over the inputs x of each Linear that GPTQ stores, by module name.

    Args:
        first: training window with which calibration begins; the ranks share the windows.
        plan: a layer that it visits more than once adds up its visits.
    Returns: (inputs, inputs) float32 each.
    The head's inputs are the outputs of the final norm: the Hessian of the tied embedding is taken
    where it is read as a head. Ends early, on all ranks, if the training budget would be exceeded.
    """
    sums, rows = {}, {}

    def tap(name: str, module: Linear) -> Any:
        width = module.in_features
        sums[name], rows[name] = torch.zeros(width, width, device=rt.device), 0

        def hook(module: Linear, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name].addmm_(x.T, x)
            rows[name] += len(x)

        return module.register_forward_pre_hook(hook)

    rules = tensor_rules(cfg)
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear)]
    taps = [
        tap(name, module)
        for name, module in linears
        if rule_of(f"{name}.weight", rules).quantizer == "gptq"
    ]
    per_batch = max(cfg.train_batch_tokens // cfg.train_seq_len // 8, 1)
    most = max(cfg.micro_batch_tokens // cfg.train_seq_len, 1)
    with contextlib.closing(loader.batches(rt, per_batch, first)) as batches:
        done, show, limit = 0, log.progress("calibration"), cfg.max_wallclock_seconds or math.inf
        while done < cfg.gptq_calibration_batches:
            one_more = rt.budget.total(["calibration"]) / max(done, 1)
            (ends,) = rt.agree_max(rt.budget.total(Budget.TRAINING) + one_more)
            if done and ends > limit:
                log.line(
                    f"GPTQ:calibration stopped by the budget after {done} of "
                    f"{cfg.gptq_calibration_batches} batches"
                )
                break
            for micro in next(batches).split(most):
                if len(micro):  # more ranks than windows
                    model(micro[:, :-1], plan=plan)
            rt.synchronize()
            done += 1
            show(done / cfg.gptq_calibration_batches)
    for handle in taps:
        handle.remove()
    for name, total in sums.items():
        count = torch.tensor(float(rows[name]), device=rt.device)
        rt.sum_(total, count)
        total.div_(count)
    return sums


def smallest_step(bits: int, *, floored: bool) -> float:
    """The least step of a row: what float16 can hold, or, in two public systems, 1 over the top."""
    return 1 / (2 ** (bits - 1) - 1) if floored else SMALLEST_SCALE


def row_scales(
    weight: Tensor, bits: int, clip_sigmas: float, percentiles: Sequence[float], smallest: float
) -> Tensor:
    """The float16 step of each row: half its range over the largest code, at least `smallest`.

    The range is `clip_sigmas` standard deviations (SDClip), or the best of some percentiles.
    """
    if percentiles:
        scales = percentile_scales(weight, bits, percentiles, smallest)
    else:
        scales = clip_sigmas * weight.std(dim=1) / (2 ** (bits - 1) - 1)
    return scales.clamp_min(smallest).half()


def percentile_scales(
    weight: Tensor, bits: int, percentiles: Sequence[float], smallest: float
) -> Tensor:
    """Per row, of the steps that end the range at a percentile of |w|, the one with least error."""
    sizes, top = weight.detach().float().abs(), 2 ** (bits - 1) - 1
    at = torch.tensor(percentiles, device=weight.device)
    steps = (torch.quantile(sizes, at, dim=1) / top).clamp_min(smallest)  # (P, rows)
    if len(percentiles) == 1:
        return steps[0]
    rounded = [(sizes / s[:, None]).round().clamp_max(top) * s[:, None] for s in steps]
    errors = torch.stack([(r - sizes).square().sum(1) for r in rounded])
    return steps.gather(0, errors.argmin(0, keepdim=True))[0]


def round_to_nearest(weight: Tensor, scales: Tensor, bits: int) -> Quantized:
    """Codes of each entry by itself."""
    top = 2 ** (bits - 1) - 1
    codes = (weight.float() / scales.float()[:, None]).round().clamp(-top, top)
    return Quantized(codes.to(torch.int8), scales, bits)


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    clip_sigmas: float,
    percentiles: Sequence[float] = (),
    smallest: float = SMALLEST_SCALE,
    descending: bool = True,
) -> Quantized:
    """Round a matrix to integers so that its *outputs*, not its entries, change least.

    Args:
        weight: (rows, cols) float. Not modified.
        hessian: (cols, cols) float, mean of x x^T over calibration inputs x. Not modified.
        bits: width of a code; codes lie in +-(2**(bits-1) - 1).
        clip_sigmas, percentiles, smallest: see `row_scales`.
        descending: take the columns by falling diagonal of the Hessian, else by rising.

    Returns: codes and scales on the weight's device.
    Raises: ValueError if the shapes disagree or bits is not in 2..8.
    Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1, columns by their diagonal.
    """
    rows, cols = weight.shape
    if hessian.shape != (cols, cols) or not 2 <= bits <= 8:
        raise ValueError(
            f"weight {tuple(weight.shape)}, hessian {tuple(hessian.shape)}, bits {bits}"
        )
    w, h, top = weight.float().clone(), hessian.float().clone(), 2 ** (bits - 1) - 1
    scales = row_scales(w, bits, clip_sigmas, percentiles, smallest)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=descending, stable=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(GPTQ_DAMPING * h.diagonal().mean())
    u = inverse_factor(h)
    codes, step = torch.empty_like(w), scales.float()
    for first in range(0, cols, GPTQ_BLOCK):
        block = slice(first, min(first + GPTQ_BLOCK, cols))
        errors = torch.empty_like(w[:, block])
        for j in range(block.start, block.stop):
            codes[:, j] = (w[:, j] / step).round().clamp(-top, top)
            error = (w[:, j] - codes[:, j] * step) / u[j, j]
            w[:, j : block.stop] -= torch.outer(error, u[j, j : block.stop])
            errors[:, j - first] = error
        w[:, block.stop :] -= errors @ u[block, block.stop :]
    return Quantized(codes[:, torch.argsort(order)].to(torch.int8), scales, bits)


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, of a positive definite H, without forming H^-1.

    With both axes flipped the lower Cholesky factor of H becomes an upper R with H = R R^T, so U =
    R^-1.
    """
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(
        r, torch.eye(len(h), device=h.device, dtype=h.dtype), upper=True
    )


def quantize_model(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    cfg: Config,
    log: Log,
    coarser: float = 1.0,
) -> dict[str, Quantized | Tensor]:
    """Store every tensor as its rule says: codes by GPTQ or to nearest, or floats.

    Args:
        hessians: by module name (a tensor's name without ``.weight``).
        coarser: multiplies ranges of the sigma rule; entropy falls by log2 of it, bits per code.
    """
    stored, show = {}, log.progress("quantization")
    for done, (name, weight) in enumerate(weights.items()):
        rule = rule_of(name, tensor_rules(cfg))
        sigmas = rule.clip_sigmas * coarser
        if rule.quantizer == "gptq":
            stored[name] = gptq_quantize(
                weight,
                hessians[name.removesuffix(".weight")],
                bits=rule.bits,
                clip_sigmas=sigmas,
                percentiles=rule.percentiles,
                smallest=rule.smallest,
                descending=cfg.gptq_order == "descending",
            )
        elif rule.quantizer == "nearest":
            scales = row_scales(weight, rule.bits, sigmas, rule.percentiles, rule.smallest)
            stored[name] = round_to_nearest(weight, scales, rule.bits)
        else:
            stored[name] = weight.to(getattr(torch, rule.quantizer))
        show((done + 1) / len(weights))
    return stored


def prune_ones(tensors: Mapping[str, Quantized | Tensor], bits: int, count: int) -> int:
    """Zero up to `count` codes of +-1, those of the smallest steps first, in place.

    Only tensors of this width; returns how many codes were zeroed.
    """
    rows = [
        (float(scale), tensor.codes[i])
        for tensor in tensors.values()
        if isinstance(tensor, Quantized) and tensor.bits == bits
        for i, scale in enumerate(tensor.scales)
    ]
    left = count
    for _, codes in sorted(rows, key=lambda row: row[0]):
        ones = codes.abs().eq(1).nonzero()[:left, 0]
        codes[ones] = 0
        left -= len(ones)
        if not left:
            break
    return count - left


# ---------------------------------------------------------------------------------------------
# 8  Artifact
# Bytes on disk and back. A frame (magic, version, compressor, lengths, CRC of everything) holds one
# compressed payload: a JSON header and raw streams. No pickle; equal weights give equal bytes; all
# is checked before any of it is used.
# ---------------------------------------------------------------------------------------------

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGLM", 1
FRAME = struct.Struct("<4sBBQQI")  # magic, version, compressor, payload bytes, raw bytes, CRC-32
LARGEST_RAW_BYTES = 1 << 32
FLOAT_BYTES = {"float16": 2, "float32": 4}  # the kinds that are no codes, and their size
COMPRESSORS = {
    "none": ("zlib", "error"),
    "brotli": ("brotli", "error"),  # module, its error class
    "zstd": ("zstandard", "ZstdError"),
    "lzma": ("lzma", "LZMAError"),
}
LZMA_FILTERS = [{"id": 0x21, "preset": 9 | 1 << 31, "lc": 0, "pb": 0}]  # LZMA2, extreme; byte codes


def codec(compressor: str) -> Any:
    """The module of a compressor. Raises ConfigError if its package is not installed."""
    package = COMPRESSORS[compressor][0]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"COMPRESSOR={compressor}: the package {package} does not import ({error}); "
            "install requirements.txt or choose another compressor"
        ) from error


def compress(data: bytes, compressor: str) -> bytes:
    """The strongest setting of each compressor; brotli 11 and zstd 22 as in the public systems."""
    module = codec(compressor)
    if compressor == "brotli":
        return module.compress(data, quality=11, lgwin=24)
    if compressor == "zstd":
        return module.ZstdCompressor(level=22, write_content_size=False).compress(data)
    if compressor == "lzma":
        return module.compress(data, format=module.FORMAT_RAW, filters=LZMA_FILTERS)
    return data


def decompress(data: bytes, compressor: str, raw_bytes: int) -> bytes:
    """Undo `compress`. Raises ArtifactError if the data is no such stream of `raw_bytes` bytes."""
    module, raw = codec(compressor), data
    try:
        if compressor == "brotli":
            raw = module.decompress(data)
        elif compressor == "zstd":
            raw = module.ZstdDecompressor().decompress(data, max_output_size=raw_bytes)
        elif compressor == "lzma":
            raw = module.LZMADecompressor(module.FORMAT_RAW, filters=LZMA_FILTERS).decompress(
                data, raw_bytes
            )
    except getattr(module, COMPRESSORS[compressor][1]) as error:
        raise ArtifactError(
            f"artifact: {compressor} cannot read it ({error}); copy it again"
        ) from error
    if len(raw) != raw_bytes:
        raise ArtifactError(
            f"artifact: {len(raw):,} raw bytes, expected {raw_bytes:,}; copy it again"
        )
    return raw


def planes(values: np.ndarray) -> bytes:
    """Bytes of an array, all lowest bytes first, then all next ones: alike bytes lie together."""
    return values.ravel().view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def unplanes(data: bytes, dtype: str) -> np.ndarray:
    """Undo `planes`: a flat array."""
    size = np.dtype(dtype).itemsize
    return np.frombuffer(data, np.uint8).reshape(size, -1).T.copy().view(dtype).ravel()


def tensor_kind(stored: Quantized | Tensor) -> str:
    """How a tensor is stored: ``int6`` (codes and row scales), ``float16``, ``float32``."""
    if isinstance(stored, Quantized):
        return f"int{stored.bits}"
    return str(stored.dtype).removeprefix("torch.")


def pack(
    tensors: Mapping[str, Quantized | Tensor], header: Mapping[str, Any], compressor: str
) -> bytes:
    """Tensors and facts to the bytes of an artifact; the same input gives the same bytes.

    Args:
        tensors: by name; `Quantized`, float16 or float32.
        header: JSON values, among them the model settings; ``tensors`` is added.
    The streams follow each other by what they hold (codes, then scales, then floats), so that the
    compressor meets each statistic once.
    """
    table, codes, scales, floats = [], [], [], []
    for name, stored in tensors.items():
        quantized = isinstance(stored, Quantized)
        shape = stored.codes.shape if quantized else stored.shape
        table.append([name, tensor_kind(stored), list(shape)])
        if quantized:
            codes.append(stored.codes.cpu().numpy().tobytes())
            scales.append(stored.scales.cpu().numpy().ravel())
        else:
            floats.append(planes(stored.cpu().numpy()))
    text = json.dumps({**header, "tensors": table}, sort_keys=True, separators=(",", ":")).encode()
    row_scales = planes(np.concatenate(scales)) if scales else b""
    raw = b"".join([len(text).to_bytes(4, "little"), text, *codes, row_scales, *floats])
    payload = compress(raw, compressor)
    facts = (
        ARTIFACT_MAGIC,
        ARTIFACT_VERSION,
        list(COMPRESSORS).index(compressor),
        len(payload),
        len(raw),
    )
    crc = zlib.crc32(payload, zlib.crc32(FRAME.pack(*facts, 0)))
    return FRAME.pack(*facts, crc) + payload


def unpack(blob: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the float32 tensors of an artifact.

    Raises: ArtifactError for anything but the bytes that `pack` made: every truncation, every
    flipped bit, and a header that promises other streams than there are.
    """
    if len(blob) < FRAME.size or blob[:4] != ARTIFACT_MAGIC:
        raise ArtifactError(
            f"artifact: no artifact ({len(blob):,} bytes, begins with {blob[:4]!r}); "
            "give the file that a run wrote"
        )
    *facts, crc = FRAME.unpack_from(blob)
    _, version, compressor, payload_bytes, raw_bytes = facts
    payload = blob[FRAME.size :]
    if version != ARTIFACT_VERSION:
        raise ArtifactError(
            f"artifact: version {version}, expected {ARTIFACT_VERSION}; use the program "
            "that wrote it"
        )
    if len(payload) != payload_bytes:
        raise ArtifactError(
            f"artifact: {len(payload):,} payload bytes, expected {payload_bytes:,}; copy it again"
        )
    if zlib.crc32(payload, zlib.crc32(FRAME.pack(*facts, 0))) != crc:
        raise ArtifactError("artifact: the checksum does not match, it is damaged; copy it again")
    if compressor >= len(COMPRESSORS) or raw_bytes > LARGEST_RAW_BYTES:
        raise ArtifactError(f"artifact: compressor {compressor}, {raw_bytes:,} raw bytes: not ours")
    raw = decompress(payload, list(COMPRESSORS)[compressor], raw_bytes)
    try:
        text_bytes = int.from_bytes(raw[:4], "little")
        header = json.loads(raw[4 : 4 + text_bytes])
        return header, read_tensors(header["tensors"], memoryview(raw)[4 + text_bytes :])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"artifact: the header does not describe the content ({error})"
        ) from error


def read_tensors(table: Sequence[Sequence[Any]], streams: memoryview) -> dict[str, Tensor]:
    """The float32 tensors of a table [name, kind, shape] from the streams that `pack` laid out.

    Raises: ValueError unless table and streams agree to the last byte, codes lie in their range and
    all values are finite; TypeError if the table is no table.
    """
    for name, kind, shape in table:
        sizes_ok = all(type(size) is int and 0 <= size <= len(streams) for size in shape)
        dims_ok = len(shape) == 2 if re.fullmatch("int[2-8]", kind) else kind in FLOAT_BYTES
        if not (isinstance(name, str) and sizes_ok and dims_ok):
            raise ValueError(f"tensor {name}: {kind} of shape {shape}")
    coded = {name: int(kind[3:]) for name, kind, _ in table if kind.startswith("int")}
    counts = {name: math.prod(shape) for name, _, shape in table}
    heights = [shape[0] for name, _, shape in table if name in coded]
    total = sum(counts[name] * FLOAT_BYTES.get(kind, 1) for name, kind, _ in table)
    if len(counts) != len(table) or total + 2 * sum(heights) != len(streams):
        raise ValueError("the table promises other lengths")
    position = 0

    def take(count: int) -> memoryview:
        nonlocal position
        position += count
        return streams[position - count : position]

    codes = {name: np.frombuffer(take(counts[name]), np.int8) for name in coded}
    scales = unplanes(take(2 * sum(heights)), "<f2").astype(np.float32)
    scales, out = np.split(scales, np.cumsum(heights)[:-1]), {}
    for name, kind, shape in table:
        if name in coded:
            ints, row_scales = codes[name].reshape(shape), scales.pop(0)[:, None]
            beyond = np.abs(ints.astype(np.int16)).max(initial=0) >= 2 ** (coded[name] - 1)
            if beyond or not np.isfinite(row_scales).all():
                raise ValueError(f"tensor {name}: codes beyond {kind} or scales without end")
            values = ints * row_scales
        else:
            values = unplanes(take(counts[name] * FLOAT_BYTES[kind]), kind).astype(np.float32)
            if not np.isfinite(values).all():
                raise ValueError(f"tensor {name}: values that are not finite")
        out[name] = torch.from_numpy(values.reshape(shape))
    return out


FIT_ATTEMPTS, FIT_SLACK = 8, 0.001  # a search ends within this part of the limit
TIGHTEST_SIGMAS = 4.0  # narrower ranges clip more than finer steps gain
PRUNED_CODE_BYTES = 0.25  # what a first guess saves for each code that becomes 0


def code_bytes() -> int:
    """The literal size of the file that runs: it counts against ARTIFACT_LIMIT_BYTES."""
    return Path(__file__).stat().st_size


def expected_bytes(cfg: Config) -> tuple[int, int]:
    """What an artifact needs at least, and what it takes if weights are Gaussian, uncompressed.

    A Gaussian row rounded to steps of s standard deviations has codes of log2(sqrt(2 pi e) / s)
    bits. At least: row scales and floats, while codes can be made as coarse as need be.
    """
    with torch.device("meta"):
        sizes = {name: tuple(p.shape) for name, p in GPT(cfg).named_parameters()}
    least, codes = 0, 0.0
    for name, shape in sizes.items():
        rule = rule_of(name, tensor_rules(cfg))
        if rule.bits:
            least += FLOAT_BYTES["float16"] * shape[0]
            step = rule.clip_sigmas / (2 ** (rule.bits - 1) - 1)
            bits = (
                rule.bits if rule.percentiles else math.log2(math.sqrt(2 * math.pi * math.e) / step)
            )
            codes += math.prod(shape) * min(max(bits, 0.0), rule.bits) / 8
        else:
            least += FLOAT_BYTES[rule.quantizer] * math.prod(shape)
    return least, least + int(codes)


def announce_size(cfg: Config, log: Log) -> None:
    """Before training: what the code leaves for the artifact, and what that is likely to need.

    Raises: ConfigError if no rounding could fit the model beside the code.
    """
    left, (least, expected) = cfg.artifact_limit_bytes - code_bytes(), expected_bytes(cfg)
    if least > left:
        raise ConfigError(
            f"ARTIFACT_LIMIT_BYTES={cfg.artifact_limit_bytes}: the code's {code_bytes()} bytes "
            f"leave {left}, and scales and vectors of this model alone need {least}; make the "
            "model smaller"
        )
    note = "; codes will be coarser than set" if expected > left else ""
    log.line(f"artifact: {left} bytes left beside the code, about {expected} expected{note}")


def fit_artifact(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    header: Mapping[str, Any],
    cfg: Config,
    rt: Runtime,
    log: Log,
) -> bytes:
    """Quantize and pack so that code and artifact fit ARTIFACT_LIMIT_BYTES.

    FIT_RULE tightest: search the common factor of all ranges for the smallest that fits, down to
    TIGHTEST_SIGMAS; no more than FIT_SLACK of the limit stays unused. wider: the same, but no range
    gets tighter than it is set. prune: ranges as they are set; codes of +-1 become 0 if need be.
    Raises: ArtifactError if it cannot be made to fit.
    """

    def quantized(factor: float) -> dict[str, Quantized | Tensor]:
        with rt.budget.phase("quantization"):
            return quantize_model(weights, hessians, cfg, log, factor)

    def packed(tensors: Mapping[str, Quantized | Tensor]) -> bytes:
        with rt.budget.phase("compression"):
            return pack(tensors, header, cfg.compressor)

    fit = fit_by_pruning if cfg.fit_rule == "prune" else fit_by_ranges
    blob, tensors = fit(quantized, packed, cfg, log)
    limit = cfg.artifact_limit_bytes - code_bytes()
    if len(blob) > limit:
        raise ArtifactError(
            f"artifact: {len(blob):,} bytes after {FIT_ATTEMPTS} attempts, expected at most "
            f"{limit:,}; lower MATRIX_BITS or the size of the model"
        )
    log_storage(tensors, log)
    return blob


def fit_by_ranges(
    quantized: Callable, packed: Callable, cfg: Config, log: Log
) -> tuple[bytes, dict[str, Quantized | Tensor]]:
    """The artifact with the tightest ranges that fit, and its tensors; else the last one tried.

    Ranges wider by 2^e lower the entropy of a code by about e bits: that, and once one artifact was
    too large and one not, the line through both, tells which e to try next.
    """
    limit, exponent = cfg.artifact_limit_bytes - code_bytes(), 0.0
    tightest = TIGHTEST_SIGMAS / min(cfg.matrix_clip_sigmas, cfg.embed_clip_sigmas)
    floor = min(math.log2(tightest), 0.0) if cfg.fit_rule == "tightest" else 0.0
    slack, best, fits, over = int(FIT_SLACK * cfg.artifact_limit_bytes), None, None, None
    for _ in range(FIT_ATTEMPTS):
        tensors = quantized(2**exponent)
        blob = packed(tensors)
        excess = len(blob) - limit
        log.line(f"artifact: {len(blob)} bytes with ranges x {2**exponent:.4f}, limit {limit}")
        if excess <= 0:
            best, fits = (blob, tensors), (exponent, excess)
            if exponent <= floor or -excess <= slack:
                break
        else:
            over = exponent, excess
        codes = sum(t.codes.numel() for t in tensors.values() if isinstance(t, Quantized))
        aim = excess + slack / 2  # the middle of what is allowed
        if fits and over:
            (right, below), (left, above) = fits, over
            exponent = right + (left - right) * (-slack / 2 - below) / (above - below)
        else:
            exponent = max(exponent + min(8 * aim / codes, 1.0), floor)
    return best or (blob, tensors)


def fit_by_pruning(
    quantized: Callable, packed: Callable, cfg: Config, log: Log
) -> tuple[bytes, dict[str, Quantized | Tensor]]:
    """The artifact with codes of +-1 made 0 until it fits, and its tensors; else the last one.

    As many codes as the bytes that the last ones saved call for (system #1487 takes eight for each
    byte too many, which overshoots).
    """
    limit, tensors = cfg.artifact_limit_bytes - code_bytes(), quantized(1.0)
    pruned, last, saving = 0, 0, PRUNED_CODE_BYTES
    for _ in range(FIT_ATTEMPTS):
        blob = packed(tensors)
        excess = len(blob) - limit
        if excess <= 0:
            break
        saving = max((last - len(blob)) / pruned, 0.02) if pruned else saving
        pruned, last = prune_ones(tensors, cfg.matrix_bits, int(excess / saving) + 8), len(blob)
        log.line(f"artifact: {excess} bytes too many; pruned {pruned} codes of +-1")
    return blob, tensors


def log_storage(tensors: Mapping[str, Quantized | Tensor], log: Log) -> None:
    """Say which tensors are stored how, and put what they take before compression in the JSON."""
    groups: dict[tuple[str, str], list] = collections.defaultdict(list)
    for name, stored in tensors.items():
        groups[tensor_kind(stored), re.sub(r"blocks\.\d+\.", "blocks.*.", name)].append(stored)
    log.line("Quantized weights:")
    for kind, same in itertools.groupby(sorted(groups), key=lambda group: group[0]):
        names = [name for _, name in same]
        count = sum(len(groups[kind, name]) for name in names)
        log.line(f"  {kind}: {count} tensors: {', '.join(names)}")
    facts = [
        dict(
            group=name,
            kind=kind,
            tensors=len(stored),
            parameters=sum((t.codes if isinstance(t, Quantized) else t).numel() for t in stored),
            entropy_bytes=round(sum(map(entropy_bytes, stored))),
        )
        for (kind, name), stored in groups.items()
    ]
    log.put(storage=facts)


def entropy_bytes(stored: Quantized | Tensor) -> float:
    """What a tensor takes if a coder knew how often each code occurs; floats and scales as is."""
    if not isinstance(stored, Quantized):
        return stored.numel() * stored.element_size()
    counts = np.bincount(stored.codes.cpu().numpy().ravel().astype(np.int16) + 128)
    shares = counts[counts > 0] / counts.sum()
    bits = -(shares * np.log2(shares)).sum() * stored.codes.numel()
    return bits / 8 + FLOAT_BYTES["float16"] * len(stored.scales)


def load_model(
    blob: bytes, cfg: Config, rt: Runtime, origin: str
) -> tuple[GPT, Config, dict[str, Any]]:
    """A fresh model from an artifact or checkpoint: (model, its configuration, header).

    Raises: ArtifactError if the bytes or the tensors are not what they should be, ConfigError if
    the environment asks for another model.
    """
    header, tensors = unpack(blob)
    cfg = cfg.with_model(model_settings(header, origin), origin)
    _, kernel, _ = select_attention(cfg.attention, rt.device, rt.compute_dtype)
    with torch.device("meta"):  # shapes alone: the tensors' sizes are known to be real, these not
        expected = {name: tuple(p.shape) for name, p in GPT(cfg).named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name, shape = sorted(found.items() ^ expected.items())[0]
        raise ArtifactError(f"{origin}: tensor {name} {shape} does not belong to its model")
    _, kernels, _ = select_kernels(cfg.kernels, rt.device, rt.compute_dtype)
    model = GPT(cfg, kernel, rt.compute_dtype, kernels)
    model.load_state_dict(tensors)
    return model.to(rt.device), cfg, header


def model_settings(header: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The model settings of a header, checked. Raises ArtifactError if they are not ours."""
    settings = header.get("model")
    ours = {setting.name: setting for setting in knobs() if setting.metadata["model"]}
    try:
        if set(settings) != set(ours) or type(header["looped"]) is not bool:
            raise ValueError("other settings than this program's")
        return {name: parse_value(ours[name], str(value)) for name, value in settings.items()}
    except (TypeError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"{origin}: its header describes no model of this program ({error}); use the program "
            "that wrote it"
        ) from error


# ---------------------------------------------------------------------------------------------
# 9  Evaluation
# A window is (start, first_scored, stop). Windows of one evaluation score every target exactly
# once, in order. Test-time training may use a target only after the window that scores it.
# ---------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Reads tokens start, start + 1, ... and scores targets first_scored .. stop - 1.

    Target t is token t + 1, predicted from the tokens start .. t.
    """

    start: int
    first_scored: int
    stop: int


def sliding_windows(
    total: int, seq_len: int, stride: int, first: int = 0, stop: int | None = None
) -> Iterator[Window]:
    """Windows whose scored parts partition `total` targets, in order.

    The first scores all it reads; each later one starts `stride` further and scores its last
    `stride` targets. stride = seq_len is the plain evaluation. first, stop: only windows that begin
    to score at target `first` (0, or at least seq_len) or later, and before `stop`.
    """
    if first == 0:
        yield Window(0, 0, min(seq_len, total))
        first = seq_len
    for place in range(first, min(total, stop or total), stride):
        yield Window(place + stride - seq_len, place, min(place + stride, total))


@dataclass(frozen=True)
class Score:
    """Summed losses in nats, and what they are spread over."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of the original text."""
        return self.nats / math.log(2) / self.bytes


class Ledger:
    """What was scored when, and which text each optimizer step read.

    Adaptation gets its text from here alone, and `text` hands out what is scored.

    Attributes: nats, (total,) float32 losses by target; times, (total,) how often each was scored;
    scored, how many are; updates, (first, stop, scored so far) of the text of each optimizer step;
    plain_from, the target from which on windows stand side by side to save time, or None; seconds,
    what all this bookkeeping took.
    """

    def __init__(self, tokens: np.ndarray):
        total = len(tokens) - 1
        self.tokens, self.nats, self.times = tokens, torch.zeros(total), np.zeros(total, np.uint8)
        self.scored, self.updates, self.order = 0, [], hashlib.sha256()
        self.plain_from, self.seconds = None, 0.0

    def record(self, first: int, nats: Tensor) -> None:
        """Enter the losses of targets first, first + 1, ...

        Raises: LedgerError unless `first` is the next target in order.
        """
        host = nats.cpu()
        begin, stop = time.perf_counter(), first + len(host)
        if first != self.scored or stop > len(self.nats):
            raise LedgerError("C4", f"target {first} scored, expected target {self.scored}")
        self.nats[first:stop] = host
        self.times[first:stop] += 1
        self.order.update(np.arange(first, stop, dtype="<u4").tobytes())
        self.scored = stop
        self.seconds += time.perf_counter() - begin

    def text(self, first: int, stop: int) -> np.ndarray:
        """(stop - first + 1,) tokens that an optimizer step may read: targets first .. stop - 1.

        Raises: LedgerError if one of them is not scored yet.
        """
        if not 0 <= first < stop <= self.scored:
            raise LedgerError("C3", f"target {stop - 1} used, but only {self.scored} are scored")
        self.updates.append((first, stop, self.scored))
        return self.tokens[first : stop + 1]

    def score(self, target_bytes: np.ndarray) -> Score:
        """The sums over all targets, in one fixed order for any number of ranks."""
        if self.scored != len(self.nats) or (self.times != 1).any():
            raise LedgerError("C4", f"{self.scored} of {len(self.nats)} targets are scored once")
        nats = float(self.nats.double().sum())
        return Score(nats, self.scored, int(target_bytes.sum(dtype=np.int64)))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the order of scoring, of the whole ledger but the losses, and of the losses.

        Without adaptation all three are the same for any number of ranks, with it the first two;
        gradients that other ranks add up differ in their rounding.
        """
        begin, order = time.perf_counter(), self.order.hexdigest()
        entries = json.dumps([len(self.nats), order, self.updates, self.plain_from]).encode()
        found = dict(
            order_sha256=order,
            ledger_sha256=hashlib.sha256(entries + self.times.tobytes()).hexdigest(),
            losses_sha256=hashlib.sha256(self.nats.numpy().tobytes()).hexdigest(),
        )
        self.seconds += time.perf_counter() - begin
        return found


@torch.no_grad()
def score_windows(
    forward: Callable,
    text: np.ndarray,
    windows: Sequence[Window],
    rows: int,
    cfg: Config,
    rt: Runtime,
) -> Tensor:
    """Losses of all targets that consecutive windows score, (n,) float32, the same on every rank.

    Args:
        text: (total + 1,) tokens.
        rows: sliding windows per forward (those that score all they read: as many as fit); the last
            forward is filled up, so that all shapes are equal.
    Windows are cut into forwards the same way for any number of ranks, which share the forwards: so
    the losses are the same to the bit. Only the final sum is a collective.
    """
    length, origin = cfg.eval_seq_len, windows[0].first_scored
    nats = torch.zeros(windows[-1].stop - origin, device=rt.device)
    for whole, same in itertools.groupby(windows, key=lambda w: w.first_scored == w.start):
        same = list(same)
        tail = same[0].start + length - same[0].first_scored
        size = cfg.micro_batch_tokens // length if whole else rows
        batches = [same[i : i + size] for i in range(0, len(same), size)]
        for batch in batches[rt.share(len(batches))]:
            starts = np.array([w.start for w in batch] + [0] * (size - len(batch)))
            places = np.minimum(starts[:, None] + np.arange(length + 1), len(text) - 1)
            ids = rt.to_device(text[places])
            losses = forward(*inputs_and_targets(ids), reduction="none", tail=tail)
            first, stop = batch[0].first_scored - origin, batch[-1].stop - origin
            nats[first:stop] = losses.flatten()[: stop - first]
    rt.sum_(nats)
    return nats


FORWARDS_PER_CHUNK = 8  # or a multiple: equal work for so many ranks


def evaluate(
    forward: Callable,
    val: ValidationTokens,
    cfg: Config,
    rt: Runtime,
    *,
    stride: int,
    show: Callable[..., None],
    after_chunk: Callable[[Callable[[], np.ndarray], int, int], None] | None = None,
    deadline: float = math.inf,
) -> tuple[Score, Ledger]:
    """Score the validation text from left to right.

    Args:
        forward: the model, its depth plan bound.
        stride: targets per window; EVAL_SEQ_LEN for the plain evaluation.
        show: progress, called with the part done.
        after_chunk: called with (draw, number of the chunk, number of chunks) once all targets of
            the chunk are scored; it may change the model. draw() is the text (n + 1,) of the chunk
            for one optimizer step. Not called after the last chunk.
        deadline: seconds of the evaluation budget at which all must be scored: if need be the rest
            is scored in windows side by side.
    """
    total, length = len(val.target_bytes), cfg.eval_seq_len
    most = cfg.micro_batch_tokens // length
    chunk = cfg.ttt_chunk_tokens if after_chunk else 2 * FORWARDS_PER_CHUNK * most * stride
    chunks, per_chunk = -(-total // chunk), -(-chunk // stride)
    forwards = FORWARDS_PER_CHUNK * -(-per_chunk // (FORWARDS_PER_CHUNK * most))
    ledger, pace = Ledger(val.tokens), Pace(deadline, rt)
    for number in range(chunks):
        stop = (number + 1) * chunk
        group = list(sliding_windows(total, length, stride, ledger.scored, stop))
        pace.begin()
        if group:  # none if the window before reached the end
            nats = score_windows(forward, val.tokens, group, -(-per_chunk // forwards), cfg, rt)
            ledger.record(group[0].first_scored, nats)
        pace.scored(len(group))
        show(ledger.scored / total)
        if after_chunk and number < chunks - 1:
            draw = functools.partial(ledger.text, number * chunk, stop)
            after_chunk(draw, number, chunks)
        if stride < length and pace.late(-(-(total - ledger.scored) // length)):
            stride, ledger.plain_from = length, ledger.scored
    return ledger.score(val.target_bytes), ledger


class Pace:
    """Tells when scoring has to hurry to meet a deadline, in seconds of the evaluation budget."""

    def __init__(self, deadline: float, rt: Runtime):
        self.deadline, self.rt, self.begun = deadline, rt, []
        self.per_window = []  # seconds, one entry per chunk

    def begin(self) -> None:
        self.begun.append(time.perf_counter())

    def scored(self, windows: int) -> None:
        self.per_window.append((time.perf_counter() - self.begun[-1]) / max(windows, 1))

    def late(self, windows_left: int) -> bool:
        """Whether one more chunk like the last would take the time of so many windows after it."""
        if len(self.begun) < 3 or math.isinf(self.deadline):
            return False  # the first chunk includes compilation, it tells nothing
        chunk = float(np.median(np.diff(self.begun)[1:]))
        needed = chunk + float(np.median(self.per_window[1:])) * windows_left
        (ends,) = self.rt.agree_max(self.rt.budget.total(Budget.EVALUATION) + needed)
        return ends > self.deadline


def adapt(
    forward: Callable,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: Callable[[], np.ndarray],
    cfg: Config,
    rt: Runtime,
) -> None:
    """TTT_EPOCHS steps on scored text, each on all its whole sequences; changes the model.

    draw() gives the text (n + 1,) of one step. The ranks share the sequences; a rank without any
    still takes part in the sum.
    """
    length = cfg.eval_seq_len
    for _ in range(cfg.ttt_epochs):
        text = draw()
        starts = np.arange((len(text) - 1) // length)[:, None] * length
        text_gradients(forward, text[starts + np.arange(length + 1)], cfg, rt)
        apply_gradients(model, [optimizer], cfg.ttt_grad_clip, rt)


class TestTimeTraining:
    """`after_chunk` of systems #1493 and #578: SGD or AdamW on scored text, cosine over the chunks.

    Adapts as long as adapting and scoring the rest fit in EVAL_WALLCLOCK_SECONDS, and for the first
    TTT_TRAIN_CHUNKS chunks; then it only watches. With TTT_EMA_DECAY an average of the trained
    weights scores. `forward` is the model, its depth plan bound.
    """

    def __init__(self, forward: Callable, model: GPT, cfg: Config, rt: Runtime, log: Log):
        self.forward, self.model, self.cfg, self.rt, self.log = forward, model, cfg, rt, log
        freeze(model, cfg.ttt_freeze_blocks, embeddings=cfg.ttt_freeze_embeddings)
        params = [p for p in model.parameters() if p.requires_grad]
        sgd = functools.partial(torch.optim.SGD, momentum=cfg.ttt_momentum)
        adamw = functools.partial(torch.optim.AdamW, weight_decay=0.0)
        self.optimizer = (sgd if cfg.ttt_optimizer == "sgd" else adamw)(params, lr=cfg.ttt_lr)
        # Decay 0 keeps a plain copy: the weights that train, while their average scores.
        decays = (cfg.ttt_ema_decay, 0.0) if cfg.ttt_ema_decay else ()
        self.copies = [Ema(model, decay) for decay in decays]
        self.adapted, self.stopped, self.since = 0, False, time.perf_counter()
        self.scoring, self.adapting = [], []  # seconds of each chunk

    def __call__(self, draw: Callable[[], np.ndarray], number: int, chunks: int) -> None:
        self.scoring.append(time.perf_counter() - self.since)
        adapting = self.cfg.ttt_train_chunks or chunks
        self.stopped = self.stopped or self.out_of_time(chunks - number - 1)
        if number < adapting and not self.stopped:
            swing = 0.5 * (1 + math.cos(math.pi * number / max(adapting - 1, 1)))
            self.optimizer.param_groups[0]["lr"] = self.cfg.ttt_lr * swing
            begin = time.perf_counter()
            self.train(draw)
            self.rt.synchronize()
            self.adapted += 1
            self.adapting.append(time.perf_counter() - begin)
        self.since = time.perf_counter()

    def train(self, draw: Callable[[], np.ndarray]) -> None:
        """Adapt the trained weights, and leave those that score in the model."""
        if self.copies:
            self.copies[1].store()
        adapt(self.forward, self.model, self.optimizer, draw, self.cfg, self.rt)
        for copied in self.copies:
            copied.update()
        if self.copies:
            self.copies[0].store()

    def out_of_time(self, chunks_left: int) -> bool:
        """Whether one more adaptation would take the time that scoring the rest needs."""
        if len(self.adapting) < 2 or not self.cfg.eval_wallclock_seconds:
            return False  # the first chunks include compilation, they tell nothing
        needed = float(np.median(self.scoring[1:])) * chunks_left
        needed += float(np.median(self.adapting[1:]))
        (ends,) = self.rt.agree_max(self.rt.budget.total(Budget.EVALUATION) + needed)
        late = ends > self.cfg.eval_wallclock_seconds
        if late:
            self.log.line(
                f"ttt:stopped adapting after {self.adapted} chunks, scoring goes on: "
                f"EVAL_WALLCLOCK_SECONDS={self.cfg.eval_wallclock_seconds:g}"
            )
        return late


BASELINE_MAX_BYTES = 4_000_000  # xz and brotli need seconds per megabyte


def compressor_baselines(val: ValidationTokens, tokenizer: Path, bos: int) -> dict[str, float]:
    """Bits per byte of general compressors on the scored text; empty if it is large."""
    if val.target_bytes.sum(dtype=np.int64) > BASELINE_MAX_BYTES:
        return {}
    text = b"".join(decode_documents(val.tokens, tokenizer, bos))
    xz = codec("lzma")
    sizes = {"xz-9e": len(xz.compress(text, preset=9 | xz.PRESET_EXTREME))}
    with contextlib.suppress(ConfigError):  # brotli is optional
        sizes["brotli-11"] = len(compress(text, "brotli"))
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def decode_documents(tokens: np.ndarray, tokenizer: Path, bos: int) -> Iterator[bytes]:
    """The documents of a token stream, as UTF-8; CaseOps marks are left in."""
    starts = np.flatnonzero(tokens == bos)
    parts = (part[part != bos] for part in np.split(tokens, starts[starts > 0]))
    if tokenizer.suffix == ".json":
        yield from ((part - BYTE_OFFSET).astype(np.uint8).tobytes() for part in parts)
        return
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    yield from (model.decode(part.tolist()).encode() for part in parts)


# ---------------------------------------------------------------------------------------------
# 10  Main
# Data, train, quantize, pack; then read the artifact back from disk and score it.
# ---------------------------------------------------------------------------------------------


def run(cfg: Config, rt: Runtime, log: Log) -> None:
    """The whole program for one configuration."""
    announce(cfg, rt, log)
    origin = cfg.artifact or cfg.checkpoint
    if origin:  # the model decides which data and tokenizer belong to it
        with rt.budget.phase("decompression" if cfg.artifact else "data"):
            cfg = stored_config(origin, cfg, rt)
    with rt.together(), rt.budget.phase("data"):
        codec(cfg.compressor)
        packed = cfg.doc_packing and not cfg.artifact
        select_attention(cfg.attention, rt.device, rt.compute_dtype, packed=packed)
        name, _, why = select_kernels(cfg.kernels, rt.device, rt.compute_dtype)
        table = ByteTable.from_file(cfg.tokenizer_file, cfg.vocab_size)
        check_documents(table.bos, cfg)
        shards = find_shards(cfg.dataset_dir, "val")
        val = ValidationTokens.load(shards, table, seq_len=cfg.eval_seq_len, limit=cfg.val_tokens)
        trains = not cfg.artifact
        proof = data_proof(cfg.dataset_dir, cfg.tokenizer_file, trains=trains) if rt.is_main else {}
    log.line(f"kernels:{name} ({why})")
    announce_text(val, table, proof, cfg, rt, log)
    steps = 0 if cfg.artifact else produce(table, val, cfg, rt, log)
    path = Path(cfg.artifact) if cfg.artifact else log.path("bin")
    score = score_artifact(path, table, val, cfg, rt, log)
    conclude(score, path, steps, cfg, rt, log)


def announce(cfg: Config, rt: Runtime, log: Log) -> None:
    """The first lines and facts: what a stranger needs to repeat the run."""
    facts, code = rt.describe(), dict(bytes=code_bytes(), sha256=file_sha256(Path(__file__)))
    if "smoke" in cfg.sources.values():
        log.line(
            "smoke: small run on the embedded sample; SMOKE=0, a data path or a size: full scale"
        )
    for warning in cfg.warnings:
        log.line(f"warning: {warning}")
    log.line(f"code_bytes: {code['bytes']} code_sha256: {code['sha256']}")
    log.line("runtime: " + " ".join(f"{key}={value}" for key, value in facts.items()))
    log.line("Hyperparameters:")
    settings = {s.name: getattr(cfg, s.name) for s in knobs()}
    for name in sorted(settings):
        log.line(f"  {name}: {settings[name]}")
    log.put(
        run_id=log.run_id,
        started=rt.budget.started.isoformat(),
        runtime=facts,
        code=code,
        config={n: dict(value=v, source=cfg.sources[n]) for n, v in settings.items()},
    )


def announce_text(
    val: ValidationTokens, table: ByteTable, proof: dict, cfg: Config, rt: Runtime, log: Log
) -> None:
    """What is scored, and what general compressors make of it."""
    facts = dict(
        val_tokens=len(val.target_bytes),
        val_bytes=int(val.target_bytes.sum(dtype=np.int64)),
        dropped_tail=val.dropped,
        tokenizer_sha256=table.digest,
        **proof,
    )
    log.line(" ".join(f"{key}: {value}" for key, value in facts.items()))
    if rt.is_main and not proof["data_verified"]:
        log.line(
            f"warning: {cfg.dataset_dir} has no proof of clean data; check it once with "
            f"python data/verify_dataset.py {cfg.dataset_dir} --tokenizer {cfg.tokenizer_file}"
        )
    with rt.budget.phase("baseline"):
        plain = rt.is_main and not table.has_marks  # a transformed text is not what is charged
        baselines = compressor_baselines(val, cfg.tokenizer_file, table.bos) if plain else {}
    for name, bpb in baselines.items():
        log.line(f"baseline {name} val_bpb:{bpb:.4f}")
    log.put(data=facts, baselines=baselines)


def produce(table: ByteTable, val: ValidationTokens, cfg: Config, rt: Runtime, log: Log) -> int:
    """Train (or take a checkpoint), quantize, and write the artifact. Returns the steps trained."""
    with rt.together(), rt.budget.phase("data"):
        loader = Loader(
            find_shards(cfg.dataset_dir, "train"),
            seq_len=cfg.train_seq_len,
            vocab_size=cfg.vocab_size,
            seed=cfg.seed,
            order=cfg.loader,
        )
    announce_size(cfg, log)
    log.line(f"train_shards: {len(loader.shards)} train_tokens: {sum(map(len, loader.shards))}")
    if cfg.checkpoint:
        blob = read_file(cfg.checkpoint, rt)
        with rt.together():
            model, cfg, header = load_model(blob, cfg, rt, cfg.checkpoint)
        forward = rt.compile(model)
        trained = Trained(0, header["looped"], tuple(header.get("invalid_for_records", ())))
    else:
        model, forward, trained = train_model(loader, val, cfg, rt, log)
    plan = depth_plan(cfg, looped=trained.looped)
    plain = functools.partial(score_text, forward, plan, val, cfg, rt)
    stage("pre-quantization post-ema", "diagnostic", rt, log, plain)
    if cfg.prequant_ttt_epochs:
        with rt.budget.phase("prequant_ttt"):
            bound = functools.partial(forward, plan=plan)
            fine_tune_on_validation(bound, model, val, cfg, rt, log)
        stage("post-prequant-ttt", "diagnostic", rt, log, plain)
        trained = trained._replace(invalid_for_records=(TRAINED_ON_VALIDATION,))
    with rt.budget.phase("calibration"):
        first = trained.steps * (cfg.train_batch_tokens // cfg.train_seq_len)
        hessians = collect_hessians(model, loader, first, plan, cfg, rt, log)
    seconds = rt.budget.total(["calibration"])
    log.line(f"GPTQ:collected {len(hessians)} Hessians in {seconds:.1f}s")
    with rt.together():
        if rt.is_main:
            write_artifact(model, hessians, trained, table, cfg, rt, log)
    return trained.steps


TRAINED_ON_VALIDATION = "trained on the validation text before it was scored"


def score_text(
    forward: Callable,
    plan: DepthPlan,
    val: ValidationTokens,
    cfg: Config,
    rt: Runtime,
    show: Callable[..., None],
    **options: Any,
) -> tuple[Score, Ledger]:
    """Every target once, in windows side by side unless `options` of `evaluate` say otherwise."""
    options = dict(stride=cfg.eval_seq_len) | options
    return evaluate(functools.partial(forward, plan=plan), val, cfg, rt, show=show, **options)


def train_model(
    loader: Loader, val: ValidationTokens, cfg: Config, rt: Runtime, log: Log
) -> tuple[GPT, Callable, Trained]:
    """A model trained from scratch: (model, its forward, perhaps compiled, and its training)."""
    attention = cfg.attention, rt.device, rt.compute_dtype
    _, kernel, _ = select_attention(*attention, packed=cfg.doc_packing)
    _, kernels, _ = select_kernels(cfg.kernels, rt.device, rt.compute_dtype)
    model = GPT(cfg, kernel, rt.compute_dtype, kernels)
    model.init_weights(cfg.seed)
    forward = rt.compile(model.to(rt.device))
    log.line(f"model_params:{sum(p.numel() for p in model.parameters())}")

    def validate(plan: DepthPlan, prefix: str) -> None:
        with rt.budget.phase("diagnostic"):
            score, _ = score_text(forward, plan, val, cfg, rt, log.progress("validation"))
        log.line(f"{prefix} val_loss: {score.loss:.4f} val_bpb: {score.bpb:.4f}")

    with rt.budget.phase("warm-up"):
        warm_up(forward, model, loader, cfg, rt, log)
        if cfg.max_wallclock_seconds and not cfg.gptq_reserve_seconds:
            cfg = measure_reserve(model, loader, cfg, rt, log)
    trained = train(forward, model, loader, validate, cfg, rt, log)
    if rt.device.type == "cuda":
        used, kept = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        log.line(f"peak memory allocated: {used >> 20} MiB reserved: {kept >> 20} MiB")
        log.put(peak_memory_bytes=used)
    return model, forward, trained


def write_artifact(
    model: GPT,
    hessians: Mapping[str, Tensor],
    trained: Trained,
    table: ByteTable,
    cfg: Config,
    rt: Runtime,
    log: Log,
) -> None:
    """Quantize the model and write what a run leaves on disk. Runs on rank 0 alone."""
    header = dict(
        model=cfg.model_settings(),
        looped=trained.looped,
        tokenizer_sha256=table.digest,
        invalid_for_records=trained.invalid_for_records,
    )
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if cfg.save_checkpoint:
        atomic_write(log.path("ckpt"), pack(weights, header, "none"))
    blob = fit_artifact(weights, hessians, header, cfg, rt, log)
    atomic_write(log.path("bin"), blob)
    log.line(f"Serialized model quantized+{cfg.compressor}: {len(blob)} bytes")
    log.line(f"Code size: {code_bytes()} bytes")
    total = len(blob) + code_bytes()
    log.line(f"Total submission size quantized+{cfg.compressor}: {total} bytes")


def read_file(path: str | Path, rt: Runtime) -> bytes:
    """The bytes of an artifact or checkpoint that rank 0 can read, on every rank.

    Raises: ArtifactError on all ranks if it cannot be read.
    """
    blob = b""
    with rt.together():
        try:
            if rt.is_main:
                blob = Path(path).read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"{path}: {error.strerror}; give the file that a run wrote"
            ) from error
    return rt.from_main(blob)


def stage(
    name: str,
    phase: str,
    rt: Runtime,
    log: Log,
    score: Callable[[Callable[..., None]], tuple[Score, Ledger]],
) -> Score:
    """Time an evaluation and report it: the line users look for, and facts in the JSON."""
    before = rt.budget.total([phase])
    with rt.budget.phase(phase):
        result, ledger = score(log.progress(name))
    seconds = rt.budget.total([phase]) - before
    log.line(
        f"{name} val_loss:{result.loss:.8f} val_bpb:{result.bpb:.8f} "
        f"eval_time:{seconds * 1e3:.0f}ms"
    )
    facts = dict(val_loss=result.loss, val_bpb=result.bpb, **dataclasses.asdict(result))
    facts |= ledger.digests() | dict(updates=len(ledger.updates), plain_from=ledger.plain_from)
    spent = {**log.record.get("ledger_seconds", {}), name: ledger.seconds}
    if ledger.plain_from is not None:
        log.line(
            f"{name} gave up EVAL_STRIDE at target {ledger.plain_from}, windows stand side by side "
            "from there: the rest would not have fitted EVAL_WALLCLOCK_SECONDS"
        )
    log.line(
        f"{name} ledger: tokens:{result.tokens} bytes:{result.bytes} nats:{result.nats:.6f} "
        f"updates:{len(ledger.updates)} order_sha256:{facts['order_sha256'][:16]} "
        f"ledger_sha256:{facts['ledger_sha256'][:16]} losses_sha256:{facts['losses_sha256'][:16]}"
    )
    log.put(stages={**log.record.get("stages", {}), name: facts}, ledger_seconds=spent)
    return result


def stored_config(origin: str, cfg: Config, rt: Runtime) -> Config:
    """The configuration with the model of an artifact or checkpoint. Raises as `load_model`."""
    blob = read_file(origin, rt)
    with rt.together():
        return cfg.with_model(model_settings(unpack(blob)[0], origin), origin)


def open_artifact(
    path: Path, table: ByteTable, cfg: Config, rt: Runtime
) -> tuple[GPT, Config, dict[str, Any]]:
    """The model of an artifact on disk: (model, its configuration, header).

    Raises: ArtifactError if it is none, or belongs to another tokenizer.
    """
    with rt.budget.phase("decompression"):
        blob = read_file(path, rt)
    with rt.together(), rt.budget.phase("decompression"):
        model, cfg, header = load_model(blob, cfg, rt, str(path))
        if header.get("tokenizer_sha256") != table.digest:
            raise ArtifactError(
                f"{path}: trained with another tokenizer than {cfg.tokenizer_file} (sha256 "
                f"{table.digest[:16]}...); set TOKENIZER_PATH and DATA_PATH"
            )
    return model, cfg, header


def score_artifact(
    path: Path, table: ByteTable, val: ValidationTokens, cfg: Config, rt: Runtime, log: Log
) -> Score:
    """Read the artifact back from disk and score it; returns the last, strongest score."""
    model, cfg, header = open_artifact(path, table, cfg, rt)
    if reasons := header.get("invalid_for_records"):
        log.line(f"invalid_for_records: {'; '.join(reasons)}")
        log.put(invalid_for_records=reasons)
    forward, plan = rt.compile(model), depth_plan(cfg, looped=header["looped"])
    name, _, why = select_attention(cfg.attention, rt.device, rt.compute_dtype)
    log.line(f"attention:{name} ({why}) encoder:{plan.encoder} decoder:{plan.decoder}")
    limit = cfg.eval_wallclock_seconds or math.inf

    def scored(label: str, **options: Any) -> Score:
        score = functools.partial(score_text, forward, plan, val, cfg, rt, **options)
        return stage(label, label, rt, log, score)

    score = scored("quantized")
    if cfg.sliding_window_enabled:
        # What comes after it must at least be able to score all in windows side by side.
        later = rt.budget.total(["quantized"]) * cfg.ttt_enabled
        deadline = limit - later
        score = scored("quantized_sliding_window", stride=cfg.eval_stride, deadline=deadline)
    if cfg.ttt_enabled:
        ttt = TestTimeTraining(functools.partial(forward, plan=plan), model, cfg, rt, log)
        score = scored("quantized_ttt", stride=cfg.eval_stride, deadline=limit, after_chunk=ttt)
        log.put(ttt=dict(chunks_adapted=ttt.adapted, complete=not ttt.stopped))
    return score


def conclude(score: Score, path: Path, steps: int, cfg: Config, rt: Runtime, log: Log) -> None:
    """The budget and the `result` line."""
    report = rt.budget.report(cfg)
    phases = report["phases"].items()
    log.line("budget " + " ".join(f"{name}={seconds:.1f}s" for name, seconds in phases))
    for name in ("training", "evaluation"):
        part = report[name]
        limit = f"{part['limit']:g}s" if part["limit"] else "none"
        verdict = "within" if part["within"] else "OVER"
        log.line(f"budget {name}: {part['seconds']:.1f}s limit: {limit} {verdict}")
    sizes = dict(artifact_bytes=path.stat().st_size if rt.is_main else 0, code_bytes=code_bytes())
    result = dict(
        val_bpb=round(score.bpb, 8),
        **sizes,
        total_bytes=sum(sizes.values()),
        train_seconds=round(report["training"]["seconds"], 1),
        eval_seconds=round(report["evaluation"]["seconds"], 1),
        steps=steps,
        seed=cfg.seed,
    )
    if "invalid_for_records" in log.record:
        result["invalid_for_records"] = 1
    if rt.is_main:
        log.put(artifact=dict(bytes=sizes["artifact_bytes"], sha256=file_sha256(path)))
    ended = datetime.datetime.now().astimezone().isoformat()
    log.put(budget=report, result=result, ended=ended)
    log.line("result " + " ".join(f"{key}={value}" for key, value in result.items()))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits; the file may be larger than memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def earlier_run(cfg: Config, run_id: str) -> str:
    """The result line of a finished run of this name, settings and code, else nothing.

    What a run of this name left unfinished is renamed, so that a sweep can be started again.
    Raises: ConfigError if the finished run had other settings or code, or if it still runs.
    """
    folder, text = Path(cfg.log_dir), Path(cfg.log_dir) / f"{run_id}.txt"
    if not text.exists():
        return ""
    with open(text, "rb") as stream:
        if not lock(stream):
            raise ConfigError(f"RUN_ID={run_id}: {text} is being written; choose another RUN_ID")
    try:
        record = json.loads((folder / f"{run_id}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # cut off before it wrote anything
        record = {}
    if "result" in record:
        then = {name: fact["value"] for name, fact in record["config"].items()}
        now = {s.name: getattr(cfg, s.name) for s in knobs()}
        if record["code"]["sha256"] == file_sha256(Path(__file__)) and then == now:
            return "result " + " ".join(f"{k}={v}" for k, v in record["result"].items())
        raise ConfigError(
            f"RUN_ID={run_id}: {text} is a finished run of other settings or code; choose another "
            "RUN_ID"
        )
    aside = f"{run_id}.unfinished{time.time_ns()}"
    for suffix in ("txt", "json", "bin", "ckpt"):
        with contextlib.suppress(FileNotFoundError):
            (folder / f"{run_id}.{suffix}").rename(folder / f"{aside}.{suffix}")
    return ""


def lock(stream: Any) -> bool:
    """Take a file for this process until it ends or closes it; False if another process has it."""
    try:
        import fcntl  # not on every system
    except ImportError:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def audit(cfg: Config, rt: Runtime) -> int:
    """Prove or refute that the score of ARTIFACT is legal; returns the exit status.

    The proof is a file of its own, audit.py, beside this one or in records/, and calls the
    evaluator of this one.
    """
    here = Path(__file__).resolve().parent
    places = [here / "audit.py", here / "records" / "audit.py", here.parent.parent / "audit.py"]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise ConfigError(f"AUDIT=1: no audit.py beside {__file__} or in records/; copy it there")
    spec = importlib.util.spec_from_file_location("audit", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name = f"{cfg.run_id or Path(cfg.artifact).stem}.audit"
    with Log(cfg.log_dir, name, replace=True) as log:
        return module.audit(sys.modules[__name__], cfg, rt, log)


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run with these arguments and environment variables; returns the exit status."""
    if argv and argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    try:
        if argv:
            raise ConfigError(
                f"{argv[0]}: expected no arguments, settings are environment variables; see --help"
            )
        cfg = Config.from_env(env, cuda=torch.cuda.is_available())
        with Runtime(cfg, env) as rt:
            name = cfg.run_id or time.strftime(f"%Y%m%d-%H%M%S-seed{cfg.seed}")
            name, done = rt.from_main(name), ""
            if cfg.audit:
                return audit(cfg, rt)
            with rt.together():
                done = earlier_run(cfg, name) if rt.is_main else ""
            if done := rt.from_main(done):
                print(f"{name}: finished before: {done}" * rt.is_main, flush=True)
                return 0
            with rt.together():
                log = Log(cfg.log_dir, name, enabled=rt.is_main)
            with log:
                run(cfg, rt, log)
    except UserError as error:
        rank = env.get("RANK", "0")
        if rank == "0" or not error.on_all_ranks:
            who = "" if rank == "0" else f"rank {rank}: "
            print(f"{who}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:], os.environ)
    # After an error other ranks may wait for this one. And a thread of gloo that lets go of its
    # last message while Python tears itself down would abort a run that went well.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
