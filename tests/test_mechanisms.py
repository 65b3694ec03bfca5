"""What systems #578 and #1487 add to the default, each against a naive version of its own."""

import copy
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import write_shard
from test_evaluation import run_evaluate, small_model, text_of
from test_model import SMALL, random_tokens
from test_quantization import correlated
from test_training import fresh, loader  # noqa: F401 -- loader is a fixture

import train_gpt as t

# --- loaders ---


def make_loader(folder, lengths, order, seed=0):
    """A loader of windows of 8 over shards in which no token occurs twice."""
    paths, ends = [], np.cumsum([0, *lengths])
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        path = folder / f"fineweb_train_{number:06}.bin"
        paths.append(write_shard(path, np.arange(start, stop)))
    sizes = dict(seq_len=8, vocab_size=int(ends[-1]))
    return t.Loader(paths, **sizes, seed=seed, order=order)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_sequential_loader_gives_the_windows_as_they_stand_again_and_again(tmp_path, seed):
    loader = make_loader(tmp_path, [41, 30, 8], "sequential", seed)  # noqa: F811
    starts = [*range(0, 33, 8), *range(41, 41 + 22, 8)]  # the last shard holds no target more
    found = loader.windows(0, 3 * len(starts))
    assert found[:, 0].tolist() == 3 * starts
    assert (np.diff(found.astype(int), axis=1) == 1).all()


def test_a_coprime_loader_walks_each_shard_with_one_stride_and_misses_nothing(tmp_path):
    loader = make_loader(tmp_path, [230, 120, 5], "coprime", 3)  # noqa: F811
    first, strides = 0, set()
    for number in range(6):
        _, firsts, order = loader.epoch(number)
        assert sorted(order) == list(range(len(order))), "every window once per epoch"
        for low, high in itertools.pairwise(firsts[:2].tolist() + [len(order)]):
            walk = [window - low for window in order if low <= window < high]
            steps = set((np.diff(walk) % (high - low)).tolist())
            assert len(steps) == 1
            assert math.gcd(*steps, high - low) == 1
            strides |= steps
        assert len(set(loader.windows(first, len(order))[:, 0].tolist())) == len(order)
        half = order[: len(order) // 2] < firsts[1]
        share = firsts[1] / len(order)
        assert abs(half.mean() - share) < 0.1, "the shards are interleaved"
        first += len(order)
    assert len(strides) > 3
    other = make_loader(tmp_path, [230, 120, 5], "coprime", 4)
    assert other.windows(0, 30).tolist() != loader.windows(0, 30).tolist()


# --- training ---


def test_a_warmdown_in_steps_is_the_time_left_over_the_time_of_so_many_steps():
    cfg = t.Config(warmdown_iters=3500, max_wallclock_seconds=612.0, gptq_reserve_seconds=12.0)
    times = ((0, 0.0), (0, 1e-6), (0, 1.0), (1, 1.0), (1000, 85.8), (4000, 343.2), (6900, 592.0))
    for step, seconds in times:
        left = (600 - seconds) / (3500 * seconds / max(step, 1)) if seconds else 1.0
        frac = t.training_frac(step, seconds, cfg)
        assert t.lr_scale(frac, cfg, step) == pytest.approx(min(left, 1.0)), step
    cfg = t.Config(warmdown_iters=30, iterations=40, max_wallclock_seconds=0.0)
    found = [t.lr_scale(t.training_frac(s, 9.0, cfg), cfg, s) for s in (0, 10, 11, 25, 39)]
    assert found == pytest.approx([1.0, 1.0, 29 / 30, 0.5, 1 / 30])


def test_late_qat_begins_below_its_threshold_and_recurrence_at_its_step(
    tiny_cfg,
    rt,
    loader,  # noqa: F811
    silent_log,
):
    changes = dict(iterations=12, warmdown_iters=8, late_qat_threshold=0.5)
    cfg = dataclasses.replace(tiny_cfg, enable_looping_at_step=3, **changes)
    model, plans = fresh(cfg), []

    def forward(*args, plan):
        plans.append(plan)
        return model(*args, plan=plan)

    t.train(forward, model, loader, lambda plan, prefix: None, cfg, rt, silent_log)
    plans = plans[:: len(plans) // 12]
    assert [len(p.visits) for p in plans] == [11] * 3 + [17] * 9
    # Steps left over eight: below a half from step 9 on.
    assert [p.fake_bits for p in plans] == [0] * 9 + [6] * 3


def test_fine_tuning_on_the_validation_text_equals_a_naive_loop(tiny_cfg, rt, silent_log):
    changes = dict(prequant_ttt_epochs=3, prequant_ttt_lr=0.01, prequant_ttt_batch_tokens=64)
    changes |= dict(prequant_ttt_freeze_blocks=2)
    cfg, val = dataclasses.replace(tiny_cfg, **changes), text_of(tiny_cfg, 170)
    model, plan = small_model(cfg), t.depth_plan(cfg, looped=True)
    twin = copy.deepcopy(model)
    t.fine_tune_on_validation(functools.partial(model, plan=plan), model, val, cfg, rt, silent_log)
    tokens = torch.from_numpy(val.tokens.astype(np.int64))
    rows = [(tokens[s : s + 32], tokens[s + 1 : s + 33]) for s in range(0, 160, 32)]
    moving = [p for n, p in twin.named_parameters() if not n.startswith(("blocks.0.", "blocks.1."))]
    adam = torch.optim.AdamW(moving, weight_decay=0.0)
    for epoch in range(3):
        rate = 0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * epoch / 3))
        adam.param_groups[0]["lr"] = rate
        for batch in (rows[:2], rows[2:4], rows[4:]):
            twin.zero_grad()
            x, y = (torch.stack(part) for part in zip(*batch, strict=True))
            twin(x, y, plan=plan).backward()
            torch.nn.utils.clip_grad_norm_(moving, 1.0)
            adam.step()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-2, atol=5e-4, msg=name)
        assert p.requires_grad, "nothing stays frozen"


# --- quantization ---


def naive_percentile_scale(row, top, percentiles):
    """The step, of those at the percentiles, with the least squared rounding error."""
    found = []
    for percentile in percentiles:
        step = float(np.quantile(np.abs(row), percentile)) / top
        error = np.square(np.clip(np.round(row / step), -top, top) * step - row).sum()
        found.append((float(error), step))
    return min(found)[1]


def heavy_tails(rows, cols):
    """Rows with ends: even ones, and some in which an entry is so large that clipping it pays."""
    draw = torch.Generator().manual_seed(0)
    weight = 0.4 * torch.randn(rows, cols, generator=draw)
    for i in range(rows):
        weight[i, : i % 3] *= 30
    weight[::3] = 2 * torch.rand(weight[::3].shape, generator=draw) - 1
    return weight


def test_the_percentile_rule_takes_the_range_of_least_rounding_error_for_each_row():
    weight, percentiles = heavy_tails(24, 3000), (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    found = t.row_scales(weight, 6, 12.85, t.MATRIX_PERCENTILES, t.SMALLEST_SCALE).float()
    rows = weight.double().numpy()
    expected = [naive_percentile_scale(row, 31, percentiles) for row in rows]
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3)
    clipped = found * 31 < 0.99 * weight.abs().amax(dim=1)
    assert 0 < clipped.sum() < len(clipped), "both kinds of row are there"


def test_tables_are_clipped_at_their_own_percentile():
    weight = heavy_tails(6, 400)
    found = t.row_scales(weight, 8, 20.0, t.TABLE_PERCENTILES, t.SMALLEST_SCALE).float().numpy()
    expected = np.quantile(weight.abs().double().numpy(), 0.9999984, axis=1) / 127
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def naive_gptq_in_order(weight, hessian, scale, order):
    """Round a column, spread its error by the inverse Hessian of those left, eliminate it."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    inverse, codes = torch.linalg.inv(h), torch.zeros_like(w)
    for j in order:
        codes[:, j] = (w[:, j] / scale).round().clamp(-31, 31)
        w -= torch.outer((w[:, j] - codes[:, j] * scale) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j], w[:, j] = 1.0, 0.0
    return codes


@pytest.mark.parametrize("descending", [True, False])
def test_columns_are_taken_by_the_hessians_diagonal_in_either_order(descending):
    weight, hessian = correlated(16, 60)
    options = dict(bits=6, clip_sigmas=12.85, descending=descending)
    found = t.gptq_quantize(weight.double(), hessian.double(), **options)
    orders = [sorted(range(60), key=lambda i: sign * hessian[i, i].item()) for sign in (-1, 1)]
    codes = [naive_gptq_in_order(weight, hessian, found.scales.double(), o) for o in orders]
    same, other = codes if descending else codes[::-1]
    assert (found.codes != same).double().mean() < 0.002
    assert (found.codes != other).double().mean() > 0.05


def quantized_kinds(cfg, log):
    model = small_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, t.Linear)]
    hessians = {name: torch.eye(module.in_features) for name, module in linears}
    return weights, t.quantize_model(weights, hessians, cfg, log)


def test_an_embedding_to_nearest_needs_no_hessian_and_equals_rounding(tiny_cfg, rt, silent_log):
    cfg = dataclasses.replace(tiny_cfg, embed_quantizer="nearest", ve_dim=4, bigram_vocab_size=9)
    model = small_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    needed = {n for n in weights if block_matrix(n)}
    hessians = {n.removesuffix(".weight"): torch.eye(weights[n].shape[1]) for n in needed}
    stored = t.quantize_model(weights, hessians, cfg, silent_log)
    for name in ("head.weight", "value_embedding.table", "bigram.table"):
        step = (20 * weights[name].std(dim=1, keepdim=True) / 127).half().float()
        codes = (weights[name] / step).round().clamp(-127, 127)
        assert torch.equal(stored[name].codes.float(), codes), name
        assert stored[name].bits == 8


def test_sensitive_matrices_get_the_bits_of_the_embedding(tiny_cfg, silent_log):
    cfg = dataclasses.replace(tiny_cfg, int8_sensitive="attn.v,blocks.3.")
    weights, stored = quantized_kinds(cfg, silent_log)
    for name in filter(block_matrix, weights):
        eight = "attn.v" in name or name.startswith("blocks.3.")
        if isinstance(stored[name], t.Quantized):
            assert stored[name].bits == (8 if eight else 6), name


def test_vectors_and_small_projections_are_stored_in_16_bits(tiny_cfg, silent_log):
    cfg = dataclasses.replace(tiny_cfg, ve_dim=4, bigram_vocab_size=9)
    weights, stored = quantized_kinds(cfg, silent_log)
    for name, tensor in stored.items():
        if not isinstance(tensor, t.Quantized):
            assert tensor.dtype == torch.float16, name
            assert torch.equal(tensor, weights[name].half())


def test_pruning_zeroes_just_the_ones_of_the_smallest_steps():
    draw = torch.Generator().manual_seed(0)
    codes = [torch.randint(-3, 4, (5, 20), generator=draw).to(torch.int8) for _ in range(2)]
    scales = [torch.rand(5, generator=draw).half() for _ in range(2)]
    made = [t.Quantized(c.clone(), s, 6) for c, s in zip(codes, scales, strict=True)]
    table = t.Quantized(torch.ones(2, 20, dtype=torch.int8), torch.zeros(2).half(), 8)
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


# --- test-time training ---


def adapted(cfg, rt, log, val):
    model = small_model(cfg)
    forward = functools.partial(model, plan=t.depth_plan(cfg, looped=True))
    ttt = t.TestTimeTraining(forward, model, cfg, rt, log)
    _, ledger = run_evaluate(model, val, cfg, rt, cfg.eval_stride, after_chunk=ttt)
    return ledger.nats.numpy(), model, ttt


def frozen(name):
    still = ("blocks.0.", "blocks.1.", "head.", "bigram.", "value_embedding.")
    return name.startswith(still) and name != "value_embedding.layer_scales"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_adaptation_with_an_average_equals_a_naive_score_first_loop(
    tiny_cfg, rt, silent_log, optimizer
):
    # System #578: train the first chunks, score with an average that moves once per chunk.
    rate = {"sgd": 0.1, "adamw": 0.003}[optimizer]
    changes = dict(ttt_lr=rate, ttt_freeze_blocks=2, ttt_freeze_embeddings=True)
    changes |= dict(ttt_train_chunks=3, ttt_ema_decay=0.6, ttt_optimizer=optimizer, **WIDE)
    cfg = dataclasses.replace(tiny_cfg, **changes)
    chunk, plan = cfg.ttt_chunk_tokens, t.depth_plan(cfg, looped=True)
    val = text_of(cfg, 5 * chunk)
    found, model, ttt = adapted(cfg, rt, silent_log, val)
    assert ttt.adapted == 3
    twin, average = small_model(cfg), small_model(cfg)
    moving = [p for n, p in twin.named_parameters() if not frozen(n)]
    adam = functools.partial(torch.optim.AdamW, weight_decay=0.0)
    sgd = functools.partial(torch.optim.SGD, momentum=cfg.ttt_momentum)
    steps = {"sgd": sgd, "adamw": adam}[optimizer](moving, lr=rate)
    expected, tokens = np.zeros(5 * chunk), torch.from_numpy(val.tokens.astype(np.int64))
    for number in range(5):
        part = slice(number * chunk, (number + 1) * chunk)
        expected[part] = run_evaluate(average, val, cfg, rt, cfg.eval_stride)[1].nats[part]
        steps.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * number / 2))
        for _ in range(cfg.ttt_epochs if number < 3 else 0):
            twin.zero_grad()
            starts = range(part.start, part.stop, 32)
            x, y = (torch.stack([tokens[s + d : s + d + 32] for s in starts]) for d in (0, 1))
            twin(x, y, plan=plan).backward()
            torch.nn.utils.clip_grad_norm_(moving, cfg.ttt_grad_clip)
            steps.step()
        for a, p in zip(average.parameters(), twin.parameters(), strict=True):
            if number < 3:
                a.data = 0.6 * a.data + 0.4 * p.data
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)
    start = dict(small_model(cfg).named_parameters())
    for (name, p), a in zip(model.named_parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(p, a, rtol=1e-2, atol=1e-3, msg=name)
        assert torch.equal(p, start[name]) == frozen(name), name


def test_an_average_that_forgets_all_scores_as_without_one(tiny_cfg, rt, silent_log):
    val = text_of(tiny_cfg, 4 * tiny_cfg.ttt_chunk_tokens)
    losses = [
        adapted(dataclasses.replace(tiny_cfg, ttt_lr=0.1, ttt_ema_decay=d), rt, silent_log, val)[0]
        for d in (0.0, 1e-9, 0.9)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert np.abs(losses[0] - losses[2]).max() > 0.01


@pytest.mark.parametrize("setting", ["ttt_ema_decay", "ttt_optimizer", "ttt_train_chunks"])
def test_no_target_sees_later_text_through_any_rule_of_adaptation(
    tiny_cfg, rt, silent_log, setting
):
    values = dict(ttt_ema_decay=0.5, ttt_optimizer="adamw", ttt_train_chunks=2)
    cfg = dataclasses.replace(tiny_cfg, ttt_lr=0.05, **{setting: values[setting]})
    chunk = cfg.ttt_chunk_tokens
    val = text_of(cfg, 4 * chunk)
    before = adapted(cfg, rt, silent_log, val)[0]
    for place in (chunk, 2 * chunk - 1, 3 * chunk + 5):
        tokens = val.tokens.copy()
        tokens[place + 1 :] = (tokens[place + 1 :] - 4 + 1) % (cfg.vocab_size - 4) + 4
        changed = t.ValidationTokens(tokens, val.target_bytes, 0)
        after = adapted(cfg, rt, silent_log, changed)[0]
        assert np.array_equal(after[:place], before[:place])
        assert not np.array_equal(after[place:], before[place:])
