"""Section 9: windows, scores, the ledger, and adaptation, against one target at a time."""

import dataclasses
import functools
import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from conftest import gloo
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 700), st.integers(2, 96), st.data())
def test_windows_score_every_target_exactly_once_in_order(total, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    scored = []
    for window in t.sliding_windows(total, seq_len, stride):
        assert 0 <= window.start <= window.first_scored < window.stop <= total
        assert window.stop - window.start <= seq_len
        scored += range(window.first_scored, window.stop)
    assert scored == list(range(total))


def test_windows_follow_the_published_rule():
    total, length, stride = 10_000, 2048, 64
    starts = [s for s in range(0, total, stride) if s + length - stride < total]
    windows = list(t.sliding_windows(total, length, stride))
    assert [w.start for w in windows] == starts
    for window in windows[1:]:
        context = window.first_scored - window.start
        assert context == length - stride == 1984
    assert windows[0].stop == length
    assert len(list(t.sliding_windows(40_540_160, length, stride))) == 633_409


def test_plain_windows_tile_the_text():
    windows = list(t.sliding_windows(20, 8, 8))
    assert windows == [(0, 0, 8), (8, 8, 16), (16, 16, 20)]


def small_model(cfg, seed=0):
    """A model whose predictions depend on all it reads."""
    model = t.GPT(cfg, t.plain_attention)
    model.init_weights(seed)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def text_of(cfg, targets, seed=0):
    """Random text of so many targets, and arbitrary byte counts."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(4, cfg.vocab_size, targets + 1).astype(np.uint16)
    return t.ValidationTokens(tokens, draw.integers(0, 7, targets).astype(np.int16), 0)


def naive_losses(model, val, plan, seq_len, stride):
    """Each target's loss from the logits of a forward of its own."""
    losses = []
    with torch.no_grad():
        for target in range(len(val.target_bytes)):
            late = (target - (seq_len - stride)) // stride * stride
            start = 0 if target < seq_len else late
            context = torch.from_numpy(val.tokens[start : target + 1].astype(np.int64))[None]
            logits = model(context, plan=plan)[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[int(val.tokens[target + 1])]))
    return np.array(losses)


def run_evaluate(model, val, cfg, rt, stride, looped=True, after_chunk=None):
    forward = functools.partial(model, plan=t.depth_plan(cfg, looped=looped))
    show = lambda part: None  # noqa: E731
    return t.evaluate(forward, val, cfg, rt, stride=stride, show=show, after_chunk=after_chunk)


@pytest.mark.parametrize(
    ("targets", "stride"), [(200, 8), (200, 32), (131, 5), (31, 8), (32, 8), (33, 8), (1, 1)]
)
def test_the_score_equals_that_of_one_target_at_a_time(tiny_cfg, rt, targets, stride):
    model, val = small_model(tiny_cfg), text_of(tiny_cfg, targets)
    score, ledger = run_evaluate(model, val, tiny_cfg, rt, stride)
    plan = t.depth_plan(tiny_cfg, looped=True)
    expected = naive_losses(model, val, plan, tiny_cfg.eval_seq_len, stride)
    np.testing.assert_allclose(ledger.nats.numpy(), expected, rtol=2e-4, atol=2e-5)
    assert (score.tokens, score.bytes) == (targets, int(val.target_bytes.sum()))
    assert score.loss == pytest.approx(expected.mean(), rel=1e-5)
    assert score.bpb == pytest.approx(expected.sum() / math.log(2) / score.bytes, rel=1e-5)


def test_the_size_of_a_forward_does_not_change_the_score(tiny_cfg, rt):
    model, val = small_model(tiny_cfg), text_of(tiny_cfg, 150)
    found = []
    for rows in (1, 3, 50):
        cfg = dataclasses.replace(tiny_cfg, micro_batch_tokens=rows * tiny_cfg.eval_seq_len)
        found.append(run_evaluate(model, val, cfg, rt, 8)[1].nats)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def ledger_of(total):
    return t.Ledger(np.arange(total + 1, dtype=np.uint16))


def test_a_target_scored_twice_or_left_out_is_an_error():
    ledger = ledger_of(10)
    ledger.record(0, torch.ones(4))
    for first in (3, 5):
        with pytest.raises(t.LedgerError, match="expected target 4") as caught:
            ledger.record(first, torch.ones(1))
        assert caught.value.condition == "C4"
    with pytest.raises(t.LedgerError, match="4 of 10"):
        ledger.score(np.ones(10))
    with pytest.raises(t.LedgerError):
        ledger.record(4, torch.ones(7))  # past the end


def test_text_used_before_its_score_is_an_error():
    ledger = ledger_of(10)
    ledger.record(0, torch.ones(4))
    np.testing.assert_array_equal(ledger.text(1, 4), [1, 2, 3, 4])
    for first, stop in ((0, 5), (4, 5), (2, 2), (-1, 3)):
        with pytest.raises(t.LedgerError) as caught:
            ledger.text(first, stop)
        assert caught.value.condition == "C3"
    assert ledger.updates == [(1, 4, 4)]


def test_the_digests_tell_losses_order_and_updates_apart():
    def filled(losses, cut=(2,), updates=()):
        ledger = ledger_of(len(losses))
        for first, stop in zip((0, *cut), (*cut, len(losses)), strict=True):
            ledger.record(first, torch.tensor(losses[first:stop]))
        for update in updates:
            ledger.text(*update)
        return ledger.digests()

    one = filled([1.0, 2.0, 3.0])
    assert filled([1.0, 2.0, 3.0], cut=(1, 2)) == one, "not how the text was cut into chunks"
    other = filled([1.0, 3.0, 2.0])
    assert other["losses_sha256"] != one["losses_sha256"]
    assert other["ledger_sha256"] == one["ledger_sha256"]
    adapted = filled([1.0, 2.0, 3.0], updates=[(0, 2)])
    assert adapted["ledger_sha256"] != one["ledger_sha256"]
    assert adapted["order_sha256"] == one["order_sha256"]
    assert one["order_sha256"] == hashlib.sha256(struct.pack("<3I", 0, 1, 2)).hexdigest()


def test_after_a_chunk_only_text_that_is_scored_is_handed_out(tiny_cfg, rt):
    cfg = dataclasses.replace(tiny_cfg, ttt_chunk_tokens=50)  # neither a multiple of 32 nor of 8
    model, val, seen = small_model(cfg), text_of(cfg, 230), []
    real = t.Ledger.record

    def record(ledger, first, nats):
        real(ledger, first, nats)
        seen.append(ledger.scored)

    def after_chunk(draw, number, chunks):
        assert chunks == 5
        np.testing.assert_array_equal(draw(), val.tokens[50 * number : 50 * number + 51])
        assert seen[-1] >= 50 * (number + 1)
        seen.append("adapted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Ledger, "record", record)
        _, ledger = run_evaluate(model, val, cfg, rt, 8, after_chunk=after_chunk)
    assert seen.count("adapted") == 4, "not after the last chunk"
    assert [update[:2] for update in ledger.updates] == [(0, 50), (50, 100), (100, 150), (150, 200)]


def test_a_chunk_without_a_window_of_its_own_is_no_gap(tiny_cfg, rt):
    # The window before it scores past the edge of the last chunk, up to the end.
    cfg = dataclasses.replace(tiny_cfg, ttt_chunk_tokens=50)
    model, val = small_model(cfg), text_of(cfg, 102)
    _, ledger = run_evaluate(model, val, cfg, rt, 8, after_chunk=lambda draw, number, chunks: None)
    assert (ledger.times == 1).all()


def adapted(cfg, rt, log, val, **changes):
    cfg = dataclasses.replace(cfg, **changes)
    model = small_model(cfg)
    forward = functools.partial(model, plan=t.depth_plan(cfg, looped=True))
    ttt = t.TestTimeTraining(forward, model, cfg, rt, log)
    with rt.budget.phase("quantized_ttt"):
        score, ledger = run_evaluate(model, val, cfg, rt, cfg.eval_stride, after_chunk=ttt)
    return score, ledger, model, ttt


def test_a_learning_rate_of_zero_gives_the_static_score_bit_for_bit(tiny_cfg, rt, silent_log):
    val = text_of(tiny_cfg, 300)
    _, moving, _, ttt = adapted(tiny_cfg, rt, silent_log, val, ttt_lr=0.0)
    _, static = run_evaluate(small_model(tiny_cfg), val, tiny_cfg, rt, tiny_cfg.eval_stride)
    assert ttt.adapted > 1
    assert torch.equal(moving.nats, static.nats)


def test_adaptation_equals_a_naive_score_first_loop(tiny_cfg, rt, silent_log):
    # System #1493: score a chunk, then epochs of SGD on its sequences, cosine over the chunks.
    chunk, length = tiny_cfg.ttt_chunk_tokens, tiny_cfg.eval_seq_len
    val = text_of(tiny_cfg, 4 * chunk)
    _, ledger, model, _ = adapted(tiny_cfg, rt, silent_log, val, ttt_lr=0.1, ttt_grad_clip=0.5)
    twin = small_model(tiny_cfg)
    plan = t.depth_plan(tiny_cfg, looped=True)
    velocity = [torch.zeros_like(p) for p in twin.parameters()]
    expected = np.zeros(4 * chunk)
    for number in range(4):
        part = slice(number * chunk, (number + 1) * chunk)
        losses = naive_losses(twin, val, plan, length, tiny_cfg.eval_stride)
        expected[part] = losses[part]
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * number / 3))
        for _ in range(tiny_cfg.ttt_epochs if number < 3 else 0):
            twin.zero_grad()
            rows = val.tokens[part.start : part.stop + 1].astype(np.int64)
            starts = range(0, chunk, length)
            x = torch.from_numpy(np.stack([rows[s : s + length] for s in starts]))
            y = torch.from_numpy(np.stack([rows[s + 1 : s + length + 1] for s in starts]))
            twin(x, y, plan=plan).backward()
            norm = torch.sqrt(sum(p.grad.square().sum() for p in twin.parameters()))
            for p, v in zip(twin.parameters(), velocity, strict=True):
                v.mul_(tiny_cfg.ttt_momentum).add_(p.grad * min(1.0, 0.5 / float(norm)))
                p.data -= rate * v
    np.testing.assert_allclose(ledger.nats.numpy(), expected, rtol=1e-3, atol=1e-4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_adaptation_learns_repeated_text(tiny_cfg, rt, silent_log):
    chunk = tiny_cfg.ttt_chunk_tokens
    once = text_of(tiny_cfg, chunk - 1).tokens
    val = t.ValidationTokens(np.tile(once, 6), np.ones(6 * chunk - 1, np.int16), 0)
    adaptive = adapted(tiny_cfg, rt, silent_log, val, ttt_lr=0.3, ttt_epochs=5)[1].nats
    static = adapted(tiny_cfg, rt, silent_log, val, ttt_lr=0.0)[1].nats
    assert torch.equal(adaptive[:chunk], static[:chunk]), "nothing is known before the first score"
    assert adaptive[-chunk:].mean() < static[-chunk:].mean() - 0.1


def test_no_target_sees_its_own_or_later_text_even_through_adaptation(tiny_cfg, rt, silent_log):
    chunk = tiny_cfg.ttt_chunk_tokens
    val = text_of(tiny_cfg, 4 * chunk)
    _, before, _, _ = adapted(tiny_cfg, rt, silent_log, val, ttt_lr=0.3)
    for place in (chunk - 1, chunk, chunk + 1, 2 * chunk + 17, 4 * chunk - 1):
        tokens = val.tokens.copy()
        tokens[place + 1 :] = (tokens[place + 1 :] - 4 + 1) % (tiny_cfg.vocab_size - 4) + 4
        changed = t.ValidationTokens(tokens, val.target_bytes, 0)
        _, after, _, _ = adapted(tiny_cfg, rt, silent_log, changed, ttt_lr=0.3)
        assert torch.equal(after.nats[:place], before.nats[:place])
        assert not torch.equal(after.nats[place:], before.nats[place:])


def test_adaptation_stops_where_scoring_the_rest_would_run_out_of_time(tiny_cfg, rt, tmp_path):
    with t.Log(str(tmp_path), "late") as log:
        val = text_of(tiny_cfg, 12 * tiny_cfg.ttt_chunk_tokens)
        _, ledger, _, ttt = adapted(tiny_cfg, rt, log, val, eval_wallclock_seconds=1e-3)
    assert ttt.stopped
    assert ttt.adapted == 2, "the first two tell how long it takes"
    assert ledger.scored == 12 * tiny_cfg.ttt_chunk_tokens, "scoring goes on"
    assert "ttt:stopped adapting after 2 chunks" in (tmp_path / "late.txt").read_text()


def losses_on_ranks(rt, cfg, seed, adapts):
    """Losses and digests of a static or an adapting evaluation on this rank."""
    model, val = small_model(cfg, seed), text_of(cfg, 470)
    forward = functools.partial(model, plan=t.depth_plan(cfg, looped=True))
    log = t.Log(".", "", enabled=False)
    ttt = t.TestTimeTraining(forward, model, cfg, rt, log) if adapts else None
    _, ledger = run_evaluate(model, val, cfg, rt, cfg.eval_stride, after_chunk=ttt)
    return ledger.nats.numpy(), ledger.digests()


@pytest.mark.parametrize("adapts", [False, True])
def test_losses_and_ledger_are_the_same_for_any_number_of_ranks(tiny_cfg, rt, adapts):
    cfg = dataclasses.replace(tiny_cfg, ttt_lr=0.1)
    nats, digests = losses_on_ranks(rt, cfg, 0, adapts)
    for ranks in (2, 3):
        for other, found in gloo(ranks, losses_on_ranks, cfg, 0, adapts):
            if adapts:  # sums of gradients over ranks round differently
                np.testing.assert_allclose(other, nats, rtol=1e-4)
                found["losses_sha256"] = digests["losses_sha256"]
            assert found == digests


class SlowClock:
    """perf_counter of a machine on which each forward takes ten seconds."""

    def __init__(self):
        self.now = 0.0

    def forward(self, inner):
        def run(*args, **options):
            self.now += 10.0
            return inner(*args, **options)

        return run


@pytest.mark.parametrize(
    ("deadline", "expected"), [(2000.0, None), (800.0, "late"), (30.0, "at once")]
)
def test_scoring_that_runs_out_of_time_gives_up_the_stride_and_not_the_score(
    tiny_cfg, rt, monkeypatch, deadline, expected
):
    clock, cfg = SlowClock(), dataclasses.replace(tiny_cfg, micro_batch_tokens=32)
    monkeypatch.setattr(t.time, "perf_counter", lambda: clock.now)
    rt.budget = t.Budget()
    model, val = small_model(cfg), text_of(cfg, 1200)
    forward = clock.forward(functools.partial(model, plan=t.depth_plan(cfg, looped=True)))
    with rt.budget.phase("quantized_sliding_window"):
        _, ledger = t.evaluate(
            forward, val, cfg, rt, stride=8, show=lambda part: None, deadline=deadline
        )
    assert (ledger.times == 1).all()
    full = 10.0 * len(list(t.sliding_windows(1200, 32, 8)))
    if expected is None:
        assert ledger.plain_from is None
        assert clock.now == full
    elif expected == "late":
        assert 300 < ledger.plain_from < 1200, "as many short strides as fit"
        assert deadline - 400 < clock.now <= deadline < full
    else:
        assert ledger.plain_from == 3 * 16 * 8, "three chunks tell how long it takes"
    plain = ledger.plain_from
    if plain:
        static, _ = run_evaluate(model, val, cfg, rt, 8)[1], None
        assert torch.equal(ledger.nats[:plain], static.nats[:plain])


def test_a_chunk_is_cut_into_whole_sequences(tiny_cfg, rt, silent_log):
    # 70 targets hold two sequences of 32: the six left over are scored, but not trained on.
    model, seen = small_model(tiny_cfg), []

    def forward(tokens, targets):
        seen.append((tokens.tolist(), targets.tolist()))
        return model(tokens, targets, plan=t.depth_plan(cfg, looped=True))

    text = text_of(tiny_cfg, 70).tokens
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    cfg = dataclasses.replace(tiny_cfg, ttt_epochs=1)
    t.adapt(forward, model, sgd, lambda: text, cfg, rt)
    rows = [row for tokens, _ in seen for row in tokens]
    assert rows == [text[:32].tolist(), text[32:64].tolist()]
    assert seen[0][1][-1][-1] == text[64]


def test_general_compressors_are_measured_on_the_decoded_text(dataset, tiny_cfg):
    import lzma

    table = t.ByteTable.from_file(dataset / "tokenizer.model", tiny_cfg.vocab_size)
    val = t.ValidationTokens.load(t.find_shards(dataset, "val"), table, seq_len=32)
    text = b"".join(t.decode_documents(val.tokens, dataset / "tokenizer.model", table.bos))
    found = t.compressor_baselines(val, dataset / "tokenizer.model", table.bos)
    assert set(found) == {"xz-9e", "brotli-11"}
    size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert found["xz-9e"] == pytest.approx(8 * size / len(text))
