"""What launchers share: views that kernels can address with one stride per row, sizes of grids and tiles, and launch
options."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [.., D] as [rows, D] with neighbouring columns; a copy only where no such view exists."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def packed(x: Tensor) -> Tensor:
    """x itself if neighbours on its last axis are neighbours in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_written(op: str, latent: Tensor, rope_key: Tensor) -> None:
    """Caches are written in place, so that a copy would not do: ValueError unless their last axes are packed."""
    if latent.stride(2) != 1 or rope_key.stride(2) != 1:
        raise ValueError(f"{op}: the last axis of latent and rope_key must be contiguous")


def halves(gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gates and ups, [E, I, D] each, of one stack [E, 2I, D], or of two."""
    if up is not None:
        return gate_up, up
    gate, up = gate_up.chunk(2, 1)
    return gate, up


def cdiv(size: int, part: int) -> int:
    """How many parts a size is cut into. triton's own, for kernels as well, takes the host longer."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not less than a size of at least 1."""
    return 1 << (size - 1).bit_length()


def started_early(overlapped: bool) -> dict[str, bool]:
    """Options of a launch that may begin before the one in front of it has ended; not every target knows of them."""
    return {"launch_pdl": True} if overlapped else {}
