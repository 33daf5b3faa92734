"""Rotary position embedding and its YaRN extension (Su et al. 2021, Peng et al. 2023).

F = R/2 rotary pairs; pair i at position t turns by t · frequency_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """YaRN: fast-turning pairs keep their frequency, slow ones are slowed down by `factor`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None  # replaces the A derived from the two mscales

    def magnitude(self, mscale: float) -> float:
        """m(x) = 0.1·x·ln(factor) + 1, and 1 without extension."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def table_factor(self) -> float:
        """A, the factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    def score_factor(self) -> float:
        """m², the factor on the softmax scale."""
        return self.magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def ramp_bounds(self, rotary_dim: int, theta: float) -> tuple[float, float]:
        """Pair indices between which the frequencies pass from kept to slowed down.

        A pair that makes `n` turns over the original length has index R·ln(length/(2πn)) / (2·ln θ).
        """

        def index_at(turns: float) -> float:
            length = self.original_max_position_embeddings
            return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(index_at(self.beta_fast)), 0)
        high = min(math.ceil(index_at(self.beta_slow)), rotary_dim - 1)
        return low, high if high != low else high + 0.001


def frequencies_F(
    rotary_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> Tensor:
    """Radians per position of every rotary pair, float32 [F]."""
    pair_F = torch.arange(rotary_dim // 2, device=device, dtype=torch.float32)
    kept_F = 1.0 / theta ** (2 * pair_F / rotary_dim)
    if scaling is None:
        return kept_F
    low, high = scaling.ramp_bounds(rotary_dim, theta)
    slowed_share_F = ((pair_F - low) / (high - low)).clamp(0, 1)
    return kept_F / scaling.factor * slowed_share_F + kept_F * (1 - slowed_share_F)


def cos_sin(positions: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle, times YaRN's A: int64 [...] → two float32 [..., F]."""
    angles = positions[..., None].float() * frequencies_F(rotary_dim, theta, scaling, positions.device)
    factor = 1.0 if scaling is None else scaling.table_factor()
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Turn every pair of x [..., R] by its angle; cos and sin broadcast against [..., F].

    Pairs are neighbours (2i, 2i+1), or halves (i, i + R/2) if not interleaved; the layout stays.
    """
    wide = torch.promote_types(x.dtype, cos.dtype)
    if interleaved:
        first, second = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = x.to(wide).chunk(2, -1)
    turned = first * cos - second * sin, first * sin + second * cos
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return joined.to(x.dtype)
