"""Section 4: attention, every Triton kernel, and who is chosen, against what they stand for."""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import gloo
from test_model import random_model
from torch import library

import train_gpt as t
from train_gpt import Config, ConfigError

CPU = torch.device("cpu")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IN_INTERPRETER = HERE.type == "cpu"  # conftest.py asks for it
HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")]
FA3_ON_GPU = pytest.param("fa3 on a GPU", marks=ON_GPU)
OPERATIONS = ("cross_entropy", "mlp_up", "norm_rotate", "exclude_self")
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
# All that may make one token's output depend on another's.
MIXING = dataclasses.replace(
    SMALL,
    num_layers=3,
    loop_start=1,
    loop_end=1,
    parallel_residual_start=2,
    smear_gate_enabled=True,
    bigram_vocab_size=16,
    bigram_dim=8,
    ve_dim=8,
    ve_layers="1",
    train_seq_len=16,
)


def runtime(device=CPU, dtype=torch.float32):
    """One process on this device, whatever the machine has."""
    rt = t.Runtime(Config(compile="0"), {})
    rt.device, rt.compute_dtype = torch.device(device), dtype
    return rt


def rows_of_documents(*rows):
    """Rows that hold documents of these lengths; a first length of 0: the row begins with BOS."""
    tokens = torch.full((len(rows), sum(rows[0])), 5)
    for row, lengths in zip(tokens, rows, strict=True):
        row[np.cumsum(lengths)[:-1]] = t.BOS
    return tokens


def pieces(tokens):
    """(row, first, stop) of each document, found one token after the other."""
    for number, row in enumerate(tokens.tolist()):
        first = 0
        for place in range(1, len(row) + 1):
            if place == len(row) or row[place] == t.BOS:
                yield number, first, place
                first = place


# --- where documents lie ---


def test_documents_are_found_and_their_bounds_cover_all_rows_in_order():
    tokens = rows_of_documents([0, 5, 1, 10], [3, 13], [16])
    found = t.find_documents(tokens)
    expected = [number * 16 + first for number, first, _ in pieces(tokens)]
    bounds = found.bounds.tolist()
    assert found.bounds.dtype == torch.int32
    assert bounds == sorted(bounds)
    assert sorted({*bounds}) == [*expected, 48]
    for number, first, stop in pieces(tokens):
        inside = found.ids[number, first:stop]
        assert (inside == inside[0]).all()
        assert (found.ids[number] == inside[0]).sum() == stop - first


def test_the_shape_of_the_bounds_does_not_depend_on_the_text():
    for length, room in ((8, 8), (1024, 16), (2048, 32), (4096, 64)):
        for share in (0.0, 0.002, 1.0):
            draw = torch.Generator().manual_seed(0)
            tokens = torch.where(torch.rand(3, length, generator=draw) < share, t.BOS, 7)
            bounds = t.find_documents(tokens).bounds
            assert len(bounds) == 3 * room + 1
            assert (bounds.diff() >= 0).all()
            assert (bounds.diff() <= length).all()
            assert bounds[::room].tolist() == [0, length, 2 * length, 3 * length]


def test_documents_beyond_the_room_of_a_row_stay_one_and_keep_to_their_row():
    tokens = torch.full((2, 64), t.BOS)
    ids, bounds = t.find_documents(tokens)
    assert ids[0].tolist() == [*range(1, 15), *[15] * 50]
    assert bounds.tolist() == [0, *range(15), 64, *range(64, 79), 128]


# --- attention ---


def test_plain_attention_is_its_definition():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, h, 8, generator=draw) for h in (4, 2, 2))
    out = t.plain_attention(q, k, v)
    for pos, head in itertools.product(range(6), range(4)):
        weights = [math.exp(q[0, pos, head] @ k[0, s, head // 2] / 8**0.5) for s in range(pos + 1)]
        y = sum(w * v[0, s, head // 2] for s, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(out[0, pos, head], y)


def random_qkv(rows, length, heads, kv_heads, width=8, dtype=torch.float32, device=CPU):
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, length, h, width, generator=draw).to(device, dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def varlen_by_definition(q, k, v, q_bounds, k_bounds, q_most, k_most, **options):
    """What the packages' function does: each stretch by itself."""
    assert options in (dict(causal=True), dict(window_size=(-1, 0), enable_gqa=True))
    assert torch.equal(q_bounds, k_bounds)
    assert q_most == k_most >= q_bounds.diff().max()
    parts = [
        t.plain_attention(*(x[None, first:stop] for x in (q, k, v)))[0]
        for first, stop in zip(q_bounds[:-1].tolist(), q_bounds[1:].tolist(), strict=True)
        if stop > first
    ]
    return torch.cat(parts)


def stand_in_package(name, monkeypatch, *, with_statistics=False, factor=1.0, varlen_factor=1.0):
    """A package of this name; its older wheels also return the log-sum-exp."""
    package = type(t.sys)(name)

    def answer(out):
        return (out, None) if with_statistics else out

    def function(q, k, v, causal):
        assert causal is True
        return answer(factor * t.plain_attention(q, k, v))

    def varlen(*args, **options):
        return answer(varlen_factor * varlen_by_definition(*args, **options))

    package.flash_attn_func = function
    package.flash_attn_varlen_func = package.varlen_attn = varlen
    monkeypatch.setitem(t.sys.modules, name, package)


def hopper(monkeypatch, dtype=torch.bfloat16):
    """A runtime whose device says that it is a Hopper GPU; no tensor can be made on it here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return runtime(torch.device("cuda", 0), dtype)


def kernel_of(name, monkeypatch):
    """An attention that can keep documents apart, its device and its type."""
    if name == "fa3 on a GPU":
        rt = runtime("cuda", torch.bfloat16)
        return t.choose_attention("fa3", rt, documents=True)[1], rt.device, rt.compute_dtype
    if name == "fa3":
        stand_in_package("flash_attn_interface", monkeypatch, with_statistics=True)
        return t.flash_attention_3(hopper(monkeypatch)), CPU, torch.float32
    if name == "flash":
        stand_in_package("torch.nn.attention.varlen", monkeypatch)
    return t.choose_attention(name, runtime(), documents=True)[1], CPU, torch.float32


@pytest.mark.parametrize("name", ["sdpa", FA3_ON_GPU])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_equals_the_plain_one_with_gradients(
    name, heads, kv_heads, dtype, monkeypatch
):
    kernel, device, own_dtype = kernel_of(name, monkeypatch)
    if device.type == "cuda" and dtype != own_dtype:
        pytest.skip("FlashAttention 3 takes 16-bit types")
    draw = torch.Generator().manual_seed(0)
    width = 16 if device.type == "cpu" else 64
    shapes = [(2, 33, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    *qkv, weight = (torch.randn(s, generator=draw).to(device, dtype) for s in shapes)
    results = []
    for function in (t.plain_attention, kernel):
        inputs = [x.clone().requires_grad_() for x in qkv]
        out = function(*inputs)
        (out * weight).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for expected, got in zip(*results, strict=True):
        assert got.dtype == dtype
        scale = expected.float().abs().max().item()
        torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["plain", "sdpa", "fa3", "flash", FA3_ON_GPU])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_each_document_alone_gives_the_same_outputs_and_gradients(
    name, heads, kv_heads, monkeypatch
):
    kernel, device, dtype = kernel_of(name, monkeypatch)
    tokens = rows_of_documents([0, 5, 1, 12, 6], [24], [3, 21], [8, 8, 8]).to(device)
    width = 64 if device.type == "cuda" else 8
    make = functools.partial(random_qkv, 4, 24, heads, kv_heads, width, dtype, device)
    masked, alone = make(), make()
    weight = torch.randn(4, 24, heads, width, generator=torch.Generator().manual_seed(1))
    weight = weight.to(device, dtype)
    out = kernel(*masked, t.find_documents(tokens))
    (out * weight).sum().backward()
    expected = torch.empty_like(out)
    for row, first, stop in pieces(tokens):
        part = t.plain_attention(*(x[row : row + 1, first:stop] for x in alone))
        expected[row, first:stop] = part[0].detach()
        (part * weight[row, first:stop]).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    pairs = [(out.detach(), expected)]
    pairs += [(x.grad, y.grad) for x, y in zip(masked, alone, strict=True)]
    for got, want in pairs:
        limit = tolerance * want.float().abs().max().item()
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=limit)


def test_more_documents_than_a_row_has_room_for_are_the_same_ones_to_every_kernel(monkeypatch):
    documents, qkv = t.find_documents(torch.full((2, 64), t.BOS)), random_qkv(2, 64, 4, 2)
    expected = t.plain_attention(*qkv, documents)
    for name in ("sdpa", "fa3"):
        got = kernel_of(name, monkeypatch)[0](*qkv, documents)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", ["gptj", "lanes"])
def test_a_masked_row_gives_each_document_the_losses_and_gradients_it_has_alone(form):
    cfg = dataclasses.replace(MIXING, parallel_residual_form=form)
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(2, cfg.vocab_size, (2, 17), generator=draw)
    for row, place in ((0, 4), (0, 5), (0, 12), (1, 0), (1, 9)):
        text[row, place] = t.BOS
    tokens, targets = text[:, :-1], text[:, 1:]
    plan = t.depth_plan(cfg, looped=True)
    results = []
    for masked in (True, False):
        model = random_model(cfg, t.EAGER._replace(attention=t.sdpa_attention))
        forward = functools.partial(model, plan=plan._replace(masked=masked), reduction="none")
        losses = forward(tokens, targets)
        if not masked:
            across = losses.detach()
            losses = torch.empty_like(losses)
            for row, first, stop in pieces(tokens):
                part = slice(row, row + 1), slice(first, stop)
                losses[part] = forward(tokens[part], targets[part])
        losses.sum().backward()
        results.append([losses.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    moved = (across - results[0][0]).abs() > 1e-4
    assert moved[0].tolist() == [False] * 4 + [True] * 12
    assert moved[1].tolist() == [False] * 9 + [True] * 7


@pytest.mark.parametrize("doc_masking", [False, True])
def test_training_alone_is_masked_and_only_if_it_was_set(tiny_cfg, rt, dataset, doc_masking):
    changes = dict(doc_masking=doc_masking, val_loss_every=2, iterations=5)
    cfg = dataclasses.replace(tiny_cfg, **changes)
    model, loader = t.GPT(cfg), t.Loader(t.find_shards(dataset, "train"), cfg)
    trained, scored = [], []
    see = lambda module, args, options: trained.append(options["plan"])  # noqa: E731
    model.register_forward_pre_hook(see, with_kwargs=True)
    t.train(model, loader, lambda plan, prefix: scored.append(plan), cfg, rt)
    assert {plan.masked for plan in trained} == {doc_masking}
    assert [plan.masked for plan in scored] == [False] * 2
    assert not t.depth_plan(cfg, looped=True).masked  # that of calibration and scoring


# --- which attention ---


def test_without_a_hopper_gpu_auto_is_sdpa_and_the_reason_is_told(monkeypatch):
    choose = functools.partial(t.choose_attention, documents=False)
    assert choose("plain", runtime()) == ("plain", t.plain_attention, "as set")
    assert choose("sdpa", runtime()) == ("sdpa", t.sdpa_attention, "as set")
    why = "the device is not a Hopper GPU"
    assert choose("auto", runtime()) == ("sdpa", t.sdpa_attention, f"fa3 cannot be used: {why}")
    with pytest.raises(ConfigError, match=f"^ATTENTION=fa3: {why}; unset it or set ATTENTION=sdpa"):
        choose("fa3", runtime(dtype=torch.bfloat16))
    ampere = hopper(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RuntimeError, match=why):
        t.flash_attention_3(ampere)


def test_flash_attention_3_needs_16_bits_and_its_package_under_either_name(monkeypatch):
    with pytest.raises(RuntimeError, match="activations are float32"):
        t.flash_attention_3(hopper(monkeypatch, torch.float32))
    monkeypatch.setitem(t.sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(t.sys.modules, "flash_attn_3", type(t.sys)("flash_attn_3"))
    with pytest.raises(ImportError, match="flash_attn_3"):
        t.flash_attention_3(hopper(monkeypatch))
    qkv = random_qkv(1, 5, 2, 2)
    for name in ("flash_attn_3.flash_attn_interface", "flash_attn_interface"):
        stand_in_package(name, monkeypatch, with_statistics=name == "flash_attn_interface")
        out = t.flash_attention_3(hopper(monkeypatch))(*qkv)
        assert torch.equal(out, t.plain_attention(*qkv))


def install_fa3(monkeypatch, **options):
    """FlashAttention 3 as a stand-in whose attention runs on this device."""
    stand_in_package("flash_attn_interface", monkeypatch, **options)
    kernel = t.flash_attention_3(hopper(monkeypatch))
    monkeypatch.setattr(t, "flash_attention_3", lambda rt: kernel)
    return kernel


@pytest.mark.parametrize("documents", [False, True])
def test_flash_attention_3_is_taken_where_it_is_and_agrees(monkeypatch, documents):
    kernel = install_fa3(monkeypatch)
    for choice, why in (("auto", "it agrees with plain attention"), ("fa3", "as set")):
        found = t.choose_attention(choice, runtime(), documents=documents)
        assert found == ("fa3", kernel, why)


def test_flash_attention_3_that_does_not_import_is_not_taken(monkeypatch):
    monkeypatch.setattr(t, "flash_attention_3", lambda rt: importlib.import_module("no_such_fa3"))
    fault = "No module named 'no_such_fa3'"
    found = t.choose_attention("auto", runtime(), documents=False)
    assert found == ("sdpa", t.sdpa_attention, f"fa3 cannot be used: {fault}")
    with pytest.raises(ConfigError, match=f"^ATTENTION=fa3: {fault}; unset it or set ATTENTION=sd"):
        t.choose_attention("fa3", runtime(), documents=False)


@pytest.mark.parametrize("documents", [False, True])
def test_flash_attention_3_that_computes_something_wrong_is_not_taken(monkeypatch, documents):
    kernel = install_fa3(monkeypatch, **{"varlen_factor" if documents else "factor": 1.1})
    fault = "it is wrong by 1.0e-01 of the largest value on this device"
    found = t.choose_attention("auto", runtime(), documents=documents)
    assert found == ("sdpa", t.sdpa_attention, f"fa3 cannot be used: {fault}")
    with pytest.raises(ConfigError, match=f"^ATTENTION=fa3: {fault}; unset it or set ATTENTION=sd"):
        t.choose_attention("fa3", runtime(), documents=documents)
    # The other of its two functions is right.
    assert t.choose_attention("fa3", runtime(), documents=not documents)[1] is kernel


def test_flash_attention_inside_pytorch_can_be_asked_for_and_equals_the_plain_one():
    name, kernel, why = t.choose_attention("flash", runtime(), documents=False)
    assert (name, why) == ("flash", "as set")
    qkv = random_qkv(2, 33, 4, 2)
    with torch.profiler.profile() as profile:
        out = kernel(*qkv)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {e.name for e in profile.events()}
    torch.testing.assert_close(out, t.plain_attention(*qkv))


def test_a_kernel_inside_pytorch_that_this_device_lacks_is_refused_in_one_line():
    for choice in ("cudnn", "fa4"):
        for documents in (False, True):
            with pytest.raises(ConfigError) as caught:
                t.choose_attention(choice, runtime(), documents=documents)
            line = str(caught.value)
            assert line.startswith(f"ATTENTION={choice}: ")
            assert line.endswith("; unset it or set ATTENTION=sdpa")
            assert len(line.splitlines()) == 1
            assert len(line) < 250


def test_a_kernel_inside_pytorch_that_computes_something_else_is_refused(monkeypatch):
    wrong = contextlib.nullcontext
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: wrong())
    monkeypatch.setattr(t, "sdpa_attention", lambda q, k, v, documents: q + 0 * k.sum() * v.sum())
    with pytest.raises(ConfigError, match="^ATTENTION=flash: it is wrong by .* of the largest"):
        t.choose_attention("flash", runtime(), documents=False)


def test_flash_attention_4_is_put_in_the_place_of_flash_once(monkeypatch):
    activated = []
    monkeypatch.setattr(
        torch.nn.attention, "activate_flash_attention_impl", activated.append, raising=False
    )
    assert t.choose_attention("fa4", runtime(), documents=False)[0] == "fa4"
    assert activated == ["FA4"]


# --- Triton's kernels ---


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
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


def compare(twins, case, dtype, tolerance):
    name, tensors, rest = CASES[case]
    tensors = [x.to(dtype).double() for x in tensors]
    expected = values_and_gradients(globals()[f"naive_{name}"], tensors, rest, torch.float64)
    got = values_and_gradients(twins[name], tensors, rest, dtype)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance * a.abs().max().item())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["eager", "triton"])
def test_both_twins_equal_a_naive_float64_version_with_gradients(kernels, which, case):
    tf32 = 1e-2 if HERE.type == "cuda" and which == "triton" else 1e-5
    compare(t.EAGER._asdict() if which == "eager" else kernels, case, torch.float32, tf32)


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
    out = kernels["exclude_self"](y, v)
    out.sum().backward()
    assert torch.equal(out, y)
    assert torch.isfinite(v.grad).all()


def test_arguments_need_not_be_contiguous(kernels):
    y, v = (randn(8, h, 6, 2, seed=h).float().to(HERE).permute(3, 2, 1, 0) for h in (4, 2))
    got = kernels["exclude_self"](y, v)
    torch.testing.assert_close(got, t.exclude_self(y, v))


@pytest.mark.parametrize(
    "case", ["a row of one block", "relu squared", "grouped heads", "one head"]
)
@pytest.mark.usefixtures("kernels")
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
        "grouped heads": (
            "norm_rotate",
            (
                torch.randn(3, 6, 4, 12, **sizes),
                *(table.to(HERE) for table in TABLE),
                torch.randn(4, **sizes),
            ),
        ),
    }[case]
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(getattr(torch.ops.train_gpt, name).default, arguments, test_utils=cheap)


def model_run(kernels, cfg, plan, compiled=False):
    """Loss, gradients, and the inputs that the matrices of the MLPs saw."""
    model = random_model(cfg, t.EAGER._replace(**kernels)).to(HERE)
    seen = []
    if not compiled:
        for block in model.blocks:
            for module in (block.mlp.up, block.mlp.down):
                module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(cfg.vocab_size, (2, 13), generator=draw).to(HERE)
    if compiled:
        model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), plan=plan)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), *seen]


@pytest.mark.parametrize(
    "settings",
    [{}, dict(parallel_residual_form="lanes", xsa_last_n=1), dict(leaky_relu_slope=0.3)],
    ids=["#1493", "lanes", "rounded and masked"],
)
def test_the_whole_model_is_the_same_with_either_twin_and_calibration_sees_its_inputs(
    kernels, settings
):
    cfg = dataclasses.replace(SMALL, **settings)
    plan = t.depth_plan(cfg, looped=True)
    if "leaky_relu_slope" in settings:
        plan = plan._replace(rounded=True, masked=True)
    expected, got = (model_run(twins, cfg, plan) for twins in ({}, kernels))
    assert len(got) == len(expected) > len(plan.visits) * 2
    tolerance = 1e-4 if IN_INTERPRETER else 0.05  # the GPU multiplies in TF32
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance * (a.abs().max().item() + 1e-3))


def test_the_kernels_are_nodes_of_one_compiled_graph_with_gradients(kernels):
    plan = t.depth_plan(SMALL, looped=False)
    torch._dynamo.reset()
    expected = model_run({}, SMALL, plan)
    got = model_run(kernels, SMALL, plan, compiled=True)
    torch._dynamo.reset()
    tolerance = 1e-4 if IN_INTERPRETER else 0.05
    for a, b in zip(expected, got, strict=False):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance * (a.abs().max().item() + 1e-3))


# --- which kernels ---


def test_without_a_gpu_the_model_takes_the_eager_twins_unless_told_otherwise(kernels):
    assert t.choose_kernels("auto", runtime()) == ({}, "eager (the device is not a GPU)")
    assert t.choose_kernels("0", runtime("cuda", torch.bfloat16)) == ({}, "eager (as set)")
    found = t.choose_kernels("1", runtime(HERE))
    assert found == (kernels, "triton (all agree with their twins)")


def test_kernels_that_were_asked_for_and_cannot_run_are_an_error(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    fault = "triton: the device is not a GPU"
    with pytest.raises(ConfigError, match=f"^KERNELS=1: {fault}; unset it or set KERNELS=0$"):
        t.choose_kernels("1", runtime())
    monkeypatch.setattr(t, "triton_kernels", lambda: importlib.import_module("no_such_triton"))
    with pytest.raises(ConfigError, match="^KERNELS=1: triton: it does not import .*no_such_trito"):
        t.choose_kernels("1", runtime())
    found, why = t.choose_kernels("auto", runtime("cuda", torch.bfloat16))
    assert found == {}
    assert why.startswith("eager (it does not import (No module named 'no_such_triton'")


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
        (wrong_value, "it is wrong by "),
        (wrong_gradient, "it is wrong by 5.0e-01 of the largest value on this device"),
        (no_number, "it is wrong by nan"),
        (no_kernel, "RuntimeError: out of shared memory"),
    ],
)
def test_a_kernel_that_is_wrong_on_this_device_is_found_at_start(
    kernels, monkeypatch, stand_in, fault
):
    monkeypatch.setattr(t, "triton_kernels", lambda: kernels | dict(mlp_up=stand_in))
    faults = t.kernel_faults(runtime(HERE))
    found = faults.pop("mlp_up")
    assert found.startswith(fault)
    assert "more lines" not in found
    assert set(faults.values()) == {""}
    with pytest.raises(ConfigError, match="^KERNELS=1: mlp_up: .*; unset it or set KERNELS=0$"):
        t.choose_kernels("1", runtime(HERE))


# --- the backend ---


def as_on_a_gpu(rt):
    """Make KERNELS=auto try the kernels, which then run where this machine can run them."""
    faults, here = t.kernel_faults, runtime(rt.device)
    if rt.device.type == "cpu":
        rt.device = SimpleNamespace(type="cuda")
    return lambda rt: faults(here)


def a_fifth_off(function):
    def wrong(*args):
        out = function(*args)
        return tuple(1.2 * x for x in out) if isinstance(out, tuple) else 1.2 * out

    return wrong


@pytest.mark.parametrize("wrong", [None, *OPERATIONS])
def test_each_operation_falls_back_alone_and_by_name(kernels, monkeypatch, wrong):
    planted = {n: a_fifth_off(kernel) if n == wrong else kernel for n, kernel in kernels.items()}
    monkeypatch.setattr(t, "triton_kernels", lambda: planted)
    rt, lines = runtime(HERE), []
    monkeypatch.setattr(t, "kernel_faults", as_on_a_gpu(rt))
    rt.log = SimpleNamespace(line=lines.append)
    backend = t.choose_backend(Config(attention="sdpa"), rt)
    assert set(kernels) == {*OPERATIONS}
    for name, kernel in kernels.items():
        expected = getattr(t.EAGER, name) if name == wrong else kernel
        assert getattr(backend, name) is expected, name
    assert (backend.attention, backend.dtype) == (t.sdpa_attention, torch.float32)
    said = "triton (all agree with their twins)"
    if wrong:
        fault = "it is wrong by 2.0e-01 of the largest value on this device"
        said = f"triton except {wrong}: {fault}"
    assert backend.why == f"attention:sdpa (as set) kernels:{said}"
    assert lines == [backend.why]


def test_the_default_backend_is_eager_in_every_operation():
    backend = t.choose_backend(Config(attention="plain"), runtime())
    assert backend._replace(why="") == t.EAGER


def choices_of_a_rank(rt):
    """Who computes what on this rank, if a kernel and an attention are wrong on rank 1 alone."""
    importlib.import_module("triton").knobs.runtime.interpret = True
    stand_ins = {name: functools.partial(getattr(t.EAGER, name)) for name in OPERATIONS}
    if rt.rank == 1:
        stand_ins["norm_rotate"] = a_fifth_off(t.norm_rotate)
    attention = a_fifth_off(t.plain_attention) if rt.rank == 1 else t.plain_attention
    t.triton_kernels, t.flash_attention_3 = lambda: stand_ins, lambda rt: attention
    said = [t.choose_attention("auto", rt, documents=False)[::2]]
    for cfg in (Config(attention="fa3"), Config(attention="sdpa", kernels="1")):
        with pytest.raises(ConfigError) as caught:
            t.choose_backend(cfg, rt)
        said.append((str(caught.value), caught.value.on_all_ranks))
    device, t.kernel_faults = rt.device, as_on_a_gpu(rt)
    backend = t.choose_backend(Config(attention="sdpa"), rt)
    rt.device = device
    eager = [name for name in OPERATIONS if getattr(backend, name) is getattr(t.EAGER, name)]
    return [*said, backend.why, eager]


def test_two_ranks_one_of_which_has_a_fault_choose_the_same_backend():
    pytest.importorskip("triton")
    fault = "it is wrong by 2.0e-01 of the largest value on this device"
    expected = [
        ("sdpa", f"fa3 cannot be used: {fault}"),
        (f"ATTENTION=fa3: {fault}; unset it or set ATTENTION=sdpa", True),
        (f"KERNELS=1: norm_rotate: {fault}; unset it or set KERNELS=0", True),
        f"attention:sdpa (as set) kernels:triton except norm_rotate: {fault}",
        ["norm_rotate"],
    ]
    assert gloo(2, choices_of_a_rank) == [expected, expected]


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
    out = t.triton_kernels()[name](*tensors, *rest)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [torch.zeros_like(x) for x in out])


table = torch.zeros(2, 256, 1, 8).unbind()
call("cross_entropy", (512, 8192), rest=(torch.zeros(512).long(), 30.0, "mean"))
call("mlp_up", (2, 256, 512), (2048, 512), rest=(0.5,))
call("norm_rotate", (2, 256, 8, 64), (2, 256, 4, 64), (8,), rest=(table,))
call("exclude_self", (2, 256, 8, 64), (2, 256, 4, 64))
for name, kernel in made:
    print(name, "wgmma" in kernel.asm["ptx"], kernel.metadata.shared, len(kernel.asm["cubin"]) > 0)
"""


def test_every_kernel_compiles_for_a_hopper_gpu_and_the_product_uses_its_tensor_cores(tmp_path):
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= dict(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(Path(t.__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", FOR_HOPPER], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 10  # q and k are turned one after the other
    assert {row[0] for row in rows if row[1] == "True"} == {"product"}
    assert all(int(row[2]) <= 227 * 1024 and row[3] == "True" for row in rows)
