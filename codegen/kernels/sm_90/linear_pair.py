"""Products of one input with two weights on Hopper: few rows stream both through one launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.kernels.layout import as_rows
from codegen.kernels.sm_90.boxes import aligned
from codegen.kernels.sm_90.linear import SKINNY_ROWS
from codegen.kernels.sm_90.skinny_linear import balanced_slices, skinny_linear, why_not_skinny

TRIED_SIZES = (1, 13, 4099)  # rows that take other paths or tiles


def linear_pair(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Kernel of the op `linear_pair`: x [.., D], first [O, D], second [P, D] → [.., O+P]."""
    rows, width = as_rows(x), first.shape[0] + second.shape[0]
    streamed = rows.shape[0] <= SKINNY_ROWS and first.shape[0] % 64 == 0
    if streamed and all(w.is_contiguous() and why_not_skinny(rows, w) is None for w in (first, second)):
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        out = skinny_linear(aligned(rows), first, slices=balanced_slices(width, x.shape[-1], processors), second=second)
    else:
        out = torch.cat([F.linear(rows, weight) for weight in (first, second)], -1)
    return out.view(*x.shape[:-1], width)
