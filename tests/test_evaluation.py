"""Section 11: protocols, learners and the ledger, against one target at a time."""

import dataclasses
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


SHAPES = st.tuples(
    st.integers(1, 700),  # targets
    st.integers(2, 48),  # length of a window
    st.floats(0, 1),  # stride, as a fraction of the length
    st.integers(1, 9),  # windows of a forward
    st.integers(0, 300),  # targets between two turns of learning, 0: none
)


def windows_of(shape):
    """The protocol of a drawn shape, not begun."""
    total, length, frac, rows, chunk = shape
    cfg = t.Config(eval_seq_len=length, micro_batch_tokens=rows * length + length // 2)
    return t.Windows(total, cfg, max(round(frac * length), 1), chunk)


def scored_by(rows, length):
    """(target, start of the context it is predicted from) of every loss a forward keeps."""
    ends = (
        (start, start + length - rows.tail + i) for start in rows.starts for i in range(rows.tail)
    )
    return [(target, start) for start, target in ends][: len(rows.targets)]


@settings(max_examples=300, deadline=None)
@given(SHAPES)
def test_forwards_score_every_target_once_in_the_context_of_its_window(shape):
    total, length, *_, chunk = shape
    protocol = windows_of(shape)
    stride, found, shapes = protocol.stride, [], set()
    for turn in protocol:
        for rows in turn.forwards:
            found += scored_by(rows, length)
            assert [target for target, _ in found[-len(rows.targets) :]] == list(rows.targets)
            shapes.add((len(rows.starts), rows.tail))
        late = [(target - (length - stride)) // stride * stride for target in range(total)]
        context = [0 if t < length else start for t, start in enumerate(late)]
        assert found == list(enumerate(context))[: len(found)]
        assert turn.left == -(-(total - len(found)) // stride)
        if turn.learns:
            assert turn.learns == (turn.number * chunk, (turn.number + 1) * chunk)
            assert turn.learns[1] <= len(found)
    assert len(found) == total
    assert len(shapes) <= 2, "one shape of a forward, and one of windows that score all they read"
    assert all(size <= shape[3] for size, _ in shapes), "no more than fit in a forward"
    assert turn.number == turn.turns - 1
    assert turn.learns is None, "nothing follows that could be scored better"


@settings(max_examples=200, deadline=None)
@given(SHAPES)
def test_the_declared_order_is_the_one_in_which_targets_are_recorded(shape):
    total, protocol = shape[0], windows_of(shape)
    ledger = t.Ledger(np.zeros(total + 1, np.uint16), protocol.declared())
    for rows in (rows for turn in protocol for rows in turn.forwards):
        ledger.record(np.array(rows.targets), torch.ones(len(rows.targets)))
    assert ledger.score(np.ones(total)).nats == total
    assert (
        protocol.declared() == hashlib.sha256(struct.pack(f"<{total}I", *range(total))).hexdigest()
    )


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(1, 9))
def test_the_ranks_together_compute_every_forward_once_and_fill_up_nothing_else(shape, ranks):
    """A loss that tells where it comes from; a rank's losses beyond its share stay zero."""
    total, length = shape[:2]
    text = np.arange(total + 1)

    class Where:
        def score(self, windows, tail):
            return windows[:, -tail:].float()  # the target's place, plus one

    for turn in windows_of(shape):
        parts = []
        for rank in range(ranks):
            rt = t.Runtime(t.Config(), dict(RANK=str(rank), WORLD_SIZE=str(ranks)))
            rt.device, rt.sum_ = torch.device("cpu"), lambda *tensors: None
            parts.append(t.score_turn(Where(), turn, text, length, rt))
        expected = [target + 1 for rows in turn.forwards for target in rows.targets]
        assert sum(parts).tolist() == expected if parts[0].numel() else not expected
        assert (torch.stack(parts).count_nonzero(0) == 1).all()


def small_model(cfg, seed=0):
    """A model whose predictions depend on all it reads."""
    model = t.GPT(cfg)
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


def scored(learner, val, cfg, rt, stride, chunk=0):
    """(Score, Ledger) of sliding windows."""
    protocol = t.Windows(len(val.target_bytes), cfg, stride, chunk)
    return t.evaluate("test", learner, protocol, val, rt)


def static(cfg, seed=0):
    return t.Static(small_model(cfg, seed), t.depth_plan(cfg, looped=True))


@pytest.mark.parametrize(
    ("targets", "stride"), [(200, 8), (200, 32), (131, 5), (31, 8), (32, 8), (33, 8), (1, 1)]
)
def test_the_score_equals_that_of_one_target_at_a_time(tiny_cfg, rt, targets, stride):
    learner, val = static(tiny_cfg), text_of(tiny_cfg, targets)
    score, ledger = scored(learner, val, tiny_cfg, rt, stride)
    length = tiny_cfg.eval_seq_len
    expected = naive_losses(learner.model, val, learner.plan, length, stride)
    np.testing.assert_allclose(ledger.nats.numpy(), expected, rtol=2e-4, atol=2e-5)
    assert (score.tokens, score.bytes) == (targets, int(val.target_bytes.sum()))
    assert score.loss == pytest.approx(expected.mean(), rel=1e-5)
    assert score.bpb == pytest.approx(expected.sum() / math.log(2) / score.bytes, rel=1e-5)


def test_the_size_of_a_forward_does_not_change_the_score(tiny_cfg, rt):
    learner, val = static(tiny_cfg), text_of(tiny_cfg, 150)
    found = []
    for rows in (1, 3, 50):
        cfg = dataclasses.replace(tiny_cfg, micro_batch_tokens=rows * tiny_cfg.eval_seq_len)
        found.append(scored(learner, val, cfg, rt, 8)[1].nats)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def ledger_of(total):
    tokens = np.arange(total + 1, dtype=np.uint16)
    return t.Ledger(tokens, t.Windows(total, t.Config(), 1).declared())


def record(ledger, *targets):
    ledger.record(np.array(targets), torch.ones(len(targets)))


def refused(condition, function, *args):
    """The message of the LedgerError of this condition that a call raises."""
    with pytest.raises(t.LedgerError) as caught:
        function(*args)
    assert caught.value.condition == condition
    return str(caught.value)


def test_a_target_scored_twice_left_out_or_beyond_the_text_is_an_error():
    ledger = ledger_of(10)
    record(ledger, 0, 1, 2, 3)
    for targets in ([3], [0, 1, 2, 3], [4, 5, 2], [10], [-1], [-10], [8, 9, 10]):
        refused("C4", record, ledger, *targets)
    assert ledger.scored == 4, "what was refused leaves no trace"
    assert ledger.times.tolist() == [1] * 4 + [0] * 6
    assert "4 of 10" in refused("C4", ledger.score, np.ones(10))
    record(ledger, 4, 5, 6, 7, 8, 9)
    assert ledger.score(np.ones(10)) == t.Score(10.0, 10, 10)


def test_a_target_twice_in_one_piece_is_found_at_the_latest_with_the_score():
    ledger = ledger_of(3)
    record(ledger, 0, 1, 1)
    record(ledger, 2)
    refused("C4", ledger.score, np.ones(3))


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(7)), st.sets(st.integers(1, 6)))
def test_an_order_other_than_the_declared_one_is_an_error(order, cuts):
    ledger = ledger_of(7)
    for piece in np.split(np.array(order), sorted(cuts)):
        record(ledger, *piece)
    if order == sorted(order):
        assert ledger.score(np.ones(7)).tokens == 7
    else:
        assert "another order" in refused("C4", ledger.score, np.ones(7))


def test_text_with_an_unscored_target_is_an_error():
    ledger = ledger_of(10)
    record(ledger, 0, 1, 2, 3, 6, 7)
    np.testing.assert_array_equal(ledger.text(1, 4), [1, 2, 3, 4])
    np.testing.assert_array_equal(ledger.text(6, 8), [6, 7, 8])
    outside = ((2, 2), (3, 1), (-1, 3), (-4, -2), (8, 11), (10, 11))
    for first, stop in ((0, 5), (4, 5), (3, 7), (0, 8), (6, 9), *outside):
        refused("C3", ledger.text, first, stop)
    assert ledger.updates == [(1, 4, 6), (6, 8, 6)]


def test_the_digests_tell_losses_order_and_updates_apart():
    def filled(losses, cut=(2,), updates=(), plain_from=None):
        ledger = ledger_of(len(losses))
        for first, stop in zip((0, *cut), (*cut, len(losses)), strict=True):
            ledger.record(np.arange(first, stop), torch.tensor(losses[first:stop]))
        for update in updates:
            ledger.text(*update)
        return ledger.digests(plain_from)

    one = filled([1.0, 2.0, 3.0])
    assert filled([1.0, 2.0, 3.0], cut=(1, 2)) == one, "not how the text was cut into chunks"
    other = filled([1.0, 3.0, 2.0])
    assert other["losses_sha256"] != one["losses_sha256"]
    assert other["ledger_sha256"] == one["ledger_sha256"]
    adapted = filled([1.0, 2.0, 3.0], updates=[(0, 2)])
    assert adapted["ledger_sha256"] != one["ledger_sha256"]
    assert adapted["order_sha256"] == one["order_sha256"]
    hurried = filled([1.0, 2.0, 3.0], plain_from=2)
    assert hurried["ledger_sha256"] != one["ledger_sha256"]
    assert one["order_sha256"] == hashlib.sha256(struct.pack("<3I", 0, 1, 2)).hexdigest()


def test_after_a_chunk_only_text_that_is_scored_is_handed_out(tiny_cfg, rt):
    cfg = dataclasses.replace(tiny_cfg, ttt_chunk_tokens=50)  # neither a multiple of 32 nor of 8
    val, seen = text_of(cfg, 230), []
    real = t.Ledger.record

    def record(ledger, targets, nats):
        real(ledger, targets, nats)
        seen.append(ledger.scored)

    class Watch(t.Static):
        def learn(self, turn, draw, pace):
            first = 50 * turn.number
            assert (turn.turns, turn.learns) == (5, (first, first + 50))
            np.testing.assert_array_equal(draw(), val.tokens[first : first + 51])
            assert seen[-1] >= first + 50
            seen.append("adapted")

    learner = Watch(small_model(cfg), t.depth_plan(cfg, looped=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Ledger, "record", record)
        _, ledger = scored(learner, val, cfg, rt, 8, 50)
    assert seen.count("adapted") == 4, "not after the last chunk"
    assert [update[:2] for update in ledger.updates] == [(0, 50), (50, 100), (100, 150), (150, 200)]


def test_a_learner_that_reads_on_is_stopped(tiny_cfg, rt):
    class Reader(t.Static):
        def learn(self, turn, draw, pace):
            ledger, (first, stop) = draw.func.__self__, turn.learns
            ledger.text(first, stop + tiny_cfg.eval_stride)

    learner = Reader(small_model(tiny_cfg), t.depth_plan(tiny_cfg, looped=True))
    refused("C3", scored, learner, text_of(tiny_cfg, 200), tiny_cfg, rt, 8, 64)


def test_a_chunk_without_a_window_of_its_own_is_no_gap(tiny_cfg, rt):
    # The window before it scores past the edge of the last chunk, up to the end.
    _, ledger = scored(static(tiny_cfg), text_of(tiny_cfg, 102), tiny_cfg, rt, 8, 50)
    assert (ledger.times == 1).all()


def adapted(cfg, rt, val, **changes):
    """(Ledger, learner) of test-time training."""
    cfg = dataclasses.replace(cfg, **changes)
    ttt = t.GlobalTTT(small_model(cfg), t.depth_plan(cfg, looped=True), cfg, rt)
    return scored(ttt, val, cfg, rt, cfg.eval_stride, cfg.ttt_chunk_tokens)[1], ttt


def test_a_learning_rate_of_zero_gives_the_static_score_bit_for_bit(tiny_cfg, rt):
    val = text_of(tiny_cfg, 300)
    moving, ttt = adapted(tiny_cfg, rt, val, ttt_lr=0.0)
    _, still = scored(static(tiny_cfg), val, tiny_cfg, rt, tiny_cfg.eval_stride)
    assert ttt.adapted > 1
    assert torch.equal(moving.nats, still.nats)


def test_adaptation_equals_a_naive_score_first_loop(tiny_cfg, rt):
    # System #1493: score a chunk, then epochs of SGD on its sequences, cosine over the chunks.
    chunk, length = tiny_cfg.ttt_chunk_tokens, tiny_cfg.eval_seq_len
    val = text_of(tiny_cfg, 4 * chunk)
    ledger, ttt = adapted(tiny_cfg, rt, val, ttt_lr=0.1, ttt_grad_clip=0.5)
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
    for p, q in zip(ttt.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_adaptation_learns_repeated_text(tiny_cfg, rt):
    chunk = tiny_cfg.ttt_chunk_tokens
    once = text_of(tiny_cfg, chunk - 1).tokens
    val = t.ValidationTokens(np.tile(once, 6), np.ones(6 * chunk - 1, np.int16), 0)
    moving = adapted(tiny_cfg, rt, val, ttt_lr=0.3, ttt_epochs=5)[0].nats
    still = adapted(tiny_cfg, rt, val, ttt_lr=0.0)[0].nats
    assert torch.equal(moving[:chunk], still[:chunk]), "nothing is known before the first score"
    assert moving[-chunk:].mean() < still[-chunk:].mean() - 0.1


def test_no_target_sees_its_own_or_later_text_even_through_adaptation(tiny_cfg, rt):
    chunk = tiny_cfg.ttt_chunk_tokens
    val = text_of(tiny_cfg, 4 * chunk)
    before, _ = adapted(tiny_cfg, rt, val, ttt_lr=0.3)
    for place in (chunk - 1, chunk, chunk + 1, 2 * chunk + 17, 4 * chunk - 1):
        tokens = val.tokens.copy()
        tokens[place + 1 :] = (tokens[place + 1 :] - 4 + 1) % (tiny_cfg.vocab_size - 4) + 4
        changed = t.ValidationTokens(tokens, val.target_bytes, 0)
        after, _ = adapted(tiny_cfg, rt, changed, ttt_lr=0.3)
        assert torch.equal(after.nats[:place], before.nats[:place])
        assert not torch.equal(after.nats[place:], before.nats[place:])


def losses_on_ranks(rt, cfg, seed, adapts):
    """Losses and digests of a static or an adapting evaluation on this rank."""
    learner, val, chunk = static(cfg, seed), text_of(cfg, 470), 0
    if adapts:
        learner = t.GlobalTTT(learner.model, learner.plan, cfg, rt)
        chunk = cfg.ttt_chunk_tokens
    _, ledger = scored(learner, val, cfg, rt, cfg.eval_stride, chunk)
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
    """The clock of a machine on which each forward takes ten seconds and nothing else any."""

    def __init__(self, monkeypatch, model):
        self.now = 0.0
        monkeypatch.setattr(t.time, "perf_counter", lambda: self.now)
        model.register_forward_pre_hook(self.forward)

    def forward(self, *_):
        self.now += 10.0


def quick(cfg, **changes):
    """The configuration of a shallow model, a window in each forward."""
    changes |= dict(num_layers=2, num_loops=0, micro_batch_tokens=cfg.eval_seq_len)
    return dataclasses.replace(cfg, **changes)


def hurried(monkeypatch, rt, tmp_path, cfg, learner, chunk, deadline):
    """(Ledger, protocol, seconds, log) of an evaluation of 1200 targets that has a deadline."""
    clock, val, kept = SlowClock(monkeypatch, learner.model), text_of(cfg, 1200), []
    rt.budget, rt.folder = t.Budget(cfg), t.RunFolder(str(tmp_path), "x")
    rt.log = t.Log(rt.folder)
    real = t.evaluate
    monkeypatch.setattr(t, "evaluate", lambda *args: kept.append(real(*args)) or kept[0])
    protocol = t.Windows(1200, cfg, cfg.eval_stride, chunk, deadline)
    t.score_stage("quantized_ttt", learner, protocol, val, rt)
    ledger = kept[0][1]
    assert (ledger.times == 1).all()
    assert ledger.order.hexdigest() == protocol.declared()
    return ledger, protocol, clock.now, rt.folder.path("txt").read_text()


@pytest.mark.parametrize(
    ("deadline", "expected"), [(2000.0, None), (1500.0, None), (800.0, "late"), (30.0, "at once")]
)
def test_scoring_that_runs_out_of_time_gives_up_the_stride_and_not_the_score(
    tiny_cfg, rt, monkeypatch, tmp_path, deadline, expected
):
    cfg = quick(tiny_cfg)
    full = scored(static(cfg), text_of(cfg, 1200), cfg, rt, 8)[1]
    side_by_side = scored(static(cfg), text_of(cfg, 1200), cfg, rt, 32)[1]
    assert len(list(t.sliding_windows(1200, 32, 8))) == 147
    args = monkeypatch, rt, tmp_path, cfg, static(cfg), 0, deadline
    ledger, protocol, seconds, log = hurried(*args)
    plain = protocol.plain_from
    assert ("gave up EVAL_STRIDE" in log) == bool(expected)
    if expected is None:
        assert plain is None
        assert seconds == 1470
        return
    assert f"quantized_ttt gave up EVAL_STRIDE at target {plain}, windows stand side by side" in log
    if expected == "late":
        assert 300 < plain < 1200, "as many short strides as fit"
        assert deadline - 400 < seconds <= deadline
    else:
        assert plain == 16 * 8, "after one turn: the time is over already"
    assert torch.equal(ledger.nats[:plain], full.nats[:plain])
    torch.testing.assert_close(ledger.nats[plain:], side_by_side.nats[plain:])


@pytest.mark.parametrize(
    ("deadline", "stops", "gives_up"),
    [(3000.0, False, False), (1800.0, True, False), (1100.0, True, True), (20.0, True, True)],
)
def test_adaptation_ends_before_the_stride_does_and_every_target_is_scored(
    tiny_cfg, rt, monkeypatch, tmp_path, deadline, stops, gives_up
):
    # Scoring alone takes 1470 s, each of nine adaptations 3 epochs of 4 rows: 120 s.
    cfg = quick(tiny_cfg, eval_wallclock_seconds=deadline)
    ttt = t.GlobalTTT(small_model(cfg), t.depth_plan(cfg, looped=True), cfg, rt)
    ledger, protocol, seconds, log = hurried(monkeypatch, rt, tmp_path, cfg, ttt, 128, deadline)
    assert (ttt.stopped, protocol.plain_from is not None) == (stops, gives_up)
    line = f"ttt:stopped adapting after {ttt.adapted} chunks, scoring goes on"
    assert (line in log, "gave up EVAL_STRIDE" in log) == (stops, gives_up)
    assert log.count("stopped adapting") == stops
    assert len(ledger.updates) == 3 * ttt.adapted
    if not stops:
        assert (seconds, ttt.adapted) == (1470 + 9 * 120, 9)
    elif not gives_up:
        assert seconds == 1470 + 120 * ttt.adapted <= deadline < seconds + 120
    else:
        assert all(scored_then < protocol.plain_from for *_, scored_then in ledger.updates)
        assert seconds <= deadline or protocol.plain_from == 128


def test_a_chunk_is_cut_into_whole_sequences(tiny_cfg, rt):
    # 70 targets hold two sequences of 32: the six left over are scored, but not trained on.
    cfg, seen = dataclasses.replace(tiny_cfg, ttt_epochs=1), []
    text = text_of(cfg, 70).tokens
    ttt = t.GlobalTTT(small_model(cfg), t.depth_plan(cfg, looped=True), cfg, rt)
    ttt.model.register_forward_pre_hook(lambda _, args: seen.append([x.tolist() for x in args]))
    ttt.adapt(lambda: text)
    rows = [row for tokens, _ in seen for row in tokens]
    assert rows == [text[:32].tolist(), text[32:64].tolist()]
    assert seen[0][1][-1][-1] == text[64]


def test_general_compressors_are_measured_on_the_decoded_text(dataset, tiny_cfg):
    import lzma

    table = t.ByteTable.from_file(dataset / "tokenizer.model", tiny_cfg.vocab_size)
    val = t.ValidationTokens.load(t.find_shards(dataset, "val"), table, seq_len=32)
    text = b"".join(t.decode_documents(val.tokens, dataset / "tokenizer.model"))
    found = t.compressor_baselines(val, dataset / "tokenizer.model")
    assert set(found) == {"xz-9e", "brotli-11"}
    size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert found["xz-9e"] == pytest.approx(8 * size / len(text))
