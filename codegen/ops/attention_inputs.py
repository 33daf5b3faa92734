"""Everything between a decode step's projections and its attention: absorb, rotate, write the cache."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from codegen.ops.cache import write_cache, write_cache_
from codegen.ops.linear import head_linear
from codegen.ops.registry import composite, opaque
from codegen.ops.rotary import rotary


def _queries(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    heads, _, rank = weight.shape
    lead = q.shape[:2]
    return q.new_empty((*lead, heads, rank)), q.new_empty((*lead, heads, 2 * cos.shape[-1]))


def _queries_and_caches(*arguments: Any) -> tuple[Tensor, ...]:
    return (*_queries(*arguments), *map(torch.empty_like, arguments[7:9]))


def _absorb_and_rotate(q: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first columns of every head times its weight, and the last ones rotated."""
    heads, nope, _ = weight.shape
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).split([nope, 2 * cos.shape[-1]], -1)
    return head_linear(q_nope, weight.mT).contiguous(), rotary(q_rope, cos, sin, interleaved)


@composite(
    "attention_inputs(Tensor q, Tensor kv, Tensor weight, Tensor norm_weight, Tensor cos, Tensor sin, "
    "Tensor positions, Tensor latent, Tensor rope_key, float eps, bool interleaved) "
    "-> (Tensor q_latent, Tensor q_rope, Tensor latent, Tensor rope_key)",
    _queries_and_caches,
)
def attention_inputs(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention_inputs_` that leaves the caches alone and returns copies, as `write_cache` does."""
    caches = write_cache(kv, norm_weight, cos, sin, positions, latent, rope_key, eps, interleaved)
    return (*_absorb_and_rotate(q, weight, cos, sin, interleaved), *caches)


def _absorbed_flops(q: Sequence[Any], kv: Any, weight: Sequence[Any], *_: Any, **__: Any) -> Any:
    return 2 * prod(q[:-1]) * prod(weight)


@opaque(
    "attention_inputs_(Tensor q, Tensor kv, Tensor weight, Tensor norm_weight, Tensor cos, Tensor sin, "
    "Tensor positions, Tensor(a!) latent, Tensor(b!) rope_key, float eps, bool interleaved) "
    "-> (Tensor q_latent, Tensor q_rope)",
    fake=_queries,
    flops=_absorbed_flops,
)
def attention_inputs_(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, S, H·(P+R)], weight [H, P, C], the rest as `write_cache_` takes it, which this does.

    Returns q_latent [B, S, H, C], the first P columns of every head times its weight, and q_rope [B, S, H, R], the
    rotation of its last R.
    """
    write_cache_(kv, norm_weight, cos, sin, positions, latent, rope_key, eps, interleaved)
    return _absorb_and_rotate(q, weight, cos, sin, interleaved)
