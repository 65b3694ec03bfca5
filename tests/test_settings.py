"""Section 1 of train_gpt.py: every setting, its checks, and where its value comes from."""

import contextlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t
from train_gpt import Config, ConfigError

ROOT = Path(t.__file__).parent
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
FULL = {"SMOKE": "0"}

# System #1493 as its authors ran it.
SYSTEM_1493 = dict(
    vocab_size=8192,
    num_layers=11,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    mlp_mult=4.0,
    xsa_last_n=11,
    parallel_residual_start=7,
    loop_start=3,
    loop_end=5,
    num_loops=2,
    enable_looping_at=0.35,
    rope_base=10000.0,
    rope_dims=16,
    rope_train_seq_len=2048,
    logit_softcap=30.0,
    qk_gain_init=5.25,
    tied_embed_init_std=0.005,
    train_batch_tokens=786432,
    train_seq_len=2048,
    warmup_steps=20,
    warmdown_frac=0.72,
    min_lr=0.0,
    grad_clip_norm=0.3,
    ema_decay=0.9965,
    max_wallclock_seconds=600.0,
    gptq_reserve_seconds=0.0,
    matrix_lr=0.022,
    muon_wd=0.095,
    muon_momentum=0.99,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
    muon_backend_steps=5,
    muon_row_normalize=True,
    tied_embed_lr=0.03,
    embed_wd=0.085,
    scalar_lr=0.02,
    adam_wd=0.02,
    beta1=0.9,
    beta2=0.95,
    adam_eps=1e-8,
    gptq_calibration_batches=64,
    matrix_bits=6,
    matrix_clip_sigmas=12.85,
    embed_bits=8,
    embed_clip_sigmas=20.0,
    compressor="brotli",
    artifact_limit_bytes=16_000_000,
    eval_seq_len=2048,
    eval_stride=64,
    ttt_enabled=True,
    ttt_lr=0.005,
    ttt_epochs=3,
    ttt_momentum=0.9,
    ttt_grad_clip=1.0,
    ttt_chunk_tokens=32768,
    eval_wallclock_seconds=600.0,
)


def problems(env, cuda=True):
    with pytest.raises(ConfigError) as caught:
        Config.from_env(env, cuda=cuda)
    return str(caught.value).splitlines()


def test_the_defaults_are_system_1493():
    cfg = Config.from_env({}, cuda=True)
    assert {name: getattr(cfg, name) for name in SYSTEM_1493} == SYSTEM_1493
    assert set(cfg.sources.values()) == {"default"}
    assert cfg.mlp_hidden == 2048
    assert Config.from_env({"GPTQ_RESERVE_SECONDS": "12"}, cuda=True).train_seconds == 588.0
    assert cfg.train_rows == 384
    assert cfg.micro_rows(8) == 48  # a rank's whole share: no accumulation on 8 GPUs
    assert cfg.micro_rows(1) == 48  # of 384: 8 forwards


def test_without_a_limit_training_time_is_infinite():
    assert Config(max_wallclock_seconds=0.0).train_seconds == math.inf


def test_the_variable_of_a_setting_is_its_name_in_capitals():
    """Each setting read from text that is not its default, and no other one touched."""
    for setting in t.knobs():
        default, meta = setting.default, setting.metadata
        if isinstance(default, bool):
            value, text = not default, "01"[not default]
        elif isinstance(default, str):
            value = text = meta["choices"][-1] if meta["choices"] else "other"
        else:
            value = meta["high"] if meta["high"] not in (None, default) else meta["low"] or 13
            text = str(value)
        parsed = t.parse_value(setting, text)
        assert parsed == value != default, setting.name
        assert type(parsed) is type(default), setting.name
    cfg = Config.from_env({"SEED": "7", "BETA2": "0.99", "MUON_ROW_NORMALIZE": "false"}, cuda=True)
    assert (cfg.seed, cfg.beta2, cfg.muon_row_normalize) == (7, 0.99, False)
    changed = {name for name, source in cfg.sources.items() if source == "environment"}
    assert changed == {"seed", "beta2", "muon_row_normalize"}


def test_ranges_include_their_ends_and_nothing_beyond():
    ranged = 0
    for setting in t.knobs():
        for key, outward in (("low", -1), ("high", 1)):
            bound = setting.metadata[key]
            if bound is not None:
                assert t.parse_value(setting, str(bound)) == bound
                beyond = bound + outward if isinstance(bound, int) else bound + outward * 1e-6
                with pytest.raises(ValueError, match="expected a.* number"):
                    t.parse_value(setting, str(beyond))
                ranged += 1
    assert ranged > 50


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("ITERATIONS", "many", "a whole number of at least 1"),
        ("ITERATIONS", "1.5", "a whole number of at least 1"),
        ("ITERATIONS", "", "a whole number of at least 1"),
        ("MATRIX_BITS", "9", "a whole number from 2 to 8"),
        ("MATRIX_LR", "nan", "a number of at least 0.0"),
        ("MATRIX_LR", "inf", "a number of at least 0.0"),
        ("QK_GAIN_INIT", "five", "a number"),
        ("TTT_ENABLED", "yes", "0 or 1"),
        ("COMPRESSOR", "gzip", "one of brotli, zstd, lzma"),
        ("ATTENTION", "FA3", "one of auto, fa3, fa4, cudnn, flash, sdpa, plain"),
    ],
)
def test_a_wrong_value_is_one_line_with_name_value_and_what_was_expected(name, text, expected):
    assert problems({name: text}) == [f"{name}={text}: expected {expected}"]


def test_all_problems_are_reported_together():
    env = {
        "ITERATIONS": "0",
        "TTT_ENABLED": "maybe",
        "COMPRESSOR": "zip",
        "MODEL_DIM": "500",
        "TRAIN_BATCH_TOKENS": "1000",
        "MUON_MOMENTUN": "0.9",
        "EMBED_LR": "0.6",
        "GPTQ_CALIB_BATCHES": "3",
        "GPTQ_CALIBRATION_BATCHES": "4",
    }
    lines = problems(env)
    names = [name for name in env if name != "GPTQ_CALIBRATION_BATCHES"]
    assert len(lines) == len(names)
    assert {re.match(r"\w+", line)[0] for line in lines} == set(names)


# What each rule between settings refuses, and a neighbour that it must let pass.
CONFLICTS = [
    ({"MODEL_DIM": "516"}, {"MODEL_DIM": "520"}, "MODEL_DIM=516: expected a multiple of "),
    ({"NUM_KV_HEADS": "3"}, {"NUM_KV_HEADS": "2"}, "NUM_KV_HEADS=3: expected a divisor of "),
    ({"ROPE_DIMS": "15"}, {"ROPE_DIMS": "14"}, "ROPE_DIMS=15: expected an even number up to "),
    ({"ROPE_DIMS": "66"}, {"ROPE_DIMS": "64"}, "ROPE_DIMS=66: expected an even number up to "),
    ({"LOOP_END": "11"}, {"LOOP_END": "10"}, "LOOP_END=11: expected at most 10"),
    ({"LOOP_END": "11"}, {"LOOP_END": "11", "NUM_LOOPS": "0"}, "LOOP_END=11: expected"),
    ({"LOOP_START": "6"}, {"LOOP_START": "5"}, "LOOP_START=6: expected at most 5"),
    (
        {"TRAIN_BATCH_TOKENS": "786433"},
        {"TRAIN_BATCH_TOKENS": "788480"},
        "TRAIN_BATCH_TOKENS=786433: expected whole sequences of 2048",
    ),
    (
        {"WORLD_SIZE": "3", "TRAIN_BATCH_TOKENS": "524288"},
        {"WORLD_SIZE": "3"},
        "TRAIN_BATCH_TOKENS=524288: expected whole sequences of 2048, equally many for 3 ranks",
    ),
    (
        {"WORLD_SIZE": "5"},
        {"WORLD_SIZE": "5", "ARTIFACT": "a.bin"},
        "TRAIN_BATCH_TOKENS=786432: expected whole sequences of 2048, equally many for 5 ranks",
    ),
    (
        {"MICRO_BATCH_TOKENS": "2047"},
        {"MICRO_BATCH_TOKENS": "2048"},
        "MICRO_BATCH_TOKENS=2047: expected at least 2048",
    ),
    (
        {"EVAL_SEQ_LEN": "131072", "TTT_ENABLED": "0"},
        {"EVAL_SEQ_LEN": "98304", "TTT_ENABLED": "0"},
        "MICRO_BATCH_TOKENS=98304: expected at least 131072",
    ),
    ({"EVAL_STRIDE": "2049"}, {"EVAL_STRIDE": "2048"}, "EVAL_STRIDE=2049: expected at most 2048"),
    (
        {"TTT_CHUNK_TOKENS": "2047"},
        {"TTT_CHUNK_TOKENS": "2047", "TTT_ENABLED": "0"},
        "TTT_CHUNK_TOKENS=2047: expected at least EVAL_SEQ_LEN=2048",
    ),
    (
        {"GPTQ_RESERVE_SECONDS": "600"},
        {"GPTQ_RESERVE_SECONDS": "600", "MAX_WALLCLOCK_SECONDS": "0"},
        "GPTQ_RESERVE_SECONDS=600.0: expected less than MAX_WALLCLOCK_SECONDS=600",
    ),
    (
        {"ARTIFACT": "a.bin", "CHECKPOINT": "b.ckpt"},
        {"CHECKPOINT": "b.ckpt"},
        "CHECKPOINT=b.ckpt: expected nothing beside ARTIFACT",
    ),
    (
        {"VE_DIM": "8", "VE_LAYERS": "1,11"},
        {"VE_DIM": "8", "VE_LAYERS": "1,10"},
        "VE_LAYERS=1,11: expected layers below NUM_LAYERS=11",
    ),
    (
        {"VE_DIM": "8", "VE_LAYERS": "1;2"},
        {"VE_LAYERS": "1;2"},
        "VE_LAYERS=1;2: expected layers below NUM_LAYERS=11, by commas",
    ),
    (
        {"CLIP_RULE": "percentile"},
        {"CLIP_RULE": "percentile", "FIT_RULE": "prune"},
        "FIT_RULE=tightest: expected prune",
    ),
    (
        {"INT8_SENSITIVE": "attn", "LATE_QAT_THRESHOLD": "0.1"},
        {"INT8_SENSITIVE": "attn"},
        "INT8_SENSITIVE=attn: expected nothing: LATE_QAT_THRESHOLD",
    ),
    (
        {"BIGRAM_VOCAB_SIZE": "1"},
        {"BIGRAM_VOCAB_SIZE": "2"},
        "BIGRAM_VOCAB_SIZE=1: expected 0, or at least 2",
    ),
    ({"RUN_ID": "a/b"}, {"RUN_ID": "a-b.2_c"}, "RUN_ID=a/b: expected letters, digits"),
]


@pytest.mark.parametrize(("bad", "good", "line"), CONFLICTS)
def test_each_rule_between_settings_refuses_the_case_and_not_its_neighbour(bad, good, line):
    (found,) = problems(bad)
    assert found.startswith(line)
    Config.from_env(good, cuda=True)


NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from(["-0", "1e9", "1_0", " 3 "]))


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([s.name.upper() for s in t.knobs()]),
        st.one_of(NUMBERS.map(str), st.text(max_size=8)),
        max_size=6,
    )
)
def test_whatever_is_set_the_answer_is_a_configuration_or_a_config_error(env):
    with contextlib.suppress(ConfigError):  # anything else is our fault
        assert not Config.from_env(env, cuda=True).conflicts()


@pytest.mark.parametrize("seed", [2**64, 10**400], ids=["65 bits", "401 digits"])
def test_a_seed_that_no_generator_takes_is_a_config_error(seed):
    (line,) = problems({"SEED": str(seed)})
    assert line.startswith("SEED=")
    assert "expected a whole number" in line


def test_an_unknown_variable_of_a_family_is_an_error_with_a_hint():
    assert problems({"MUON_MOMENTUN": "0.9"}) == [
        "MUON_MOMENTUN: not a setting; did you mean MUON_MOMENTUM?"
    ]
    assert problems({"TTT_QQQ": "1"}) == ["TTT_QQQ: not a setting; see --help"]
    families = {s.name.split("_")[0].upper() + "_" for s in t.knobs() if "_" in s.name}
    for family in families & set(t.FAMILIES):
        assert problems({f"{family}QQQ": "1"}) == [f"{family}QQQ: not a setting; see --help"]
    assert {"MUON_", "TTT_", "GPTQ_"} <= families & set(t.FAMILIES)


def test_a_variable_that_merely_resembles_a_setting_is_a_warning():
    cfg = Config.from_env({"ITERATION": "5"}, cuda=True)
    assert cfg.iterations == 20000
    assert cfg.warnings == ("ITERATION is not a setting and is ignored; did you mean ITERATIONS?",)


def test_the_variables_of_an_ordinary_machine_are_neither_errors_nor_warnings():
    names = (
        "HOME PATH PWD USER SHELL LANG LC_ALL TERM HOSTNAME LOGNAME EDITOR PYTHONPATH VIRTUAL_ENV "
        "LD_LIBRARY_PATH OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_HOME RANK "
        "LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME LOCAL_WORLD_SIZE GROUP_WORLD_SIZE MASTER_ADDR "
        "ROLE_WORLD_SIZE MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS NCCL_DEBUG "
        "TORCHELASTIC_RESTART_COUNT TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE "
        "TORCH_NCCL_ASYNC_ERROR_HANDLING TORCHINDUCTOR_CACHE_DIR SLURM_JOB_ID SLURM_PROCID "
        "TMPDIR HF_HOME WANDB_MODE DATA_ROOT XDG_CACHE_HOME TRITON_CACHE_DIR GLOO_SOCKET_IFNAME"
    )
    assert t.unknown_variables(dict.fromkeys(names.split(), "1")) == ([], [])


def test_retired_names_are_explained():
    for name, reason in t.RETIRED.items():
        assert problems({name: "1"}) == [f"{name}: not a setting here: {reason}"]
    assert {"EMBED_LR", "HEAD_LR", "MUON_BETA2"} <= set(t.RETIRED)  # no effect in #1493


def test_an_alias_sets_its_setting_and_equal_values_agree():
    for alias, name in t.ALIASES.items():
        for env in ({alias: "1"}, {alias: "1", name.upper(): "1"}):
            cfg = Config.from_env(env, cuda=True)
            assert getattr(cfg, name) == 1
            assert cfg.sources[name] == "environment"


def test_an_alias_and_its_setting_with_two_values_are_an_error():
    for alias, name in t.ALIASES.items():
        (line,) = problems({alias: "1", name.upper(): "0"})
        assert alias in line
        assert name.upper() in line
        (line,) = problems({alias: "x"})
        assert re.search("x: expected (a whole number|0 or 1)", line)


@pytest.mark.parametrize(
    ("env", "cuda", "small"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"SMOKE": "0"}, False, False),
        ({"SMOKE": "1"}, True, True),
        ({"SEED": "5", "ITERATIONS": "3"}, False, True),
        ({"DATA_DIR": "d"}, False, False),
        ({"DATA_PATH": "d"}, False, False),
        ({"TOKENIZER_PATH": "t"}, False, False),
        ({"VOCAB_SIZE": "1024"}, False, False),
        ({"MODEL_DIM": "512"}, False, False),
        ({"NUM_LAYERS": "11"}, False, False),
        ({"TRAIN_SEQ_LEN": "2048"}, False, False),
        ({"MODEL_DIM": "512", "SMOKE": "1"}, False, True),
    ],
)
def test_the_small_run_is_taken_without_a_gpu_unless_data_or_a_size_is_set(env, cuda, small):
    cfg = Config.from_env(env, cuda=cuda)
    assert ("smoke" in cfg.sources.values()) == small
    if small:
        assert cfg.vocab_size == 1024
        assert cfg.dataset_dir.resolve() == ROOT / "data" / "sample"
        assert cfg.tokenizer_file.resolve() == ROOT / "data/sample/tokenizer.model"
    else:
        expected = SYSTEM_1493 | {k.lower(): int(v) for k, v in env.items() if v.isdigit()}
        assert {n: getattr(cfg, n) for n in SYSTEM_1493} == {n: expected[n] for n in SYSTEM_1493}


def test_set_variables_override_the_values_of_the_small_run():
    cfg = Config.from_env({"SMOKE": "1", "MODEL_DIM": "256", "TTT_LR": "0.1"}, cuda=False)
    assert (cfg.model_dim, cfg.ttt_lr, cfg.num_layers) == (256, 0.1, 11)
    assert cfg.sources["model_dim"] == cfg.sources["ttt_lr"] == "environment"
    assert cfg.sources["vocab_size"] == "smoke"
    assert cfg.sources["num_layers"] == "default"


def test_the_small_run_keeps_the_wiring_and_only_narrows():
    wiring = "num_layers loop_start loop_end num_loops parallel_residual_start xsa_last_n".split()
    assert not set(wiring) & set(t.SMOKE)
    assert not Config.from_env({"SMOKE": "1"}, cuda=False).conflicts()


def test_paths_follow_the_vocabulary_unless_set():
    cfg = Config(data_dir="/d", vocab_size=4096)
    assert cfg.dataset_dir == Path("/d/datasets/fineweb10B_sp4096")
    assert cfg.tokenizer_file == Path("/d/tokenizers/fineweb_4096_bpe.model")
    cfg = Config(data_dir="/d", data_path="/x", tokenizer_path="/y.model")
    assert (cfg.dataset_dir, cfg.tokenizer_file) == (Path("/x"), Path("/y.model"))


@settings(max_examples=200, deadline=None)
@given(
    rows_per_rank=st.integers(1, 60),
    world=st.integers(1, 8),
    seq_len=st.integers(2, 9),
    most=st.integers(1, 70),
    spare=st.integers(0, 8),
)
def test_a_forward_takes_the_most_rows_that_divide_a_ranks_rows_and_fit(
    rows_per_rank, world, seq_len, most, spare
):
    limit = most * seq_len + min(spare, seq_len - 1)
    cfg = Config(
        train_batch_tokens=rows_per_rank * world * seq_len,
        train_seq_len=seq_len,
        micro_batch_tokens=limit,
    )
    fitting = [
        rows
        for rows in range(1, 61)
        if any(count * rows == rows_per_rank for count in range(1, 61)) and rows * seq_len <= limit
    ]
    assert cfg.train_rows == rows_per_rank * world
    assert cfg.micro_rows(world) == max(fitting)


def test_the_values_of_a_configuration_build_it_again():
    cfg = Config(seed=7, ttt_enabled=False, ttt_lr=0.25, loader="coprime")
    assert Config(**cfg.values()) == cfg
    assert list(cfg.values()) == [s.name for s in t.knobs()]


def test_a_stored_model_replaces_defaults_and_is_recorded_as_the_source():
    stored = Config(model_dim=64, num_heads=4, num_kv_heads=2).model_settings()
    assert stored["model_dim"] == 64
    assert "matrix_lr" not in stored
    cfg = Config.from_env(FULL | {"TTT_LR": "0.1"}, cuda=True).with_model(stored, "a.bin")
    assert cfg.model_settings() == stored
    assert cfg.ttt_lr == 0.1
    assert (cfg.sources["model_dim"], cfg.sources["ttt_lr"]) == ("artifact", "environment")


def test_another_model_than_the_stored_one_is_a_config_error_that_names_all_differences():
    stored = Config().model_settings()
    env = {"MODEL_DIM": "256", "NUM_LAYERS": "9", "VOCAB_SIZE": "8192"}
    cfg = Config.from_env(env, cuda=True)
    with pytest.raises(ConfigError) as caught:
        cfg.with_model(stored, "a.bin")
    lines = str(caught.value).splitlines()
    assert sorted(lines) == [
        "MODEL_DIM=256: a.bin holds a model with 512; unset it",
        "NUM_LAYERS=9: a.bin holds a model with 11; unset it",
    ]


def test_a_stored_model_with_impossible_settings_is_a_config_error():
    stored = Config().model_settings() | {"num_kv_heads": 3}
    with pytest.raises(ConfigError, match="NUM_KV_HEADS=3: expected a divisor"):
        Config.from_env(FULL, cuda=True).with_model(stored, "a.bin")


def test_help_names_every_setting_once_with_default_range_and_sentence():
    text = t.help_text()
    for setting in t.knobs():
        name, default = setting.name.upper(), setting.default
        (line,) = (li for li in text.splitlines() if li.startswith(f"  {name} "))
        shown = str(int(default)) if isinstance(default, bool) else str(default) or "(empty)"
        assert line.split()[1] == shown
        assert setting.metadata["sentence"] in line
        for bound in (setting.metadata["low"], setting.metadata["high"]):
            assert bound is None or str(bound) in line
        assert all(choice in line for choice in setting.metadata["choices"] or ())
    for alias, name in t.ALIASES.items():
        assert re.search(rf"^  {alias} +{name.upper()}$", text, re.M)


def python(code, tmp_path, **env):
    """Run Python where nothing is: no GPU, another folder."""
    env = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""} | env
    command = [sys.executable, *code]
    return subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_needs_no_gpu_and_no_data(tmp_path):
    done = python([ROOT / "train_gpt.py", "--help"], tmp_path, DATA_PATH="/nowhere", TTT_QQQ="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == t.help_text() + "\n"
    assert not list(tmp_path.iterdir())


def test_a_bad_configuration_exits_with_status_2_and_one_line_per_problem(tmp_path):
    done = python([ROOT / "train_gpt.py"], tmp_path, MATRIX_BITS="99", MUON_MOMENTUN="0.9")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "ConfigError: MUON_MOMENTUN: not a setting; did you mean MUON_MOMENTUM?",
        "MATRIX_BITS=99: expected a whole number from 2 to 8",
    ]
    assert not list(tmp_path.iterdir())


def test_a_bad_configuration_ends_before_anything_is_loaded_and_only_rank_0_speaks(
    monkeypatch, capsys
):
    monkeypatch.setattr(t, "Runtime", None)  # calling it would be a TypeError
    assert t.main([], {"ITERATIONS": "0"}) == 2
    assert capsys.readouterr().err == "ConfigError: ITERATIONS=0: " + (
        "expected a whole number of at least 1\n"
    )
    assert t.main([], {"ITERATIONS": "0", "RANK": "1", "WORLD_SIZE": "2"}) == 2
    assert capsys.readouterr().err == ""


def test_every_setting_is_read_by_the_program():
    program = SOURCE[SOURCE.index("def from_env") :]
    program += (ROOT / "records" / "audit.py").read_text(encoding="utf-8")
    unread = {s.name for s in t.knobs() if not re.search(rf"\b(cfg|self)\.{s.name}\b", program)}
    assert unread <= {"smoke"}  # from_env reads it out of the values that were given
    assert 'given.get("smoke"' in program


def other_values(text, setting):
    """Values other than the default that a text gives to a setting.

    As a variable, as a keyword, or in the list of a parametrized test.
    """
    name, found = setting.name, set()
    values = re.findall(
        rf"\b(?:{name}|{name.upper()})[\"']?\s*[=:,]\s*(?:f(?=[\"']))?[\"']?([\w.+/-]+)", text
    )
    for listed in re.findall(rf"parametrize\(\"{name}\", \[([^\]]*)\]", text):
        values += [value.strip("\"' ") for value in listed.split(",")]
    for value in values:
        try:
            found.add(t.parse_value(setting, value.removeprefix("str(")))
        except ValueError:
            continue
    return found - {setting.default}


def test_a_second_value_is_found_as_variable_keyword_or_parameter_and_a_default_is_none():
    (setting,) = (s for s in t.knobs() if s.name == "seed")
    for text, values in (
        ('{"SEED": "5"} Config(seed=6)', {5, 6}),
        ('parametrize("seed", [1337, 7, 8])', {7, 8}),
        ('SEED=1337 seed=seed "seed", [1, 2]', set()),
    ):
        assert other_values(text, setting) == values


def test_every_setting_has_a_second_value_in_a_test_or_a_record():
    files = [*(ROOT / "tests").glob("*.py"), *(ROOT / "records").rglob("*")]
    here = Path(__file__)
    texts = [p.read_text("utf-8", "replace") for p in files if p.suffix in (".py", ".sh", ".json")]
    # Here most values stand to be refused: only configurations that are built count.
    texts.remove(here.read_text(encoding="utf-8"))
    texts += re.findall(r"Config\(.*\)", here.read_text(encoding="utf-8"))
    missing = [s.name for s in t.knobs() if not other_values("\n".join(texts), s)]
    assert not missing
