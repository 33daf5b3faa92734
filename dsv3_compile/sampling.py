"""Choosing the next token from logits."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

LOWEST_TEMPERATURE = 1e-30  # logits divided by less are no longer float32 numbers
SEEDS = range(-(1 << 63), 1 << 64)


class Sampler:
    """Greedy at temperature 0, else nucleus sampling, on the logits' device; equal seeds give equal tokens there.

    Raises ValueError for a setting that is no number, or out of range.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, device: torch.device | str = "cpu") -> None:
        if not _number(temperature) or not (temperature == 0.0 or LOWEST_TEMPERATURE <= temperature < float("inf")):
            raise ValueError(f"temperature is {temperature!r}; expected 0 or a number from {LOWEST_TEMPERATURE}")
        if not _number(top_p) or not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p is {top_p!r}; expected a number above 0, at most 1")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed not in SEEDS:
            raise ValueError(f"seed is {seed!r}; expected a whole number from -2^63 to 2^64 - 1")
        self.temperature = temperature
        self.top_p = top_p
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """float32 [B, V] → int64 [B]."""
        if self.temperature == 0.0:
            return logits_BV.argmax(-1)
        probabilities, tokens = (logits_BV / self.temperature).softmax(-1).sort(-1, descending=True)
        # Kept: every token whose predecessors do not reach top_p yet, so at least the first.
        behind = probabilities.cumsum(-1) - probabilities >= self.top_p
        drawn = torch.multinomial(probabilities.masked_fill(behind, 0.0), 1, generator=self.generator)
        return tokens.gather(-1, drawn).squeeze(-1)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
