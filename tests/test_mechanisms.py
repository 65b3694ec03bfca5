"""What systems #578 and #1487 add to training and adaptation, each against a naive version."""

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from test_evaluation import small_model, text_of
from test_model import WIDE

import train_gpt as t

# --- fine-tuning ---


def test_fine_tuning_on_the_validation_text_equals_a_naive_loop(tiny_cfg, rt):
    changes = dict(prequant_ttt_epochs=3, prequant_ttt_lr=0.01, prequant_ttt_batch_tokens=64)
    changes |= dict(prequant_ttt_freeze_blocks=2)
    cfg, val = dataclasses.replace(tiny_cfg, **changes), text_of(tiny_cfg, 170)
    model, plan = small_model(cfg), t.depth_plan(cfg, looped=True)
    twin = copy.deepcopy(model)
    t.fine_tune_on_validation(model, val, cfg, rt, plan=plan)
    tokens = torch.from_numpy(val.tokens.astype(np.int64))
    rows = [(tokens[s : s + 32], tokens[s + 1 : s + 33]) for s in range(0, 160, 32)]
    moving = [p for n, p in twin.named_parameters() if not n.startswith(("blocks.0.", "blocks.1."))]
    adam = torch.optim.AdamW(moving, weight_decay=0.0)
    for epoch in range(3):
        rate = 0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * epoch / 3))
        adam.param_groups[0]["lr"] = rate
        for batch in (rows[:2], rows[2:4], rows[4:]):
            twin.zero_grad()
            x, y = (torch.stack(part) for part in zip(*batch, strict=True))
            twin(x, y, plan=plan).backward()
            torch.nn.utils.clip_grad_norm_(moving, 1.0)
            adam.step()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-2, atol=5e-4, msg=name)
        assert p.requires_grad, "nothing stays frozen"


# --- test-time training ---


def scored(learner, val, cfg, rt, chunk=0):
    """The loss of each target."""
    protocol = t.Windows(len(val.target_bytes), cfg, cfg.eval_stride, chunk)
    return t.evaluate("test", learner, protocol, val, rt)[1].nats.numpy()


def adapted(cfg, rt, val):
    model = small_model(cfg)
    ttt = t.GlobalTTT(model, t.depth_plan(cfg, looped=True), cfg, rt)
    return scored(ttt, val, cfg, rt, cfg.ttt_chunk_tokens), model, ttt


def frozen(name):
    still = ("blocks.0.", "blocks.1.", "head.", "bigram.", "value_embedding.")
    return name.startswith(still) and name != "value_embedding.layer_scales"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_adaptation_with_an_average_equals_a_naive_score_first_loop(tiny_cfg, rt, optimizer):
    # System #578: train the first chunks, score with an average that moves once per chunk.
    rate = {"sgd": 0.1, "adamw": 0.003}[optimizer]
    changes = dict(ttt_lr=rate, ttt_freeze_blocks=2, ttt_freeze_embeddings=True)
    changes |= dict(ttt_train_chunks=3, ttt_ema_decay=0.6, ttt_optimizer=optimizer, **WIDE)
    cfg = dataclasses.replace(tiny_cfg, **changes)
    chunk, plan = cfg.ttt_chunk_tokens, t.depth_plan(cfg, looped=True)
    val = text_of(cfg, 5 * chunk)
    found, model, ttt = adapted(cfg, rt, val)
    assert ttt.adapted == 3
    twin, average = small_model(cfg), small_model(cfg)
    moving = [p for n, p in twin.named_parameters() if not frozen(n)]
    adam = functools.partial(torch.optim.AdamW, weight_decay=0.0)
    sgd = functools.partial(torch.optim.SGD, momentum=cfg.ttt_momentum)
    steps = {"sgd": sgd, "adamw": adam}[optimizer](moving, lr=rate)
    expected, tokens = np.zeros(5 * chunk), torch.from_numpy(val.tokens.astype(np.int64))
    for number in range(5):
        part = slice(number * chunk, (number + 1) * chunk)
        expected[part] = scored(t.Static(average, plan), val, cfg, rt)[part]
        steps.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * number / 2))
        for _ in range(cfg.ttt_epochs if number < 3 else 0):
            twin.zero_grad()
            starts = range(part.start, part.stop, 32)
            x, y = (torch.stack([tokens[s + d : s + d + 32] for s in starts]) for d in (0, 1))
            twin(x, y, plan=plan).backward()
            torch.nn.utils.clip_grad_norm_(moving, cfg.ttt_grad_clip)
            steps.step()
        for a, p in zip(average.parameters(), twin.parameters(), strict=True):
            if number < 3:
                a.data = 0.6 * a.data + 0.4 * p.data
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)
    start = dict(small_model(cfg).named_parameters())
    for (name, p), a in zip(model.named_parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(p, a, rtol=1e-2, atol=1e-3, msg=name)
        assert torch.equal(p, start[name]) == frozen(name), name


def test_an_average_that_forgets_all_scores_as_without_one(tiny_cfg, rt):
    val = text_of(tiny_cfg, 4 * tiny_cfg.ttt_chunk_tokens)
    losses = [
        adapted(dataclasses.replace(tiny_cfg, ttt_lr=0.1, ttt_ema_decay=d), rt, val)[0]
        for d in (0.0, 1e-9, 0.9)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert np.abs(losses[0] - losses[2]).max() > 0.01


@pytest.mark.parametrize("setting", ["ttt_ema_decay", "ttt_optimizer", "ttt_train_chunks"])
def test_no_target_sees_later_text_through_any_rule_of_adaptation(tiny_cfg, rt, setting):
    values = dict(ttt_ema_decay=0.5, ttt_optimizer="adamw", ttt_train_chunks=2)
    cfg = dataclasses.replace(tiny_cfg, ttt_lr=0.05, **{setting: values[setting]})
    chunk = cfg.ttt_chunk_tokens
    val = text_of(cfg, 4 * chunk)
    before = adapted(cfg, rt, val)[0]
    for place in (chunk, 2 * chunk - 1, 3 * chunk + 5):
        tokens = val.tokens.copy()
        tokens[place + 1 :] = (tokens[place + 1 :] - 4 + 1) % (cfg.vocab_size - 4) + 4
        changed = t.ValidationTokens(tokens, val.target_bytes, 0)
        after = adapted(cfg, rt, changed)[0]
        assert np.array_equal(after[:place], before[:place])
        assert not np.array_equal(after[place:], before[place:])
