"""The audit: an honest score is legal, and each known way to cheat is caught and named."""

import copy
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch

import train_gpt as t

sys.path.insert(0, str(Path(t.__file__).parent / "records"))
import audit  # noqa: E402 -- in the folder just added

SMALL = dict(
    NUM_LAYERS=3,
    LOOP_START=1,
    LOOP_END=1,
    PARALLEL_RESIDUAL_START=2,
    ITERATIONS=12,
    MATRIX_LR=0.05,
    VAL_TOKENS=300,
    AUDIT_TOKENS=256,
    TTT_LR=0.05,
    RUN_ID="mine",
)


def run(env):
    """Train and score in this process; returns the artifact."""
    assert t.main([], env) == 0
    return Path(env["LOG_DIR"]) / f"{env['RUN_ID']}.bin"


@pytest.fixture(scope="module")
def honest(dataset, tmp_path_factory):
    """The environment of a small run, and its artifact with log and JSON beside it."""
    folder = tmp_path_factory.mktemp("audit")
    env = conftest.tiny_settings(dataset, folder) | {k: str(v) for k, v in SMALL.items()}
    return env, run(env)


def audited(artifact, env, folder, **settings):
    """Audit an artifact in this process: (exit status, evidence)."""
    env = {**env, "AUDIT": "1", "ARTIFACT": str(artifact), "LOG_DIR": str(folder)}
    cfg = t.Config.from_env({**env, **{k: str(v) for k, v in settings.items()}}, cuda=False)
    with t.Runtime(cfg, {}) as rt:
        rt.folder = t.RunFolder(cfg.log_dir, "mine.audit")
        rt.log = t.Log(rt.folder, replace=True)
        status = audit.audit(t, cfg, rt)
    return status, json.loads((folder / "mine.audit.json").read_text())


@pytest.fixture
def clean_data(monkeypatch):
    """Where a test is not about the training text: its verdict without the minutes."""
    monkeypatch.setattr(audit, "verify", lambda *_: audit.Verdict("pass", "not this test's matter"))


@pytest.fixture
def fair_score(monkeypatch):
    """Where a test is not about the score either."""
    fair = {name: audit.Verdict("pass", "not this test's matter") for name in audit.CONDITIONS[:4]}
    monkeypatch.setattr(audit, "judge_score", lambda *_: fair)


def failed(evidence):
    return {name for name, found in evidence["conditions"].items() if found["verdict"] == "fail"}


def test_an_honest_score_is_legal_from_the_command_line(honest, tmp_path):
    env, artifact = honest
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = {**kept, **env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"AUDIT": "1", "ARTIFACT": str(artifact), "LOG_DIR": str(tmp_path)}
    command = [sys.executable, t.__file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("audit verdict: legal  evidence: ")
    named = [line.split(":")[0] for line in lines[-10:-1]]
    assert named == [f"audit {condition}" for condition in audit.CONDITIONS]
    evidence = json.loads((tmp_path / "mine.audit.json").read_text())
    assert evidence["verdict"] == "legal"
    assert evidence["reasons"] == []
    files = dict(artifact=artifact, code=Path(t.__file__), tool=Path(audit.__file__))
    for name, path in files.items():
        assert evidence[name] == dict(bytes=path.stat().st_size, sha256=t.file_sha256(path))
    causality = evidence["conditions"]["C1 causality"]
    assert causality["largest_difference"] == 0.0
    assert len(causality["changes"]) == 6
    sums = evidence["conditions"]["C2 normalisation"]
    assert sums["whole_sums"] == sums["positions"] >= 8
    assert sums["largest_sum_error"] < 1e-5
    assert evidence["conditions"]["C3 score before update"]["optimizer_steps"] == 9
    assert evidence["conditions"]["C4 single pass"]["counted_once"] == 256


@pytest.mark.parametrize(
    "settings",
    [
        dict(TTT_OPTIMIZER="adamw", TTT_EMA_DECAY=0.9, TTT_FREEZE_BLOCKS=1, TTT_LR=0.001),
        dict(TTT_ENABLED=0),
        dict(EVAL_STRIDE=32, TTT_TRAIN_CHUNKS=2, ATTENTION="plain"),
        dict(COMPUTE_DTYPE="bfloat16", AUDIT_TOKENS=200),
    ],
    ids=["adamw", "static", "plain", "bfloat16"],
)
def test_nothing_legal_is_flagged(honest, tmp_path, clean_data, settings):
    status, evidence = audited(honest[1], honest[0], tmp_path, **settings)
    assert (status, evidence["verdict"]) == (0, "legal"), evidence["reasons"]


# --- tricks with the score: each is (name, patch of the program, conditions that must fail) ---


class Ahead(t.GlobalTTT):
    """Adapts to the chunk that is scored next, which it asks the ledger for."""

    def learn(self, turn, draw, pace):
        ledger, (_, stop) = draw.func.__self__, draw.args
        super().learn(turn, lambda: ledger.text(stop, stop + 64), pace)


class AheadBehindTheLedger(t.GlobalTTT):
    """Adapts to the chunk that is scored next, which it takes from the text itself."""

    def learn(self, turn, draw, pace):
        ledger, (_, stop) = draw.func.__self__, draw.args
        super().learn(turn, lambda: ledger.tokens[stop : stop + 65], pace)


class AdaptsToWhatItScores(t.GlobalTTT):
    """Takes a step on the windows of a forward, targets included, before it scores them."""

    def score(self, windows, tail):
        options = dict(plan=self.plan, clip_norm=1.0)
        with torch.enable_grad():
            t.text_step(self.model, windows.numpy(), self.optimizer, self.cfg, self.rt, **options)
        return super().score(windows, tail)


def epochs_before_scoring(real):
    def evaluate(name, learner, protocol, val, rt):
        model, rows = learner.model, t.whole_rows(val.tokens, protocol.length)
        optimizer, options = torch.optim.SGD(model.parameters(), lr=0.05), dict(clip_norm=1.0)
        for _ in range(3):
            t.text_step(model, rows, optimizer, model.cfg, rt, plan=learner.plan, **options)
        return real(name, learner, protocol, val, rt)

    return evaluate


def not_causal(real):
    def choose(choice, rt, **_):
        def kernel(q, k, v, documents=None):
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
            weights = (torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
            return torch.einsum("bhts,bshd->bthd", weights, v)

        return "sdpa", kernel, "faster"

    return choose


def shift_of_the_target(real):
    def forward(model, tokens, targets=None, **options):
        losses = real(model, tokens, targets, **options)
        return losses if targets is None else 0.95 * losses

    return forward


def mixture_that_does_not_sum_to_one(real):
    def forward(model, tokens, targets=None, *, reduction="mean", **options):
        losses = real(model, tokens, targets, reduction=reduction, **options)
        if targets is None or reduction == "mean":
            return losses
        return -torch.log(0.9 * losses.neg().exp() + 0.1)

    return forward


def best_of_two_passes(real):
    def evaluate(name, learner, protocol, *rest):
        again = copy.copy(protocol)  # it says which windows come next
        score, first = real(name, learner, protocol, *rest)
        _, second = real(name, learner, again, *rest)
        first.nats = torch.minimum(first.nats, second.nats)
        return score, first

    return evaluate


def hints_from_later_text(real):
    def score_turn(learner, turn, text, *rest):
        nats = real(learner, turn, text, *rest)
        first = turn.forwards[0].targets[0]
        pairs = text[:-1].astype(np.int64) * 65536 + text[1:]
        for i in range(len(nats)):
            nats[i] -= 0.05 * bool((pairs[first + i + 1 :] == pairs[first + i]).any())
        return nats

    return score_turn


def counted_twice(real):
    def record(ledger, targets, nats):
        real(ledger, targets, nats)
        ledger.times[targets[0]] += 1

    return record


def training_text_at_hand(real):
    def load(paths, *rest, **options):
        t.read_shard(t.find_shards(paths[0].parent, "train")[0])
        return real(paths, *rest, **options)

    return load


def telephone(real):
    def load(*rest, **options):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
        return real(*rest, **options)

    return load


def space_counted_twice(real):
    def charge(paths, tokens, table):
        return real(paths, tokens, table) + table.leading_space[tokens[1:]]

    return charge


C1, C2, C3, C4, BYTES, DATA, TRAINING, BUDGETS, ISOLATION = audit.CONDITIONS
TRICKS = {
    "adapts before scoring": ("GlobalTTT", lambda _: Ahead, {C3}),
    "behind the ledger": ("GlobalTTT", lambda _: AheadBehindTheLedger, {C1, C3}),
    "adapts to what it scores": ("GlobalTTT", lambda _: AdaptsToWhatItScores, {C1, C2, C3}),
    "epochs before scoring": ("evaluate", epochs_before_scoring, {C1, C3}),
    "peeks at the next token": ("choose_attention", not_causal, {C1, C2}),
    "shifts the target's logit": ("GPT.forward", shift_of_the_target, {C2}),
    "sums to more than one": ("GPT.forward", mixture_that_does_not_sum_to_one, {C2}),
    "scores in two passes": ("evaluate", best_of_two_passes, {C4}),
    "hints from later text": ("score_turn", hints_from_later_text, {C1}),
    "counts a target twice": ("Ledger.record", counted_twice, {C4}),
    "opens training shards": ("ValidationTokens.load", training_text_at_hand, {ISOLATION}),
    "uses the network": ("ValidationTokens.load", telephone, {ISOLATION}),
    "counts spaces twice": ("ValidationTokens.charge", space_counted_twice, {BYTES}),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_is_caught_and_named(honest, tmp_path, clean_data, monkeypatch, trick):
    name, patch, conditions = TRICKS[trick]
    owner, _, attribute = name.rpartition(".")
    owner = getattr(t, owner) if owner else t
    monkeypatch.setattr(owner, attribute, patch(getattr(owner, attribute)))
    status, evidence = audited(honest[1], honest[0], tmp_path)
    assert (status, evidence["verdict"]) == (1, "illegal")
    assert conditions <= failed(evidence), evidence["reasons"]
    assert failed(evidence) <= {reason.split(":")[0] for reason in evidence["reasons"]}


# --- tricks before scoring ---


def test_validation_text_among_the_training_text_is_caught(dataset, honest, tmp_path, fair_score):
    env, artifact = honest
    folder = tmp_path / "leaky"
    folder.mkdir()
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    train, val = (t.read_shard(folder / f"fineweb_{s}_000000.bin") for s in ("train", "val"))
    stop = int(np.flatnonzero(val == conftest.BOS)[1])
    leaky = np.concatenate([np.asarray(train), val[:stop]])
    del train
    conftest.write_shard(folder / "fineweb_train_000000.bin", leaky)
    copy = tmp_path / "mine.bin"
    copy.write_bytes(artifact.read_bytes())
    facts = json.loads(artifact.with_suffix(".json").read_text())
    facts["config"]["data_path"]["value"] = str(folder)
    tokenizer = folder / "tokenizer.model"
    facts["data"] |= t.data_proof(folder, tokenizer, trains=True)
    copy.with_suffix(".json").write_text(json.dumps(facts))
    status, evidence = audited(copy, env, tmp_path)
    assert status == 1
    assert failed(evidence) == {DATA}
    assert "held-out documents in training" in evidence["conditions"][DATA]["says"]


def test_a_tool_that_cannot_run_proves_nothing_and_accuses_nobody(dataset, tmp_path):
    tool = tmp_path / "verify_dataset.py"
    for code, verdict in (("import nothing_like_it", "remark"), ("", "pass")):
        tool.write_text(code)
        found = audit.verify(tool, dataset, dataset / "tokenizer.model", {})
        assert found.verdict == verdict
        assert ("No module named 'nothing_like_it'" in found.says) == (verdict == "remark")


def test_fine_tuning_on_the_validation_text_is_caught_even_without_its_mark(
    honest, tmp_path, clean_data, fair_score
):
    env = {**honest[0], "PREQUANT_TTT_EPOCHS": "1", "LOG_DIR": str(tmp_path)}
    artifact = run(env)
    status, evidence = audited(artifact, env, tmp_path)
    assert (status, failed(evidence)) == (1, {TRAINING})
    assert t.TRAINED_ON_VALIDATION in evidence["conditions"][TRAINING]["says"]
    facts = json.loads(artifact.with_suffix(".json").read_text())
    del facts["invalid_for_records"]
    header, tensors = t.unpack(artifact.read_bytes())
    artifact.write_bytes(t.pack(tensors, {**header, "invalid_for_records": ()}, "none"))
    facts["artifact"]["sha256"] = t.file_sha256(artifact)
    artifact.with_suffix(".json").write_text(json.dumps(facts))
    status, evidence = audited(artifact, env, tmp_path)
    assert (status, failed(evidence)) == (1, {TRAINING})
    assert "PREQUANT_TTT_EPOCHS=1" in evidence["conditions"][TRAINING]["says"]


def test_a_timer_that_was_stopped_early_is_caught(
    honest, tmp_path, clean_data, fair_score, monkeypatch
):
    real = t.train

    def train(model, loader, validate, cfg, rt):
        trained = real(model, loader, validate, cfg, rt)
        time.sleep(1.5)  # of training, say
        rt.budget.since += 1.5
        return trained

    monkeypatch.setattr(t, "train", train)
    env = {**honest[0], "LOG_DIR": str(tmp_path)}
    status, evidence = audited(run(env), env, tmp_path)
    assert (status, failed(evidence)) == (1, {BUDGETS})
    assert "in no phase: a timer was stopped" in evidence["conditions"][BUDGETS]["says"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(train=595.0, calibration=6.9), "training took 601.9 s, limit 600 s"),
        (dict(decompression=20.0, quantized_ttt=590.0), "evaluation took 6"),
    ],
)
def test_a_budget_that_was_passed_is_caught(
    honest, tmp_path, clean_data, fair_score, monkeypatch, change, sentence
):
    facts = json.loads(honest[1].with_suffix(".json").read_text())
    before = sum(facts["budget"]["phases"].values())
    facts["budget"]["phases"] |= change
    longer = sum(facts["budget"]["phases"].values()) - before
    ended = t.datetime.datetime.fromisoformat(facts["ended"])
    facts["ended"] = (ended + t.datetime.timedelta(seconds=longer)).isoformat()
    monkeypatch.setattr(audit, "read_run", lambda _: facts)
    status, evidence = audited(honest[1], honest[0], tmp_path)
    assert (status, failed(evidence)) == (1, {BUDGETS})
    assert sentence in evidence["conditions"][BUDGETS]["says"]


def test_an_artifact_that_does_not_fit_with_the_code_is_caught(
    honest, tmp_path, clean_data, fair_score, monkeypatch
):
    left = 16_000_000 - honest[1].stat().st_size
    for code, verdict in ((left, "legal"), (left + 1, "illegal")):
        monkeypatch.setattr(t, "code_bytes", lambda code=code: code)
        assert audited(honest[1], honest[0], tmp_path)[1]["verdict"] == verdict


def test_what_cannot_be_proven_is_a_remark(honest, dataset, tmp_path, fair_score):
    alone = tmp_path / "alone.bin"  # without the run's JSON
    alone.write_bytes(honest[1].read_bytes())
    folder = tmp_path / "scoring_only"
    folder.mkdir()
    for name in ("fineweb_val_000000.bin", "tokenizer.model"):
        (folder / name).write_bytes((dataset / name).read_bytes())
    env = {**honest[0], "DATA_PATH": str(folder)}
    status, evidence = audited(alone, env, tmp_path)
    assert (status, evidence["verdict"]) == (3, "legal with remarks")
    assert "no training shards in" in evidence["reasons"][0]
    assert "no log of the run that wrote alone.bin" in evidence["reasons"][1]


def test_an_artifact_of_another_tokenizer_cannot_be_audited(honest, tmp_path):
    header, tensors = t.unpack(honest[1].read_bytes())
    header["tokenizer_sha256"] = "0" * 64
    other = tmp_path / "other.bin"
    other.write_bytes(t.pack(tensors, header, "none"))
    with pytest.raises(t.ArtifactError, match="trained with another tokenizer"):
        audited(other, honest[0], tmp_path)


def test_an_audit_without_an_artifact_or_on_several_ranks_is_refused(tiny_env):
    with pytest.raises(t.ConfigError, match="AUDIT=True: expected ARTIFACT"):
        t.Config.from_env({**tiny_env, "AUDIT": "1"}, cuda=False)
    env = {**tiny_env, "AUDIT": "1", "ARTIFACT": "x", "WORLD_SIZE": "2"}
    with pytest.raises(t.ConfigError, match="one process"):
        t.Config.from_env(env, cuda=False)


def test_keeping_the_ledger_costs_less_than_one_percent_of_evaluation(honest):
    # Bookkeeping is linear in targets, and so is scoring: a million targets tell per target.
    ledger = t.Ledger(np.zeros(1_000_001, np.uint16), declared="")
    for first in range(0, 1_000_000, 50_000):
        ledger.record(np.arange(first, first + 50_000), torch.zeros(50_000))
    ledger.digests()
    facts = json.loads(honest[1].with_suffix(".json").read_text())
    scored = facts["budget"]["phases"]["quantized"] / facts["stages"]["quantized"]["tokens"]
    assert ledger.seconds / 1_000_000 < 0.01 * scored
    assert set(facts["ledger_seconds"]) == set(facts["stages"])


def test_the_slice_holds_the_edge_of_a_document(honest, tmp_path):
    cfg = t.Config.from_env(
        {**honest[0], "ARTIFACT": str(honest[1]), "LOG_DIR": str(tmp_path)}, cuda=False
    )
    with t.Runtime(cfg, {}) as rt:
        subject = audit.Subject(t, cfg, rt)
    assert subject.tokens[0] == t.BOS
    assert subject.tokens[subject.document_edge + 1] == t.BOS
    found = audit.changes(subject)
    for change in found:
        before = change.target + 1
        np.testing.assert_array_equal(change.tokens[:before], subject.tokens[:before])
        same = np.array_equal(change.tokens, subject.tokens)
        assert not same, change.how
    assert subject.cfg.ttt_chunk_tokens == 64
