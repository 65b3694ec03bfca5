"""The three systems of records/track_10min_16mb: their commands, and what each command builds."""

import json
import math
import re
import shlex
import subprocess
from pathlib import Path

import conftest
import pytest
import torch
from test_main import start

import train_gpt as t

FOLDER = Path(t.__file__).parent / "records" / "track_10min_16mb"
COMMANDS = {
    "578": FOLDER / "2026-03-23_System578" / "command.sh",
    "1487": FOLDER / "2026-04-09_System1487" / "command.sh",
    "1487 legal": FOLDER / "2026-04-09_System1487" / "command_legal.sh",
    "1493": FOLDER / "2026-04-09_System1493" / "command.sh",
}
HEADINGS = [
    "What it is",
    "Command",
    "Differences from the published code",
    "Published figures",
    "What we ran",
]
systems = pytest.mark.parametrize("system", COMMANDS)


def exports(system):
    """The variables that a command sets; a line that is neither export nor comment is an error."""
    found = {}
    for line in COMMANDS[system].read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            word, assignment = shlex.split(line)
            assert word == "export", line
            name, _, value = assignment.partition("=")
            assert name not in found, f"{name} is set twice"
            found[name] = value
    return found


def config(system, **changes):
    return t.Config.from_env({**exports(system), **changes}, cuda=True)


NARROW = dict(MODEL_DIM="64", VOCAB_SIZE="96", NUM_HEADS="8", BIGRAM_VOCAB_SIZE="40")
NARROW |= dict(BIGRAM_DIM="16", VE_DIM="24", ROPE_DIMS="4")


def narrow(system):
    """The system's configuration with small matrices: its options stay as they are."""
    kept = exports(system)
    sizes = {name: v for name, v in NARROW.items() if name in kept or name[:2] not in ("BI", "VE")}
    return config(system, **sizes)


# --- the commands ---


@systems
def test_a_command_sets_only_what_differs_from_the_defaults(system):
    cfg, settings = config(system), {s.name.upper(): s for s in t.knobs()}
    assert not cfg.warnings
    for name in exports(system):
        assert name in settings, f"{name} is not a setting"
        assert getattr(cfg, name.lower()) != settings[name].default, f"{name} is the default"
    # The defaults measure what this system set: the time of calibration, and how tight ranges fit.
    measured = {"GPTQ_RESERVE_SECONDS": "12", "FIT_RULE": "wider"}
    assert (exports(system) == measured) == (system == "1493")


@systems
def test_a_shell_that_sources_a_command_has_its_variables_and_the_program_to_start(system):
    path = COMMANDS[system]
    script = '. "$0" && env'
    done = subprocess.run(["sh", "-c", script, path], env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert {n: v for n, v in seen.items() if n not in ("PWD", "SHLVL", "_")} == exports(system)
    last = path.read_text(encoding="utf-8").splitlines()[-1]
    assert last == "# torchrun --standalone --nproc_per_node=8 train_gpt.py"


def test_the_legal_variant_differs_by_the_illegal_step_alone():
    published, legal = exports("1487"), exports("1487 legal")
    assert published.items() - legal.items() == {("PREQUANT_TTT_EPOCHS", "10")}
    assert legal.items() <= published.items()
    assert config("1487").prequant_ttt_epochs == 10
    assert not any(config(s).prequant_ttt_epochs for s in COMMANDS if s != "1487")


@pytest.mark.parametrize("folder", sorted({path.parent for path in COMMANDS.values()}))
def test_every_page_has_the_fixed_headings_and_sources_its_command(folder):
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", page, flags=re.M) == HEADINGS
    assert f". {folder.relative_to(FOLDER.parent.parent)}/command.sh" in page
    published = page.partition("## Published figures")[2]
    assert (
        f"ull request #{folder.name.partition('System')[2]} of openai/parameter-golf" in published
    )


# --- size and wiring ---

PARAMETERS = {"578": 26_993_756, "1487": 37_022_812, "1487 legal": 37_022_812, "1493": 35_944_536}


@systems
def test_a_system_has_the_published_number_of_parameters(system):
    with torch.device("meta"):
        model = t.GPT(config(system))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[system]


PLAIN = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]
ONCE = [0, 1, 2, 3, 4, 5, 3], [4, 5, 6, 7, 8, 9, 10]
TWICE = [0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10]
FIVE = [0, 1, 2, 3, 4]
WIRING = {  # layers and skips of the decoder, before and after recurrence starts; the late form
    "578": ((PLAIN, [*FIVE, -1]), (PLAIN, [*FIVE, -1]), "sequential"),
    "1487": ((PLAIN, [*FIVE, -1]), (ONCE, [*FIVE, -1, -1]), "lanes"),
    "1493": ((PLAIN, [*FIVE, -1]), (TWICE, [*range(8), -1]), "gptj"),
}
WIRING["1487 legal"] = WIRING["1487"]


@systems
def test_a_system_visits_layers_and_mixes_skips_in_the_published_order(system):
    *expected, form = WIRING[system]
    for looped, (order, pops) in enumerate(expected):
        plan = t.depth_plan(config(system), looped=bool(looped))
        half = len(order[0])
        assert (plan.encoder, plan.decoder) == order
        assert [v.pop for v in plan.visits] == [-1] * half + pops
        assert [v.push for v in plan.visits] == [i < half for i in range(len(plan.visits))]
        late = [v.layer >= 7 and form != "sequential" for v in plan.visits]
        assert [v.form for v in plan.visits] == [form if x else "sequential" for x in late]


# --- inventory: shape, init, optimizer, stored kind ---


def block_rows(hidden, q_gain):
    rows = {
        "attn.q.weight": ((512, 512), ("orthogonal", 1.0), "matrix", "int6"),
        "attn.k.weight": ((256, 512), ("orthogonal", 1.0), "matrix", "int6"),
        "attn.v.weight": ((256, 512), ("orthogonal", 1.0), "matrix", "int6"),
        "attn.out.weight": ((512, 512), 0.0, "matrix", "int6"),
        "mlp.up.weight": ((hidden, 512), ("orthogonal", 1.0), "matrix", "int6"),
        "mlp.down.weight": ((512, hidden), 0.0, "matrix", "int6"),
        "attn.q_gain": ((8,), q_gain, "scalar", "float16"),
        "attn_scale": ((512,), 1.0, "scalar", "float16"),
        "mlp_scale": ((512,), 1.0, "scalar", "float16"),
        "resid_mix": ((2, 512), "ones and zeros", "scalar", "float16"),
    }
    return {f"blocks.{i}.{name}": row for i in range(11) for name, row in rows.items()}


def value_rows(vocab_size, gain):
    return {
        "value_embedding.table": ((vocab_size, 128), ("normal", 0.01), "embedding", "int8"),
        "value_embedding.proj.weight": ((256, 128), ("orthogonal", gain), "matrix", "float16"),
        "value_embedding.scale": ((), 0.1, "scalar", "float16"),
        "value_embedding.layer_scales": ((2,), 1.0, "scalar", "float16"),
    }


def gated_rows(count):
    return {
        "head.weight": ((8192, 512), ("normal", 0.005), "embedding", "int8"),
        "skip_weights": ((count, 512), 1.0, "scalar", "float16"),
        "skip_gates": ((count, 512), 0.0, "scalar", "float16"),
    }


INVENTORY = {
    "578": {
        **block_rows(1536, 1.5),
        **value_rows(1024, 22**-0.5),
        "head.weight": ((1024, 512), ("normal", 0.005), "embedding", "int8"),
        "bigram.table": ((2048, 128), 0.0, "embedding", "int8"),
        "bigram.proj.weight": ((512, 128), ("orthogonal", 22**-0.5), "matrix", "float16"),
        "bigram.scale": ((), 0.05, "scalar", "float16"),
        "smear_gate": ((512,), 0.0, "scalar", "float16"),
        "skip_weights": ((5, 512), 1.0, "scalar", "float16"),
    },
    "1487": {
        **block_rows(2048, 5.25),
        **value_rows(8192, 1.0),
        **gated_rows(5),
        "lane_merge": ((), 0.5, "scalar", "float16"),
    },
    "1493": {**block_rows(2048, 5.25), **gated_rows(8)},
}
INVENTORY["1487 legal"] = INVENTORY["1487"]


@systems
def test_every_tensor_has_the_published_shape_and_optimizer(system):
    with torch.device("meta"):
        model = t.GPT(config(system))
    found = {n: (tuple(p.shape), model.rows[n].group) for n, p in model.named_parameters()}
    assert found == {n: (shape, group) for n, (shape, _, group, _) in INVENTORY[system].items()}


def check_init(name, weight, init):
    if isinstance(init, tuple) and init[0] == "orthogonal":
        gram = weight.T @ weight if weight.shape[0] > weight.shape[1] else weight @ weight.T
        torch.testing.assert_close(gram, init[1] ** 2 * torch.eye(len(gram)), rtol=0, atol=1e-4)
    elif isinstance(init, tuple):
        assert weight.std().item() == pytest.approx(init[1], rel=0.1), name
        assert weight.mean().abs() < 0.1 * init[1], name
    else:
        expected = torch.full_like(weight, 0.0 if init == "ones and zeros" else init)
        if init == "ones and zeros":
            expected[0] = 1.0
        assert torch.equal(weight, expected), name


@systems
def test_every_tensor_begins_and_is_stored_as_published(system, rt):
    model = t.GPT(narrow(system))
    model.init_weights(0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    hessians = {name: torch.eye(w.shape[1]) for name, w in weights.items() if w.ndim == 2}
    stored = t.quantize_model(model, hessians, rt)
    assert set(stored) == set(INVENTORY[system])
    for name, (_, init, _, kind) in INVENTORY[system].items():
        check_init(name, weights[name], init)
        assert stored[name].kind == kind, name


@pytest.mark.parametrize(
    ("system", "matrices", "embedding"),
    [("578", "ascending", ""), ("1487", "descending", ""), ("1493", "descending", "descending")],
)
def test_a_system_quantizes_by_the_published_rules(system, matrices, embedding):
    cfg = config(system)
    table = t.tensor_table(cfg)
    for name, gptq in (("blocks.3.mlp.up.weight", matrices), ("head.weight", embedding)):
        store = t.find_row(name, table).store
        assert (store.bits, store.gptq) == (6 if "mlp" in name else 8, gptq)
        if system == "578":
            few = (0.999, 0.9995, 0.9999, 0.99999, 1.0) if "mlp" in name else (0.9999984,)
            assert store.percentiles == few
        else:
            assert not store.percentiles
            assert store.clip_sigmas == (12.85 if "mlp" in name else 20.0)
    assert cfg.compressor == ("zstd" if system == "578" else "brotli")


HYPERPARAMETERS = {  # Muon: lr, decay, rows normalised; embedding: lr, decay; scalars: lr, decay
    "578": ((0.025, 0.04, False), (0.035, 0.04), (0.025, 0.04)),
    "1487": ((0.022, 0.095, True), (0.03, 0.095), (0.02, 0.02)),
    "1493": ((0.022, 0.095, True), (0.03, 0.085), (0.02, 0.02)),
}


@pytest.mark.parametrize("system", HYPERPARAMETERS)
def test_the_optimizers_have_the_published_hyperparameters(system, rt):
    cfg = narrow(system)
    model = t.GPT(cfg)
    optimizers = t.make_optimizers(model, cfg, rt)
    rates = t.set_schedule(optimizers, 10_000, 0.0, cfg)
    muon, embedding, scalar = (optimizers[n] for n in ("matrix", "embedding", "scalar"))
    (lr, decay, normalised), *adams = HYPERPARAMETERS[system]
    assert (muon.param_groups[0]["weight_decay"], muon.cfg.muon_row_normalize) == (
        decay,
        normalised,
    )
    assert (muon.param_groups[0]["momentum"], muon.cfg.muon_backend_steps) == (0.99, 5)
    assert t.muon_momentum(750, cfg) == pytest.approx(0.955)
    assert list(rates.values()) == [lr, adams[0][0], adams[1][0]]
    for optimizer, (adam_lr, adam_decay) in zip((embedding, scalar), adams, strict=True):
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (adam_lr, adam_decay)
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)
    held = [p for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    assert len(held) == len(set(map(id, held))) == len(list(model.parameters()))


# --- a complete tiny run of each ---

TINY = {
    "ITERATIONS": "40",
    "TRAIN_LOG_EVERY": "10",
    "RUN_ID": "tiny",
    "ENABLE_LOOPING_AT_STEP": "15",
    "WARMDOWN_ITERS": "30",
    "BIGRAM_VOCAB_SIZE": "64",
    "BIGRAM_DIM": "8",
    "VE_DIM": "8",
    "ROPE_TRAIN_SEQ_LEN": "16",
    "GPTQ_RESERVE_SECONDS": "0",
    "PREQUANT_TTT_EPOCHS": "2",
    "TTT_TRAIN_CHUNKS": "2",
}
ALWAYS = {"ITERATIONS", "TRAIN_LOG_EVERY", "RUN_ID"}


def tiny_run(system, dataset, folder):
    """The system's command at a tiny scale; sizes of options that it leaves off stay off."""
    command = exports(system)
    sizes = {name: value for name, value in TINY.items() if name in ALWAYS | set(command)}
    if "BIGRAM_VOCAB_SIZE" in command:
        sizes["BIGRAM_DIM"] = TINY["BIGRAM_DIM"]
    env = {**command, **conftest.tiny_settings(dataset, folder), **sizes}
    done = start(env)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "logs" / "tiny.json").read_text())
    return env, done.stdout, record, (folder / "logs" / "tiny.bin").read_bytes()


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """A run of each system, made when it is first asked for."""
    made = {}

    def get(system):
        if system not in made:
            made[system] = tiny_run(system, dataset, tmp_path_factory.mktemp("system"))
        return made[system]

    return get


@systems
def test_a_tiny_run_learns_and_ends_with_a_score(system, runs):
    env, text, record, blob = runs(system)
    losses = [point["train_loss"] for point in record["curve"]]
    assert losses[0] == pytest.approx(math.log(384), abs=0.1)
    assert losses[-1] < losses[0] - 1.0
    result = record["result"]
    assert text.splitlines()[-1].startswith(f"result val_bpb={result['val_bpb']}")
    uniform = record["data"]["val_tokens"] * math.log2(384) / record["data"]["val_bytes"]
    assert 0 < result["val_bpb"] < 0.9 * uniform
    assert result["artifact_bytes"] == len(blob)
    assert ("quantized_ttt" in record["stages"]) == (env.get("TTT_ENABLED") != "0")


@systems
def test_a_tiny_run_stores_every_tensor_as_published(system, runs):
    header, tensors = t.unpack(runs(system)[3])
    published = {name: kind for name, (_, _, _, kind) in INVENTORY[system].items()}
    assert {name: kind for name, (kind, _) in t.unfold(header["tensors"]).items()} == published
    assert {name: stored.kind for name, stored in tensors.items()} == published


def test_578_trains_rounded_and_adapts_to_its_first_chunks_alone(runs):
    _, text, record, _ = runs("578")
    # 40 steps of which rates fall in the last 30: below half from the 26th on.
    assert "late_qat:enabled step:26 " in text
    assert "layer_loop" not in text
    assert record["ttt"]["chunks_adapted"] == 2


def test_1487_starts_its_recurrence_at_a_step_after_warming_it_up(runs):
    for system in ("1487", "1487 legal"):
        lines = runs(system)[1].splitlines()
        start_of_loop = next(i for i, line in enumerate(lines) if "layer_loop:enabled" in line)
        assert lines[start_of_loop].startswith("layer_loop:enabled step:15 ")
        assert lines[start_of_loop].endswith(f"encoder:{ONCE[0]} decoder:{ONCE[1]}")
        assert "layer_loop_warmup_step: 1/1" in lines[:start_of_loop]


MARK = "invalid_for_records"


def rescored(env, folder, **changes):
    """The log and JSON of scoring that run's artifact again."""
    kept = {k: v for k, v in env.items() if k.startswith(("EVAL_", "DATA_", "TOKEN", "VAL_"))}
    artifact = str(Path(env["LOG_DIR"]) / "tiny.bin")
    again = {**kept, "ARTIFACT": artifact, "LOG_DIR": str(folder), "RUN_ID": "again"}
    done = start({**again, "MICRO_BATCH_TOKENS": "128", "TTT_ENABLED": "0", **changes})
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "again.json").read_text())


def test_training_on_the_validation_text_marks_log_result_json_and_artifact(runs):
    _, text, record, blob = runs("1487")
    lines = text.splitlines()
    assert any(line.startswith(f"{MARK}: ") for line in lines)
    assert MARK in lines[-1]
    assert MARK in record["result"]
    reasons = t.unpack(blob)[0][MARK]
    assert record[MARK] == reasons
    assert reasons
    assert all("validation" in reason for reason in reasons)


def test_the_mark_stays_with_the_artifact_when_it_is_scored_again(runs, tmp_path):
    env, _, record, _ = runs("1487")
    text, again = rescored(env, tmp_path, PREQUANT_TTT_EPOCHS="0")
    assert again[MARK] == record[MARK]
    assert any(line.startswith(f"{MARK}: ") for line in text.splitlines())
    assert MARK in text.splitlines()[-1]


def test_the_mark_stays_with_a_checkpoint_that_is_quantized_again(runs, tmp_path):
    env = {**runs("1487")[0], "LOG_DIR": str(tmp_path), "ITERATIONS": "3"}
    saved = start({**env, "RUN_ID": "saved", "SAVE_CHECKPOINT": "1"})
    assert saved.returncode == 0, saved.stderr
    again = {**env, "RUN_ID": "again", "CHECKPOINT": str(tmp_path / "saved.ckpt")}
    done = start({**again, "PREQUANT_TTT_EPOCHS": "0"})
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "again.json").read_text())
    header, _ = t.unpack((tmp_path / "again.bin").read_bytes())
    assert record["invalid_for_records"] == header["invalid_for_records"] != []
    assert done.stdout.splitlines()[-1].endswith("invalid_for_records=1")


@pytest.mark.parametrize("system", ["578", "1487 legal", "1493"])
def test_a_legal_run_has_no_mark_anywhere(system, runs):
    _, text, record, blob = runs(system)
    assert not re.search(rf"^{MARK}|{MARK}=", text, flags=re.M)
    assert MARK not in record
    assert MARK not in record["result"]
    assert not t.unpack(blob)[0].get(MARK)


def test_fine_tuning_on_the_validation_text_is_what_the_mark_is_for(runs):
    _, _, marked, _ = runs("1487")
    _, _, legal, _ = runs("1487 legal")
    name = "pre-quantization post-ema"
    assert marked["stages"][name] == legal["stages"][name], "equal until that step"
    assert marked["result"]["val_bpb"] != legal["result"]["val_bpb"]


# --- bytes at full size ---

# System: (one part in so many that is drawn, spread, published bytes of the artifact alone)
FULL_SIZE = {
    "578": (2, 0.17, 15_564_772 - 83_300),
    "1487": (8, 0.0676, 15_954_437 - 87_565),
    "1493": (16, 0.1, 15_975_300),
}


@torch.no_grad()
def gaussian_model(cfg, part, spread):
    """The model at one spread, but 1 / part of the rows of each matrix or of each vector."""
    draw = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = t.GPT(cfg)
    for name, parameter in list(model.named_parameters()):
        shape, cut = list(parameter.shape), -1 if model.rows[name].group == "scalar" else 0
        if shape:
            shape[cut] = max(shape[cut] // part, 1)
        module, _, own = name.rpartition(".")
        small = torch.nn.Parameter(spread * torch.randn(shape, generator=draw))
        setattr(model.get_submodule(module), own, small)
    return model


def nearest(weight, hessian, store, coarser):
    """What `gptq_quantize` gives for uncorrelated inputs, without its work."""
    return t.round_to_nearest(weight, store.scales(weight, coarser).half(), store.bits)


@pytest.mark.parametrize("system", FULL_SIZE)
def test_gaussian_weights_pack_to_the_published_bytes(system, rt, monkeypatch):
    """Part of the rows of every full-size tensor, their bytes times the number of parts.

    Spread: the bytes of #1493 do not depend on it. Of the codes of #1487 33.7% were seen to be +-1,
    which the floor under its steps gives at 0.0676. #578 left no such figure: 0.17 is the spread at
    which the floor gives the published bytes; without a floor no spread does, they would be 18 MB.
    zstd finds false matches in a smaller part than a half, and brotli does not.
    """
    part, spread, published = FULL_SIZE[system]
    code, full = t.code_bytes(), config(system)
    limit = (full.artifact_limit_bytes - code) // part + code
    cfg = config(system, ARTIFACT_LIMIT_BYTES=str(limit))
    monkeypatch.setattr(t, "gptq_quantize", nearest)
    header = {"model": cfg.model_settings()}
    blob = t.fit_artifact(gaussian_model(cfg, part, spread), {}, header, rt)
    assert part * len(blob) == pytest.approx(published, rel=0.02)
