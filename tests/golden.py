"""Holds train_gpt.py against numbers that the code of #1493, #578 and #1487 produced.

The numbers are in golden/golden.json; golden/README.md says what each is, by which rule weights and
tokens are made, and why the tolerances are what they are. test_golden.py runs it.
"""

import base64
import dataclasses
import functools
import itertools
import json
import math
import re
import shlex
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_gpt as t

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "data" / "sample"
GOLDEN = json.loads((HERE / "golden" / "golden.json").read_text(encoding="utf-8"))["systems"]
READ = 2.0**-20  # seconds by which the simulated clock moves on whenever it is read

# --- Adapter ------------------------------------------------------------------------------------
# All that is known of the program's inside. After a refactoring only this class needs care.


class Project:
    """The program with the settings of a system; nothing else here touches the program."""

    FOLDERS = {
        "1493": "2026-04-09_System1493",
        "578": "2026-03-23_System578",
        "1487": "2026-04-09_System1487",
    }
    # Role -> parameter name. A role is what a tensor does; golden.json knows roles alone.
    LAYER = dict(
        q="attn.q.weight",
        k="attn.k.weight",
        v="attn.v.weight",
        out="attn.out.weight",
        up="mlp.up.weight",
        down="mlp.down.weight",
        q_gain="attn.q_gain",
        attn_scale="attn_scale",
        mlp_scale="mlp_scale",
        resid_mix="resid_mix",  # row 0: of the running stream, row 1: of the embedding stream
    )
    OTHERS = {
        "embedding": "head.weight",  # tied: also the head
        "skip_weights": "skip_weights",  # a row for each skip, as they are popped
        "skip_gates": "skip_gates",
        "lane_merge": "lane_merge",  # the part of the attention lane
        "smear_gate": "smear_gate",
        "bigram.table": "bigram.table",
        "bigram.proj": "bigram.proj.weight",
        "bigram.scale": "bigram.scale",
        "value.table": "value_embedding.table",
        "value.proj": "value_embedding.proj.weight",
        "value.scale": "value_embedding.scale",
        "value.layer_scales": "value_embedding.layer_scales",  # one per layer, rising
    }

    def __init__(self, system: str):
        folder = HERE.parent / "records" / "track_10min_16mb" / self.FOLDERS[system]
        lines = (folder / "command.sh").read_text(encoding="utf-8").splitlines()
        words = (shlex.split(line)[1] for line in lines if line.startswith("export "))
        self.command = dict(word.split("=", 1) for word in words)

    def name_of(self, role: str) -> str:
        if match := re.fullmatch(r"block\.(\d+)\.(\w+)", role):
            return f"blocks.{match[1]}.{self.LAYER[match[2]]}"
        return self.OTHERS[role]

    def config(self, settings: dict[str, str]):
        """Settings (environment variables) over those of the system's command file."""
        env = dict(SMOKE="0", MICRO_BATCH_TOKENS="1000000") | self.command | settings
        return t.Config.from_env(env, cuda=False)

    def runtime(self, cfg):
        rt = t.Runtime(cfg, {})
        rt.device, rt.compute_dtype = torch.device("cpu"), torch.float32
        return rt

    def model(self, cfg) -> torch.nn.Module:
        """The model in float32, eager, on the CPU."""
        return t.GPT(cfg)

    def initialise(self, model, seed: int) -> None:
        model.init_weights(seed)

    def parameters(self, model) -> dict[str, torch.nn.Parameter]:
        """Role -> parameter, all of them."""
        layer = {name: role for role, name in self.LAYER.items()}
        others = {name: role for role, name in self.OTHERS.items()}
        found = {}
        for name, parameter in model.named_parameters():
            match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
            role = f"block.{match[1]}.{layer[match[2]]}" if match else others[name]
            found[role] = parameter
        return found

    def plan(self, cfg, looped: bool, rounded: bool = False):
        """Which layers are visited; rounded: late QAT is on."""
        plan = t.depth_plan(cfg, looped=looped)
        return plan._replace(rounded=rounded)

    def forward(self, model, plan, x, y=None) -> torch.Tensor:
        """Logits (B, T, V) after the softcap, or the mean loss of targets y."""
        return model(x, plan=plan) if y is None else model(x, y, plan=plan)

    def train(self, cfg, model, batches, seconds, *, before_step, before_average) -> None:
        """The project's whole training loop, on given batches (rows, T + 1).

        seconds: what a step takes by the simulated clock, 0: the real clock. The simulated one also
        moves on by READ seconds whenever it is read: no real clock stands still.
        before_step(looped, rounded): called in each step before its forward.
        before_average(): called once training is over and before its average is put in the model.
        """
        now, store = [1000.0], t.Ema.store

        class Batches:
            def batches(self, rt, rows, first=0):
                for i in itertools.count():
                    now[0] += seconds
                    yield batches[min(i, len(batches) - 1)]

        def before_forward(model, args, options):
            plan = options["plan"]
            before_step(len(plan.visits) > cfg.num_layers, plan.rounded)

        def clock():
            now[0] += READ
            return now[0]

        def stored(ema):
            before_average()
            store(ema)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(t.Ema, "store", stored))
            if seconds:
                stack.enter_context(mock.patch.object(time, "perf_counter", clock))
            hook = model.register_forward_pre_hook(before_forward, with_kwargs=True)
            stack.callback(hook.remove)
            t.train(model, Batches(), lambda *_: None, cfg, self.runtime(cfg))

    def hessians(self, cfg, model, windows, looped: bool) -> dict[str, torch.Tensor]:
        """Role -> mean of x x^T over the inputs of each matrix that GPTQ stores."""
        cfg = dataclasses.replace(cfg, gptq_calibration_batches=1, max_wallclock_seconds=0.0)

        class Batches:
            def batches(self, rt, rows, first=0):
                yield windows

        plan, rt = self.plan(cfg, looped), self.runtime(cfg)
        found = t.collect_hessians(model, Batches(), cfg, rt, plan=plan)
        roles = {self.name_of(role): role for role in self.parameters(model)}
        return {roles[name]: h for name, h in found.items()}

    def quantize(self, cfg, role: str, weight, hessian):
        """("codes", bits, codes, scales), or (float type, 0, the stored tensor, None)."""
        row = t.find_row(self.name_of(role), t.tensor_table(cfg))
        stored = t.quantize(weight, row.store, hessian)
        if isinstance(stored, t.Codes):
            return "codes", stored.bits, stored.codes, stored.scales
        return stored.kind, 0, stored.values, None

    def score(self, cfg, model, tokens, looped: bool, *, stride: int = 0, adapt: bool = False):
        """Losses per target (n,), nats; stride 0: windows side by side; adapt: score-first TTT."""
        plan, rt, val = self.plan(cfg, looped), self.runtime(cfg), self.text(tokens)
        chunk = cfg.ttt_chunk_tokens if adapt else 0
        protocol = t.Windows(len(tokens) - 1, cfg, stride or cfg.eval_seq_len, chunk)
        learner = t.GlobalTTT(model, plan, cfg, rt) if adapt else t.Static(model, plan)
        _, ledger = t.evaluate("golden", learner, protocol, val, rt)
        return ledger.nats

    def text(self, tokens):
        """The tokens as a text that is scored; its bytes do not matter."""
        return t.ValidationTokens(tokens, np.ones(len(tokens) - 1, np.int16), 0)

    def fine_tune(self, cfg, model, tokens, looped: bool) -> None:
        """#1487's training on the validation text."""
        plan, rt = self.plan(cfg, looped), self.runtime(cfg)
        t.fine_tune_on_validation(model, self.text(tokens), cfg, rt, plan=plan)

    def byte_table(self, vocab: int):
        """The table of the sample's tokenizer, and (bytes, begins with a space, is a boundary)."""
        table = t.ByteTable.from_file(SAMPLE / "tokenizer.model", vocab)
        return table, (table.base_bytes, table.leading_space, table.is_boundary)

    def charged(self, table, tokens: np.ndarray) -> int:
        """Bytes of tokens[1:]."""
        return int(table.charge(tokens).sum(dtype=np.int64))


# --- Rules: weights, tokens and Hessians from nothing but a label -------------------------------


def hashed(label: str, count: int) -> np.ndarray:
    """(count,) uint32: crc32(label) + i * 0x9E3779B9 (golden ratio), mixed as MurmurHash3 ends."""
    h = np.uint32(zlib.crc32(label.encode())) + np.arange(count, dtype=np.uint32) * np.uint32(
        0x9E3779B9
    )
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def uniform(label: str, count: int) -> np.ndarray:
    """(count,) float64 in (-1, 1), the same on every machine to the last bit."""
    return (hashed(label, count).astype(np.float64) + 0.5) / 2.0**31 - 1.0


CENTRES = dict(  # kind of role: (mean, half width); other matrices: (0, sqrt(3 / columns))
    embedding=(0.0, 0.25),
    table=(0.0, 0.9),
    q_gain=(1.5, 0.4),
    skip_gates=(0.0, 1.4),
    smear_gate=(0.0, 1.4),
    lane_merge=(0.4, 0.0),
)


def rule_weight(role: str, shape, salt: str = "") -> torch.Tensor:
    """The tensor of a role, float32: mean + half width * uniform."""
    shape = tuple(shape)
    numel, kind = math.prod(shape), role.rpartition(".")[2]
    value = uniform(role + salt, numel)
    if kind == "resid_mix":  # (2, D): the running stream, the embedding stream
        value = np.repeat([0.9, 0.3], numel // 2) + 0.2 * value
    elif kind in CENTRES:
        mean, half = CENTRES[kind]
        value = mean + half * value
    elif len(shape) == 2 and kind != "skip_weights":
        value = math.sqrt(3.0 / shape[1]) * value
    else:
        value = 0.8 + 0.35 * value
    return torch.from_numpy(value.reshape(shape).astype(np.float32))


def rule_tokens(label: str, count: int, vocab: int) -> np.ndarray:
    """(count,) int64: BOS (1) first and at about 1 place in 61, else small ids more often."""
    places, part = hashed(label + ":bos", count), (uniform(label, count) + 1) / 2
    ids = 2 + np.floor((vocab - 2) * part * part * part).astype(np.int64)
    ids[places % 61 == 0] = 1
    ids[0] = 1
    return ids


def rule_batches(label: str, rows: int, length: int, count: int, vocab: int) -> list[torch.Tensor]:
    """`count` batches (rows, length + 1) of a stream; rows do not overlap."""
    ids = rule_tokens(label, count * rows * (length + 1), vocab)
    return list(torch.from_numpy(ids).view(count, rows, length + 1).unbind())


def rule_matrix(role: str, rows: int, cols: int) -> torch.Tensor:
    """A matrix to quantize: as the rule, row r times 2^(r mod 8 - 4)."""
    steps = 2.0 ** (torch.arange(rows) % 8 - 4)
    return math.sqrt(cols / 3.0) * rule_weight("block.0.q", (rows, cols), role) * steps[:, None]


def rule_hessian(role: str, cols: int, dead: bool) -> torch.Tensor:
    """A^T A / 2^18 of a 512 x cols matrix A of whole numbers: exact in float64, then float32.

    Column c of A: (2 a_c + a_(c-1)) * (1 + 3 c mod 7), a in -8 .. 7; dead: column 5 is zero.
    """
    a = (hashed("hessian:" + role, 512 * cols) >> np.uint32(28)).astype(np.float64) - 8
    a = a.reshape(512, cols)
    a = (2 * a + np.roll(a, 1, axis=1)) * (1 + 3 * np.arange(cols) % 7)
    if dead:
        a[:, 5] = 0
    return torch.from_numpy((a.T @ a / 2.0**18).astype(np.float32))


def in_block(role: str) -> bool:
    """Whether it is one of the six matrices of a block."""
    return role.rpartition(".")[2] in ("q", "k", "v", "out", "up", "down")


def fill(parameters: dict[str, torch.Tensor], gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Give parameters their values by the rule, a block's matrices times gain; gives copies."""
    with torch.no_grad():
        for role, parameter in parameters.items():
            value = rule_weight(role, parameter.shape)
            parameter.copy_(value * gain if in_block(role) else value)
    return {role: p.detach().clone() for role, p in parameters.items()}


# --- What is kept of a tensor -------------------------------------------------------------------


def places(numel: int, count: int = 4) -> np.ndarray:
    """Where a tensor is sampled, flat: count places, evenly, the first after half a step."""
    return (2 * np.arange(count) + 1) * numel // (2 * count)


def fingerprint(x: torch.Tensor) -> list[float]:
    """[norm, product with a fixed random vector of unit variance, 4 sampled entries].

    The product tells two tensors apart as well as their distance would: it differs by about that.
    """
    flat = x.detach().double().reshape(-1).numpy()
    probe = math.sqrt(3.0) * uniform("probe", len(flat))
    product = float((flat * probe).sum())
    return [float(np.linalg.norm(flat)), product, *flat[places(len(flat))].tolist()]


def apart(mine: list[float], golden: list[float], size: int, least: float = 0.0) -> list[float]:
    """How far two fingerprints are: norm, product (by the norm), entries (by the root mean square).

    least: a norm below which differences are rounding errors of something else.
    """
    norm = max(golden[0], least, 1e-30)
    rms = norm / math.sqrt(size)
    entries = max(abs(a - b) / (abs(b) + rms) for a, b in zip(mine[2:], golden[2:], strict=True))
    return [abs(mine[0] - golden[0]) / norm, abs(mine[1] - golden[1]) / norm, entries]


def logit_places(rows: int, length: int, vocab: int) -> tuple[np.ndarray, ...]:
    """64 logits (row, position, token): positions evenly, tokens by the hash."""
    flat = places(rows * length, 64)
    return flat // length, flat % length, hashed("logits", 64).astype(np.int64) % vocab


# --- Comparing ----------------------------------------------------------------------------------

# Three numbers: norm, product, entries, see `apart`. "rounded": with QAT, where a rounding error
# of a weight can move its code by one.
TOLERANCE = {
    "loss": 3e-5,  # nats, absolute
    "loss rounded": 1e-4,
    "logit": 1e-4,  # absolute
    "logit rounded": 2e-3,
    "gradient": (3e-4, 5e-4, 1e-3),
    "gradient rounded": (3e-3, 3e-3, 1e-2),
    "rate": 1e-4,  # of the largest; by the clock they differ by how often it was read
    "weights": (5e-4, 1e-3, 2e-3),  # of the distance moved
    "weights rounded": (5e-3, 2e-2, 2e-2),
    "average": (2e-3, 3e-3, 5e-3),
    "average rounded": (5e-3, 1e-2, 1e-2),
    "rms": 0.03,  # initial values: root mean square, relative
    "mean": 0.02,  # of the root mean square
    "top": 0.06,  # largest singular value, relative
    "hessian": (1e-5, 3e-5, 3e-5),
    "error": 1.01,  # of a stored matrix in the Hessian's norm, at most so many times the golden one
    "nats": 1e-4,  # per target, absolute
    "adapted": (5e-3, 1e-2, 2e-2),
}


class Report:
    """What was compared: a line of figures for each comparison."""

    def __init__(self):
        self.passed, self.failed = [], []

    def judge(self, ok: bool, line: str) -> None:
        (self.passed if ok else self.failed).append(line)

    def tensors(self, label: str, mine: Mapping, golden: Mapping, bounds, *, sizes, floors=None):
        """Fingerprints of all roles in one line: the worst of each number, and who exceeds it."""
        worst, bad = [(0.0, "-")] * 3, []
        for role in golden.keys() & mine.keys():
            floor = floors[role] if floors else 0.0
            far = apart(mine[role], golden[role], sizes[role], floor)
            worst = [max(w, (f, role)) for w, f in zip(worst, far, strict=True)]
            if any(f > bound for f, bound in zip(far, bounds, strict=True)):
                bad.append(f"{role} (norm {mine[role][0]:.4g}, golden {golden[role][0]:.4g})")
        bad += [f"only one has {role}" for role in golden.keys() ^ mine.keys()]
        named = zip(("norm", "product", "entry"), worst, strict=True)
        line = ", ".join(f"{what} {w:.1e} ({role})" for what, (w, role) in named)
        self.judge(not bad, f"{label}: worst {line}; {len(bad)} differ: {', '.join(bad[:4])}")


def cut(x: torch.Tensor, role: str, skips: int | None) -> torch.Tensor:
    """The skip tensors of a run with fewer skips: the first rows alone."""
    return x[:skips] if skips is not None and role.startswith("skip_") else x


def numels(parameters: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {role: p.numel() for role, p in parameters.items()}


def check_inventory(project: Project, golden: dict, report: Report) -> None:
    with torch.device("meta"):
        parameters = project.parameters(project.model(project.config({})))
    count, want = sum(numels(parameters).values()), golden["parameters"]
    report.judge(count == want, f"{count:,} parameters at full size, golden {want:,}")
    shapes = {(role, *p.shape) for role, p in parameters.items()}
    wanted = {(role, *shape) for role, shape in golden["shapes"].items()}
    report.judge(shapes == wanted, f"shapes, of which differ {sorted(shapes ^ wanted)}")


def statistics(x: torch.Tensor) -> list[float]:
    """[mean, root mean square, largest singular value (0 for vectors)]."""
    x = x.detach().double()
    top = float(torch.linalg.svdvals(x)[0]) if x.ndim == 2 else 0.0
    return [float(x.mean()), float(x.square().mean().sqrt()), top]


def check_initial(project: Project, golden: dict, report: Report) -> None:
    """Draws differ, so do statistics a little: only their size is compared."""
    model = project.model(project.config(golden["settings"]))
    project.initialise(model, 1)
    parameters = project.parameters(model)
    report.judge(parameters.keys() == golden["roles"].keys(), "roles of the initial values")
    for role, parameter in parameters.items():
        mine, want = statistics(parameter), golden["roles"][role]
        (mean, rms, top), (golden_mean, golden_rms, golden_top) = mine, want
        scale = max(rms, golden_rms, 1e-12)
        ok = abs(rms - golden_rms) <= TOLERANCE["rms"] * scale
        ok = ok and abs(mean - golden_mean) <= TOLERANCE["mean"] * scale
        ok = ok and abs(top - golden_top) <= TOLERANCE["top"] * max(top, golden_top)
        report.judge(ok, f"{role}: mean, rms, largest singular value {mine}, golden {want}")


def check_forward(project: Project, golden: dict, report: Report) -> None:
    for label, case in golden.items():
        if not case["counts"]:  # a defect of the original that ours does not have
            continue
        cfg, rounded = project.config(case["settings"]), " rounded" * case["rounded"]
        model = project.model(cfg)
        parameters = project.parameters(model)
        fill(parameters, case["gain"])
        rows, length, vocab = case["rows"], case["seq"], case["vocab"]
        windows = rule_batches("forward", rows, length, 1, vocab)[0]
        x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        plan = project.plan(cfg, case["looped"], case["rounded"])
        logits = project.forward(model, plan, x)
        loss = project.forward(model, plan, x, y)
        loss.backward()
        sampled = logits.detach().double().numpy()[logit_places(rows, length, vocab)]
        far = float(np.abs(sampled - np.array(case["logits"])).max())
        ok = abs(loss.item() - case["loss"]) < TOLERANCE["loss" + rounded]
        figures = f"loss {loss.item():.7f} golden {case['loss']:.7f}, 64 logits within {far:.1e}"
        report.judge(ok and far < TOLERANCE["logit" + rounded], f"{label}: {figures}")
        grads = {
            role: cut(torch.zeros_like(p) if p.grad is None else p.grad, role, case["skips"])
            for role, p in parameters.items()
        }
        mine, bounds = (
            {r: fingerprint(g) for r, g in grads.items()},
            TOLERANCE["gradient" + rounded],
        )
        sizes = numels(grads)
        report.tensors(f"gradients, {label}", mine, case["gradients"], bounds, sizes=sizes)


RATES = ("block.0.q", "embedding", "block.0.attn_scale")  # one of each optimizer


def watch_rates(roles: dict[int, str], found: list[dict]):
    """A hook on all optimizers: learning rates (and momentum) at each step, by role."""

    def hook(optimizer, *_):
        for group in optimizer.param_groups:
            held = {roles.get(id(p)) for p in group["params"]}
            for role in held.intersection(RATES):
                found[-1][role] = float(group["lr"])
                if role == RATES[0]:
                    found[-1]["momentum"] = float(group["momentum"])

    return register_optimizer_step_pre_hook(hook)


def moves(parameters: Mapping, start: Mapping) -> dict[str, list[float]]:
    """Fingerprints of how far each tensor has moved."""
    return {
        role: fingerprint(p.detach().double() - start[role].double())
        for role, p in parameters.items()
    }


def trained(project: Project, case: dict, parameters: Mapping, train: Callable):
    """(facts of each step, fingerprints of the moves after some steps), of a training run."""
    start = {role: p.detach().clone() for role, p in parameters.items()}
    facts, seen = [], {}

    def before_step(looped, rounded):
        if str(len(facts)) in case["weights"]:
            seen[str(len(facts))] = moves(parameters, start)
        facts.append(dict(looped=looped, rounded=rounded))

    def before_average():
        seen[str(len(facts))] = moves(parameters, start)

    handle = watch_rates({id(p): role for role, p in parameters.items()}, facts)
    try:
        train(before_step=before_step, before_average=before_average)
    finally:
        handle.remove()
    return facts, seen | {"average": moves(parameters, start)}


def check_schedule(label: str, facts: list[dict], schedule: list[dict], report: Report) -> None:
    wrong, largest = [], {key: max(step[key] for step in schedule) for key in schedule[0]}
    for step, (mine, want) in enumerate(zip(facts, schedule, strict=False)):
        for key, value in want.items():
            if key not in mine or abs(mine[key] - value) > TOLERANCE["rate"] * largest[key]:
                wrong.append(f"step {step} {key} {mine.get(key)} golden {value}")
    text = f"{len(facts)} steps, golden {len(schedule)}; {len(wrong)} differ: {wrong[:4]}"
    report.judge(not wrong and len(facts) == len(schedule), f"schedule, {label}: {text}")


def check_train(project: Project, golden: dict, report: Report) -> None:
    for label, case in golden.items():
        cfg = project.config(case["settings"])
        model = project.model(cfg)
        parameters = project.parameters(model)
        start = fill(parameters)
        batches = rule_batches("train", case["rows"], case["seq"], case["steps"], case["vocab"])
        train = functools.partial(project.train, cfg, model, batches, case["seconds"])
        facts, seen = trained(project, case, parameters, train)
        check_schedule(label, facts, case["schedule"], report)
        rounded = " rounded" * any(step["rounded"] for step in case["schedule"])
        # One rounding error of the weight itself is no difference of its step.
        options = dict(sizes=numels(parameters), floors=floors(start, 1e-4))
        for step, want in case["weights"].items():
            bounds = TOLERANCE[("average" if step == "average" else "weights") + rounded]
            text = f"weights at {step}, {label}"
            report.tensors(text, seen.get(step, {}), want, bounds, **options)


def floors(start: Mapping[str, torch.Tensor], part: float) -> dict[str, float]:
    """A part of each tensor's norm: smaller moves are not told apart."""
    return {role: part * float(value.double().norm()) for role, value in start.items()}


def check_hessians(project: Project, golden: dict, report: Report) -> None:
    cfg = project.config(golden["settings"])
    model = project.model(cfg)
    fill(project.parameters(model))
    windows = rule_batches("calibration", golden["rows"], golden["seq"], 1, golden["vocab"])[0]
    found = project.hessians(cfg, model, windows, golden["looped"])
    mine = {role: fingerprint(h.double() / h.double().trace()) for role, h in found.items()}
    bounds, sizes = TOLERANCE["hessian"], numels(found)
    report.tensors("Hessians over their trace", mine, golden["roles"], bounds, sizes=sizes)


def crc(x: torch.Tensor | np.ndarray) -> int:
    x = x.detach().numpy() if isinstance(x, torch.Tensor) else x
    return zlib.crc32(np.ascontiguousarray(x).tobytes())


def hessian_error(weight, codes, scales, hessian) -> float:
    """|(W - W') H^(1/2)|^2 over |W H^(1/2)|^2."""
    w, h = weight.double(), hessian.double()
    d = w - codes.double() * scales.double()[:, None]
    return float((d @ h * d).sum() / (w @ h * w).sum())


def check_codes(role: str, stored: tuple, want: dict, report: Report) -> None:
    """Scales must be equal to the bit, codes nearly all, and the error no larger."""
    kind, bits, codes, scales = stored
    text = f"{role}: {kind} of {bits} bits, golden codes of {want['bits']}"
    report.judge(kind == "codes" and bits == want["bits"], text)
    if kind != "codes":
        return
    shape = want["shape"]
    weight, hessian = rule_matrix(role, *shape), rule_hessian(role, shape[1], want["dead"])
    some = scales.float().numpy()[places(len(scales), len(want["scales"]))]
    far = float(np.abs(some / np.array(want["scales"]) - 1).max())
    report.judge(crc(scales) == want["scales_crc32"], f"{role}: scales, some differ by {far:.1e}")
    sampled = codes.reshape(-1)[torch.from_numpy(places(codes.numel(), 2048))].numpy()
    theirs = np.frombuffer(base64.b64decode(want["codes"]), np.int8)
    equal = 1.0 if crc(codes) == want["codes_crc32"] else float((sampled == theirs).mean())
    error = hessian_error(weight, codes, scales, hessian)
    total = int(codes.sum(dtype=torch.int64))
    limit = max(4.0, 4 * math.sqrt((1 - want["equal"]) * codes.numel()))  # codes off by +-1
    ok = equal >= want["equal"] and error <= TOLERANCE["error"] * want["error"]
    report.judge(
        ok and abs(total - want["codes_sum"]) <= limit,
        f"{role}: codes equal {equal:.4f} (at least {want['equal']}), sum {total} golden "
        f"{want['codes_sum']}, error in the Hessian's norm {error:.4e} golden {want['error']:.4e}",
    )


def check_quantize(project: Project, golden: dict, report: Report) -> None:
    cfg = project.config({})
    for role, want in golden.items():
        shape = want["shape"]
        if want["kind"] == "codes":
            weight, hessian = rule_matrix(role, *shape), rule_hessian(role, shape[1], want["dead"])
            check_codes(role, project.quantize(cfg, role, weight, hessian), want, report)
        else:
            kind, _, stored, _ = project.quantize(cfg, role, rule_weight(role, shape), None)
            same = kind == want["kind"] and crc(stored) == want["crc32"]
            report.judge(same, f"{role}: {kind}, golden {want['kind']}")


def check_losses(label: str, nats: torch.Tensor, want: dict, chunk: int, report: Report) -> None:
    """Losses per target (n,): their mean, that of each chunk, and 64 of them."""
    nats = nats.double().numpy()
    far = float(np.abs(nats[places(len(nats), 64)] - np.array(want["nats"])).max())
    parts = [float(part.mean()) for part in np.split(nats, range(chunk, len(nats), chunk))]
    off = max(abs(a - b) for a, b in zip(parts, want["chunks"], strict=True))
    ok = abs(nats.mean() - want["loss"]) < TOLERANCE["loss"] and far < TOLERANCE["nats"]
    report.judge(
        ok and off < 3 * TOLERANCE["loss"],
        f"{label}: loss {nats.mean():.7f} golden {want['loss']:.7f}, chunks within {off:.1e}, "
        f"64 targets within {far:.1e}",
    )


def check_evaluate(project: Project, golden: dict, report: Report) -> None:
    cfg, looped = project.config(golden["settings"]), golden["looped"]
    tokens = rule_tokens("evaluate", golden["targets"] + 1, golden["vocab"])
    chunk, stride = golden["chunk"], golden["stride"]
    model = project.model(cfg)
    parameters = project.parameters(model)
    start = fill(parameters)
    # A tensor that the original freezes may not move: there a move of any size is a difference.
    options = dict(sizes=numels(parameters), floors=floors(start, 3e-4))
    nats = project.score(cfg, model, tokens, looped)
    check_losses("windows side by side", nats, golden["plain"], chunk, report)
    nats = project.score(cfg, model, tokens, looped, stride=stride)
    check_losses("sliding", nats, golden["sliding"], chunk, report)
    for label in {"adapted", "fine_tuned"} & golden.keys():
        if label == "adapted":
            nats = project.score(cfg, model, tokens, looped, stride=stride, adapt=True)
        else:
            project.fine_tune(cfg, model, tokens, looped)
            nats = project.score(cfg, model, tokens, looped)
        want, mine = golden[label], moves(parameters, start)
        check_losses(label, nats, want, chunk, report)
        bounds = TOLERANCE["adapted"]
        report.tensors(f"weights, {label}", mine, want["weights"], bounds, **options)


def check_bytes(project: Project, golden: dict, report: Report) -> None:
    """The published prefix needs a file that is not here: its numbers are left alone."""
    path, sample, rule = SAMPLE / "fineweb_val_000000.bin", golden["sample"], golden["rule"]
    assert zlib.crc32(path.read_bytes()) == sample["file_crc32"], f"{path} is another sample"
    table, three = project.byte_table(sample["vocab"])
    same = [crc(x.astype(np.int64)) for x in three] == sample["tables_crc32"]
    report.judge(same, "the three tables of the sample's tokenizer")
    ids = np.fromfile(path, "<u2", offset=1024).astype(np.int64)
    # BOS before pieces that begin with a space: not in the sample.
    made = rule_tokens("bytes", rule["tokens"], rule["vocab"])
    for label, tokens, want in (("sample", ids, sample), ("tokens by the rule", made, rule)):
        count = (len(tokens) - 1) // want["seq"] * want["seq"]
        total = project.charged(table, tokens[: count + 1])
        text = f"{count:,} targets, {total:,} bytes, golden {want['targets']:,}, {want['bytes']:,}"
        report.judge((count, total) == (want["targets"], want["bytes"]), f"{label}: {text}")


PARTS = dict(
    inventory=check_inventory,
    initial=check_initial,
    forward=check_forward,
    train=check_train,
    hessians=check_hessians,
    quantize=check_quantize,
    evaluate=check_evaluate,
    bytes=check_bytes,
)
