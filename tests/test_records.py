"""records/: the measuring script, tried at a scale that needs no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import train_gpt as t

ROOT = Path(t.__file__).parent


def test_the_full_size_measurement_writes_a_page_from_its_own_log(dataset, tiny_env, tmp_path):
    small = {**tiny_env, "ITERATIONS": "26", "TRAIN_LOG_EVERY": "5", "TTT_ENABLED": "0"}
    own = ("DATA_PATH", "TOKENIZER_PATH", "LOG_DIR", "RUN_ID")
    sets = [f"--set={name}={value}" for name, value in small.items() if name not in own]
    command = [sys.executable, str(ROOT / "records" / "measure_full_size.py")]
    command += ["--data", str(dataset), "--out", str(tmp_path / "out"), "--seed", "7"]
    done = subprocess.run([*command, *sets], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "seed7.json").read_text())
    first = next(entry for entry in record["curve"] if entry["step"] == 1)
    assert f"| loss at step 1 (ln 8192 = 9.011) | {first['train_loss']:.4f} | 9.009 |" in page
    assert f"{record['step_ms']['11_visits']:.1f} | 102.0 on 8 GPUs" in page
    assert f"{record['step_ms']['17_visits']:.1f} | 150.5 on 8 GPUs" in page
    stages = record["stages"]
    tax = stages["quantized"]["val_bpb"] - stages["pre-quantization post-ema"]["val_bpb"]
    assert f"| quantization tax [bpb] | {tax:.4f} | 0.0118 |" in page
    total = len((tmp_path / "out" / "seed7.bin").read_bytes()) + t.code_bytes()
    assert f"| total [bytes], limit 16,000,000 | {total:,} |" in page
    assert (tmp_path / "out" / "train_gpt.py").read_bytes() == Path(t.__file__).read_bytes()


def test_a_measurement_that_fails_passes_its_exit_status_on(tmp_path):
    command = [sys.executable, str(ROOT / "records" / "measure_full_size.py")]
    command += ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "tokenizer.model" in done.stderr
    assert not (tmp_path / "out" / "README.md").exists()
