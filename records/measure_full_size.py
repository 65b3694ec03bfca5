#!/usr/bin/env python3
"""Train the full-size model on one GPU for some minutes, score it, and write down what was seen.

    python records/measure_full_size.py --data FOLDER --out records/track_non_record_16mb/NAME

FOLDER holds SP8192 shards and `tokenizer.model`, as `data/build_dataset.py --vocab-size 8192`
writes them. OUT gets the raw log, the JSON, and a README.md made from that JSON and nothing else:
the loss at the start and early on, ms per step in both depth plans, tokens per second, peak memory,
quantization tax and bytes, beside the published figures of system #1493.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Logged by system #1493 on 8xH100 (its pull request; other validation text, other hardware).
PUBLISHED = {
    "loss at step 1 (ln 8192 = 9.011)": "9.009",
    "loss at step 2": "12.4 to 12.9",
    "loss at step 5": "about 8",
    "loss at step 500": "3.33",
    "loss at step 1000": "3.19",
    "ms per step, 11 visits": "102.0 on 8 GPUs",
    "ms per step, 17 visits": "150.5 on 8 GPUs",
    "tokens per second": "7.71 M, then 5.21 M on 8 GPUs",
    "peak memory [MiB]": "39.0 GB on each GPU",
    "quantization tax [bpb]": "0.0118",
    "sliding minus plain [bpb]": "-0.0167",
    "artifact [bytes]": "15,975,300 (seed 42)",
    "code [bytes]": "16,630 (seed 42)",
    "total [bytes], limit 16,000,000": "15,991,930 (seed 42)",
}


def settings(args: argparse.Namespace) -> dict[str, str]:
    """The environment of the run: the defaults of train_gpt.py, on one GPU and a slice of text."""
    values = {
        "DATA_PATH": str(args.data.resolve()),
        "TOKENIZER_PATH": str(args.data.resolve() / "tokenizer.model"),
        "LOG_DIR": str(args.out.resolve()),
        "RUN_ID": f"seed{args.seed}",
        "SEED": str(args.seed),
        "MAX_WALLCLOCK_SECONDS": str(args.seconds),
        "GPTQ_RESERVE_SECONDS": str(args.reserve),
        "VAL_TOKENS": str(args.val_tokens),
        "VAL_LOSS_EVERY": "0",
        "TRAIN_LOG_EVERY": "25",
        "TTT_ENABLED": "0",
    }
    return values | dict(pair.split("=", 1) for pair in args.set)


def findings(record: dict) -> dict[str, str]:
    """What the JSON of a run says, under the names of PUBLISHED; only what was logged."""
    curve = {entry["step"]: entry for entry in record["curve"]}
    stages, result = record["stages"], record["result"]
    bpb = {name: stage["val_bpb"] for name, stage in stages.items()}
    found = {f"loss at step {n}": f"{curve[n]['train_loss']:.4f}" for n in sorted(curve)}
    found["loss at step 1 (ln 8192 = 9.011)"] = found.pop("loss at step 1")
    for key, value in record["step_ms"].items():
        found[f"ms per step, {key.split('_')[0]} visits"] = f"{value:.1f}"
    last, batch = record["curve"][-1], record["config"]["train_batch_tokens"]["value"]
    speed = (last["step"] - 1) * batch / last["train_seconds"]
    found["tokens per second"] = f"{speed:,.0f} over the whole run"
    if "peak_memory_bytes" in record:
        found["peak memory [MiB]"] = f"{record['peak_memory_bytes'] >> 20:,}"
    tax = bpb["quantized"] - bpb["pre-quantization post-ema"]
    found["quantization tax [bpb]"] = f"{tax:.4f}"
    sliding = bpb["quantized_sliding_window"] - bpb["quantized"]
    found["sliding minus plain [bpb]"] = f"{sliding:.4f}"
    for name in ("artifact", "code"):
        found[f"{name} [bytes]"] = f"{result[f'{name}_bytes']:,}"
    found["total [bytes], limit 16,000,000"] = f"{result['total_bytes']:,}"
    return found


def readme(record: dict, environment: dict[str, str]) -> str:
    """The README of the folder."""
    runtime, stages = record["runtime"], record["stages"]
    places = ("DATA_PATH", "TOKENIZER_PATH", "LOG_DIR")
    command = " ".join(f"{k}={v}" for k, v in environment.items() if k not in places)
    found = findings(record)
    rows = [f"| {name} | {value} | {PUBLISHED.get(name, '')} |" for name, value in found.items()]
    scores = [
        f"| {name} | {s['val_loss']:.5f} | {s['val_bpb']:.5f} |" for name, s in stages.items()
    ]
    data = record["data"]
    return "\n".join(
        [
            "# The full-size model of system #1493 on one GPU",
            "",
            "A check of the program, not a record: minutes of training on one device, scored on "
            f"{data['val_tokens']:,} targets ({data['val_bytes']:,} bytes) of text that is not the "
            "challenge's validation set. The scores compare with each other alone.",
            "",
            f"n = 1. {runtime['device']}, torch {runtime['torch']}, "
            f"{record['result']['steps']} steps in {record['result']['train_seconds']} s. "
            f"Log: `{record['run_id']}.txt`, facts: `{record['run_id']}.json`; this page is made "
            "from the latter.",
            "",
            f"    {command} python train_gpt.py",
            "",
            "| figure | here | published (system #1493) |",
            "| --- | --: | --: |",
            *rows,
            "",
            "| stage | nats per token | bits per byte |",
            "| --- | --: | --: |",
            *scores,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="shards and tokenizer.model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seconds", type=float, default=300.0, help="training and calibration")
    parser.add_argument("--reserve", type=float, default=20.0, help="of them, for calibration")
    parser.add_argument("--val-tokens", type=int, default=2_000_000, help="targets to score")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = settings(args)
    status = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")], env={**os.environ, **environment}
    ).returncode
    if status == 0:
        record = json.loads((args.out / f"seed{args.seed}.json").read_text())
        page = readme(record, environment)
        (args.out / "README.md").write_text(page, encoding="utf-8")
        shutil.copy(ROOT / "train_gpt.py", args.out)
        print(page)
    return status


if __name__ == "__main__":
    sys.exit(main())
