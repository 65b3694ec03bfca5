"""records/bench.py: what it times, what it counts, and what it says when a script fails.

No test here asserts a time of a real clock.
"""

import argparse
import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_settings
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t

ROOT = Path(t.__file__).parent
sys.path.insert(0, str(ROOT / "records"))
import bench  # noqa: E402

# A script of this family: 16 steps, and then an evaluation that nobody should wait for.
FAKE = """
import os, time
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
steps, every = int(os.environ["ITERATIONS"]), int(os.environ["TRAIN_LOG_EVERY"])
loop_at = int(steps * float(os.environ["ENABLE_LOOPING_AT"]))
for step in range(steps):
    if step == loop_at:
        print(f"layer_loop:enabled step:{step} frac:0.500")
    if (step + 1) % every == 0:
        print(LINE, flush=True)
time.sleep(60)
open("evaluated", "w")
"""
ONE = 'f"{step + 1}/{steps} train_loss: 3.3346 train_time: 0.9m tok/s: 7691255"'
TWO = 'f"step:{step + 1}/{steps} train_loss:3.33 train_time:60123ms step_avg:120.2ms"'


def fake(folder, text):
    path = folder / "fake.py"
    path.write_text(text)
    return path


def options(dataset, folder, *words):
    """A command line for a run of seconds: three layers, one of them looped."""
    small = tiny_settings(dataset, folder)
    small |= dict(NUM_LAYERS="3", LOOP_START="1", LOOP_END="1", PARALLEL_RESIDUAL_START="2")
    small |= dict(NUM_LOOPS="1", WARMUP_STEPS="0")
    own = ("LOG_DIR", "ITERATIONS", "MAX_WALLCLOCK_SECONDS")
    sets = [f"--set={name}={value}" for name, value in small.items() if name not in own]
    common = ["--out", str(folder), "--steps=4", "--warm=1", "--log-every=1", "--rounds=1"]
    return [*sets, *common, *words]


def written(folder, suffix):
    (path,) = folder.glob(f"bench-*.{suffix}")
    return path.read_text()


def test_steps_between_lines_are_booked_to_the_plan_that_ran_them():
    lines = [bench.Line(s, at, "") for s, at in [(1, 0.0), (2, 9.0), (4, 11.0), (6, 13.0)]]
    lines += [bench.Line(s, at, "") for s, at in [(8, 19.0), (10, 25.0), (12, 31.5)]]
    found = bench.step_times(lines, 6, warm=2)
    assert found == {"plain": [1000.0, 1000.0], "looped": [3000.0, 3250.0]}
    assert bench.step_times(lines, None, warm=4) == {"plain": [1000.0, 3000.0, 3000.0, 3250.0]}
    assert bench.step_times(lines, 0, warm=10) == {"looped": [3250.0]}
    assert bench.step_times(lines[:1], None, warm=0) == {}


@pytest.mark.parametrize("line", [ONE, TWO])
def test_a_step_is_timed_by_our_own_clock_and_a_script_ends_with_its_last_line(
    line, dataset, tmp_path, monkeypatch
):
    script = fake(tmp_path, FAKE.replace("LINE", line))
    args = bench.arguments(options(dataset, tmp_path, "--other", str(script), "--steps=8"))
    cfg = t.Config.from_env({**bench.pairs(args.set)}, cuda=False)
    env = bench.environment(cfg, args) | dict(PYTHONPATH=str(tmp_path))
    (tmp_path / "flash_attn_interface.py").write_text(bench.STAND_IN)
    # Our clock says 20 ms for a plain step and 60 ms for a looped one; a line of the loop is free.
    ticks = [20 * n for n in range(9)] + [160 + 60 * n for n in range(9)]
    clock = argparse.Namespace(perf_counter=lambda: ticks.pop(0) / 1e3)
    monkeypatch.setattr(bench, "time", clock)
    found, loop = bench.run_once(bench.Program("other", script, {}), env, tmp_path, args)
    assert not ticks
    assert not (tmp_path / "evaluated").exists()
    assert [x.step for x in found] == list(range(1, 17))
    assert loop == 8
    times = bench.step_times(found, loop, warm=2)
    assert times["plain"] == pytest.approx([20] * 6)
    assert times["looped"] == pytest.approx([60] * 6)
    assert found[-1].claim in ("tok/s: 7691255", "step_avg: 120.2ms", "step_avg:120.2ms")


def test_ours_against_ours_writes_a_table_and_all_that_it_came_from(dataset, tmp_path, capsys):
    words = options(dataset, tmp_path, "--other", str(ROOT / "train_gpt.py"), "--other-set=SEED=2")
    assert bench.main(words) == 0
    record, page = json.loads(written(tmp_path, "json")), written(tmp_path, "md")
    assert [run["program"] for run in record["runs"]] == ["ours", "other"]
    assert record["variables"]["other"] == {"SEED": "2"}
    for plan in ("plain", "looped"):
        found = record["summary"][plan]
        medians = [run["median_ms"][plan] for run in record["runs"]]
        assert [found[name]["median"] for name in ("ours", "other")] == medians
        assert all(ms > 0 for ms in medians)
        assert f"| {plan} | ours | {medians[0]:.2f} (" in page
        ratio = medians[1] / medians[0]
        assert f"{plan}: ours has {ratio:.3f} times the tokens/s" in page
    assert "Attention of ours: sdpa. Of the other script: stand-in by the kernels of" in page
    assert record["hardware"]["torch"] == torch.__version__
    assert "2/2 other" in capsys.readouterr().err


def test_medians_and_ratios_come_from_the_rounds_that_ran_side_by_side(tiny_cfg):
    """The second round met a slower machine: within rounds the ratio is the same."""
    runs = [
        dict(program=name, round=number, median_ms={"plain": ms})
        for name, times in (("ours", (10.0, 20.0, 12.0)), ("other", (15.0, 30.0, 12.0)))
        for number, ms in enumerate(times)
    ]
    found = bench.summarize(runs, tiny_cfg, 1)["plain"]
    assert found["speedup"] == dict(median=1.5, low=1.0, high=1.5, n=3)
    speed = dict(tokens_per_second=256 / 0.012)
    assert found["ours"] == pytest.approx(dict(median=12.0, low=10.0, high=20.0, n=3) | speed)
    assert found["other"]["median"] == 15.0


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("print('hello'); raise SystemExit(7)", ["exit status 7 after 0 of 8 steps", "hello"]),
        ("print('1/8 train_loss: 3.0')", ["exit status 0 after 1 of 8 steps"]),
        (None, ["no such file"]),
    ],
)
def test_a_script_that_fails_is_one_clear_error_with_its_last_lines(
    text, sentences, dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench, "ROOT", tmp_path)  # ours is the same fake: no time for a real run
    script = fake(tmp_path, text) if text else tmp_path / "absent.py"
    (tmp_path / "train_gpt.py").write_text(FAKE.replace("from flash", "#").replace("LINE", ONE))
    words = options(dataset, tmp_path, "--other", str(script))
    assert bench.main(words) == 2
    error = capsys.readouterr().err
    assert f"error: {script}: " in error
    assert all(sentence in error for sentence in sentences)
    assert "Traceback" not in error
    assert not list(tmp_path.glob("bench-*"))


def test_a_script_that_does_not_end_is_stopped_by_the_time_limit(dataset, tmp_path, monkeypatch):
    class AtOnce:
        """A timer whose time is up when it starts."""

        def __init__(self, seconds, function, args):
            assert seconds == 1800
            self.start, self.cancel = lambda: function(*args), lambda: None

    monkeypatch.setattr(bench.threading, "Timer", AtOnce)
    script = bench.Program("other", fake(tmp_path, "import time; time.sleep(99)"), {})
    env = dict(ITERATIONS="8")
    with pytest.raises(t.ConfigError, match="exit status -15 after 0 of 8 steps"):
        bench.run_once(script, env, tmp_path, bench.arguments(["--log-every=1"]))


def test_too_few_lines_and_wrong_words_are_clear_errors(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "train_gpt.py").write_text(FAKE.replace("from flash", "#").replace("LINE", ONE))
    assert bench.main(options(dataset, tmp_path, "--warm=9")) == 2
    assert "no two training lines after 9 steps of a plan" in capsys.readouterr().err
    assert bench.main(["--set", "SEED"]) == 2
    assert "SEED: expected NAME=VALUE" in capsys.readouterr().err
    assert bench.main(["--set", "MATRIX_LRR=1"]) == 2
    assert "MATRIX_LR" in capsys.readouterr().err


def test_the_stand_in_attends_as_attention_is_defined():
    namespace = {}
    exec(bench.STAND_IN, namespace)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, heads, 8, generator=draw) for heads in (4, 2, 2))
    out = namespace["flash_attn_func"](q, k, v, causal=True)
    torch.testing.assert_close(out, t.plain_attention(q, k, v), rtol=1e-5, atol=1e-6)
    # Documents of 5, 2, 0 and 7 positions, end to end, by the names of FlashAttention 3.
    bounds = torch.tensor([0, 5, 7, 7, 14], dtype=torch.int32)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    longest = dict(max_seqlen_q=7, max_seqlen_k=7, causal=True, window_size=(-1, -1))
    out = namespace["flash_attn_varlen_func"](
        *flat, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **longest
    )
    for first, stop in ((0, 5), (5, 7), (7, 14)):
        alone = t.plain_attention(*(x[None, first:stop] for x in flat))[0]
        torch.testing.assert_close(out[first:stop], alone, rtol=1e-5, atol=1e-6)


# --- the whole program for some minutes ---


def test_a_run_writes_a_page_from_its_own_log(dataset, tmp_path, capfd):
    out = tmp_path / "out"
    small = tiny_settings(dataset, tmp_path) | dict(ITERATIONS="26", TRAIN_LOG_EVERY="5", SEED="7")
    sets = [f"--set={name}={value}" for name, value in small.items() if name != "LOG_DIR"]
    assert bench.main(["--train=600", "--out", str(out), *sets]) == 0
    page, record = (out / "README.md").read_text(), json.loads((out / "seed7.json").read_text())
    first = next(entry for entry in record["curve"] if entry["step"] == 1)
    assert f"| training loss at step 1 | {first['train_loss']:.4f} | 9.009 |" in page
    for visits, published in ((11, "102.0"), (17, "150.5")):
        ms = record["step_ms"][f"{visits}_visits"]
        assert f"| ms per step, {visits} visits | {ms:.1f} | {published} |" in page
    stages = record["stages"]
    tax = stages["quantized"]["val_bpb"] - stages["pre-quantization post-ema"]["val_bpb"]
    # Published by three seeds: (1.09970431 + 1.09946892 + 1.09928779) / 3 and so on.
    assert f"| quantized - before quantization [bpb] | {tax:.4f} | 0.0118 |" in page
    total = (out / "seed7.bin").stat().st_size + t.code_bytes()
    assert f"| total [bytes] | {total:,} | 15,993,232 |" in page
    assert (out / "train_gpt.py").read_bytes() == Path(t.__file__).read_bytes()
    assert str(dataset) not in page


def test_a_run_that_fails_passes_its_exit_status_on(tmp_path, capfd):
    sets = [f"--set=DATA_PATH={tmp_path}", f"--set=TOKENIZER_PATH={tmp_path / 'none'}"]
    assert bench.main(["--train=60", "--out", str(tmp_path / "out"), *sets]) == 2
    assert str(tmp_path) in capfd.readouterr().err
    assert not (tmp_path / "out" / "README.md").exists()


# --- counted on paper ---


def test_the_operations_of_a_step_are_those_that_torch_counts(tiny_cfg):
    """Plain attention computes the whole square, so six times its causal forward's products."""
    rows = tiny_cfg.train_batch_tokens // tiny_cfg.train_seq_len
    tokens = torch.empty(rows, tiny_cfg.train_seq_len, dtype=torch.int64, device="meta")
    for plan in bench.both_plans(tiny_cfg).values():
        flops = {
            kind: sum(o.flops for o in bench.of_kind(bench.operations(tiny_cfg, plan), kind))
            for kind in ("matrix products", "attention", "head and loss")
        }
        with FlopCounterMode(display=False) as counter:
            bench.meta_model(tiny_cfg)(tokens, tokens, plan=plan).backward()
        causal_forward = flops["attention"] / 3.5
        others = flops["matrix products"] + flops["head and loss"]
        assert counter.get_total_flops() == others + 6 * causal_forward
        per_token = bench.mfu_flops_per_token(tiny_cfg, plan)
        assert others + 3 * causal_forward == per_token * tiny_cfg.train_batch_tokens


def test_the_bytes_of_a_step_are_those_of_each_operation(tiny_cfg):
    """One plain visit, by hand: width 32, keys and values 16, MLP 128, 384 words, 256 tokens."""
    one = t.dataclasses.replace(tiny_cfg, num_layers=1, num_loops=0, parallel_residual_start=1)
    work = bench.operations(one, t.depth_plan(one, looped=False))
    sides = [(32, 32), (16, 32), (16, 32), (32, 32), (128, 32), (32, 128)]
    passes = 2  # over the weights: micro-batches of 128 tokens

    def product(outputs, inputs):
        return 2 * (256 * (outputs + inputs) + passes * outputs * inputs)

    found = {o.kind: sum(x.bytes for x in bench.of_kind(work, o.kind)) for o in work}
    assert found["matrix products"] == 3 * sum(product(*shape) for shape in sides)
    assert found["attention"] == 2 * 256 * ((32 + 16 + 16 + 32) + 4 * 32 + 4 * 16)
    # Logits: written; read by the loss; read by its gradient, which is written and read twice.
    around = 2 * 3 * (256 * 32 + passes * 32 * 384)
    assert found["head and loss"] == 2 * 256 * 6 * 384 + around


def test_a_floor_is_the_sum_of_the_longer_time_of_each_operation():
    work = [bench.Operation("a", 8e9, 1e6), bench.Operation("b", 1e9, 6e6)]
    assert bench.floor_ms(work, 1e12, 1e9) == pytest.approx(8 + 6)
    assert bench.floor_ms(bench.of_kind(work, "a"), 1e12, 1e9) == pytest.approx(8)


def test_newton_schulz_costs_what_torch_counts(tiny_cfg):
    groups = t.parameter_groups(bench.meta_model(tiny_cfg))
    with FlopCounterMode(display=False) as counter:
        for parameter in groups["matrix"]:
            t.newton_schulz(parameter.detach(), tiny_cfg.muon_backend_steps, torch.bfloat16)
    work = bench.optimizer_operations(tiny_cfg, 1)
    assert sum(o.flops for o in work) == counter.get_total_flops()


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_the_messages_on_paper_are_those_that_a_step_sends(tiny_cfg, rt, monkeypatch, ranks):
    """The collectives are stubs that count; what ranks make of the messages is tested with gloo."""
    sent, hop = [], (ranks - 1) / ranks
    rt.world_size, rt.compute_dtype = ranks, torch.bfloat16

    def counted(whole, times):
        def call(*tensors, **options):
            if tensors[whole].numel() > 1000:  # not the norms
                sent.append(times * hop * tensors[whole].nbytes)
            return argparse.Namespace(wait=lambda: None)

        return call

    for name, whole, times in (
        ("reduce_scatter_single", 1, 1),
        ("all_gather_single", 0, 1),
        ("all_reduce", 0, 2),
    ):
        monkeypatch.setattr(torch.distributed, name, counted(whole, times), raising=False)
    model = t.GPT(tiny_cfg)
    optimizers = t.make_optimizers(model, tiny_cfg, rt)
    t.apply_gradients(model, optimizers.values(), 0.3, rt)
    assert sum(sent) == pytest.approx(bench.sent_bytes(tiny_cfg, ranks))


def test_the_page_is_what_the_settings_give():
    page = bench.paper(t.Config())
    assert page == (ROOT / "records" / "profile.md").read_text(encoding="utf-8")
    assert "Nothing on this page was measured" in page


# --- measured ---


def test_operations_are_classed_by_their_names_and_sizes():
    for name, shapes, kind in (
        ("aten::mm", [[8, 32], [32, 64]], "matrix products"),
        ("aten::mm", [[8, 32], [32, 384]], "head and loss"),
        ("triton_red_fused__log_softmax_nll_loss_forward_3", [], "head and loss"),
        ("aten::_scaled_dot_product_flash_attention", [[2, 4, 8, 8]], "attention"),
        ("triton_poi_fused_add_mul_7", [], "elementwise"),
        ("ncclDevKernel_AllReduce_Sum_f32", [], "communication"),
        ("aten::mul", [[8, 32], []], "elementwise"),
    ):
        assert bench.classify(name, shapes, vocab_size=384) == kind, name


def test_our_own_kernels_are_classed_by_the_names_that_the_program_gives_them():
    expected = dict(
        losses="head and loss", slopes="head and loss", product="matrix products",
        factor="elementwise", turn="elementwise", project="elementwise",
    )  # fmt: skip
    tree = ast.parse(Path(t.__file__).read_text(encoding="utf-8"))
    kernels = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list)
    }
    assert {name: bench.classify(name, [], vocab_size=384) for name in kernels} == expected


def test_on_a_gpu_each_kernel_counts_once_and_the_heads_products_are_the_heads():
    host, device = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(key, where, micros, shapes=(), annotation=False):
        return argparse.Namespace(
            key=key, device_type=where, self_device_time_total=micros, self_cpu_time_total=1e9,
            input_shapes=list(shapes), is_user_annotation=annotation,
        )  # fmt: skip

    events = [
        event("nvjet_hsh_256x128", device, 7e6),
        event("flash::FlashAttnFwdSm90", device, 2e6),
        event("triton_poi_fused_add_mul_7", device, 4e6),
        event("Optimizer.step#Muon.step", device, 9e6, annotation=True),
        event("aten::mm", host, 5e6, [[8, 32], [32, 64]]),
        event("aten::mm", host, 2e6, [[8, 32], [32, 384]]),
        event("triton_poi_fused_add_mul_7", host, 4e6),
    ]
    found = bench.book(events, lambda key, shapes: bench.classify(key, shapes, 384), cuda=True)
    assert found == {
        "matrix products": 5, "head and loss": 2, "attention": 2, "elementwise": 4
    }  # fmt: skip


def test_a_profile_books_a_step_to_classes_beside_their_floors(dataset, tmp_path, capsys):
    words = options(dataset, tmp_path, "--profile", "--steps=2", "--profile-steps=1")
    assert bench.main(words) == 0
    record, page = json.loads(written(tmp_path, "json")), written(tmp_path, "md")
    found = record["profile"]
    rates = found["flops_per_second"], found["bytes_per_second"]
    cfg = t.Config.from_env(bench.pairs(bench.arguments(words).set), cuda=False)
    for name, plan in bench.both_plans(cfg).items():
        part = found["plans"][name]
        kinds = ("matrix products", "attention", "head and loss", "elementwise", "optimizer")
        assert all(part["ms"][kind] > 0 for kind in kinds)
        work = bench.of_kind(bench.operations(cfg, plan), "attention")
        assert part["floor_ms"]["attention"] == pytest.approx(bench.floor_ms(work, *rates))
        assert f"{name}: {part['step_ms']:.3f} ms a step" in page
        assert f"| attention | {part['ms']['attention']:.3f} |" in page


def test_a_profiled_step_keeps_documents_apart_where_the_program_does(tiny_env, rt, monkeypatch):
    found, find = [], t.find_documents
    monkeypatch.setattr(t, "find_documents", lambda tokens: found.append(1) or find(tokens))
    for masking in (0, 1):
        cfg = t.Config.from_env({**tiny_env, "DOC_MASKING": str(masking)}, cuda=False)
        with bench.training(cfg, rt) as halves_of:
            gradients, _ = halves_of(t.depth_plan(cfg, looped=False))
            found.clear()  # of choosing the kernel
            gradients()
        assert len(found) == masking * cfg.train_batch_tokens // cfg.micro_batch_tokens


def test_a_plan_that_no_loop_changes_is_profiled_once(tiny_cfg):
    assert list(bench.both_plans(t.dataclasses.replace(tiny_cfg, num_loops=0))) == ["plain"]
    assert isinstance(bench.arguments([]), argparse.Namespace)
