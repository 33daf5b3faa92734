"""Products and rearrangements of tensors, with one letter per axis."""

from __future__ import annotations

import operator
import string
from dataclasses import dataclass

import torch
from torch import fx

from passes.base import call, equation_of, is_call, same_size, shape_of
from passes.nodes import RESHAPES, is_tensor

aten = torch.ops.aten

BROADCAST = "1"  # letter of a dim of size one that stands for every index of the other side


@dataclass(frozen=True)
class Product:
    """out[letters] = Σ_(letters not in out) Π operand[letters]."""

    operands: tuple[tuple[fx.Node, str], ...]
    out: str

    def summed(self) -> set[str]:
        return {c for _, letters in self.operands for c in letters} - set(self.out) - {BROADCAST}


def product_of(node: fx.Node) -> Product | None:
    """Read a node as a product, or None: einsum, linear, mm, bmm, matmul, tensor · tensor, sum over axes."""
    if is_call(node, aten.einsum):
        return _einsum(node)
    if is_call(node, aten.linear) and not (len(node.args) > 2 and node.args[2] is not None):
        x, weight = node.args[0], node.args[1]
        batch = string.ascii_lowercase[: len(shape_of(x)) - 1]
        own = "z"[: len(shape_of(weight)) - 1]  # a weight [D] has no outputs of its own
        return Product(((x, batch + "y"), (weight, own + "y")), batch + own)
    if is_call(node, aten.mm, aten.bmm, aten.matmul):
        left, right = node.args[0], node.args[1]
        if min(len(shape_of(left)), len(shape_of(right))) < 2:
            return None
        batch = string.ascii_lowercase[: len(shape_of(node)) - 2]
        return _aligned(node, ((left, "xy"), (right, "yz")), batch, "xz")
    if is_call(node, aten.mul) and all(map(is_tensor, node.args[:2])):
        letters = string.ascii_lowercase[: len(shape_of(node))]
        return _aligned(node, ((node.args[0], ""), (node.args[1], "")), letters, "")
    if is_call(node, aten.sum) and len(node.args) > 1 and isinstance(node.args[1], (list, tuple)) and node.args[1]:
        source, rank = node.args[0], len(shape_of(node.args[0]))
        dims = {d % rank for d in node.args[1]}
        keep = BROADCAST if len(node.args) > 2 and node.args[2] else ""
        letters = string.ascii_lowercase[:rank]
        return Product(((source, letters),), "".join(keep if d in dims else c for d, c in enumerate(letters)))
    return None


def _einsum(node: fx.Node) -> Product | None:
    letters, out = equation_of(node)
    operands = list(zip(node.args[1], letters, strict=True))
    if any(len(set(own)) != len(own) for own in letters):
        return None
    wide = {c for x, own in operands for c, size in zip(own, shape_of(x), strict=True) if not same_size(size, 1)}

    def spelled(x: fx.Node, own: str) -> str:
        sizes = zip(own, shape_of(x), strict=True)
        return "".join(BROADCAST if c in wide and same_size(size, 1) else c for c, size in sizes)

    return Product(tuple((x, spelled(x, own)) for x, own in operands), out)


def _aligned(node: fx.Node, operands: tuple[tuple[fx.Node, str], ...], batch: str, rest: str) -> Product:
    """Letters of operands whose leading dims broadcast against `batch`, aligned on the right."""
    shape, named = shape_of(node), []
    for operand, own in operands:
        sizes = shape_of(operand)[: len(shape_of(operand)) - len(own)]
        skipped = len(batch) - len(sizes)
        letters = "".join(
            c if same_size(size, full) else BROADCAST
            for c, size, full in zip(batch[skipped:], sizes, shape[skipped:], strict=False)
        )
        named.append((operand, letters + own))
    return Product(tuple(named), batch + rest)


def sources_of_dims(node: fx.Node) -> tuple[int | None, ...] | None:
    """For a rearrangement, the input dim behind every output dim (None: a new or broadcast dim); else None.

    Rearrangements move dims, and add, remove or broadcast dims of size one. They never merge or split dims.
    """
    if not is_call(node, *REARRANGEMENTS):
        return None
    source = node.args[0]
    before, after = shape_of(source), shape_of(node)
    rank = len(before)
    if is_call(node, aten.permute):
        return tuple(d % rank for d in node.args[1])
    if is_call(node, aten.transpose, aten.t):
        if rank < 2:
            return tuple(range(rank))
        first, second = (node.args[1] % rank, node.args[2] % rank) if len(node.args) > 1 else (0, 1)
        order = list(range(rank))
        order[first], order[second] = order[second], order[first]
        return tuple(order)
    if is_call(node, aten.expand):
        new = len(after) - rank
        return (None,) * new + tuple(d if same_size(before[d], after[new + d]) else None for d in range(rank))
    if is_call(node, aten.unsqueeze):
        dim = node.args[1] % len(after)
        return tuple(None if d == dim else d - (d > dim) for d in range(len(after)))
    return _same_but_ones(before, after)


def _same_but_ones(before: tuple, after: tuple) -> tuple[int | None, ...] | None:
    """Match the dims of a view from left to right; only dims of size one may come and go."""
    sources: list[int | None] = []
    position = 0
    for size in after:
        ahead = position
        while ahead < len(before) and not same_size(before[ahead], size) and same_size(before[ahead], 1):
            ahead += 1
        if ahead < len(before) and same_size(before[ahead], size):
            sources.append(ahead)
            position = ahead + 1
        elif same_size(size, 1):
            sources.append(None)
        else:
            return None
    return tuple(sources) if all(same_size(size, 1) for size in before[position:]) else None


REARRANGEMENTS = (
    aten.permute, aten.transpose, aten.t, aten.expand, aten.unsqueeze, aten.squeeze, *RESHAPES,
)  # fmt: skip


# ---- parts of a tensor ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Every `step`-th index from `start` on, `length` of them, of one axis of `source`."""

    source: fx.Node
    axis: int
    start: int
    length: int
    step: int = 1

    @property
    def stop(self) -> int:
        """Where a slice of these indices may end."""
        return self.start + self.length * self.step


def part_of(node: fx.Node) -> Part | None:
    """Read a node as a slice or one piece of a split, with all sizes known, or None."""
    if is_call(node, operator.getitem):
        return _piece(*node.args)
    if is_call(node, aten.slice, aten.narrow):
        source = node.args[0]
        rank = len(shape_of(source))
        axis, start, stop, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])[:4]
        size = shape_of(source)[axis % rank]
        start = start or 0
        if not all(isinstance(n, int) for n in (size, start, step, shape_of(node)[axis % rank])):
            return None
        length = shape_of(node)[axis % rank]
        step = 1 if is_call(node, aten.narrow) else step
        return Part(source, axis % rank, max(start + size, 0) if start < 0 else min(start, size), length, step)
    return None


def _piece(split: fx.Node, index: int) -> Part | None:
    if not is_call(split, aten.split_with_sizes, aten.split, aten.chunk):
        return None
    source = split.args[0]
    axis = (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % len(shape_of(source))
    sizes = [piece.shape[axis] for piece in split.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return Part(source, axis, sum(sizes[:index]), sizes[index])


def join(graph: fx.Graph, first: Part, second: Part) -> fx.Node | None:
    """The tensor in which `second` directly follows `first`, or None; a slice is inserted if it is wider."""
    if (first.source, first.axis) != (second.source, second.axis) or not first.step == second.step == 1:
        return None
    if first.start + first.length != second.start:
        return None
    stop = second.start + second.length
    if first.start == 0 and same_size(stop, shape_of(first.source)[first.axis]):
        return first.source
    return call(graph, aten.slice.Tensor, first.source, first.axis, first.start, stop, like=first.source)
