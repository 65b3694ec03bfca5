"""Section 12: the program from the outside, as its users start it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shard

import train_gpt as t

SCRIPT = Path(t.__file__)


def start(env, *, ranks=0, prefix="", timeout=300):
    """Run the program; env on top of a bare environment. Returns the finished process."""
    command = [sys.executable, str(SCRIPT)]
    if ranks:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={ranks}", str(SCRIPT)]
    if prefix:
        command = ["sh", "-c", f'{prefix}; exec "$@"', "sh", *command]
    kept = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
    bare = {name: os.environ[name] for name in kept if name in os.environ}
    bare |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env={**bare, **env}, capture_output=True, text=True, timeout=timeout
    )


def outputs(env, run_id):
    folder = Path(env["LOG_DIR"])
    record = json.loads((folder / f"{run_id}.json").read_text())
    return (folder / f"{run_id}.txt").read_text(), record, (folder / f"{run_id}.bin").read_bytes()


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """One complete tiny run: its environment, output, log, JSON and artifact."""
    import conftest

    folder = tmp_path_factory.mktemp("main")
    env = {
        **conftest.tiny_settings(dataset, folder),
        "RUN_ID": "first",
        "SAVE_CHECKPOINT": "1",
        "ITERATIONS": "30",
        "VAL_LOSS_EVERY": "20",
    }
    done = start(env)
    assert done.returncode == 0, done.stderr
    return env, done, *outputs(env, "first")


NUMBER = r"\d+\.\d{8}"
LINES = [
    r"attention:sdpa \(fa3 cannot be used: .+\) kernels:eager \(the device is not a GPU\)",
    r"artifact: \d+ bytes left beside the code, about \d+ expected",
    r"train_shards: 1 train_tokens: \d+",
    r"model_params:\d+",
    r"warmup_step: 1/1",
    r"layer_loop_warmup_step: 1/1",
    r"1/30 train_loss: \d\.\d{4} train_time: 0\.0m",
    r"5/30 train_loss: \d\.\d{4} train_time: 0\.\dm tok/s: \d+ tflops: \d\.\d{3}",
    r"layer_loop:enabled step:11 frac:0\.367 encoder:\[0, 1, 2, 3, 4, 5, 3, 4\] decoder:\[5, .*\]",
    r"20/30 val_loss: \d\.\d{4} val_bpb: \d\.\d{4}",
    rf"pre-quantization post-ema val_loss:{NUMBER} val_bpb:{NUMBER} eval_time:\d+ms",
    r"GPTQ:collected 67 Hessians in \d+\.\ds",
    r"Serialized model quantized\+brotli: \d+ bytes",
    r"Code size: \d+ bytes",
    r"Total submission size quantized\+brotli: \d+ bytes",
    r"artifact opened: encoder:\[0, 1, 2, 3, 4, 5, 3, 4\] decoder:\[5, .*\]",
    rf"quantized val_loss:{NUMBER} val_bpb:{NUMBER} eval_time:\d+ms",
    rf"quantized_sliding_window val_loss:{NUMBER} val_bpb:{NUMBER} eval_time:\d+ms",
    rf"quantized_ttt val_loss:{NUMBER} val_bpb:{NUMBER} eval_time:\d+ms",
    r"budget training: \d+\.\ds limit: none within",
    r"result val_bpb=\d\.\d+ artifact_bytes=\d+ code_bytes=\d+ total_bytes=\d+"
    r" train_seconds=\d+\.\d eval_seconds=\d+\.\d steps=30 seed=1337",
]


def test_a_run_logs_the_lines_that_users_grep_in_this_order(finished):
    _, done, text, _, _ = finished
    assert done.stdout == text, "console and file say the same"
    lines = iter(text.splitlines())
    for pattern in LINES:
        assert any(re.fullmatch(pattern, line) for line in lines), pattern
    assert text.splitlines()[-1].startswith("result ")


def test_the_json_tells_all_that_a_stranger_needs(finished):
    env, _, text, record, blob = finished
    source = SCRIPT.read_bytes()
    assert record["code"] == {"bytes": len(source), "sha256": t.hashlib.sha256(source).hexdigest()}
    assert record["config"]["model_dim"] == {"value": 32, "source": "environment"}
    assert record["config"]["ema_decay"]["source"] == "smoke"
    assert record["config"]["matrix_bits"] == {"value": 6, "source": "default"}
    assert set(record["config"]) == {s.name for s in t.knobs()}
    assert record["runtime"]["world_size"] == 1
    assert record["runtime"]["torch"]
    assert list(record["stages"]) == [
        "pre-quantization post-ema",
        "quantized",
        "quantized_sliding_window",
        "quantized_ttt",
    ]
    result = record["result"]
    assert result["artifact_bytes"] == len(blob)
    assert result["code_bytes"] == len(source)
    assert result["total_bytes"] == len(blob) + len(source) <= 16_000_000
    assert f"val_bpb={result['val_bpb']}" in text.splitlines()[-1]
    last = record["stages"]["quantized_ttt"]
    bits = last["nats"] / t.math.log(2)
    assert result["val_bpb"] == pytest.approx(bits / last["bytes"], abs=1e-8)
    assert record["ttt"]["complete"] is True
    assert record["artifact"] == dict(bytes=len(blob), sha256=t.hashlib.sha256(blob).hexdigest())
    for name, stage in record["stages"].items():
        ledger = f"{name} ledger: tokens:500 bytes:{stage['bytes']} nats:{stage['nats']:.6f} "
        assert ledger + f"updates:{stage['updates']} order_sha256:" in text
        assert f"ledger_sha256:{stage['ledger_sha256'][:16]}" in text
    orders = {stage["order_sha256"] for stage in record["stages"].values()}
    assert orders == {t.hashlib.sha256(np.arange(500, dtype="<u4").tobytes()).hexdigest()}
    assert sum(group["tensors"] for group in record["storage"]) == 113
    coded = sum(group["entropy_bytes"] for group in record["storage"])
    assert 0.7 * len(blob) < coded < 1.3 * len(blob)
    assert abs(record["budget"]["unbooked_seconds"]) < 0.2, "every second is booked"
    assert record["budget"]["training"]["within"] is True
    phases = record["budget"]["phases"]
    assert {"data", "warm-up", "train", "calibration", "quantization", "compression"} <= set(phases)


def test_a_run_says_whether_its_data_were_verified(finished, tmp_path):
    _, _, text, record, _ = finished
    assert record["data"]["data_verified"] is False
    assert "has no proof of clean data; check it once with python data/verify_dataset.py" in text
    sample = t.data_proof(t.SAMPLE_DIR, t.SAMPLE_DIR / "tokenizer.model", trains=True)
    assert sample["data_verified"] is True
    copy = copy_dataset(t.SAMPLE_DIR, tmp_path / "copy")
    assert t.data_proof(copy, copy / "tokenizer.model", trains=True) == sample
    shard = copy / "fineweb_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    changed = t.data_proof(copy, copy / "tokenizer.model", trains=True)
    assert changed["data_verified"] is False
    assert changed["data_fingerprint"] != sample["data_fingerprint"]
    (copy / "verified.json").write_text("[1]")
    assert t.data_proof(copy, copy / "tokenizer.model", trains=False)["data_verified"] is False


def test_the_artifact_alone_gives_the_same_score_to_the_last_digit(finished, tmp_path):
    env, _, _, record, blob = finished
    lonely = tmp_path / "elsewhere"  # a folder with the validation text and nothing else
    lonely.mkdir()
    source = Path(env["DATA_PATH"])
    for name in ("fineweb_val_000000.bin", "tokenizer.model"):
        (lonely / name).write_bytes((source / name).read_bytes())
    (lonely / "model.bin").write_bytes(blob)
    again = {
        **{k: v for k, v in env.items() if k.startswith(("EVAL_", "TTT_", "VAL_TOK", "MICRO_"))},
        "DATA_PATH": str(lonely),
        "TOKENIZER_PATH": str(lonely / "tokenizer.model"),
        "LOG_DIR": str(tmp_path),
        "RUN_ID": "again",
        "ARTIFACT": str(lonely / "model.bin"),
    }
    done = start(again)
    assert done.returncode == 0, done.stderr
    rescored = json.loads((tmp_path / "again.json").read_text())
    for stage in ("quantized", "quantized_sliding_window", "quantized_ttt"):
        assert rescored["stages"][stage] == record["stages"][stage]
    assert rescored["result"]["artifact_bytes"] == len(blob)
    assert not (tmp_path / "again.bin").exists()


def test_a_run_limited_by_steps_repeats_to_the_byte_with_and_without_warm_up(finished):
    env, _, _, record, blob = finished
    for run_id, warmup_steps in (("second", "1"), ("cold", "0")):
        again = {**env, "RUN_ID": run_id, "WARMUP_STEPS": warmup_steps}
        assert start(again).returncode == 0
        _, repeated, same = outputs(env, run_id)
        assert same == blob
        assert repeated["stages"] == record["stages"]


def test_a_checkpoint_is_quantized_and_scored_as_the_run_that_saved_it(finished):
    env, _, _, record, _ = finished
    checkpoint = str(Path(env["LOG_DIR"]) / "first.ckpt")
    done = start({**env, "RUN_ID": "resumed", "CHECKPOINT": checkpoint, "SAVE_CHECKPOINT": "0"})
    assert done.returncode == 0, done.stderr
    text, resumed, _ = outputs(env, "resumed")
    name = "pre-quantization post-ema"
    assert resumed["stages"][name] == record["stages"][name]
    # Calibration begins with other windows, so the codes differ a little.
    assert resumed["result"]["val_bpb"] == pytest.approx(record["result"]["val_bpb"], abs=0.02)
    assert "warmup_step: " not in text


def test_two_gloo_ranks_score_as_one(finished):
    env, _, _, record, blob = finished
    done = start({**env, "RUN_ID": "pair"}, ranks=2)
    assert done.returncode == 0, done.stderr
    text, pair, _ = outputs(env, "pair")
    assert pair["runtime"]["world_size"] == 2
    assert text.count("result val_bpb=") == 1
    assert pair["curve"][0]["train_loss"] == pytest.approx(
        record["curve"][0]["train_loss"], abs=1e-5
    )
    for name, stage in record["stages"].items():
        assert pair["stages"][name]["val_bpb"] == pytest.approx(stage["val_bpb"], abs=3e-3), name
        for fact in ("bytes", "tokens", "order_sha256", "ledger_sha256"):
            assert pair["stages"][name][fact] == stage[fact]


def test_an_artifact_scores_alike_on_one_rank_and_on_three(finished):
    env, _, _, record, _ = finished
    artifact = str(Path(env["LOG_DIR"]) / "first.bin")
    done = start({**env, "RUN_ID": "three", "ARTIFACT": artifact}, ranks=3)
    assert done.returncode == 0, done.stderr
    three = json.loads((Path(env["LOG_DIR"]) / "three.json").read_text())
    for name in ("quantized", "quantized_sliding_window", "quantized_ttt"):
        expected = dict(record["stages"][name])
        found = dict(three["stages"][name])
        if name == "quantized_ttt":  # gradients summed over ranks round differently
            assert found.pop("val_bpb") == pytest.approx(expected.pop("val_bpb"), abs=1e-5)
            for rounded in ("val_loss", "nats", "losses_sha256"):
                del found[rounded], expected[rounded]
        assert found == expected, "to the last bit"


def copy_dataset(dataset, folder):
    folder.mkdir()
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def break_magic(folder):
    write_shard(folder / "fineweb_train_000000.bin", [5] * 5000, magic=1)


def break_size(folder):
    write_shard(folder / "fineweb_train_000000.bin", [5] * 5000, count=6000)


def break_train_ids(folder):
    write_shard(folder / "fineweb_train_000000.bin", [5000] * 5000)


def break_val_ids(folder):
    write_shard(folder / "fineweb_val_000000.bin", [1] + [5000] * 5000)


def break_missing(folder):
    (folder / "fineweb_train_000000.bin").unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(b"no tokenizer")


FAULTS = [
    (break_magic, "not a token shard"),
    (break_size, "header promises 6,000 tokens, file holds 5,000"),
    (break_train_ids, "token id 5000, expected ids below VOCAB_SIZE=384"),
    (break_val_ids, "token id 5000, expected ids below VOCAB_SIZE=384"),
    (break_missing, "no fineweb_train_*.bin there"),
    (break_tokenizer, "not a SentencePiece model"),
]


@pytest.mark.parametrize(("fault", "sentence"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_bad_data_is_one_clear_line_and_exit_2(dataset, tiny_env, tmp_path, fault, sentence):
    fault(folder := copy_dataset(dataset, tmp_path / "broken"))
    env = {**tiny_env, "DATA_PATH": str(folder), "RUN_ID": "x"}
    env["TOKENIZER_PATH"] = str(folder / "tokenizer.model")
    done = start(env)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stdout + done.stderr
    left = {path.name for path in Path(env["LOG_DIR"]).iterdir()}
    assert left == {"x.txt", "x.json"}, "nothing half-written"
    assert sentence in json.loads((Path(env["LOG_DIR"]) / "x.json").read_text())["error"]


@pytest.mark.parametrize("fault", [break_magic, break_train_ids])
def test_all_ranks_are_gone_soon_after_bad_data(dataset, tiny_env, tmp_path, fault):
    fault(folder := copy_dataset(dataset, tmp_path / "broken"))
    started = time.monotonic()
    done = start({**tiny_env, "DATA_PATH": str(folder), "RUN_ID": "x"}, ranks=2, timeout=60)
    assert done.returncode != 0
    assert time.monotonic() - started < 45
    assert re.search(r"exitcode\s*: 2", done.stderr)
    assert 1 <= done.stderr.count("DataError: ") <= 2, "whoever knows speaks, once"
    assert "Traceback (most" not in done.stdout


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(tiny_env):
    # 30 kB hold the log and the JSON, but not the artifact.
    done = start({**tiny_env, "RUN_ID": "full"}, prefix="ulimit -f 60")
    assert done.returncode == 2, done.stderr
    assert re.search(r"full.bin: could not write [\d,]+ bytes: File too large; free", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    left = {path.name for path in Path(tiny_env["LOG_DIR"]).iterdir()}
    assert left == {"full.txt", "full.json"}


def test_a_loss_that_explodes_ends_the_run_with_exit_2_on_all_ranks(tiny_env):
    env = {**tiny_env, "RUN_ID": "nan", "SCALAR_LR": "1e38", "WARMUP_STEPS": "0"}
    done = start({**env, "ITERATIONS": "50"}, ranks=2)
    assert re.search(r"exitcode\s*: 2", done.stderr)
    assert "the training loss is not finite; last finite loss" in done.stderr
    assert not (Path(env["LOG_DIR"]) / "nan.bin").exists()


def test_another_tokenizer_than_the_artifacts_is_refused(finished, tmp_path):
    from conftest import train_tokenizer

    env = finished[0]
    other = train_tokenizer(tmp_path / "other.model", ["quite other text " * 50] * 40 + ["xyz"])
    artifact = str(Path(env["LOG_DIR"]) / "first.bin")
    done = start({**env, "RUN_ID": "o", "ARTIFACT": artifact, "TOKENIZER_PATH": str(other)})
    assert done.returncode == 2
    assert "trained with another tokenizer" in done.stderr or "pieces, expected" in done.stderr


def test_an_argument_is_refused_with_a_hint(capsys):
    assert t.main(["--seed=3"], {}) == 2
    assert "settings are environment variables; see --help" in capsys.readouterr().err


def test_help_works_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "MATRIX_CLIP_SIGMAS" in done.stdout


def test_a_tight_limit_and_another_compressor_change_the_artifact_and_not_the_pipeline(finished):
    env, _, _, record, blob = finished
    changes = {"RUN_ID": "tight", "COMPRESSOR": "zstd", "EMA_DECAY": "0.5", "TTT_MOMENTUM": "0.5"}
    limit = t.code_bytes() + int(0.6 * len(blob))
    done = start({**env, **changes, "ARTIFACT_LIMIT_BYTES": f"{limit}"})
    assert done.returncode == 0, done.stderr
    text, tight, smaller = outputs(env, "tight")
    tried = re.findall(r"artifact: (\d+) bytes with ranges x ([\d.]+), limit (\d+)", text)
    assert tried[0][1] == "1.0000"
    assert int(tried[0][0]) > int(tried[0][2]) == limit - t.code_bytes()
    assert float(tried[-1][1]) > 1
    assert tight["result"]["total_bytes"] >= 0.999 * limit, "at most 0.1 % is left unused"
    assert f"Total submission size quantized+zstd: {tight['result']['total_bytes']} bytes" in text
    assert tight["result"]["total_bytes"] == t.code_bytes() + len(smaller) <= limit
    assert tight["result"]["val_bpb"] < 1.2 * record["result"]["val_bpb"]


def test_a_limit_that_the_code_alone_breaks_is_refused_before_training(tiny_env):
    done = start({**tiny_env, "ARTIFACT_LIMIT_BYTES": "1000"})
    assert done.returncode == 2
    assert (
        f"ARTIFACT_LIMIT_BYTES=1000: expected more than the code's own {t.code_bytes()}"
        in done.stderr
    )


def test_a_finished_run_is_skipped_and_never_overwritten(finished):
    env, _, text, _, blob = finished
    done = start(env)
    assert done.returncode == 0
    assert done.stdout == f"first: finished before: {text.splitlines()[-1]}\n"
    done = start({**env, "SEED": "2"})
    assert done.returncode == 2
    assert "RUN_ID=first: " in done.stderr
    assert "is a run of other settings or code; choose another RUN_ID" in done.stderr
    assert outputs(env, "first")[2] == blob


def test_a_run_that_still_runs_is_left_alone(tiny_env, tiny_cfg):
    folder = t.RunFolder(tiny_env["LOG_DIR"], "busy")
    log = t.Log(folder)
    done = start({**tiny_env, "RUN_ID": "busy"})
    assert done.returncode == 2
    assert "busy.txt is being written; choose another RUN_ID" in done.stderr
    log.close()
    assert folder.finished(tiny_cfg) == "", "over now, and unfinished"
    (left,) = Path(tiny_env["LOG_DIR"]).iterdir()
    assert re.fullmatch(r"busy\.unfinished\d+\.txt", left.name)


def test_the_readmes_sweep_of_seeds_survives_a_failed_seed_and_can_be_restarted(tiny_env, tmp_path):
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    loop = re.search(r"^    (for seed in .*done)$", readme, flags=re.M)[1]
    loop = loop.replace("torchrun --standalone --nproc_per_node=8 train_gpt.py", "sh one.sh")
    python = f"exec {sys.executable} {SCRIPT}"
    (tmp_path / "one.sh").write_text(
        f"if [ $SEED = 314 ] && [ ! -e mended ]; then export MATRIX_LR=x; fi\n{python}\n"
    )
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = {**kept, **tiny_env, "OMP_NUM_THREADS": "1", "TTT_ENABLED": "0", "ITERATIONS": "2"}

    def sweep():
        return subprocess.run(
            ["sh", "-c", loop], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    first = sweep()
    results = re.findall(r"^result val_bpb=.* seed=(\d+)$", first.stdout, flags=re.M)
    assert results == ["42", "999"]
    assert "MATRIX_LR=x: expected a number" in first.stderr
    folder = Path(tiny_env["LOG_DIR"])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "mended").touch()
    second = sweep()
    assert re.findall(r"^mine-(\d+): finished before: result", second.stdout, flags=re.M) == [
        "42",
        "999",
    ]
    assert re.findall(r"^result .* seed=(\d+)$", second.stdout, flags=re.M) == ["314"]
    assert all(path.read_bytes() == data for path, data in before.items())


def test_bfloat16_and_plain_attention_score_close_to_float32(finished):
    env, _, _, record, _ = finished
    artifact = str(Path(env["LOG_DIR"]) / "first.bin")
    for run_id, changes in (
        ("bf16", {"COMPUTE_DTYPE": "bfloat16", "TTT_ENABLED": "0"}),
        ("plain", {"ATTENTION": "plain", "TTT_ENABLED": "0"}),
        ("no", {"TTT_ENABLED": "0", "SLIDING_WINDOW_ENABLED": "0"}),
    ):
        done = start({**env, "RUN_ID": run_id, "ARTIFACT": artifact, **changes})
        assert done.returncode == 0, done.stderr
        other = json.loads((Path(env["LOG_DIR"]) / f"{run_id}.json").read_text())
        stage = "quantized" if run_id == "no" else "quantized_sliding_window"
        expected = record["stages"][stage]["val_bpb"]
        assert other["result"]["val_bpb"] == pytest.approx(expected, abs=2e-2)
