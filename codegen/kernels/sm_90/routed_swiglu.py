"""The expert layer on Hopper: one token or two stream matrices times vector, a batch goes through the plain tiles of
sorted pairs, a prompt through products of its own.

Every kernel starts while its predecessor drains (programmatic dependent launch): it waits before it reads what an
earlier one wrote, and before it writes anything, so that all of its predecessors have finished when it has. The
products of a prefill begin with shared experts before they wait: until then they read what is older than the plan, and
write where no kernel of the plan reads (`ExpertPlan.busy`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.kernels.layout import halves
from codegen.kernels.routed_swiglu import combine, swiglu_in_tiles
from codegen.kernels.sm_90.boxes import aligned, is_matrix
from codegen.kernels.sm_90.plan_experts import plan_experts
from codegen.kernels.sm_90.prefill_products import GROUP_ROWS, TILE_ROWS, prefill_products
from codegen.kernels.sm_90.streamed_experts import streamed_swiglu

# Measured on one H200 at 64 experts of 2048 x 1408 and 256 of 7168 x 2048: up to so many tokens streaming is faster
# than tiles, and up to so many pairs per expert plain tiles are as fast as the products of a prefill, or faster.
FEW_TOKENS = 2
FEW_PAIRS = 24

# Batches that take each of the paths and tilings, at 8 to 384 experts.
TRIED_SIZES = (1, 2, 13, 43, 131, 263, 601, 4099)


def serves(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    always: int = 0,
    up: Tensor | None = None,
    limit: float | None = None,
) -> str | None:
    """None, or the reason why the plain form must be used."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"activations are {x.dtype}; tensor copies and products want a 16-bit float"
    gate, up = halves(gate_up, up)
    if not x.dtype == gate.dtype == up.dtype == down.dtype:
        return "activations and weights differ in dtype"
    if not (is_matrix(gate) and is_matrix(up) and is_matrix(down)) or gate.stride() != up.stride():
        return "the rows of all experts' weights are not those of one matrix"
    if gate_up.shape[2] % 8 or down.shape[2] % 8:
        return f"rows of {gate_up.shape[2]} and {down.shape[2]} elements are no multiple of 16 bytes"
    return None


def routed_swiglu(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    always: int = 0,
    up: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """Kernel of the op `routed_swiglu`: x [N, D], indices and weights [N, K], gate_up [E, 2I, D], down [E, D, I]
    → [N, D], plus residual [N, D]. With up [E, I, D], gate_up [E, I, D] is the gates alone. limit: of gates and ups.
    Weights of experts that nobody chose are not read; pairs are summed in a fixed order. The last `always` indices of
    every token are the last experts.
    """
    gate, up = halves(gate_up, up)
    tokens, top_k = indices.shape
    indices, weights = indices.contiguous(), weights.contiguous()
    if tokens == 0:
        return torch.empty_like(x)
    if tokens <= FEW_TOKENS:
        residual = None if residual is None else residual.contiguous()
        return streamed_swiglu(x.contiguous(), indices, weights, gate, up, down, residual, always, limit)
    experts = gate.shape[0]
    if tokens * top_k <= FEW_PAIRS * experts:
        y = swiglu_in_tiles(x, indices, gate, up, down, limit, overlapped=x.is_cuda)
        return combine(y, weights, residual, overlapped=x.is_cuda)
    plan = plan_experts(aligned(x.contiguous()), indices, experts, TILE_ROWS, GROUP_ROWS, always)
    y = prefill_products(plan, gate, up, down, weights, limit)
    return combine(y, weights, residual, weighted=True, overlapped=x.is_cuda)
