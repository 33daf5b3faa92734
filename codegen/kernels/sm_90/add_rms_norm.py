"""Residual sum and its RMSNorm on Hopper, in one pass over memory, started early as `rms_norm` is."""

from __future__ import annotations

from torch import Tensor

from codegen.kernels.rms_norm import normed_rows


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """Kernel of the op `add_rms_norm`: x, residual [.., D], weight [D] → (rms_norm(sum), sum), both [.., D]."""
    return normed_rows(x, residual, weight, eps, overlapped=x.is_cuda)
