#!/usr/bin/env python3
"""Train a small GPT for ten minutes, squeeze it into 16,000,000 bytes, score it in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py    # the competition, on 8xH100
    python train_gpt.py                                      # one GPU, or a laptop: one code path
    python train_gpt.py --help                               # every setting, no GPU, no data

Every setting is an environment variable. The file reads in the order the program runs:
Settings, Runtime, Data, Kernels, Tensors, Model, Optimizer, Training, Quantization, Artifact,
Evaluation, Main.
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
import shutil
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
from torch.optim import Optimizer

# ---------------------------------------------------------------------------------------------
# 1  Settings
# A setting is one line of Config; its environment variable is the field's name in capitals. All
# problems are found before anything is loaded, and reported together. Defaults: system #1493.
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """An error the user can fix: one readable line, exit status 2.

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
    """The loss became NaN or infinite."""

    on_all_ranks = True


class LedgerError(RuntimeError):
    """Scoring broke a rule of the game: our bug, or a trick. condition: C3 or C4."""

    def __init__(self, condition: str, message: str):
        super().__init__(message)
        self.condition = condition


# The rules: seconds of training and of evaluation, bytes of code and artifact together.
TRAINING_SECONDS, EVALUATION_SECONDS, TOTAL_BYTES = 600.0, 600.0, 16_000_000


def code_bytes() -> int:
    """The literal size of the file that runs: it counts against ARTIFACT_LIMIT_BYTES."""
    return Path(__file__).stat().st_size


AUTO, ROUNDINGS = ("auto", "0", "1"), ("gptq", "nearest")
ATTENTIONS = ("auto", "fa3", "fa4", "cudnn", "flash", "sdpa", "plain")


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
    names = dict(sentence=sentence, low=low, high=high, choices=choices, model=model)
    return field(default=default, metadata=names)


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Build it with `Config.from_env`; derived values are properties."""

    # Run
    run_id: str = knob("", "name of the run's files under LOG_DIR; empty: date, time and seed")
    seed: int = knob(1337, "seed of initial weights and data order", low=0, high=2**63 - 1)
    log_dir: str = knob("logs", "folder of the run's log, JSON and artifact")
    smoke: str = knob("auto", "small run on the sample; auto: no path, size or GPU", choices=AUTO)
    compile: str = knob("auto", "torch.compile; auto: on CUDA", choices=AUTO)
    compute_dtype: str = knob(
        "auto", "of activations; auto: bfloat16 on CUDA", choices=("auto", "bfloat16", "float32")
    )
    attention: str = knob("auto", "kernel; auto: fa3, else PyTorch's sdpa", choices=ATTENTIONS)
    kernels: str = knob("auto", "Triton; auto: on CUDA, those that agree there", choices=AUTO)
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
    val_tokens: int = knob(0, "number of validation targets to score, 0: all [tokens]", low=0)
    # Model
    vocab_size: int = knob(8192, "tokens in the vocabulary", low=8, high=65536, model=True)
    num_layers: int = knob(11, "physical layers", low=1, high=256, model=True)
    model_dim: int = knob(512, "width of the residual stream", low=8, high=1 << 16, model=True)
    num_heads: int = knob(8, "query heads", low=1, model=True)
    num_kv_heads: int = knob(4, "key and value heads; divides NUM_HEADS", low=1, model=True)
    mlp_mult: float = knob(4.0, "width of the MLP over MODEL_DIM", low=0.25, high=256.0, model=True)
    leaky_relu_slope: float = knob(0.5, "of the MLP; 0: ReLU squared", low=0.0, model=True)
    xsa_last_n: int = knob(11, "number of final layers that use XSA", low=0, model=True)
    parallel_residual_start: int = knob(7, "first parallel layer", low=0, model=True)
    parallel_residual_form: str = knob(
        "gptj", "of parallel layers: one stream or two", choices=("gptj", "lanes"), model=True
    )
    skip_gates_enabled: bool = knob(True, "skips are mixed in by a gate, else added", model=True)
    max_skips: int = knob(256, "maximum number of skip connections", low=0, model=True)
    smear_gate_enabled: bool = knob(False, "mix each input with the previous one", model=True)
    bigram_vocab_size: int = knob(0, "bigram buckets, 0: none", low=0, high=1 << 24, model=True)
    bigram_dim: int = knob(128, "width of the bigram table", low=1, high=1 << 16, model=True)
    ve_dim: int = knob(0, "value embedding's width, 0: none", low=0, high=1 << 16, model=True)
    ve_layers: str = knob("9,10", "layers with the value embedding", model=True)
    loop_start: int = knob(3, "first layer of the loop", low=0, model=True)
    loop_end: int = knob(5, "last layer of the loop", low=0, model=True)
    num_loops: int = knob(2, "extra visits of the loop, 0: none", low=0, high=256, model=True)
    rope_base: float = knob(10000.0, "base of the rotary frequencies", low=1.0, model=True)
    rope_dims: int = knob(16, "rotated dimensions of a head; even", low=2, model=True)
    rope_train_seq_len: int = knob(2048, "longest text without NTK rescale", low=1, model=True)
    logit_softcap: float = knob(30.0, "logits stay within plus or minus this", low=1.0, model=True)
    qk_gain_init: float = knob(5.25, "initial gain of the normalised queries")
    scaled_projections: bool = knob(False, "bigram and value proj begin / sqrt(2 NUM_LAYERS)")
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial embedding", low=0.0)
    # Training
    iterations: int = knob(20000, "maximum number of steps", low=1)
    max_wallclock_seconds: float = knob(TRAINING_SECONDS, "training limit [s], 0: none", low=0.0)
    gptq_reserve_seconds: float = knob(0.0, "of it, for calibration [s], 0: measured", low=0.0)
    train_batch_tokens: int = knob(786432, "tokens of one step, over all ranks [tokens]", low=1)
    train_seq_len: int = knob(2048, "length of a training sequence [tokens]", low=2)
    doc_masking: bool = knob(False, "while training, no position sees another document")
    micro_batch_tokens: int = knob(98304, "most tokens of one forward on one device", low=1)
    warmup_steps: int = knob(20, "steps per stage before the clock, undone", low=0)
    warmdown_frac: float = knob(0.72, "fraction in which rates fall", low=0.0, high=1.0)
    warmdown_iters: int = knob(0, "steps in which rates fall, 0: WARMDOWN_FRAC", low=0)
    min_lr: float = knob(0.0, "floor of the learning-rate multiplier", low=0.0, high=1.0)
    enable_looping_at: float = knob(0.35, "fraction of training before the loop", low=0.0, high=1.0)
    enable_looping_at_step: int = knob(0, "step of the loop, 0: ENABLE_LOOPING_AT", low=0)
    late_qat_threshold: float = knob(0.0, "rates below it: train rounded", low=0.0, high=1.0)
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
    prequant_ttt_freeze_blocks: int = knob(1, "number of first layers that are frozen", low=0)
    prequant_ttt_batch_tokens: int = knob(524288, "tokens of a step [tokens]", low=1)
    # Quantization and artifact
    gptq_calibration_batches: int = knob(64, "batches, each an eighth of TRAIN_BATCH_TOKENS", low=1)
    matrix_bits: int = knob(6, "width of a matrix entry [bits]", low=2, high=8)
    matrix_clip_sigmas: float = knob(12.85, "half a row's range in its sigmas (SDClip)", low=0.1)
    embed_bits: int = knob(8, "width of an embedding entry [bits]", low=2, high=8)
    embed_clip_sigmas: float = knob(20.0, "the same of a row of the embedding", low=0.1)
    clip_rule: str = knob("sigmas", "how a row's range is found", choices=("sigmas", "percentile"))
    scale_floor: bool = knob(False, "a row's step is at least 1 over the largest code")
    gptq_order: str = knob(
        "descending", "columns by their Hessian's diagonal", choices=("descending", "ascending")
    )
    embed_quantizer: str = knob("gptq", "of the embedding", choices=ROUNDINGS)
    int8_sensitive: str = knob("", "matrices with one of these words get EMBED_BITS; by commas")
    fit_rule: str = knob(
        "tightest", "what makes an artifact fit", choices=("tightest", "wider", "prune")
    )
    compressor: str = knob("brotli", "of the artifact", choices=("brotli", "zstd", "lzma"))
    artifact_limit_bytes: int = knob(TOTAL_BYTES, "limit of code and artifact [bytes]", low=1)
    # Evaluation
    eval_seq_len: int = knob(2048, "length of a scoring window [tokens]", low=2)
    eval_stride: int = knob(64, "targets scored per window [tokens]; at most EVAL_SEQ_LEN", low=1)
    sliding_window_enabled: bool = knob(True, "score with sliding windows too")
    ttt_enabled: bool = knob(True, "score with test-time training (TTT) too")
    ttt_lr: float = knob(0.005, "learning rate of TTT at the first chunk", low=0.0)
    ttt_epochs: int = knob(3, "steps over each scored chunk", low=1)
    ttt_momentum: float = knob(0.9, "momentum of TTT's SGD", low=0.0, high=1.0)
    ttt_optimizer: str = knob("sgd", "of TTT", choices=("sgd", "adamw"))
    ttt_train_chunks: int = knob(0, "number of first chunks that adapt, 0: all", low=0)
    ttt_freeze_blocks: int = knob(0, "number of first layers that TTT freezes", low=0)
    ttt_freeze_embeddings: bool = knob(False, "TTT freezes the embeddings")
    ttt_ema_decay: float = knob(0.0, "TTT scores with an average, 0: without", low=0.0, high=1.0)
    ttt_grad_clip: float = knob(1.0, "largest gradient norm of TTT, 0: any", low=0.0)
    ttt_chunk_tokens: int = knob(32768, "targets scored before each adaptation [tokens]", low=1)
    eval_wallclock_seconds: float = knob(EVALUATION_SECONDS, "its limit [s], 0: none", low=0.0)
    # Audit
    audit: bool = knob(False, "prove the score of ARTIFACT legal instead of scoring it")
    audit_tokens: int = knob(768, "targets that the audit scores repeatedly [tokens]", low=64)
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
                    both = f"{alias}={env[alias]} and {setting.name.upper()}={text}"
                    problems.append(f"{both} are one setting with two values; set one of them")
                text = env[alias]
            if text is not None:
                try:
                    given[setting.name] = parse_value(setting, text)
                except ValueError as error:
                    problems.append(f"{setting.name.upper()}={text}: {error}")
        smoke = given.get("smoke", "auto")
        small = smoke == "1" or (smoke == "auto" and not cuda and not SMOKE_BLOCKERS & given.keys())
        values = SMOKE | given if small else given
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
        one_width = not (self.int8_sensitive and self.late_qat_threshold)
        expect("int8_sensitive", one_width, "nothing: LATE_QAT_THRESHOLD rounds all to MATRIX_BITS")
        expect("bigram_vocab_size", self.bigram_vocab_size != 1, "0, or at least 2")
        code, fits = code_bytes(), self.artifact_limit_bytes > code_bytes()
        expect("artifact_limit_bytes", fits, f"more than the code's own {code}")
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
        name = pure_byte if self.vocab_size == 260 else bpe
        return Path(self.tokenizer_path or Path(self.data_dir) / "tokenizers" / name)

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

    @property
    def train_rows(self) -> int:
        """Sequences of one step, over all ranks."""
        return self.train_batch_tokens // self.train_seq_len

    def micro_rows(self, world_size: int) -> int:
        """Sequences of one training forward: the most that divide a rank's and fit the device."""
        rows, most = self.train_rows // world_size, self.micro_batch_tokens // self.train_seq_len
        return next(n for n in range(min(rows, most), 0, -1) if rows % n == 0)

    def values(self) -> dict[str, Any]:
        """Every setting by name."""
        return {s.name: getattr(self, s.name) for s in knobs()}

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
    "DOC_PACKING": "doc_masking",
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
    """Variables that look meant for us and are not settings: (problems, warnings)."""
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
        line = f"  {setting.name.upper():<28}{value:<12}{setting.metadata['sentence']}"
        lines.append(line + f" ({limits})" * bool(limits))
    lines += ["", "Other names for a setting:", ""]
    lines += [f"  {alias:<28}{name.upper()}" for alias, name in ALIASES.items()]
    paths = ("data_path", "tokenizer_path")
    small = ", ".join(f"{name.upper()}={v}" for name, v in SMOKE.items() if name not in paths)
    return "\n".join([*lines, "", f"SMOKE=1 takes the sample in data/sample and {small}."])


# ---------------------------------------------------------------------------------------------
# 2  Runtime
# Ranks, device, clock, log and files of a run. Only Runtime talks to torch.distributed; collectives
# are no-ops on one rank, so that one process and many run the same lines. Every rank makes the same
# calls.
# ---------------------------------------------------------------------------------------------


# Dense bf16 operations per second and bytes of memory per second of one device, by data sheets.
PEAKS = {"H100": (989.4e12, 3.35e12), "H200": (989.4e12, 4.8e12), "A100": (311.9e12, 2.039e12)}
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)  # rank 0 compresses alone for minutes


class Budget:
    """A ledger of phases on a monotonic clock. An inner phase stops the clock of the outer one.

    Every second is charged to exactly one phase of PHASES; time outside all of them is "other".
    `finish` is called where a phase begins or ends: it waits for the device. started: local date
    and time.
    """

    TRAINING = ("train", "calibration")  # everything that reads training data inside the clock
    EVALUATION = ("decompression", "quantized", "quantized_sliding_window", "quantized_ttt")
    PHASES = (
        *("other", "data", "baseline", "warm-up", "train", "diagnostic", "fine-tuning"),
        *("calibration", "quantization", "compression", *EVALUATION),
    )

    def __init__(self, cfg: Config, finish: Callable[[], None] = lambda: None):
        self.finish, self.seconds, self.open = finish, {}, ["other"]
        training, evaluation = cfg.max_wallclock_seconds, cfg.eval_wallclock_seconds
        self.limits = dict(
            training=(self.TRAINING, training), evaluation=(self.EVALUATION, evaluation)
        )
        self.since, self.started = time.perf_counter(), datetime.datetime.now().astimezone()

    @contextlib.contextmanager
    def phase(self, name: str):
        """Time a block; the time of equal names adds up."""
        assert name in self.PHASES, f"phase {name} is not in the closed list"
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
        """Charge the time since the last tick to the innermost open phase."""
        now, name = time.perf_counter(), self.open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def total(self, *phases: str) -> float:
        """Seconds of these phases up to now, without waiting for the device."""
        self.tick()
        return sum(self.seconds.get(name, 0.0) for name in phases)

    def report(self) -> dict[str, Any]:
        """Seconds of each phase, and the two sums that the rules limit beside their limits.

        wall_seconds are those of the calendar's clock; what they exceed the phases by would be time
        that a stopped timer lost.
        """
        wall = (datetime.datetime.now().astimezone() - self.started).total_seconds()
        self.tick()
        unbooked, sums = wall - sum(self.seconds.values()), {}
        for name, (phases, limit) in self.limits.items():
            spent = self.total(*phases)
            sums[name] = dict(seconds=spent, limit=limit, within=not limit or spent <= limit)
        return dict(phases=dict(self.seconds), wall_seconds=wall, unbooked_seconds=unbooked, **sums)


class Runtime:
    """Ranks, device and types of this process, and what every part of a run writes to.

    A context manager: it owns the process group. Attributes: rank, world_size, device,
    compute_dtype (of activations), is_main; budget, the time that this process spends, by phase;
    folder, the files of the run, and log, which is silent until `open_run`.
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
        self.budget, self.created = Budget(cfg, self.synchronize), time.perf_counter()
        self.folder, self.log = None, Log(None)

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
        self.log.close(error)
        # After an error the other ranks may never reach the barrier: leave without one.
        if self.world_size > 1 and kind is None:
            dist.barrier()
            dist.destroy_process_group()

    def open_run(self, cfg: Config) -> str:
        """Name the run, take its files, and open its log on rank 0.

        Returns: the result line of a finished run of this name, settings and code, else nothing.
        Raises: ConfigError on all ranks if the name is taken or its files cannot be written.
        """
        name = cfg.run_id or time.strftime(f"%Y%m%d-%H%M%S-seed{cfg.seed}")
        self.folder, done = RunFolder(cfg.log_dir, self.from_main(name)), ""
        with self.together():
            if self.is_main:
                done = self.folder.finished(cfg)
                self.log = self.log if done else Log(self.folder)
        return self.from_main(done)

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
        """Start adding tensors over all ranks; a rank gets the sums of its `share` of each group.

        All groups travel in one message: who clips by the norm waits for the last one anyway.
        """
        if self.world_size == 1:
            return lambda: groups
        ranks = range(self.world_size)
        parts = [[x for g in groups for x in g[self.share(len(g), rank)]] for rank in ranks]
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
            own = [g[self.share(len(g))] for g in groups]
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

    def share(self, count: int, rank: int | None = None) -> slice:
        """A rank's part of `count` items, this one's if none is named.

        Parts are contiguous, and equal until the items run out: the first is the largest.
        """
        rank, each = self.rank if rank is None else rank, -(-count // self.world_size)
        return slice(min(rank * each, count), min((rank + 1) * each, count))

    def agree_max(self, *values: float) -> list[float]:
        """The largest of each value over the ranks, so that all ranks decide the same."""
        if self.world_size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return agreed.tolist()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value (any picklable object), on every rank."""
        return self.gather_objects(value if self.is_main else None)[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value (any picklable object), by rank, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self):
        """Turn a UserError of any rank inside the block into the same error on every rank."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        for found in self.gather_objects(error):
            if found is not None:
                found.on_all_ranks = True
                raise found

    def compile(self, function: Callable) -> Callable:
        """A function or, in place, a module, compiled for static shapes where this run compiles."""
        if not self.compiles:
            return function
        # Each plan and shape, with gradients and without, is a graph; torch would stop at eight.
        torch._dynamo.config.recompile_limit = 64
        if isinstance(function, torch.nn.Module):
            function.compile(dynamic=False, fullgraph=True)
            return function
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

    def peak_flops(self) -> float | None:
        """Dense bf16 operations per second of one device by its data sheet, if it is known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        return next((flops for key, (flops, _) in PEAKS.items() if key in name), None)

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


class Pace:
    """Predicts a missed deadline from how long the work took so far.

    Args:
        phases: of the budget, whose seconds count; limit: of their sum, 0 or infinite: none.
    """

    def __init__(self, rt: Runtime, phases: Sequence[str], limit: float):
        self.rt, self.phases, self.limit = rt, phases, limit or math.inf
        self.pieces = collections.defaultdict(list)  # seconds of a unit in each piece, by kind

    @contextlib.contextmanager
    def piece(self, kind: str, units: int = 1):
        """Time a piece of so many units of work."""
        begin = time.perf_counter()
        yield
        self.pieces[kind].append((time.perf_counter() - begin) / max(units, 1))

    def late(self, **units: float) -> bool:
        """Whether so many more units of each kind would end after the limit; alike on all ranks.

        By the median piece; the first of a kind includes compilation and is not representative.
        """
        if math.isinf(self.limit):
            return False
        known = {kind: self.pieces[kind][1:] for kind in units}
        more = sum(units[k] * float(np.median(seconds)) for k, seconds in known.items() if seconds)
        return self.rt.agree_max(self.rt.budget.total(*self.phases) + more)[0] > self.limit


def cpu_name() -> str:
    """The processor's name, from Linux or from Python."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"model name\s*:\s*(.+)", text)[1]
    except (OSError, TypeError):  # another system, or a processor without that line
        return platform.processor() or platform.machine()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def full_disk(path: Path, what: str, error: OSError) -> ArtifactError:
    """The error for a file that cannot be written."""
    remedy = "free some space or set LOG_DIR to another disk"
    return ArtifactError(f"{path}: could not write {what}: {error.strerror}; {remedy}")


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file beside its name and rename it, so that the name never holds a half-written file.

    Raises: ArtifactError if it cannot be written; the part that was written is removed.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        raise full_disk(path, f"{len(data):,} bytes", error) from error
    finally:  # gone already if all went well; also if the run is interrupted
        with contextlib.suppress(OSError):  # the first error is the one to report
            part.unlink(missing_ok=True)


def lock(stream: Any) -> bool:
    """Take a file for this process until it ends or closes it; False if another process has it."""
    with contextlib.suppress(ImportError):  # not on every system
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


class RunFolder:
    """The files of one run: its log, JSON, artifact and checkpoint in LOG_DIR, named by RUN_ID."""

    SUFFIXES = ("txt", "json", "bin", "ckpt")

    def __init__(self, folder: str, run_id: str):
        self.folder, self.run_id = Path(folder), run_id

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.run_id}.{suffix}"

    def finished(self, cfg: Config) -> str:
        """The result line of a finished run of this name, settings and code, else nothing.

        What a run of this name left unfinished is renamed, so that a sweep can be started again.
        Raises: ConfigError if the finished run had other settings or code, or if it still runs.
        """
        text, who = self.path("txt"), f"RUN_ID={self.run_id}: {self.path('txt')}"
        if not text.exists():
            return ""
        with open(text, "rb") as stream:
            if not lock(stream):
                raise ConfigError(f"{who} is being written; choose another RUN_ID")
        record = {}
        with contextlib.suppress(OSError, ValueError):  # it was cut off before it wrote anything
            record = json.loads(self.path("json").read_text(encoding="utf-8"))
        if "result" in record:
            then = {name: fact["value"] for name, fact in record["config"].items()}
            same_code = record["code"]["sha256"] == file_sha256(Path(__file__))
            if same_code and then == cfg.values():
                return key_values("result", record["result"])
            raise ConfigError(f"{who} is a run of other settings or code; choose another RUN_ID")
        aside = RunFolder(str(self.folder), f"{self.run_id}.unfinished{time.time_ns()}")
        for suffix in self.SUFFIXES:
            with contextlib.suppress(FileNotFoundError):
                self.path(suffix).rename(aside.path(suffix))
        return ""


def key_values(label: str, facts: Mapping[str, Any]) -> str:
    """A line of the log: a label, then ``key=value`` pairs."""
    return " ".join([label, *(f"{key}={value}" for key, value in facts.items())])


class Log:
    """Console, text file and JSON of one run; without a folder it is silent.

    replace: overwrite the text file, which must not exist otherwise.
    Attributes: record, the content of the JSON.
    """

    PLAIN_SECONDS, BAR_SECONDS = 15.0, 0.2  # between two progress lines in a file, on a terminal

    def __init__(self, folder: RunFolder | None, *, stream=None, replace: bool = False):
        self.folder, self.stream, self.record = folder, stream or sys.stdout, {}
        self.bar = self.stream.isatty()
        self.pause_seconds = self.BAR_SECONDS if self.bar else self.PLAIN_SECONDS
        if folder is not None:
            try:
                folder.folder.mkdir(parents=True, exist_ok=True)
                mode = "w" if replace else "x"
                self.file = open(folder.path("txt"), mode, encoding="utf-8")  # noqa: SIM115
                lock(self.file)
            except OSError as error:
                place = f"LOG_DIR={folder.folder}, RUN_ID={folder.run_id}"
                raise ConfigError(f"{place}: {error.strerror}; choose others") from error

    def close(self, error: BaseException | None = None) -> None:
        """Close the file; the JSON says by which error the run ended."""
        if self.folder is not None:
            if error is not None:
                with contextlib.suppress(ArtifactError):  # the first error is the one to report
                    self.put(error=f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError):  # a disk that is full now was full before
                self.file.close()

    def line(self, text: str) -> None:
        """One event, one line, on the console and in the file."""
        if self.folder is not None:
            print("\r\x1b[K" * self.bar + text, file=self.stream, flush=True)
            try:
                print(text, file=self.file, flush=True)
            except OSError as error:
                raise full_disk(self.folder.path("txt"), "a line", error) from error

    def put(self, **facts: Any) -> None:
        """Add facts to the JSON and save it, so that a run that is cut off leaves what it knew."""
        self.record.update(facts)
        if self.folder is not None:
            text = json.dumps(self.record, indent=1, default=str)
            atomic_write(self.folder.path("json"), text.encode())

    def progress(self, label: str) -> Callable[..., None]:
        """A function of (fraction done, note="") that shows, now and then, how far and how long."""
        started = shown = time.monotonic()

        def show(frac: float, note: str = "") -> None:
            nonlocal shown
            now = time.monotonic()
            if self.folder is None or now - shown < self.pause_seconds:
                return
            shown = now
            left = f"{(now - started) * (1 - frac) / frac:.0f}s" if frac > 0 else "?"
            text = f"{label} {frac:4.0%} time_left:{left} {note}".rstrip()
            if self.bar:
                filled = "#" * int(24 * min(frac, 1.0))
                width = shutil.get_terminal_size().columns - 1
                bar = f"[{filled:<24}] {text}"[:width]
                print(f"\r\x1b[K{bar}", end="", file=self.stream, flush=True)
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
    "fetch it with data/cached_challenge_fineweb.py, set DATA_PATH and TOKENIZER_PATH, or take the "
    "sample with SMOKE=1"
)
OTHER_TOKENIZER = "the shards belong to another tokenizer"


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
        expected = f"expected {SHARD_HEADER_BYTES} header bytes that begin with {SHARD_MAGIC}"
        raise DataError(f"{path}: not a token shard: {expected}; fetch or build it again")
    if header[1] != SHARD_VERSION:
        found = f"shard version {header[1]}, expected {SHARD_VERSION}"
        raise DataError(f"{path}: {found}; build it again")
    promised, found = int(header[2]), (size - SHARD_HEADER_BYTES) / 2
    if promised != found or promised < 1:
        found = f"header promises {promised:,} tokens, file holds {found:,.12g}"
        raise DataError(f"{path}: {found}; fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(promised,))


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split (`train`, `val`, `val_bytes`), in order; DataError if none."""
    paths = sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))
    if not paths:
        raise DataError(f"{folder}: no fineweb_{split}_*.bin there; {GET_DATA}")
    return paths


def set_fingerprint(shards: Sequence[Path], tokenizer: Path) -> str:
    """Content fingerprint of a token set, cheap enough for each run: 32 hex digits.

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
        found = f"token id {largest}, expected ids below VOCAB_SIZE={vocab_size}"
        raise DataError(f"{where}: {found}; {OTHER_TOKENIZER}")


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

    def __init__(self, paths: Sequence[Path], cfg: Config):
        self.paths, self.shards = paths, [read_shard(path) for path in paths]
        self.order = cfg.loader
        self.seq_len, self.vocab_size, self.seed = cfg.train_seq_len, cfg.vocab_size, cfg.seed
        self.epoch_ends: list[int] = []
        if max(map(len, self.shards)) <= self.seq_len:
            window = f"one window of TRAIN_SEQ_LEN={self.seq_len}; set it lower"
            raise DataError(f"{paths[0].parent}: no training shard is longer than {window}")
        self.epoch(0)

    @functools.lru_cache(maxsize=2)  # noqa: B019 -- the one loader lives as long as the run
    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Phase and first window of each shard, and the order of all windows."""
        draw = np.random.default_rng([self.seed, number])
        spare = np.array([len(shard) - self.seq_len for shard in self.shards])
        phases = draw.integers(0, np.clip(spare, 1, self.seq_len)) * (self.order != "sequential")
        counts = np.maximum((spare - 1 - phases) // self.seq_len + 1, 0) * (spare > 0)
        firsts = np.cumsum(counts) - counts
        order = np.arange(counts.sum())
        if self.order == "shuffled":
            order = draw.permutation(order)
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
            check_vocabulary(out[row], self.vocab_size, str(self.paths[shard]))
        return out

    def batches(self, rt: Runtime, rows: int, first: int = 0) -> Iterator[Tensor]:
        """This rank's windows of step after step, which a thread prefetches.

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


@dataclass(frozen=True)
class ByteTable:
    """What each token adds to the text: the three tables by which this field charges bytes.

    Attributes (one entry per token id): base_bytes, UTF-8 length without the leading space;
    leading_space, whether the piece begins with a space; is_boundary, control and unused ids, after
    which that space is not written. digest: of the tokenizer.
    """

    base_bytes: np.ndarray
    leading_space: np.ndarray
    is_boundary: np.ndarray
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
        return cls((~control).astype(np.int16), np.zeros_like(control), control, digest)

    @classmethod
    def from_sentencepiece(cls, path: Path, blob: bytes, vocab_size: int) -> ByteTable:
        """The tables of a SentencePiece model with byte fallback."""
        import sentencepiece

        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=blob)
        except RuntimeError as error:
            raise DataError(f"{path}: not a SentencePiece model; {GET_DATA}") from error
        if model.vocab_size() != vocab_size:
            found = f"{model.vocab_size()} pieces, expected VOCAB_SIZE={vocab_size}"
            raise DataError(f"{path}: {found}; set TOKENIZER_PATH to the tokenizer of the shards")
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
        table = cls(np.array(base, np.int16), space, silent, digest, has_marks)
        table.refuse_miscounting(model, pieces, path)
        return table

    def refuse_miscounting(self, model, pieces: Sequence[str], path: Path) -> None:
        """Raises DataError if some text would be charged other bytes than its tokens decode to."""
        spoken = (p for p, silent in zip(pieces, self.is_boundary, strict=True) if not silent)
        inner = [p for p in spoken if self.SPACE in p.removeprefix(self.SPACE)]
        faults = [
            (self.SPACE not in pieces, f"the bare space {self.SPACE} is not a piece"),
            (sum(map(model.is_byte, range(len(pieces)))) != 256, "it has no byte fallback"),
            (bool(inner), f"piece {inner[:1]} has a space past its beginning"),
            (model.bos_id() != BOS, f"its BOS is {model.bos_id()}, expected {BOS}"),
        ]
        # Piece by piece, after one that opens no word: a decoder may rewrite what it is given.
        plain = [i for i, s in enumerate(self.is_boundary) if not s and not model.is_byte(i)]
        for first in [i for i in plain if not self.leading_space[i]][:1]:
            for i, text in zip(plain, model.decode([[first, i] for i in plain]), strict=True):
                charged = int(self.charge(np.array([BOS, first, i])).sum())
                fault = f"piece {pieces[i]!r} is miscounted"
                faults.append((charged != len(text.encode()), fault))
        for text in BYTE_PROBES:
            ids = model.encode(text)
            charged = int(self.charge(np.array([BOS, *ids])).sum())
            faults.append((charged != len(model.decode(ids).encode()), f"{text!r} is miscounted"))
        for fault in (text for found, text in faults if found):
            remedy = "use a tokenizer made by data/build_dataset.py"
            raise DataError(f"{path}: {fault}, so bytes would be counted wrong; {remedy}")

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
    tokenizer_sha256: str = ""

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
        if tokens[0] != BOS:
            found = f"begins with token {tokens[0]}, expected BOS={BOS}"
            raise DataError(f"{paths[0]}: {found}; {OTHER_TOKENIZER}")
        found = len(tokens) - 1
        if found < 1:
            raise DataError(f"{paths[0]}: {len(tokens)} validation tokens, expected at least 2")
        kept = min(found, limit or found)
        if kept == found >= seq_len:
            kept -= kept % seq_len
        charged = cls.charge(paths, tokens, table)
        return cls(tokens[: kept + 1], charged[:kept], found - kept, table.digest)

    @staticmethod
    def charge(paths: Sequence[Path], tokens: np.ndarray, table: ByteTable) -> np.ndarray:
        """Bytes of tokens[1:]: by the table, or by the sidecar if the tokenizer has CaseOps marks.

        Raises: DataError if there has to be a sidecar and is none, or if it is of another set.
        """
        if not table.has_marks:
            return table.charge(tokens)
        sidecar = np.concatenate([read_shard(p) for p in find_shards(paths[0].parent, "val_bytes")])
        if len(sidecar) != len(tokens) or sidecar[tokens == BOS].any():
            found = f"the byte sidecar ({len(sidecar):,} entries) is not of these {len(tokens):,}"
            raise DataError(f"{paths[0].parent}: {found} tokens; fetch or build both again")
        return sidecar[1:].astype(np.int16)


def decode_documents(tokens: np.ndarray, tokenizer: Path) -> Iterator[bytes]:
    """The documents of a token stream, as UTF-8; CaseOps marks are left in."""
    starts = np.flatnonzero(tokens == BOS)
    parts = (part[part != BOS] for part in np.split(tokens, starts[starts > 0]))
    if tokenizer.suffix == ".json":
        yield from ((part - BYTE_OFFSET).astype(np.uint8).tobytes() for part in parts)
        return
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    yield from (model.decode(part.tolist()).encode() for part in parts)


# ---------------------------------------------------------------------------------------------
# 4  Kernels
# Attention and the fused operations, beside the eager twins that define them. A `Backend` says who
# computes what; it is chosen once, by agreement of values and gradients, the same on every rank.
# ---------------------------------------------------------------------------------------------


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


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension; no weight."""
    return F.rms_norm(x, x.shape[-1:])


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first dimensions of each head (B, T, H, D) by position, in half-split pairs."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    half = cos.shape[-1]
    u, w, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([u * cos + w * sin, w * cos - u * sin, rest], dim=-1)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Logits squeezed smoothly into plus or minus cap, in float32."""
    return cap * torch.tanh(logits.float() / cap)


def cross_entropy(logits: Tensor, targets: Tensor, cap: float, reduction: str) -> Tensor:
    """Loss of the capped logits; see `Backend`."""
    return F.cross_entropy(softcap(logits, cap), targets, reduction=reduction)


def mlp_up(x: Tensor, weight: Tensor, slope: float) -> Tensor:
    """The MLP up to its second matrix; see `Backend`."""
    return F.leaky_relu(F.linear(x, weight), slope).square()


def norm_rotate(
    q: Tensor, k: Tensor, gain: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Normalise, rotate, and give each query head its gain; see `Backend`."""
    q, k = (rotate(rms_norm(heads), rotary) for heads in (q, k))
    return q * gain[:, None].to(q.dtype), k


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA, exclusive self attention: take from y (B, T, H, D) its part along the own v.

    Each position keeps what the others told it. Source: pull request #1493 of
    openai/parameter-golf, which names it so.
    """
    grouped = y.unflatten(2, (v.shape[2], -1))  # (B, T, K, H / K, D)
    own = F.normalize(v, dim=-1)[:, :, :, None]
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(2, 3)


class Backend(NamedTuple):
    """Who computes each operation of the model: PyTorch, unless `choose_backend` decides otherwise.

    attention: (q (B, T, H, D), k, v (B, T, K, D), documents or None) -> (B, T, H, D), causal.
    cross_entropy: (logits (N, V) before the cap, targets (N,), cap, reduction) -> nats, float32.
    mlp_up: (x (..., D), weight (H, D), slope) -> LeakyReLU squared of the product, (..., H).
    norm_rotate: (q (B, T, H, D), k (B, T, K, D), gain (H,), rotary table) -> q and k.
    exclude_self: (y (B, T, H, D), v (B, T, K, D)) -> (B, T, H, D).
    dtype: of the activations. why: what was chosen, and the reasons.
    """

    attention: Callable = plain_attention
    cross_entropy: Callable = cross_entropy
    mlp_up: Callable = mlp_up
    norm_rotate: Callable = norm_rotate
    exclude_self: Callable = exclude_self
    dtype: torch.dtype = torch.float32
    why: str = ""


EAGER = Backend()


def operator(
    name: str, inputs: str, shapes: Callable, compute: Callable, *, wrt: tuple, kept: tuple = ()
) -> Callable:
    """A differentiable function that is one opaque node of a compiled graph, each way.

    Args:
        inputs: the arguments as an operator's schema names them, tensors first.
        shapes: (*arguments) -> outputs, unwritten, contiguous.
        compute: (None, *arguments) -> outputs; (gradients of outputs and then kept outputs,
            *arguments) -> gradients. All tensors come contiguous.
        wrt: places of the arguments that get a gradient.
        kept: places of the outputs, the last ones, that only the gradient reads.
    """

    def contiguous(x: Any) -> Any:
        if isinstance(x, list):
            return [contiguous(part) for part in x]
        return x.contiguous() if isinstance(x, Tensor) else x

    def define(label: str, signature: str, fake: Callable, real: Callable) -> Any:
        options = dict(mutates_args=(), schema=f"({signature}) -> Tensor[]")
        call = lambda *args: real(*map(contiguous, args))  # noqa: E731
        made = library.custom_op(f"train_gpt::{label}", call, **options)
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

    def grad_shapes(ups: list[Tensor], *args: Any) -> list[Tensor]:
        return [args[place].new_empty(args[place].shape) for place in wrt]

    gradient = define(f"{name}_grad", f"Tensor[] ups, {inputs}", grad_shapes, compute)
    function = define(name, inputs, shapes, functools.partial(compute, None))
    function.register_autograd(backward, setup_context=save)
    return function


def tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile of whole rows: about 2,048 numbers for four warps."""
    columns = 1 << (width - 1).bit_length()
    return max(2048 // columns, 1), columns


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
    score = operator("cross_entropy", inputs, shapes, compute, wrt=(0,), kept=(1,))

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
    up = operator("mlp_up", inputs, shapes, compute, wrt=(0, 1), kept=(1,))
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

    def shapes(x: Tensor, *_: Any) -> list[Tensor]:
        return [x.new_empty(x.shape)]

    one = operator("norm_rotate", inputs, shapes, compute, wrt=(0, 3))
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

    one = operator("exclude_self", "Tensor y, Tensor v", shapes, compute, wrt=(0, 1))
    return lambda y, v: one(y, v)[0]


@functools.lru_cache(maxsize=1)  # an operator has its name once in a process
def triton_kernels() -> dict[str, Callable]:
    """The Triton twins of operations of `EAGER`. Raises ImportError where there is no Triton."""
    return dict(
        cross_entropy=triton_cross_entropy(),
        mlp_up=triton_mlp_up(),
        norm_rotate=triton_norm_rotate(),
        exclude_self=triton_exclude_self(),
    )


def wave(*shape: int, like: Tensor, pitch: float = 1.0) -> Tensor:
    """Deterministic test input within plus or minus 1.7, in the type and place of `like`."""
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
        if not error <= tolerance:  # also if it is NaN
            return f"it is wrong by {error:.1e} of the largest value on this device"
    return ""


def by_document(
    varlen: Callable, qkv: Sequence[Tensor], documents: Documents, **options: Any
) -> Tensor:
    """Attention by a kernel for rows of several lengths laid end to end: a row a document."""
    flat, bounds, longest = (x.flatten(0, 1) for x in qkv), documents.bounds, qkv[0].shape[1]
    out = varlen(*flat, bounds, bounds, longest, longest, **options)
    return (out[0] if isinstance(out, tuple) else out).view_as(qkv[0])


def flash_attention_3(rt: Runtime) -> Callable:
    """FlashAttention 3, one module under two names by the age of the package.

    Raises: RuntimeError unless it has a Hopper GPU and 16 bits; ImportError.
    """
    if rt.device.type != "cuda" or torch.cuda.get_device_capability(rt.device)[0] != 9:
        raise RuntimeError("the device is not a Hopper GPU")
    if rt.compute_dtype == torch.float32:
        raise RuntimeError("activations are float32")
    try:
        package = importlib.import_module("flash_attn_interface")
    except ImportError:
        package = importlib.import_module("flash_attn_3.flash_attn_interface")

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        if documents is not None:
            varlen = package.flash_attn_varlen_func
            return by_document(varlen, (q, k, v), documents, causal=True)
        out = package.flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # older wheels: (out, log-sum-exp)

    return attention


def attention_kernel(choice: str, rt: Runtime, *, documents: bool) -> Callable:
    """The attention of a package, or of one kernel inside PyTorch, as `plain_attention` is called.

    documents: it must be able to keep documents apart. "fa4" puts FlashAttention 4 in the place of
    "flash", for the whole process.
    Raises: AttributeError, ImportError or RuntimeError where that cannot be.
    """
    if choice == "fa3":
        return flash_attention_3(rt)
    backends = torch.nn.attention.SDPBackend
    backend = backends.CUDNN_ATTENTION if choice == "cudnn" else backends.FLASH_ATTENTION
    if choice == "fa4":
        torch.nn.attention.activate_flash_attention_impl("FA4")
    varlen = None
    if documents and choice != "cudnn":
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        if documents is not None and varlen is not None:
            options = dict(window_size=(-1, 0), enable_gqa=True)
            return by_document(varlen, (q, k, v), documents, **options)
        with torch.nn.attention.sdpa_kernel(backend):
            return sdpa_attention(q, k, v, documents)

    return attention


def choose_attention(choice: str, rt: Runtime, *, documents: bool) -> tuple[str, Callable, str]:
    """The attention of a run: (name, function, reason); see `choose_backend`."""
    named = {"plain": plain_attention, "sdpa": sdpa_attention}
    if choice in named:
        return choice, named[choice], "as set"
    name, kernel = "fa3" if choice == "auto" else choice, None
    q = wave(2, 64, 4, 64, like=torch.empty((), device=rt.device, dtype=rt.compute_dtype))
    mask = find_documents((q[:, :, 0, 0] > 1).long()) if documents else None

    def halves(attention: Callable, q: Tensor) -> Tensor:
        return attention(q, q[:, :, :2], q[:, :, 2:], mask)

    try:
        kernel = attention_kernel(name, rt, documents=documents)
        calls = (functools.partial(halves, f) for f in (plain_attention, kernel))
        fault = difference(*calls, q)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        fault = f"{error}".partition(". ")[0].partition("\n")[0]
    fault = next(filter(None, rt.gather_objects(fault)), "")
    if fault and choice != "auto":
        raise ConfigError(f"ATTENTION={choice}: {fault}; unset it or set ATTENTION=sdpa")
    if fault:
        return "sdpa", sdpa_attention, f"fa3 cannot be used: {fault}"
    return name, kernel, "it agrees with plain attention" if choice == "auto" else "as set"


def kernel_faults(rt: Runtime) -> dict[str, str]:
    """By operation, why its Triton kernel cannot be used on this device; "" if it can."""
    try:
        kernels, interpreter = triton_kernels(), importlib.import_module("triton.knobs").runtime
    except ImportError as error:
        return {"triton": f"it does not import ({error})"}
    if rt.device.type != "cuda" and not interpreter.interpret:
        return {"triton": "the device is not a GPU"}
    like = torch.empty((), device=rt.device, dtype=rt.compute_dtype)
    targets = torch.arange(96, device=rt.device) * 11
    rotary = tuple(wave(48, 1, 8, like=like.float(), pitch=pitch) for pitch in (1.1, 1.2))
    # Widths as in a model; numbers of rows and outputs that fill no tile.
    x, weight = wave(2, 48, 256, like=like), wave(320, 256, like=like, pitch=1.4)
    q, v = x.view(2, 48, 4, 64), wave(2, 48, 2, 64, like=like, pitch=1.3)
    cases = dict(
        cross_entropy=(lambda f, x: f(x, targets, 5.0, "none"), 10 * wave(96, 1100, like=like)),
        mlp_up=(lambda f, *a: f(*a, 0.5), x, weight),
        norm_rotate=(lambda f, *a: f(*a, rotary), q, v, wave(4, like=like.float())),
        exclude_self=(lambda f, *a: f(*a), q, v),
    )
    faults = {}
    for name, (call, *inputs) in cases.items():
        calls = (functools.partial(call, f) for f in (getattr(EAGER, name), kernels[name]))
        try:
            faults[name] = difference(*calls, *inputs)
        except Exception as error:  # whatever a compiler may raise on a device it does not know
            faults[name] = f"{type(error).__name__}: " + f"{error}".partition("\n")[0]
    return faults


def choose_kernels(choice: str, rt: Runtime) -> tuple[dict[str, Callable], str]:
    """The Triton kernels of a run by operation, and what to say of it; see `choose_backend`.

    On a CPU there are Triton kernels in Triton's interpreter alone, and only by KERNELS=1.
    """
    if choice == "0":
        return {}, "eager (as set)"
    tried = choice == "1" or rt.device.type == "cuda"
    found = rt.gather_objects(kernel_faults(rt) if tried else {"triton": "the device is not a GPU"})
    faults = {name: fault for each in found for name, fault in each.items() if fault}
    said = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    if faults and choice == "1":
        raise ConfigError(f"KERNELS=1: {said}; unset it or set KERNELS=0")
    if "triton" in faults:
        return {}, f"eager ({faults['triton']})"
    kernels = {name: f for name, f in triton_kernels().items() if name not in faults}
    return kernels, f"triton except {said}" if faults else "triton (all agree with their twins)"


def choose_backend(cfg: Config, rt: Runtime, *, documents: bool = False) -> Backend:
    """Decide once who computes each operation, the same on every rank, and say so in the log.

    A kernel is taken only if its values and gradients agree with the eager twin on this device.
    documents: attention must be able to keep documents apart.
    Raises: ConfigError on all ranks if a choice cannot be honoured.
    """
    with rt.together():
        name, attention, reason = choose_attention(cfg.attention, rt, documents=documents)
        kernels, said = choose_kernels(cfg.kernels, rt)
    why = f"attention:{name} ({reason}) kernels:{said}"
    rt.log.line(why)
    return Backend(attention, dtype=rt.compute_dtype, why=why)._replace(**kernels)


# ---------------------------------------------------------------------------------------------
# 5  Tensors
# One table claims every tensor: who optimizes it, and how it is stored.
# ---------------------------------------------------------------------------------------------


MATRIX_PERCENTILES, TABLE_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0), (0.9999984,)
QAT_PERCENTILES = (0.9995,)
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16: a row of zeros needs some scale


class AsCodes(NamedTuple):
    """Store a matrix as integer codes of `bits`, within plus or minus `top`, and a scale per row.

    gptq: round by GPTQ, columns in "descending" or "ascending" order of their Hessian's diagonal;
        "": each entry to the nearest code.
    clip_sigmas: half a row's range, in standard deviations (SDClip, pull request #1394 of
        openai/parameter-golf); or percentiles: of |w|, of which the one with least error ends it.
    smallest: the least scale of a row.
    """

    bits: int
    gptq: str = ""
    clip_sigmas: float = 0.0
    percentiles: tuple[float, ...] = ()
    smallest: float = SMALLEST_SCALE

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def scales(self, weight: Tensor, coarser: float = 1.0) -> Tensor:
        """The scale of each row (rows,) float32: half its range over the largest code.

        coarser: multiplies ranges in standard deviations.
        """
        if not self.percentiles:
            half_range = self.clip_sigmas * coarser * weight.std(dim=1)
            return (half_range / self.top).clamp_min(self.smallest)
        sizes = weight.detach().float().abs()
        at = torch.tensor(self.percentiles, device=weight.device)
        scales = (torch.quantile(sizes, at, dim=1) / self.top).clamp_min(self.smallest)  # (P, rows)
        if len(self.percentiles) == 1:
            return scales[0]
        rounded = [(sizes / s[:, None]).round().clamp_max(self.top) * s[:, None] for s in scales]
        errors = torch.stack([(r - sizes).square().sum(1) for r in rounded])
        return scales.gather(0, errors.argmin(0, keepdim=True))[0]


class AsFloats(NamedTuple):
    """Store a tensor as floats of a type of torch, by name."""

    dtype: str
    gptq = ""  # not a field: floats need no Hessian


class Row(NamedTuple):
    """Tensors whose whole name matches `pattern`: who optimizes them, and how they are stored."""

    pattern: str
    group: str
    store: AsCodes | AsFloats


def tensor_table(cfg: Config) -> tuple[Row, ...]:
    """The only place that decides how a tensor is optimized and stored; the first match wins."""
    searched = cfg.clip_rule == "percentile"
    floored = searched or cfg.scale_floor  # in two public systems: 1 over the largest code

    def codes(bits: int, gptq: str, sigmas: float, percentiles: tuple[float, ...]) -> AsCodes:
        smallest = 1 / (2 ** (bits - 1) - 1) if floored else SMALLEST_SCALE
        return AsCodes(bits, gptq, sigmas, percentiles if searched else (), smallest)

    matrix = codes(cfg.matrix_bits, cfg.gptq_order, cfg.matrix_clip_sigmas, MATRIX_PERCENTILES)
    sensitive = codes(cfg.embed_bits, cfg.gptq_order, cfg.embed_clip_sigmas, TABLE_PERCENTILES)
    to_nearest = sensitive._replace(gptq="")
    head = sensitive if cfg.embed_quantizer == "gptq" else to_nearest
    words = "|".join(re.escape(word) for word in cfg.int8_sensitive.split(",") if word) or "(?!)"
    weights = r"blocks\.\d+\.(attn\.(q|k|v|out)|mlp\.(up|down))\.weight"
    return (
        Row(r"head\.weight", "embedding", head),
        Row(r"(bigram|value_embedding)\.table", "embedding", to_nearest),
        Row(rf"(?=.*({words})){weights}", "matrix", sensitive),
        Row(weights, "matrix", matrix),
        Row(r"(bigram|value_embedding)\.proj\.weight", "matrix", AsFloats("float16")),
        Row(r".*", "scalar", AsFloats("float16")),
    )


def find_row(name: str, table: Sequence[Row]) -> Row:
    """The first row of the table that claims a tensor."""
    return next(row for row in table if re.fullmatch(row.pattern, name))


# ---------------------------------------------------------------------------------------------
# 6  Model
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

    rounded: the blocks' matrices are rounded to codes in the forward alone.
    masked: no position sees another document than its own; rotary positions count on.
    """

    visits: tuple[Visit, ...]
    rounded: bool = False
    masked: bool = False

    @property
    def encoder(self) -> list[int]:
        return [v.layer for v in self.visits[: len(self.visits) // 2]]

    @property
    def decoder(self) -> list[int]:
        return [v.layer for v in self.visits[len(self.visits) // 2 :]]

    @property
    def skips(self) -> int:
        return sum(v.pop >= 0 for v in self.visits)

    def __str__(self) -> str:
        return f"encoder:{self.encoder} decoder:{self.decoder}"


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


def fake_quantize(weight: Tensor, codes: AsCodes) -> Tensor:
    """A matrix rounded to its nearest codes; its gradient passes straight through.

    Source: Bengio et al. 2013, arXiv:1308.3432, the straight-through estimator.
    """
    with torch.no_grad():
        scales = codes.scales(weight)[:, None]
        rounded = (weight / scales).round().clamp(-codes.top, codes.top) * scales
    return weight + (rounded - weight).detach()


class Linear(nn.Linear):
    """A matrix without bias, kept in float32 and cast to the type of its input at use."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(
        self, x: Tensor, rounding: AsCodes | None = None, product: Callable = F.linear
    ) -> Tensor:
        weight = self.weight if rounding is None else fake_quantize(self.weight, rounding)
        return product(x, weight.to(x.dtype))


class Pass(NamedTuple):
    """What one forward hands to every block.

    x0: the embedding stream (B, T, D); rotary: cosines and sines; documents: of the rows, if they
    are masked; values: what a layer adds to its values (B, T, K D), by layer; rounding: the codes
    that matrices are rounded to, if any.
    """

    x0: Tensor
    rotary: tuple[Tensor, Tensor]
    documents: Documents | None
    values: Mapping[int, Tensor]
    rounding: AsCodes | None


class Attention(nn.Module):
    """Causal attention with grouped heads, normalised queries and keys, q-gain and optional XSA."""

    def __init__(self, cfg: Config, layer: int, backend: Backend):
        super().__init__()
        self.head_dim, self.backend, self.layer = cfg.model_dim // cfg.num_heads, backend, layer
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n
        self.q = Linear(cfg.model_dim, cfg.model_dim)
        self.k = Linear(cfg.model_dim, self.head_dim * cfg.num_kv_heads)
        self.v = Linear(cfg.model_dim, self.head_dim * cfg.num_kv_heads)
        self.out = Linear(cfg.model_dim, cfg.model_dim)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))

    def forward(self, x: Tensor, here: Pass) -> Tensor:
        q, k, v = (m(x, here.rounding) for m in (self.q, self.k, self.v))
        if self.layer in here.values:
            v = v + here.values[self.layer]
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in (q, k, v))
        q, k = self.backend.norm_rotate(q, k, self.q_gain, here.rotary)  # (B, T, H or K, D)
        y = self.backend.attention(q, k, v, here.documents)
        if self.exclusive:
            y = self.backend.exclude_self(y, v)
        return self.out(y.flatten(-2), here.rounding)


class MLP(nn.Module):
    """Up, LeakyReLU squared, down."""

    def __init__(self, cfg: Config, backend: Backend):
        super().__init__()
        self.up = Linear(cfg.model_dim, cfg.mlp_hidden)
        self.down = Linear(cfg.mlp_hidden, cfg.model_dim)
        self.product = functools.partial(backend.mlp_up, slope=cfg.leaky_relu_slope)

    def forward(self, x: Tensor, here: Pass) -> Tensor:
        return self.down(self.up(x, here.rounding, self.product), here.rounding)


Streams = Tensor | tuple[Tensor, Tensor]  # one residual stream, or two lanes


class Block(nn.Module):
    """One layer: attention and MLP in one of the forms of `Visit`, with learned channel scales.

    `resid_mix` mixes the running stream and the embedding stream x0 at the entry. The norm scale
    1/sqrt(layer + 1) takes the physical layer, also on repeated visits.
    """

    def __init__(self, cfg: Config, layer: int, backend: Backend):
        super().__init__()
        self.attn, self.mlp = Attention(cfg, layer, backend), MLP(cfg, backend)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        mix = torch.stack([torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim)])
        self.resid_mix = nn.Parameter(mix)
        self.norm_scale = 1 / math.sqrt(layer + 1)

    def forward(self, streams: Streams, visit: Visit, here: Pass) -> Streams:
        """Streams (B, T, D) after this visit; the form "lanes" reads and moves two of them."""
        x, lane = streams if visit.form == "lanes" else (streams, None)
        vectors = self.attn_scale, self.mlp_scale, self.resid_mix
        attn_scale, mlp_scale, mix = (p.to(x.dtype) for p in vectors)
        x = mix[0] * x + mix[1] * here.x0
        mid = x + attn_scale * self.attn(rms_norm(x) * self.norm_scale, here)
        source = {"sequential": mid, "gptj": x, "lanes": lane}[visit.form]
        update = mlp_scale * self.mlp(rms_norm(source) * self.norm_scale, here)
        return (mid, lane + update) if visit.form == "lanes" else mid + update


class BigramHash(nn.Module):
    """A table row for each pair of neighbouring tokens, found by a hash; the last row: no pair."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(cfg.bigram_vocab_size, cfg.bigram_dim))
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, tokens: Tensor, dtype: torch.dtype, *, masked: bool = False) -> Tensor:
        last, now = len(self.table) - 1, tokens.int()
        rows = torch.bitwise_xor(36313 * now[:, 1:], 27191 * now[:, :-1]) % last
        rows = F.pad(rows, (1, 0), value=last)  # the first token has no neighbour
        if masked:
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
        scales = self.layer_scales.to(dtype)
        return {layer: scales[i] * shared for i, layer in enumerate(self.layers)}


class GPT(nn.Module):
    """The model. `head` is tied: its rows embed the tokens. rows: of the table, by tensor."""

    def __init__(self, cfg: Config, backend: Backend = EAGER):
        super().__init__()
        self.cfg, self.backend = cfg, backend
        self.head = Linear(cfg.model_dim, cfg.vocab_size)
        self.blocks = nn.ModuleList(Block(cfg, layer, backend) for layer in range(cfg.num_layers))
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
        table = tensor_table(cfg)
        self.rows = {name: find_row(name, table) for name, _ in self.named_parameters()}
        smallest = 1 / (2 ** (cfg.matrix_bits - 1) - 1)
        self.rounding = AsCodes(cfg.matrix_bits, percentiles=QAT_PERCENTILES, smallest=smallest)

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
        x, extra = self.embed(tokens, masked=plan.masked), self.value_embedding
        here = Pass(
            x0=x,
            rotary=rotary_table(tokens.shape[1], self.cfg, tokens.device),
            documents=find_documents(tokens) if plan.masked else None,
            values={} if extra is None else extra(tokens, x.dtype),
            rounding=self.rounding if plan.rounded else None,
        )
        lane, skips = None, []
        for visit in plan.visits:
            if visit.pop >= 0:
                x = self.mix_skip(x, skips.pop(), visit.pop)
            block = self.blocks[visit.layer]
            if visit.form == "lanes":
                x, lane = block((x, x if lane is None else lane), visit, here)
            else:
                x = block(x, visit, here)
            if visit.push:
                skips.append(x)
        if lane is not None:
            x = self.lane_merge.to(x.dtype) * x + (1 - self.lane_merge).to(x.dtype) * lane
        if tail is not None:
            x, targets = x[:, -tail:], None if targets is None else targets[:, -tail:]
        cap, logits = self.cfg.logit_softcap, self.head(rms_norm(x))
        if targets is None:
            return softcap(logits, cap)
        rows = logits.flatten(0, 1), targets.flatten()
        losses = self.backend.cross_entropy(*rows, cap, reduction)
        return losses if reduction == "mean" else losses.view_as(targets)

    def embed(self, tokens: Tensor, *, masked: bool = False) -> Tensor:
        """The input stream (B, T, D); masked: a document's first token has none before it."""
        x = F.embedding(tokens, self.head.weight).to(self.backend.dtype)
        if self.bigram is not None:
            x = x + self.bigram(tokens, x.dtype, masked=masked)
        x = rms_norm(x)
        if self.cfg.smear_gate_enabled:
            gate = self.smear_gate.sigmoid().to(x.dtype)
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
            if masked:
                before = before.masked_fill((tokens == BOS)[..., None], 0)
            x = (1 - gate) * x + gate * before
        return x

    def mix_skip(self, x: Tensor, skip: Tensor, row: int) -> Tensor:
        """A stream with a skip in it, gated or added."""
        skip = self.skip_weights[row].to(x.dtype) * skip
        if not self.cfg.skip_gates_enabled:
            return x + skip
        gate = self.skip_gates[row].sigmoid().to(x.dtype)
        return gate * x + (1 - gate) * skip

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the matrices: normal embedding, zero output projections, the rest orthogonal."""
        draw, cfg = torch.Generator().manual_seed(seed), self.cfg
        gain = (2 * cfg.num_layers) ** -0.5 if cfg.scaled_projections else 1.0
        nn.init.normal_(self.head.weight, std=cfg.tied_embed_init_std, generator=draw)
        for block in self.blocks:
            for module in (block.attn.q, block.attn.k, block.attn.v, block.mlp.up):
                nn.init.orthogonal_(module.weight, generator=draw)
            nn.init.zeros_(block.attn.out.weight)
            nn.init.zeros_(block.mlp.down.weight)
        if self.bigram is not None:  # its table is zero: a zero projection too would never learn
            nn.init.orthogonal_(self.bigram.proj.weight, gain, generator=draw)
        if self.value_embedding is not None:
            nn.init.normal_(self.value_embedding.table, std=0.01, generator=draw)
            nn.init.orthogonal_(self.value_embedding.proj.weight, gain, generator=draw)

    def flops_per_token(self, plan: DepthPlan, length: int) -> float:
        """Operations of a forward and backward per token: 6 per weight, causal attention."""
        blocks = [[m for m in b.modules() if isinstance(m, Linear)] for b in self.blocks]
        visited = [m for v in plan.visits for m in blocks[v.layer]]
        weights = sum(m.weight.numel() for m in (*visited, self.head))
        return 6.0 * weights + 6.0 * length * self.cfg.model_dim * len(plan.visits)


# ---------------------------------------------------------------------------------------------
# 7  Optimizer
# Muon for matrices, AdamW for the rest; one way to add up gradients, to sum and to clip them. The
# same classes serve one rank and many.
# ---------------------------------------------------------------------------------------------


def parameter_groups(model: GPT) -> dict[str, list[nn.Parameter]]:
    """The parameters of each optimizer group, in the model's order."""
    groups = {"matrix": [], "embedding": [], "scalar": []}
    for name, parameter in model.named_parameters():
        groups[model.rows[name].group].append(parameter)
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


class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz, with decoupled weight decay.

    Matrices of one shape travel and are orthogonalised as one batch. Each rank receives the sum of
    its share of the gradients, keeps the momentum of that share only, and sends its updates to the
    others. Source: Jordan et al. 2024, Muon; MUON_ROW_NORMALIZE is MuonEq-R (pull request #1217 of
    openai/parameter-golf).
    """

    def __init__(self, params: Iterable[nn.Parameter], rt: Runtime, cfg: Config):
        options = dict(lr=cfg.matrix_lr, momentum=cfg.muon_momentum, weight_decay=cfg.muon_wd)
        super().__init__(params, options)
        self.rt, self.cfg, self.orthogonalize = rt, cfg, rt.compile(newton_schulz)
        by_shape = collections.defaultdict(list)
        for parameter in self.param_groups[0]["params"]:
            by_shape[parameter.shape].append(parameter)
        # The largest first: only the message of the last batch is not overlapped.
        self.batches = sorted(by_shape.values(), key=lambda p: -len(p) * p[0].numel())

    def reduce(self) -> Callable[[], None]:
        """Start adding the gradients over the ranks; the function that comes back waits.

        Then a parameter of this rank's share has the sum, and any other has no gradient.
        """
        arrive = self.rt.start_sum_parts([[p.grad for p in params] for params in self.batches])

        def finish() -> None:
            for params, sums in zip(self.batches, arrive(), strict=True):
                for parameter in params:
                    parameter.grad = None
                mine = params[self.rt.share(len(params))]
                for parameter, total in zip(mine, sums, strict=True):
                    parameter.grad = total

        return finish

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters in place, by the gradients of this rank's share and the others'.

        The updates of one shape travel while those of the next are computed; in the type of the
        activations, as Newton-Schulz made them: sending float32 would double the bytes for nothing.
        """
        (group,) = self.param_groups
        updates = (self.orthogonal_update(params, group["momentum"]) for params in self.batches)
        coming = [self.rt.start_gather(update) for update in updates]
        for params, arrive in zip(self.batches, coming, strict=True):
            update = arrive()[: len(params)].to(params[0].dtype)
            rows, cols = params[0].shape
            scale = math.sqrt(max(1.0, rows / cols))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * scale)

    def orthogonal_update(self, params: list[nn.Parameter], momentum: float) -> Tensor:
        """(share, rows, cols): the updates of this rank's share, padded to the largest by zeros."""
        mine, largest = params[self.rt.share(len(params))], self.rt.share(len(params), rank=0).stop
        grads = torch.zeros((largest, *params[0].shape), device=params[0].device)
        if mine:
            torch.stack([p.grad for p in mine], out=grads[: len(mine)])
        state = self.state[params[0]]
        if not state:
            state["momentum"] = torch.zeros_like(grads)
        average = state["momentum"].mul_(momentum).add_(grads)
        update = grads.add_(average, alpha=momentum)  # Nesterov
        if self.cfg.muon_row_normalize:
            update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        return self.orthogonalize(update, self.cfg.muon_backend_steps, self.rt.compute_dtype)


def make_optimizers(model: GPT, cfg: Config, rt: Runtime) -> dict[str, Optimizer]:
    """Fresh optimizers by group name. Their learning rates are set at every step."""
    groups, options = parameter_groups(model), dict(eps=cfg.adam_eps, fused=True)
    adam = functools.partial(torch.optim.AdamW, betas=(cfg.beta1, cfg.beta2), **options)
    return {
        "matrix": Muon(groups["matrix"], rt, cfg),
        "embedding": adam(groups["embedding"], lr=cfg.tied_embed_lr, weight_decay=cfg.embed_wd),
        "scalar": adam(groups["scalar"], lr=cfg.scalar_lr, weight_decay=cfg.adam_wd),
    }


def lr_scale(frac: float, cfg: Config, step: int = 0) -> float:
    """Learning-rate multiplier at a fraction of training: 1, then a line to 0, never below MIN_LR.

    The line takes the last WARMDOWN_FRAC, or the last WARMDOWN_ITERS steps at the speed so far:
    `step` steps, at least one, in a fraction `frac` leave step (1 - frac) / frac.
    """
    if cfg.warmdown_iters:
        scale = max(step, 1) * (1 - frac) / frac / cfg.warmdown_iters if frac else 1.0
    else:
        scale = (1 - frac) / cfg.warmdown_frac if cfg.warmdown_frac else 1.0
    return max(min(scale, 1.0), cfg.min_lr)


def muon_momentum(step: int, cfg: Config) -> float:
    """Muon's momentum: a line over the first steps, then constant."""
    steps = cfg.muon_momentum_warmup_steps
    done = min(step / steps, 1.0) if steps else 1.0
    return (1 - done) * cfg.muon_momentum_warmup_start + done * cfg.muon_momentum


def set_schedule(
    optimizers: Mapping[str, Optimizer], step: int, frac: float, cfg: Config
) -> dict[str, float]:
    """Set the learning rates and Muon's momentum of a step; returns the rates by group."""
    scale = lr_scale(frac, cfg, step)
    rates = dict(matrix=cfg.matrix_lr, embedding=cfg.tied_embed_lr, scalar=cfg.scalar_lr)
    rates = {name: rate * scale for name, rate in rates.items()}
    for name, optimizer in optimizers.items():
        optimizer.param_groups[0]["lr"] = rates[name]
    optimizers["matrix"].param_groups[0]["momentum"] = muon_momentum(step, cfg)
    return rates


def add_gradients(forward: Callable, windows: Tensor, micro_rows: int, rows: int) -> Tensor:
    """Add to the gradients those of the mean loss over `rows` windows of all ranks.

    Args:
        forward: the model, its depth plan bound.
        windows: this rank's, (n, T + 1); micro_rows of them per forward.
    Returns: this rank's part of the mean loss, a scalar tensor; all ranks' parts add up to it.
    """
    total = torch.zeros((), device=windows.device)
    for micro in windows.split(micro_rows):
        if len(micro):  # a rank may have none
            loss = forward(*inputs_and_targets(micro)) * (len(micro) / rows)
            loss.backward()
            total += loss.detach()
    return total


def apply_gradients(
    model: nn.Module, optimizers: Iterable[Optimizer], clip_norm: float, rt: Runtime
) -> None:
    """Add the gradients of all ranks, clip their global norm (0: not), step, drop them.

    A compiled backward hands out all gradients at its end: nothing could leave earlier. Muon takes
    shares of the sums: 255 MB sent by each of 8 ranks, not 402 (records/profile.md).
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


# ---------------------------------------------------------------------------------------------
# 8  Training
# Steps until the wall clock or ITERATIONS ends them. The clock is read once per step and agreed on
# by all ranks, so learning rates, the stage of a step and the end are the same everywhere.
# ---------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A change of training that begins once and stays.

    It is due at a fraction of training or at a step, or once the learning-rate multiplier is below.
    """

    name: str
    unit: str  # "frac", "step" or "scale"
    at: float

    def due(self, now: Mapping[str, float]) -> bool:
        return now["scale"] < self.at if self.unit == "scale" else now[self.unit] >= self.at


class Stage(NamedTuple):
    """How a step runs once these changes have begun: its depth plan and its sequences [tokens]."""

    begun: tuple[Change, ...]
    plan: DepthPlan
    seq_len: int


def stages(cfg: Config) -> tuple[Stage, ...]:
    """The table of training: every way in which a step may run, the first one first.

    Which of two changes begins earlier may depend on the machine's speed, so there is a row for
    each set of them.
    """
    at_step = cfg.enable_looping_at_step
    loop = Change("layer_loop", "frac", cfg.enable_looping_at)
    loop = loop._replace(unit="step", at=at_step) if at_step else loop
    rounding = Change("late_qat", "scale", cfg.late_qat_threshold)
    changes = [loop] * bool(cfg.num_loops) + [rounding] * bool(cfg.late_qat_threshold)
    counts = range(len(changes) + 1)
    sets = [begun for count in counts for begun in itertools.combinations(changes, count)]

    def plan(begun: Sequence[Change]) -> DepthPlan:
        changes = dict(rounded=rounding in begun, masked=cfg.doc_masking)
        return depth_plan(cfg, looped=loop in begun)._replace(**changes)

    return tuple(Stage(begun, plan(begun), cfg.train_seq_len) for begun in sets)


def stage_at(table: Sequence[Stage], since: Stage, now: Mapping[str, float]) -> Stage:
    """The row of a step: the last whose changes are due, or have begun in the row before.

    now: frac, step and scale.
    """
    rows = reversed(table)
    return next(r for r in rows if all(c in since.begun or c.due(now) for c in r.begun))


class Ema:
    """Exponential moving average (EMA) of every parameter, in float32, updated in place.

    Source: Polyak and Juditsky 1992, averaging of iterates.
    """

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
            used = " ".join(f"{name}={rate:.3g}" for name, rate in rates.items())
            raise DivergenceError(
                f"step {step}: the training loss is not finite; last finite loss on this rank "
                f"{self.last_finite:.4f}; learning rates {used}; lower MATRIX_LR, TIED_EMBED_LR or "
                "SCALAR_LR"
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
    """Fraction of training done: of the steps or of the time, whichever will end it."""
    return max(step / cfg.iterations, seconds / cfg.train_seconds)


def train_step(
    model: GPT, windows: Tensor, optimizers: Mapping, cfg: Config, rt: Runtime, *, plan: DepthPlan
) -> Tensor:
    """One optimizer step on this rank's windows (rows, T + 1).

    Returns: this rank's part of the mean loss, a scalar tensor; all ranks' parts add up to it.
    Changes the model and the optimizers in place.
    """
    forward, rows = functools.partial(model, plan=plan), len(windows) * rt.world_size
    loss = add_gradients(forward, windows, cfg.micro_rows(rt.world_size), rows)
    apply_gradients(model, optimizers.values(), cfg.grad_clip_norm, rt)
    return loss


def warm_up(model: GPT, loader: Loader, cfg: Config, rt: Runtime) -> None:
    """Run real steps of every stage, so that all is compiled before the clock, then undo them.

    It leaves no trace: the weights are put back, the optimizers are its own, the loader has no
    state, and the random state is restored.
    """
    weights = copy.deepcopy(model.state_dict())
    with torch.random.fork_rng():
        for stage in stages(cfg):
            optimizers = make_optimizers(model, cfg, rt)
            name = "_".join([*(change.name for change in stage.begun), "warmup_step"])
            show = rt.log.progress(name)
            with contextlib.closing(loader.batches(rt, cfg.train_rows)) as batches:
                for step in range(cfg.warmup_steps):
                    set_schedule(optimizers, step, 0.0, cfg)
                    train_step(model, next(batches), optimizers, cfg, rt, plan=stage.plan)
                    show((step + 1) / cfg.warmup_steps)
            model.load_state_dict(weights)
            rt.log.line(f"{name}: {cfg.warmup_steps}/{cfg.warmup_steps}")


class StepLog:
    """Writes the training lines: loss, time, throughput, and model-FLOP utilisation.

    Attributes: curve, the losses that were logged; durations, seconds of each step by depth plan;
    waited, seconds from the start of Runtime to the first step.
    """

    def __init__(self, model: GPT, cfg: Config, rt: Runtime):
        self.model, self.cfg, self.rt = model, cfg, rt
        self.show, self.curve = rt.log.progress("train"), []
        self.durations, self.begun = collections.defaultdict(list), None
        self.compiled, self.waited = rt.compilations(), time.perf_counter() - rt.created
        rt.log.line(f"time_to_first_step: {self.waited:.1f}s")

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
        self.rt.log.line(line)

    def utilisation(self, plan: DepthPlan, step_seconds: float) -> str:
        """Model-FLOP utilisation of a device, or its speed where its peak is not known."""
        tokens = self.cfg.train_batch_tokens / self.rt.world_size
        work = tokens * self.model.flops_per_token(plan, self.cfg.train_seq_len)
        speed, peak = work / step_seconds, self.rt.peak_flops()
        return f"mfu: {speed / peak:.3f}" if peak else f"tflops: {speed / 1e12:.3f}"

    def close(self) -> None:
        """Say what was compiled too late and how long the steps took; keep the facts."""
        compiled = self.rt.compilations() - self.compiled
        self.rt.log.line(f"compilations after the clock started: {compiled}")
        medians = {
            f"{len(plan.visits)}_visits{'_rounded' * plan.rounded}": round(1e3 * np.median(s), 3)
            for plan, s in self.durations.items()
        }
        pairs = (f"{key}:{value}" for key, value in medians.items())
        self.rt.log.line(" ".join(["step_ms", *pairs]))
        facts = dict(curve=self.curve, step_ms=medians, compilations_after_start=compiled)
        self.rt.log.put(**facts, time_to_first_step_seconds=round(self.waited, 3))


def train(model: GPT, loader: Loader, validate: Callable, cfg: Config, rt: Runtime) -> Trained:
    """Train the model in place and leave the average of its weights in it.

    Args:
        validate: called every VAL_LOSS_EVERY steps with a line prefix and the plan of the step that
            follows, never masked; it opens a phase of its own, so training's clock stands still.
    Raises: DivergenceError on all ranks once the loss of any is not finite.
    """
    table, step, watch, rates = stages(cfg), 0, LossWatch(), {}
    stage, optimizers, ema = table[0], make_optimizers(model, cfg, rt), Ema(model, cfg.ema_decay)
    report, batches = StepLog(model, cfg, rt), loader.batches(rt, cfg.train_rows)
    with contextlib.closing(batches), rt.budget.phase("train"):
        while True:
            seconds, bad = rt.agree_max(rt.budget.total("train"), watch.bad)
            watch.check(bad, step - 1, rates)
            frac = training_frac(step, seconds, cfg)
            if frac >= 1:
                report.begin(seconds, stage.plan)
                break
            now = dict(step=step, frac=frac, scale=lr_scale(frac, cfg, step))
            stage, since = stage_at(table, stage, now), stage
            for change in (c for c in stage.begun if c not in since.begun):
                rt.log.line(f"{change.name}:enabled step:{step} frac:{frac:.3f} {stage.plan}")
            if cfg.val_loss_every and step and step % cfg.val_loss_every == 0:
                with report.off_the_clock():
                    validate(stage.plan._replace(masked=False), f"{step}/{cfg.iterations}")
            report.begin(seconds, stage.plan)
            rates = set_schedule(optimizers, step, frac, cfg)
            loss = train_step(model, next(batches), optimizers, cfg, rt, plan=stage.plan)
            ema.update()
            step += 1
            watch.push(loss)
            report.end(step, frac, loss)
        watch.push(None)
        watch.check(rt.agree_max(watch.bad)[0], step, rates)
        ema.store()
    report.close()
    if step < cfg.iterations:
        done = f"train_time: {seconds * 1e3:.0f}ms step: {step}/{cfg.iterations}"
        rt.log.line(f"stopping_early: wallclock_cap {done}")
    return Trained(step, any(change.name == "layer_loop" for change in stage.begun))


def freeze(model: GPT, blocks: int, *, embeddings: bool) -> None:
    """Keep the first blocks, and perhaps the embeddings, as they are in what follows.

    Of the value embedding the scales of each layer still train, as in system #578.
    """
    for block in model.blocks[:blocks]:
        block.requires_grad_(False)
    if embeddings:
        for name, parameter in model.named_parameters():
            if re.match(r"(head|bigram|value_embedding)\.(?!layer_scales)", name):
                parameter.requires_grad_(False)


def whole_rows(text: np.ndarray, length: int) -> np.ndarray:
    """A text (n + 1,) as rows (n // length, length + 1) side by side; each row's target follows."""
    starts = np.arange((len(text) - 1) // length)[:, None] * length
    return text[starts + np.arange(length + 1)]


def text_step(
    model: GPT,
    rows: np.ndarray,
    optimizer: Optimizer,
    cfg: Config,
    rt: Runtime,
    *,
    plan: DepthPlan,
    clip_norm: float,
) -> Tensor:
    """One optimizer step on rows of text (n, T + 1), which the ranks share; returns the mean loss.

    A rank without any still takes part in the sums. Changes the model and the optimizer in place.
    """
    mine, forward = rt.to_device(rows[rt.share(len(rows))]), functools.partial(model, plan=plan)
    micro_rows = max(cfg.micro_batch_tokens // cfg.eval_seq_len, 1)
    loss = add_gradients(forward, mine, micro_rows, len(rows))
    apply_gradients(model, [optimizer], clip_norm, rt)
    rt.sum_(loss)
    return loss


def fine_tune_on_validation(
    model: GPT, val: ValidationTokens, cfg: Config, rt: Runtime, *, plan: DepthPlan
) -> None:
    """Train on the text that will be scored, as system #1487 did; its result can never be a record.

    AdamW, cosine over the epochs down to a tenth, first blocks frozen. Changes the model in place.
    """
    text, epochs = whole_rows(val.tokens, cfg.eval_seq_len), cfg.prequant_ttt_epochs
    size = max(cfg.prequant_ttt_batch_tokens // cfg.eval_seq_len, 1)
    freeze(model, cfg.prequant_ttt_freeze_blocks, embeddings=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    step = functools.partial(text_step, plan=plan, clip_norm=1.0)
    for epoch in range(epochs):
        floor = 0.1 * cfg.prequant_ttt_lr
        swing = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        optimizer.param_groups[0]["lr"] = floor + (cfg.prequant_ttt_lr - floor) * swing
        losses, begun, show = [], time.perf_counter(), rt.log.progress("prequant_ttt")
        for first in range(0, len(text), size):
            rows = text[first : first + size]
            losses.append(step(model, rows, optimizer, cfg, rt) * len(rows))
            show(min(first + size, len(text)) / len(text))
        loss, seconds = float(torch.stack(losses).sum()) / len(text), time.perf_counter() - begun
        done = f"epoch {epoch + 1}/{epochs} loss:{loss:.4f} time:{seconds:.1f}s"
        rt.log.line(f"prequant_ttt:{done}")
    model.requires_grad_(True)


# ---------------------------------------------------------------------------------------------
# 9  Quantization
# GPTQ: round the columns of a matrix one after the other and let the later ones make up for the
# error in the outputs. Hessians come from training text, inside the training budget.
# ---------------------------------------------------------------------------------------------


GPTQ_DAMPING, GPTQ_BLOCK = 0.01, 128
FLOAT_TYPES = {"float16": "<f2", "float32": "<f4"}
# What an artifact holds, in this order, so that like values lie together: streams and their types.
STREAMS = {"codes": "i1", "scales": "<f2", **FLOAT_TYPES}


@dataclass(frozen=True)
class Codes:
    """A matrix as int8 codes (rows, cols) within `bits` and float16 scales (rows,)."""

    codes: Tensor
    scales: Tensor
    bits: int

    @property
    def kind(self) -> str:
        return f"int{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self) -> Tensor:
        """(rows, cols) float32."""
        return self.codes.float() * self.scales.float()[:, None]

    def streams(self) -> dict[str, np.ndarray]:
        """What is stored: flat arrays by stream."""
        return dict(codes=self.codes.cpu().numpy().ravel(), scales=self.scales.cpu().numpy())

    def entropy_bits(self) -> float:
        """What a coder needs that knows how often each code occurs, scales included."""
        counts = np.bincount(self.codes.cpu().numpy().ravel().astype(np.int16) + 128)
        shares = counts[counts > 0] / counts.sum()
        return -(shares * np.log2(shares)).sum() * self.codes.numel() + 16 * self.scales.numel()

    @staticmethod
    def layout(kind: str, shape: Sequence[int]) -> dict[str, int]:
        """Number of values in each stream. Raises ValueError for another shape."""
        if len(shape) != 2:
            raise ValueError(f"{kind} of shape {shape}")
        return dict(codes=math.prod(shape), scales=shape[0])

    @classmethod
    def read(cls, kind: str, shape: Sequence[int], streams: Mapping[str, np.ndarray]) -> Codes:
        """Undo `streams`. Raises ValueError for codes out of range or non-finite scales."""
        codes, scales, bits = streams["codes"], streams["scales"], int(kind[3:])
        if np.abs(codes.astype(np.int16)).max(initial=0) >= 2 ** (bits - 1):
            raise ValueError(f"codes beyond {kind}")
        if not np.isfinite(scales).all():
            raise ValueError("non-finite scales")
        return cls(torch.from_numpy(codes.reshape(shape)), torch.from_numpy(scales), bits)


@dataclass(frozen=True)
class Floats:
    """A tensor as float16 or float32 values, of any shape."""

    values: Tensor

    @property
    def kind(self) -> str:
        return str(self.values.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dequantize(self) -> Tensor:
        """The same shape, float32."""
        return self.values.float()

    def streams(self) -> dict[str, np.ndarray]:
        """What is stored: flat arrays by stream."""
        return {self.kind: self.values.cpu().numpy().ravel()}

    def entropy_bits(self) -> float:
        """Floats are taken to need all their bits."""
        return 8.0 * self.values.numel() * self.values.element_size()

    @staticmethod
    def layout(kind: str, shape: Sequence[int]) -> dict[str, int]:
        """Number of values in each stream."""
        return {kind: math.prod(shape)}

    @classmethod
    def read(cls, kind: str, shape: Sequence[int], streams: Mapping[str, np.ndarray]) -> Floats:
        """Undo `streams`. Raises ValueError for non-finite values."""
        if not np.isfinite(streams[kind]).all():
            raise ValueError("non-finite values")
        return cls(torch.from_numpy(streams[kind].reshape(shape)))


Hessians = Mapping[str, Tensor]  # (inputs, inputs) by the tensor's name
Quantized = dict[str, Codes | Floats]  # by the tensor's name


@torch.no_grad()
def collect_hessians(
    model: GPT, loader: Loader, cfg: Config, rt: Runtime, *, plan: DepthPlan, first: int = 0
) -> dict[str, Tensor]:
    """Mean of x x^T over the inputs x of each matrix that GPTQ stores, by the tensor's name.

    Args:
        plan: a layer that it visits more than once adds up its visits.
        first: training window with which calibration begins; the ranks share the windows.
    Returns: (inputs, inputs) float32 each.
    The head's inputs are the outputs of the final norm: the Hessian of the tied embedding is taken
    where it is read as a head. Ends early, on all ranks, if the training budget would be exceeded.
    """
    sums, counts = {}, {}

    def tap(name: str, module: Linear) -> Any:
        width = module.in_features
        sums[name], counts[name] = torch.zeros(width, width, device=rt.device), 0

        def hook(module: Linear, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name].addmm_(x.T, x)
            counts[name] += len(x)

        return module.register_forward_pre_hook(hook)

    linears = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Linear)}
    taps = [tap(name, m) for name, m in linears.items() if model.rows[name].store.gptq]
    most = max(cfg.micro_batch_tokens // cfg.train_seq_len, 1)
    batches = loader.batches(rt, max(cfg.train_rows // 8, 1), first)
    pace, total = Pace(rt, Budget.TRAINING, cfg.max_wallclock_seconds), cfg.gptq_calibration_batches
    show = rt.log.progress("calibration")
    with contextlib.closing(batches):
        for done in range(total):
            if done and pace.late(batch=1):
                rt.log.line(f"GPTQ:calibration stopped by the budget after {done}/{total} batches")
                break
            with pace.piece("batch"):
                for micro in next(batches).split(most):
                    if len(micro):  # more ranks than windows
                        model.forward(micro[:, :-1], plan=plan)  # hooks need the eager one
                rt.synchronize()
            show((done + 1) / total)
    for handle in taps:
        handle.remove()
    for name, hessian in sums.items():
        count = torch.tensor(float(counts[name]), device=rt.device)
        rt.sum_(hessian, count)
        hessian.div_(count)
    return sums


def measure_reserve(model: GPT, loader: Loader, cfg: Config, rt: Runtime) -> Config:
    """The configuration with the time that calibration of this model will take, and a tenth more.

    Two batches tell. Half of the limit is the most that is kept.
    """
    trial = dataclasses.replace(cfg, gptq_calibration_batches=2, max_wallclock_seconds=0.0)
    begin, plan = time.perf_counter(), depth_plan(cfg, looped=True)
    collect_hessians(model, loader, trial, rt, plan=plan)
    rt.synchronize()
    needed = 1.1 * (time.perf_counter() - begin) * cfg.gptq_calibration_batches / 2
    (seconds,) = rt.agree_max(min(needed, 0.5 * cfg.max_wallclock_seconds))
    rt.log.line(f"GPTQ:reserving {seconds:.1f}s for calibration, as measured")
    rt.log.put(gptq_reserve_seconds=seconds)
    return dataclasses.replace(cfg, gptq_reserve_seconds=seconds)


def round_to_nearest(weight: Tensor, scales: Tensor, bits: int) -> Codes:
    """Codes of each entry by itself."""
    top = 2 ** (bits - 1) - 1
    codes = (weight.float() / scales.float()[:, None]).round().clamp(-top, top)
    return Codes(codes.to(torch.int8), scales, bits)


def gptq_quantize(weight: Tensor, hessian: Tensor, store: AsCodes, coarser: float = 1.0) -> Codes:
    """Round a matrix to integers so that its *outputs*, not its entries, change least.

    Args:
        weight: (rows, cols) float. Not modified.
        hessian: (cols, cols) float, mean of x x^T over calibration inputs x. Not modified.
        store: bits, scales and the order of the columns; coarser: see `AsCodes.scales`.

    Returns: codes and scales on the weight's device.
    Raises: ValueError if the shapes disagree or bits is not in 2..8.
    Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1, columns by their diagonal.
    """
    cols, top = weight.shape[1], store.top
    if hessian.shape != (cols, cols) or not 2 <= store.bits <= 8:
        raise ValueError(f"weight {tuple(weight.shape)}, hessian {tuple(hessian.shape)}, {store}")
    w, h = weight.float().clone(), hessian.float().clone()
    scales = store.scales(w, coarser).half()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=store.gptq == "descending", stable=True)
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
    return Codes(codes[:, torch.argsort(order)].to(torch.int8), scales, store.bits)


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, of a positive definite H, without forming H^-1.

    With both axes flipped the lower Cholesky factor of H becomes an upper R with H = R R^T, so U =
    R^-1.
    """
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(r, torch.eye(len(h)).to(h), upper=True)


def quantize(
    weight: Tensor, store: AsCodes | AsFloats, hessian: Tensor | None, coarser: float = 1.0
) -> Codes | Floats:
    """Store a tensor as its row of the table says; the Hessian is needed for GPTQ alone."""
    if isinstance(store, AsFloats):
        return Floats(weight.to(getattr(torch, store.dtype)))
    if store.gptq:
        return gptq_quantize(weight, hessian, store, coarser)
    return round_to_nearest(weight, store.scales(weight, coarser).half(), store.bits)


def quantize_model(model: GPT, hessians: Hessians, rt: Runtime, coarser: float = 1.0) -> Quantized:
    """Every tensor as its row of the table says, by name.

    coarser: multiplies ranges of the sigma rule; entropy falls by log2 of it, bits per code.
    """
    weights, show = dict(model.named_parameters()), rt.log.progress("quantization")
    stored = {}
    for done, (name, weight) in enumerate(weights.items()):
        store = model.rows[name].store
        stored[name] = quantize(weight.detach(), store, hessians.get(name), coarser)
        show((done + 1) / len(weights))
    return stored


def prune_ones(tensors: Quantized, bits: int, count: int) -> int:
    """Zero up to `count` codes of +-1, those of the smallest scales first, in place.

    Only tensors of this width; returns how many codes were zeroed.
    """
    rows = [
        (float(scale), tensor.codes[i])
        for tensor in tensors.values()
        if isinstance(tensor, Codes) and tensor.bits == bits
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
# 10  Artifact
# Bytes on disk and back: a frame (magic, version, CRC of everything), a JSON header in the clear,
# then one compressed payload of raw streams. No pickle; equal weights give equal bytes; everything
# is checked before any of it is used.
# ---------------------------------------------------------------------------------------------


ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGLM", 2
FRAME = struct.Struct("<4sBII")  # magic, version, bytes of the header, CRC-32 of all but itself
LARGEST_RAW_BYTES, TENSOR_BYTES = 1 << 30, 1 << 14  # of all tensors; for each, beside its values
KINDS = {f"int{bits}": Codes for bits in range(2, 9)} | dict.fromkeys(FLOAT_TYPES, Floats)
DAMAGED = "it is damaged or cut off; copy it again"
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
        found = f"the package {package} does not import ({error})"
        remedy = "install requirements.txt or choose another compressor"
        raise ConfigError(f"COMPRESSOR={compressor}: {found}; {remedy}") from error


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
    """Undo `compress`, never making much more than `raw_bytes` bytes.

    Raises: ArtifactError if the data is not such a stream of `raw_bytes` bytes.
    """
    module, raw, whole = codec(compressor), data, True
    try:
        if compressor == "brotli":
            raw = module.Decompressor().process(data, output_buffer_limit=raw_bytes + 1)
        elif compressor == "zstd":
            # The package would allocate a size that the stream declares, whatever the limit.
            whole = module.frame_content_size(data) == -1
            limits = dict(max_output_size=raw_bytes, allow_extra_data=False)
            raw = module.ZstdDecompressor().decompress(data, **limits) if whole else b""
        elif compressor == "lzma":
            reader = module.LZMADecompressor(module.FORMAT_RAW, filters=LZMA_FILTERS)
            raw = reader.decompress(data, raw_bytes + 1)
            whole = reader.eof and not reader.unused_data
    except getattr(module, COMPRESSORS[compressor][1]) as error:
        raise ArtifactError(f"artifact: not {compressor} data ({error}); {DAMAGED}") from error
    if not whole or len(raw) != raw_bytes:
        raise ArtifactError(f"artifact: {len(raw):,} raw bytes, expected {raw_bytes:,}; {DAMAGED}")
    return raw


def planes(values: np.ndarray) -> bytes:
    """Bytes of an array, all lowest bytes first, then all next ones: alike bytes lie together."""
    return values.ravel().view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def unplanes(data: bytes, dtype: str) -> np.ndarray:
    """Undo `planes`: a flat array."""
    size = np.dtype(dtype).itemsize
    return np.frombuffer(data, np.uint8).reshape(size, -1).T.copy().view(dtype).ravel()


def fold(table: Mapping[str, list]) -> dict[str, list]:
    """A table of tensors {name: [kind, shape]} with one entry for what all blocks share.

    ``blocks.*.attn.q.weight: [kind, shape, 11]`` stands for those of blocks 0 to 10.
    """
    groups, folded = collections.defaultdict(dict), {}
    for name, entry in table.items():
        groups[re.sub(r"\.\d+\.", ".*.", name)][name] = entry
    for pattern, members in groups.items():
        shared = [*next(iter(members.values())), len(members)]
        alike = len(members) > 1 and unfold({pattern: shared}) == members
        folded |= {pattern: shared} if alike else members
    return folded


def unfold(folded: Mapping[str, list]) -> dict[str, list]:
    """Undo `fold`, but for the order, which is that of the stored streams."""
    table = {}
    for pattern, (kind, shape, *count) in folded.items():
        for number in range(*(count or [1])):
            table[pattern.replace("*", str(number))] = [kind, shape]
    return table


def pack(tensors: Quantized, header: Mapping[str, Any], compressor: str) -> bytes:
    """Tensors and facts to the bytes of an artifact; the same input gives the same bytes.

    header: JSON values, among them the model settings; compressor and tensors are added.
    """
    folded = fold({name: [stored.kind, list(stored.shape)] for name, stored in tensors.items()})
    streams = collections.defaultdict(list)
    for name in unfold(folded):
        for label, values in tensors[name].streams().items():
            streams[label].append(values)
    raw = b"".join(planes(np.concatenate(streams[s])) for s in STREAMS if s in streams)
    text = header_text({**header, "compressor": compressor, "tensors": folded})
    rest = text + compress(raw, compressor)
    frame = FRAME.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(text), 0)
    return FRAME.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(text), zlib.crc32(frame + rest)) + rest


def header_text(header: Mapping[str, Any]) -> bytes:
    """The only form in which a header may stand in an artifact."""
    return json.dumps(header, separators=(",", ":")).encode()


def read_header(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of an artifact, as it stands there, and the compressed streams.

    Raises: ArtifactError for anything but an artifact of this version whose checksum is right.
    """
    if len(blob) < FRAME.size or blob[:4] != ARTIFACT_MAGIC:
        begin = f"{len(blob):,} bytes, begins with {blob[:4]!r}"
        raise ArtifactError(f"not an artifact file ({begin}); give the file that a run wrote")
    magic, version, text_bytes, crc = FRAME.unpack_from(blob)
    if version != ARTIFACT_VERSION:
        expected = f"expected {ARTIFACT_VERSION}; use the program that wrote it"
        raise ArtifactError(f"artifact: version {version}, {expected}")
    rest = blob[FRAME.size :]
    if zlib.crc32(FRAME.pack(magic, version, text_bytes, 0) + rest) != crc:
        raise ArtifactError(f"artifact: the checksum does not match, {DAMAGED}")
    text, payload = rest[:text_bytes], rest[text_bytes:]
    try:
        header = dict(json.loads(text))
        if header_text(header) != text:  # a name that stands twice, for instance
            raise ValueError("in another form than it is written")
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"artifact: its header is not JSON ({error}); {DAMAGED}") from error
    return header, payload


def tensor_layouts(header: Mapping[str, Any]) -> dict[str, tuple[str, list, dict]]:
    """Kind, shape and streams of each tensor that a header names, in stored order.

    Raises: ArtifactError unless all are well formed, named once and within LARGEST_RAW_BYTES
    together; a tensor counts for its values and TENSOR_BYTES.
    """
    found, names, total = {}, 0, 0
    try:
        for pattern, (kind, shape, *count) in header["tensors"].items():
            sizes = [*shape, *count]
            short = type(shape) is list and len(shape) <= 8 and len(count) <= 1
            if not short or not all(type(n) is int and 0 <= n <= LARGEST_RAW_BYTES for n in sizes):
                raise ValueError(f"tensor {pattern}: {kind} of shape {shape} {count}")
            layout = KINDS[kind].layout(kind, shape)
            each = TENSOR_BYTES + sum(np.dtype(STREAMS[s]).itemsize * n for s, n in layout.items())
            names, total = names + math.prod(count), total + math.prod(count) * each
            if total > LARGEST_RAW_BYTES:
                raise ValueError(f"more than {LARGEST_RAW_BYTES:,} raw bytes")
            found |= dict.fromkeys(unfold({pattern: [kind, shape, *count]}), (kind, shape, layout))
        if len(found) != names:
            raise ValueError(f"{names} tensors, {len(found)} names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"artifact: its header does not describe tensors ({error})") from error
    return found


def read_tensors(header: Mapping[str, Any], payload: bytes) -> Quantized:
    """The tensors of an artifact, from what `read_header` gave.

    Raises: ArtifactError unless header and streams agree to the last byte, codes lie in their range
    and all values are finite.
    """
    tensors, compressor = tensor_layouts(header), header.get("compressor")
    if str(compressor) not in COMPRESSORS:
        raise ArtifactError(f"artifact: compressor {compressor!r} is not known here")
    counts = {
        label: {name: layout[label] for name, (_, _, layout) in tensors.items() if label in layout}
        for label in STREAMS
    }
    sizes = [np.dtype(STREAMS[s]).itemsize * sum(counts[s].values()) for s in STREAMS]
    raw = np.frombuffer(decompress(payload, compressor, sum(sizes)), np.uint8)
    parts = collections.defaultdict(dict)
    for label, stream in zip(STREAMS, np.split(raw, np.cumsum(sizes)[:-1]), strict=True):
        ends = np.cumsum(list(counts[label].values()), dtype=np.int64)
        values = np.split(unplanes(stream, STREAMS[label]), ends[:-1])
        for name, own in zip(counts[label], values, strict=False):  # no name: one empty array
            parts[name][label] = own
    try:
        return {n: KINDS[k].read(k, shape, parts[n]) for n, (k, shape, _) in tensors.items()}
    except ValueError as error:
        raise ArtifactError(f"artifact: {error}; use the program that wrote it") from error


def unpack(blob: bytes) -> tuple[dict[str, Any], Quantized]:
    """The header and the tensors of an artifact. Raises: ArtifactError, see the parts."""
    header, payload = read_header(blob)
    return header, read_tensors(header, payload)


class Stored(NamedTuple):
    """A file of weights, opened and checked once, and the configuration with its model."""

    header: dict[str, Any]
    tensors: Quantized
    cfg: Config

    @property
    def plan(self) -> DepthPlan:
        """The wiring that the last training step ran."""
        return depth_plan(self.cfg, looped=self.header["looped"])

    def model(self, backend: Backend, rt: Runtime) -> GPT:
        """A fresh model with these weights, compiled where this run compiles."""
        model = GPT(self.cfg, backend)
        model.load_state_dict({name: t.dequantize() for name, t in self.tensors.items()})
        return rt.compile(model.to(rt.device))


def open_stored(path: str | Path, cfg: Config, rt: Runtime) -> Stored:
    """Open an artifact or a checkpoint. Everything is checked before a weight is used.

    Raises: ArtifactError if the bytes or tensors are not what they should be, ConfigError if the
    environment asks for another model; on all ranks.
    """
    blob = b""
    with rt.together():
        try:
            blob = Path(path).read_bytes() if rt.is_main else blob
        except OSError as error:
            message = f"{path}: {error.strerror}; give the file that a run wrote"
            raise ArtifactError(message) from error
    blob = rt.from_main(blob)
    with rt.together():
        header, payload = read_header(blob)
        cfg = cfg.with_model(model_settings(header, str(path)), str(path))
        with torch.device("meta"):  # shapes alone
            expected = {name: tuple(p.shape) for name, p in GPT(cfg).named_parameters()}
        found = {name: tuple(shape) for name, (_, shape, _) in tensor_layouts(header).items()}
        if found != expected:
            name, shape = sorted(found.items() ^ expected.items())[0]
            raise ArtifactError(f"{path}: tensor {name} {shape} does not belong to its model")
        return Stored(header, read_tensors(header, payload), cfg)


def model_settings(header: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The model settings of a header, checked. Raises ArtifactError if they are not ours."""
    settings = header.get("model")
    ours = {setting.name: setting for setting in knobs() if setting.metadata["model"]}
    try:
        if set(settings) != set(ours) or type(header["looped"]) is not bool:
            raise ValueError("other settings than this program's")
        return {name: parse_value(ours[name], str(value)) for name, value in settings.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        found = f"its header does not describe a model of this program ({error})"
        raise ArtifactError(f"{origin}: {found}; use the program that wrote it") from error


FIT_ATTEMPTS, FIT_SLACK = 20, 0.0002  # a search ends once this fraction of the limit is unused
TIGHTEST_SIGMAS = 4.0  # narrower ranges clip more than finer scales gain
PRUNED_CODE_BYTES = 0.25  # what a first guess saves for each code that becomes 0


def expected_bytes(cfg: Config) -> tuple[int, int]:
    """What an artifact needs at least, and what it takes if weights are Gaussian, uncompressed.

    A Gaussian row rounded to steps of s standard deviations has codes of log2(sqrt(2 pi e) / s)
    bits. At least: scales and floats, while codes can be made as coarse as need be.
    """
    with torch.device("meta"):
        model = GPT(cfg)
    least, codes = 0, 0.0
    for name, parameter in model.named_parameters():
        store = model.rows[name].store
        if isinstance(store, AsFloats):
            least += np.dtype(FLOAT_TYPES[store.dtype]).itemsize * parameter.numel()
            continue
        least += 2 * len(parameter)
        bits = float(store.bits)
        if not store.percentiles:
            bits = math.log2(math.sqrt(2 * math.pi * math.e) * store.top / store.clip_sigmas)
        codes += parameter.numel() * min(max(bits, 0.0), store.bits) / 8
    return least, least + int(codes)


def announce_size(cfg: Config, rt: Runtime) -> None:
    """Before training: what the code leaves for the artifact, and what that is likely to need.

    Raises: ConfigError if no rounding could fit the model beside the code.
    """
    left, (least, expected) = cfg.artifact_limit_bytes - code_bytes(), expected_bytes(cfg)
    if least > left:
        needs = f"scales and vectors of this model alone need {least}; make the model smaller"
        code = f"the code's {code_bytes()} bytes leave {left}"
        raise ConfigError(f"ARTIFACT_LIMIT_BYTES={cfg.artifact_limit_bytes}: {code}, and {needs}")
    note = "; codes will be coarser than set" if expected > left else ""
    rt.log.line(f"artifact: {left} bytes left beside the code, about {expected} expected{note}")


class Fit:
    """Quantizes and packs a model again and again until code and artifact fit the limit."""

    def __init__(self, model: GPT, hessians: Hessians, header: Mapping, rt: Runtime):
        self.model, self.hessians, self.header, self.rt = model, hessians, header, rt
        self.cfg = model.cfg
        self.limit = self.cfg.artifact_limit_bytes - code_bytes()

    def quantized(self, coarser: float) -> Quantized:
        with self.rt.budget.phase("quantization"):
            return quantize_model(self.model, self.hessians, self.rt, coarser)

    def packed(self, tensors: Quantized) -> bytes:
        with self.rt.budget.phase("compression"):
            return pack(tensors, self.header, self.cfg.compressor)

    def by_ranges(self) -> tuple[bytes, Quantized]:
        """The artifact with the tightest ranges that fit, and its tensors; else the last one tried.

        Ranges wider by 2^e lower the entropy of a code by about e bits: that, and once one artifact
        was too large and one not, the line through both, tells which e to try next.
        """
        cfg, exponent = self.cfg, 0.0
        tightest = TIGHTEST_SIGMAS / min(cfg.matrix_clip_sigmas, cfg.embed_clip_sigmas)
        floor = min(math.log2(tightest), 0.0) if cfg.fit_rule == "tightest" else 0.0
        slack, best, fits, over = int(FIT_SLACK * cfg.artifact_limit_bytes), None, None, None
        for attempt in range(FIT_ATTEMPTS):
            blob = self.packed(tensors := self.quantized(2**exponent))
            excess, ranges = len(blob) - self.limit, f"ranges x {2**exponent:.4f}"
            self.rt.log.line(f"artifact: {len(blob)} bytes with {ranges}, limit {self.limit}")
            if excess <= 0:
                best, fits = (blob, tensors), (exponent, excess)
                if exponent <= floor or -excess <= slack:
                    break
            else:
                over = exponent, excess
            codes = sum(t.codes.numel() for t in tensors.values() if isinstance(t, Codes))
            aim = excess + slack / 2  # the middle of what is allowed
            if fits and over:
                (right, below), (left, above) = fits, over
                share = 0.5 if attempt % 2 else (-slack / 2 - below) / (above - below)
                exponent = right + (left - right) * share
            else:
                # Farther each time, as a bit may save less than an eighth of a byte per code.
                exponent = max(exponent + min(8 * aim / codes * (1 + attempt / 2), 1.0), floor)
        return best or (blob, tensors)

    def by_pruning(self) -> tuple[bytes, Quantized]:
        """The artifact with codes of +-1 made 0 until it fits, and its tensors; else the last one.

        As many codes as the bytes that the last ones saved call for (system #1487 takes eight for
        each byte too many, which overshoots).
        """
        tensors, pruned, last, saving = self.quantized(1.0), 0, 0, PRUNED_CODE_BYTES
        for _ in range(FIT_ATTEMPTS):
            blob = self.packed(tensors)
            if (excess := len(blob) - self.limit) <= 0:
                break
            saving = max((last - len(blob)) / pruned, 0.02) if pruned else saving
            wanted, last = int(excess / saving) + 8, len(blob)
            pruned = prune_ones(tensors, self.cfg.matrix_bits, wanted)
            self.rt.log.line(f"artifact: {excess} bytes too many; pruned {pruned} codes of +-1")
        return blob, tensors


def fit_artifact(model: GPT, hessians: Hessians, header: Mapping[str, Any], rt: Runtime) -> bytes:
    """Quantize and pack so that code and artifact fit ARTIFACT_LIMIT_BYTES.

    FIT_RULE tightest: search the common factor of all ranges for the smallest that fits, down to
    TIGHTEST_SIGMAS; FIT_SLACK of the limit may stay unused, a little more in a small model, whose
    size does not fall evenly. wider: the same, but no range gets tighter than it is set. prune:
    ranges as they are set; codes of +-1 become 0 if need be.
    Raises: ArtifactError if it cannot be made to fit.
    """
    fit = Fit(model, hessians, header, rt)
    blob, tensors = fit.by_pruning() if model.cfg.fit_rule == "prune" else fit.by_ranges()
    if len(blob) > fit.limit:
        found = f"{len(blob):,} bytes after {FIT_ATTEMPTS} attempts, expected at most {fit.limit:,}"
        raise ArtifactError(f"artifact: {found}; lower MATRIX_BITS or the size of the model")
    log_storage(tensors, rt)
    return blob


def log_storage(tensors: Quantized, rt: Runtime) -> None:
    """Say which tensors are stored how, and put what they take before compression in the JSON."""
    groups: dict[tuple[str, str], list] = collections.defaultdict(list)
    for name, stored in tensors.items():
        groups[stored.kind, re.sub(r"blocks\.\d+\.", "blocks.*.", name)].append(stored)
    rt.log.line("Quantized weights:")
    for kind, same in itertools.groupby(sorted(groups), key=lambda group: group[0]):
        names = [name for _, name in same]
        count = sum(len(groups[kind, name]) for name in names)
        rt.log.line(f"  {kind}: {count} tensors: {', '.join(names)}")
    facts = []
    for (kind, name), stored in groups.items():
        parameters = sum(math.prod(t.shape) for t in stored)
        entropy_bytes = round(sum(t.entropy_bits() for t in stored) / 8)
        sizes = dict(tensors=len(stored), parameters=parameters, entropy_bytes=entropy_bytes)
        facts.append(dict(group=name, kind=kind, **sizes))
    rt.log.put(storage=facts)


def write_artifact(model: GPT, hessians: Hessians, header: Mapping[str, Any], rt: Runtime) -> None:
    """Quantize the model and write what a run leaves on disk. Runs on rank 0 alone."""
    cfg = model.cfg
    if cfg.save_checkpoint:
        weights = {name: Floats(p.detach()) for name, p in model.named_parameters()}
        atomic_write(rt.folder.path("ckpt"), pack(weights, header, "none"))
    blob = fit_artifact(model, hessians, header, rt)
    atomic_write(rt.folder.path("bin"), blob)
    label = f"quantized+{cfg.compressor}: "
    rt.log.line(f"Serialized model {label}{len(blob)} bytes")
    rt.log.line(f"Code size: {code_bytes()} bytes")
    rt.log.line(f"Total submission size {label}{len(blob) + code_bytes()} bytes")


# ---------------------------------------------------------------------------------------------
# 11  Evaluation
# A protocol says what is scored together and in which order, a learner by which weights. Each
# target is scored exactly once, in the declared order, and read by a learner only after that: the
# ledger sees to it. A window is (start, first_scored, stop).
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


class Rows(NamedTuple):
    """Windows that go through the model side by side; each scores its last `tail` targets.

    starts: of the windows, (rows,); those that only fill up the shape come last. targets: what they
    score, in order.
    """

    starts: np.ndarray
    tail: int
    targets: range


class Turn(NamedTuple):
    """What is scored before a learner may move the weights, and what it may learn from then.

    windows: how many are in the forwards; learns: (first, stop) of targets, or None; number: of the
    turn, out of `turns`; left: windows of the turns that follow.
    """

    forwards: list[Rows]
    windows: int
    learns: tuple[int, int] | None
    number: int
    turns: int
    left: int


FORWARDS_PER_CHUNK = 8  # or a multiple: equal work for so many ranks


class Windows:
    """The protocol `windows`: the whole text from left to right, a turn for each chunk of targets.

    Args:
        stride: targets per window; EVAL_SEQ_LEN: windows side by side.
        chunk: targets between two turns of learning; 0: nothing is learned.
        deadline: seconds of the evaluation budget at which all must be scored.
    Attributes: rows, windows in a forward that score their last `stride` targets; whole_rows, of
    those that score all they read; plain_from, the target from which on windows stand side by side
    to meet the deadline, or None.
    """

    def __init__(
        self, total: int, cfg: Config, stride: int, chunk: int = 0, deadline: float = math.inf
    ):
        self.total, self.length, self.stride = total, cfg.eval_seq_len, stride
        self.whole_rows = most = cfg.micro_batch_tokens // self.length
        self.learns, self.chunk = bool(chunk), chunk or 2 * FORWARDS_PER_CHUNK * most * stride
        per_chunk = -(-self.chunk // stride)
        forwards = FORWARDS_PER_CHUNK * -(-per_chunk // (FORWARDS_PER_CHUNK * most))
        self.rows, self.turns = -(-per_chunk // forwards), -(-total // self.chunk)
        self.scored, self.plain_from, self.deadline = 0, None, deadline

    def declared(self) -> str:
        """SHA-256 of the order of all targets, before any of them is scored."""
        return hashlib.sha256(np.arange(self.total, dtype="<u4").tobytes()).hexdigest()

    def __iter__(self) -> Iterator[Turn]:
        for number in range(self.turns):
            first, stop = number * self.chunk, (number + 1) * self.chunk
            windows = list(sliding_windows(self.total, self.length, self.stride, self.scored, stop))
            if windows:  # else the window before reached the end
                self.scored = windows[-1].stop
            learns = (first, stop) if self.learns and number < self.turns - 1 else None
            place = learns, number, self.turns, self.windows_left(self.stride)
            yield Turn(self.forwards(windows), len(windows), *place)

    def forwards(self, windows: Sequence[Window]) -> list[Rows]:
        """Consecutive windows, cut the same way for any number of ranks, in equal shapes."""
        found = []
        for whole, same in itertools.groupby(windows, key=lambda w: w.first_scored == w.start):
            same = list(same)
            size = self.whole_rows if whole else self.rows
            tail = same[0].start + self.length - same[0].first_scored
            for batch in (same[i : i + size] for i in range(0, len(same), size)):
                starts = np.array([w.start for w in batch] + [0] * (size - len(batch)))
                targets = range(batch[0].first_scored, batch[-1].stop)
                found.append(Rows(starts, tail, targets))
        return found

    def windows_left(self, stride: int) -> int:
        """Windows that score what is left."""
        return -(-(self.total - self.scored) // stride)

    def keep_pace(self, pace: Pace) -> None:
        """Put windows side by side from here on, if the rest so could not follow one more turn."""
        turn = min(-(-self.chunk // self.stride), self.windows_left(self.stride))
        plain = self.windows_left(self.length)
        late = self.stride < self.length and pace.late(score=turn + plain)
        if late and plain:
            self.stride, self.plain_from = self.length, self.scored


class Ledger:
    """What was scored when, and which text each optimizer step read: a bitmap of targets.

    A learner gets its text from here alone, and `text` hands out what is scored.

    Args:
        declared: digest of the order in which targets will be scored, see `Windows`.
    Attributes: nats, (total,) float32 losses by target; times, (total,) how often each was scored;
    scored, how many are; updates, (first, stop, scored so far) of the text of each optimizer step;
    seconds, what all this bookkeeping took.
    """

    def __init__(self, tokens: np.ndarray, declared: str):
        total = len(tokens) - 1
        self.tokens, self.nats, self.times = tokens, torch.zeros(total), np.zeros(total, np.uint8)
        self.scored, self.updates, self.order = 0, [], hashlib.sha256()
        self.declared, self.seconds = declared, 0.0

    def record(self, targets: np.ndarray, nats: Tensor) -> None:
        """Enter the losses of these targets, (n,) each, in the order of scoring.

        Raises: LedgerError if there is no such target, or if one is scored already.
        """
        host, begin = nats.cpu(), time.perf_counter()
        if targets.min() < 0 or targets.max() >= len(self.nats) or self.times[targets].any():
            raise LedgerError("C4", f"targets {targets.min()} to {targets.max()} are scored twice")
        self.nats[torch.from_numpy(targets)] = host
        self.times[targets] += 1
        self.order.update(targets.astype("<u4").tobytes())
        self.scored += len(targets)
        self.seconds += time.perf_counter() - begin

    def text(self, first: int, stop: int) -> np.ndarray:
        """(stop - first + 1,) tokens that an optimizer step may read: targets first .. stop - 1.

        Raises: LedgerError if one of them is not scored yet.
        """
        inside = 0 <= first < stop <= len(self.nats)
        if not inside or not self.times[first:stop].all():
            raise LedgerError("C3", f"targets {first} to {stop - 1} used, not all are scored yet")
        self.updates.append((first, stop, self.scored))
        return self.tokens[first : stop + 1]

    def score(self, target_bytes: np.ndarray) -> Score:
        """The sums over all targets, in one fixed order for any number of ranks.

        Raises: LedgerError unless each was scored once, in the declared order.
        """
        if (self.times != 1).any():
            raise LedgerError("C4", f"{self.scored} of {len(self.nats)} targets are scored once")
        if self.order.hexdigest() != self.declared:
            raise LedgerError("C4", "targets were scored in another order than declared")
        nats = float(self.nats.double().sum())
        return Score(nats, self.scored, int(target_bytes.sum(dtype=np.int64)))

    def digests(self, plain_from: int | None = None) -> dict[str, str]:
        """SHA-256 of the order of scoring, of the whole ledger but the losses, and of the losses.

        Without adaptation all three are the same for any number of ranks, with it the first two;
        gradients that other ranks add up differ in their rounding.
        """
        begin, order = time.perf_counter(), self.order.hexdigest()
        entries = json.dumps([len(self.nats), order, self.updates, plain_from]).encode()
        found = dict(
            order_sha256=order,
            ledger_sha256=hashlib.sha256(entries + self.times.tobytes()).hexdigest(),
            losses_sha256=hashlib.sha256(self.nats.numpy().tobytes()).hexdigest(),
        )
        self.seconds += time.perf_counter() - begin
        return found


class Static:
    """The learner that does not learn: the model scores as it is."""

    def __init__(self, model: GPT, plan: DepthPlan):
        self.model, self.plan = model, plan

    def score(self, windows: Tensor, tail: int) -> Tensor:
        """Losses (rows, tail) of the last targets of windows (rows, T + 1), in nats."""
        options = dict(plan=self.plan, reduction="none", tail=tail)
        return self.model(*inputs_and_targets(windows), **options)

    def learn(self, turn: Turn, draw: Callable[[], np.ndarray], pace: Pace) -> None:
        """Called once the targets of turn.learns are scored; may change the model.

        draw() is their text (n + 1,), for one optimizer step.
        """


class GlobalTTT(Static):
    """Test-time training (TTT) of systems #1493 and #578: SGD or AdamW on all scored text.

    Cosine over the chunks. Adapts as long as adapting and scoring the rest fit in the time, and for
    the first TTT_TRAIN_CHUNKS chunks; then it only watches. With TTT_EMA_DECAY an average of the
    trained weights scores. Source: Sun et al. 2020, arXiv:1909.13231, here score-first.
    """

    def __init__(self, model: GPT, plan: DepthPlan, cfg: Config, rt: Runtime):
        super().__init__(model, plan)
        self.cfg, self.rt = cfg, rt
        freeze(model, cfg.ttt_freeze_blocks, embeddings=cfg.ttt_freeze_embeddings)
        params = [p for p in model.parameters() if p.requires_grad]
        sgd = functools.partial(torch.optim.SGD, momentum=cfg.ttt_momentum)
        adamw = functools.partial(torch.optim.AdamW, weight_decay=0.0)
        self.optimizer = (sgd if cfg.ttt_optimizer == "sgd" else adamw)(params, lr=cfg.ttt_lr)
        # Decay 0 keeps a plain copy: the weights that train, while their average scores.
        decays = (cfg.ttt_ema_decay, 0.0) if cfg.ttt_ema_decay else ()
        self.copies = [Ema(model, decay) for decay in decays]
        self.adapted, self.stopped = 0, False

    def learn(self, turn: Turn, draw: Callable[[], np.ndarray], pace: Pace) -> None:
        chunks = self.cfg.ttt_train_chunks or turn.turns
        if not self.stopped and pace.late(learn=1, score=turn.left):
            self.stopped = True
            limit = f"EVAL_WALLCLOCK_SECONDS={self.cfg.eval_wallclock_seconds:g}"
            done = f"stopped adapting after {self.adapted} chunks, scoring goes on"
            self.rt.log.line(f"ttt:{done}: {limit}")
        if turn.number < chunks and not self.stopped:
            swing = 0.5 * (1 + math.cos(math.pi * turn.number / max(chunks - 1, 1)))
            self.optimizer.param_groups[0]["lr"] = self.cfg.ttt_lr * swing
            with pace.piece("learn"):
                self.adapt(draw)
                self.rt.synchronize()
            self.adapted += 1

    def adapt(self, draw: Callable[[], np.ndarray]) -> None:
        """TTT_EPOCHS steps on the whole sequences of the text; leaves the weights that score."""
        cfg, options = self.cfg, dict(plan=self.plan, clip_norm=self.cfg.ttt_grad_clip)
        if self.copies:
            self.copies[1].store()
        for _ in range(cfg.ttt_epochs):
            rows = whole_rows(draw(), cfg.eval_seq_len)
            text_step(self.model, rows, self.optimizer, cfg, self.rt, **options)
        for copied in self.copies:
            copied.update()
        if self.copies:
            self.copies[0].store()


@torch.no_grad()
def score_turn(learner: Static, turn: Turn, text: np.ndarray, length: int, rt: Runtime) -> Tensor:
    """Losses of all targets of a turn, (n,) float32, the same on every rank.

    The ranks share whole forwards, so the losses are the same to the bit for any number of them.
    Only the final sum is a collective.
    """
    sizes = [len(rows.targets) for rows in turn.forwards]
    nats, mine = torch.zeros(sum(sizes), device=rt.device), rt.share(len(sizes))
    for rows, losses in list(zip(turn.forwards, nats.split(sizes), strict=True))[mine]:
        places = np.minimum(rows.starts[:, None] + np.arange(length + 1), len(text) - 1)
        found = learner.score(rt.to_device(text[places]), rows.tail)
        losses.copy_(found.flatten()[: len(losses)])
    rt.sum_(nats)
    return nats


def evaluate(
    name: str, learner: Static, protocol: Windows, val: ValidationTokens, rt: Runtime
) -> tuple[Score, Ledger]:
    """Score the validation text: the protocol says in which order, the learner by which weights.

    name: of the progress. To meet the deadline, learner and protocol give up what they can.
    """
    ledger, show = Ledger(val.tokens, protocol.declared()), rt.log.progress(name)
    pace = Pace(rt, Budget.EVALUATION, protocol.deadline)
    for turn in protocol:
        with pace.piece("score", turn.windows):
            if turn.forwards:
                nats = score_turn(learner, turn, val.tokens, protocol.length, rt)
                targets = np.concatenate([rows.targets for rows in turn.forwards])
                ledger.record(targets, nats)
        show(ledger.scored / len(ledger.nats))
        if turn.learns:
            learner.learn(turn, functools.partial(ledger.text, *turn.learns), pace)
        protocol.keep_pace(pace)
    return ledger.score(val.target_bytes), ledger


def score_stage(
    name: str, learner: Static, protocol: Windows, val: ValidationTokens, rt: Runtime
) -> Score:
    """Time an evaluation and report it: the line users look for, and facts in the JSON.

    name: of the stage, and of its phase of the budget; "diagnostic" if there is none of that name.
    """
    log, phase = rt.log, name if name in Budget.EVALUATION else "diagnostic"
    before = rt.budget.total(phase)
    with rt.budget.phase(phase):
        result, ledger = evaluate(name, learner, protocol, val, rt)
    seconds, plain_from = rt.budget.total(phase) - before, protocol.plain_from
    score = f"val_loss:{result.loss:.8f} val_bpb:{result.bpb:.8f}"
    log.line(f"{name} {score} eval_time:{seconds * 1e3:.0f}ms")
    facts = dict(val_loss=result.loss, val_bpb=result.bpb, **dataclasses.asdict(result))
    digests = ledger.digests(plain_from)
    facts |= digests | dict(updates=len(ledger.updates), plain_from=plain_from)
    if plain_from is not None:
        log.line(
            f"{name} gave up EVAL_STRIDE at target {plain_from}, windows stand side by side from "
            "there: the rest would not have fitted EVAL_WALLCLOCK_SECONDS"
        )
    short = " ".join(f"{key}:{digest[:16]}" for key, digest in digests.items())
    sums = f"tokens:{result.tokens} bytes:{result.bytes} nats:{result.nats:.6f}"
    log.line(f"{name} ledger: {sums} updates:{len(ledger.updates)} {short}")
    spent = {**log.record.get("ledger_seconds", {}), name: ledger.seconds}
    log.put(stages={**log.record.get("stages", {}), name: facts}, ledger_seconds=spent)
    return result


def score_model(
    model: GPT, plan: DepthPlan, val: ValidationTokens, cfg: Config, rt: Runtime
) -> Score:
    """Score a model in every way that is set; returns the last, strongest score."""
    limit = cfg.eval_wallclock_seconds or math.inf
    windows = functools.partial(Windows, len(val.target_bytes), cfg)
    static = Static(model, plan)
    score = score_stage("quantized", static, windows(cfg.eval_seq_len), val, rt)
    if cfg.sliding_window_enabled:
        # What comes after it must at least be able to score all in windows side by side.
        deadline = limit - rt.budget.total("quantized") * cfg.ttt_enabled
        sliding = windows(cfg.eval_stride, deadline=deadline)
        score = score_stage("quantized_sliding_window", static, sliding, val, rt)
    if cfg.ttt_enabled:
        ttt = GlobalTTT(model, plan, cfg, rt)
        sliding = windows(cfg.eval_stride, cfg.ttt_chunk_tokens, limit)
        score = score_stage("quantized_ttt", ttt, sliding, val, rt)
        rt.log.put(ttt=dict(chunks_adapted=ttt.adapted, complete=not ttt.stopped))
    return score


BASELINE_MAX_BYTES = 4_000_000  # xz and brotli need seconds per megabyte


def compressor_baselines(val: ValidationTokens, tokenizer: Path) -> dict[str, float]:
    """Bits per byte of general compressors on the scored text; empty if it is large."""
    if val.target_bytes.sum(dtype=np.int64) > BASELINE_MAX_BYTES:
        return {}
    text = b"".join(decode_documents(val.tokens, tokenizer))
    xz = codec("lzma")
    sizes = {"xz-9e": len(xz.compress(text, preset=9 | xz.PRESET_EXTREME))}
    with contextlib.suppress(ConfigError):  # brotli is optional
        sizes["brotli-11"] = len(compress(text, "brotli"))
    return {name: 8 * size / len(text) for name, size in sizes.items()}


# ---------------------------------------------------------------------------------------------
# 12  Main
# Data, train, quantize, pack; then read the artifact back from disk and score it.
# ---------------------------------------------------------------------------------------------


def run(cfg: Config, rt: Runtime) -> None:
    """The whole program for one configuration."""
    announce(cfg, rt)
    origin, stored = cfg.artifact or cfg.checkpoint, None
    if origin:  # the model decides which data and tokenizer belong to it
        with rt.budget.phase("decompression" if cfg.artifact else "data"):
            stored = open_stored(origin, cfg, rt)
            cfg = stored.cfg
    with rt.together(), rt.budget.phase("data"):
        codec(cfg.compressor)
        backend = choose_backend(cfg, rt, documents=cfg.doc_masking and not cfg.artifact)
        table = ByteTable.from_file(cfg.tokenizer_file, cfg.vocab_size)
        shards = find_shards(cfg.dataset_dir, "val")
        val = ValidationTokens.load(shards, table, seq_len=cfg.eval_seq_len, limit=cfg.val_tokens)
        trains = not cfg.artifact
        proof = data_proof(cfg.dataset_dir, cfg.tokenizer_file, trains=trains) if rt.is_main else {}
    announce_text(val, table, proof, cfg, rt)
    path, steps = Path(cfg.artifact) if cfg.artifact else rt.folder.path("bin"), 0
    if not cfg.artifact:
        steps = produce(stored, val, backend, cfg, rt)
    with rt.budget.phase("decompression"):
        if not cfg.artifact:
            stored = open_stored(path, cfg, rt)
        if stored.header.get("tokenizer_sha256") != table.digest:
            other = f"{cfg.tokenizer_file} (sha256 {table.digest[:16]}...)"
            found = f"trained with another tokenizer than {other}"
            raise ArtifactError(f"{path}: {found}; set TOKENIZER_PATH and DATA_PATH")
        model = stored.model(backend, rt)
    if reasons := stored.header.get("invalid_for_records"):
        rt.log.line(f"invalid_for_records: {'; '.join(reasons)}")
        rt.log.put(invalid_for_records=reasons)
    rt.log.line(f"artifact opened: {stored.plan}")
    score = score_model(model, stored.plan, val, cfg, rt)
    conclude(score, path, steps, cfg, rt)


def announce(cfg: Config, rt: Runtime) -> None:
    """The first lines and facts: what a stranger needs to repeat the run."""
    facts, code = rt.describe(), dict(bytes=code_bytes(), sha256=file_sha256(Path(__file__)))
    log, settings = rt.log, cfg.values()
    if "smoke" in cfg.sources.values():
        log.line("smoke: small run on the sample; SMOKE=0, a data path or a size: full scale")
    for warning in cfg.warnings:
        log.line(f"warning: {warning}")
    log.line(f"code_bytes: {code['bytes']} code_sha256: {code['sha256']}")
    log.line(key_values("runtime:", facts))
    log.line("Hyperparameters:")
    for name in sorted(settings):
        log.line(f"  {name}: {settings[name]}")
    log.put(
        run_id=rt.folder.run_id,
        started=rt.budget.started.isoformat(),
        runtime=facts,
        code=code,
        config={n: dict(value=v, source=cfg.sources[n]) for n, v in settings.items()},
    )


def announce_text(
    val: ValidationTokens, table: ByteTable, proof: dict, cfg: Config, rt: Runtime
) -> None:
    """What is scored, and what general compressors make of it."""
    facts = dict(
        val_tokens=len(val.target_bytes),
        val_bytes=int(val.target_bytes.sum(dtype=np.int64)),
        dropped_tail=val.dropped,
        tokenizer_sha256=val.tokenizer_sha256,
        **proof,
    )
    rt.log.line(" ".join(f"{key}: {value}" for key, value in facts.items()))
    if rt.is_main and not proof["data_verified"]:
        rt.log.line(
            f"warning: {cfg.dataset_dir} has no proof of clean data; check it once with "
            f"python data/verify_dataset.py {cfg.dataset_dir} --tokenizer {cfg.tokenizer_file}"
        )
    with rt.budget.phase("baseline"):
        plain = rt.is_main and not table.has_marks  # a transformed text is not what is charged
        baselines = compressor_baselines(val, cfg.tokenizer_file) if plain else {}
    for name, bpb in baselines.items():
        rt.log.line(f"baseline {name} val_bpb:{bpb:.4f}")
    rt.log.put(data=facts, baselines=baselines)


TRAINED_ON_VALIDATION = "trained on the validation text before it was scored"


def produce(
    stored: Stored | None, val: ValidationTokens, backend: Backend, cfg: Config, rt: Runtime
) -> int:
    """Train (or take a checkpoint), quantize, and write the artifact. Returns the steps trained."""
    with rt.together(), rt.budget.phase("data"):
        loader = Loader(find_shards(cfg.dataset_dir, "train"), cfg)
    announce_size(cfg, rt)
    rt.log.line(f"train_shards: {len(loader.shards)} train_tokens: {sum(map(len, loader.shards))}")
    if stored is not None:
        reasons = tuple(stored.header.get("invalid_for_records", ()))
        model, trained = stored.model(backend, rt), Trained(0, stored.header["looped"], reasons)
    else:
        model, trained = train_model(loader, val, backend, cfg, rt)
    plan = depth_plan(cfg, looped=trained.looped)

    def diagnose(name: str) -> None:
        windows = Windows(len(val.target_bytes), cfg, cfg.eval_seq_len)
        score_stage(name, Static(model, plan), windows, val, rt)

    diagnose("pre-quantization post-ema")
    if cfg.prequant_ttt_epochs:
        with rt.budget.phase("fine-tuning"):
            fine_tune_on_validation(model, val, cfg, rt, plan=plan)
        diagnose("post-prequant-ttt")
        trained = trained._replace(invalid_for_records=(TRAINED_ON_VALIDATION,))
    with rt.budget.phase("calibration"):
        first = trained.steps * cfg.train_rows
        hessians = collect_hessians(model, loader, cfg, rt, plan=plan, first=first)
    seconds = rt.budget.total("calibration")
    rt.log.line(f"GPTQ:collected {len(hessians)} Hessians in {seconds:.1f}s")
    with rt.together():
        if rt.is_main:
            facts = dict(looped=trained.looped, invalid_for_records=trained.invalid_for_records)
            text = dict(tokenizer_sha256=val.tokenizer_sha256)
            header = dict(model=cfg.model_settings(), **facts, **text)
            write_artifact(model, hessians, header, rt)
    return trained.steps


def train_model(
    loader: Loader, val: ValidationTokens, backend: Backend, cfg: Config, rt: Runtime
) -> tuple[GPT, Trained]:
    """A model trained from scratch, and what training leaves besides."""
    model = GPT(cfg, backend)
    model.init_weights(cfg.seed)
    model = rt.compile(model.to(rt.device))
    rt.log.line(f"model_params:{sum(p.numel() for p in model.parameters())}")

    def validate(plan: DepthPlan, prefix: str) -> None:
        windows = Windows(len(val.target_bytes), cfg, cfg.eval_seq_len)
        with rt.budget.phase("diagnostic"):
            score, _ = evaluate("validation", Static(model, plan), windows, val, rt)
        rt.log.line(f"{prefix} val_loss: {score.loss:.4f} val_bpb: {score.bpb:.4f}")

    with rt.budget.phase("warm-up"):
        warm_up(model, loader, cfg, rt)
        if cfg.max_wallclock_seconds and not cfg.gptq_reserve_seconds:
            cfg = measure_reserve(model, loader, cfg, rt)
    trained = train(model, loader, validate, cfg, rt)
    if rt.device.type == "cuda":
        used, kept = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        rt.log.line(f"peak memory allocated: {used >> 20} MiB reserved: {kept >> 20} MiB")
        rt.log.put(peak_memory_bytes=used)
    return model, trained


def conclude(score: Score, path: Path, steps: int, cfg: Config, rt: Runtime) -> None:
    """The budget and the `result` line."""
    report, log = rt.budget.report(), rt.log
    spent = {name: f"{seconds:.1f}s" for name, seconds in report["phases"].items()}
    log.line(key_values("budget", spent))
    for name in rt.budget.limits:
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
    log.line(key_values("result", result))


def audit(cfg: Config, rt: Runtime) -> int:
    """Prove or refute that the score of ARTIFACT is legal; returns the exit status.

    The proof is a file of its own, audit.py in records/, and calls the evaluator of this one.
    """
    here = Path(__file__).resolve()
    place = next(
        (p for p in (f / "records" / "audit.py" for f in here.parents) if p.exists()), None
    )
    if place is None:
        raise ConfigError(f"AUDIT=1: no records/audit.py at or above {here.parent}; copy it there")
    spec = importlib.util.spec_from_file_location("audit", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rt.folder = RunFolder(cfg.log_dir, f"{cfg.run_id or Path(cfg.artifact).stem}.audit")
    rt.log = Log(rt.folder, replace=True)
    return module.audit(sys.modules[__name__], cfg, rt)


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
            if cfg.audit:
                return audit(cfg, rt)
            if done := rt.open_run(cfg):
                print(f"{rt.folder.run_id}: finished before: {done}" * rt.is_main, flush=True)
                return 0
            run(cfg, rt)
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
