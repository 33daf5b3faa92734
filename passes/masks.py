"""What a mask before a softmax lets a query see: all that is cached, or the positions up to its own."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from passes.base import call, is_call, same_size, shape_of
from passes.nodes import CASTS, RESHAPES, constant_of, counts_up, dtype_of, is_tensor
from passes.products import REARRANGEMENTS, sources_of_dims

aten = torch.ops.aten
BATCH, CACHED = 0, 3  # dims of scores [B, H, S, T] or [B, S, H, T]
FOLDED = -1  # the first dim of scores [B·H, S, T]
SCORES = {3: (FOLDED, 2, 3), 4: (0, 1, 2, 3)}  # the dims of scores of so many
Dims = tuple[int | None, ...]  # for every dim of a tensor the dim of the scores that it lies along; None: of size one


class NotAttention(Exception):
    """Why a softmax is not the middle of an attention core, and the node that told."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class Visible:
    """A query sees cached positions t ≤ `last`; None: all of them. One that sees none is padding (dsv3.attention)."""

    last: fx.Node | int | None = None
    dims: Dims = ()
    diagonal: bool = False  # `last` is the query's own index

    @property
    def queries(self) -> int | None:
        """The dim of the scores along which the queries lie, where the mask tells."""
        return next((dim for dim in self.dims if dim in (1, 2)), None)

    def fits(self, batch: Any) -> bool:
        """Are its rows, where it has several, those of a batch of so many?"""
        return BATCH not in self.dims or same_size(shape_of(self.last)[self.dims.index(BATCH)], batch)

    def unfolded(self, batched: bool) -> Visible:
        """The same of scores [B, H, S, T], which are folded to three dims; batched: the first of them is B alone."""
        if FOLDED in self.dims and not batched:
            raise NotAttention("the mask differs between the rows that batch and heads are folded to")
        if 1 in self.dims:
            raise NotAttention("the mask differs from head to head")
        return replace(self, dims=tuple(BATCH if dim == FOLDED else dim for dim in self.dims))

    def write(self, graph: fx.Graph, queries: fx.Node, keys: fx.Node) -> fx.Node:
        """positions [B, S] int64, of queries [B, S, H, A] and keys [B, T, …], at the graph's insertion point."""
        sizes = [size_of(graph, queries, dim) for dim in (0, 1)]
        if self.diagonal:
            own = call(graph, aten.arange.default, sizes[1], device=queries.meta["val"].device, like=queries)
            return replace(self, last=own, diagonal=False).write(graph, queries, keys)
        if isinstance(self.last, fx.Node):
            return self._arranged(graph, self.last, queries, keys, sizes)
        device, end = queries.meta["val"].device, last_of(graph, keys)
        last = end if self.last is None else self.last
        node = call(graph, aten.full.default, sizes, last, dtype=torch.int64, device=device, like=queries)
        return node if self.last is None else call(graph, aten.clamp_max.default, node, end, like=queries)

    def _arranged(self, graph: fx.Graph, node: fx.Node, queries: fx.Node, keys: fx.Node, sizes: list[Any]) -> fx.Node:
        context = shape_of(keys)[1]
        in_bounds = same_size(node.meta.get("upper"), context) or counts_to(node, context)
        wanted = (BATCH, self.queries)
        if len(self.dims) != 2 or any(dim not in (None, along) for dim, along in zip(self.dims, wanted, strict=True)):
            node = self._in_order(graph, node, queries)
        if not all(same_size(own, full) for own, full in zip(shape_of(node), shape_of(queries), strict=False)):
            node = call(graph, aten.expand.default, node, sizes, like=queries)
        if dtype_of(node) != torch.int64:
            node = call(graph, aten._to_copy.default, node, dtype=torch.int64, like=queries)
        if in_bounds:
            return node
        return call(graph, aten.clamp_max.default, node, last_of(graph, keys), like=queries)

    def _in_order(self, graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
        """Dims of the batch and of the queries, in this order, each of size one where `last` has none along it."""
        for dim in reversed(range(len(self.dims))):
            if self.dims[dim] is None:
                node = call(graph, aten.squeeze.dim, node, dim, like=like)
        kept = [dim for dim in self.dims if dim is not None]
        if len(kept) == 2 and kept[1] == BATCH:
            node = call(graph, aten.transpose.int, node, 0, 1, like=like)
        for place, along in enumerate((BATCH, self.queries)):
            if along not in kept:
                node = call(graph, aten.unsqueeze.default, node, place, like=like)
        return node


def counts_to(node: fx.Node, size: Any) -> bool:
    return counts_up(node, 0) and same_size(shape_of(node)[0], size)


def last_of(graph: fx.Graph, keys: fx.Node) -> fx.Node:
    """The last position of keys [B, T, …]: what lies behind it is not theirs to be read."""
    return call(graph, operator.sub, size_of(graph, keys, 1), 1, like=keys)


def size_of(graph: fx.Graph, node: fx.Node, dim: int) -> Any:
    """A size as an argument: the number, or a node that reads it."""
    size = shape_of(node)[dim]
    return size if isinstance(size, int) else call(graph, aten.sym_size.int, node, dim)


# ---- reading ----------------------------------------------------------------------------------------------------


def read_mask(node: fx.Node) -> tuple[fx.Node, Visible]:
    """(scores, what they let through) of the input of a softmax, of three or four dims. Raises NotAttention."""
    dtype, full = dtype_of(node), SCORES[len(shape_of(node))]
    if is_call(node, aten.masked_fill) and is_lowest(node.args[2], node, dtype):
        return node.args[0], read_comparison(node.args[1], False, full)
    if is_call(node, aten.where):
        condition, yes, no = node.args
        if is_lowest(no, node, dtype):
            return yes, read_comparison(condition, True, full)
        if is_lowest(yes, node, dtype):
            return no, read_comparison(condition, False, full)
        raise NotAttention(f"{node.name} before the softmax is not a mask with −∞", node)
    if is_call(node, aten.add) and not node.kwargs:
        for scores, mask in (node.args[:2], node.args[1::-1]):
            if isinstance(mask, fx.Node) and is_mask(mask):
                return scores, read_additive(mask, dtype, full)
    if is_call(node, *MASKING):
        raise NotAttention(f"{node.name} before the softmax is not a mask with −∞", node)
    return node, Visible()


JOINTS = (aten.bitwise_and, aten.logical_and, aten.__and__, aten.bitwise_or, aten.logical_or, aten.__or__, aten.mul)
COUNTING = (torch.int32, torch.int64, torch.float32, torch.float64)  # in narrower ones positions wrap or are rounded
MASKING = (aten.masked_fill, aten.where, aten.masked_scatter)
FAR_BELOW = -1e9  # what textbooks write for −∞: scores, products of two rows of a head, come nowhere near


def is_mask(node: fx.Node) -> bool:
    """Is what is added to scores no product of anything?"""
    node = through(node)
    while is_call(node, aten.mul, aten.div) and isinstance(node.args[1], (int, float)):
        node = through(node.args[0])
    return node.op == "placeholder" or is_call(node, *MASKING, aten.triu, aten.mul, aten.sub, aten.rsub)


def through(node: fx.Node) -> fx.Node:
    """The tensor behind casts, views and slices of a mask."""
    while is_call(node, *CASTS, *REARRANGEMENTS, aten.slice, aten.repeat_interleave):
        node = node.args[0]
    return node


def read_additive(mask: fx.Node, scores: torch.dtype, full: Dims) -> Visible:
    """A mask of zero where a query sees and −∞ (or the lowest number of its dtype) where it does not.

    full: the dims of the scores.
    """
    node, dims = behind(mask, last_dims(full, mask))
    if is_call(node, aten.triu) and is_lowest(node.args[0], node, scores) and _is_diagonal(node, dims, 1):
        return Visible(dims=(dims[-2],), diagonal=True)
    if is_call(node, aten.masked_fill) and constant_of(node.args[0]) == 0 and is_lowest(node.args[2], node, scores):
        return read_comparison(node.args[1], False, dims)
    if is_call(node, aten.where):
        condition, yes, no = node.args
        if constant_of(yes) == 0 and is_lowest(no, node, scores):
            return read_comparison(condition, True, dims)
        if constant_of(no) == 0 and is_lowest(yes, node, scores):
            return read_comparison(condition, False, dims)
    raise NotAttention(f"{mask.name}, added before the softmax, is not a mask of zero and −∞", mask)


def is_lowest(value: Any, mask: fx.Node, scores: torch.dtype) -> bool:
    """−∞, FAR_BELOW, or the lowest number of the mask's dtype: no score that is added to it, or in its place, leaves
    anything of its share.

    That of float16 only among its own: scores of other dtypes reach as far.
    """
    number, dtype = constant_of(value), dtype_of(mask)
    if number is None or not dtype.is_floating_point:
        return False
    return number <= FAR_BELOW or (number == torch.finfo(dtype).min and (dtype is not torch.float16 or scores is dtype))


def behind(node: fx.Node, dims: Dims, positions: bool = False) -> tuple[fx.Node, Dims]:
    """The tensor behind casts and moved, new or broadcast dims, and where its dims lie in the scores.

    positions: it holds some, and is read through those casts only that leave them as they are.
    """
    while True:
        sources = None if node.op != "call_function" else sources_of_dims(node)
        if dims[:1] == (FOLDED,) and (unfolded := unfold(node)) is not None:
            node, dims = unfolded[0], (*unfolded[1], *dims[1:])
        elif is_call(node, *CASTS) and not (positions and _changes_positions(node)):
            node = node.args[0]
        elif sources is not None:
            before: list[int | None] = [None] * len(shape_of(node.args[0]))
            for source, dim in zip(sources, dims, strict=True):
                if source is not None:
                    before[source] = dim
            node, dims = node.args[0], tuple(before)
        else:
            return node, dims


def unfold(node: fx.Node) -> tuple[fx.Node, Dims] | None:
    """Of a tensor [B·H, S, T] the one [B, H, S, T] or [B, S, T] behind it, and which dims of scores lie folded in the
    first; None if neither is there."""
    if is_call(node, *RESHAPES):
        before, after = shape_of(node.args[0]), shape_of(node)
        if len(before) == 4 and len(after) == 3 and all(map(same_size, before[2:], after[1:])):
            return node.args[0], (BATCH, 1)
    if is_call(node, aten.repeat_interleave) and isinstance(node.args[1], int) and node.args[2:] == (0,):
        return node.args[0], (BATCH,)
    return None


def last_dims(full: Dims, node: fx.Node) -> Dims:
    """Where the dims of something that is broadcast to scores of these dims lie."""
    return full[len(full) - len(shape_of(node)) :]


def _changes_positions(cast: fx.Node) -> bool:
    return dtype_of(cast) not in COUNTING or dtype_of(cast.args[0]).is_floating_point


def read_comparison(condition: fx.Node, kept: bool, dims: Dims) -> Visible:
    """What a bool tensor, broadcast to these dims, lets through where it is `kept` (or its opposite)."""
    node, dims = behind(condition, last_dims(dims, condition))
    while is_call(node, aten.bitwise_not, aten.logical_not):
        node, dims = behind(node.args[0], dims)
        kept = not kept
    if is_call(node, aten.tril) and kept and constant_of(node.args[0]) == 1 and _is_diagonal(node, dims, 0):
        return Visible(dims=(dims[-2],), diagonal=True)
    if is_call(node, aten.triu) and not kept and constant_of(node.args[0]) == 1 and _is_diagonal(node, dims, 1):
        return Visible(dims=(dims[-2],), diagonal=True)
    if is_call(node, *JOINTS):
        raise NotAttention(
            f"the mask {node.name} is not a comparison of positions alone: it joins several conditions", node
        )
    at_most, at_least = ((aten.le,), (aten.ge,)) if kept else ((aten.gt,), (aten.lt,))
    if not is_call(node, *at_most, *at_least):
        raise NotAttention(f"the mask {condition.name} is not a comparison of positions", condition)
    cached, query = node.args if is_call(node, *at_most) else node.args[::-1]
    if not is_tensor(cached) or not _counts_cached(*_side(cached, node, dims)):
        raise NotAttention(f"the mask {condition.name} does not compare arange with positions [B, S]", condition)
    if isinstance(query, int):
        if query < 0:
            raise NotAttention(f"the mask {condition.name} hides every position", condition)
        return Visible(query)
    if not is_tensor(query):
        raise NotAttention(f"the mask {condition.name} does not compare arange with positions [B, S]", condition)
    last, along = _side(query, node, dims)
    lies = [dim for dim in along if dim is not None]
    if CACHED in lies or {1, 2} <= set(lies) or len(set(lies)) != len(lies) or dtype_of(last).is_floating_point:
        raise NotAttention(f"the mask {condition.name} does not compare arange with positions [B, S]", condition)
    return Visible(last, along)


def _side(side: fx.Node, comparison: fx.Node, dims: Dims) -> tuple[fx.Node, Dims]:
    """One side of a comparison, and where its dims lie; those of size one that are broadcast lie nowhere."""
    own, full = shape_of(side), shape_of(comparison)
    skipped = len(full) - len(own)
    along = tuple(
        dim if same_size(size, wide) and not same_size(size, 1) else None
        for dim, size, wide in zip(dims[skipped:], own, full[skipped:], strict=True)
    )
    return behind(side, along, positions=True)


def _counts_cached(node: fx.Node, along: Dims) -> bool:
    return along == (CACHED,) and counts_up(node, 0) and dtype_of(node) in COUNTING


def _is_diagonal(node: fx.Node, dims: Dims, diagonal: int) -> bool:
    alone = all(same_size(size, 1) for size in shape_of(node)[:-2])
    return alone and dims[-2:] in ((1, CACHED), (2, CACHED)) and (*node.args[1:], 0)[0] == diagonal
