#!/usr/bin/env python3
"""Time the steps of train_gpt.py, alone or beside another script of this family.

    python records/bench.py --set DATA_PATH=FOLDER --set TOKENIZER_PATH=FILE
    python records/bench.py --other SCRIPT.py --set DATA_DIR=FOLDER --rounds 3
    python records/bench.py --profile       # where the time goes, beside the floors of each class
    python records/bench.py --paper         # those floors by data sheets: records/profile.md
    python records/bench.py --train 300 --set DATA_PATH=FOLDER --out NEW_FOLDER

Both programs get the same variables, batch and steps, and take turns. A step's time is the distance
between two lines of the training log by this program's own clock, so it does not matter what a
script says about itself. Both depth plans come from one run: the loop begins half-way. A script is
stopped after its last training line. JSON and Markdown go to OUT.

--train runs the whole program for that many seconds of training and writes its log, its JSON and a
README.md with what was seen beside the figures that the authors of #1493 published.
"""

import argparse
import collections
import contextlib
import datetime
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from compare import measures
from runs import RECORDS, Run, Submission, exit_status, markdown_table

import train_gpt as t

ROOT = RECORDS.parent
STEP_LINE = re.compile(r"(?:^|[\s:])(\d+)/\d+ train_loss: ?\S+")
LOOP_LINE = re.compile(r"layer_loop:enabled step:(\d+)|recurrence:activated at step (\d+)")
CLAIM = re.compile(r"tok/s: ?\d+|step_avg: ?[\d.]+ms")
PUBLISHED = {  # by the authors of system #1493, on 8xH100
    "training loss at step 1": "9.009",
    "training loss at step 2": "12.4 to 12.9",
    "training loss at step 5": "about 8",
    "training loss at step 500": "3.33",
    "training loss at step 1000": "3.19",
    "ms per step, 11 visits": "102.0",
    "ms per step, 17 visits": "150.5",
    "tokens per second": "7.71 M, then 5.21 M",
    "peak memory per GPU": "39.0 GB",
}
STAND_IN = '''"""A stand-in for FlashAttention 3: the attention kernels inside PyTorch."""

import torch
import torch.nn.functional as F


def flash_attn_func(q, k, v, causal=False, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, **options
):
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        window = (-1, 0 if causal else -1)
        return varlen_attn(q, k, v, *bounds, window_size=window, enable_gqa=True)
    lengths = [bounds.diff().tolist() for bounds in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
    rows = zip(*(x[None].split(n, 1) for x, n in zip((q, k, v), lengths)))
    return torch.cat([flash_attn_func(*row, causal)[0] for row in rows if row[0].numel()])
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


def command(program: Program, ranks: int) -> list[str]:
    """How a script is started, alone or by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(launcher if ranks > 1 else []), str(program.path)]


def run_once(
    program: Program, env: dict[str, str], folder: Path, args: argparse.Namespace
) -> tuple[list[Line], int | None]:
    """Run a script up to its last training line: (its lines, the step at which the loop began).

    Raises: t.ConfigError with the script's last lines if it ends, or time runs out, before.
    """
    every, tail, lines, loop = args.log_every, collections.deque(maxlen=12), [], None
    last = int(env["ITERATIONS"]) // every * every
    begun = time.perf_counter()
    process = subprocess.Popen(
        command(program, args.ranks), cwd=folder, env=env, text=True, errors="replace",
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
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
    stand_in = "stand-in by the kernels of PyTorch, because flash_attn_interface is not installed"
    return dict(
        attention_of_ours=attention_name(cfg),
        attention_of_other="flash_attn_interface as installed" if has_fa3 else stand_in,
        variables={p.name: p.variables for p in programs} | {"both": pairs(args.set)},
        sources={p.name: t.file_sha256(p.path) for p in programs},
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
            per_token = mfu_flops_per_token(cfg, both_plans(cfg)[plan])
            found["mfu"] = found["ours"]["tokens_per_second"] * per_token / peak / ranks
    return {plan: found for plan, found in summary.items() if found}


def spread(values: list[float]) -> dict[str, float]:
    return dict(median=statistics.median(values), low=min(values), high=max(values), n=len(values))


def timing_page(record: dict) -> list[str]:
    """The table of `side_by_side`."""
    rows, notes = [], []
    for plan, found in record["summary"].items():
        for name in ("ours", "other"):
            if name in found:
                s = found[name]
                times = f"{s['median']:.2f} ({s['low']:.2f} to {s['high']:.2f})"
                rows.append([plan, name, times, f"{s['tokens_per_second']:,.0f}", s["n"]])
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
    head = ["plan", "program", "ms per step (lowest to highest)", "tokens/s", "n"]
    times = (f"{PUBLISHED[f'ms per step, {n} visits']} ms with {n} visits" for n in (11, 17))
    notes.append(
        "Published by the authors of system #1493, on 8xH100, and not measured here: "
        f"{' and '.join(times)}, 786,432 tokens a step."
    )
    return [*markdown_table(head, rows), "", *notes]


# --- the whole program for some minutes ---


def train(cfg: t.Config, args: argparse.Namespace) -> int:
    """Train, quantize and score, then write the page; returns the exit status of the run."""
    chosen = dict(
        LOG_DIR=args.out.resolve(),
        RUN_ID=f"seed{cfg.seed}",
        SEED=cfg.seed,
        MAX_WALLCLOCK_SECONDS=args.train,
        VAL_TOKENS=2_000_000,
        VAL_LOSS_EVERY=0,
        TRAIN_LOG_EVERY=25,
        TTT_ENABLED=0,
    )
    chosen = {name: str(value) for name, value in chosen.items()}
    chosen |= pairs(args.set) | pairs(args.ours_set)
    program = Program("ours", ROOT / "train_gpt.py", {})
    status = subprocess.run(command(program, args.ranks), env={**os.environ, **chosen}).returncode
    if status == 0:
        run = Run.read(Path(chosen["LOG_DIR"]) / f"{chosen['RUN_ID']}.json")
        page = "\n".join(train_page(run, chosen)) + "\n"
        t.atomic_write(args.out / "README.md", page.encode())
        shutil.copy(program.path, args.out)
        print(page)
    return status


def train_page(run: Run, variables: dict[str, str]) -> list[str]:
    """What a run logged beside what was published: speed and losses, then bits per byte."""
    facts, result = run.facts, run.result
    last, batch = facts["curve"][-1], run.settings["train_batch_tokens"]
    found = {f"training loss at step {e['step']}": e["train_loss"] for e in facts["curve"]}
    for key, ms in facts["step_ms"].items():
        found[f"ms per step, {key.replace('_', ' ')}"] = f"{ms:.1f}"
    speed = (last["step"] - 1) * batch / last["train_seconds"]
    found["tokens per second"] = f"{speed:,.0f}, mean of the run"
    if "peak_memory_bytes" in facts:
        found["peak memory per GPU"] = f"{facts['peak_memory_bytes'] / 1e9:.1f} GB"
    shown = {k: v if isinstance(v, str) else f"{v:.4f}" for k, v in found.items()}
    rows = [[name, value, PUBLISHED.get(name, "")] for name, value in shown.items()]
    theirs = Submission.read(RECORDS / "published" / "1493.json")
    known = measures(theirs.stages)
    for name, (value,) in measures({stage: [bpb] for stage, bpb in run.bpb.items()}).items():
        mean = f"{statistics.fmean(known[name]):.4f}" if name in known else ""
        rows.append([f"{name} [bpb]", f"{value:.4f}", mean])
    rows.append(["total [bytes]", f"{result['total_bytes']:,}", f"{theirs.size('bytes_total'):,}"])
    places = ("DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "LOG_DIR")
    words = " ".join(f"{k}={v}" for k, v in variables.items() if k not in places)
    data = facts["data"]
    about = (
        "A check of the program, not a record: n = 1, scored on "
        f"{data['val_tokens']:,} targets ({data['val_bytes']:,} bytes). Compare the published bits "
        "per byte only if these are the challenge's validation text; differences between stages "
        f"compare better. Made from `{run.name}.json`; the log is `{run.name}.txt`."
    )
    return [
        f"# {result['steps']} steps beside system #1493", "", *wrap(about), "",
        f"{run.hardware}, torch {facts['runtime']['torch']}.", "",
        f"    {words} python train_gpt.py", "",
        *markdown_table(["figure", "here", "published, 8xH100"], rows),
    ]  # fmt: skip


# --- the inside of the program: these functions alone know its classes ---


def both_plans(cfg: t.Config) -> dict[str, t.DepthPlan]:
    """The depth plans of a run by the names they have in every table here."""
    plans = {name: t.depth_plan(cfg, looped=name == "looped") for name in ("plain", "looped")}
    return plans if plans["plain"] != plans["looped"] else {"plain": plans["plain"]}


def meta_model(cfg: t.Config) -> t.GPT:
    """The model without its numbers."""
    with torch.device("meta"):
        return t.GPT(cfg)


def mfu_flops_per_token(cfg: t.Config, plan: t.DepthPlan) -> float:
    """What MFU counts: a backward of attention as twice its forward, though kernels do more."""
    return meta_model(cfg).flops_per_token(plan, cfg.train_seq_len)


def matrices(cfg: t.Config, plan: t.DepthPlan) -> tuple[list[torch.Size], torch.Size]:
    """Shapes (outputs, inputs) of the matrices that a forward uses, once a visit; the head's."""
    model = meta_model(cfg)
    modules = (m for visit in plan.visits for m in model.blocks[visit.layer].modules())
    return [m.weight.shape for m in modules if isinstance(m, t.Linear)], model.head.weight.shape


def optimizer_tensors(cfg: t.Config, ranks: int) -> tuple[list[list[torch.Size]], int]:
    """Shapes of the matrices of each batch of Muon, and how many numbers AdamW has."""
    rt = t.Runtime(cfg, {"WORLD_SIZE": str(ranks)})
    optimizers = t.make_optimizers(meta_model(cfg), cfg, rt)
    batches = [[p.shape for p in params] for params in optimizers.pop("matrix").batches]
    others = (p for o in optimizers.values() for p in o.param_groups[0]["params"])
    return batches, sum(p.numel() for p in others)


def attention_name(cfg: t.Config) -> str:
    """The attention kernel that the program chooses on this machine."""
    return t.choose_attention(cfg.attention, t.Runtime(cfg, {}), documents=cfg.doc_masking)[0]


Halves = tuple[Callable[[], None], Callable[[], None]]


@contextlib.contextmanager
def training(cfg: t.Config, rt: t.Runtime) -> Iterator[Callable[[t.DepthPlan], Halves]]:
    """A function from a plan to the two halves of its steps: all gradients, and the update."""
    model = t.GPT(cfg, t.choose_backend(cfg, rt, documents=cfg.doc_masking))
    model.init_weights(cfg.seed)
    rt.compile(model.to(rt.device))
    loader, ranks = t.Loader(t.find_shards(cfg.dataset_dir, "train"), cfg), rt.world_size

    def halves(plan: t.DepthPlan) -> Halves:
        optimizers, ema = t.make_optimizers(model, cfg, rt), t.Ema(model, cfg.ema_decay)
        t.set_schedule(optimizers, 0, 0.0, cfg)
        forward = functools.partial(model, plan=plan._replace(masked=cfg.doc_masking))

        def gradients() -> None:
            t.add_gradients(forward, next(batches), cfg.micro_rows(ranks), cfg.train_rows)

        def update() -> None:
            t.apply_gradients(model, optimizers.values(), cfg.grad_clip_norm, rt)
            ema.update()

        return gradients, update

    batches = loader.batches(rt, cfg.train_rows)
    with contextlib.closing(batches):
        yield halves


# --- counted on paper ---


class Operation(NamedTuple):
    """Work that is done in one piece: its class, operations, and bytes read and written once."""

    kind: str
    flops: float
    bytes: float


def products(kind: str, shape: torch.Size, tokens: int, passes: int) -> list[Operation]:
    """A matrix (outputs, inputs): forward, gradient of the input, gradient of the weight; bf16.

    Each reads two of input, weight and output and writes the third; the weight once a pass.
    """
    outputs, inputs = shape
    numbers = tokens * (inputs + outputs) + passes * outputs * inputs
    return 3 * [Operation(kind, 2.0 * tokens * outputs * inputs, 2.0 * numbers)]


def operations(cfg: t.Config, plan: t.DepthPlan) -> list[Operation]:
    """The matrix products, attention and loss of a step, of all ranks together."""
    tokens, passes = cfg.train_batch_tokens, cfg.train_rows // cfg.micro_rows(1)
    width, vocab = cfg.model_dim, cfg.vocab_size
    both = width + width // cfg.num_heads * cfg.num_kv_heads  # queries or outputs; keys or values
    shapes, head = matrices(cfg, plan)
    found = [o for shape in shapes for o in products("matrix products", shape, tokens, passes)]
    forward = 2.0 * cfg.train_seq_len * width * tokens  # causal: half of the square
    for _ in plan.visits:
        # Forward: q, k, v, out, in two products. Backward: these, the gradient of out, and those
        # of q, k, v, in five products, because it computes q k^T again.
        found.append(Operation("attention", forward, 2.0 * tokens * 2 * both))
        found.append(Operation("attention", 2.5 * forward, 2.0 * tokens * 4 * both))
    found += products("head and loss", head, tokens, passes)  # three passes over logits, and
    found.append(Operation("head and loss", 0.0, 2.0 * tokens * vocab))  # read by the loss
    found.append(Operation("head and loss", 0.0, 2.0 * tokens * 2 * vocab))  # and by its gradient
    return found


def optimizer_operations(cfg: t.Config, ranks: int) -> list[Operation]:
    """Newton-Schulz in bf16 and the update in float32, of one rank, which has its part of Muon."""
    batches, others = optimizer_tensors(cfg, ranks)
    found, all_of_muon = [], 0
    for shapes in batches:
        m, n = sorted(shapes[0])
        all_of_muon += len(shapes) * m * n
        part = -(-len(shapes) // ranks)
        for flops, numbers in (
            (2 * m * m * n, m * n + m * m),  # x x^T
            (2 * m * m * m, 2 * m * m),  # its square
            (2 * m * m * n, m * m + 2 * m * n),  # their sum times x
        ):
            times = part * cfg.muon_backend_steps
            found.append(Operation("optimizer", float(times * flops), 2.0 * times * numbers))
    # Muon: gradient, and momentum read and written, of a part; weight and average, read and
    # written. AdamW: gradient; two moments, weight and average, read and written.
    numbers = (3 / ranks + 4) * all_of_muon + 9 * others
    return [*found, Operation("optimizer", 0.0, 4.0 * numbers)]


def sent_bytes(cfg: t.Config, ranks: int) -> float:
    """Bytes that a rank sends in a step: float32 gradients, in parts or all, and bf16 updates."""
    batches, others = optimizer_tensors(cfg, ranks)
    padded = sum(-(-len(b) // ranks) * ranks * math.prod(b[0]) for b in batches)
    hop = (ranks - 1) / ranks  # of a message, what a rank sends in a reduce-scatter or all-gather
    return hop * ((4 + 2) * padded + 2 * 4 * others)


def floor_ms(work: Iterable[Operation], flops_rate: float, bandwidth: float) -> float:
    """Milliseconds below which no device of these rates does the operations one after the other.

    An operation takes the longer of its two times; another one does not overlap with it.
    """
    return 1e3 * sum(max(o.flops / flops_rate, o.bytes / bandwidth) for o in work)


def of_kind(work: Iterable[Operation], kind: str) -> list[Operation]:
    return [o for o in work if o.kind == kind]


def paper(cfg: t.Config) -> str:
    """The page records/profile.md."""
    sheets = "; ".join(
        f"{name} {t.PEAKS[name][0] / 1e12:,.1f} TFLOP/s dense bf16 and "
        f"{t.PEAKS[name][1] / 1e12:.2f} TB/s"
        for name in ("H100", "H200")
    )
    intro = (
        "Nothing on this page was measured: `python records/bench.py --paper` counts it from the "
        f"settings. {cfg.train_batch_tokens:,} tokens a step in sequences of "
        f"{cfg.train_seq_len:,}; {cfg.num_layers} layers {cfg.model_dim} wide; "
        f"{cfg.vocab_size:,} tokens in the vocabulary. Rates are those of the vendor's data "
        f"sheets, which no real operation reaches: {sheets}. `--profile` measures a step, and the "
        "same floors at rates measured on the device."
    )
    floors = (
        "An operation reads its inputs once and writes its outputs once, in bf16, and takes at "
        "least the longer of its time by FLOPs and its time by bytes; the floor is the sum over "
        "operations, for this division into operations. Attention executes 3.5 times the FLOPs of "
        "its forward; MFU counts 3 times by convention. The logits are passed over six times: "
        "written, read by the loss and by its gradient, which is written and read by two products. "
        "Elementwise operations and the embedding have no floor here, because fusion can move an "
        "elementwise operation into a product. The floor of a step includes the optimizer."
    )
    optimizer = (
        "The matrices of one batch of Muon are cut into equal parts, one for each rank, so some "
        "ranks carry padding. Their gradients travel by reduce-scatter, the others by all-reduce, "
        "both in float32, and the updates by all-gather in bf16."
    )
    lines = ["# One step on paper", "", *wrap(intro), "", "## Floors", "", *wrap(floors), ""]
    lines += [*step_table(cfg), "", "## Optimizer and messages", "", *wrap(optimizer), ""]
    return "\n".join([*lines, *optimizer_table(cfg)]) + "\n"


def wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_on_hyphens=False)


def number_table(head: list[str], rows: list[list]) -> list[str]:
    """A table whose numbers have one decimal."""
    shown = [[x if isinstance(x, str) else f"{x:,.1f}" for x in row] for row in rows]
    return markdown_table(head, shown)


def step_table(cfg: t.Config) -> list[str]:
    """FLOPs, bytes and floors of a step in each plan."""
    plans = both_plans(cfg)
    work = {name: operations(cfg, plan) for name, plan in plans.items()}
    per_token = [mfu_flops_per_token(cfg, plan) for plan in plans.values()]
    rows = [["MFLOP per token, as MFU counts", *(n / 1e6 for n in per_token)]]
    step_flops = (n * cfg.train_batch_tokens / 1e12 for n in per_token)
    rows.append(["all, as MFU counts [TFLOP]", *step_flops])
    kinds = list(dict.fromkeys(o.kind for o in work["plain"]))
    for kind in kinds:
        parts = [of_kind(w, kind) for w in work.values()]
        rows.append([f"{kind} [TFLOP]", *(sum(o.flops for o in p) / 1e12 for p in parts)])
        rows.append([f"{kind} [GB]", *(sum(o.bytes for o in p) / 1e9 for p in parts)])
    for device in ("H100", "H200"):
        for kind in kinds:
            floors = (floor_ms(of_kind(w, kind), *t.PEAKS[device]) for w in work.values())
            rows.append([f"floor of {kind}, one {device} [ms]", *floors])
        for ranks, words in ((1, "one"), (8, "eight")):
            last = floor_ms(optimizer_operations(cfg, ranks), *t.PEAKS[device])
            floors = (floor_ms(w, *t.PEAKS[device]) / ranks + last for w in work.values())
            rows.append([f"floor of a step, {words} {device} [ms]", *floors])
    names = [f"{name}, {len(plan.visits)} visits" for name, plan in plans.items()]
    return number_table(["per step", *names], rows)


def optimizer_table(cfg: t.Config) -> list[str]:
    """The optimizer of one rank alone and of one among eight."""
    counts = {ranks: optimizer_operations(cfg, ranks) for ranks in (1, 8)}
    rows = [
        ["Newton-Schulz [GFLOP]", *(sum(o.flops for o in w) / 1e9 for w in counts.values())],
        ["bytes [MB]", *(sum(o.bytes for o in w) / 1e6 for w in counts.values())],
        ["floor, H100 [ms]", *(floor_ms(w, *t.PEAKS["H100"]) for w in counts.values())],
        ["sent [MB]", *(sent_bytes(cfg, ranks) / 1e6 for ranks in counts)],
    ]
    return number_table(["per step and rank", "one rank", "eight ranks"], rows)


# --- measured on a device ---

CLASSES = (  # the first that matches an operation's name or its tensors' sizes
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"attention|flash|fmha|sdpa"),
    ("head and loss", r"nll|softmax|cross_entropy|tanh|\b(losses|slopes)\b"),
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

    The name of a matrix product's kernel does not say whether it is the head's. The operation that
    launched it has the shapes, so its time is moved from one class to the other.
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


def profile_plan(halves: Halves, cfg: t.Config, rt: t.Runtime, args: argparse.Namespace) -> dict:
    """Time whole steps, then see what occupies the device in the two halves of a step."""
    gradients, update = halves

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
    with t.Runtime(cfg, os.environ) as rt, training(cfg, rt) as halves_of:
        rates = probe(rt)
        record = dict(flops_per_second=rates[0], bytes_per_second=rates[1], plans={})
        optimizer = floor_ms(optimizer_operations(cfg, rt.world_size), *rates)
        for name, plan in both_plans(cfg).items():
            say(f"profile {name}: {len(plan.visits)} visits")
            found = profile_plan(halves_of(plan), cfg, rt, args)
            work = operations(cfg, plan)
            found["floor_ms"] = {
                kind: floor_ms(of_kind(work, kind), *rates) / rt.world_size
                for kind in dict.fromkeys(o.kind for o in work)
            }
            found["floor_ms"]["optimizer"] = optimizer
            record["plans"][name] = found
    return record


def profile_page(record: dict) -> list[str]:
    """The tables of `profile`."""
    lines = [
        f"Measured rates: {record['flops_per_second'] / 1e12:,.3f} TFLOP/s in a large matrix "
        f"product, {record['bytes_per_second'] / 1e9:,.1f} GB/s in a large copy. A step is timed "
        "without the profiler, its classes under it. Floors are those of profile.md at these rates."
    ]
    for name, found in record["plans"].items():
        rows = []
        for kind in {**found["floor_ms"], **found["ms"]}:
            floor, ms = found["floor_ms"].get(kind), found["ms"].get(kind, 0.0)
            shown = "" if floor is None else f"{floor:.3f}"
            rows.append([kind, f"{ms:.3f}", f"{ms / found['step_ms']:.1%}", shown])
        table = markdown_table(["class", "ms", "of a step", "floor [ms]"], rows)
        lines += ["", f"{name}: {found['step_ms']:.3f} ms a step", "", *table]
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
    add("--train", type=float, metavar="SECONDS", help="the whole program, and a page beside #1493")
    add("--out", type=Path, default=Path("logs"), help="folder for what is written")
    return parser.parse_args(argv)


def bench(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    if args.paper:
        print(paper(t.Config()), end="")
        return 0
    variables = {**os.environ, **pairs(args.set), **pairs(args.ours_set)}
    cfg = t.Config.from_env(variables, cuda=torch.cuda.is_available())
    if args.train:
        return train(cfg, args)
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
        return 0
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
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run with these arguments; 2 and a line on stderr for an error that the user can fix."""
    args = arguments(argv)
    return exit_status(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())
