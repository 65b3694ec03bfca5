"""Section 4: attention by document, and the kernels that it can run on."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import torch

import train_gpt as t
from train_gpt import Config, ConfigError

CPU = torch.device("cpu")
HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")]
# All that may make one token's output depend on another's.
MIXING = Config(
    vocab_size=24,
    model_dim=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=4,
    mlp_mult=2.0,
    loop_start=1,
    loop_end=1,
    num_loops=1,
    parallel_residual_start=2,
    smear_gate_enabled=True,
    bigram_vocab_size=16,
    bigram_dim=8,
    ve_dim=8,
    ve_layers="1",
    train_seq_len=16,
)


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


# --- attention within them ---


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


def stand_in_package(name, monkeypatch, with_statistics=False):
    package = type(t.sys)(name)

    def varlen(*args, **options):
        out = varlen_by_definition(*args, **options)
        return (out, None) if with_statistics else out

    package.flash_attn_func = lambda q, k, v, causal: t.plain_attention(q, k, v)
    package.flash_attn_varlen_func = package.varlen_attn = varlen
    monkeypatch.setitem(t.sys.modules, name, package)


def kernel_of(name, monkeypatch):
    """An attention function by documents, its device and its type."""
    if name == "fa3 on a GPU":
        device, dtype = torch.device("cuda"), torch.bfloat16
        return t.select_attention("fa3", device, dtype, packed=True)[1], device, dtype
    if name == "fa3":
        stand_in_package("flash_attn_interface", monkeypatch, with_statistics=True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        args = torch.device("cuda"), torch.bfloat16
        return t.select_attention("fa3", *args, packed=True)[1], CPU, torch.float32
    if name == "flash":
        stand_in_package("torch.nn.attention.varlen", monkeypatch)
        t.one_backend.cache_clear()
    return t.select_attention(name, CPU, torch.float32, packed=True)[1], CPU, torch.float32


@pytest.mark.parametrize(
    "name", ["plain", "sdpa", "fa3", "flash", pytest.param("fa3 on a GPU", marks=ON_GPU)]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_each_document_alone_gives_the_same_outputs_and_gradients(
    name, heads, kv_heads, monkeypatch
):
    kernel, device, dtype = kernel_of(name, monkeypatch)
    tokens = rows_of_documents([0, 5, 1, 12, 6], [24], [3, 21], [8, 8, 8]).to(device)
    width = 64 if device.type == "cuda" else 8
    make = functools.partial(random_qkv, 4, 24, heads, kv_heads, width, dtype, device)
    packed, alone = make(), make()
    weight = torch.randn(4, 24, heads, width, generator=torch.Generator().manual_seed(1))
    weight = weight.to(device, dtype)
    out = kernel(*packed, t.find_documents(tokens))
    (out * weight).sum().backward()
    expected = torch.empty_like(out)
    for row, first, stop in pieces(tokens):
        part = t.plain_attention(*(x[row : row + 1, first:stop] for x in alone))
        expected[row, first:stop] = part[0].detach()
        (part * weight[row, first:stop]).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    pairs = [(out.detach(), expected)]
    pairs += [(x.grad, y.grad) for x, y in zip(packed, alone, strict=True)]
    for got, want in pairs:
        limit = tolerance * want.float().abs().max().item()
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=limit)
    t.one_backend.cache_clear()


def test_more_documents_than_a_row_has_room_for_are_the_same_ones_to_every_kernel(monkeypatch):
    documents, qkv = t.find_documents(torch.full((2, 64), t.BOS)), random_qkv(2, 64, 4, 2)
    expected = t.plain_attention(*qkv, documents)
    for name in ("sdpa", "fa3"):
        got = kernel_of(name, monkeypatch)[0](*qkv, documents)
        torch.testing.assert_close(got, expected)


def random_model(cfg):
    model, draw = t.GPT(cfg, t.sdpa_attention), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
    return model


@pytest.mark.parametrize("form", ["gptj", "lanes"])
def test_a_packed_row_gives_each_document_the_losses_and_gradients_it_has_alone(form):
    cfg = dataclasses.replace(MIXING, parallel_residual_form=form)
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(2, cfg.vocab_size, (2, 17), generator=draw)
    for row, place in ((0, 4), (0, 5), (0, 12), (1, 0), (1, 9)):
        text[row, place] = t.BOS
    tokens, targets = text[:, :-1], text[:, 1:]
    plan = t.depth_plan(cfg, looped=True)
    results = []
    for packed in (True, False):
        model = random_model(cfg)
        forward = functools.partial(model, plan=plan._replace(packed=packed), reduction="none")
        losses = forward(tokens, targets)
        if not packed:
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


@pytest.mark.parametrize("doc_packing", [False, True])
def test_training_alone_is_packed_and_only_if_it_was_set(tiny_cfg, rt, doc_packing):
    cfg = dataclasses.replace(tiny_cfg, doc_packing=doc_packing)
    model = t.GPT(cfg)
    plan, seen = t.depth_plan(cfg, looped=False), []

    def forward(tokens, targets, *, plan):
        seen.append(plan)
        return model.head.weight.sum()

    windows = torch.zeros(8, 33, dtype=torch.long)
    t.train_step(forward, windows, plan, model, t.make_optimizers(model, cfg, rt), cfg, rt)
    assert {seen_plan.packed for seen_plan in seen} == {doc_packing}
    assert not plan.packed  # that of validation, calibration and scoring


def test_a_tokenizer_with_another_bos_cannot_be_packed():
    t.check_documents(2, Config())
    t.check_documents(t.BOS, Config(doc_packing=True))
    t.check_documents(2, Config(doc_packing=True, artifact="x.bin"))  # nothing is trained
    with pytest.raises(ConfigError, match="^DOC_PACKING=1: the tokenizer's BOS is 2, expected 1"):
        t.check_documents(2, Config(doc_packing=True))


# --- which kernel ---


def test_flash_attention_inside_pytorch_can_be_asked_for_and_equals_the_plain_one():
    name, kernel, why = t.select_attention("flash", CPU, torch.float32)
    assert (name, why) == ("flash", "as set")
    qkv = random_qkv(2, 33, 4, 2)
    with torch.profiler.profile() as profile:
        out = kernel(*qkv)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {e.name for e in profile.events()}
    torch.testing.assert_close(out, t.plain_attention(*qkv))


def test_a_kernel_inside_pytorch_that_this_device_lacks_is_refused_in_one_line():
    t.one_backend.cache_clear()
    for choice in ("cudnn", "fa4"):
        for packed in (False, True):
            with pytest.raises(ConfigError) as caught:
                t.select_attention(choice, CPU, torch.float32, packed=packed)
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
        t.select_attention("flash", CPU, torch.float32)


def test_flash_attention_4_is_put_in_the_place_of_flash_once(monkeypatch):
    activated = []
    monkeypatch.setattr(
        torch.nn.attention, "activate_flash_attention_impl", activated.append, raising=False
    )
    t.one_backend.cache_clear()
    for _ in range(2):
        assert t.select_attention("fa4", CPU, torch.float32)[0] == "fa4"
    assert activated == ["FA4"]
    t.one_backend.cache_clear()


def test_flash_attention_3_is_found_under_either_name_of_its_module(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(t.sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(t.sys.modules, "flash_attn_3", type(t.sys)("flash_attn_3"))
    hopper = torch.device("cuda", 0), torch.bfloat16
    assert t.select_attention("auto", *hopper)[0] == "sdpa"
    stand_in_package("flash_attn_3.flash_attn_interface", monkeypatch)
    name, kernel, why = t.select_attention("auto", *hopper)
    assert (name, why) == ("fa3", "installed")
    qkv = random_qkv(1, 5, 2, 2)
    assert torch.equal(kernel(*qkv), t.plain_attention(*qkv))
