"""Section 8: steps, schedules, the average, warm-up that leaves no trace, and the end of a run."""

import contextlib
import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from conftest import gloo
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t


@pytest.fixture
def loader(tiny_cfg, dataset):
    return t.Loader(t.find_shards(dataset, "train"), tiny_cfg)


@pytest.fixture
def log_file(rt, tmp_path):
    """The text file that `rt.log` writes."""
    rt.folder = t.RunFolder(str(tmp_path), "run")
    rt.log = t.Log(rt.folder)
    yield rt.folder.path("txt")
    rt.log.close()


def fresh(cfg):
    model = t.GPT(cfg)
    model.init_weights(cfg.seed)
    return model


def ignore(plan, prefix):
    """A validation that does nothing."""


def run_train(cfg, rt, loader):
    model = fresh(cfg)
    return model, t.train(model, loader, ignore, cfg, rt)


def forwards(cfg):
    """Forwards of one step on one rank."""
    return cfg.train_rows // cfg.micro_rows(1)


def watch(model, see):
    """Call see(plan) before each forward."""
    hook = lambda module, args, kwargs: see(kwargs["plan"])  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def test_the_average_is_the_closed_form_of_its_recursion():
    model = torch.nn.Linear(2, 1, bias=False)
    values = [torch.randn(1, 2) for _ in range(5)]
    model.weight.data.copy_(values[0])
    ema = t.Ema(model, 0.9)
    for value in values[1:]:
        model.weight.data.copy_(value)
        ema.update()
    ema.store()
    expected = 0.9**4 * values[0] + sum(0.1 * 0.9 ** (4 - i) * values[i] for i in range(1, 5))
    torch.testing.assert_close(model.weight.data, expected)


# --- stages ---


@pytest.mark.parametrize("loops", [0, 2])
@pytest.mark.parametrize("at_step", [0, 30])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_table_has_a_row_for_each_set_of_changes(loops, at_step, threshold, masked):
    cfg = t.Config(num_loops=loops, enable_looping_at_step=at_step, late_qat_threshold=threshold)
    table = t.stages(dataclasses.replace(cfg, doc_masking=masked, train_seq_len=1024))
    expected = [((), 11, False)]
    if loops:
        expected.append((("layer_loop",), 17, False))
    if threshold:
        expected.append((("late_qat",), 11, True))
    if loops and threshold:
        expected.append((("layer_loop", "late_qat"), 17, True))
    found = [(tuple(c.name for c in s.begun), len(s.plan.visits), s.plan.rounded) for s in table]
    assert found == expected
    assert all(s.plan.masked == masked and s.seq_len == 1024 for s in table)


moments = st.fixed_dictionaries(
    dict(step=st.integers(0, 60), frac=st.floats(0, 1), scale=st.floats(0, 1))
)


@given(st.lists(moments, max_size=12), st.booleans(), st.booleans(), st.sampled_from([0, 30]))
def test_each_change_begins_once_at_its_time_and_stays_whatever_the_order(
    steps, loops, late, at_step
):
    # Any numbers at all: a multiplier that rises again, a clock that jumps, both due at once.
    cfg = t.Config(
        num_loops=2 * loops,
        enable_looping_at=0.35,
        enable_looping_at_step=at_step,
        late_qat_threshold=0.4 * late,
    )
    table = t.stages(cfg)
    stage, looped, rounded = table[0], False, False
    for now in steps:
        due = now["step"] >= at_step if at_step else now["frac"] >= 0.35
        looped, rounded = looped or (loops and due), rounded or (late and now["scale"] < 0.4)
        stage = t.stage_at(table, stage, now)
        assert (len(stage.plan.visits), stage.plan.rounded) == (17 if looped else 11, rounded)


@pytest.mark.parametrize("loop_at", [0.2, 0.8])
def test_training_enables_each_change_once_and_logs_it(tiny_cfg, rt, loader, log_file, loop_at):
    cfg, seen = small(tiny_cfg, warmdown_frac=1.0, train_log_every=100), []
    cfg = dataclasses.replace(cfg, enable_looping_at=loop_at)
    t.train(watch(fresh(cfg), seen.append), loader, ignore, cfg, rt)
    first = {
        "layer_loop": next(n for n, plan in enumerate(seen) if len(plan.visits) == 3),
        "late_qat": next(n for n, plan in enumerate(seen) if plan.rounded),
    }
    begun = {"layer_loop": math.ceil(8 * loop_at), "late_qat": 5}  # (1 - 5/8) is below a half
    assert {name: number // forwards(cfg) for name, number in first.items()} == begun
    lines = [line.split() for line in log_file.read_text().splitlines() if ":enabled" in line]
    expected = [[f"{n}:enabled", f"step:{begun[n]}"] for n in sorted(begun, key=begun.get)]
    assert [line[:2] for line in lines] == expected


# --- steps ---


def test_a_step_is_one_adam_and_muon_step_on_the_clipped_mean_gradient(tiny_cfg, rt, loader):
    cfg = dataclasses.replace(tiny_cfg, grad_clip_norm=0.05)
    model, plan = fresh(cfg), t.depth_plan(cfg, looped=True)
    twin = copy.deepcopy(model)
    windows = next(loader.batches(rt, 8))
    optimizers = t.make_optimizers(model, cfg, rt)
    t.set_schedule(optimizers, 0, 0.0, cfg)
    loss = t.train_step(model, windows, optimizers, cfg, rt, plan=plan)
    mean = twin(windows[:, :-1], windows[:, 1:], plan=plan)
    mean.backward()
    assert loss.item() == pytest.approx(mean.item(), rel=1e-5)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in twin.parameters()))
    assert norm > 0.05, "the clip must bite for this test to tell"
    gate = twin.skip_gates.grad * 0.05 / norm
    # Adam's first step is lr * g / (|g| + eps), after decay by lr * wd.
    step = cfg.scalar_lr * gate / (gate.abs() + cfg.adam_eps)
    expected = twin.skip_gates.data * (1 - cfg.scalar_lr * cfg.adam_wd) - step
    torch.testing.assert_close(model.skip_gates.data, expected, rtol=1e-3, atol=1e-6)


def some_steps(rt, cfg, folder):
    """The losses and weights of three steps, some gradients of which are clipped hard."""
    loader = t.Loader(t.find_shards(folder, "train"), cfg)
    model, losses = fresh(cfg), []
    optimizers = t.make_optimizers(model, cfg, rt)
    with contextlib.closing(loader.batches(rt, 8)) as batches:
        for step in range(3):
            t.set_schedule(optimizers, step, 0.0, cfg)
            plan = t.depth_plan(cfg, looped=step > 0)
            loss = t.train_step(model, next(batches), optimizers, cfg, rt, plan=plan)
            rt.sum_(loss)
            losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def test_two_ranks_take_the_steps_of_one(tiny_cfg, dataset, rt):
    cfg = dataclasses.replace(tiny_cfg, num_layers=6, grad_clip_norm=0.05)
    alone, weights = some_steps(rt, cfg, dataset)
    results = gloo(2, some_steps, cfg, dataset)
    for losses, theirs in results:
        assert losses == pytest.approx(alone, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=2e-4)
            assert torch.equal(theirs[name], results[0][1][name]), "or the ranks drift apart"


def test_whole_rows_lie_side_by_side_and_each_target_follows():
    for count in (1, 5, 8, 9, 13, 17):
        text = np.arange(100, 100 + count)
        rows = t.whole_rows(text, 4)
        expected = [text[s : s + 5].tolist() for s in range(0, count - 4, 4)]
        assert rows.tolist() == expected, count


def text_steps(rt, cfg, rows):
    """The mean losses and the weights of two steps on rows of text."""
    model, plan = fresh(cfg), t.depth_plan(cfg, looped=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = functools.partial(t.text_step, plan=plan, clip_norm=0.5)
    losses = [step(model, rows, optimizer, cfg, rt).item() for _ in range(2)]
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("count", [1, 5])
def test_a_text_step_of_two_ranks_is_that_of_one_also_where_a_rank_has_no_row(tiny_cfg, rt, count):
    few = dict(num_layers=4, xsa_last_n=2, loop_start=1, loop_end=2, parallel_residual_start=3)
    cfg = dataclasses.replace(tiny_cfg, micro_batch_tokens=64, **few)
    rows = np.random.default_rng(0).integers(0, cfg.vocab_size, (count, 33))
    alone, weights = text_steps(rt, cfg, rows)
    assert alone[1] < alone[0]
    results = gloo(2, text_steps, cfg, rows)
    for losses, theirs in results:
        assert losses == pytest.approx(alone, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=1e-6, msg=name)
            assert torch.equal(theirs[name], results[0][1][name]), "or the ranks drift apart"


class Reads(TorchDispatchMode):
    """Counts the operations for which a host waits for its device, by the step they are in."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.startswith(self.WAITS):
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_between_log_lines_waits_for_the_loss_of_the_one_before_and_nothing_else(
    tiny_cfg, rt, loader
):
    cfg, waits = dataclasses.replace(tiny_cfg, iterations=12, train_log_every=100), []
    copies = []

    def see(plan):
        waits.append(list(reads.found))
        reads.found.clear()

    model = watch(fresh(cfg), see)
    with pytest.MonkeyPatch.context() as patch, Reads() as reads:
        for name in ("tolist", "numpy", "cpu"):  # the other ways to the host
            patch.setattr(torch.Tensor, name, lambda *args, name=name: copies.append(name))
        t.train(model, loader, ignore, cfg, rt)
    per_step = [sum(waits[n : n + 2], []) for n in range(1, len(waits), 2)]
    assert forwards(cfg) == 2
    assert per_step[6:11] == [["_local_scalar_dense"]] * 5
    assert copies == []


# --- compilation ---


def train_compiled(cfg, rt, loader, monkeypatch, validate=lambda model, plan: None):
    """Train with graphs but without their code, after the warm-up that the settings ask for."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    rt.compiles = True
    model = rt.compile(fresh(cfg))
    t.warm_up(model, loader, cfg, rt)
    before = rt.compilations()
    t.train(model, loader, lambda plan, prefix: validate(model, plan), cfg, rt)
    torch._dynamo.reset()
    return before


@torch._dynamo.config.patch(recompile_limit=8)
def test_a_run_may_need_more_graphs_than_torch_allows_by_default(rt, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    rt.compiles = True
    double, before = rt.compile(lambda x: x + x), rt.compilations()
    for length in range(1, 13):
        assert torch.equal(double(torch.ones(length)), torch.full((length,), 2.0))
    assert rt.compilations() - before == 12
    torch._dynamo.reset()


def small(cfg, **changes):
    """Two layers, one of them looped, and rounded training at the end: four depth plans."""
    few = dict(num_layers=2, loop_start=1, loop_end=1, num_loops=1, parallel_residual_start=1)
    few |= dict(iterations=8, enable_looping_at=0.4, late_qat_threshold=0.5)
    return dataclasses.replace(cfg, **few, **changes)


def test_warm_up_compiles_all_that_training_runs(tiny_cfg, rt, loader, log_file, monkeypatch):
    scored, cfg = [], small(tiny_cfg, val_loss_every=4)

    def validate(model, plan):  # off the clock, so what it compiles is not counted
        with torch.no_grad():
            scored.append(model(torch.zeros(1, 16, dtype=torch.int64), plan=plan))

    before = train_compiled(cfg, rt, loader, monkeypatch, validate)
    shapes = {p.shape for p in t.parameter_groups(fresh(cfg))["matrix"]}
    assert before >= 4 + len(shapes), "the plans, and Newton-Schulz for each shape"
    assert rt.compilations() > before
    assert len(scored) == 1
    lines = log_file.read_text().splitlines()
    assert "compilations after the clock started: 0" in lines
    assert rt.log.record["compilations_after_start"] == 0
    seconds = rt.log.record["time_to_first_step_seconds"]
    assert f"time_to_first_step: {seconds:.1f}s" in lines
    assert 0 < seconds < t.time.perf_counter() - rt.created


def test_after_warm_up_a_step_of_any_row_of_the_table_compiles_nothing(
    tiny_cfg, rt, loader, log_file, monkeypatch
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    cfg, rt.compiles = small(tiny_cfg), True
    model = rt.compile(fresh(cfg))
    t.warm_up(model, loader, cfg, rt)
    before, table = rt.compilations(), t.stages(cfg)
    windows, optimizers = rt.to_device(loader.windows(0, 8)), t.make_optimizers(model, cfg, rt)
    for stage in reversed(table):
        t.train_step(model, windows, optimizers, cfg, rt, plan=stage.plan)
    assert rt.compilations() == before
    torch._dynamo.reset()
    names = ("", "layer_loop_", "late_qat_", "layer_loop_late_qat_")
    assert log_file.read_text().splitlines() == [f"{name}warmup_step: 1/1" for name in names]


def test_a_validation_scores_the_plan_that_its_step_trains(tiny_cfg, rt, loader):
    cfg, trained, scored = small(tiny_cfg, val_loss_every=1, warmdown_frac=1.0), [], []
    model = watch(fresh(cfg), trained.append)
    t.train(model, loader, lambda plan, _: scored.append(plan), cfg, rt)
    trained = trained[:: forwards(cfg)]
    assert scored == trained[1:]
    # Recurrence begins at 0.4 of 8 steps, rounding once the rate is below a half.
    assert [len(plan.visits) for plan in trained] == [2] * 4 + [3] * 4
    assert [plan.rounded for plan in trained] == [False] * 5 + [True] * 3


def test_what_is_compiled_after_the_clock_started_is_counted(
    tiny_cfg, rt, loader, log_file, monkeypatch
):
    before = train_compiled(small(tiny_cfg, warmup_steps=0), rt, loader, monkeypatch)
    late = rt.log.record["compilations_after_start"]
    assert late == rt.compilations() - before >= 3
    assert f"compilations after the clock started: {late}" in log_file.read_text()


def test_rows_per_forward_change_a_step_only_by_rounding(tiny_cfg, rt, loader):
    found = []
    for rows in (8, 2, 1):
        cfg = dataclasses.replace(tiny_cfg, micro_batch_tokens=rows * tiny_cfg.train_seq_len)
        model = fresh(cfg)
        assert cfg.micro_rows(1) == rows
        optimizers = t.make_optimizers(model, cfg, rt)
        for windows, _ in zip(loader.batches(rt, 8), range(3), strict=False):
            plan = t.depth_plan(cfg, looped=True)
            loss = t.train_step(model, windows, optimizers, cfg, rt, plan=plan)
        found.append((loss.item(), model.head.weight.detach().clone()))
    for loss, weight in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4)
        torch.testing.assert_close(weight, found[0][1], rtol=1e-3, atol=1e-4)


def test_the_schedule_reaches_every_optimizer(tiny_cfg, rt):
    optimizers = t.make_optimizers(fresh(tiny_cfg), tiny_cfg, rt)
    rates = t.set_schedule(optimizers, 50, 0.64, tiny_cfg)
    scale = (1 - 0.64) / 0.72
    assert rates == pytest.approx(
        {"matrix": 0.022 * scale, "embedding": 0.03 * scale, "scalar": 0.02 * scale}
    )
    assert {n: o.param_groups[0]["lr"] for n, o in optimizers.items()} == rates
    assert optimizers["matrix"].param_groups[0]["momentum"] == t.muon_momentum(50, tiny_cfg)


def test_the_part_done_is_that_of_whichever_limit_comes_first(tiny_cfg):
    cfg = dataclasses.replace(
        tiny_cfg, iterations=100, max_wallclock_seconds=60.0, gptq_reserve_seconds=10.0
    )
    assert t.training_frac(10, 0.0, cfg) == 0.1
    assert t.training_frac(10, 25.0, cfg) == 0.5
    assert t.training_frac(10, 1e9, dataclasses.replace(cfg, max_wallclock_seconds=0.0)) == 0.1


def test_the_reserve_is_what_calibration_alone_takes(tiny_cfg, rt, loader, monkeypatch):
    now, calibrate = [0.0], t.collect_hessians

    def slow_calibration(model, loader, cfg, *args, **kwargs):
        now[0] += 3.0 * cfg.gptq_calibration_batches
        return calibrate(model, loader, cfg, *args, **kwargs)

    def quantization(*args):
        raise AssertionError("it is no part of the training budget")

    monkeypatch.setattr(t.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(t, "collect_hessians", slow_calibration)
    monkeypatch.setattr(t, "quantize_model", quantization)
    cfg = dataclasses.replace(tiny_cfg, max_wallclock_seconds=500.0, gptq_calibration_batches=12)
    model = fresh(cfg)
    before = copy.deepcopy(model.state_dict())
    measured = t.measure_reserve(model, loader, cfg, rt)
    assert measured.gptq_reserve_seconds == pytest.approx(1.1 * 12 * 3.0)
    assert measured.train_seconds == pytest.approx(500 - 39.6)
    assert rt.log.record["gptq_reserve_seconds"] == measured.gptq_reserve_seconds
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    short = dataclasses.replace(cfg, max_wallclock_seconds=20.0)
    assert t.measure_reserve(model, loader, short, rt).train_seconds == 10.0


def test_warm_up_leaves_no_trace(tiny_cfg, rt, loader):
    cfg = dataclasses.replace(tiny_cfg, warmup_steps=3, iterations=6)
    model = fresh(cfg)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    t.warm_up(model, loader, cfg, rt)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    trained = t.train(model, loader, ignore, cfg, rt)
    cold, _ = run_train(cfg, rt, loader)
    assert trained.steps == 6
    for name, tensor in cold.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_warm_up_runs_every_row_of_the_table_with_gradients(tiny_cfg, rt, loader):
    cfg = dataclasses.replace(tiny_cfg, warmup_steps=2, late_qat_threshold=0.5)
    seen, differentiated = [], []
    model = watch(fresh(cfg), seen.append)
    model.head.weight.register_hook(lambda grad: differentiated.append(bool(grad.any())))
    t.warm_up(model, loader, cfg, rt)
    plain, looped = (t.depth_plan(cfg, looped=on) for on in (False, True))
    rows = [plain, looped, *(plan._replace(rounded=True) for plan in (plain, looped))]
    assert seen == [plan for plan in rows for _ in range(2 * forwards(cfg))]
    assert differentiated == [True] * len(seen)


def test_recurrence_starts_at_its_part_of_training_and_is_logged(tiny_cfg, rt, loader, log_file):
    cfg, seen = dataclasses.replace(tiny_cfg, iterations=20, enable_looping_at=0.35), []
    model = watch(fresh(cfg), lambda plan: seen.append(len(plan.visits)))
    trained = t.train(model, loader, ignore, cfg, rt)
    assert trained == (20, True, ())
    assert seen == [11] * 7 * forwards(cfg) + [17] * 13 * forwards(cfg)
    assert (
        "layer_loop:enabled step:7 frac:0.350 encoder:[0, 1, 2, 3, 4, 5, 3, 4] "
        "decoder:[5, 3, 4, 5, 6, 7, 8, 9, 10]"
    ) in log_file.read_text()


def test_a_run_too_short_for_recurrence_says_so_in_its_result(tiny_cfg, rt, loader):
    cfg = dataclasses.replace(tiny_cfg, iterations=2, enable_looping_at=0.9)
    assert run_train(cfg, rt, loader)[1] == (2, False, ())
    cfg = dataclasses.replace(tiny_cfg, iterations=2, num_loops=0)
    assert run_train(cfg, rt, loader)[1] == (2, False, ())


def test_training_lowers_the_loss(tiny_cfg, rt, loader):
    cfg = dataclasses.replace(tiny_cfg, iterations=60, train_log_every=20)
    run_train(cfg, rt, loader)
    losses = [entry["train_loss"] for entry in rt.log.record["curve"]]
    assert losses[0] == pytest.approx(math.log(cfg.vocab_size), abs=0.1)
    assert losses[-1] < losses[0] - 1.0


def test_the_clock_ends_training_and_validation_is_off_it(tiny_cfg, rt, loader, log_file):
    cfg = dataclasses.replace(
        tiny_cfg,
        iterations=10**6,
        max_wallclock_seconds=2.0,
        gptq_reserve_seconds=0.5,
        val_loss_every=2,
    )
    budget, calls = rt.budget, []

    def validate(plan, prefix):
        with budget.phase("diagnostic"):
            t.time.sleep(0.2)
        calls.append(prefix)

    trained = t.train(fresh(cfg), loader, validate, cfg, rt)
    assert 1 < trained.steps < cfg.iterations
    assert calls == [f"{n}/{cfg.iterations}" for n in range(2, trained.steps, 2)]
    assert budget.seconds["diagnostic"] == pytest.approx(0.2 * len(calls), rel=0.3)
    assert 1.5 <= budget.seconds["train"] < 2.5
    text = log_file.read_text()
    assert f"step: {trained.steps}/{cfg.iterations}" in text
    assert "stopping_early: wallclock_cap train_time: " in text


def spoil(model, calls, at, factor):
    """Multiply the loss of forward number `at` by a factor; calls: one entry for each forward."""

    def hook(module, args, loss):
        calls.append(1)
        return loss * factor if len(calls) == at else loss

    model.register_forward_hook(hook)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_facts(tiny_cfg, rt, loader, at):
    cfg, model, calls = dataclasses.replace(tiny_cfg, iterations=6), fresh(tiny_cfg), []
    spoil(model, calls, at * forwards(cfg), math.nan)
    with pytest.raises(t.DivergenceError) as error:
        t.train(model, loader, ignore, cfg, rt)
    text = str(error.value)
    assert "the training loss is not finite" in text
    for fact in ("step ", "last finite loss", "matrix=0.0", "embedding=0.0", "scalar=0.0"):
        assert fact in text
    assert len(calls) <= (at + 2) * forwards(cfg), "stops within a step or two"


def test_a_loss_that_is_not_finite_in_the_very_last_step_is_found(tiny_cfg, rt, loader):
    cfg, model = dataclasses.replace(tiny_cfg, iterations=2), fresh(tiny_cfg)
    spoil(model, [], 2 * forwards(cfg), math.inf)
    with pytest.raises(t.DivergenceError):
        t.train(model, loader, ignore, cfg, rt)


def test_the_log_gives_throughput_and_utilisation(tiny_cfg, rt, loader, log_file, monkeypatch):
    monkeypatch.setattr(t.Runtime, "peak_flops", lambda self: 1e12)
    cfg = dataclasses.replace(tiny_cfg, iterations=12, train_log_every=4)
    run_train(cfg, rt, loader)
    lines = [x for x in log_file.read_text().splitlines() if "train_loss" in x]
    assert [x.split("/")[0] for x in lines] == ["1", "2", "3", "4", "5", "8", "12"]
    assert t.re.fullmatch(
        r"12/12 train_loss: \d\.\d{4} train_time: \d\.\dm tok/s: \d+ mfu: \d\.\d{3}", lines[-1]
    )
    monkeypatch.setattr(t.Runtime, "peak_flops", lambda self: None)
    before = len(log_file.read_text())
    run_train(cfg, rt, loader)
    text = log_file.read_text()[before:]
    assert "tflops: " in text
    assert "mfu: " not in text
    assert t.re.fullmatch(r"step_ms 11_visits:[\d.]+ 17_visits:[\d.]+", text.splitlines()[-1])
