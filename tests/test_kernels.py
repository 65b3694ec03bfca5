"""Section 4: every Triton kernel computes what it stands for, here in Triton's interpreter."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import library

import train_gpt as t
from train_gpt import Config, ConfigError

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IN_INTERPRETER = HERE.type == "cpu"  # conftest.py asks for it
SMALL = Config(
    vocab_size=40,
    model_dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=4,
    mlp_mult=2.0,
    loop_start=0,
    loop_end=0,
    num_loops=1,
    parallel_residual_start=1,
    train_seq_len=12,
)
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels():
    return t.triton_kernels()


def randn(*shape, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64) * scale


def naive_cross_entropy(logits, targets, cap, reduction):
    capped = cap * (logits / cap).tanh()
    shares = capped.exp() / capped.exp().sum(-1, keepdim=True)
    losses = -shares[torch.arange(len(targets)), targets].log()
    return losses.mean() if reduction == "mean" else losses


def naive_mlp_up(x, weight, slope):
    z = torch.einsum("btd,hd->bth", x, weight)
    return torch.where(z > 0, z, slope * z) ** 2


def naive_norm(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def naive_norm_rotate(q, k, gain, rotary):
    turned = []
    for heads in (naive_norm(q), naive_norm(k)):
        cos, sin = rotary
        half = cos.shape[-1]
        pairs = torch.complex(heads[..., :half], heads[..., half : 2 * half])
        pairs = pairs * torch.complex(cos, -sin)
        turned.append(torch.cat([pairs.real, pairs.imag, heads[..., 2 * half :]], -1))
    return turned[0] * gain[:, None], turned[1]


def naive_exclude_self(y, v):
    own = v.repeat_interleave(y.shape[2] // v.shape[2], dim=2)
    along = torch.einsum("bthd,bthd->bth", y, own) / own.pow(2).sum(-1).clamp(min=1e-24)
    return y - along[..., None] * own


def naive_mix_norm(x, x0, mix, scale):
    mixed = mix[0] * x + mix[1] * x0
    return mixed, scale * naive_norm(mixed)


TABLE = t.rotary_table(6, SMALL, torch.device("cpu"))
TARGETS = torch.tensor([0, 69, 3, 64, 69])
# Sizes that no block divides; more rows, columns and terms than one block of a product.
CASES = {
    "a row of one block": ("cross_entropy", [randn(5, 70, scale=9.0)], [TARGETS, 6.0, "none"]),
    "a row of blocks": ("cross_entropy", [randn(5, 1500, scale=50.0)], [TARGETS, 30.0, "mean"]),
    "several tiles": ("mlp_up", [randn(2, 70, 40), randn(270, 40, seed=1)], [0.5]),
    "relu squared": ("mlp_up", [randn(2, 3, 24), randn(36, 24, seed=1)], [0.0]),
    "grouped heads": (
        "norm_rotate",
        [randn(3, 6, 4, 12), randn(3, 6, 2, 12, seed=1), randn(4, seed=2)],
        [TABLE],
    ),
    "several rows": ("exclude_self", [randn(3, 40, 4, 12), randn(3, 40, 2, 12, seed=1)], []),
    "one head": ("exclude_self", [randn(1, 5, 1, 8), randn(1, 5, 1, 8, seed=1)], []),
    "more rows than a program takes": (
        "mix_norm",
        [randn(2, 300, 100), randn(2, 300, 100, seed=1), randn(2, 100, seed=2)],
        [0.5],
    ),
}


def values_and_gradients(function, tensors, rest, dtype):
    """Outputs, and gradients of a fixed weighting of them, as float64 on the CPU."""
    device = torch.device("cpu") if dtype == torch.float64 else HERE
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    # Vectors of parameters stay in float32, as they do in the model.
    types = [kept if x.dim() == 1 or len(x) == 2 == x.dim() else dtype for x in tensors]
    own = [
        x.to(device, kind, copy=True).requires_grad_()
        for x, kind in zip(tensors, types, strict=True)
    ]

    def place(x):
        if isinstance(x, tuple):
            return tuple(part.to(device, kept) for part in x)
        return x.to(device) if isinstance(x, torch.Tensor) else x

    out = function(*own, *map(place, rest))
    out = out if isinstance(out, tuple) else (out,)
    weights = [randn(*x.shape, seed=9 + i).to(x) for i, x in enumerate(out)]
    torch.autograd.backward(out, weights)
    return [x.detach().double().cpu() for x in (*out, *(x.grad for x in own))]


def compare(twin, case, dtype, tolerance):
    name, tensors, rest = CASES[case]
    tensors = [x.to(dtype).double() for x in tensors]
    expected = values_and_gradients(globals()[f"naive_{name}"], tensors, rest, torch.float64)
    got = values_and_gradients(getattr(twin, name), tensors, rest, dtype)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance * a.abs().max().item())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["eager", "triton"])
def test_both_twins_equal_a_naive_float64_version_with_gradients(kernels, which, case):
    tf32 = 1e-2 if HERE.type == "cuda" and which == "triton" else 1e-5
    compare(t.EAGER if which == "eager" else kernels, case, torch.float32, tf32)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] != "mlp_up"])
def test_in_bfloat16_the_kernels_lose_no_more_than_the_type_does(kernels, case):
    compare(kernels, case, torch.bfloat16, 0.01)


def test_the_product_kernel_takes_16_bit_types(kernels):
    # The interpreter multiplies float16, not bfloat16.
    dtype = torch.float16 if IN_INTERPRETER else torch.bfloat16
    compare(kernels, "relu squared", dtype, 0.01)


def test_a_value_of_zeros_excludes_nothing_and_gets_a_finite_gradient(kernels):
    y, v = randn(1, 2, 4, 8).float().to(HERE), torch.zeros(1, 2, 2, 8, device=HERE)
    v.requires_grad_()
    out = kernels.exclude_self(y, v)
    out.sum().backward()
    assert torch.equal(out, y)
    assert torch.isfinite(v.grad).all()


def test_arguments_need_not_be_contiguous(kernels):
    x, x0 = (randn(24, 6, 2, seed=i).float().to(HERE).permute(2, 1, 0) for i in range(2))
    mix = randn(24, 2).float().to(HERE).T
    results = [twin.mix_norm(x, x0, mix, 0.5) for twin in (t.EAGER, kernels)]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", ["a row of one block", "relu squared", "one head", "mixing"])
def test_torch_accepts_the_operators_for_graphs(kernels, case):
    """Schemas, shapes without values, and gradients, by PyTorch's own checks."""
    sizes = dict(device=HERE, requires_grad=True)
    name, arguments = {
        "a row of one block": (
            "cross_entropy",
            (torch.randn(5, 70, **sizes), TARGETS.to(HERE), 6.0),
        ),
        "relu squared": (
            "mlp_up",
            (torch.randn(2, 3, 24, **sizes), torch.randn(36, 24, **sizes), 0.0),
        ),
        "one head": ("exclude_self", tuple(torch.randn(1, 5, 1, 8, **sizes) for _ in range(2))),
        "mixing": (
            "mix_norm",
            (*(torch.randn(1, 3, 8, **sizes) for _ in range(2)), torch.randn(2, 8, **sizes), 0.5),
        ),
    }[case]
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(getattr(torch.ops.train_gpt, name).default, arguments, test_utils=cheap)


def model_run(kernels, cfg, plan, compiled=False):
    """Loss, gradients, and the inputs that the matrices of the MLPs saw."""
    model, draw = t.GPT(cfg, kernels=kernels), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
    model.to(HERE)
    seen = []
    if not compiled:
        for block in model.blocks:
            for module in (block.mlp.up, block.mlp.down):
                module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    tokens = torch.randint(cfg.vocab_size, (2, 13), generator=draw).to(HERE)
    options = dict(backend="aot_eager", fullgraph=True, dynamic=False)
    forward = torch.compile(model, **options) if compiled else model
    loss = forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), plan=plan)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), *seen]


@pytest.mark.parametrize(
    "settings",
    [{}, dict(parallel_residual_form="lanes", xsa_last_n=1), dict(leaky_relu_slope=0.3)],
    ids=["#1493", "lanes", "rounded and packed"],
)
def test_the_whole_model_is_the_same_with_either_twin_and_calibration_sees_its_inputs(settings):
    cfg = dataclasses.replace(SMALL, **settings)
    plan = t.depth_plan(cfg, looped=True)
    if "leaky_relu_slope" in settings:
        plan = plan._replace(fake_bits=6, packed=True)
    name, kernels, _ = t.select_kernels("1", HERE, torch.float32)
    assert name == "triton"
    expected, got = (model_run(twin, cfg, plan) for twin in (t.EAGER, kernels))
    assert len(got) == len(expected) > len(plan.visits) * 2
    tolerance = 1e-4 if IN_INTERPRETER else 0.05  # the GPU multiplies in TF32
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance * (a.abs().max().item() + 1e-3))


def test_the_kernels_are_nodes_of_one_compiled_graph_with_gradients(kernels):
    plan = t.depth_plan(SMALL, looped=False)
    torch._dynamo.reset()
    expected = model_run(t.EAGER, SMALL, plan)
    got = model_run(kernels, SMALL, plan, compiled=True)
    torch._dynamo.reset()
    tolerance = 1e-4 if IN_INTERPRETER else 0.05
    for a, b in zip(expected, got, strict=False):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance * (a.abs().max().item() + 1e-3))


# --- the choice ---


def test_without_a_gpu_the_model_takes_the_eager_twins_unless_told_otherwise():
    cpu = torch.device("cpu")
    assert t.select_kernels("auto", cpu, torch.float32) == (
        "eager",
        t.EAGER,
        "no triton: the device is no GPU",
    )
    assert t.select_kernels("0", torch.device("cuda"), torch.bfloat16) == (
        "eager",
        t.EAGER,
        "as set",
    )


def test_kernels_that_were_asked_for_and_cannot_run_are_an_error(monkeypatch):
    cpu = torch.device("cpu")
    t.kernel_fault.cache_clear()
    monkeypatch.setattr(importlib.import_module("triton").knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match="^KERNELS=1: the device is no GPU; unset it or set KER"):
        t.select_kernels("1", cpu, torch.float32)
    t.kernel_fault.cache_clear()
    monkeypatch.setattr(t, "triton_kernels", lambda: importlib.import_module("no_such_triton"))
    with pytest.raises(ConfigError, match="^KERNELS=1: triton does not import .*no_such_triton"):
        t.select_kernels("1", cpu, torch.float32)
    t.kernel_fault.cache_clear()


def wrong_value(x, weight, slope):
    return t.mlp_up(x, weight, slope) * 1.2


def wrong_gradient(x, weight, slope):
    z = t.mlp_up(x, weight, slope)
    return z.detach() + 0.5 * (z - z.detach())


def no_number(x, weight, slope):
    return t.mlp_up(x, weight, slope) * float("nan")


def no_kernel(x, weight, slope):
    raise RuntimeError("out of shared memory\nmore lines")


@pytest.mark.parametrize(
    ("stand_in", "fault"),
    [
        (wrong_value, "mlp_up: it is wrong by "),
        (wrong_gradient, "mlp_up: it is wrong by 5.0e-01 of the largest value on this device"),
        (no_number, "mlp_up: it is wrong by nan"),
        (no_kernel, "mlp_up: RuntimeError: out of shared memory"),
    ],
)
def test_a_kernel_that_is_wrong_on_this_device_is_found_at_start(monkeypatch, stand_in, fault):
    monkeypatch.setattr(t, "triton_kernels", lambda: t.EAGER._replace(mlp_up=stand_in))
    t.kernel_fault.cache_clear()
    try:
        found = t.kernel_fault(HERE, torch.float32)
        assert found.startswith(fault)
        assert "more lines" not in found
        with pytest.raises(ConfigError, match="^KERNELS=1: mlp_up: .*; unset it or set KERNELS=0$"):
            t.select_kernels("1", HERE, torch.float32)
    finally:
        t.kernel_fault.cache_clear()


def test_the_setting_decides_and_a_run_may_ask_for_either():
    for choice, twin in (("0", "eager"), ("1", "triton")):
        cfg = Config(kernels=choice)
        assert t.select_kernels(cfg.kernels, HERE, torch.float32)[0] == twin


# Compiles every kernel as on a Hopper GPU, for the shapes of #1493, and launches none.
FOR_HOPPER = """
import sys
from unittest.mock import MagicMock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import train_gpt as t

hopper = MagicMock()
hopper.get_current_target.return_value = GPUTarget("cuda", 90, 32)
hopper.get_current_device.return_value = hopper.get_current_stream.return_value = 0
driver.set_active(hopper)
run, made = JITFunction.run, []
JITFunction.run = lambda self, *args, grid, warmup, **options: made.append(
    (self.__name__, run(self, *args, grid=grid, warmup=True, **options))
)


def call(name, *shapes, dtype=torch.bfloat16, rest=()):
    tensors = [torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes]
    out = getattr(t.triton_kernels(), name)(*tensors, *rest)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [torch.zeros_like(x) for x in out])


table = torch.zeros(2, 256, 1, 8).unbind()
call("cross_entropy", (512, 8192), rest=(torch.zeros(512).long(), 30.0, "mean"))
call("mlp_up", (2, 256, 512), (2048, 512), rest=(0.5,))
call("norm_rotate", (2, 256, 8, 64), (2, 256, 4, 64), (8,), rest=(table,))
call("exclude_self", (2, 256, 8, 64), (2, 256, 4, 64))
call("mix_norm", (2, 256, 512), (2, 256, 512), (2, 512), rest=(0.5,))
for name, kernel in made:
    print(name, "wgmma" in kernel.asm["ptx"], kernel.metadata.shared, len(kernel.asm["cubin"]) > 0)
"""


def test_every_kernel_compiles_for_a_hopper_gpu_and_the_product_uses_its_tensor_cores(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= dict(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(Path(t.__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", FOR_HOPPER], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 12  # q and k are turned one after the other
    assert {row[0] for row in rows if row[1] == "True"} == {"product"}
    assert all(int(row[2]) <= 227 * 1024 and row[3] == "True" for row in rows)
