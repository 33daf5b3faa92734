"""Tensors as the copy engine of Hopper takes them: in boxes of a fixed shape, with zeros behind the edges."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@functools.cache
def box_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory. Finding that out takes the host as long as a launch, hence once."""
    return gl.NVMMASharedLayout.get_default_for(list(box), getattr(gl, str(dtype).removeprefix("torch.")))


def starts_aligned(x: Tensor) -> bool:
    """Does x start at a multiple of 16 bytes, like the storage that it lies in?"""
    return x.storage_offset() % (16 // x.element_size()) == 0


def aligned(rows: Tensor) -> Tensor:
    """rows [N, D] where copies can address them, from multiples of 16 bytes on; rows of one must be such a multiple."""
    apart, together = rows.stride()
    if together == 1 and apart % (16 // rows.element_size()) == 0 and starts_aligned(rows):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def matrix_of(stack: Tensor) -> tuple[Tensor, int]:
    """A stack [E, O, D] as one matrix, and how many of its rows lie from one expert's first to the next one's."""
    experts, rows, columns = stack.shape
    apart = stack.stride(0) // stack.stride(1)
    return stack.as_strided(((experts - 1) * apart + rows, columns), (stack.stride(1), 1)), apart


def is_matrix(stack: Tensor) -> bool:
    """Are the rows of a stack [E, O, D] those of one aligned matrix, some of which may be somebody else's?"""
    expert, row, column = stack.stride()
    if column != 1 or row == 0 or row % (16 // stack.element_size()):
        return False
    return expert % row == 0 and starts_aligned(stack)


def in_boxes(x: Tensor, *box: int) -> TensorDescriptor:
    """x, whose rows start at multiples of 16 bytes, in boxes of this shape."""
    return described(x, x.shape, x.stride(), box)


def described(x: Tensor, shape: Sequence[int], strides: Sequence[int], box: tuple[int, ...]) -> TensorDescriptor:
    """What triton makes of these: without its checks, which take the host as long as a launch. The driver repeats them
    when it encodes the descriptor."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = x, shape, strides
    made.block_shape, made.layout = list(box), box_layout(box, x.dtype)
    return made
