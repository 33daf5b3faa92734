"""Block-scaled FP8 weights, as DeepSeek-V3's checkpoints store them."""

from __future__ import annotations

from torch import Tensor

BLOCK = (128, 128)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Shape of the scales of a weight [N, K]: one per block, partial blocks at the edges included."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantise(weight_NK: Tensor, scale_inv: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """float32 [N, K]: every element times the scale of its block.

    weight_NK is float8_e4m3fn, scale_inv float32 of `scale_shape`. Despite its name in the checkpoint
    (`weight_scale_inv`) the scale is multiplied by (weight notes of the DeepSeek-V3 repository).
    """
    columns = weight_NK.shape[1]
    full_NK = weight_NK.float()
    # One row of blocks at a time: scales spread over the whole weight would double the memory.
    for rows, scales in zip(full_NK.split(block[0]), scale_inv, strict=True):
        rows *= scales.repeat_interleave(block[1])[:columns]
    return full_NK
