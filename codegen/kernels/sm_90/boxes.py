"""Tensors as the copy engine of Hopper takes them: in boxes of a fixed shape, with zeros behind the edges."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@functools.cache
def box_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory. Finding that out takes the host as long as a launch, hence once."""
    return gl.NVMMASharedLayout.get_default_for(list(box), getattr(gl, str(dtype).removeprefix("torch.")))


def matrix_of(stack: Tensor) -> tuple[Tensor, int]:
    """A stack [E, O, D] as one matrix, and how many of its rows lie from one expert's first to the next one's."""
    experts, rows, columns = stack.shape
    apart = stack.stride(0) // columns
    return stack.as_strided(((experts - 1) * apart + rows, columns), (columns, 1)), apart


def is_matrix(stack: Tensor) -> bool:
    """Are the rows of a stack [E, O, D] those of one matrix, some of which may be somebody else's?"""
    return stack.stride()[1:] == (stack.shape[2], 1) and stack.stride(0) % stack.shape[2] == 0


def in_boxes(x: Tensor, *box: int) -> TensorDescriptor:
    """x, whose rows start at multiples of 16 bytes, in boxes of this shape."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box), box_layout(box, x.dtype))
