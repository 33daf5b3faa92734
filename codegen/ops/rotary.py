"""Rotary position embedding."""

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
