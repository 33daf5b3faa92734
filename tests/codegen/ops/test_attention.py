"""mla_attention and attention against the formula, written out with einsum and a materialised mask."""

import math

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3


def causal_softmax(scores_BSHT, positions_BS):
    visible = torch.arange(scores_BSHT.shape[-1]) <= positions_BS[..., None]
    return scores_BSHT.masked_fill(~visible[:, :, None], -math.inf).softmax(-1)


@pytest.mark.parametrize("batch, queries, heads, context", [(1, 1, 3, 1), (2, 3, 5, 11), (3, 1, 20, 7)])
def test_mla_attention_is_softmax_over_latent_and_rope_scores(batch, queries, heads, context):
    rank, rope = 24, 6
    q_latent = torch.randn(batch, queries, heads, rank, dtype=torch.float64)
    q_rope = torch.randn(batch, queries, heads, rope, dtype=torch.float64)
    latent = torch.randn(batch, context, rank, dtype=torch.float64)
    rope_key = torch.randn(batch, context, rope, dtype=torch.float64)
    positions = torch.randint(context, (batch, queries))
    scores = torch.einsum("bshc,btc->bsht", q_latent, latent) + torch.einsum("bshr,btr->bsht", q_rope, rope_key)
    expected = torch.einsum("bsht,btc->bshc", causal_softmax(0.3 * scores, positions), latent)
    found = torch.ops.dsv3.mla_attention(q_latent, q_rope, latent, rope_key, positions, 0.3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("key_width, value_width", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("plain", [True, False])
def test_attention_is_grouped_softmax_attention(key_width, value_width, plain):
    q = torch.randn(2, 5, 6, key_width, dtype=torch.float64)
    k = torch.randn(2, 9, 3, key_width, dtype=torch.float64)
    v = torch.randn(2, 9, 3, value_width, dtype=torch.float64)
    positions = torch.arange(5).repeat(2, 1) + (torch.tensor([[0], [0]]) if plain else torch.tensor([[3], [0]]))
    wide_k, wide_v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = 0.3 * torch.einsum("bsha,btha->bsht", q, wide_k)
    expected = torch.einsum("bsht,bthv->bshv", causal_softmax(scores, positions), wide_v)
    torch.testing.assert_close(torch.ops.dsv3.attention(q, k, v, positions, 0.3), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_second_part_of_every_head_adds_its_product(rows):
    q, q_rope = torch.randn(2, 5, 6, 11, dtype=torch.float64).split([7, 4], -1)
    k, v = torch.randn(2, 9, 3, 12, dtype=torch.float64).split([7, 5], -1)
    k_rope, positions = torch.randn(2, 9, rows, 4, dtype=torch.float64), torch.tensor([[4], [0]]) + torch.arange(5)
    wide_k, wide_v, wide_rope = (x.repeat_interleave(6 // x.shape[2], 2) for x in (k, v, k_rope))
    scores = torch.einsum("bsha,btha->bsht", q, wide_k) + torch.einsum("bsha,btha->bsht", q_rope, wide_rope)
    expected = torch.einsum("bsht,bthv->bshv", causal_softmax(0.3 * scores, positions), wide_v)
    torch.testing.assert_close(torch.ops.dsv3.attention(q, k, v, positions, 0.3, q_rope, k_rope), expected)


def test_rows_behind_the_last_position_are_not_read():
    latent, rope_key = torch.full((2, 64, 8), math.nan), torch.full((2, 64, 4), math.nan)
    latent[:, :3], rope_key[:, :3] = torch.randn(2, 3, 8), torch.randn(2, 3, 4)
    positions = torch.tensor([[0], [2]])
    q_latent, q_rope = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 4)
    found = torch.ops.dsv3.mla_attention(q_latent, q_rope, latent, rope_key, positions, 1.0)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, 0], latent[0, :1].expand(3, 8))
