"""Section 2: ranks that agree, a clock that adds up, files that are whole, and the log."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
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

import train_gpt as t
from train_gpt import (
    ArtifactError,
    Budget,
    Config,
    ConfigError,
    DataError,
    Log,
    Pace,
    RunFolder,
    Runtime,
)

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
    budget = Budget(Config())
    clock.now += 1  # no phase is open
    with budget.phase("train"):
        clock.now += 2
        with budget.phase("diagnostic"):
            clock.now += 4
            with budget.phase("train"):  # equal names add up
                clock.now += 8
        clock.now += 16
        assert budget.total("train") == 2 + 8 + 16  # also while it is open
    clock.now += 32
    with budget.phase("calibration"):
        clock.now += 64
    assert budget.seconds == {"other": 33, "train": 26, "diagnostic": 4, "calibration": 64}
    assert budget.total("train", "calibration", "compression") == 90
    assert budget.total() == 0


def test_a_phase_that_fails_is_closed_and_counted(clock):
    def fail():
        with budget.phase("train"):
            clock.now += 1
            with budget.phase("diagnostic"):
                clock.now += 2
                raise KeyError

    budget = Budget(Config())
    with pytest.raises(KeyError):
        fail()
    clock.now += 4
    assert budget.total("train", "diagnostic") == 3
    assert budget.seconds == {"other": 4, "train": 1, "diagnostic": 2}


def test_a_phase_outside_the_closed_list_is_refused(clock):
    budget = Budget(Config())
    with pytest.raises(AssertionError, match="phase extra is not in"), budget.phase("extra"):
        pass
    assert len(set(Budget.PHASES)) == len(Budget.PHASES)
    assert {*Budget.TRAINING, *Budget.EVALUATION} < set(Budget.PHASES)


def test_the_device_is_waited_for_inside_the_phase_it_works_for(clock):
    def finish():
        clock.now += pending.pop() if pending else 0

    pending, budget = [], Budget(Config(), finish)
    with budget.phase("train"):
        pending.append(3)  # queued by the outer phase, still running when the inner one begins
        with budget.phase("diagnostic"):
            pending.append(5)
    assert budget.seconds == {"other": 0, "train": 3, "diagnostic": 5}


@pytest.mark.parametrize(("limit", "within"), [(9.0, False), (10.0, True), (0.0, True)])
def test_the_report_says_whether_the_sums_keep_their_limits(clock, limit, within):
    budget = Budget(Config(max_wallclock_seconds=limit, eval_wallclock_seconds=limit))
    for name, seconds in (
        *(("warm-up", 99), ("train", 7), ("calibration", 3), ("quantization", 99)),
        *(("decompression", 1), ("quantized", 2), ("quantized_sliding_window", 3)),
        ("quantized_ttt", 4),
    ):
        with budget.phase(name):
            clock.now += seconds
    report = budget.report()
    assert report["training"] == dict(seconds=10, limit=limit, within=within)
    assert report["evaluation"] == dict(seconds=10, limit=limit, within=within)
    assert sum(report["phases"].values()) == 99 + 10 + 99 + 10
    unbooked = report["wall_seconds"] - sum(report["phases"].values())
    assert report["unbooked_seconds"] == pytest.approx(unbooked)


def work(pace, clock, kind, *pieces, units=1):
    """Pieces of so many seconds each, inside the phase `calibration`."""
    with pace.rt.budget.phase("calibration"):
        for seconds in pieces:
            with pace.piece(kind, units):
                clock.now += seconds


def test_the_pace_predicts_by_the_median_piece_without_the_first(clock, rt):
    pace = Pace(rt, ("calibration",), math.inf)
    work(pace, clock, "batch", 50, 1, 9, 2)
    work(pace, clock, "turn", 70, 20, 40, 21, 8, units=4)  # a unit: 5, 10, 5.25, 2
    spent, more = 62 + 159, 3 * 2 + 8 * 5.125
    for limit, late in ((spent + more, False), (spent + more - 0.01, True)):
        pace.limit = limit
        assert pace.late(batch=3, turn=8) is late
    for limit, late in ((spent + 6, False), (spent + 5.99, True)):
        pace.limit = limit
        assert pace.late(batch=3) is late, "only the kinds that are asked for"


def test_without_a_second_piece_work_is_late_only_past_the_limit(clock, rt):
    pace = Pace(rt, ("calibration",), 100.0)
    assert not pace.late(batch=1000)
    work(pace, clock, "batch", 99)  # the first includes compilation
    assert not pace.late(batch=1000, learn=1000)
    work(pace, clock, "learn", 1)
    assert not pace.late(learn=1000)
    work(pace, clock, "learn", 0.5)
    assert pace.late(learn=0)


def test_only_the_phases_of_a_limit_count_against_it(clock, rt):
    pace = Pace(rt, ("calibration", "train"), 10.0)
    with rt.budget.phase("diagnostic"):
        clock.now += 99
    assert not pace.late(batch=1)
    with rt.budget.phase("train"):
        clock.now += 6
    work(pace, clock, "batch", 3, 1)
    assert not pace.late(batch=0)
    assert pace.late(batch=1)


@pytest.mark.parametrize("limit", [0.0, math.inf])
def test_without_a_limit_nothing_is_late(clock, rt, limit):
    pace = Pace(rt, ("calibration",), limit)
    work(pace, clock, "batch", 1e9, 1e9)
    assert not pace.late(batch=1e9)


def pace_of_a_rank(rt):
    """Whether one more batch is late, by limit; a piece takes 1 s on rank 0 and 3 s on rank 1."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    t.time = clock  # of this process alone
    rt.budget = Budget(Config())
    pace = Pace(rt, ("calibration",), math.inf)
    work(pace, clock, "batch", *[1.0 + 2 * rt.rank] * 4)
    limits, found = (3.0, 4.0, 5.5, 12.0, 14.0, 15.0, 16.0), []
    for pace.limit in limits:
        found.append(pace.late(batch=1))
    return found


def test_two_ranks_with_different_clocks_are_late_alike():
    slow = [True] * 5 + [False] * 2  # 4 pieces of 3 s, and 3 s more
    assert gloo(2, pace_of_a_rank) == [slow, slow]


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


def open_log(folder, **options):
    return Log(RunFolder(str(folder), "r"), stream=io.StringIO(), **options)


def test_a_line_goes_to_the_console_and_to_the_file(tmp_path):
    log = open_log(tmp_path / "new" / "logs")
    log.line("one")
    text = tmp_path / "new" / "logs" / "r.txt"
    assert text.read_text() == "one\n"  # at once, not at the end
    log.line("two \u00e9")
    log.close()
    assert log.stream.getvalue() == "one\ntwo \u00e9\n"
    assert text.read_text(encoding="utf-8") == "one\ntwo \u00e9\n"


def test_a_log_without_a_folder_leaves_no_trace(tmp_path, monkeypatch, clock):
    monkeypatch.chdir(tmp_path)
    console = io.StringIO()
    log = Log(None, stream=console)
    log.line("one")
    log.put(a=1)
    show = log.progress("train")
    clock.now += 99
    show(0.5)
    log.close(DataError("an error"))
    assert console.getvalue() == ""
    assert log.record["a"] == 1, "what runs later may read it"
    assert not list(tmp_path.iterdir())


def test_a_run_id_that_was_used_is_a_config_error_unless_it_is_replaced(tmp_path):
    for text in ("kept", "new"):
        log = open_log(tmp_path, replace=text == "new")
        log.line(text)
        log.close()
        with pytest.raises(ConfigError, match=r"RUN_ID=r: File exists; choose others"):
            open_log(tmp_path)
        assert (tmp_path / "r.txt").read_text() == f"{text}\n"


def test_a_log_folder_that_cannot_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="LOG_DIR=.*: (Not a directory|File exists); choose"):
        open_log(tmp_path / "file")


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_under_the_log_is_the_users_error(tmp_path):
    log = open_log(tmp_path)
    log.file.close()
    log.file = FullDisk()
    with pytest.raises(t.UserError, match=r"r\.txt.*No space left on device"):
        log.line("one")


def run_that_fails(folder, error, **facts):
    """A run that opens its log, puts facts, and ends with an error; returns its runtime."""
    cfg = Config(log_dir=str(folder), run_id="r")
    with contextlib.redirect_stdout(io.StringIO()), Runtime(cfg, {}) as runtime:
        runtime.open_run(cfg)
        runtime.log.put(**facts)
        raise error


def test_on_a_full_disk_the_first_error_is_the_one_that_is_reported(tmp_path, monkeypatch):
    def full(path, data):
        raise ArtifactError(f"{path}: could not write")

    log = open_log(tmp_path)
    monkeypatch.setattr(t, "atomic_write", full)
    log.close(DataError("first"))
    assert log.file.closed


def test_facts_add_up_in_the_json_at_once(tmp_path):
    log = open_log(tmp_path)
    log.put(a=1, path=tmp_path)
    log.put(b=[2.5], a=3)
    facts = json.loads((tmp_path / "r.json").read_text())
    assert facts == dict(a=3, path=str(tmp_path), b=[2.5])
    log.close()


def test_an_error_that_ends_the_run_is_noted_in_the_json(tmp_path):
    with pytest.raises(DataError, match="no shards"):
        run_that_fails(tmp_path, DataError("no shards"), a=1)
    facts = json.loads((tmp_path / "r.json").read_text())
    assert facts == dict(a=1, error="DataError: no shards")
    with open(tmp_path / "r.txt", "rb") as stream:
        assert t.lock(stream), "the run has closed its log"


def test_progress_in_a_file_is_a_line_now_and_then_with_the_time_left(tmp_path, clock):
    log = open_log(tmp_path)
    show = log.progress("train")
    for second in range(1, 61):
        clock.now = 100.0 + second
        show(second / 120, f"step:{second}")
    lines = log.stream.getvalue().splitlines()
    assert lines == (tmp_path / "r.txt").read_text().splitlines()
    assert [re.split(r" {2,}| (?=\d+%)", line, maxsplit=1)[1] for line in lines] == [
        "12% time_left:105s step:15",
        "25% time_left:90s step:30",
        "38% time_left:75s step:45",
        "50% time_left:60s step:60",
    ]
    assert all(line.startswith("train ") for line in lines)


def test_progress_without_any_part_done_knows_no_time_left(tmp_path, clock):
    log = open_log(tmp_path)
    show = log.progress("train")
    clock.now += 20
    show(0.0)
    assert log.stream.getvalue() == "train   0% time_left:?\n"


def terminal_log(folder):
    console = io.StringIO()
    console.isatty = lambda: True
    return Log(RunFolder(str(folder), "r"), stream=console)


def test_progress_on_a_terminal_is_one_bar_that_the_next_line_wipes(tmp_path, clock):
    log = terminal_log(tmp_path)
    show = log.progress("train")
    for part in (0.25, 0.5, 0.75):
        clock.now += 1
        show(part)
    show(0.76)  # too soon after the last
    log.line("done")
    wipe = "\r\x1b[K"
    assert log.stream.getvalue().split(wipe)[1:] == [
        "[######                  ] train  25% time_left:3s",
        "[############            ] train  50% time_left:2s",
        "[##################      ] train  75% time_left:1s",
        "done\n",
    ]
    assert (tmp_path / "r.txt").read_text() == "done\n"


def test_a_bar_is_never_wider_than_its_terminal(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    log = terminal_log(tmp_path)
    show = log.progress("train")
    clock.now += 1
    show(0.5, "step:1")
    assert log.stream.getvalue() == "\r\x1b[K[############            ] train  50% t"


# --- the files of a run ---

RESULT = dict(val_bpb=1.25, seed=1337)


def finish_run(folder, cfg, **changes):
    """The files of a run that ended with its result, or as `changes` to its JSON say."""
    log = Log(RunFolder(str(folder), "r"), stream=io.StringIO())
    facts = {name: dict(value=value, source="default") for name, value in cfg.values().items()}
    code = dict(sha256=hashlib.sha256(Path(t.__file__).read_bytes()).hexdigest())
    log.put(**dict(config=facts, code=code, result=RESULT) | changes)
    log.close()
    return log.folder


def test_a_finished_run_of_the_same_settings_and_code_gives_its_result_line(tmp_path):
    cfg = Config(run_id="r", log_dir=str(tmp_path), matrix_lr=0.1 + 0.2)
    assert RunFolder(str(tmp_path), "r").finished(cfg) == ""
    folder = finish_run(tmp_path, cfg)
    assert folder.finished(cfg) == "result val_bpb=1.25 seed=1337"
    assert {path.name for path in tmp_path.iterdir()} == {"r.txt", "r.json"}


def test_a_finished_run_of_other_settings_or_code_is_a_config_error(tmp_path):
    cfg = Config(run_id="r", log_dir=str(tmp_path))
    for number, (then, changes) in enumerate(
        ((dataclasses.replace(cfg, seed=2), {}), (cfg, dict(code=dict(sha256="0" * 64))))
    ):
        folder = finish_run(tmp_path / str(number), then, **changes)
        with pytest.raises(ConfigError) as caught:
            folder.finished(cfg)
        assert str(caught.value) == (
            f"RUN_ID=r: {folder.path('txt')} is a run of other settings or code; "
            "choose another RUN_ID"
        )


@pytest.mark.parametrize("json_text", [None, "", "{", '{"config": {}}'])
def test_an_unfinished_run_is_renamed_with_all_its_files(tmp_path, json_text):
    folder = RunFolder(str(tmp_path), "r")
    files = {"txt": "a line\n", "bin": "weights", "ckpt": "more"}
    files |= {"json": json_text} if json_text is not None else {}
    for suffix, text in files.items():
        folder.path(suffix).write_text(text)
    assert folder.finished(Config()) == ""
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    (aside,) = {name.rsplit(".", 1)[0] for name in left}
    assert re.fullmatch(r"r\.unfinished\d+", aside)
    assert left == {f"{aside}.{suffix}": text for suffix, text in files.items()}


def test_a_run_that_is_still_written_is_left_alone(tmp_path):
    log = open_log(tmp_path)
    with pytest.raises(ConfigError, match=r"RUN_ID=r: .*r\.txt is being written; choose another"):
        log.folder.finished(Config())
    assert [path.name for path in tmp_path.iterdir()] == ["r.txt"]
    log.close()
    assert log.folder.finished(Config()) == "", "it has ended, without a result"


def test_a_run_is_named_by_its_setting_or_else_by_date_time_and_seed(tmp_path, rt):
    with contextlib.redirect_stdout(io.StringIO()) as console:
        for run_id, pattern in (("mine", "mine"), ("", r"\d{8}-\d{6}-seed7")):
            assert rt.open_run(Config(log_dir=str(tmp_path), run_id=run_id, seed=7)) == ""
            assert re.fullmatch(pattern, rt.folder.run_id)
            rt.log.line("opened")
            rt.log.close()
            assert rt.folder.path("txt").read_text() == "opened\n"
    assert console.getvalue() == "opened\n" * 2


def test_a_run_that_was_finished_before_is_not_opened_again(tmp_path, rt):
    cfg = Config(log_dir=str(tmp_path), run_id="r")
    folder = finish_run(tmp_path, cfg)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert rt.open_run(cfg) == folder.finished(cfg) == "result val_bpb=1.25 seed=1337"
    rt.log.line("nothing")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def open_on_a_rank(rt, folder):
    """What a rank sees of a run that opens, of one that is finished, and of one that still runs."""
    seen = []
    with contextlib.redirect_stdout(io.StringIO()) as console:
        for run_id in ("", "r", "busy"):
            try:
                done = rt.open_run(Config(log_dir=folder, run_id=run_id))
            except ConfigError as error:
                done = str(error).split("; ")[-1]
            seen.append((rt.folder.run_id, done))
            rt.log.line(f"rank {rt.rank}")
            rt.log.close()
            rt.log = Log(None)
    return seen, console.getvalue()


def test_every_rank_opens_the_same_run_and_only_rank_0_writes(tmp_path):
    finish_run(tmp_path, Config(log_dir=str(tmp_path), run_id="r"))
    busy = Log(RunFolder(str(tmp_path), "busy"), stream=io.StringIO())
    (seen, spoken), (other, silent) = gloo(2, open_on_a_rank, str(tmp_path))
    busy.close()
    assert seen == other
    (opened, nothing), finished, refused = seen
    assert nothing == ""
    assert (tmp_path / f"{opened}.txt").read_text() == "rank 0\n"
    assert finished == ("r", "result val_bpb=1.25 seed=1337")
    assert refused == ("busy", "choose another RUN_ID")
    assert (spoken, silent) == ("rank 0\n", "")
    assert (tmp_path / "busy.txt").read_text() == ""


# --- ranks ---


def test_shares_are_contiguous_cover_everything_once_and_the_first_is_the_largest():
    for count in range(21):
        for world in range(1, 6):
            env = [dict(RANK=str(rank), WORLD_SIZE=str(world)) for rank in range(world)]
            ranks = [Runtime(Config(), e) for e in env]
            parts = [list(range(count))[runtime.share(count)] for runtime in ranks]
            assert sum(parts, []) == list(range(count))
            assert max(map(len, parts)) == len(parts[0]) == math.ceil(count / world)
            for runtime in ranks:
                named = [list(range(count))[runtime.share(count, rank)] for rank in range(world)]
                assert named == parts


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
        objects=rt.gather_objects({"rank": rank}),
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
        objects=[{"rank": 0}, {"rank": 1}],
        raised=[None, ("DataError", "rank 0"), ("DataError", "rank 1"), ("DataError", "rank 0")],
        own_mistake="KeyError('both')",
    )


def sum_parts_of_a_rank(rt):
    """The sums that this rank gets of three tensors, of two, and of one; each 10 ** rank times."""
    sizes, scale = {(2,): 3, (3, 2): 2, (): 1}, 10**rt.rank
    groups = [[torch.full(s, float(i + 1)) * scale for i in range(n)] for s, n in sizes.items()]
    return [[x.tolist() for x in group] for group in rt.start_sum_parts(groups)()]


def test_a_rank_gets_the_sums_of_its_share_of_each_group():
    assert gloo(2, sum_parts_of_a_rank) == [
        [[[11.0] * 2, [22.0] * 2], [[[11.0] * 2] * 3], [11.0]],
        [[[33.0] * 2], [[[22.0] * 2] * 3], []],
    ]


def test_on_one_rank_every_collective_gives_back_what_it_got(rt):
    with rt:
        tensor = torch.arange(3.0)
        rt.sum_(tensor)
        assert tensor.tolist() == [0, 1, 2]
        assert rt.start_gather(tensor)() is tensor
        assert rt.start_sum_parts([[tensor], []])() == [[tensor], []]
        assert rt.agree_max(1.0, 2.0) == [1.0, 2.0]
        assert rt.from_main("x") == "x"
        assert rt.gather_objects("x") == ["x"]
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


@torch._dynamo.config.patch(recompile_limit=8)
def test_a_module_is_compiled_in_place_and_its_forward_stays_eager(monkeypatch):
    asked = []

    def compile(function, **options):
        asked.append(options)
        return lambda x: function(x) + 100

    monkeypatch.setattr(torch, "compile", compile)
    runtime = Runtime(Config(compile="1"), {})
    module = torch.nn.Identity()
    assert runtime.compile(module) is module
    assert module(torch.ones(2)).tolist() == [101, 101]
    assert module.forward(torch.ones(2)).tolist() == [1, 1]
    assert runtime.compile(torch.neg)(torch.ones(2)).tolist() == [99, 99]
    assert asked == [dict(dynamic=False, fullgraph=True)] * 2


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
