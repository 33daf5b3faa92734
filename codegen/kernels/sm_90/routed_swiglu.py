"""The expert layer on Hopper: one token streams matrices times vector, more tokens go through sorted tiles.

Every kernel starts while its predecessor drains (programmatic dependent launch): it waits before it reads what an
earlier one wrote, and before it writes anything, so that all of its predecessors have finished when it has. The
products of a prefill begin with shared experts before they wait: until then they read what is older than the plan, and
write where no kernel of the plan reads (`ExpertPlan.busy`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import halves
from codegen.kernels.sm_90.boxes import is_matrix
from codegen.kernels.sm_90.grouped_products import Tile, grouped_product
from codegen.kernels.sm_90.plan_experts import plan_few, plan_many
from codegen.kernels.sm_90.prefill_products import GROUP_ROWS, TILE_ROWS, prefill_products
from codegen.kernels.sm_90.single_token import single_token_swiglu


@triton.jit
def combine_kernel(
    y_ptr,
    residual_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    # The width is compiled in, so that rows of any multiple of 16 bytes are read 16 bytes at a time.
    total = tl.zeros((BLOCK_D,), tl.float32)
    for pair in tl.static_range(TOP_K):
        row = y_ptr + (token * TOP_K + pair) * WIDTH
        total += tl.load(row + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(residual_ptr + token * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + column, total.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


def combine(y: Tensor, top_k: int, residual: Tensor | None = None) -> Tensor:
    """y [N·K, D] in pair order, weighted → the sum over K, plus residual [N, D], [N, D]."""
    tokens, width = y.shape[0] // top_k, y.shape[1]
    out = torch.empty((tokens, width), dtype=y.dtype, device=y.device)
    block = min(1024, triton.next_power_of_2(width))
    combine_kernel[(tokens, triton.cdiv(width, block))](
        y,
        residual,
        out,
        WIDTH=width,
        TOP_K=top_k,
        BLOCK_D=block,
        ADD=residual is not None,
        OVERLAPPED=y.is_cuda,
        num_warps=4,
        launch_pdl=y.is_cuda,
    )
    return out


# Tiles of both products up to a mean number of pairs per expert: the fastest measured on one H200 at 256 experts of
# 7168 x 2048. A tile must hold nearly every expert's pairs, since a second one reads the weights again. For more pairs
# the products of a prefill are as fast or faster, there and at 64 experts of 2048 x 1408.
TILINGS = (
    (2, Tile(8, 64, 128, 6), Tile(8, 64, 128, 10)),
    (6, Tile(16, 64, 128, 5), Tile(16, 128, 64, 12)),
)


# Batches that take each of the paths and tilings, at 64 to 384 experts.
TRIED_SIZES = (1, 13, 43, 131, 263, 4099)


def serves(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    always: int = 0,
    up: Tensor | None = None,
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
) -> Tensor:
    """Kernel of the op `routed_swiglu`: x [N, D], indices and weights [N, K], gate_up [E, 2I, D], down [E, D, I]
    → [N, D], plus residual [N, D]. With up [E, I, D], gate_up [E, I, D] is the gates alone. Weights of experts that
    nobody chose are not read; pairs are summed in a fixed order. The last `always` indices of every token are the last
    experts.
    """
    gate, up = halves(gate_up, up)
    tokens, top_k = indices.shape
    if tokens == 0:
        return torch.empty_like(x)
    residual = None if residual is None else residual.contiguous()
    if tokens == 1:
        return single_token_swiglu(x.contiguous(), indices, weights, gate, up, down, residual, always)
    experts = gate.shape[0]
    pairs = tokens * top_k
    tiling = next((tiling for tiling in TILINGS if pairs <= tiling[0] * experts), None)
    if tiling is None:
        plan = plan_many(x, indices, experts, TILE_ROWS, GROUP_ROWS, always)
        y = prefill_products(plan, gate, up, down, weights)
    else:
        _, wide, narrow = tiling
        plan = plan_few(x, indices, experts, wide.rows)
        hidden = grouped_product(plan.gathered, (gate, up), plan, wide, None)
        y = grouped_product(hidden, (down,), plan, narrow, weights)
    return combine(y, top_k, residual)
