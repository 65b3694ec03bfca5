"""Section 9: GPTQ against rounding, against a naive float64 version, and the Hessians it reads."""

import collections
import dataclasses
import itertools
import math

import pytest
import test_training
import torch
from test_training import fresh

import train_gpt as t

loader, log_file = test_training.loader, test_training.log_file  # fixtures


def correlated(rows, cols, seed=0):
    """A Gaussian matrix and the Hessian of strongly correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=draw)
    inputs = torch.randn(4 * cols, cols, generator=draw) @ torch.randn(cols, cols, generator=draw)
    return weight, inputs.T @ inputs / len(inputs)


def store(bits=6, clip_sigmas=12.85, order="descending"):
    return t.AsCodes(bits, order, clip_sigmas)


def naive_gptq(weight, hessian, bits, clip_sigmas, order="descending"):
    """Round a column, spread its error by the inverse Hessian of those left, eliminate it."""
    sign = {"descending": -1, "ascending": 1}[order]
    w, h, top = weight.double().clone(), hessian.double().clone(), 2 ** (bits - 1) - 1
    scale = (clip_sigmas * weight.std(dim=1, correction=1) / top).half().double()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    inverse, codes = torch.linalg.inv(h), torch.zeros_like(w)
    for j in sorted(range(len(h)), key=lambda i: sign * float(hessian[i, i])):
        codes[:, j] = (w[:, j] / scale).round().clamp(-top, top)
        error = (w[:, j] - codes[:, j] * scale) / inverse[j, j]
        w -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # eliminated: its own row and column are zero from here on
        w[:, j] = 0.0
    return codes, scale


def output_error(weight, hessian, quantized):
    """The expected squared error of the outputs, tr(E H E^T)."""
    error = weight.double() - quantized.dequantize().double()
    return float((error @ hessian.double() * error).sum())


def test_identity_hessian_means_rounding_to_nearest():
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
    found = t.gptq_quantize(weight, torch.eye(200), store())
    nearest = (weight / found.scales.float()[:, None]).round().clamp(-31, 31)
    assert torch.equal(found.codes.float(), nearest)


@pytest.mark.parametrize("cols", [24, 128, 300])
@pytest.mark.parametrize(("bits", "clip_sigmas"), [(6, 12.85), (8, 20.0), (3, 2.0)])
@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_codes_equal_a_naive_float64_gptq_column_by_column(cols, bits, clip_sigmas, order):
    weight, hessian = correlated(16, cols)
    codes, scale = naive_gptq(weight, hessian, bits, clip_sigmas, order)
    found = t.gptq_quantize(weight.double(), hessian.double(), store(bits, clip_sigmas, order))
    assert torch.equal(found.scales.double(), scale)
    differing = (found.codes.double() != codes).double().mean()
    assert differing < 0.002, "more than float32 rounding of near-ties explains"


def test_the_order_of_the_columns_matters():
    weight, hessian = correlated(16, 60)
    orders = ("descending", "ascending")
    one, other = (t.gptq_quantize(weight, hessian, store(order=order)).codes for order in orders)
    assert (one != other).double().mean() > 0.05


def test_correlated_inputs_make_gptq_much_better_than_rounding():
    weight, hessian = correlated(64, 192)
    found = t.gptq_quantize(weight, hessian, store(4, 4.0))
    nearest = (weight / found.scales.float()[:, None]).round().clamp(-7, 7).to(torch.int8)
    rounded = t.Codes(nearest, found.scales, 4)
    assert output_error(weight, hessian, found) < 0.5 * output_error(weight, hessian, rounded)


def test_descending_diagonal_beats_the_given_order_on_unequal_inputs():
    weight, hessian = correlated(64, 96)
    size = torch.logspace(-1, 1, 96)  # the important columns come last
    hessian = hessian * size[:, None] * size
    flat = t.gptq_quantize(weight, hessian, store(4, 4.0))
    order = torch.argsort(hessian.diagonal(), descending=True)
    shuffled = t.gptq_quantize(weight[:, order], hessian[order][:, order], store(4, 4.0))
    assert torch.equal(flat.codes[:, order], shuffled.codes)


def test_the_scale_is_k_sigma_over_the_largest_code_with_bessels_correction():
    weight = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    found = t.gptq_quantize(weight, torch.eye(4), store())
    sigma = (((weight[0] - 3.0) ** 2).sum() / 3).sqrt()
    assert found.scales[0] == (12.85 * sigma / 31).half()
    assert found.codes[1].eq(0).all()
    assert found.scales[1] > 0


def test_columns_without_inputs_get_code_zero_and_harm_no_other():
    weight, hessian = correlated(8, 32)
    dead = torch.tensor([3, 17])
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = t.gptq_quantize(weight, hessian, store())
    assert found.codes[:, dead].eq(0).all()
    nearest = (weight / found.scales.float()[:, None]).round().clamp(-31, 31).to(torch.int8)
    rounded = t.Codes(nearest, found.scales, 6)
    assert output_error(weight, hessian, found) < 0.7 * output_error(weight, hessian, rounded)


def test_arguments_stay_as_they_were():
    weight, hessian = correlated(8, 16)
    before = weight.clone(), hessian.clone()
    t.gptq_quantize(weight, hessian, store())
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize(("cols", "bits"), [(15, 6), (16, 1), (16, 9)])
def test_shapes_and_bits_that_make_no_sense_are_refused(cols, bits):
    with pytest.raises(ValueError, match="weight"):
        t.gptq_quantize(torch.randn(4, cols), torch.eye(16), store(bits))


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, hessian = correlated(1, 40)
    factor = t.inverse_factor(hessian.double())
    assert torch.equal(factor, factor.triu())
    inverse = torch.linalg.inv(hessian.double())
    torch.testing.assert_close(factor, torch.linalg.cholesky(inverse, upper=True))


# --- calibration ---


def random_model(cfg):
    """A model in which no matrix is zero: zero projections would make every layer alike."""
    torch.manual_seed(0)
    model = fresh(cfg)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


def calibrate(model, loader, cfg, rt, *, looped=False):
    plan = t.depth_plan(cfg, looped=looped)
    with rt.budget.phase("calibration"):
        return t.collect_hessians(model, loader, cfg, rt, plan=plan, first=5)


def stored_by_gptq(model):
    return {name for name, row in model.rows.items() if row.store.gptq}


@pytest.mark.parametrize("looped", [False, True])
def test_hessians_are_the_mean_outer_products_of_the_inputs_of_each_matrix(
    tiny_cfg, rt, loader, looped
):
    model = random_model(tiny_cfg)
    found = calibrate(model, loader, tiny_cfg, rt, looped=looped)
    rows = tiny_cfg.train_rows // 8 or 1
    windows = loader.windows(5, rows * tiny_cfg.gptq_calibration_batches)
    tokens = torch.from_numpy(windows[:, :-1].astype("int64"))
    seen = {name: [] for name in found}
    for name in seen:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0]))
    plan = t.depth_plan(tiny_cfg, looped=looped)
    with torch.no_grad():
        model(tokens, plan=plan)
    visits = sum(v.layer == 4 for v in plan.visits)
    assert len(seen["blocks.4.mlp.up.weight"]) == visits
    assert set(found) == stored_by_gptq(model)
    assert len(found) == 11 * 6 + 1
    for name, inputs in seen.items():
        x = torch.cat([i.flatten(0, 1) for i in inputs]).double()
        expected = (x.T @ x / len(x)).float()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_a_matrix_that_gptq_does_not_store_has_no_hessian(tiny_cfg, rt, loader):
    options = dict(embed_quantizer="nearest", ve_dim=4, bigram_vocab_size=9)
    model = random_model(dataclasses.replace(tiny_cfg, **options))
    found = calibrate(model, loader, model.cfg, rt)
    assert set(found) == stored_by_gptq(model)
    assert all(name.startswith("blocks.") for name in found)
    assert not any(module._forward_pre_hooks for module in model.modules()), "no hook is left"


def test_the_embedding_hessian_is_taken_where_the_head_reads(tiny_cfg, rt, loader):
    found = calibrate(random_model(tiny_cfg), loader, tiny_cfg, rt)
    # The head reads RMS-normalised vectors, so the mean square of its inputs is one.
    assert found["head.weight"].diagonal().mean() == pytest.approx(1.0, abs=1e-3)


def test_calibration_stops_before_the_batch_that_would_exceed_the_training_budget(
    tiny_cfg, rt, loader, log_file, monkeypatch
):
    now, durations = [0.0], iter([10.0, *[3.0] * 60])
    monkeypatch.setattr(t.time, "perf_counter", lambda: now[0])
    rt.budget = t.Budget(tiny_cfg)
    rt.synchronize = lambda: now.__setitem__(0, now[0] + next(durations))  # once for each batch
    cfg = dataclasses.replace(
        tiny_cfg,
        max_wallclock_seconds=130.0,
        gptq_calibration_batches=50,
        gptq_reserve_seconds=30.0,
    )
    model = random_model(cfg)
    with rt.budget.phase("train"):
        now[0] += 100.0
    found = calibrate(model, loader, cfg, rt)
    # 10 s with compilation, then 3 s each: the seventh ends at 128 s, an eighth would at 131 s.
    assert "calibration stopped by the budget after 7/50 batches" in log_file.read_text()
    assert rt.budget.seconds["calibration"] == pytest.approx(28.0)
    seven = dataclasses.replace(cfg, max_wallclock_seconds=0.0, gptq_calibration_batches=7)
    expected = calibrate(model, loader, seven, rt)
    for name, hessian in found.items():
        torch.testing.assert_close(hessian, expected[name], msg=name)


# --- a model ---


def eyes(model):
    """A Hessian of uncorrelated inputs for each matrix of GPTQ."""
    weights = dict(model.named_parameters())
    return {name: torch.eye(weights[name].shape[1]) for name in stored_by_gptq(model)}


def test_every_tensor_is_stored_as_its_row_of_the_table_says(tiny_cfg, rt):
    options = dict(embed_quantizer="nearest", ve_dim=4, bigram_vocab_size=9)
    for cfg in (tiny_cfg, dataclasses.replace(tiny_cfg, **options)):
        model = random_model(cfg)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        stored = t.quantize_model(model, eyes(model), rt)
        assert list(stored) == list(weights)
        for name, found in stored.items():
            if isinstance(model.rows[name].store, t.AsFloats):
                assert found.kind == "float16", name
                assert torch.equal(found.values, weights[name].half()), name
                continue
            # With unit Hessians GPTQ rounds to nearest too.
            bits, sigmas = (6, 12.85) if name.startswith("blocks") else (8, 20.0)
            top, sigma = 2 ** (bits - 1) - 1, weights[name].std(dim=1, keepdim=True)
            step = (sigmas * sigma / top).half().float()
            codes = (weights[name] / step).round().clamp(-top, top)
            assert found.kind == f"int{bits}", name
            assert torch.equal(found.codes.float(), codes), name
            assert torch.equal(found.dequantize(), codes * step), name


def test_coarser_ranges_widen_the_steps_by_that_factor(tiny_cfg, rt):
    model = random_model(tiny_cfg)
    fine, wide = (t.quantize_model(model, eyes(model), rt, factor) for factor in (1.0, 1.5))
    for name in ("head.weight", "blocks.3.mlp.up.weight"):
        one, other = fine[name].scales.float(), wide[name].scales.float()
        torch.testing.assert_close(other, 1.5 * one, rtol=2e-3, atol=0)


def test_entropy_bits_are_those_of_a_naive_count():
    codes = torch.randint(-3, 4, (7, 30), generator=torch.Generator().manual_seed(0))
    counts = collections.Counter(codes.flatten().tolist()).values()
    expected = sum(-n * math.log2(n / 210) for n in counts) + 16 * 7
    stored = t.Codes(codes.to(torch.int8), torch.ones(7).half(), 3)
    assert stored.entropy_bits() == pytest.approx(expected)
    assert t.Floats(torch.ones(3, 5).half()).entropy_bits() == 16 * 15
    assert t.Floats(torch.ones(())).entropy_bits() == 32


def test_pruning_zeroes_just_the_ones_of_the_smallest_steps():
    draw = torch.Generator().manual_seed(0)
    codes = [torch.randint(-3, 4, (5, 20), generator=draw).to(torch.int8) for _ in range(2)]
    scales = [torch.rand(5, generator=draw).half() for _ in range(2)]
    made = [t.Codes(c.clone(), s, 6) for c, s in zip(codes, scales, strict=True)]
    table = t.Codes(torch.ones(2, 20, dtype=torch.int8), torch.zeros(2).half(), 8)
    ones = sorted(
        (float(scales[m][i]) ** 2, m, i, j)
        for m, i, j in itertools.product(range(2), range(5), range(20))
        if abs(int(codes[m][i, j])) == 1
    )
    count = len(ones) // 2
    assert t.prune_ones({"a": made[0], "b": made[1], "t": table}, 6, count) == count
    for square, m, i, j in ones[:count]:
        if square < ones[count][0]:  # in the last row any of its ones may go
            codes[m][i, j] = 0
    changed = [(now.codes != c).nonzero() for now, c in zip(made, codes, strict=True)]
    edge = ones[count][1:3]
    for m, places in enumerate(changed):
        assert all((m, int(i)) == edge for i, _ in places)
    assert sum(int((now.codes.abs() == 1).sum()) for now in made) == len(ones) - count
    assert (table.codes == 1).all(), "tables are left alone"
