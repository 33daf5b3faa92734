"""What a model costs, from its layer specs alone: parameters, cache, floating-point operations.

H heads · P no-position width · R rotary width · V value width · C latent rank.
A multiply-accumulate counts as two operations; norms, activations and the softmax are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from model_def.config import ModelConfig
from model_def.specs import DenseSpec, GqaSpec, LayerSpec, MlaSpec

GQA_GROUPS = 8  # key-value heads of the usual grouped-query model, for comparison


@dataclass(frozen=True)
class Parameters:
    """Numbers in the weights, the selection biases included, multi-token prediction excluded."""

    total: int
    active: int  # used by one token, embedding and head included

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.total + other.total, self.active + other.active)


@dataclass(frozen=True)
class KvCache:
    """Bytes that one more token adds to the cache, over all layers.

    The three others have the same number of heads (for GQA: of eight, or all if fewer; for MQA: of one) with
    keys of P and values of V numbers, and no rotary part of their own.
    """

    bytes_per_token: int
    mha_bytes_per_token: int
    gqa_bytes_per_token: int
    mqa_bytes_per_token: int

    @property
    def ratio(self) -> float:
        """Of the bytes that multi-head attention would need."""
        return self.bytes_per_token / self.mha_bytes_per_token


@dataclass(frozen=True)
class Flops:
    """Operations to produce one token with a cache: 2·(weights used), and attention over the context."""

    weights: int
    per_cached_token: int  # scores and weighted sum, MLA in its absorbed form

    def at(self, context: int) -> int:
        return self.weights + context * self.per_cached_token


def attention_parameters(attention: MlaSpec | GqaSpec, hidden: int) -> int:
    heads = attention.heads
    if isinstance(attention, GqaSpec):
        return 2 * hidden * attention.head_dim * (heads + attention.kv_heads)
    queries, rank = heads * attention.qk_head_dim, attention.q_lora_rank
    query = hidden * queries if rank is None else hidden * rank + rank + rank * queries
    down = hidden * (attention.kv_lora_rank + attention.qk_rope_head_dim) + attention.kv_lora_rank
    up = attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return query + down + up + heads * attention.v_head_dim * hidden


def layer_parameters(spec: LayerSpec) -> Parameters:
    hidden, ffn = spec.hidden, spec.ffn
    shared = attention_parameters(spec.attention, hidden) + 2 * hidden
    if isinstance(ffn, DenseSpec):
        shared += 3 * hidden * ffn.width
        return Parameters(shared, shared)
    routing = ffn.routing
    shared += 3 * hidden * ffn.shared_width + routing.experts * (hidden + routing.bias)
    expert = 3 * hidden * ffn.width
    return Parameters(shared + routing.experts * expert, shared + routing.top_k * expert)


def parameters(config: ModelConfig) -> Parameters:
    """Of the main model."""
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    count = Parameters(tables + config.hidden_size, tables + config.hidden_size)
    for spec in config.layers():
        count += layer_parameters(spec)
    return count


def mtp_parameters(config: ModelConfig) -> Parameters:
    """Of the multi-token-prediction module, without what it shares with the main model; 0 without one."""
    if not config.num_nextn_predict_layers:
        return Parameters(0, 0)
    hidden = config.hidden_size
    own = 2 * hidden * hidden + 3 * hidden
    return layer_parameters(config.mtp_layer()) + Parameters(own, own)


def kv_cache(config: ModelConfig, bytes_per_number: int | None = None) -> KvCache:
    """In the config's dtype, unless the width of a number is given."""
    own = one_head = heads = groups = 0
    for spec in config.layers():
        attention = spec.attention
        own += sum(math.prod(width) for width in attention.cache_widths().values())
        if isinstance(attention, MlaSpec):
            pair = attention.qk_nope_head_dim + attention.v_head_dim
        else:
            pair = 2 * attention.head_dim
        one_head += pair
        heads += pair * attention.heads
        groups += pair * min(GQA_GROUPS, attention.heads)
    size = config.dtype.itemsize if bytes_per_number is None else bytes_per_number
    return KvCache(own * size, heads * size, groups * size, one_head * size)


def flops_per_token(config: ModelConfig) -> Flops:
    """Of the main model, one token at a time. The embedding is a lookup and costs none."""
    weights = config.vocab_size * config.hidden_size
    per_cached_token = 0
    for spec in config.layers():
        weights += _products(spec)
        per_cached_token += _core(spec.attention)
    return Flops(2 * weights, 2 * per_cached_token)


def _products(spec: LayerSpec) -> int:
    """Multiply-accumulates with weights for one token: every active weight that is part of a matrix, once."""
    vectors = 2 * spec.hidden
    if isinstance(spec.attention, MlaSpec):
        vectors += spec.attention.kv_lora_rank + (spec.attention.q_lora_rank or 0)
    if not isinstance(spec.ffn, DenseSpec):
        vectors += spec.ffn.routing.experts * spec.ffn.routing.bias
    return layer_parameters(spec).active - vectors


def _core(attention: MlaSpec | GqaSpec) -> int:
    """Multiply-accumulates of one query with one cached token: H·(2C + R) absorbed, H·2A with whole keys."""
    if isinstance(attention, GqaSpec):
        return 2 * attention.heads * attention.head_dim
    return attention.heads * (2 * attention.kv_lora_rank + attention.qk_rope_head_dim)
