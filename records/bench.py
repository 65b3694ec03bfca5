#!/usr/bin/env python3
"""Time the steps of train_gpt.py, alone or beside another script of this family.

    python records/bench.py --set DATA_PATH=FOLDER --set TOKENIZER_PATH=FILE
    python records/bench.py --other SCRIPT.py --set DATA_DIR=FOLDER --rounds 3
    python records/bench.py --profile       # where the time goes, and the floors below it
    python records/bench.py --paper         # the same counted on paper, for records/profile.md

Both programs get the same variables, batch and steps, and take turns. A step's time is the distance
between two lines of the training log by this program's own clock, so it does not matter what a
script says about itself. Both depth plans come from one run: the loop begins half-way. A script
ends when its last training line is read. JSON and Markdown go to OUT.
"""

import argparse
import collections
import contextlib
import datetime
import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as t  # noqa: E402

STEP_LINE = re.compile(r"(?:^|[\s:])(\d+)/\d+ train_loss: ?\S+")
LOOP_LINE = re.compile(r"layer_loop:enabled step:(\d+)|recurrence:activated at step (\d+)")
CLAIM = re.compile(r"tok/s: ?\d+|step_avg: ?[\d.]+ms")
PUBLISHED = (
    "Published by the authors of system #1493, on 8xH100, and not measured here: 102.0 ms a step "
    "with 11 visits, 150.5 ms with 17, 786,432 tokens a step."
)
DATA_SHEETS = {"H100": (989.4e12, 3.35e12), "H200": (989.4e12, 4.8e12)}  # FLOP/s bf16, bytes/s
STAND_IN = '''"""A stand-in for FlashAttention 3: both scripts attend by the same kernels."""

import torch.nn.functional as F


def flash_attn_func(q, k, v, causal=False, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)
'''


# --- two programs side by side ---


class Program(NamedTuple):
    """A script and the variables that it alone gets."""

    name: str
    path: Path
    variables: dict[str, str]


class Line(NamedTuple):
    """A line of the training log: steps done, when it came, and what the script says of itself."""

    step: int
    seconds: float
    claim: str


def run_once(
    program: Program, env: dict[str, str], folder: Path, args: argparse.Namespace
) -> tuple[list[Line], int | None]:
    """Run a script up to its last training line: (its lines, the step at which the loop began).

    Raises: t.ConfigError with the script's last lines if it ends, or time runs out, before.
    """
    every, tail, lines, loop = args.log_every, collections.deque(maxlen=12), [], None
    last = int(env["ITERATIONS"]) // every * every
    command = [sys.executable, str(program.path)]
    if args.ranks > 1:
        count = f"--nproc_per_node={args.ranks}"
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", count]
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=env, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    timer = threading.Timer(args.timeout, stop, [process])
    timer.start()
    try:
        for text in process.stdout:
            now = time.perf_counter() - begun
            tail.append(text.rstrip())
            if found := LOOP_LINE.search(text):
                loop = int(found[1] or found[2])
            if found := STEP_LINE.search(text):
                claim = CLAIM.search(text)
                lines.append(Line(int(found[1]), now, claim[0] if claim else ""))
                if lines[-1].step >= last:
                    return lines, loop
        status = process.wait()
    finally:
        timer.cancel()
        stop(process)
        process.stdout.close()
    done = lines[-1].step if lines else 0
    raise t.ConfigError(
        f"{program.path}: ended with exit status {status} after {done} of {last} steps, expected "
        f"lines such as '500/20000 train_loss: 3.33'; its last lines:\n" + "\n".join(tail)
    )


def stop(process: subprocess.Popen) -> None:
    """End a script and the ranks that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


def step_times(lines: list[Line], loop: int | None, warm: int) -> dict[str, list[float]]:
    """Milliseconds per step between neighbouring lines, by depth plan, after `warm` steps of it."""
    times = collections.defaultdict(list)
    border = math.inf if loop is None else loop
    for before, after in zip(lines, lines[1:], strict=False):
        taken = 1e3 * (after.seconds - before.seconds) / max(after.step - before.step, 1)
        if before.step >= border + warm:
            times["looped"].append(taken)
        elif warm <= before.step and after.step <= border:
            times["plain"].append(taken)
    return dict(times)


def environment(cfg: t.Config, args: argparse.Namespace) -> dict[str, str]:
    """What both programs get: the batch, the data and the steps."""
    places = dict(
        DATA_PATH=cfg.dataset_dir, DATA_DIR=Path(cfg.data_dir), TOKENIZER_PATH=cfg.tokenizer_file
    )
    shared = dict(
        ITERATIONS=2 * args.steps,
        MAX_WALLCLOCK_SECONDS=0,
        VAL_LOSS_EVERY=0,
        TRAIN_LOG_EVERY=args.log_every,
        ENABLE_LOOPING_AT=0.5,
        TRAIN_BATCH_TOKENS=cfg.train_batch_tokens,
        TRAIN_SEQ_LEN=cfg.train_seq_len,
        VOCAB_SIZE=cfg.vocab_size,
        SEED=cfg.seed,
    )
    shared |= {name: path.resolve() for name, path in places.items()} | pairs(args.set)
    return {**os.environ, **{k: str(v) for k, v in shared.items()}, "PYTHONUNBUFFERED": "1"}


def side_by_side(cfg: t.Config, args: argparse.Namespace) -> dict:
    """Alternate the programs for some rounds; returns what the JSON holds."""
    programs = [Program("ours", ROOT / "train_gpt.py", pairs(args.ours_set))]
    if args.other:
        programs.append(Program("other", args.other.resolve(), pairs(args.other_set)))
    total, begun, runs = args.rounds * len(programs), time.perf_counter(), []
    has_fa3 = importlib.util.find_spec("flash_attn_interface") is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "stand_in").mkdir()
        (folder / "stand_in" / "flash_attn_interface.py").write_text(STAND_IN)
        for number in range(total):
            program = programs[number % len(programs)]
            env = environment(cfg, args) | program.variables
            env |= dict(RUN_ID=f"bench{number}", LOG_DIR=str(folder / "logs"))
            if program.name == "other" and not has_fa3:
                paths = [str(folder / "stand_in"), env.get("PYTHONPATH", "")]
                env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            lines, loop = run_once(program, env, folder, args)
            times = step_times(lines, loop, args.warm)
            if not times:
                raise t.ConfigError(
                    f"{program.path}: no two training lines after {args.warm} steps of a plan; "
                    "raise --steps, or lower --log-every or --warm"
                )
            runs.append(
                dict(
                    program=program.name,
                    round=number // len(programs) + 1,
                    first_line_seconds=round(lines[0].seconds, 1),
                    median_ms={plan: statistics.median(found) for plan, found in times.items()},
                    ms=times,
                    own_claim=lines[-1].claim,
                )
            )
            left = (time.perf_counter() - begun) * (total - number - 1) / (number + 1)
            found = " ".join(f"{plan}:{ms:.2f}ms" for plan, ms in runs[-1]["median_ms"].items())
            say(f"{number + 1}/{total} {program.name} {found} time_left:{left:.0f}s")
    stand_in = "stand-in by scaled_dot_product_attention, for want of flash_attn_interface"
    rt = t.Runtime(cfg, {})
    return dict(
        attention_of_ours=t.select_attention(cfg.attention, rt.device, rt.compute_dtype)[0],
        attention_of_other="flash_attn_interface as installed" if has_fa3 else stand_in,
        variables={p.name: p.variables for p in programs} | {"both": pairs(args.set)},
        sources={p.name: hashlib.sha256(p.path.read_bytes()).hexdigest() for p in programs},
        runs=runs,
        summary=summarize(runs, cfg, args.ranks),
    )


def summarize(runs: list[dict], cfg: t.Config, ranks: int) -> dict:
    """Medians over the rounds, tokens per second, and the ratio within rounds, by plan."""
    summary = {}
    for plan in ("plain", "looped"):
        by_name = collections.defaultdict(dict)
        for run in runs:
            if plan in run["median_ms"]:
                by_name[run["program"]][run["round"]] = run["median_ms"][plan]
        found = summary[plan] = {}
        for name, by_round in by_name.items():
            found[name] = spread(list(by_round.values()))
            found[name]["tokens_per_second"] = 1e3 * cfg.train_batch_tokens / found[name]["median"]
        if len(by_name) == 2:
            ours, other = by_name["ours"], by_name["other"]
            found["speedup"] = spread([other[r] / ours[r] for r in ours if r in other])
        peak = t.Runtime(cfg, {}).peak_flops()
        if peak and "ours" in found:
            flops = counts(cfg, t.depth_plan(cfg, looped=plan == "looped"))["flops_per_token"]
            found["mfu"] = found["ours"]["tokens_per_second"] * flops / peak / ranks
    return {plan: found for plan, found in summary.items() if found}


def spread(values: list[float]) -> dict[str, float]:
    return dict(median=statistics.median(values), low=min(values), high=max(values), n=len(values))


def timing_page(record: dict) -> list[str]:
    """The table of `side_by_side`."""
    rows = ["| plan | program | ms per step (lowest to highest) | tokens/s | n |"]
    rows.append("| --- | --- | --: | --: | --: |")
    notes = []
    for plan, found in record["summary"].items():
        for name in ("ours", "other"):
            if name in found:
                s = found[name]
                times = f"{s['median']:.2f} ({s['low']:.2f} to {s['high']:.2f})"
                rows.append(
                    f"| {plan} | {name} | {times} | {s['tokens_per_second']:,.0f} | {s['n']} |"
                )
        if "speedup" in found:
            s = found["speedup"]
            notes.append(
                f"{plan}: ours has {s['median']:.3f} times the tokens/s of the other script "
                f"({s['low']:.3f} to {s['high']:.3f} over {s['n']} rounds, run in turns)."
            )
        if "mfu" in found:
            notes.append(f"{plan}: MFU {found['mfu']:.1%} of the data sheet's dense bf16 rate.")
    if "other" in record["variables"]:
        ours, other = record["attention_of_ours"], record["attention_of_other"]
        notes.append(f"Attention of ours: {ours}. Of the other script: {other}.")
    return [*rows, "", *notes, PUBLISHED]


# --- counted on paper ---


class NoAttention(torch.autograd.Function):
    """In place of a kernel: right shapes and no operation, so that attention is counted apart."""

    @staticmethod
    def forward(ctx, q, k, v, documents):
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, grad):
        return *(torch.empty_like(x) for x in ctx.saved_tensors), None


class Traffic(TorchDispatchMode):
    """Adds up the bytes of every operation: inputs read once, outputs written once."""

    FREE = ("_unsafe_view", "empty", "new_empty", "empty_like")

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size, self.bytes = vocab_size, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in self.FREE:
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(self.vocab_size in x.shape for x in tensors):
            kind = "head and loss"
        else:
            kind = "matrix products" if name in ("mm", "bmm") else "elementwise"
        for x in tensors:  # an expanded dimension is read once
            sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
            self.bytes[kind] += math.prod(sizes) * x.element_size()
        return out


def meta_model(cfg: t.Config) -> t.GPT:
    """The model without its numbers."""
    with torch.device("meta"):
        return t.GPT(cfg, NoAttention.apply, torch.bfloat16)


def op_by_op(cfg: t.Config, plan: t.DepthPlan) -> collections.Counter:
    """Bytes that the forwards and backwards of a step move if every operation is a pass."""
    model, micros = meta_model(cfg), cfg.micro_batches(1)
    rows = cfg.train_batch_tokens // cfg.train_seq_len // micros
    tokens = torch.empty(rows, cfg.train_seq_len, dtype=torch.int64, device="meta")
    for _ in range(2):  # from the second on, gradients are added up
        with Traffic(cfg.vocab_size) as traffic:
            (model(tokens, tokens, plan=plan) / micros).backward()
    return collections.Counter({kind: n * micros for kind, n in traffic.bytes.items()})


def chains(cfg: t.Config, plan: t.DepthPlan) -> list[tuple[int, int]]:
    """(inputs, outputs) in numbers per token of the elementwise chains between matrix products."""
    width, hidden = cfg.model_dim, cfg.mlp_hidden
    kv = width // cfg.num_heads * cfg.num_kv_heads
    found = []
    for visit in plan.visits:
        skip, push, exclusive = visit.pop >= 0, visit.push, visit.layer >= (
            cfg.num_layers - cfg.xsa_last_n
        )  # fmt: skip
        # Entry: MLP output, stream, x0, perhaps a skip -> stream, normed stream, perhaps a skip.
        found.append(((3 + skip) * width, (2 + push) * width))
        found.append((width + kv, width + kv))  # queries and keys: norm, rotation, gain
        found += [(width + kv, width)] * exclusive
        sequential = visit.form == "sequential"  # else the MLP reads what attention reads
        found.append((2 * width, 2 * width) if sequential else (width, 0))
        found.append((hidden, hidden))  # activation
    return found


def counts(cfg: t.Config, plan: t.DepthPlan) -> dict:
    """FLOPs of a step, and the fewest bytes: each chain between two matrix products one pass.

    A chain's forward reads its inputs and writes its outputs; its backward reads the gradients of
    the outputs and the inputs, and writes the gradients of the inputs: 3 inputs + 2 outputs.
    """
    model, tokens, visits = meta_model(cfg), cfg.train_batch_tokens, len(plan.visits)
    kv = cfg.model_dim // cfg.num_heads * cfg.num_kv_heads
    per_token = model.flops_per_token(plan, cfg.train_seq_len)
    attention = 6.0 * cfg.train_seq_len * cfg.model_dim * visits
    head = 6.0 * model.head.weight.numel()
    numbers = sum(3 * inputs + 2 * outputs for inputs, outputs in chains(cfg, plan))
    return dict(
        flops_per_token=per_token,
        flops={
            "matrix products": tokens * (per_token - attention - head),
            "attention": tokens * attention,
            "head and loss": tokens * head,
        },
        bytes={
            "elementwise": 2.0 * tokens * numbers,
            # Forward q, k, v, out; backward the same, the output's gradient, and dq, dk, dv.
            "attention": 2.0 * tokens * visits * 6 * (cfg.model_dim + kv),
            # Logits written and read; their gradient written, and read by two products.
            "head and loss": 2.0 * tokens * 5 * cfg.vocab_size,
        },
    )


def optimizer_counts(cfg: t.Config, ranks: int) -> dict[str, float]:
    """Of one rank: Newton-Schulz FLOPs, bytes moved, and bytes sent, before and after parts.

    `hidden` are the bytes of the updates that travel while another shape is computed.
    """
    groups = t.parameter_groups(meta_model(cfg), cfg)
    shapes = collections.Counter(tuple(p.shape) for p in groups["matrix"])
    flops, padded = 0, []
    for (rows, cols), count in shapes.items():
        small, large, part = min(rows, cols), max(rows, cols), -(-count // ranks)
        flops += part * cfg.muon_backend_steps * (4 * small**2 * large + 2 * small**3)
        padded.append(part * ranks * rows * cols)
    matrices = sum(rows * cols * count for (rows, cols), count in shapes.items())
    others = sum(p.numel() for name in ("embedding", "scalar") for p in groups[name])
    hop = (ranks - 1) / ranks  # of a message, what a rank sends in a reduce-scatter or all-gather
    return dict(
        flops=flops,
        # A matrix: gradient and momentum of this part; weight and average, read and written.
        # AdamW: gradient, two moments, weight and average.
        bytes=4 * ((3 / ranks + 4) * matrices + 9 * others),
        before=hop * (2 * 4 * (matrices + others) + 4 * sum(padded)),
        after=hop * (4 * sum(padded) + 2 * 4 * others + 2 * sum(padded)),
        hidden=hop * 2 * (sum(padded) - min(padded)),
    )


def newton_schulz_bytes(cfg: t.Config) -> tuple[float, float]:
    """Bytes of the elementwise parts of Newton-Schulz on one rank: op by op, and fused.

    With m and n the smaller and larger side, op by op an iteration scales the m x m product twice
    and adds (7 m^2), scales the matrix and adds (5 m n); fused, it scales once and adds (5 m^2),
    and adds (3 m n). bf16.
    """
    sides = [sorted(p.shape) for p in t.parameter_groups(meta_model(cfg), cfg)["matrix"]]
    square, whole = sum(m * m for m, _ in sides), sum(m * n for m, n in sides)
    steps = 2.0 * cfg.muon_backend_steps
    return steps * (7 * square + 5 * whole), steps * (5 * square + 3 * whole)


def both_plans(cfg: t.Config) -> dict[str, t.DepthPlan]:
    """The depth plans of a run by the names they have in every table here."""
    plans = {name: t.depth_plan(cfg, looped=name == "looped") for name in ("plain", "looped")}
    return plans if plans["plain"] != plans["looped"] else {"plain": plans["plain"]}


def table(head: list[str], rows: list[list]) -> list[str]:
    """Markdown; numbers to one decimal."""
    shown = [[x if isinstance(x, str) else f"{x:,.1f}" for x in row] for row in rows]
    rule = ["---", *["--:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *shown)]


def paper(cfg: t.Config) -> str:
    """The page records/profile.md."""
    plans = both_plans(cfg)
    found = {name: counts(cfg, plan) for name, plan in plans.items()}
    eager = {name: op_by_op(cfg, plan) for name, plan in plans.items()}
    names = [f"{name}, {len(plan.visits)} visits" for name, plan in plans.items()]
    intro = (
        "Nothing on this page was measured: `python records/bench.py --paper` counts it from the "
        f"settings. {cfg.train_batch_tokens:,} tokens a step in sequences of "
        f"{cfg.train_seq_len:,}; {cfg.num_layers} layers {cfg.model_dim} wide; "
        f"{cfg.vocab_size:,} tokens in the vocabulary. Rates are the vendor's data sheets: 989.4 "
        "TFLOP/s dense bf16 (H100 and H200), 3.35 TB/s (H100), 4.8 TB/s (H200), 450 GB/s of NVLink "
        "in one direction. What a device really does, `--profile` measures, with the same floors "
        "from rates that it measures too."
    )
    passes = (
        "Op by op, every operation reads its inputs and writes its outputs, norms in their parts: "
        "no compiler. Once, each chain of elementwise operations between two matrix products is "
        "one pass forward and one backward, and the head's logits are written, read, and their "
        "gradients written and read twice, in bf16. The compiler's fusion lies between the two."
    )
    lines = ["# One step on paper", "", *wrap(intro), ""]
    lines += ["## Operations", "", *table(["per step", *names], operation_rows(found)), ""]
    lines += ["## Bytes", "", *wrap(passes), ""]
    lines += [*table(["per step", *names], byte_rows(found, eager)), ""]
    lines += [*paper_optimizer(cfg), "", *predictions(cfg, names, found, eager)]
    return "\n".join(lines) + "\n"


def wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_on_hyphens=False)


def operation_rows(found: dict[str, dict]) -> list[list]:
    """FLOPs by class, and the time they need at the data sheet's rate."""
    rate, kinds = DATA_SHEETS["H200"][0], next(iter(found.values()))["flops"]
    rows = [["MFLOP per token", *(f["flops_per_token"] / 1e6 for f in found.values())]]
    rows += [[f"{k} [TFLOP]", *(f["flops"][k] / 1e12 for f in found.values())] for k in kinds]
    totals = [1e3 * sum(f["flops"].values()) / rate for f in found.values()]
    rows.append(["all [TFLOP]", *(ms * rate / 1e15 for ms in totals)])
    for part, name in ((1.0, "floor"), (0.45, "45 % of the rate")):
        for devices, words in ((1, "one GPU"), (8, "eight GPUs")):
            rows.append([f"{name}, {words} [ms]", *(ms / part / devices for ms in totals)])
    return rows


def byte_rows(found: dict[str, dict], eager: dict[str, dict]) -> list[list]:
    """Gigabytes of the classes that matrix products do not hide, and their time."""
    rows = []
    for kind in ("elementwise", "head and loss"):
        rows.append([f"{kind}, op by op [GB]", *(e[kind] / 1e9 for e in eager.values())])
        rows.append([f"{kind}, once [GB]", *(f["bytes"][kind] / 1e9 for f in found.values())])
    rows.append(["attention [GB]", *(f["bytes"]["attention"] / 1e9 for f in found.values())])
    once = [sum(f["bytes"].values()) for f in found.values()]
    for device, (_, bandwidth) in DATA_SHEETS.items():
        for devices, words in ((1, f"one {device}"), (8, f"eight {device}")):
            times = (1e3 * n / bandwidth / devices for n in once)
            rows.append([f"floor of all, once, {words} [ms]", *times])
    return rows


def paper_optimizer(cfg: t.Config) -> list[str]:
    """The optimizer of one rank alone and of one among eight."""
    by_ranks = [optimizer_counts(cfg, ranks) for ranks in (1, 8)]
    rows = [
        ["Newton-Schulz [GFLOP]", *(o["flops"] / 1e9 for o in by_ranks)],
        ["bytes, once [MB]", *(o["bytes"] / 1e6 for o in by_ranks)],
        ["sent, one all-reduce and a float32 gather [MB]", *(o["before"] / 1e6 for o in by_ranks)],
        ["sent, parts and a bf16 gather [MB]", *(o["after"] / 1e6 for o in by_ranks)],
    ]
    return [
        "## Optimizer and messages",
        "",
        *wrap(
            "Matrices of one shape are cut into equal parts, so some ranks carry padding. Their "
            "gradients are summed where they are used (reduce-scatter), the few others everywhere "
            "(all-reduce), two messages in all; updates travel in bf16 (all-gather), a message for "
            "each shape, while the next shape is computed. "
            "A compiled backward hands out all gradients at its end: none can leave earlier."
        ),
        "",
        *table(["per step and rank", "one rank", "eight ranks"], rows),
    ]


def predictions(cfg: t.Config, names: list[str], found: dict, eager: dict) -> list[str]:
    """What each change can save at most, before anybody has measured it."""
    bandwidth, link = DATA_SHEETS["H200"][1], 450e9
    eight, orthogonal = optimizer_counts(cfg, 8), newton_schulz_bytes(cfg)

    def saved(kind: str) -> list[float]:
        return [
            1e3 * (e[kind] - f["bytes"][kind]) / bandwidth
            for e, f in zip(eager.values(), found.values(), strict=True)
        ]

    plans = len(names)
    rows = [
        ["elementwise chains in one pass, from op by op", *saved("elementwise")],
        ["head and loss in one pass, from op by op", *saved("head and loss")],
        [
            "Newton-Schulz compiled, from op by op",
            *[1e3 * (orthogonal[0] - orthogonal[1]) / bandwidth] * plans,
        ],
        [
            "parts in place of one all-reduce, eight GPUs",
            *[1e3 * (eight["before"] - eight["after"]) / link] * plans,
        ],
        [
            "updates hidden behind Newton-Schulz, eight GPUs",
            *[1e3 * eight["hidden"] / link] * plans,
        ],
    ]
    return [
        "## Predictions",
        "",
        *wrap(
            "The most that a change can save, in ms of a step on one H200 where nothing else is "
            "said: the bytes that it no longer moves, over the bandwidth. The first two are the "
            "distance from no compiler to one pass; the compiler already goes a part of it."
        ),
        "",
        *table(["saved at most [ms]", *names], rows),
    ]


# --- measured on a device ---

CLASSES = (  # the first that matches an operation's name or its tensors' sizes
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"attention|flash|fmha|sdpa"),
    ("head and loss", r"nll|softmax|cross_entropy|tanh"),
    ("matrix products", r"\bmm\b|addmm|bmm|gemm|matmul|nvjet|cutlass|mlp_up|\bproduct\b"),
)


def classify(name: str, shapes: list, vocab_size: int) -> str:
    """The class of an operation of a forward or backward."""
    if any(isinstance(shape, (list, tuple)) and vocab_size in shape for shape in shapes):
        return "head and loss"
    found = (kind for kind, words in CLASSES if re.search(words, name, re.IGNORECASE))
    return next(found, "elementwise")


def probe(rt: t.Runtime) -> tuple[float, float]:
    """Operations and bytes per second of this device: a large product, and a large copy."""
    cuda = rt.device.type == "cuda"
    side, numbers = (8192, 2**30) if cuda else (512, 2**22)
    a, b = (torch.randn(side, side, device=rt.device, dtype=rt.compute_dtype) for _ in "ab")
    source = torch.zeros(numbers, dtype=torch.uint8, device=rt.device)
    target = torch.empty_like(source)
    product = best_seconds(lambda: a @ b, rt)
    copy = best_seconds(lambda: target.copy_(source), rt)
    return 2 * side**3 / product, 2 * numbers / copy


def best_seconds(action, rt: t.Runtime) -> float:
    """The shortest of some tries, each of several calls."""
    found = []
    for _ in range(6):
        rt.synchronize()
        begun = time.perf_counter()
        for _ in range(5):
            action()
        rt.synchronize()
        found.append((time.perf_counter() - begun) / 5)
    return min(found)


@contextlib.contextmanager
def profiled(rt: t.Runtime, kinds: collections.Counter, kind_of):
    """Add the seconds that operations inside the block keep the device busy to `kinds`."""
    cuda = rt.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, record_shapes=True) as session:
        yield
        rt.synchronize()
    kinds.update(book(session.key_averages(group_by_input_shape=True), kind_of, cuda=cuda))


def book(events, kind_of, *, cuda: bool) -> collections.Counter:
    """Seconds by class. On a GPU each kernel counts once, by its name.

    A kernel's name does not tell the head's products from others: the operations that launched
    kernels know their shapes, and move their time from one class to the other.
    """
    seconds = collections.Counter()
    for event in events:
        on_host = event.device_type == torch.autograd.DeviceType.CPU
        kind, by_name = kind_of(event.key, event.input_shapes), kind_of(event.key, [])
        if not cuda:
            seconds[kind] += 1e-6 * event.self_cpu_time_total
        elif not on_host and not event.is_user_annotation:
            seconds[by_name] += 1e-6 * event.self_device_time_total
        elif on_host and kind != by_name == "matrix products":
            seconds[kind] += 1e-6 * event.self_device_time_total
            seconds[by_name] -= 1e-6 * event.self_device_time_total
    return seconds


def profile_plan(plan, model, forward, batches, cfg, rt, args: argparse.Namespace) -> dict:
    """Time whole steps, then see what occupies the device in the two halves of a step."""
    optimizers, ema = t.make_optimizers(model, cfg, rt), t.Ema(model, cfg.ema_decay)
    t.set_schedule(optimizers, 0, 0.0, cfg)
    count = cfg.micro_batches(rt.world_size)

    def gradients() -> None:
        for micro in next(batches).chunk(count):
            loss = forward(*t.inputs_and_targets(micro), plan=plan)
            (loss / count / rt.world_size).backward()

    def update() -> None:
        t.apply_gradients(model, optimizers.values(), cfg.grad_clip_norm, rt)
        ema.update()

    def of_update(name: str, shapes: list) -> str:
        kind = classify(name, [], cfg.vocab_size)
        return kind if kind == "communication" else "optimizer"

    for steps in (args.warm, args.steps):  # the last ones count
        rt.synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            gradients()
            update()
        rt.synchronize()
        wall = (time.perf_counter() - begun) / max(steps, 1)
    kinds = collections.Counter()
    for _ in range(args.profile_steps):
        with profiled(rt, kinds, lambda name, shapes: classify(name, shapes, cfg.vocab_size)):
            gradients()
        with profiled(rt, kinds, of_update):
            update()
    found = {kind: 1e3 * seconds / args.profile_steps for kind, seconds in kinds.items()}
    found["host, device idle"] = max(1e3 * wall - sum(found.values()), 0.0)
    return dict(step_ms=1e3 * wall, ms=found)


def profile(cfg: t.Config, args: argparse.Namespace) -> dict:
    """Every depth plan on this device, with the floors of the rates measured on it."""
    with t.Runtime(cfg, os.environ) as rt:
        _, kernel, _ = t.select_attention(cfg.attention, rt.device, rt.compute_dtype)
        _, kernels, _ = t.select_kernels(cfg.kernels, rt.device, rt.compute_dtype)
        model = t.GPT(cfg, kernel, rt.compute_dtype, kernels)
        model.init_weights(cfg.seed)
        forward = rt.compile(model.to(rt.device))
        loader = t.Loader(
            t.find_shards(cfg.dataset_dir, "train"),
            seq_len=cfg.train_seq_len, vocab_size=cfg.vocab_size, seed=cfg.seed, order=cfg.loader,
        )  # fmt: skip
        flops_rate, bandwidth = probe(rt)
        record = dict(flops_per_second=flops_rate, bytes_per_second=bandwidth, plans={})
        batches = loader.batches(rt, cfg.train_batch_tokens // cfg.train_seq_len)
        optimizer = optimizer_counts(cfg, rt.world_size)
        with contextlib.closing(batches):
            for name, plan in both_plans(cfg).items():
                say(f"profile {name}: {len(plan.visits)} visits")
                found = profile_plan(plan, model, forward, batches, cfg, rt, args)
                paper = counts(cfg, plan)
                work = paper["flops"] | dict(optimizer=optimizer["flops"] * rt.world_size)
                moved = paper["bytes"] | dict(optimizer=optimizer["bytes"] * rt.world_size)
                found["floor_ms"] = {
                    kind: dict(
                        flops=1e3 * work.get(kind, 0.0) / flops_rate / rt.world_size,
                        bytes=1e3 * moved.get(kind, 0.0) / bandwidth / rt.world_size,
                    )
                    for kind in {**work, **moved}
                }
                record["plans"][name] = found
    return record


def profile_page(record: dict) -> list[str]:
    """The tables of `profile`."""
    lines = [
        f"Measured rates: {record['flops_per_second'] / 1e12:,.3f} TFLOP/s in a large matrix "
        f"product, {record['bytes_per_second'] / 1e9:,.1f} GB/s in a large copy. A step is timed "
        "without the profiler, its classes under it."
    ]
    for name, found in record["plans"].items():
        rows = []
        for kind in {**found["floor_ms"], **found["ms"]}:
            floor, ms = found["floor_ms"].get(kind, {}), found["ms"].get(kind, 0.0)
            shown = [f"{floor[k]:.3f}" if floor.get(k) else "" for k in ("flops", "bytes")]
            rows.append([kind, f"{ms:.3f}", f"{ms / found['step_ms']:.1%}", *shown])
        head = ["class", "ms", "of a step", "floor by FLOPs [ms]", "floor by bytes [ms]"]
        lines += ["", f"{name}: {found['step_ms']:.3f} ms a step", "", *table(head, rows)]
    return lines


# --- the command ---


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pairs(words: list[str]) -> dict[str, str]:
    """NAME=VALUE words as variables."""
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise t.ConfigError(f"{wrong[0]}: expected NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, many = parser.add_argument, dict(action="append", default=[], metavar="NAME=VALUE")
    add("--other", type=Path, help="another script of this family, to run in turns with ours")
    add("--set", **many, help="a variable for both programs")
    add("--ours-set", **many, help="a variable for ours alone")
    add("--other-set", **many, help="a variable for the other alone")
    add("--rounds", type=int, default=3, help="runs of each program")
    add("--steps", type=int, default=50, help="steps of each depth plan in a run")
    add("--warm", type=int, default=10, help="first steps of a plan that do not count")
    add("--log-every", type=int, default=10, help="steps between two lines")
    add("--ranks", type=int, default=1, help="GPUs, by torchrun")
    add("--timeout", type=float, default=1800.0, help="longest run [s]")
    add("--profile", action="store_true", help="classes of time in our own step, no other script")
    add("--profile-steps", type=int, default=3, help="steps under the profiler")
    add("--paper", action="store_true", help="print records/profile.md and end")
    add("--out", type=Path, default=Path("logs"), help="folder for bench-TIME.json and .md")
    return parser.parse_args(argv)


def bench(args: argparse.Namespace) -> None:
    """Do what the arguments say; main of one process."""
    variables = {**os.environ, **pairs(args.set), **pairs(args.ours_set)}
    cfg = t.Config.from_env(variables, cuda=torch.cuda.is_available())
    if args.paper:
        print(paper(t.Config()), end="")
        return
    if args.other and not args.other.is_file():
        raise t.ConfigError(f"{args.other}: no such file; give the other script's path")
    now = datetime.datetime.now().astimezone()
    record = dict(
        started=now.isoformat(timespec="seconds"),
        hardware=t.Runtime(cfg, {}).describe() | dict(devices=max(torch.cuda.device_count(), 1)),
        command=" ".join(sys.argv[1:]),
        **(dict(profile=profile(cfg, args)) if args.profile else side_by_side(cfg, args)),
    )
    if os.environ.get("RANK", "0") != "0":
        return
    body = profile_page(record["profile"]) if args.profile else timing_page(record)
    facts = record["hardware"]
    title = f"{facts['device']}, torch {facts['torch']}, {record['started']}"
    page = "\n".join(["# Step time", "", title, "", *body]) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(record, indent=1)), ("md", page)):
        path = args.out / f"bench-{now:%Y%m%d-%H%M%S}.{suffix}"
        t.atomic_write(path, text.encode())
        say(f"wrote {path}")
    print(page)


def main(argv: list[str] | None = None) -> int:
    try:
        bench(arguments(argv))
    except t.UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
