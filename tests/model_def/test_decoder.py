"""What must hold for any model of the family: caching, ragged batches, causality, positions, dtypes."""

from dataclasses import replace

import pytest
import torch

from model_def import Decoder, ModelConfig
from tests.model_def.builders import GQA, MHA, RANKS, SMALL, all_logits, decoder, token_ids

MODELS = {
    "query compression": SMALL,
    "no query compression, a rank per layer": RANKS,
    "grouped queries": GQA,
    "multi-head": MHA,
    "rotated halves": replace(SMALL, rope_interleave=False),
    "no YaRN": replace(SMALL, rope_scaling=None),
    "softmax routing": replace(
        SMALL,
        model_type="deepseek_v2",
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
    ),
    "tied embeddings": replace(SMALL, tie_word_embeddings=True),
}


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


def test_decoding_token_by_token_equals_one_pass(config: ModelConfig) -> None:
    model, ids = decoder(config), token_ids(config, 2, 9)
    expected = all_logits(model, ids)
    caches = model.empty_caches(2, 13, torch.float64)
    for at in range(9):
        positions = torch.full((2, 1), at)
        logits, caches = model(ids[:, at : at + 1], positions, caches)
        torch.testing.assert_close(logits[:, 0], expected[:, at])


def test_rows_of_a_ragged_batch_do_not_see_each_other_or_their_padding(config: ModelConfig) -> None:
    model, ids = decoder(config), token_ids(config, 3, 8)
    lengths = torch.tensor([8, 1, 5])
    positions = torch.arange(8).expand(3, 8)
    _, caches = model(ids, positions, model.empty_caches(3, 10, torch.float64))
    following = token_ids(config, 3, 2, seed=5)
    for step in range(2):
        logits, caches = model(following[:, step : step + 1], (lengths + step)[:, None], caches)
        for row, length in enumerate(lengths.tolist()):
            alone = torch.cat([ids[row, :length], following[row, : step + 1]])[None]
            torch.testing.assert_close(logits[row, 0], all_logits(model, alone)[0, -1])


def test_later_tokens_change_nothing(config: ModelConfig) -> None:
    model, ids = decoder(config), token_ids(config, 2, 7)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % config.vocab_size
    before, after = all_logits(model, ids), all_logits(model, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5] - after[:, 5]).abs().max() > 1e-3


def test_unused_capacity_changes_nothing(config: ModelConfig) -> None:
    model, ids = decoder(config), token_ids(config, 2, 7)
    torch.testing.assert_close(all_logits(model, ids, capacity=16), all_logits(model, ids))


def test_earlier_tokens_matter(config: ModelConfig) -> None:
    model, ids = decoder(config), token_ids(config, 1, 7)
    swapped = ids[:, [1, 0, 2, 3, 4, 5, 6]]
    assert ids[0, 0] != ids[0, 1]
    assert (all_logits(model, ids)[:, -1] - all_logits(model, swapped)[:, -1]).abs().max() > 1e-3


def test_shifting_all_positions_changes_nothing() -> None:
    """Rotary positions are relative, up to the rounding of float32 tables."""
    model, ids = decoder(SMALL), token_ids(SMALL, 2, 7)
    x, cos, sin = model.embed(ids, torch.arange(7).expand(2, 7))
    _, cos_later, sin_later = model.embed(ids, 11 + torch.arange(7).expand(2, 7))
    assert (cos - cos_later).abs().max() > 0.1
    positions = torch.arange(7).expand(2, 7)
    outputs = []
    for table in ((cos, sin), (cos_later, sin_later)):
        caches = model.empty_caches(2, 7, torch.float64)
        hidden = x
        for layer, (first, second) in zip(model.layers, caches, strict=True):
            hidden, _, _ = layer(hidden, *table, positions, first, second)
        outputs.append(hidden)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)


def test_permuting_rotary_rows_and_layout_together_changes_nothing() -> None:
    model = decoder(SMALL)
    halves = decoder(replace(SMALL, rope_interleave=False))
    heads, nope, rope = 3, 6, 4
    order = torch.tensor([0, 2, 1, 3])  # (2i, 2i+1) → (i, i + R/2)
    for layer in halves.layers:
        query = layer.self_attn.q_b_proj.weight.view(heads, nope + rope, -1)
        query[:, nope:] = query[:, nope:][:, order].clone()
        down = layer.self_attn.kv_a_proj_with_mqa.weight
        down[-rope:] = down[-rope:][order].clone()
    ids = token_ids(SMALL, 2, 7)
    torch.testing.assert_close(all_logits(halves, ids), all_logits(model, ids))


def test_cache_holds_one_latent_and_one_rotary_key_per_token_whatever_the_heads() -> None:
    model = Decoder(SMALL, device="meta")
    assert [layer.cache_widths() for layer in model.layers] == [{"latent": (10,), "rope_key": (4,)}] * 3
    shapes = [(first.shape, second.shape) for first, second in model.empty_caches(2, 5, device="meta")]
    assert shapes == [((2, 5, 10), (2, 5, 4))] * 3


def test_cached_latent_is_normalised_and_cached_key_is_rotated() -> None:
    model, ids = decoder(SMALL), token_ids(SMALL, 1, 4)
    positions = torch.arange(4)[None]
    _, caches = model(ids, positions, model.empty_caches(1, 4, torch.float64))
    layer = model.layers[0]
    x, _, _ = model.embed(ids, positions)
    down, key = layer.self_attn.kv_a_proj_with_mqa(layer.input_layernorm(x)).split([10, 4], -1)
    latent, rope_key = caches[0]
    root_mean_square = down.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(latent, down / root_mean_square * layer.self_attn.kv_a_layernorm.weight)
    assert SMALL.rope_scaling is not None
    table_factor = SMALL.rope_scaling.table_factor()
    torch.testing.assert_close(rope_key[:, 0], key[:, 0] * table_factor, atol=1e-6, rtol=0)
    assert (rope_key[:, 1:] - key[:, 1:] * table_factor).abs().max() > 1e-2


def test_inner_norms_keep_their_epsilon() -> None:
    layer = Decoder(replace(SMALL, rms_norm_eps=1e-3), device="meta").layers[0]
    assert layer.input_layernorm.eps == 1e-3
    assert layer.self_attn.kv_a_layernorm.eps == layer.self_attn.q_a_layernorm.eps == 1e-6


def test_logits_are_float32_in_a_bfloat16_model() -> None:
    model = decoder(SMALL, torch.bfloat16)
    ids = token_ids(SMALL, 2, 5)
    logits = all_logits(model, ids)
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_absorbed_scores_are_the_expanded_ones() -> None:
    """q·(U·latent) = (Uᵀ·q)·latent: what the compiler rests on, checked on the definition's own weights."""
    model = decoder(SMALL)
    attention = model.layers[0].self_attn
    q_nope, latent = torch.randn(5, 3, 6).double(), torch.randn(7, 10).double()
    up = attention.kv_b_proj.weight.view(3, 11, 10)[:, :6]
    expanded = torch.einsum("shp,thp->hst", q_nope, torch.einsum("tc,hpc->thp", latent, up))
    absorbed = torch.einsum("shc,tc->hst", torch.einsum("shp,hpc->shc", q_nope, up), latent)
    torch.testing.assert_close(absorbed, expanded)
