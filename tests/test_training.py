"""Section 6: steps, schedules, the average, warm-up that leaves no trace, and the end of a run."""

import contextlib
import copy
import dataclasses
import functools
import math

import pytest
import torch
from conftest import gloo
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t


@pytest.fixture
def loader(tiny_cfg, dataset):
    return t.Loader(
        t.find_shards(dataset, "train"),
        seq_len=tiny_cfg.train_seq_len,
        vocab_size=tiny_cfg.vocab_size,
        seed=tiny_cfg.seed,
    )


def fresh(cfg):
    model = t.GPT(cfg)
    model.init_weights(cfg.seed)
    return model


def run_train(cfg, rt, log, loader, validate=None, forward=None):
    model = fresh(cfg)
    validate = validate or (lambda plan, prefix: None)
    trained = t.train(forward or model, model, loader, validate, cfg, rt, log)
    return model, trained


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


def test_a_step_is_one_adam_and_muon_step_on_the_clipped_mean_gradient(tiny_cfg, rt, loader):
    cfg = dataclasses.replace(tiny_cfg, grad_clip_norm=0.05)
    model, plan = fresh(cfg), t.depth_plan(cfg, looped=True)
    twin = copy.deepcopy(model)
    windows = next(loader.batches(rt, 8))
    optimizers = t.make_optimizers(model, cfg, rt)
    t.set_schedule(optimizers, 0, 0.0, cfg)
    loss = t.train_step(model, windows, plan, model, optimizers, cfg, rt)
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
    loader = t.Loader(
        t.find_shards(folder, "train"), seq_len=cfg.train_seq_len, vocab_size=cfg.vocab_size, seed=1
    )
    model, losses = fresh(cfg), []
    optimizers = t.make_optimizers(model, cfg, rt)
    with contextlib.closing(loader.batches(rt, 8)) as batches:
        for step in range(3):
            t.set_schedule(optimizers, step, 0.0, cfg)
            plan = t.depth_plan(cfg, looped=step > 0)
            loss = t.train_step(model, next(batches), plan, model, optimizers, cfg, rt)
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
    tiny_cfg, rt, loader, silent_log
):
    cfg, waits = dataclasses.replace(tiny_cfg, iterations=12, train_log_every=100), []
    model, copies = fresh(cfg), []

    def forward(tokens, targets, plan):
        waits.append(list(reads.found))
        reads.found.clear()
        return model(tokens, targets, plan=plan)

    with pytest.MonkeyPatch.context() as patch, Reads() as reads:
        for name in ("tolist", "numpy", "cpu"):  # the other ways to the host
            patch.setattr(torch.Tensor, name, lambda *args, name=name: copies.append(name))
        t.train(forward, model, loader, lambda *a: None, cfg, rt, silent_log)
    per_step = [sum(waits[n : n + 2], []) for n in range(1, len(waits), 2)]
    assert cfg.micro_batches(1) == 2
    assert per_step[6:11] == [["_local_scalar_dense"]] * 5
    assert copies == []


# --- compilation ---


def train_compiled(cfg, rt, loader, log, monkeypatch, validate=lambda *a: None):
    """Train with graphs but without their code, after the warm-up that the settings ask for."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    rt.compiles, model = True, fresh(cfg)
    forward = rt.compile(model)
    t.warm_up(forward, model, loader, cfg, rt, log)
    before = rt.compilations()
    t.train(forward, model, loader, lambda plan, prefix: validate(forward, plan), cfg, rt, log)
    torch._dynamo.reset()
    return before


def test_a_run_may_need_more_graphs_than_torch_allows_by_default(rt, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
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


def test_warm_up_compiles_all_that_training_runs(tiny_cfg, rt, loader, tmp_path, monkeypatch):
    scored = []

    def validate(forward, plan):  # off the clock, so what it compiles is not counted
        with torch.no_grad():
            scored.append(forward(torch.zeros(1, 16, dtype=torch.int64), plan=plan))

    with t.Log(str(tmp_path), "warm") as log:
        cfg = small(tiny_cfg, val_loss_every=4)
        before = train_compiled(cfg, rt, loader, log, monkeypatch, validate)
        shapes = {p.shape for p in t.parameter_groups(fresh(cfg), cfg)["matrix"]}
        assert before >= 4 + len(shapes), "the plans, and Newton-Schulz for each shape"
        assert rt.compilations() > before
    assert len(scored) == 1
    lines = (tmp_path / "warm.txt").read_text().splitlines()
    assert "compilations after the clock started: 0" in lines
    assert log.record["compilations_after_start"] == 0
    seconds = log.record["time_to_first_step_seconds"]
    assert f"time_to_first_step: {seconds:.1f}s" in lines
    assert 0 < seconds < t.time.perf_counter() - rt.created


def test_a_validation_scores_the_plan_that_its_step_trains(tiny_cfg, rt, loader, silent_log):
    cfg, trained, scored = small(tiny_cfg, val_loss_every=1, warmdown_frac=1.0), [], []
    model = fresh(cfg)

    def forward(*args, plan):
        trained.append(plan)
        return model(*args, plan=plan)

    t.train(forward, model, loader, lambda plan, _: scored.append(plan), cfg, rt, silent_log)
    trained = trained[:: cfg.micro_batches(1)]
    assert scored == trained[1:]
    # Recurrence begins at 0.4 of 8 steps, rounding once the rate is below a half.
    assert [len(plan.visits) for plan in trained] == [2] * 4 + [3] * 4
    assert [plan.fake_bits for plan in trained] == [0] * 5 + [6] * 3


def test_what_is_compiled_after_the_clock_started_is_counted(
    tiny_cfg, rt, loader, tmp_path, monkeypatch
):
    with t.Log(str(tmp_path), "cold") as log:
        before = train_compiled(small(tiny_cfg, warmup_steps=0), rt, loader, log, monkeypatch)
    late = log.record["compilations_after_start"]
    assert late == rt.compilations() - before >= 3
    assert f"compilations after the clock started: {late}" in (tmp_path / "cold.txt").read_text()


def test_micro_batches_change_a_step_only_by_rounding(tiny_cfg, rt, loader):
    found = []
    for rows in (8, 2, 1):
        cfg = dataclasses.replace(tiny_cfg, micro_batch_tokens=rows * tiny_cfg.train_seq_len)
        model = fresh(cfg)
        assert cfg.micro_batches(1) == 8 // rows
        optimizers = t.make_optimizers(model, cfg, rt)
        for windows, _ in zip(loader.batches(rt, 8), range(3), strict=False):
            plan = t.depth_plan(cfg, looped=True)
            loss = t.train_step(model, windows, plan, model, optimizers, cfg, rt)
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


def test_the_reserve_is_what_calibration_and_quantization_take(
    tiny_cfg, rt, loader, silent_log, monkeypatch
):
    now = [0.0]
    calibrate, quantize = t.collect_hessians, t.quantize_model

    def slow_calibration(model, loader, first, plan, cfg, *rest):
        now[0] += 3.0 * cfg.gptq_calibration_batches
        return calibrate(model, loader, first, plan, cfg, *rest)

    def slow_quantization(*args):
        now[0] += 7.0
        return quantize(*args)

    monkeypatch.setattr(t.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(t, "collect_hessians", slow_calibration)
    monkeypatch.setattr(t, "quantize_model", slow_quantization)
    cfg = dataclasses.replace(tiny_cfg, max_wallclock_seconds=500.0, gptq_calibration_batches=12)
    model = fresh(cfg)
    before = copy.deepcopy(model.state_dict())
    measured = t.measure_reserve(model, loader, cfg, rt, silent_log)
    assert measured.gptq_reserve_seconds == pytest.approx(1.1 * (12 * 3.0 + 7.0))
    assert measured.train_seconds == pytest.approx(500 - 47.3)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    short = dataclasses.replace(cfg, max_wallclock_seconds=20.0)
    assert t.measure_reserve(model, loader, short, rt, silent_log).train_seconds == 10.0


def test_warm_up_leaves_no_trace(tiny_cfg, rt, loader, silent_log):
    cfg = dataclasses.replace(tiny_cfg, warmup_steps=3, iterations=6)
    model = fresh(cfg)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    t.warm_up(model, model, loader, cfg, rt, silent_log)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    trained = t.train(model, model, loader, lambda *a: None, cfg, rt, silent_log)
    cold, _ = run_train(cfg, rt, silent_log, loader)
    assert trained.steps == 6
    for name, tensor in cold.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_warm_up_runs_both_depth_plans_with_gradients(tiny_cfg, rt, loader, silent_log):
    cfg, model, seen = dataclasses.replace(tiny_cfg, warmup_steps=2), fresh(tiny_cfg), []

    def forward(tokens, targets, plan):
        seen.append(plan)
        return model(tokens, targets, plan=plan)

    t.warm_up(forward, model, loader, cfg, rt, silent_log)
    plain, looped = (t.depth_plan(cfg, looped=on) for on in (False, True))
    per_step = cfg.micro_batches(1)
    assert seen == [plain] * 2 * per_step + [looped] * 2 * per_step


def test_recurrence_starts_at_its_part_of_training_and_is_logged(tiny_cfg, rt, loader, tmp_path):
    cfg = dataclasses.replace(tiny_cfg, iterations=20, enable_looping_at=0.35)
    model, seen = fresh(cfg), []

    def forward(tokens, targets, plan):
        seen.append(len(plan.visits))
        return model(tokens, targets, plan=plan)

    with t.Log(str(tmp_path), "loop") as log:
        trained = t.train(forward, model, loader, lambda *a: None, cfg, rt, log)
    assert trained == (20, True, ())
    assert seen == [11] * 7 * cfg.micro_batches(1) + [17] * 13 * cfg.micro_batches(1)
    assert (
        "layer_loop:enabled step:7 frac:0.350 encoder:[0, 1, 2, 3, 4, 5, 3, 4] "
        "decoder:[5, 3, 4, 5, 6, 7, 8, 9, 10]"
    ) in (tmp_path / "loop.txt").read_text()


def test_a_run_too_short_for_recurrence_says_so_in_its_result(tiny_cfg, rt, loader, silent_log):
    cfg = dataclasses.replace(tiny_cfg, iterations=2, enable_looping_at=0.9)
    assert run_train(cfg, rt, silent_log, loader)[1] == (2, False, ())
    cfg = dataclasses.replace(tiny_cfg, iterations=2, num_loops=0)
    assert run_train(cfg, rt, silent_log, loader)[1] == (2, False, ())


def test_training_lowers_the_loss(tiny_cfg, rt, loader, tmp_path):
    cfg = dataclasses.replace(tiny_cfg, iterations=60, train_log_every=20)
    with t.Log(str(tmp_path), "fall") as log:
        run_train(cfg, rt, log, loader)
    losses = [entry["train_loss"] for entry in log.record["curve"]]
    assert losses[0] == pytest.approx(math.log(cfg.vocab_size), abs=0.1)
    assert losses[-1] < losses[0] - 1.0


def test_the_clock_ends_training_and_validation_is_off_it(tiny_cfg, rt, loader, tmp_path):
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

    with t.Log(str(tmp_path), "clock") as log:
        model = fresh(cfg)
        trained = t.train(model, model, loader, validate, cfg, rt, log)
    assert 1 < trained.steps < cfg.iterations
    assert calls == [f"{n}/{cfg.iterations}" for n in range(2, trained.steps, 2)]
    assert budget.seconds["diagnostic"] == pytest.approx(0.2 * len(calls), rel=0.3)
    assert 1.5 <= budget.seconds["train"] < 2.5
    text = (tmp_path / "clock.txt").read_text()
    assert f"step: {trained.steps}/{cfg.iterations}" in text
    assert "stopping_early: wallclock_cap train_time: " in text


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_facts(
    tiny_cfg, rt, loader, silent_log, at
):
    cfg, model, calls = dataclasses.replace(tiny_cfg, iterations=6), fresh(tiny_cfg), []

    def forward(tokens, targets, plan):
        calls.append(1)
        loss = model(tokens, targets, plan=plan)
        return loss * math.nan if len(calls) == at * cfg.micro_batches(1) else loss

    with pytest.raises(t.DivergenceError) as error:
        t.train(forward, model, loader, lambda *a: None, cfg, rt, silent_log)
    text = str(error.value)
    assert "the training loss is not finite" in text
    for fact in ("step ", "last finite loss", "matrix=0.0", "embedding=0.0", "scalar=0.0"):
        assert fact in text
    assert len(calls) <= (at + 2) * cfg.micro_batches(1), "stops within a step or two"


def test_a_loss_that_is_not_finite_in_the_very_last_step_is_found(tiny_cfg, rt, loader, silent_log):
    cfg, model, calls = dataclasses.replace(tiny_cfg, iterations=2), fresh(tiny_cfg), []

    def forward(tokens, targets, plan):
        calls.append(1)
        loss = model(tokens, targets, plan=plan)
        return loss * math.inf if len(calls) == 2 * cfg.micro_batches(1) else loss

    with pytest.raises(t.DivergenceError):
        t.train(forward, model, loader, lambda *a: None, cfg, rt, silent_log)


def test_the_log_gives_throughput_and_utilisation(tiny_cfg, rt, loader, tmp_path, monkeypatch):
    monkeypatch.setattr(t.Runtime, "peak_flops", lambda self: 1e12)
    cfg = dataclasses.replace(tiny_cfg, iterations=12, train_log_every=4)
    with t.Log(str(tmp_path), "speed") as log:
        run_train(cfg, rt, log, loader)
    lines = [x for x in (tmp_path / "speed.txt").read_text().splitlines() if "train_loss" in x]
    assert [x.split("/")[0] for x in lines] == ["1", "2", "3", "4", "5", "8", "12"]
    assert t.re.fullmatch(
        r"12/12 train_loss: \d\.\d{4} train_time: \d\.\dm tok/s: \d+ mfu: \d\.\d{3}", lines[-1]
    )
    monkeypatch.setattr(t.Runtime, "peak_flops", lambda self: None)
    with t.Log(str(tmp_path), "cpu") as log:
        run_train(cfg, rt, log, loader)
    text = (tmp_path / "cpu.txt").read_text()
    assert "tflops: " in text
    assert "mfu: " not in text
    assert t.re.fullmatch(r"step_ms 11_visits:[\d.]+ 17_visits:[\d.]+", text.splitlines()[-1])
