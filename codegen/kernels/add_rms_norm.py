"""Residual sum and its RMSNorm in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from codegen.kernels.rms_norm import normed_rows


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """x, residual [.., D], weight [D] → (rms_norm(sum), sum), both [.., D]."""
    return normed_rows(x, residual, weight, eps)
