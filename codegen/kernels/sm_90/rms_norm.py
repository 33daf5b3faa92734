"""RMSNorm on Hopper: it starts while the kernel before drains, and lets the product behind it read its weight."""

from __future__ import annotations

from torch import Tensor

from codegen.kernels.rms_norm import normed_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Kernel of the op `rms_norm`: x [.., D], weight [D] → [.., D]."""
    return normed_rows(x, None, weight, eps, overlapped=x.is_cuda)[0]
