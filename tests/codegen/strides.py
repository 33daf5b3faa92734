"""A tensor's numbers at other places in memory: what a kernel reads by its strides, or copies before it does."""

from collections.abc import Iterator

from torch import Tensor


def elsewhere(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(how it lies, x as it lies there)"""
    *lead, last = x.shape
    yield "every other column", x.new_empty(*lead, 2 * last)[..., ::2].copy_(x)
    yield "part of wider rows", x.new_empty(*lead, last + 3)[..., 1:-2].copy_(x)
    yield "behind something", x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if x.dim() > 1:
        yield "turned", x.transpose(0, -1).contiguous().transpose(0, -1)


def repeated(x: Tensor) -> Tensor:
    """x with its first entry in the place of all, which takes no memory."""
    return x[:1].expand(x.shape)
