"""Rings of slots in shared memory that one warp fills and warp groups empty, and signals between programs."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def make_barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """SLOTS barriers that each complete after ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring, and the parity that its barriers have on this lap."""
    slot += 1
    wrapped = slot == SLOTS
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def order_for_copies():
    """What is known to be stored comes before tensor copies of whoever hears of it next."""
    gl.inline_asm_elementwise(
        "fence.proxy.async; mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def await_signals(count_ptr, wanted):
    """Until a count in global memory has come to `wanted`."""
    count = gl.to_tensor(0)
    while count < wanted:
        count = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1]; fence.proxy.async;", "=r,l", [count_ptr],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
