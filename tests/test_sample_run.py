"""The first command of the README, whole: minutes, so it has a file of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import train_gpt as t

STEPS = 400  # a clock would make the score depend on what else the machine does


def test_the_program_alone_learns_the_sample_in_minutes_and_beats_xz_and_brotli(tmp_path):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    env = {**kept, "CUDA_VISIBLE_DEVICES": "", "LOG_DIR": str(tmp_path), "RUN_ID": "sample"}
    env |= {"OMP_NUM_THREADS": "1", "ITERATIONS": str(STEPS), "MAX_WALLCLOCK_SECONDS": "400"}
    env |= {"VAL_TOKENS": "40000"}  # a third of the text
    done = subprocess.run(
        [sys.executable, t.__file__], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("smoke: small run on the sample")
    assert lines[-1].startswith("result val_bpb=")
    record = json.loads((tmp_path / "sample.json").read_text())
    assert record["data"]["data_verified"] is True
    assert record["result"]["steps"] == STEPS
    for stage, seconds in record["ledger_seconds"].items():  # longest in the longest stage
        phase = stage if stage in record["budget"]["phases"] else "diagnostic"
        assert seconds < 0.01 * record["budget"]["phases"][phase]
    assert "GPTQ:reserving" in done.stdout
    assert "layer_loop:enabled" in done.stdout
    pipeline = ["quantized", "quantized_sliding_window", "quantized_ttt"]
    assert list(record["stages"]) == ["pre-quantization post-ema", *pipeline]
    baselines = record["baselines"]
    assert set(baselines) == {"xz-9e", "brotli-11"}
    for name, bpb in baselines.items():
        assert f"baseline {name} val_bpb:{bpb:.4f}" in done.stdout
        for stage in pipeline:
            assert record["stages"][stage]["val_bpb"] < bpb - 0.02, (stage, name)
    sample = Path(t.SAMPLE_DIR)
    assert sum(path.stat().st_size for path in sample.iterdir()) < 12_000_000
