"""How kernels of a decode step follow one another: each starts while its predecessor still drains."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def overlapped(tensor: Tensor) -> dict[str, Any]:
    """Launch options for programmatic dependent launch, off where there is no GPU.

    A kernel launched so must call gdc_wait in every program before it reads what an earlier kernel wrote or
    writes anything itself: then all of its predecessors have finished when it has.
    """
    on_gpu = tensor.is_cuda
    return {"OVERLAPPED": on_gpu, "launch_pdl": on_gpu} if on_gpu else {"OVERLAPPED": False}
