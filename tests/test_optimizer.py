"""Section 7: Muon and AdamW do what their papers say; gradients add up to those of one batch."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from conftest import gloo
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as t
from train_gpt import GPT, Config, Muon, lr_scale, muon_momentum

SHAPES = [(8, 8)] * 5 + [(16, 4)] * 3 + [(4, 16)]


def matrices(count, rows, cols, seed=0):
    return torch.randn(count, rows, cols, generator=torch.Generator().manual_seed(seed))


# --- Newton-Schulz ---


@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (12, 40), (40, 12), (1, 7), (7, 1)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_newton_schulz_keeps_the_singular_vectors_and_pushes_the_values_towards_one(
    rows, cols, spread
):
    u, _, v = torch.linalg.svd(matrices(3, rows, cols).double(), full_matrices=False)
    rank = min(rows, cols)
    values = torch.logspace(0, -math.log10(spread), rank, dtype=torch.float64)
    out = t.newton_schulz(u * values @ v, 5, torch.float64)
    inner = u.mT @ out @ v.mT  # diagonal, if the singular vectors are the same
    found = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(found), rtol=0, atol=1e-6)
    torch.testing.assert_close(out, u * found[:, None] @ v, rtol=0, atol=1e-6)
    assert found.min() > 0.68
    assert found.max() < 1.21


def test_newton_schulz_follows_its_quintic_on_every_singular_value():
    matrix = matrices(1, 6, 10)[0].double()
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    for steps in (1, 2, 5):
        x = values / values.square().sum().sqrt()
        for _ in range(steps):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        out = t.newton_schulz(matrix, steps, torch.float64)
        torch.testing.assert_close(out, u * x @ v, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_a_batch_is_orthogonalised_as_its_matrices_one_by_one(shape):
    batch = matrices(5, *shape)
    batch[3] *= 1000
    together = t.newton_schulz(batch, 5, torch.float32)
    for one, out in zip(batch, together, strict=True):
        torch.testing.assert_close(t.newton_schulz(one, 5, torch.float32), out)
    scaled = t.newton_schulz(batch * 0.01, 5, torch.float32)
    torch.testing.assert_close(scaled, together, rtol=1e-3, atol=1e-4)
    # A tall matrix is the wide one, turned.
    turned = t.newton_schulz(batch.mT.contiguous(), 5, torch.float32)
    torch.testing.assert_close(turned.mT, together, rtol=1e-3, atol=1e-4)


def test_zeros_stay_zeros_and_the_input_is_not_changed():
    zeros = torch.zeros(2, 3, 4)
    assert torch.equal(t.newton_schulz(zeros, 5, torch.bfloat16), zeros.bfloat16())
    batch = matrices(2, 6, 4)
    kept = batch.clone()
    out = t.newton_schulz(batch, 5, torch.bfloat16)
    assert torch.equal(batch, kept)
    assert out.dtype == torch.bfloat16
    precise = t.newton_schulz(batch, 5, torch.float64)
    assert 0 < (out - precise).abs().max() < 0.05  # rounded, but the same


# --- Muon ---


def naive_muon(weight, grads, *, lr, momentum, decay, row_normalize):
    """One matrix through several steps, from the published description"""
    weight, m = weight.double(), torch.zeros_like(weight).double()
    for g in grads:
        m = momentum * m + g
        u = g + momentum * m
        if row_normalize:
            u = torch.stack([row / max(row.norm(), 1e-7) for row in u])
        x = u.T if u.shape[0] > u.shape[1] else u
        x = x / (x.square().sum().sqrt() + 1e-7)
        for _ in range(5):
            A = x @ x.T
            x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
        u = x.T if u.shape[0] > u.shape[1] else x
        u = u * math.sqrt(max(1, u.shape[0] / u.shape[1]))
        weight = weight * (1 - lr * decay) - lr * u
    return weight


def random_problem(steps=4):
    """Weights of mixed shapes, in no order of shape, and a gradient for each step."""
    draw = torch.Generator().manual_seed(0)
    shapes = SHAPES[::2] + SHAPES[1::2]
    weights = [torch.randn(shape, generator=draw) for shape in shapes]
    grads = [[torch.randn(s, generator=draw) * 10**-step for s in shapes] for step in range(steps)]
    return weights, grads


def muon_config(**changes):
    return Config(**(dict(matrix_lr=0.05, muon_momentum=0.9, muon_wd=0.0) | changes))


def run_muon(rt, row_normalize):
    """The weights after some steps, and how many matrices this rank keeps momentum for."""
    weights, grads = random_problem()
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    muon = Muon(params, rt, muon_config(muon_wd=0.3, muon_row_normalize=row_normalize))
    for step in grads:
        for parameter, grad in zip(params, step, strict=True):
            parameter.grad = grad / rt.world_size
        muon.reduce()()
        muon.step()
    kept = sum(len(state["momentum"]) for state in muon.state.values())
    return [p.detach() for p in params], kept


@pytest.mark.parametrize("row_normalize", [False, True])
def test_muon_equals_a_naive_one_matrix_by_matrix(rt, row_normalize):
    weights, grads = random_problem()
    got, kept = run_muon(rt, row_normalize)
    assert kept == len(weights)
    for number, weight in enumerate(weights):
        expected = naive_muon(
            weight,
            [step[number] for step in grads],
            lr=0.05,
            momentum=0.9,
            decay=0.3,
            row_normalize=row_normalize,
        )
        torch.testing.assert_close(got[number].double(), expected, rtol=1e-4, atol=1e-4)


def test_row_normalisation_makes_a_difference(rt):
    plain, normalised = (run_muon(rt, flag)[0] for flag in (False, True))
    assert all((a - b).abs().max() > 0.01 for a, b in zip(plain, normalised, strict=True))


def test_a_row_without_gradient_is_only_decayed(rt):
    weight = torch.nn.Parameter(matrices(1, 4, 6)[0])
    before = weight.detach().clone()
    muon = Muon([weight], rt, muon_config(matrix_lr=0.1, muon_wd=0.5))
    weight.grad = matrices(1, 4, 6, seed=1)[0]
    weight.grad[2] = 0
    muon.step()
    torch.testing.assert_close(weight.detach()[2], before[2] * 0.95)
    assert (weight.detach()[1] - before[1] * 0.95).abs().max() > 0.01


def test_the_matrices_of_the_model_get_the_scale_of_their_shape(rt):
    """System #1493: sqrt(max(1, rows / cols)) is 2 for the up projection, 1 for the others."""
    for (rows, cols), scale in {(32, 8): 2, (8, 8): 1, (4, 8): 1, (8, 32): 1}.items():
        weight = torch.nn.Parameter(torch.zeros(rows, cols))
        changes = dict(matrix_lr=1.0, muon_momentum=0.0, muon_row_normalize=False)
        muon = Muon([weight], rt, muon_config(**changes))
        weight.grad = matrices(1, rows, cols)[0]
        muon.step()
        values = torch.linalg.svdvals(weight.detach()) / scale
        assert 0.68 < values.min() <= values.max() < 1.21


@pytest.mark.parametrize("world_size", [2, 3])
def test_muon_on_several_ranks_equals_muon_on_one(rt, world_size):
    """5, 3 and 1 matrices of a shape: they never divide, and some ranks have none."""
    alone, _ = run_muon(rt, True)
    results = gloo(world_size, run_muon, True)
    for weights, kept in results:
        assert kept == sum(-(-count // world_size) for count in (5, 3, 1))
        for got, expected in zip(weights, alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for number in range(len(alone)):  # among themselves to the last bit, or they drift apart
        assert all(torch.equal(r[0][number], results[0][0][number]) for r in results)


def test_all_updates_leave_before_any_is_waited_for_and_the_largest_leave_first(rt):
    """While the updates of one shape travel, those of the next are computed."""
    weights, grads = random_problem(steps=1)
    params = [torch.nn.Parameter(w) for w in weights]
    for parameter, grad in zip(params, grads[0], strict=True):
        parameter.grad = grad
    events, muon = [], Muon(params, rt, muon_config())

    def started(update):
        events.append(f"update leaves {tuple(update[0].shape)}")
        return lambda: events.append(f"update arrives {tuple(update[0].shape)}") or update

    def orthogonalize(update, *args):
        events.append(f"computed {tuple(update[0].shape)}")
        return update

    rt.start_gather = started
    muon.orthogonalize = orthogonalize
    muon.step()
    order = [(8, 8), (16, 4), (4, 16)]  # 5, 3 and 1 matrices
    expected = [f"{word} {shape}" for shape in order for word in ("computed", "update leaves")]
    assert events == expected + [f"update arrives {shape}" for shape in order]


def test_the_norm_of_all_gradients_has_the_digits_of_torch(rt):
    weights, grads = random_problem(steps=1)
    params = [torch.nn.Parameter(w) for w in weights]
    for parameter, grad in zip(params, grads[0], strict=True):
        parameter.grad = grad
    expected = torch.nn.utils.get_total_norm(grads[0])
    assert torch.equal(t.global_norm(params, set(params[:4]), rt), expected)
    params[2].grad[1, 1] = math.nan
    assert t.global_norm(params, set(), rt).isnan()


# --- who optimizes what ---


def test_every_group_gets_the_rate_decay_and_betas_of_its_settings(tiny_cfg, rt):
    cfg = dataclasses.replace(
        tiny_cfg,
        matrix_lr=0.01,
        muon_wd=0.11,
        muon_momentum=0.8,
        muon_backend_steps=3,
        muon_row_normalize=False,
        tied_embed_lr=0.02,
        embed_wd=0.12,
        scalar_lr=0.03,
        adam_wd=0.13,
        beta1=0.7,
        beta2=0.8,
        adam_eps=1e-6,
    )
    model = GPT(cfg)
    optimizers = t.make_optimizers(model, cfg, rt)
    for name, lr, decay in (
        ("matrix", 0.01, 0.11),
        ("embedding", 0.02, 0.12),
        ("scalar", 0.03, 0.13),
    ):
        (group,) = optimizers[name].param_groups
        assert (group["lr"], group["weight_decay"]) == (lr, decay)
    muon = optimizers["matrix"]
    assert muon.param_groups[0]["momentum"] == 0.8
    assert (muon.cfg.muon_backend_steps, muon.cfg.muon_row_normalize) == (3, False)
    for name in ("embedding", "scalar"):
        (group,) = optimizers[name].param_groups
        assert isinstance(optimizers[name], torch.optim.AdamW)
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-6)


def test_the_groups_partition_the_parameters_by_their_kind(tiny_cfg):
    model = GPT(tiny_cfg)
    groups = t.parameter_groups(model)
    grouped = [id(p) for params in groups.values() for p in params]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert [id(p) for p in groups["embedding"]] == [id(model.head.weight)]
    assert len(groups["matrix"]) == 66
    assert len(groups["scalar"]) == 11 * 4 + 2


def naive_adamw(weight, grads, *, lr, betas, eps, decay):
    weight, m, v = weight.double(), 0.0, 0.0
    for step, g in enumerate(grads, 1):
        g = g.double()
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        mean, square = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
        weight = weight * (1 - lr * decay) - lr * mean / (square.sqrt() + eps)
    return weight


def test_vectors_and_the_embedding_take_the_steps_of_adamw(tiny_cfg, rt):
    cfg, draw = tiny_cfg, torch.Generator().manual_seed(0)
    model = GPT(cfg)
    before = copy.deepcopy(model.state_dict())
    optimizers, history = t.make_optimizers(model, cfg, rt), {}
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            history.setdefault(name, []).append(parameter.grad.clone())
        for optimizer in optimizers.values():
            optimizer.step()
    expected = {"head.weight": (0.03, 0.085)} | dict.fromkeys(
        ["skip_gates", "skip_weights", "blocks.3.attn.q_gain", "blocks.9.resid_mix"], (0.02, 0.02)
    )
    for name, (lr, decay) in expected.items():
        naive = naive_adamw(
            before[name], history[name], lr=lr, betas=(0.9, 0.95), eps=1e-8, decay=decay
        )
        got = model.get_parameter(name).detach().double()
        torch.testing.assert_close(got, naive, rtol=1e-5, atol=1e-6)


# --- gradients ---


@pytest.mark.parametrize("micro_rows", [1, 2, 5])
def test_gradients_added_by_ranks_and_forwards_are_those_of_one_big_batch(tiny_cfg, micro_rows):
    model, plan = GPT(tiny_cfg), t.depth_plan(tiny_cfg, looped=True)
    model.init_weights(0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # zero projections would hide what lies behind them
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    windows = torch.randint(tiny_cfg.vocab_size, (5, 17), generator=draw)
    twin, forward = copy.deepcopy(model), functools.partial(model, plan=plan)
    mean = twin(windows[:, :-1], windows[:, 1:], plan=plan)
    mean.backward()
    parts = [windows[:3], windows[3:], windows[5:]]  # the last rank has none
    losses = [t.add_gradients(forward, part, micro_rows, 5) for part in parts]
    assert not losses[0].requires_grad
    assert losses[2] == 0
    torch.testing.assert_close(sum(losses), mean.detach())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)
        assert q.grad.any(), name


def test_a_rank_without_windows_runs_no_forward():
    def forward(*args):
        raise AssertionError("there is nothing to run")

    assert t.add_gradients(forward, torch.zeros(0, 9, dtype=torch.int64), 4, 7) == 0


# --- schedules ---


def test_the_rate_is_constant_and_then_a_line_to_zero():
    cfg = Config()  # warmdown 0.72
    points = {0.0: 1, 0.1: 1, 0.28: 1, 0.46: 0.75, 0.64: 0.5, 0.82: 0.25, 1.0: 0}
    for frac, expected in points.items():
        assert lr_scale(frac, cfg) == pytest.approx(expected, abs=1e-12)


def test_the_rate_never_falls_below_its_floor():
    cfg = Config(warmdown_frac=0.5, min_lr=0.1)
    for frac, expected in {0.5: 1, 0.75: 0.5, 0.94: 0.12, 0.96: 0.1, 1.0: 0.1, 1.2: 0.1}.items():
        assert lr_scale(frac, cfg) == pytest.approx(expected)


def test_without_warmdown_the_rate_stays_and_with_nothing_else_it_falls_from_the_start():
    assert [lr_scale(frac, Config(warmdown_frac=0.0)) for frac in (0.0, 0.99, 1.0)] == [1, 1, 1]
    for frac in (0.0, 0.3, 1.0):
        assert lr_scale(frac, Config(warmdown_frac=1.0)) == pytest.approx(1 - frac)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_never_rises_and_stays_between_its_floor_and_one(one, two, warmdown, floor):
    cfg = Config(warmdown_frac=warmdown, min_lr=floor)
    early, late = (lr_scale(frac, cfg) for frac in sorted((one, two)))
    assert floor <= late <= early + 1e-12 <= 1 + 1e-6


def test_momentum_is_a_line_over_the_first_steps_and_then_constant():
    cfg = Config()
    for step, expected in {
        0: 0.92,
        300: 0.934,
        750: 0.955,
        1500: 0.99,
        1501: 0.99,
        9999: 0.99,
    }.items():
        assert muon_momentum(step, cfg) == pytest.approx(expected, abs=1e-12)
    cfg = Config(muon_momentum=0.5, muon_momentum_warmup_start=0.1, muon_momentum_warmup_steps=4)
    found = [muon_momentum(step, cfg) for step in range(6)]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert muon_momentum(0, dataclasses.replace(cfg, muon_momentum_warmup_steps=0)) == 0.5


def test_a_warmdown_in_steps_is_the_time_left_over_the_time_of_so_many_steps():
    cfg = Config(warmdown_iters=3500, max_wallclock_seconds=612.0, gptq_reserve_seconds=12.0)
    times = ((0, 0.0), (0, 1e-6), (0, 1.0), (1, 1.0), (1000, 85.8), (4000, 343.2), (6900, 592.0))
    for step, seconds in times:
        left = (600 - seconds) / (3500 * seconds / max(step, 1)) if seconds else 1.0
        frac = t.training_frac(step, seconds, cfg)
        assert lr_scale(frac, cfg, step) == pytest.approx(min(left, 1.0)), step
    cfg = Config(warmdown_iters=30, iterations=40, max_wallclock_seconds=0.0)
    found = [lr_scale(t.training_frac(s, 9.0, cfg), cfg, s) for s in (0, 10, 11, 25, 39)]
    assert found == pytest.approx([1.0, 1.0, 29 / 30, 0.5, 1 / 30])
