"""Rotary position embedding, of whole heads and of their last columns."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.ops.registry import composite, compute_dtype


def _layout(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


@composite("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", _layout)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, H, R], cos and sin [B, S, F], F = R/2 → [B, S, H, R].

    Pair i is rotated by angle i: pairs are (2i, 2i + 1) if `interleaved`, else (i, i + F). The layout stays.
    """
    wide = x.to(compute_dtype(x))
    cos, sin = (angle.to(wide.dtype).unsqueeze(-2) for angle in (cos, sin))
    if interleaved:
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    else:
        first, second = wide.chunk(2, -1)
        rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    return rotated.to(x.dtype)


def _joined(
    first: Tensor,
    second: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    return first.new_empty((*first.shape[:-1], first.shape[-1] + second.shape[-1]))


@composite(
    "join_heads(Tensor first, Tensor second, Tensor? cos=None, Tensor? sin=None, bool interleaved=False) -> Tensor",
    _joined,
)
def join_heads(
    first: Tensor,
    second: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """first [B, S, H, P], second [B, S, H, R], cos and sin [B, S, F] → [B, S, H, P+R].

    The second part is rotated as `rotary` does where the angles are given. Its heads may be one row, expanded.
    """
    if cos is not None and sin is not None:
        second = rotary(second, cos, sin, interleaved)
    return torch.cat((first, second), -1).contiguous()
