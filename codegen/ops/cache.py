"""Writing the latent cache: normalise, rotate, store at the positions."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.ops.norm import rms_norm
from codegen.ops.registry import composite, opaque
from codegen.ops.rotary import rotary

_ARGUMENTS = "Tensor kv, Tensor weight, Tensor cos, Tensor sin, Tensor positions, {latent}, {rope_key}, float eps, "


def cache_rows(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """What a token leaves in the caches: latent [B, S, C] and rope key [B, S, R] of kv [B, S, C+R]."""
    rank = weight.shape[0]
    latent = rms_norm(kv[..., :rank], weight, eps)
    rope_key = rotary(kv[..., rank:].unsqueeze(-2), cos, sin, interleaved).squeeze(-2)
    return latent, rope_key


def _like_caches(
    kv: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(latent), torch.empty_like(rope_key)


@composite(
    "write_cache("
    + _ARGUMENTS.format(latent="Tensor latent", rope_key="Tensor rope_key")
    + "bool interleaved) -> (Tensor latent, Tensor rope_key)",
    _like_caches,
)
def write_cache(
    kv: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """kv [B, S, C+R], weight [C], cos and sin [B, S, F], positions [B, S] int64, latent [B, T, C],
    rope_key [B, T, R].

    Returns copies of both caches in which row positions[b, s] holds the RMSNorm of the first C columns of
    kv[b, s] and the rotation of its last R. The caches keep their dtype.
    """
    latent_row, rope_row = cache_rows(kv, weight, cos, sin, eps, interleaved)
    row = torch.arange(kv.shape[0], device=kv.device).unsqueeze(-1)
    return (
        latent.index_put((row, positions), latent_row.to(latent.dtype)),
        rope_key.index_put((row, positions), rope_row.to(rope_key.dtype)),
    )


def _no_output(
    kv: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> None:
    return None


@opaque(
    "write_cache_("
    + _ARGUMENTS.format(latent="Tensor(a!) latent", rope_key="Tensor(b!) rope_key")
    + "bool interleaved) -> ()",
    fake=_no_output,
)
def write_cache_(
    kv: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> None:
    """`write_cache` in place: same arguments, writes latent and rope_key, returns nothing."""
    latent_row, rope_row = cache_rows(kv, weight, cos, sin, eps, interleaved)
    row = torch.arange(kv.shape[0], device=kv.device).unsqueeze(-1)
    latent.index_put_((row, positions), latent_row.to(latent.dtype))
    rope_key.index_put_((row, positions), rope_row.to(rope_key.dtype))
