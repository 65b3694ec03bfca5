"""Section 7: GPTQ against rounding, against a naive float64 version, and the Hessians it reads."""

import pytest
import torch

import train_gpt as t


def correlated(rows, cols, seed=0):
    """A Gaussian matrix and the Hessian of strongly correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=draw)
    inputs = torch.randn(4 * cols, cols, generator=draw) @ torch.randn(cols, cols, generator=draw)
    return weight, inputs.T @ inputs / len(inputs)


def naive_gptq(weight, hessian, bits, clip_sigmas):
    """Round a column, spread its error by the inverse Hessian of those left, eliminate it."""
    w, h, top = weight.double().clone(), hessian.double().clone(), 2 ** (bits - 1) - 1
    scale = (clip_sigmas * weight.std(dim=1, correction=1) / top).half().double()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    inverse, codes = torch.linalg.inv(h), torch.zeros_like(w)
    for j in sorted(range(len(h)), key=lambda i: -float(hessian[i, i])):
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
    found = t.gptq_quantize(weight, torch.eye(200), bits=6, clip_sigmas=12.85)
    nearest = (weight / found.scales.float()[:, None]).round().clamp(-31, 31)
    assert torch.equal(found.codes.float(), nearest)


@pytest.mark.parametrize("cols", [24, 128, 300])
@pytest.mark.parametrize(("bits", "clip_sigmas"), [(6, 12.85), (8, 20.0), (3, 2.0)])
def test_codes_equal_a_naive_float64_gptq_column_by_column(cols, bits, clip_sigmas):
    weight, hessian = correlated(16, cols)
    codes, scale = naive_gptq(weight, hessian, bits, clip_sigmas)
    found = t.gptq_quantize(weight.double(), hessian.double(), bits=bits, clip_sigmas=clip_sigmas)
    assert torch.equal(found.scales.double(), scale)
    differing = (found.codes.double() != codes).double().mean()
    assert differing < 0.002, "more than float32 rounding of near-ties explains"


def test_correlated_inputs_make_gptq_much_better_than_rounding():
    weight, hessian = correlated(64, 192)
    found = t.gptq_quantize(weight, hessian, bits=4, clip_sigmas=4.0)
    nearest = (weight / found.scales.float()[:, None]).round().clamp(-7, 7).to(torch.int8)
    rounded = t.Quantized(nearest, found.scales, 4)
    assert output_error(weight, hessian, found) < 0.5 * output_error(weight, hessian, rounded)


def test_descending_diagonal_beats_the_given_order_on_unequal_inputs():
    weight, hessian = correlated(64, 96)
    size = torch.logspace(-1, 1, 96)  # the important columns come last
    hessian = hessian * size[:, None] * size
    flat = t.gptq_quantize(weight, hessian, bits=4, clip_sigmas=4.0)
    order = torch.argsort(hessian.diagonal(), descending=True)
    shuffled = t.gptq_quantize(weight[:, order], hessian[order][:, order], bits=4, clip_sigmas=4.0)
    assert torch.equal(flat.codes[:, order], shuffled.codes)


def test_the_scale_is_k_sigma_over_the_largest_code_with_bessels_correction():
    weight = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    found = t.gptq_quantize(weight, torch.eye(4), bits=6, clip_sigmas=12.85)
    sigma = (((weight[0] - 3.0) ** 2).sum() / 3).sqrt()
    assert found.scales[0] == (12.85 * sigma / 31).half()
    assert found.codes[1].eq(0).all()
    assert found.scales[1] > 0


def test_columns_without_inputs_get_code_zero_and_harm_no_other():
    weight, hessian = correlated(8, 32)
    dead = torch.tensor([3, 17])
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = t.gptq_quantize(weight, hessian, bits=6, clip_sigmas=12.85)
    assert found.codes[:, dead].eq(0).all()
    nearest = (weight / found.scales.float()[:, None]).round().clamp(-31, 31).to(torch.int8)
    rounded = t.Quantized(nearest, found.scales, 6)
    assert output_error(weight, hessian, found) < 0.7 * output_error(weight, hessian, rounded)


def test_arguments_stay_as_they_were():
    weight, hessian = correlated(8, 16)
    before = weight.clone(), hessian.clone()
    t.gptq_quantize(weight, hessian, bits=6, clip_sigmas=12.85)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize(("cols", "bits"), [(15, 6), (16, 1), (16, 9)])
def test_shapes_and_bits_that_make_no_sense_are_refused(cols, bits):
    with pytest.raises(ValueError, match="weight"):
        t.gptq_quantize(torch.randn(4, cols), torch.eye(16), bits=bits, clip_sigmas=12.85)


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, hessian = correlated(1, 40)
    factor = t.inverse_factor(hessian.double())
    assert torch.equal(factor, factor.triu())
    inverse = torch.linalg.inv(hessian.double())
    torch.testing.assert_close(factor, torch.linalg.cholesky(inverse, upper=True))


def calibrate(cfg, rt, dataset, looped, log):
    torch.manual_seed(0)
    model = t.GPT(cfg, t.plain_attention)
    model.init_weights(3)
    for parameter in model.parameters():  # zero output projections would make every layer alike
        parameter.data += 0.02 * torch.randn(parameter.shape)
    loader = t.Loader(
        t.find_shards(dataset, "train"),
        seq_len=cfg.train_seq_len,
        vocab_size=cfg.vocab_size,
        seed=0,
    )
    plan = t.depth_plan(cfg, looped=looped)
    with rt.budget.phase("calibration"):
        found = t.collect_hessians(model, loader, 5, plan, cfg, rt, log)
    return model, loader, plan, found


@pytest.mark.parametrize("looped", [False, True])
def test_hessians_are_the_mean_outer_products_of_each_modules_inputs(
    tiny_cfg, rt, dataset, silent_log, looped
):
    model, loader, plan, found = calibrate(tiny_cfg, rt, dataset, looped, silent_log)
    rows = tiny_cfg.train_batch_tokens // tiny_cfg.train_seq_len // 8 or 1
    windows = loader.windows(5, rows * tiny_cfg.gptq_calibration_batches)
    tokens = torch.from_numpy(windows[:, :-1].astype("int64"))
    seen = {name: [] for name in found}
    for name in seen:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        model(tokens, plan=plan)
    visits = sum(v.layer == 4 for v in plan.visits)
    assert len(seen["blocks.4.mlp.up"]) == visits
    assert set(found) == {n for n, m in model.named_modules() if isinstance(m, t.Linear)}
    for name, inputs in seen.items():
        x = torch.cat([i.flatten(0, 1) for i in inputs]).double()
        expected = (x.T @ x / len(x)).float()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_the_embedding_hessian_is_taken_where_the_head_reads(tiny_cfg, rt, dataset, silent_log):
    _, _, _, found = calibrate(tiny_cfg, rt, dataset, False, silent_log)
    # The head reads RMS-normalised vectors, so the mean square of its inputs is one.
    assert found["head"].diagonal().mean() == pytest.approx(1.0, abs=1e-3)


def test_calibration_stops_when_the_training_budget_is_spent(tiny_cfg, rt, dataset, tmp_path):
    import dataclasses

    cfg = dataclasses.replace(
        tiny_cfg, max_wallclock_seconds=1e-6, gptq_calibration_batches=50, gptq_reserve_seconds=0.0
    )
    with t.Log(str(tmp_path), "stop") as log:
        calibrate(cfg, rt, dataset, False, log)
    assert "calibration stopped by the budget after 1 of 50" in (tmp_path / "stop.txt").read_text()


def test_every_tensor_is_stored_as_its_rule_says(tiny_cfg, silent_log):
    model = t.GPT(tiny_cfg)
    model.init_weights(0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    hessians = {
        name: torch.eye(m.in_features)
        for name, m in model.named_modules()
        if isinstance(m, t.Linear)
    }
    stored = t.quantize_model(weights, hessians, tiny_cfg, silent_log)
    assert stored["head.weight"].bits == 8
    assert stored["blocks.3.mlp.up.weight"].bits == 6
    assert stored["skip_gates"].dtype == torch.float16
    assert list(stored) == list(weights)
    step = stored["head.weight"].scales.float()[:, None]
    assert (
        (stored["head.weight"].dequantize() - weights["head.weight"]).abs() <= step / 2 + 1e-6
    ).all()


def test_coarser_ranges_widen_the_steps_by_that_factor(tiny_cfg, silent_log):
    weights = {"head.weight": torch.randn(64, 32)}
    hessians = {"head": torch.eye(32)}
    fine = t.quantize_model(weights, hessians, tiny_cfg, silent_log)["head.weight"]
    wide = t.quantize_model(weights, hessians, tiny_cfg, silent_log, 1.5)["head.weight"]
    torch.testing.assert_close(wide.scales.float(), 1.5 * fine.scales.float(), rtol=2e-3, atol=0)
