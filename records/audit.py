"""Prove that the score of an artifact is legal, or state why it is not.

    AUDIT=1 ARTIFACT=logs/mine.bin python train_gpt.py

train_gpt.py passes itself as a module, so that the audit tests the very evaluator that made the
score. It scores a slice of the validation text repeatedly, with adaptation, changes the text after
some target each time, and compares the losses. Issue #1017 of openai/parameter-golf defines C1 to
C4. The evidence goes to logs/<run>.audit.json. Exit status 0: legal; 3: legal with remarks; 1:
illegal; 2: the artifact could not be audited.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

# The limits come from the repository's program: the audited program must not set its own.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import BOS, EVALUATION_SECONDS, TOTAL_BYTES, TRAINING_SECONDS  # noqa: E402

CHUNKS = 4  # of the slice: three adaptations
REPLAYS = 3  # targets per chunk whose distribution is recomputed
ALTERNATIVES = 32  # tokens whose loss is computed where the whole vocabulary would take too long
SUM_OPERATIONS = 2e10  # limit for a sum over the whole vocabulary
LONG_SUM_OPERATIONS = 3e11  # limit for the one such sum after the first adaptation
VERIFY_BYTES = 1 << 26  # training shards up to this total size are verified again
LOST_SECONDS, LOST_FRAC = 1.0, 0.01  # wall time that phases may leave unaccounted for
CONDITIONS = (
    "C1 causality",
    "C2 normalisation",
    "C3 score before update",
    "C4 single pass",
    "bytes",
    "data",
    "training",
    "budgets",
    "isolation",
)
STATUS = {"legal": 0, "legal with remarks": 3, "illegal": 1}


class Verdict(NamedTuple):
    """The result for one condition. verdict: pass, remark or fail; numbers: the evidence."""

    verdict: str
    says: str
    numbers: dict[str, Any] = {}


class Isolation:
    """While active, opening a training shard or a network connection is an error.

    Python's audit hooks see these calls of all packages; a hook cannot be removed.
    Attributes: denied, the denied attempts.
    """

    def __init__(self):
        self.active, self.denied = False, []
        sys.addaudithook(self.watch)

    def watch(self, event: str, args: tuple) -> None:
        if not self.active:
            return
        tried = ""
        if event == "open" and "fineweb_train_" in str(args[0]):
            tried = str(args[0])
        elif event == "socket.getaddrinfo":
            tried = f"the network: {args[0]}"
        elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
            tried = f"the network: {args[1]}"  # the address of a local socket is a path
        if tried:
            self.denied.append(tried)
            raise PermissionError(f"the audit denies {tried}")

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False


class Replay(NamedTuple):
    """The distribution at one target, computed from the text before it only.

    logs: (V,) log probabilities from the logits; loss: from the logits, of the actual token; sum:
    of the probabilities that the losses give, NaN without the whole vocabulary; gap: largest
    difference between a loss and the logits.
    """

    logs: Tensor
    loss: float
    sum: float
    gap: float


class Subject:
    """The artifact, a slice of its text, and evaluations of it by the program's evaluator."""

    def __init__(self, program: ModuleType, cfg: Any, rt: Any):
        self.program, self.rt = program, copy.copy(rt)
        self.rt.log = program.Log(None)  # many short evaluations: the audit shows its own progress
        stored = program.open_stored(cfg.artifact, cfg, rt)
        cfg, self.header, self.plan = stored.cfg, stored.header, stored.plan
        self.table = program.ByteTable.from_file(cfg.tokenizer_file, cfg.vocab_size)
        shards = program.find_shards(cfg.dataset_dir, "val")
        self.text = program.ValidationTokens.load(shards, self.table, seq_len=1)
        if self.header.get("tokenizer_sha256") != self.table.digest:
            found = f"trained with another tokenizer than {cfg.tokenizer_file}"
            raise program.ArtifactError(f"{cfg.artifact}: {found}; set TOKENIZER_PATH")
        self.model = stored.model(program.choose_backend(cfg, rt), rt)
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.forward = functools.partial(self.model, plan=self.plan)
        self.choose_slice(cfg)

    def choose_slice(self, cfg: Any) -> None:
        """Choose a slice in which a document ends, and a window and chunk length that fit it."""
        total = min(cfg.audit_tokens, len(self.text.target_bytes))
        chunk = min(cfg.ttt_chunk_tokens, max(total // CHUNKS, 2))
        length = min(cfg.eval_seq_len, chunk // 2)
        starts = np.flatnonzero(self.text.tokens == BOS)
        lengths = np.diff(starts, append=len(self.text.tokens))
        fits = (lengths > chunk // 4) & (lengths < total - chunk)
        fits &= starts + total < len(self.text.tokens)
        first = int(starts[np.argmax(fits)]) if fits.any() else 0
        self.tokens = self.text.tokens[first : first + total + 1]
        edges = np.flatnonzero(self.tokens[1:] == BOS)
        self.document_edge = int(edges[0]) if len(edges) else total // 2
        self.spare = np.roll(self.text.tokens, -first - total)  # begins with text after the slice
        self.cfg = dataclasses.replace(
            cfg,
            eval_seq_len=length,
            eval_stride=min(cfg.eval_stride, max(length // 4, 1)),
            ttt_chunk_tokens=chunk,
            micro_batch_tokens=chunk,
            # The learning rate schedule uses the full length, even where the text is truncated.
            ttt_train_chunks=cfg.ttt_train_chunks or -(-total // chunk),
            eval_wallclock_seconds=0.0,
        )

    def score(
        self,
        tokens: np.ndarray,
        *,
        adapts: bool = True,
        replays: dict[int, int] | None = None,
        **changes: Any,
    ) -> Watch:
        """Score (n + 1,) tokens with the artifact's weights and `changes` to the settings.

        replays: {target to replay: token limit of the forwards for a whole sum}.
        """
        cfg, parameters = dataclasses.replace(self.cfg, **changes), self.model.named_parameters()
        with torch.no_grad():
            for name, parameter in parameters:
                parameter.copy_(self.weights[name])
        self.model.requires_grad_(True)
        learner = self.program.Static(self.model, self.plan)
        if adapts and cfg.ttt_enabled:
            learner = self.program.GlobalTTT(self.model, self.plan, cfg, self.rt)
        watch = Watch(self, learner, tokens, cfg)
        total, stride, chunk = len(tokens) - 1, cfg.eval_stride, cfg.ttt_chunk_tokens
        protocol = self.program.Windows(total, cfg, stride, chunk)
        val = self.program.ValidationTokens(tokens, np.ones(total, np.int16), 0)
        watch.replaying = replays or {}
        watch.replay_chunk(0)
        with watch.counting_steps():
            _, watch.ledger = self.program.evaluate("audit", watch, protocol, val, self.rt)
        return watch

    @torch.no_grad()
    def replay(self, tokens: np.ndarray, target: int, start: int, most: int) -> Replay:
        """The distribution at a target by the current weights, from the text before it only.

        start: of its window; most: token limit of the forwards for the whole vocabulary.
        """
        context = torch.from_numpy(tokens[start : target + 1].astype(np.int64))
        context = context.to(self.rt.device)
        draw = np.random.default_rng([self.cfg.seed, target])
        vocabulary, came = len(self.table.base_bytes), int(tokens[target + 1])
        logs = self.forward(context[None])[0, -1].double().log_softmax(0)
        whole = vocabulary * len(context) <= most
        some = np.append(draw.integers(0, vocabulary, ALTERNATIVES), came)
        asked = torch.from_numpy(np.arange(vocabulary) if whole else some).to(self.rt.device)
        losses = []
        for part in asked.split(256):
            rows = context.expand(len(part), -1)
            targets = torch.cat([rows[:, 1:], part[:, None]], dim=1)
            losses.append(self.forward(rows, targets, reduction="none", tail=1)[:, 0].double())
        losses = torch.cat(losses)
        total = float(losses.neg().exp().sum()) if whole else math.nan
        return Replay(logs, -float(logs[came]), total, float((losses + logs[asked]).abs().max()))


class Watch:
    """Sits between evaluator and learner in one evaluation and records what happens.

    All that it does not watch is the learner's own, so that a trick meets what it expects.
    Attributes: ledger, set after scoring; rows, number of windows scored, without padding; steps,
    number of optimizer steps; trouble, violations seen during scoring.
    """

    def __init__(self, subject: Subject, learner: Any, tokens: np.ndarray, cfg: Any):
        self.subject, self.learner, self.tokens, self.cfg = subject, learner, tokens, cfg
        self.ledger, self.rows, self.steps = None, 0, 0
        self.trouble: list[str] = []
        self.weights = self.fingerprint()
        # For replays: the window of each target comes from the protocol, not from the evaluator.
        windows = subject.program.sliding_windows
        self.windows = list(windows(len(tokens) - 1, cfg.eval_seq_len, cfg.eval_stride))
        self.replaying: dict[int, int] = {}
        self.replays: dict[int, Replay] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    def fingerprint(self) -> list[float]:
        return [float(p.detach().sum()) for p in self.subject.model.parameters()]

    @contextlib.contextmanager
    def counting_steps(self) -> Iterator[None]:
        """Count the steps of all optimizers."""

        def count(*_: Any) -> None:
            self.steps += 1

        handle = register_optimizer_step_post_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def score(self, windows: Tensor, tail: int) -> Tensor:
        """Score as the learner does, and count the windows."""
        first = torch.from_numpy(self.tokens[: windows.shape[1]].astype(np.int64))
        same = windows[:, : len(first)] == first.to(windows.device)
        self.rows += int((~same.all(dim=1)).sum())
        self.note_moved_weights()
        return self.learner.score(windows, tail)

    def note_moved_weights(self) -> None:
        if self.fingerprint() != self.weights:
            self.trouble.append("the weights changed between adaptation and scoring")
            self.weights = self.fingerprint()

    def learn(self, turn: Any, draw: Callable[[], np.ndarray], pace: Any) -> None:
        """Learn as the learner does, then replay targets of the next chunk."""
        self.learner.learn(turn, draw, pace)
        self.weights = self.fingerprint()
        self.replay_chunk(turn.number + 1)

    def replay_chunk(self, number: int) -> None:
        """Replay targets of a chunk with the weights before it is scored."""
        for target, most in self.replaying.items():
            window = next(w for w in self.windows if w.stop > target)
            if window.first_scored // self.cfg.ttt_chunk_tokens == number:
                replay = self.subject.replay(self.tokens, target, window.start, most)
                self.replays[target] = replay


class Change(NamedTuple):
    """The text, changed after a target; losses before `target` must stay the same."""

    how: str
    target: int
    tokens: np.ndarray


def replay_targets(subject: Subject) -> dict[int, int]:
    """{target: token limit of a whole sum}, for the first and some other targets of each chunk.

    The target after the first adaptation has a higher limit. Target 0, which has one token of
    context, always gets a whole sum.
    """
    vocabulary, model = len(subject.table.base_bytes), subject.model
    per_token = model.flops_per_token(subject.plan, subject.cfg.eval_seq_len) / 3  # forward alone
    total, chunk = len(subject.tokens) - 1, subject.cfg.ttt_chunk_tokens
    draw, found = np.random.default_rng([subject.cfg.seed, total, 1]), {}
    for first in range(0, total, chunk):
        others = draw.integers(first, min(first + chunk, total), REPLAYS - 1).tolist()
        for target in sorted({first, *others}):
            operations = LONG_SUM_OPERATIONS if target == chunk else SUM_OPERATIONS
            found[target] = int(operations / per_token)
    return found | {0: max(found[0], vocabulary)}


ALONE = "this one target"


def changes(subject: Subject) -> list[Change]:
    """Each kind of change, early and late, inside chunks and at edges of chunks and documents."""
    tokens, total, chunk = subject.tokens, len(subject.tokens) - 1, subject.cfg.ttt_chunk_tokens
    draw = np.random.default_rng([subject.cfg.seed, total])

    def inside(number: int) -> int:
        first, stop = number * chunk + 1, min((number + 1) * chunk, total) - 1
        return int(draw.integers(first, max(stop, first + 1)))

    def replaced(target: int, suffix: np.ndarray) -> np.ndarray:
        return np.concatenate([tokens[: target + 1], suffix])

    def random(target: int) -> np.ndarray:
        return replaced(target, draw.permutation(subject.spare)[: total - target])

    def other(target: int) -> np.ndarray:
        return replaced(target, subject.spare[: total - target])

    last = (total - 1) // chunk
    places = [
        ("random tokens", inside(0), random),
        ("another text", min(chunk, total - 1), other),
        ("truncation", inside(min(1, last)), lambda target: tokens[: target + 1]),
        ("random tokens at a document edge", subject.document_edge, random),
        ("another text", inside(min(2, last)), other),
    ]
    found = [Change(how, target, make(target)) for how, target, make in places if target > 0]
    single, target = tokens.copy(), max(t for t in replay_targets(subject) if t < 2 * chunk)
    single[target + 1] = next(t for t in subject.spare if t not in (tokens[target + 1], tokens[0]))
    return [*found, Change(ALONE, target, single)]


# Conditions ----------------------------------------------------------------------------------


def check_causality(
    base: Watch, runs: Sequence[tuple[Change, Watch]], noise: float, tolerance: float
) -> Verdict:
    """C1: losses before a change of the text equal those of the unchanged text.

    If only one target is changed, its distribution must stay the same too: the loss of the new
    token must equal the loss that this token has in the unchanged text.
    """
    worst, wrong = 0.0, []
    for change, run in runs:
        if change.how == ALONE and change.target in run.replays:
            then, now = (watch.replays[change.target].logs for watch in (base, run))
            expected = -float(then[int(change.tokens[change.target + 1])])
            found = float(run.ledger.nats[change.target])
            if not (then - now).abs().max() <= noise or not abs(found - expected) <= tolerance:
                wrong.append(f"the distribution at target {change.target} depends on that target")
        before = slice(0, change.target)
        gaps = (run.ledger.nats[before] - base.ledger.nats[before]).abs()
        gap = float(gaps.max()) if len(gaps) else 0.0
        worst = max(worst, gap)
        if not gap <= noise:
            first = int((gaps > noise).nonzero()[0])
            wrong.append(f"{change.how} from target {change.target} changed the loss of {first}")
    moved = [run for change, run in runs if len(run.ledger.nats) > change.target]
    if not any(
        not torch.equal(r.ledger.nats, base.ledger.nats[: len(r.ledger.nats)]) for r in moved
    ):
        wrong.append("no change affected any loss: another text than the given one was scored")
    numbers = dict(
        changes=[[change.how, change.target] for change, _ in runs],
        largest_difference=worst,
        allowed=noise,
    )
    says = f"{len(runs)} changes of later text, with adaptation: earlier losses differ by {worst:g}"
    return Verdict("fail" if wrong else "pass", "; ".join(wrong) or says, numbers)


def check_normalisation(base: Watch, tolerance: float) -> Verdict:
    """C2: distributions sum to 1 and contain the reported losses."""
    wrong, reported = [], base.ledger.nats.double()
    sums = [r.sum for r in base.replays.values() if not math.isnan(r.sum)]
    gaps = [max(r.gap, abs(r.loss - float(reported[t]))) for t, r in base.replays.items()]
    for target, replay in base.replays.items():
        loss = float(reported[target])
        if not abs(replay.loss - loss) <= tolerance:
            wrong.append(
                f"target {target}: {loss:.5f} nats reported, {replay.loss:.5f} by the "
                "distribution given the text before it"
            )
        elif not (math.isnan(replay.sum) or abs(replay.sum - 1) <= tolerance):
            wrong.append(f"target {target}: the probabilities sum to {replay.sum:.5f}")
        elif not replay.gap <= tolerance:
            wrong.append(f"target {target}: losses of other tokens disagree with the logits")
    worst = max((abs(s - 1) for s in sums), default=0.0)
    numbers = dict(
        positions=len(base.replays),
        whole_sums=len(sums),
        largest_sum_error=worst,
        largest_loss_gap=max(gaps, default=0.0),
        allowed=tolerance,
    )
    says = f"{len(base.replays)} distributions given the text before them agree with the reported "
    says += f"losses within {max(gaps, default=0.0):.1e}; {len(sums)} sum to 1 within {worst:.1e}"
    return Verdict("fail" if wrong else "pass", "; ".join(wrong[:3]) or says, numbers)


def check_updates(base: Watch, still: Watch | None, static: Watch) -> Verdict:
    """C3: text is learned from after it is scored; at learning rate 0 no loss changes."""
    ledger, wrong = base.ledger, list(dict.fromkeys(base.trouble))
    early = [update for update in ledger.updates if update[1] > update[2]]
    if early:
        wrong.append(f"text up to target {early[0][1]} used when only {early[0][2]} were scored")
    if base.steps != len(ledger.updates):
        wrong.append(f"{base.steps} optimizer steps, {len(ledger.updates)} in the ledger")
    if still is not None and not torch.equal(still.ledger.nats, static.ledger.nats):
        gap = float((still.ledger.nats - static.ledger.nats).abs().max())
        wrong.append(
            f"at learning rate 0 the adapted losses differ from the static ones by {gap:g}"
        )
    numbers = dict(updates=len(ledger.updates), optimizer_steps=base.steps)
    says = f"{base.steps} optimizer steps, all on scored text; learning rate 0 changes no loss"
    if still is None:
        says = "no adaptation"
    return Verdict("fail" if wrong else "pass", "; ".join(wrong) or says, numbers)


def check_single_pass(base: Watch) -> Verdict:
    """C4: every target is counted once, in order, in a single forward."""
    ledger, cfg, wrong = base.ledger, base.cfg, []
    total = len(base.tokens) - 1
    once = int((ledger.times == 1).sum())
    if once != total or len(ledger.nats) != total:
        wrong.append(f"{once} of {total} targets are counted exactly once")
    order = hashlib.sha256(np.arange(total, dtype="<u4").tobytes()).hexdigest()
    if ledger.digests()["order_sha256"] != order:
        wrong.append("targets are not scored from left to right")
    program = base.subject.program
    windows = list(program.sliding_windows(total, cfg.eval_seq_len, cfg.eval_stride))
    if base.rows != len(windows) - 1:  # the first also pads forwards, so it is not counted
        wrong.append(
            f"{base.rows} windows after the first were scored, expected {len(windows) - 1}: text "
            "is not scored exactly once"
        )
    numbers = dict(targets=total, counted_once=once, windows=base.rows + 1, order_sha256=order)
    says = f"{total} targets counted once, in order, in {len(windows)} windows"
    return Verdict("fail" if wrong else "pass", "; ".join(wrong) or says, numbers)


def check_bytes(subject: Subject) -> Verdict:
    """The byte count of each document is the length of its decoded text."""
    tokens, charged, table = subject.text.tokens, subject.text.target_bytes, subject.table
    if table.has_marks:
        return Verdict("remark", "only data/verify_dataset.py checks the byte sidecar")
    starts = np.flatnonzero(tokens == BOS)
    paid = np.add.reduceat(np.append(charged, 0), starts)  # of its targets and the next BOS
    tokenizer = subject.cfg.tokenizer_file
    texts = subject.program.decode_documents(tokens, tokenizer)
    wrong, total = [], 0
    for number, (text, bytes_paid) in enumerate(zip(texts, paid.tolist(), strict=True)):
        total += len(text)
        if len(text) != bytes_paid:
            wrong.append(f"document {number}: {bytes_paid} bytes counted, {len(text)} in its text")
    says = f"{len(starts)} documents, {total} bytes counted and decoded"
    more = f"; {len(wrong) - 2} more" if len(wrong) > 2 else ""
    numbers = dict(documents=len(starts), bytes=total, wrong=len(wrong))
    return Verdict("fail" if wrong else "pass", "; ".join(wrong[:2]) + more or says, numbers)


def check_data(program: ModuleType, cfg: Any, run: dict[str, Any]) -> Verdict:
    """No validation document is in the training shards, by data/verify_dataset.py or its file."""
    then, settings = run.get("data", {}), run.get("config", {})
    named = {n: settings[n]["value"] for n in ("data_path", "data_dir") if n in settings}
    folder = dataclasses.replace(cfg, **named).dataset_dir
    train = list(folder.glob("fineweb_train_[0-9]*.bin"))
    if not train:
        verified = then.get("data_verified")
        says = f"no training shards in {folder}; the log of the run says data_verified: {verified}"
        return Verdict("remark", says, dict(data_fingerprint=then.get("data_fingerprint")))
    proof = program.data_proof(folder, cfg.tokenizer_file, trains=True)
    if then.get("data_fingerprint", proof["data_fingerprint"]) != proof["data_fingerprint"]:
        return Verdict("remark", f"{folder} is not the set of the run", proof)
    # Beside the program, or in the repository that contains the record's folder.
    above = Path(program.__file__).resolve().parents[:4]
    tools = [folder / "data" / "verify_dataset.py" for folder in above]
    tool = next((tool for tool in tools if tool.exists()), None)
    small = sum(path.stat().st_size for path in train) <= VERIFY_BYTES
    if small and tool:
        return verify(tool, folder, cfg.tokenizer_file, proof)
    if proof["data_verified"]:
        return Verdict("pass", f"{folder / 'verified.json'} matches the shards", proof)
    return Verdict(
        "remark", f"not proven: run python data/verify_dataset.py {folder} and audit again", proof
    )


def verify(tool: Path, folder: Path, tokenizer: Path, proof: dict[str, Any]) -> Verdict:
    """Run the tool on links to the set, so that it writes nothing to the set."""
    with tempfile.TemporaryDirectory() as place:
        for path in folder.resolve().iterdir():
            if path.suffix == ".bin" or path.name == "manifest.json":
                (Path(place) / path.name).symlink_to(path)
        named = ["--tokenizer", str(tokenizer.resolve()), "--quiet", "--workers", "1"]
        done = subprocess.run(
            [sys.executable, str(tool), place, *named], capture_output=True, text=True
        )
    if done.returncode == 0:
        says = "data/verify_dataset.py: clean, no validation document in the training shards"
        return Verdict("pass", says, proof)
    rows = [line.strip() for line in done.stdout.splitlines() if line.startswith("FAIL")]
    said = rows or done.stderr.strip().splitlines()[-1:]  # without rows the tool could not run
    verdict = "fail" if rows else "remark"
    return Verdict(verdict, "data/verify_dataset.py: " + "; ".join(said), proof)


def check_training(subject: Subject, run: dict[str, Any]) -> Verdict:
    """The weights were not trained on the validation text."""
    reasons = list(subject.header.get("invalid_for_records", ()))
    reasons += run.get("invalid_for_records", [])
    config = {name: fact["value"] for name, fact in run.get("config", {}).items()}
    if config.get("prequant_ttt_epochs"):
        epochs = config["prequant_ttt_epochs"]
        reasons.append(f"PREQUANT_TTT_EPOCHS={epochs}: fine-tuned on the validation text")
    says = "neither the artifact's header nor the run's log marks it as invalid"
    return Verdict("fail" if reasons else "pass", "; ".join(dict.fromkeys(reasons)) or says)


def check_budgets(program: ModuleType, artifact: Path, run: dict[str, Any]) -> list[Verdict]:
    """Bytes on disk, and the seconds in the run's log."""
    code, size = program.code_bytes(), artifact.stat().st_size
    total, wrong, remarks = code + size, [], []
    if total > TOTAL_BYTES:
        wrong.append(f"code {code} + artifact {size} = {total} bytes, limit {TOTAL_BYTES}")
    numbers: dict[str, Any] = dict(code_bytes=code, artifact_bytes=size, total_bytes=total)
    says = f"{total} of {TOTAL_BYTES} bytes"
    if run.get("artifact", {}).get("sha256") != program.file_sha256(artifact):
        remarks.append(f"no log of the run that wrote {artifact.name}: its seconds are unknown")
    else:
        seconds, numbers["phases"] = spent(run), run["budget"]["phases"]
        numbers |= seconds
        limits = dict(training=TRAINING_SECONDS, evaluation=EVALUATION_SECONDS)
        for name, limit in limits.items():
            if not seconds[name] <= limit:
                wrong.append(f"{name} took {seconds[name]:.1f} s, limit {limit:g} s")
        lost, allowed = seconds["lost"], max(LOST_SECONDS, LOST_FRAC * seconds["wall"])
        if not abs(lost) <= allowed:
            wrong.append(
                f"{lost:.1f} of {seconds['wall']:.1f} s are in no phase: a timer was stopped"
            )
        says += f", training {seconds['training']:.1f} s, evaluation {seconds['evaluation']:.1f} s"
        if run["code"]["sha256"] != program.file_sha256(Path(program.__file__)):
            remarks.append("the run was made by other code than the audit")
    said = "; ".join(wrong) or says
    return [Verdict("fail" if wrong else "pass", said, numbers)] + [
        Verdict("remark", text) for text in remarks
    ]


def spent(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of a run by its log; lost: wall time that is in no phase.

    The phases are listed here again: the program must not decide what its own limits cover.
    """
    phases = run["budget"]["phases"]
    started, ended = (datetime.datetime.fromisoformat(run[key]) for key in ("started", "ended"))
    wall = (ended - started).total_seconds()
    return dict(
        training=sum(phases.get(name, 0.0) for name in ("train", "calibration")),
        evaluation=sum(
            seconds
            for name, seconds in phases.items()
            if name == "decompression" or name.startswith("quantized")
        ),
        wall=wall,
        lost=wall - sum(phases.values()),
    )


# Main ----------------------------------------------------------------------------------------


def read_run(artifact: Path) -> dict[str, Any]:
    """The JSON beside the artifact of a run; empty if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(artifact.with_suffix(".json").read_text(encoding="utf-8"))
    return {}


def judge_score(subject: Subject, log: Any) -> dict[str, Verdict]:
    """Check C1 to C4 by evaluations of the slice."""
    show, exact = log.progress("audit"), subject.rt.device.type == "cpu"
    wanted, done = changes(subject), 0
    jobs = len(wanted) + 3 + (not exact)

    def score(tokens: np.ndarray, **options: Any) -> Watch:
        nonlocal done
        watch = subject.score(tokens, **options)
        done += 1
        show(done / jobs)
        return watch

    base = score(subject.tokens, replays=replay_targets(subject))
    tolerance = 1e-4 if subject.rt.compute_dtype == torch.float32 else 3e-2
    noise = 0.0
    if not exact:  # GPU kernels add in any order: allow the difference of two equal runs
        again = score(subject.tokens)
        noise = max(1e-6, 4 * float((again.ledger.nats - base.ledger.nats).abs().max()))
    runs = []
    for change in wanted:
        replays = {change.target: 0} if change.how == ALONE else None
        runs.append((change, score(change.tokens, replays=replays)))
    static = score(subject.tokens, adapts=False)
    still = score(subject.tokens, ttt_lr=0.0) if subject.cfg.ttt_enabled else None
    return {
        "C1 causality": check_causality(base, runs, noise, tolerance),
        "C2 normalisation": check_normalisation(base, tolerance),
        "C3 score before update": check_updates(base, still, static),
        "C4 single pass": check_single_pass(base),
    }


def audit(program: ModuleType, cfg: Any, rt: Any) -> int:
    """Audit cfg.artifact with the evaluator of `program`; returns the exit status.

    Args: program is train_gpt itself, as a module; cfg and rt are its Config and Runtime.
    """
    artifact, isolation = Path(cfg.artifact), Isolation()
    run = read_run(artifact)
    conditions: dict[str, list[Verdict]] = {}
    subject = None
    with isolation():
        try:
            subject = Subject(program, cfg, rt)
            conditions |= {name: [found] for name, found in judge_score(subject, rt.log).items()}
        except program.LedgerError as error:
            name = next(name for name in CONDITIONS if name.startswith(error.condition))
            conditions[name] = [Verdict("fail", f"the ledger stopped the evaluation: {error}")]
        except (PermissionError, program.UserError):
            if not isolation.denied:
                raise
    if subject is not None:
        conditions["bytes"] = [check_bytes(subject)]
        conditions["data"] = [check_data(program, subject.cfg, run)]
        conditions["training"] = [check_training(subject, run)]
        conditions["budgets"] = check_budgets(program, artifact, run)
    tried = "; ".join(dict.fromkeys(isolation.denied))
    says = "the artifact was opened and scored without training shards or network"
    conditions["isolation"] = [
        Verdict("fail" if tried else "pass", f"scoring needs {tried}" if tried else says)
    ]
    facts = dict(run={key: run.get(key) for key in ("run_id", "started", "result")})
    facts["audited_on"] = rt.describe()
    if subject is not None:
        names = ("eval_seq_len", "eval_stride", "ttt_chunk_tokens", "ttt_enabled", "ttt_epochs")
        facts["slice"] = {name: getattr(subject.cfg, name) for name in names}
        facts["slice"]["targets"] = len(subject.tokens) - 1
    return conclude(program, artifact, conditions, facts, rt)


def conclude(
    program: ModuleType,
    artifact: Path,
    conditions: dict[str, list[Verdict]],
    facts: dict[str, Any],
    rt: Any,
) -> int:
    """Print the verdicts, write the evidence, and return the exit status."""
    order, found, reasons = ("pass", "remark", "fail"), {}, []
    for name in CONDITIONS:
        verdicts = conditions.get(name) or [Verdict("remark", "not checked")]
        worst = max((v.verdict for v in verdicts), key=order.index)
        says = "; ".join(v.says for v in verdicts)
        found[name] = dict(verdict=worst, says=says)
        for verdict in verdicts:
            found[name] |= verdict.numbers
        reasons += [f"{name}: {v.says}" for v in verdicts if v.verdict == worst != "pass"]
        rt.log.line(f"audit {name}: {worst}  {says}")
    worst = max((fact["verdict"] for fact in found.values()), key=order.index)
    verdict = dict(zip(order, STATUS, strict=True))[worst]
    files = dict(artifact=artifact, code=Path(program.__file__), tool=Path(__file__))
    digests = {
        name: dict(bytes=path.stat().st_size, sha256=program.file_sha256(path))
        for name, path in files.items()
    }
    rt.log.put(verdict=verdict, reasons=reasons, conditions=found, **digests, **facts)
    rt.log.line(f"audit verdict: {verdict}  evidence: {rt.folder.path('json')}")
    return STATUS[verdict]
