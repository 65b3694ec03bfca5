"""Section 2: ranks that agree, a clock that adds up, files that are whole, and the log."""

import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import gloo
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as t
from train_gpt import ArtifactError, Budget, Config, ConfigError, DataError, Log, Runtime

ROOT = Path(t.__file__).parent


class Clock:
    """Stands in for the module `time`; it moves only when told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.perf_counter = self.monotonic = lambda: self.now
        monkeypatch.setattr(t, "time", SimpleNamespace(**vars(self)))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_an_inner_phase_stops_the_clock_of_the_outer_one(clock):
    budget = Budget()
    clock.now += 1  # no phase is open
    with budget.phase("train"):
        clock.now += 2
        with budget.phase("diagnostic"):
            clock.now += 4
            with budget.phase("train"):  # equal names add up
                clock.now += 8
        clock.now += 16
        assert budget.total(["train"]) == 2 + 8 + 16  # also while it is open
    clock.now += 32
    with budget.phase("calibration"):
        clock.now += 64
    assert budget.seconds == {"other": 33, "train": 26, "diagnostic": 4, "calibration": 64}
    assert budget.total(["train", "calibration", "never opened"]) == 90


def test_a_phase_that_fails_is_closed_and_counted(clock):
    def fail():
        with budget.phase("outer"):
            clock.now += 1
            with budget.phase("inner"):
                clock.now += 2
                raise KeyError

    budget = Budget()
    with pytest.raises(KeyError):
        fail()
    clock.now += 4
    assert budget.total(["outer", "inner"]) == 3
    assert budget.seconds == {"other": 4, "outer": 1, "inner": 2}


def test_the_device_is_waited_for_inside_the_phase_it_works_for(clock):
    def finish():
        clock.now += pending.pop() if pending else 0

    pending, budget = [], Budget(finish)
    with budget.phase("outer"):
        pending.append(3)  # queued by outer, still running when inner begins
        with budget.phase("inner"):
            pending.append(5)
    assert budget.seconds == {"other": 0, "outer": 3, "inner": 5}


@pytest.mark.parametrize(("limit", "within"), [(9.0, False), (10.0, True), (0.0, True)])
def test_the_report_says_whether_the_sums_keep_their_limits(clock, limit, within):
    budget = Budget()
    for name, seconds in (
        *(("warm-up", 99), ("train", 7), ("calibration", 3), ("quantization", 99)),
        *(("decompression", 1), ("quantized", 2), ("quantized_sliding_window", 3)),
        ("quantized_ttt", 4),
    ):
        with budget.phase(name):
            clock.now += seconds
    cfg = Config(max_wallclock_seconds=limit, eval_wallclock_seconds=limit)
    report = budget.report(cfg)
    assert report["training"] == dict(seconds=10, limit=limit, within=within)
    assert report["evaluation"] == dict(seconds=10, limit=limit, within=within)
    assert sum(report["phases"].values()) == 99 + 10 + 99 + 10


def test_a_written_file_holds_the_bytes_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"old", b"new bytes", b""):
        t.atomic_write(path, data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ArtifactError) as caught:
            t.atomic_write(path, bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"{path}: could not write 20,000 bytes: File too large")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_found_full_at_the_last_moment_leaves_the_old_file_whole(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(t.os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device; free some space"):
        t.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_the_old_file_whole(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(t.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        t.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_goes_to_the_console_and_to_the_file(tmp_path):
    console = io.StringIO()
    with Log(str(tmp_path / "new" / "logs"), "r", stream=console) as log:
        log.line("one")
        assert log.path("txt").read_text() == "one\n"  # at once, not at the end
        log.line("two \u00e9")
    assert console.getvalue() == "one\ntwo \u00e9\n"
    assert log.path("txt").read_text(encoding="utf-8") == "one\ntwo \u00e9\n"


def test_a_silent_rank_leaves_no_trace(tmp_path):
    console = io.StringIO()
    with Log(str(tmp_path / "logs"), "r", enabled=False, stream=console) as log:
        log.line("one")
        log.put(a=1)
        log.progress("train")(0.5)
    assert console.getvalue() == ""
    assert not list(tmp_path.iterdir())


def test_a_run_id_that_was_used_is_a_config_error(tmp_path):
    with Log(str(tmp_path), "r", stream=io.StringIO()) as log:
        log.line("kept")
    with pytest.raises(ConfigError, match=r"RUN_ID=r: File exists; choose others"):
        Log(str(tmp_path), "r")
    assert (tmp_path / "r.txt").read_text() == "kept\n"


def test_a_log_folder_that_cannot_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="LOG_DIR=.*: (Not a directory|File exists); choose"):
        Log(str(tmp_path / "file"), "r")


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_under_the_log_is_the_users_error(tmp_path):
    log = Log(str(tmp_path), "r", stream=io.StringIO())
    log.file.close()
    log.file = FullDisk()
    with pytest.raises(t.UserError, match=r"r\.txt.*No space left on device"):
        log.line("one")


def test_on_a_full_disk_the_first_error_is_the_one_that_is_told(tmp_path, monkeypatch):
    def full(path, data):
        raise ArtifactError(f"{path}: could not write")

    def fail():
        with log:
            raise DataError("first")

    log = Log(str(tmp_path), "r", stream=io.StringIO())
    monkeypatch.setattr(t, "atomic_write", full)
    with pytest.raises(DataError, match="first"):
        fail()
    assert log.file.closed


def test_facts_add_up_in_the_json_at_once(tmp_path):
    with Log(str(tmp_path), "r", stream=io.StringIO()) as log:
        log.put(a=1, path=tmp_path)
        log.put(b=[2.5], a=3)
        assert json.loads(log.path("json").read_text()) == dict(a=3, path=str(tmp_path), b=[2.5])


def test_an_error_that_ends_the_run_is_noted_in_the_json(tmp_path):
    def fail():
        with log:
            log.put(a=1)
            raise DataError("no shards")

    log = Log(str(tmp_path), "r", stream=io.StringIO())
    with pytest.raises(DataError):
        fail()
    assert json.loads(log.path("json").read_text()) == dict(a=1, error="DataError: no shards")
    assert log.file.closed


def test_progress_in_a_file_is_a_line_now_and_then_with_the_time_left(tmp_path, clock):
    console = io.StringIO()
    with Log(str(tmp_path), "r", stream=console) as log:
        show = log.progress("train")
        for second in range(1, 61):
            clock.now = 100.0 + second
            show(second / 120, f"step:{second}")
    lines = console.getvalue().splitlines()
    assert lines == log.path("txt").read_text().splitlines()
    assert [re.split(r" {2,}| (?=\d+%)", line, maxsplit=1)[1] for line in lines] == [
        "12% time_left:105s step:15",
        "25% time_left:90s step:30",
        "38% time_left:75s step:45",
        "50% time_left:60s step:60",
    ]
    assert all(line.startswith("train ") for line in lines)


def test_progress_without_any_part_done_knows_no_time_left(tmp_path, clock):
    console = io.StringIO()
    with Log(str(tmp_path), "r", stream=console) as log:
        show = log.progress("train")
        clock.now += 20
        show(0.0)
    assert console.getvalue() == "train   0% time_left:?\n"


def test_progress_on_a_terminal_is_one_bar_that_the_next_line_wipes(tmp_path, clock):
    console = io.StringIO()
    console.isatty = lambda: True
    with Log(str(tmp_path), "r", stream=console) as log:
        show = log.progress("train")
        for part in (0.25, 0.5, 0.75):
            clock.now += 1
            show(part)
        show(0.76)  # too soon after the last
        log.line("done")
    wipe = "\r\x1b[K"
    assert console.getvalue().split(wipe)[1:] == [
        "[######                  ] train  25% time_left:3s",
        "[############            ] train  50% time_left:2s",
        "[##################      ] train  75% time_left:1s",
        "done\n",
    ]
    assert log.path("txt").read_text() == "done\n"


@given(count=st.integers(0, 1000), world=st.integers(1, 20))
def test_shares_partition_any_count_and_differ_by_one_at_most(count, world):
    parts = []
    for rank in range(world):
        runtime = Runtime(Config(), dict(RANK=str(rank), WORLD_SIZE=str(world)))
        parts.append(list(range(count))[runtime.share(count)])
    assert sum(parts, []) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def meet(rt):
    """What every rank sees of each collective."""
    rank = rt.rank
    a, b, c = torch.full((2, 3), 1.0 + rank), torch.tensor(10.0 * rank), torch.zeros(0)
    transposed = torch.arange(6.0).view(2, 3).mul(rank + 1).T
    kept = a, b, transposed
    rt.sum_(a, b, c, transposed)
    gathered = rt.start_gather(torch.tensor([[rank, rank], [7, 7]]).T)()
    return dict(
        sums=[x.tolist() for x in kept],
        gathered=gathered.tolist(),
        largest=rt.agree_max(rank, -rank, 1e-300 * rank),
        main=rt.from_main({"name": f"rank {rank}", 3: None}),
        raised=[outcome(rt, failing) for failing in ((), (0,), (1,), (0, 1))],
        own_mistake=own_mistake(rt),
    )


def outcome(rt, failing):
    try:
        with rt.together():
            if rt.rank in failing:
                raise DataError(f"rank {rt.rank}")
    except t.UserError as error:
        return type(error).__name__, str(error)
    return None


def own_mistake(rt):
    """An error that is not the user's passes through as it is."""
    try:
        with rt.together():
            raise KeyError("both")
    except KeyError as error:
        return repr(error)


def test_two_gloo_ranks_agree_in_every_collective():
    results = gloo(2, meet)
    assert results[0] == results[1]
    assert results[0] == dict(
        sums=[[[3.0] * 3] * 2, 10.0, (torch.arange(6.0).view(2, 3) * 3).T.tolist()],
        gathered=[[0, 7], [0, 7], [1, 7], [1, 7]],
        largest=[1.0, 0.0, 1e-300],  # float64: a float32 would lose the last
        main={"name": "rank 0", 3: None},
        raised=[None, ("DataError", "rank 0"), ("DataError", "rank 1"), ("DataError", "rank 0")],
        own_mistake="KeyError('both')",
    )


def test_on_one_rank_every_collective_gives_back_what_it_got(rt):
    with rt:
        tensor = torch.arange(3.0)
        rt.sum_(tensor)
        assert tensor.tolist() == [0, 1, 2]
        assert rt.start_gather(tensor)() is tensor
        assert rt.start_sum_parts([[tensor], []])() == [[tensor], []]
        assert rt.agree_max(1.0, 2.0) == [1.0, 2.0]
        assert rt.from_main("x") == "x"
        assert outcome(rt, (0,)) == ("DataError", "rank 0")
        assert outcome(rt, ()) is None


def test_types_and_compilation_follow_the_settings_and_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = []
    for cfg in (Config(), Config(compute_dtype="bfloat16", compile="1")):
        runtime = Runtime(cfg, {})
        seen.append((runtime.device.type, runtime.compute_dtype, runtime.compiles))
        facts = runtime.describe()
        assert facts["compute_dtype"] == str(runtime.compute_dtype).split(".")[1]
        assert facts["device"]
        assert runtime.peak_flops() is None
    assert seen == [("cpu", torch.float32, False), ("cpu", torch.bfloat16, True)]
    module = torch.nn.Linear(2, 2)
    assert Runtime(Config(), {}).compile(module) is module
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runtime = Runtime(Config(), dict(LOCAL_RANK="3", RANK="11", WORLD_SIZE="16"))
    assert (runtime.device, runtime.compute_dtype) == (torch.device("cuda", 3), torch.bfloat16)
    assert (runtime.rank, runtime.world_size, runtime.compiles) == (11, 16, True)
    assert not runtime.is_main
    assert Runtime(Config(compile="0", compute_dtype="float32"), {}).compiles is False


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_integers_reach_the_device_unchanged(rt, dtype):
    values = np.array([[0, 65535, 1], [40000, 2, 3]], dtype)[:, ::-1]
    tensor = rt.to_device(values)
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == values.tolist()


def test_peak_flops_are_those_of_the_data_sheet_of_a_known_device(monkeypatch):
    runtime = Runtime(Config(), {})
    runtime.device = torch.device("cuda", 0)
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 311.9e12),
        ("Tesla T4", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert runtime.peak_flops() == expected


def test_importing_has_no_effect_and_needs_only_torch_and_numpy(tmp_path):
    code = f"""
import os, random, sys, threading
for name in ("sentencepiece", "brotli", "zstandard", "flash_attn_interface", "triton"):
    sys.modules[name] = None
import numpy, torch
sys.path.insert(0, {str(ROOT)!r})
sys.dont_write_bytecode = True
def state():
    return (dict(os.environ), threading.active_count(), torch.get_num_threads(),
            torch.random.get_rng_state().tolist(), repr(numpy.random.get_state()),
            torch.get_default_dtype(), torch.get_float32_matmul_precision(),
            torch.distributed.is_initialized(), torch.cuda.is_initialized(), os.listdir("."))
before = state()
import train_gpt
assert state() == before
train_gpt.GPT(train_gpt.Config(vocab_size=8, model_dim=8, num_heads=1, num_kv_heads=1))
print("imported")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("imported\n", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_activations_are_bfloat16_and_models_are_compiled():
    with Runtime(Config(), {}) as runtime:
        assert runtime.device.type == "cuda"
        assert runtime.compute_dtype == torch.bfloat16
        assert runtime.compiles
        assert runtime.to_device(np.array([65535], np.uint16)).tolist() == [65535]
        runtime.synchronize()
        assert runtime.describe()["device"] == torch.cuda.get_device_name()
