"""Section 5: one table claims every tensor, and says who optimizes it and how it is stored."""

import dataclasses

import numpy as np
import pytest
import torch
from test_systems import COMMANDS, config

import train_gpt as t

MATRICES = ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.down"]
BLOCKS = [f"blocks.{layer}.{name}.weight" for layer in range(11) for name in MATRICES]
BLOCK_VECTORS = ["attn_scale", "mlp_scale", "resid_mix", "attn.q_gain"]
VECTORS = [f"blocks.{layer}.{name}" for layer in range(11) for name in BLOCK_VECTORS]
VALUES = ["value_embedding.scale", "value_embedding.layer_scales"]
LANES = [*VECTORS, "skip_weights", "skip_gates", "lane_merge", *VALUES]
LEVELS_6, LEVELS_8, TINY = 1 / 31, 1 / 127, 2.0**-14
FLOATS = t.AsFloats("float16")


def table_of(cfg):
    """{name: (group, store)} of every tensor, without allocating the model."""
    with torch.device("meta"):
        rows = t.GPT(cfg).rows
    return {name: tuple(row[1:]) for name, row in rows.items()}


def expected(blocks, head, tables, projections, vectors):
    """What the published programs do: Muon for matrices, AdamW for tables and for vectors."""
    return (
        dict.fromkeys(BLOCKS, ("matrix", blocks))
        | {"head.weight": ("embedding", head)}
        | {name: ("embedding", head._replace(gptq="")) for name in tables}
        | dict.fromkeys(projections, ("matrix", FLOATS))
        | dict.fromkeys(vectors, ("scalar", FLOATS))
    )


STEPS_578 = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
EXPECTED = {
    "578": expected(
        t.AsCodes(6, "ascending", 12.85, STEPS_578, LEVELS_6),
        t.AsCodes(8, "", 20.0, (0.9999984,), LEVELS_8),
        ["bigram.table", "value_embedding.table"],
        ["bigram.proj.weight", "value_embedding.proj.weight"],
        [*VECTORS, *VALUES, "bigram.scale", "smear_gate", "skip_weights"],
    ),
    "1487": expected(
        t.AsCodes(6, "descending", 12.85, (), LEVELS_6),
        t.AsCodes(8, "", 20.0, (), LEVELS_8),
        ["value_embedding.table"],
        ["value_embedding.proj.weight"],
        LANES,
    ),
    "1493": expected(
        t.AsCodes(6, "descending", 12.85, (), TINY),
        t.AsCodes(8, "descending", 20.0, (), TINY),
        [],
        [],
        [*VECTORS, "skip_weights", "skip_gates"],
    ),
}
EXPECTED["1487 legal"] = EXPECTED["1487"]


@pytest.mark.parametrize("system", COMMANDS)
def test_every_tensor_of_every_system_has_the_group_and_the_store_of_its_publication(system):
    assert table_of(config(system)) == EXPECTED[system]


def test_the_first_row_that_matches_a_whole_name_claims_it():
    table = (t.Row("a", "one", FLOATS), t.Row("a|b.*", "two", FLOATS), t.Row(".*", "rest", FLOATS))
    found = {name: t.find_row(name, table).group for name in ("a", "b", "bc", "aa", "cb")}
    assert found == {"a": "one", "b": "two", "bc": "two", "aa": "rest", "cb": "rest"}
    with pytest.raises(StopIteration):
        t.find_row("c", table[:2])


@pytest.mark.parametrize("name", ["head.weight2", "xhead.weight", "blocks.x.attn.q.weight"])
def test_a_name_that_only_begins_or_ends_like_a_matrix_is_a_vector(name):
    assert t.find_row(name, t.tensor_table(t.Config())).group == "scalar"


def test_bits_and_ranges_follow_the_settings():
    cfg = t.Config(matrix_bits=5, matrix_clip_sigmas=9.0, embed_bits=7, embed_clip_sigmas=14.0)
    rows = table_of(dataclasses.replace(cfg, gptq_order="ascending"))
    assert rows["blocks.7.mlp.up.weight"][1] == t.AsCodes(5, "ascending", 9.0, (), TINY)
    assert rows["head.weight"][1] == t.AsCodes(7, "ascending", 14.0, (), TINY)
    assert [t.AsCodes(bits).top for bits in range(2, 9)] == [1, 3, 7, 15, 31, 63, 127]


@pytest.mark.parametrize(
    ("words", "sensitive"),
    [
        ("", lambda name: False),
        (",", lambda name: False),
        ("attn.v", lambda name: "attn.v" in name),
        ("attn.v,blocks.3.", lambda name: "attn.v" in name or name.startswith("blocks.3.")),
        ("blocks.1", lambda name: name.startswith("blocks.1")),
        ("attn_v,blocks.*,weight$", lambda name: False),  # words, not patterns
        ("weight", lambda name: True),
        ("head,skip,q_gain", lambda name: False),  # no matrix of a block has such a word
    ],
)
def test_a_matrix_with_a_sensitive_word_gets_the_bits_of_the_embedding(words, sensitive):
    plain, rows = table_of(t.Config()), table_of(t.Config(int8_sensitive=words))
    for name, row in rows.items():
        if name in BLOCKS and sensitive(name):
            assert row == ("matrix", plain["head.weight"][1]), name
        else:
            assert row == plain[name], name


# --- scales ---


def heavy_tails(rows, cols):
    """Rows with ends: even ones, and some in which an entry is so large that clipping it pays."""
    draw = torch.Generator().manual_seed(0)
    weight = 0.4 * torch.randn(rows, cols, generator=draw)
    for i in range(rows):
        weight[i, : i % 3] *= 30
    weight[::3] = 2 * torch.rand(weight[::3].shape, generator=draw) - 1
    return weight


def naive_percentile_scale(row, top, percentiles):
    """The scale, of those at the percentiles, with the least squared rounding error."""
    found = []
    for percentile in percentiles:
        step = float(np.quantile(np.abs(row), percentile)) / top
        error = np.square(np.clip(np.round(row / step), -top, top) * step - row).sum()
        found.append((float(error), step))
    return min(found)[1]


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("coarser", [1.0, 1.7])
def test_the_sigma_rule_is_so_many_standard_deviations_over_the_largest_code(bits, coarser):
    weight = heavy_tails(9, 70)
    found = t.AsCodes(bits, clip_sigmas=12.85).scales(weight, coarser)
    for row, scale in zip(weight.double().numpy(), found.tolist(), strict=True):
        expected = coarser * 12.85 * np.std(row, ddof=1) / (2 ** (bits - 1) - 1)
        assert scale == pytest.approx(expected, rel=1e-5)


def test_the_percentile_rule_takes_the_range_of_least_rounding_error_for_each_row():
    weight, percentiles = heavy_tails(24, 3000), (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    found = t.AsCodes(6, percentiles=t.MATRIX_PERCENTILES).scales(weight)
    rows = weight.double().numpy()
    expected = [naive_percentile_scale(row, 31, percentiles) for row in rows]
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3)
    clipped = found * 31 < 0.99 * weight.abs().amax(dim=1)
    assert 0 < clipped.sum() < len(clipped), "both kinds of row are there"


def test_tables_are_clipped_at_their_own_percentile():
    weight = heavy_tails(6, 400)
    found = t.AsCodes(8, percentiles=t.TABLE_PERCENTILES).scales(weight, 3.0).numpy()
    expected = np.quantile(weight.abs().double().numpy(), 0.9999984, axis=1) / 127
    np.testing.assert_allclose(found, expected, rtol=1e-3)  # 3.0 concerns the sigma rule alone


@pytest.mark.parametrize("percentiles", [(), (0.9995,), (0.999, 1.0)])
@pytest.mark.parametrize("smallest", [TINY, LEVELS_6])
def test_no_scale_is_below_the_smallest(percentiles, smallest):
    weight = torch.stack([torch.zeros(50), 1e-9 * torch.randn(50), torch.full((50,), -8.0)])
    weight[2, ::2] = 8.0
    store = t.AsCodes(6, clip_sigmas=4.0, percentiles=percentiles, smallest=smallest)
    found = store.scales(weight)
    assert found[:2].tolist() == pytest.approx([smallest] * 2)
    assert found[2] > smallest
    assert found.half().float().min() > 0, "it survives float16"
