"""Section 8: bytes out, the same values back, and nothing else accepted."""

import dataclasses
import json
import math
import struct
import subprocess
import sys
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

PACKED = ["brotli", "zstd", "lzma"]


def tensors(rows=6, cols=10, seed=0):
    """One tensor of each kind, small."""
    draw = torch.Generator().manual_seed(seed)
    codes = (12 * torch.randn(rows, cols, generator=draw)).round().clamp(-31, 31).to(torch.int8)
    return {
        "codes": t.Quantized(codes, torch.rand(rows, generator=draw).half(), 6),
        "wide": t.Quantized(codes.flip(0), torch.rand(rows, generator=draw).half(), 8),
        "half": torch.randn(3, 5, generator=draw).half(),
        "full": torch.randn(7, generator=draw),
        "scalar": torch.tensor(2.5),
    }


def frame(raw, compressor="none", **changes):
    """An artifact around any raw payload, checksum right: what an attacker could write."""
    payload = t.compress(raw, compressor)
    facts = {
        "magic": t.ARTIFACT_MAGIC,
        "version": t.ARTIFACT_VERSION,
        "codec": list(t.COMPRESSORS).index(compressor),
        "payload_bytes": len(payload),
        "raw_bytes": len(raw),
    } | changes
    blank = t.FRAME.pack(*facts.values(), 0)
    return t.FRAME.pack(*facts.values(), zlib.crc32(payload, zlib.crc32(blank))) + payload


def raw_of(table, streams, **header):
    text = json.dumps({**header, "tensors": table}).encode()
    return len(text).to_bytes(4, "little") + text + streams


@pytest.mark.parametrize("compressor", list(t.COMPRESSORS))
def test_what_is_packed_comes_back(compressor):
    stored = tensors()
    header, found = t.unpack(t.pack(stored, {"looped": True, "model": {"a": 1}}, compressor))
    assert header["looped"] is True
    assert header["model"] == {"a": 1}
    assert list(found) == list(stored)
    for name, tensor in stored.items():
        expected = tensor.dequantize() if isinstance(tensor, t.Quantized) else tensor.float()
        assert torch.equal(found[name], expected), name
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("compressor", PACKED)
def test_the_same_weights_give_the_same_bytes_in_another_process(compressor):
    blob = t.pack(tensors(), {"b": 1, "a": 2}, compressor)
    assert t.pack(tensors(), {"a": 2, "b": 1}, compressor) == blob
    code = (
        "import sys, hashlib; sys.path[:0] = ['tests', '.']; import test_artifact as a; "
        f"print(hashlib.sha256(a.t.pack(a.tensors(), dict(a=2, b=1), '{compressor}')).hexdigest())"
    )
    root = t.Path(t.__file__).parent
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == t.hashlib.sha256(blob).hexdigest()


@pytest.mark.parametrize("compressor", ["none", *PACKED])
def test_every_truncation_is_an_artifact_error(compressor):
    blob = t.pack(tensors(), {}, compressor)
    for length in range(len(blob)):
        with pytest.raises(t.ArtifactError):
            t.unpack(blob[:length])
    with pytest.raises(t.ArtifactError):
        t.unpack(blob + b"\0")


@pytest.mark.parametrize("compressor", ["none", *PACKED])
def test_every_flipped_bit_is_an_artifact_error(compressor):
    blob = t.pack(tensors(), {}, compressor)
    for bit in range(8 * len(blob)):
        broken = bytearray(blob)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(t.ArtifactError):
            t.unpack(bytes(broken))


LARGE = t.pack(tensors(rows=300, cols=400), {}, "brotli")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_larger_artifact_with_random_damage_is_an_artifact_error(data):
    broken = bytearray(LARGE)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(broken) - 1))
        broken[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 40))
    broken = bytes(broken[: len(broken) - cut])
    if broken != LARGE:
        with pytest.raises(t.ArtifactError):
            t.unpack(broken)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["none", *PACKED]))
def test_any_payload_under_a_right_checksum_is_an_artifact_error(raw, compressor):
    with pytest.raises(t.ArtifactError):
        t.unpack(frame(raw, compressor))


@pytest.mark.parametrize(
    ("table", "streams"),
    [
        ([["w", "int6", [1, 2]]], bytes([32, 0]) + b"\0\x3c"),  # a code beyond six bits
        ([["w", "int6", [1, 2]]], bytes([1, 0]) + b"\0\x7c"),  # an infinite scale
        ([["w", "float16", [1]]], b"\0\x7e"),  # not a number
        ([["w", "float32", [1]]], b"\0\0\x80\x7f"),
        ([["w", "float16", [2]]], b"\0\0"),  # too short
        ([["w", "float16", [1]]], b"\0\0\0"),  # too long
        ([["w", "float16", [1]], ["w", "float16", [1]]], b"\0\0"),  # one name twice
        ([["w", "float16", [-1]]], b""),
        ([["w", "object", [1]]], b"\0" * 8),
        ([["w", "int9", [1, 2]]], b"\0\0\0\x3c"),
        ([["w", "int6", []]], b"\0\0\0"),
        ([["w", 6, [1]]], b"\0"),
        ({"w": 1}, b""),
        (7, b""),
    ],
)
def test_a_header_that_lies_is_an_artifact_error(table, streams):
    with pytest.raises(t.ArtifactError):
        t.unpack(frame(raw_of(table, streams)))


@pytest.mark.parametrize("changes", [{"version": 2}, {"codec": 9}, {"raw_bytes": 1 << 40}])
def test_a_frame_that_is_not_ours_is_an_artifact_error_that_says_so(changes):
    with pytest.raises(t.ArtifactError, match="version|compressor|raw bytes"):
        t.unpack(frame(raw_of([], b""), **changes))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(t.ArtifactError, match="no artifact"):
        t.unpack((tmp_path / "model.pt").read_bytes())


def test_a_compressor_that_is_not_installed_is_a_config_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "brotli", None)
    with pytest.raises(
        t.ConfigError, match="COMPRESSOR=brotli: the package brotli does not import"
    ):
        t.codec("brotli")


def gaussian_codes(rows, cols, clip_sigmas=12.85, bits=6, seed=0):
    """Codes of Gaussian weights at the spread of the public systems."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    top = 2 ** (bits - 1) - 1
    return (weight * top / clip_sigmas).round().clamp(-top, top).to(torch.int8)


@pytest.mark.parametrize("compressor", ["brotli", "zstd"])
def test_codes_cost_little_more_than_their_entropy(compressor):
    codes = gaussian_codes(1024, 512)
    _, counts = torch.unique(codes, return_counts=True)
    share = counts / counts.sum()
    entropy_bytes = float(-(share * share.log2()).sum()) * codes.numel() / 8
    blob = t.pack({"w": t.Quantized(codes, torch.ones(1024).half(), 6)}, {}, compressor)
    assert entropy_bytes < len(blob) < 1.03 * entropy_bytes


def test_the_layout_of_the_streams_saves_bytes():
    # Row scales lie close together: their high bytes repeat, their low bytes do not.
    scales = (0.004 + 0.001 * torch.rand(4096, generator=torch.Generator().manual_seed(0))).half()
    interleaved = len(t.compress(scales.numpy().tobytes(), "brotli"))
    apart = len(t.compress(t.planes(scales.numpy()), "brotli"))
    assert apart < interleaved


def tiny_weights(cfg):
    model = t.GPT(cfg)
    model.init_weights(0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith(("out.weight", "down.weight")):
            weight.normal_(std=0.02, generator=draw)
    hessians = {
        n: torch.eye(m.in_features) for n, m in model.named_modules() if isinstance(m, t.Linear)
    }
    return weights, hessians


def fit(cfg, rt, log, limit):
    cfg = dataclasses.replace(cfg, artifact_limit_bytes=limit + t.code_bytes())
    weights, hessians = tiny_weights(cfg)
    header = {"model": cfg.model_settings(), "looped": True, "tokenizer_sha256": "0" * 64}
    return t.fit_artifact(weights, hessians, header, cfg, rt, log)


def test_an_artifact_over_the_limit_is_made_to_fit(tiny_cfg, rt, silent_log):
    asis = dataclasses.replace(tiny_cfg, fit_rule="wider")
    free = len(fit(asis, rt, silent_log, 10**9))
    for limit in (free, free - 1, int(0.9 * free), int(0.7 * free)):
        blob = fit(asis, rt, silent_log, limit)
        slack = t.FIT_SLACK * (limit + t.code_bytes())
        assert limit - slack <= len(blob) <= limit, "fits, and wastes little"
        t.unpack(blob)


def test_ranges_are_tightened_until_the_limit_is_used_or_they_would_clip(tiny_cfg, rt, silent_log):
    asis = dataclasses.replace(tiny_cfg, fit_rule="wider")
    free = len(fit(asis, rt, silent_log, 10**9))
    for part in (1.05, 1.2):
        limit = int(part * free)
        slack = t.FIT_SLACK * (limit + t.code_bytes())
        assert limit - slack <= len(fit(tiny_cfg, rt, silent_log, limit)) <= limit
    tightest = t.unpack(fit(tiny_cfg, rt, silent_log, 10**9))[1]["blocks.0.mlp.up.weight"]
    weight = tiny_weights(tiny_cfg)[0]["blocks.0.mlp.up.weight"]
    steps = t.TIGHTEST_SIGMAS * weight.std(dim=1, keepdim=True) / 31
    codes = tightest / steps
    torch.testing.assert_close(codes, codes.round(), atol=0.03, rtol=0)
    assert 20 < codes.abs().max() < 31.1


@pytest.mark.parametrize("bits", [4, 6])
def test_the_expected_size_is_that_of_gaussian_weights(bits):
    cfg = t.Config(num_layers=2, num_loops=0, model_dim=256, num_heads=4, num_kv_heads=2)
    cfg = dataclasses.replace(cfg, vocab_size=512, xsa_last_n=0, matrix_bits=bits)
    cfg = dataclasses.replace(cfg, parallel_residual_start=1, matrix_clip_sigmas=3.0)
    draw, stored = torch.Generator().manual_seed(0), {}
    for name, parameter in t.GPT(cfg).named_parameters():
        rule = t.rule_of(name, t.tensor_rules(cfg))
        values = torch.randn(parameter.shape, generator=draw)
        if rule.bits:
            scales = t.row_scales(values, rule.bits, rule.clip_sigmas, (), rule.smallest)
            stored[name] = t.round_to_nearest(values, scales, rule.bits)
        else:
            stored[name] = values.to(getattr(torch, rule.quantizer))
    least, expected = t.expected_bytes(cfg)
    found = sum(map(t.entropy_bytes, stored.values()))
    assert expected == pytest.approx(found, rel=0.03)
    assert least == sum(
        2 * len(v.scales) if isinstance(v, t.Quantized) else 2 * v.numel() for v in stored.values()
    )


def test_code_that_leaves_too_little_is_refused_before_training(tiny_cfg, silent_log):
    least, expected = t.expected_bytes(tiny_cfg)
    limit = t.code_bytes() + least - 1
    cfg = dataclasses.replace(tiny_cfg, artifact_limit_bytes=limit)
    with pytest.raises(
        t.ConfigError, match=f"bytes leave {least - 1}, .* alone need {least}; make"
    ):
        t.announce_size(cfg, silent_log)
    t.announce_size(dataclasses.replace(cfg, artifact_limit_bytes=limit + 1), silent_log)


def test_an_artifact_that_cannot_fit_is_an_artifact_error(tiny_cfg, rt, silent_log):
    with pytest.raises(t.ArtifactError, match="expected at most 500"):
        fit(tiny_cfg, rt, silent_log, 500)


def test_a_model_is_rebuilt_from_the_artifact_alone(tiny_cfg, rt, silent_log):
    blob = fit(tiny_cfg, rt, silent_log, 10**9)
    other = t.Config.from_env({"SMOKE": "1"}, cuda=False)  # other sizes, none set by the user
    model, cfg, header = t.load_model(blob, other, rt, "x.bin")
    assert cfg.model_settings() == tiny_cfg.model_settings()
    assert header["looped"] is True
    tokens = torch.randint(0, cfg.vocab_size, (2, 9))
    _, weights = t.unpack(blob)
    twin = t.GPT(tiny_cfg)
    twin.load_state_dict(weights)
    plan = t.depth_plan(cfg, looped=True)
    torch.testing.assert_close(model(tokens, plan=plan), twin(tokens, plan=plan))


def test_another_model_than_the_environment_asks_for_is_a_config_error(
    tiny_cfg, rt, silent_log, tiny_env
):
    blob = fit(tiny_cfg, rt, silent_log, 10**9)
    wanted = t.Config.from_env({**tiny_env, "NUM_LAYERS": "12"}, cuda=False)
    with pytest.raises(t.ConfigError, match="NUM_LAYERS=12: x.bin holds a model with 11"):
        t.load_model(blob, wanted, rt, "x.bin")


@pytest.mark.parametrize(
    "change",
    [
        {"model_dim": 64},
        {"model_dim": 10**12},
        {"model_dim": "x"},
        {"num_heads": 0},
        {"logit_softcap": math.nan},
        {"surprise": 1},
    ],
)
def test_a_header_with_other_settings_than_its_tensors_is_an_artifact_error(
    tiny_cfg, rt, silent_log, change
):
    weights, _ = tiny_weights(tiny_cfg)
    model = {**tiny_cfg.model_settings(), **change}
    blob = t.pack(weights, {"model": model, "looped": False}, "none")
    with pytest.raises((t.ArtifactError, t.ConfigError)):
        t.load_model(blob, tiny_cfg, rt, "x.bin")


def test_the_frame_is_26_bytes():
    assert t.FRAME.size == 26 == struct.calcsize("<4sBBQQI")
