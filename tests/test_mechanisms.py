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
from test_training import fresh, loader  # noqa: F401 -- loader is a fixture

import train_gpt as t

WIDE = dict(bigram_vocab_size=11, bigram_dim=6, smear_gate_enabled=True, ve_dim=5)
SEQUENTIAL = dict(parallel_residual_start=11, num_loops=0, xsa_last_n=4, leaky_relu_slope=0.0)
LIKE_578 = dataclasses.replace(SMALL, skip_gates_enabled=False, **SEQUENTIAL, **WIDE)
LIKE_1487 = dataclasses.replace(
    SMALL, parallel_residual_form="lanes", num_loops=1, max_skips=5, ve_dim=5
)


# --- the forward, once more, in float64 and with every option ---


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def naive_input(w, tokens):
    """The input stream of one row of tokens."""
    x = w["head.weight"][tokens]
    if "bigram.table" in w:
        ids, last = tokens.tolist(), len(w["bigram.table"]) - 1
        rows = [last] + [(36313 * b ^ 27191 * a) % last for a, b in itertools.pairwise(ids)]
        x = x + w["bigram.scale"] * w["bigram.table"][rows] @ w["bigram.proj.weight"].T
    x = norm(x)
    if "smear_gate" in w:
        gate, before = torch.sigmoid(w["smear_gate"]), torch.zeros_like(x[0])
        rows = []
        for row in x:
            rows.append((1 - gate) * row + gate * before)
            before = row
        x = torch.stack(rows)
    return x


def naive_attention(n, w, layer, tokens, cfg):
    length, width = len(n), cfg.model_dim // cfg.num_heads
    weight = functools.partial("blocks.{}.attn.{}".format, layer)
    q, k, v = (n @ w[weight(f"{name}.weight")].T for name in "qkv")
    if cfg.ve_dim and layer in (9, 10):
        shared = w["value_embedding.table"][tokens] @ w["value_embedding.proj.weight"].T
        v = v + w["value_embedding.layer_scales"][layer - 9] * w["value_embedding.scale"] * shared
    rotary = t.rotary_table(length, cfg, n.device)
    q, k = (t.rotate(norm(x.view(length, -1, width)), rotary) for x in (q, k))
    k, v = (x.reshape(length, -1, width).repeat_interleave(2, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q * w[weight("q_gain")][:, None], k) / math.sqrt(width)
    past = torch.ones(length, length).tril().bool()
    y = torch.einsum("hts,shd->thd", scores.masked_fill(~past, -math.inf).softmax(-1), v)
    if layer >= cfg.num_layers - cfg.xsa_last_n:
        y = y - (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v
    return y.flatten(1) @ w[weight("out.weight")].T


def naive_mlp(n, w, layer, slope):
    z = n @ w[f"blocks.{layer}.mlp.up.weight"].T
    return torch.where(z > 0, z, slope * z) ** 2 @ w[f"blocks.{layer}.mlp.down.weight"].T


def naive_logits(w, tokens, encoder, decoder, cfg):
    """Logits (T, V) of one row of tokens; skips and lanes as the published pages tell them."""
    x0 = naive_input(w, tokens)
    lane0, lane1, stack = x0, None, []
    for place, layer in enumerate([*encoder, *decoder]):
        j = place - len(encoder)
        if 0 <= j < min(len(encoder), cfg.max_skips):
            skip = w["skip_weights"][j] * stack.pop()
            g = torch.sigmoid(w["skip_gates"][j]) if cfg.skip_gates_enabled else None
            lane0 = lane0 + skip if g is None else g * lane0 + (1 - g) * skip
        late = layer >= cfg.parallel_residual_start
        if late and lane1 is None:
            lane1 = lane0
        (a, b), s = w[f"blocks.{layer}.resid_mix"], 1 / math.sqrt(layer + 1)
        x = a * lane0 + b * x0
        attn = naive_attention(norm(x) * s, w, layer, tokens, cfg)
        lane0 = x + w[f"blocks.{layer}.attn_scale"] * attn
        update = functools.partial(naive_mlp, w=w, layer=layer, slope=cfg.leaky_relu_slope)
        if late:
            lane1 = lane1 + w[f"blocks.{layer}.mlp_scale"] * update(norm(lane1) * s)
        else:
            lane0 = lane0 + w[f"blocks.{layer}.mlp_scale"] * update(norm(lane0) * s)
        if j < 0:
            stack.append(lane0)
    if lane1 is not None:
        lane0 = w["lane_merge"] * lane0 + (1 - w["lane_merge"]) * lane1
    return 30 * torch.tanh(norm(lane0) @ w["head.weight"].T / 30)


PLAIN = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]
ONCE = [0, 1, 2, 3, 4, 5, 3], [4, 5, 6, 7, 8, 9, 10]


def random_all(cfg):
    """A model in which no weight is zero or one, scalars neither."""
    model, draw = t.GPT(cfg), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0
            noise = torch.randn(p.shape, generator=draw) * scale
            p.copy_(noise if p.dim() else 0.4 + 0.2 * noise.clamp(-1, 1))
    return model


@pytest.mark.parametrize(
    ("cfg", "looped", "orders"),
    [(LIKE_578, False, PLAIN), (LIKE_1487, False, PLAIN), (LIKE_1487, True, ONCE)],
    ids=["578", "1487 before recurrence", "1487"],
)
def test_the_forward_and_all_gradients_of_the_other_systems_equal_a_naive_one(cfg, looped, orders):
    model, tokens = random_all(cfg), random_tokens(cfg, 2, 8)
    w = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    naive = torch.stack([naive_logits(w, row, *orders, cfg) for row in tokens])
    logits = model(tokens, plan=t.depth_plan(cfg, looped=looped))
    torch.testing.assert_close(logits.double(), naive, rtol=1e-3, atol=1e-3)
    mixed = torch.randn(naive.shape, generator=torch.Generator().manual_seed(2))
    (logits * mixed).sum().backward()
    (naive * mixed).sum().backward()
    assert len(w) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = w[name].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        error = (parameter.grad - expected).norm()
        assert error <= 1e-3 * expected.norm() + 1e-6, name
        assert expected.any(), f"{name} has no effect, so this test says nothing about it"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (dict(skip_gates_enabled=False), {"skip_gates"}),
        (dict(smear_gate_enabled=True), {"smear_gate"}),
        (dict(parallel_residual_form="lanes"), {"lane_merge"}),
        (dict(bigram_vocab_size=9), {"bigram.table", "bigram.proj.weight", "bigram.scale"}),
        (dict(leaky_relu_slope=0.0), set()),
    ],
)
def test_an_option_that_is_off_has_no_parameters(change, names):
    both = SMALL, dataclasses.replace(SMALL, **change)
    plain, changed = ({name for name, _ in t.GPT(cfg).named_parameters()} for cfg in both)
    assert plain ^ changed == names


def test_a_smear_gate_looks_back_one_token_and_never_ahead():
    cfg = dataclasses.replace(SMALL, smear_gate_enabled=True)
    model, tokens = random_all(cfg), random_tokens(cfg, 1, 8)
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % cfg.vocab_size
    moved = (model.embed(tokens) - model.embed(changed)).abs().amax(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [3, 4]


def test_the_bigram_hash_has_a_bucket_of_its_own_for_the_first_token():
    cfg = dataclasses.replace(SMALL, vocab_size=8192, bigram_vocab_size=2048, bigram_dim=1)
    bigram = t.BigramHash(cfg)
    bigram.table.data = torch.arange(2048.0)[:, None]
    bigram.proj.weight.data.fill_(1.0)
    bigram.scale.data.fill_(1.0)
    tokens = random_tokens(cfg, 3, 50)
    tokens[0, :3] = 8191
    found = bigram(tokens, torch.float32)[..., 0].long().tolist()
    for ids, row in zip(tokens.tolist(), found, strict=True):
        pairs = [((36313 * b) ^ (27191 * a)) % 2047 for a, b in itertools.pairwise(ids)]
        assert row == [2047, *pairs]


@pytest.mark.parametrize(("scaled", "gain"), [(False, 1.0), (True, 22**-0.5)])
def test_projections_begin_orthogonal_so_that_a_zero_bigram_table_learns(tiny_cfg, scaled, gain):
    cfg = dataclasses.replace(tiny_cfg, scaled_projections=scaled, **WIDE)
    model, tokens = fresh(cfg), random_tokens(cfg, 2, 9)
    for proj in (model.bigram.proj.weight, model.value_embedding.proj.weight):
        torch.testing.assert_close(proj.T @ proj, gain**2 * torch.eye(proj.shape[1]))
    model(tokens[:, :-1], tokens[:, 1:], plan=t.depth_plan(cfg, looped=False)).backward()
    assert not model.bigram.table.any()
    assert model.bigram.table.grad.any()


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


def naive_fake(weight):
    """#578: clip a row at its 99.95th percentile, or 1 at least, then 31 levels a side."""
    rows = []
    for row in weight.detach().numpy():
        step = max(np.quantile(np.abs(row), 0.9995), 1.0) / 31
        rows.append(np.clip(np.round(row / step), -31, 31) * step)
    return torch.from_numpy(np.stack(rows)).to(weight.dtype)


def block_matrix(name):
    return ".attn." in name and name.endswith("weight") or ".mlp." in name


def test_late_qat_rounds_the_matrices_of_the_blocks_and_passes_gradients_straight_through():
    cfg, tokens = LIKE_578, random_tokens(LIKE_578, 2, 8)
    model = random_all(cfg)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if block_matrix(name):
                parameter.copy_(naive_fake(parameter))
    plan = t.depth_plan(cfg, looped=False)
    rounded = model(tokens, plan=plan._replace(fake_bits=6))
    torch.testing.assert_close(rounded, twin(tokens, plan=plan), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(rounded, model(tokens, plan=plan), rtol=1e-2, atol=1e-2)
    for m, p in ((model, plan._replace(fake_bits=6)), (twin, plan)):
        m(tokens[:, :-1], tokens[:, 1:], plan=p).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-4, msg=name)


def test_a_compiled_graph_sees_late_qat_when_it_is_switched_on():
    fewer = dict(num_layers=3, parallel_residual_start=3, xsa_last_n=2, ve_layers="1,2")
    cfg = dataclasses.replace(LIKE_578, **fewer)
    tokens, plan = random_tokens(cfg, 2, 8), t.depth_plan(cfg, looped=False)
    model = random_all(cfg)
    compiled = torch.compile(model, backend="eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        before = compiled(tokens, plan=plan)
        after = compiled(tokens, plan=plan._replace(fake_bits=6))
        model.blocks[0].mlp.up.weight.mul_(1.5)
        scaled = compiled(tokens, plan=plan._replace(fake_bits=6))
        expected = model(tokens, plan=plan._replace(fake_bits=6))
    assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(after, scaled, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-3)


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
