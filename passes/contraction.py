"""Sums of products of tensors with named axes: the algebra behind absorption.

`lift(node)` reads the graph backwards from a node through everything linear (products, views, permutes, slices,
concatenations, scaling, sums) and returns the node's value as an exact formula

    value[dims] = Σ_terms scale · Σ_(axes not in dims) operand_1[axes] · operand_2[axes] · …

Everything else (a norm, a softmax, a cache write) ends the reading and becomes an operand. A concatenation along an
axis that is later contracted becomes a sum of terms; a concatenation that is not is kept as pieces.
A value that the graph already computes on the way is remembered as a *cut*: it may stand for the operands it covers.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from passes.base import call, is_call, shape_of

aten = torch.ops.aten
CONTRACTIONS = (aten.einsum, aten.linear, aten.mm, aten.bmm, aten.matmul)
Size = Any  # int or sympy expression


class NotLinear(Exception):
    """The node cannot be read further; it becomes an operand."""


@dataclass(eq=False)
class Axis:
    """One named axis; identity is what counts, `label` is only a wish for the printed letter."""

    size: Size
    label: str = ""


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph seen through splits and slices of its dims; one axis per dim."""

    node: fx.Node
    steps: tuple[tuple[Any, ...], ...]
    axes: tuple[Axis, ...]

    def substitute(self, old: Axis, new: Sequence[Axis]) -> Operand:
        if old not in self.axes:
            return self
        dim = self.axes.index(old)
        axes = self.axes[:dim] + tuple(new) + self.axes[dim + 1 :]
        steps = self.steps
        if len(new) != 1:
            steps += (("unflatten", dim, tuple(a.size for a in new)),)
        return Operand(self.node, steps, axes)

    def narrow(self, old: Axis, start: int, stop: int, new: Axis) -> Operand:
        if old not in self.axes:
            return self
        dim = self.axes.index(old)
        axes = self.axes[:dim] + (new,) + self.axes[dim + 1 :]
        return Operand(self.node, (*self.steps, ("slice", dim, start, stop)), axes)


@dataclass(frozen=True)
class Term:
    """scale · product of operands; `cuts` are tensors of the graph equal to the product of a subset of them."""

    operands: tuple[Operand, ...]
    cuts: tuple[tuple[frozenset[int], Operand], ...] = ()
    scale: float = 1.0

    def map(self, change: Callable[[Operand], Operand]) -> Term:
        return Term(
            tuple(change(o) for o in self.operands),
            tuple((covered, change(o)) for covered, o in self.cuts),
            self.scale,
        )

    def times(self, other: Term) -> Term:
        shift = len(self.operands)
        moved = tuple((frozenset(i + shift for i in covered), o) for covered, o in other.cuts)
        return Term(self.operands + other.operands, self.cuts + moved, self.scale * other.scale)


@dataclass(frozen=True)
class Piece:
    """The terms of one segment of a concatenated axis (`axis` is the segment), or of the whole value (None)."""

    terms: tuple[Term, ...]
    axis: Axis | None = None


@dataclass(frozen=True)
class Value:
    """dims: for every dim of the tensor the axes merged in it, outermost first; () is a dim of size one."""

    dims: tuple[tuple[Axis, ...], ...]
    pieces: tuple[Piece, ...]
    joined: Axis | None = None  # the concatenated axis, if any
    through: frozenset[fx.Node] = field(default_factory=frozenset)  # nodes read through

    @property
    def terms(self) -> tuple[Term, ...]:
        if self.joined is not None:
            raise NotLinear("a concatenation remains")
        return self.pieces[0].terms

    def map(self, change: Callable[[Operand], Operand]) -> Value:
        pieces = tuple(Piece(tuple(t.map(change) for t in p.terms), p.axis) for p in self.pieces)
        return replace(self, pieces=pieces)

    def substitute(self, old: Axis, new: Sequence[Axis]) -> Value:
        if old is self.joined:
            if len(new) != 1:
                raise NotLinear("a concatenated axis is split")
            return replace(self, dims=_swap(self.dims, old, new), joined=new[0])
        return replace(self.map(lambda o: o.substitute(old, new)), dims=_swap(self.dims, old, new))

    def narrow(self, old: Axis, start: int, stop: int) -> Value:
        if old is self.joined:
            edges = list(itertools.accumulate((p.axis.size for p in self.pieces if p.axis), initial=0))
            for piece, low, high in zip(self.pieces, edges, edges[1:], strict=False):
                if (low, high) == (start, stop) and piece.axis is not None:
                    dims = _swap(self.dims, old, (piece.axis,))
                    return replace(self, dims=dims, pieces=(Piece(piece.terms),), joined=None)
            raise NotLinear("a slice across the seam of a concatenation")
        new = Axis(stop - start, old.label)
        return replace(
            self.map(lambda o: o.narrow(old, start, stop, new)), dims=_swap(self.dims, old, (new,))
        )


def _swap(dims: tuple[tuple[Axis, ...], ...], old: Axis, new: Sequence[Axis]) -> tuple[tuple[Axis, ...], ...]:
    return tuple(tuple(a for axis in group for a in (new if axis is old else (axis,))) for group in dims)


def size_expr(size: Any) -> Size:
    """int stays int; a SymInt becomes its sympy expression."""
    return size if isinstance(size, int) else sympy.sympify(getattr(size.node, "expr", size))


def leaf(node: fx.Node) -> Value:
    axes = tuple(Axis(size_expr(s)) for s in shape_of(node))
    return Value(tuple((a,) for a in axes), (Piece((Term((Operand(node, (), axes),)),)),))


def lift(node: fx.Node, *, top: bool = True) -> Value:
    """The node's value as a sum of products; every call makes fresh axes."""
    reader = next((read for targets, read in READERS if is_call(node, *targets)), None)
    if reader is None:
        return leaf(node)
    try:
        value = reader(node)
    except NotLinear:
        return leaf(node)
    value = replace(value, through=value.through | {node})
    return value if top else _with_cut(node, value)


def _with_cut(node: fx.Node, value: Value) -> Value:
    """Remember that the graph computes this product itself, where it is a product."""
    if not is_call(node, *CONTRACTIONS) or value.joined is not None or len(value.terms) != 1:
        return value
    (term,) = value.terms
    if term.scale != 1.0:  # the node includes the factor, the covered operands alone do not
        return value
    covered = frozenset(range(len(term.operands)))
    cut = Operand(node, *_flattened_view(value.dims))
    return replace(value, pieces=(Piece((replace(term, cuts=(*term.cuts, (covered, cut))),)),))


def _flattened_view(dims: Sequence[tuple[Axis, ...]]) -> tuple[tuple[tuple[Any, ...], ...], tuple[Axis, ...]]:
    """The splits that take a tensor with merged dims to one axis per dim, and those axes."""
    steps: list[tuple[Any, ...]] = []
    axes: list[Axis] = []
    for group in dims:
        if len(group) != 1:
            steps.append(("unflatten", len(axes), tuple(a.size for a in group)))
        axes.extend(group)
    return tuple(steps), tuple(axes)


# ---- products ---------------------------------------------------------------------------------------------------


def _unify(a: Value, b: Value, dim_a: int, dim_b: int) -> tuple[Value, Value]:
    """Give dim_a of a and dim_b of b the same axes, splitting the coarser side."""
    i = 0
    while True:
        group_a, group_b = a.dims[dim_a], b.dims[dim_b]
        if i == len(group_a) and i == len(group_b):
            return a, b
        if i >= len(group_a) or i >= len(group_b):
            raise NotLinear("sizes do not match")
        x, y = group_a[i], group_b[i]
        if x is not y:
            if x.size == y.size:
                if y is b.joined and x is not a.joined:
                    a = a.substitute(x, (y,))
                else:
                    b = b.substitute(y, (x,))
            elif isinstance(x.size, int) and isinstance(y.size, int):
                large, small = (x, y) if x.size > y.size else (y, x)
                if large.size % small.size:
                    raise NotLinear("sizes do not match")
                parts = (Axis(small.size, small.label), Axis(large.size // small.size, large.label))
                if large is x:
                    a = a.substitute(x, parts)
                else:
                    b = b.substitute(y, parts)
                continue
            else:
                raise NotLinear("symbolic sizes do not match")
        i += 1


def contract(a: Value, b: Value, letters_a: str, letters_b: str, out: str, *, name: bool = False) -> Value:
    """einsum of two values; a letter stands for a whole dim. `name` lets the axes keep the letters."""
    for letter in dict.fromkeys(letters_a):
        if letter in letters_b:
            dim_a, dim_b = letters_a.index(letter), letters_b.index(letter)
            joined_a, joined_b = a.joined, b.joined
            seam_a = joined_a is not None and joined_a in a.dims[dim_a]
            seam_b = joined_b is not None and joined_b in b.dims[dim_b]
            if (
                seam_a
                and seam_b
                and [p.axis.size for p in a.pieces if p.axis] != [p.axis.size for p in b.pieces if p.axis]
            ):
                raise NotLinear("concatenations with different seams meet")
            a, b = _unify(a, b, dim_a, dim_b)
    groups = {**dict(zip(letters_a, a.dims, strict=True)), **dict(zip(letters_b, b.dims, strict=True))}
    for letter, group in groups.items():
        if name and len(group) == 1:
            group[0].label = group[0].label or letter
    dims = tuple(groups[letter] for letter in out)
    kept = {axis for group in dims for axis in group}
    through = a.through | b.through
    if a.joined is None and b.joined is None:
        return Value(dims, (Piece(_products(a.pieces[0].terms, b.pieces[0].terms)),), None, through)
    joined = a.joined or b.joined
    if a.joined is not None and b.joined is not None and a.joined is not b.joined:
        raise NotLinear("two concatenations meet in one product")
    assert joined is not None
    pieces, start = [], 0
    for k in range(len((a if a.joined else b).pieces)):
        axis = (a if a.joined else b).pieces[k].axis
        assert axis is not None
        side_a, side_b = (_segment(v, joined, k, axis, start) for v in (a, b))
        pieces.append(Piece(_products(side_a, side_b), axis))
        start += axis.size
    if joined in kept:
        return Value(dims, tuple(pieces), joined, through)
    return Value(dims, (Piece(tuple(t for p in pieces for t in p.terms)),), None, through)


def _segment(value: Value, joined: Axis, k: int, axis: Axis, start: int) -> tuple[Term, ...]:
    """The terms of one side of a product, restricted to segment k of the concatenated axis."""
    if value.joined is None:  # only the other side is concatenated: slice this one to the segment
        return tuple(
            t.map(lambda o: o.narrow(joined, start, start + axis.size, axis)) for t in value.pieces[0].terms
        )
    piece = value.pieces[k]
    own = piece.axis
    assert own is not None
    return tuple(t.map(lambda o: o.substitute(own, (axis,))) for t in piece.terms)


def _products(left: Sequence[Term], right: Sequence[Term]) -> tuple[Term, ...]:
    return tuple(x.times(y) for x in left for y in right)


def _read(node: Any) -> Value:
    if not isinstance(node, fx.Node):
        raise NotLinear("not a tensor")
    return lift(node, top=False)


def _read_einsum(node: fx.Node) -> Value:
    equation, operands = node.args[0], node.args[1]
    inputs, out = equation.replace(" ", "").split("->")
    letters = inputs.split(",")
    if len(operands) != 2 or "." in equation or any(len(set(s)) != len(s) for s in letters):
        raise NotLinear("not a product of two tensors")
    lonely = [c for i, s in enumerate(letters) for c in s if c not in out and c not in letters[1 - i]]
    if lonely:
        raise NotLinear("an axis of one operand is summed away")
    return contract(_read(operands[0]), _read(operands[1]), letters[0], letters[1], out, name=True)


def _read_linear(node: fx.Node) -> Value:
    if len(node.args) > 2 and node.args[2] is not None:
        raise NotLinear("a bias is added")
    rank = len(shape_of(node.args[0]))
    batch = "abcdefgh"[: rank - 1]
    return contract(_read(node.args[0]), _read(node.args[1]), batch + "i", "oi", batch + "o")


def _read_matmul(node: fx.Node) -> Value:
    left, right = node.args[0], node.args[1]
    shape_l, shape_r = shape_of(left), shape_of(right)
    if len(shape_l) < 2 or len(shape_r) < 2:
        raise NotLinear("a vector product")
    rank = max(len(shape_l), len(shape_r)) - 2
    batch = "abcdefgh"[:rank]
    letters_l, letters_r = (
        batch[rank - (len(shape_l) - 2) :] + "ik",
        batch[rank - (len(shape_r) - 2) :] + "ko",
    )
    a, b = _read(left), _read(right)
    for letter in set(letters_l) & set(letters_r) - {"k"}:
        dims = a.dims[letters_l.index(letter)], b.dims[letters_r.index(letter)]
        if (dims[0] == ()) != (dims[1] == ()):
            raise NotLinear("a broadcast batch dim")
    return contract(a, b, letters_l, letters_r, batch + "io")


# ---- views ------------------------------------------------------------------------------------------------------


def _read_same(node: fx.Node) -> Value:
    source = node.args[0]
    if node.meta["val"].dtype != source.meta["val"].dtype:
        raise NotLinear("a cast")
    return _read(source)


def _read_view(node: fx.Node) -> Value:
    """Split and merge axes: walk over both shapes and cut the input's axes where the output's dims end."""
    value, wanted = _read(node.args[0]), [size_expr(s) for s in shape_of(node)]
    axes = [axis for group in value.dims for axis in group]
    dims: list[tuple[Axis, ...]] = []
    for size in wanted:
        group: list[Axis] = []
        have: Size = 1
        while have != size:
            if not axes:
                raise NotLinear("a view that cannot be followed")
            axis = axes.pop(0)
            if (
                isinstance(size, int)
                and isinstance(have, int)
                and isinstance(axis.size, int)
                and have * axis.size > size
            ):
                if size % have or axis.size % (size // have):
                    raise NotLinear("a view across dims")
                parts = (Axis(size // have), Axis(axis.size // (size // have)))
                value = value.substitute(axis, parts)
                axis = parts[0]
                axes.insert(0, parts[1])
            group.append(axis)
            have = (
                sympy.expand(have * axis.size) if not isinstance(have * axis.size, int) else have * axis.size
            )
        if size == 1 and not group and axes and axes[0].size == 1:
            group.append(axes.pop(0))
        dims.append(tuple(group))
    if any(axis.size != 1 for axis in axes):
        raise NotLinear("a view that cannot be followed")
    if value.joined is not None and any(value.joined in g and len(g) > 1 for g in dims):
        raise NotLinear("a concatenated axis is merged")
    return replace(value, dims=tuple(dims))


def _read_unsqueeze(node: fx.Node) -> Value:
    value = _read(node.args[0])
    dim = node.args[1] % (len(value.dims) + 1)
    return replace(value, dims=value.dims[:dim] + ((),) + value.dims[dim:])


def _read_squeeze(node: fx.Node) -> Value:
    value = _read(node.args[0])
    which = node.args[1] if isinstance(node.args[1], (list, tuple)) else (node.args[1],)
    gone = {d % len(value.dims) for d in which}
    if any(shape_of(node.args[0])[d] != 1 for d in gone):
        raise NotLinear("a squeeze of a dim that is not one")
    return replace(value, dims=tuple(g for d, g in enumerate(value.dims) if d not in gone))


def _read_permute(node: fx.Node) -> Value:
    value = _read(node.args[0])
    rank = len(value.dims)
    if is_call(node, aten.permute):
        order = [d % rank for d in node.args[1]]
    else:
        first, second = (0, 1) if is_call(node, aten.t) else (node.args[1] % rank, node.args[2] % rank)
        order = list(range(rank))
        order[first], order[second] = order[second], order[first]
    return replace(value, dims=tuple(value.dims[d] for d in order))


def _read_expand(node: fx.Node) -> Value:
    value = _read(node.args[0])
    wanted = [size_expr(s) for s in shape_of(node)]
    dims = ((),) * (len(wanted) - len(value.dims)) + value.dims
    grown: list[tuple[Axis, ...]] = []
    for group, size in zip(dims, wanted, strict=True):
        if group == () and size != 1:
            group = (Axis(size),)  # an axis that no operand has: broadcast
        elif group and size != 1 and all(a.size == 1 for a in group):
            raise NotLinear("a dim of size one is broadcast")
        grown.append(group)
    return replace(value, dims=tuple(grown))


def _narrow(value: Value, dim: int, start: int, stop: int, size: Size) -> Value:
    if (start, stop) == (0, size):
        return value
    if len(value.dims[dim]) != 1 or not isinstance(size, int):
        raise NotLinear("a slice of merged or symbolic dims")
    return value.narrow(value.dims[dim][0], start, stop)


def _read_slice(node: fx.Node) -> Value:
    source, dim, start, stop, step = (list(node.args) + [0, None, None, 1][len(node.args) - 1 :])[:5]
    value, rank = _read(source), len(shape_of(source))
    dim %= rank
    size = size_expr(shape_of(source)[dim])
    start = 0 if start is None else start
    if step != 1 or not isinstance(start, int) or not (stop is None or isinstance(stop, int)):
        raise NotLinear("a strided or symbolic slice")
    if not isinstance(size, int):
        if start == 0 and (stop is None or stop == 2**63 - 1):
            return value
        raise NotLinear("a slice of a symbolic dim")
    stop = size if stop is None else min(stop, size)
    start, stop = (start % size if start < 0 else start), (stop % size if stop < 0 else stop)
    return _narrow(value, dim, start, stop, size)


def _read_getitem(node: fx.Node) -> Value:
    split, index = node.args
    if not is_call(split, aten.split_with_sizes, aten.split, aten.chunk):
        raise NotLinear("not a split")
    source = split.args[0]
    dim = (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % len(shape_of(source))
    sizes = [size_expr(piece.shape[dim]) for piece in split.meta["val"]]
    if not all(isinstance(s, int) for s in sizes):
        raise NotLinear("a symbolic split")
    start = sum(sizes[:index])
    return _narrow(_read(source), dim, start, start + sizes[index], size_expr(shape_of(source)[dim]))


def _read_cat(node: fx.Node) -> Value:
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))
    parts = [_read(n) for n in node.args[0]]
    for k, part in enumerate(parts):
        if part.joined is not None or len(part.dims[dim]) != 1:  # merged there: take the tensor as it is
            parts[k] = leaf(node.args[0][k])
    if any(not isinstance(p.dims[dim][0].size, int) for p in parts):
        raise NotLinear("a concatenation along a symbolic axis")
    first = parts[0]
    for k in range(1, len(parts)):
        for d in range(len(first.dims)):
            if d != dim:
                first, parts[k] = _unify(first, parts[k], d, d)
    parts[0] = first
    # the first part may have been split further while a later one was unified
    for part in parts[1:]:
        if any(part.dims[d] != first.dims[d] for d in range(len(first.dims)) if d != dim):
            raise NotLinear("parts with different layouts")
    joined = Axis(sum(p.dims[dim][0].size for p in parts))
    pieces = tuple(Piece(p.terms, p.dims[dim][0]) for p in parts)
    dims = tuple((joined,) if d == dim else group for d, group in enumerate(first.dims))
    return Value(dims, pieces, joined, frozenset().union(*(p.through for p in parts)))


def _read_scale(node: fx.Node) -> Value:
    left, right = node.args[0], node.args[1]
    if isinstance(left, (int, float)) and not is_call(node, aten.div):
        left, right = right, left
    if not isinstance(right, (int, float)):
        raise NotLinear("a product of two tensors element by element")
    factor = 1.0 / right if is_call(node, aten.div) else float(right)
    value = _read(left)
    pieces = tuple(
        Piece(tuple(replace(t, scale=t.scale * factor) for t in p.terms), p.axis) for p in value.pieces
    )
    return replace(value, pieces=pieces)


def _read_add(node: fx.Node) -> Value:
    """A sum of two products over the same dims; a plain operand on either side ends the reading."""
    if node.kwargs or not all(isinstance(n, fx.Node) for n in node.args[:2]):
        raise NotLinear("a sum with a number")
    a, b = _read(node.args[0]), _read(node.args[1])
    if len(a.dims) != len(b.dims) or any(
        len(t.operands) < 2 for v in (a, b) for p in v.pieces for t in p.terms
    ):
        raise NotLinear("a sum with something that is no product")
    for dim in range(len(a.dims)):
        if (a.dims[dim] == ()) != (b.dims[dim] == ()):
            raise NotLinear("a broadcast sum")
        a, b = _unify(a, b, dim, dim)
    if a.dims != b.dims:
        raise NotLinear("a sum of different layouts")
    return Value(a.dims, (Piece(a.terms + b.terms),), None, a.through | b.through)


READERS: tuple[tuple[tuple[Any, ...], Callable[[fx.Node], Value]], ...] = (
    ((aten.einsum,), _read_einsum),
    ((aten.linear,), _read_linear),
    ((aten.mm, aten.bmm, aten.matmul), _read_matmul),
    ((aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten), _read_view),
    ((aten.clone, aten.contiguous, aten.alias, aten.detach, aten._to_copy, aten.to), _read_same),
    ((aten.unsqueeze,), _read_unsqueeze),
    ((aten.squeeze,), _read_squeeze),
    ((aten.permute, aten.transpose, aten.t), _read_permute),
    ((aten.expand,), _read_expand),
    ((aten.slice,), _read_slice),
    ((operator.getitem,), _read_getitem),
    ((aten.cat,), _read_cat),
    ((aten.mul, aten.div), _read_scale),
    ((aten.add,), _read_add),
)


# ---- back into the graph ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A node of the new graph with one axis per dim."""

    node: fx.Node
    axes: tuple[Axis, ...]


class Writer:
    """Writes operands, products and sums into the graph, before one root node and in its name."""

    def __init__(self, graph: fx.Graph, root: fx.Node) -> None:
        self.graph, self.root = graph, root
        self._written: dict[tuple[Any, ...], fx.Node] = {}

    def operand(self, operand: Operand) -> Product:
        node = operand.node
        for k, step in enumerate(operand.steps):
            key = (operand.node, operand.steps[: k + 1])
            if key not in self._written:
                self._written[key] = self._step(node, step)
            node = self._written[key]
        return Product(node, operand.axes)

    def _step(self, node: fx.Node, step: tuple[Any, ...]) -> fx.Node:
        kind, dim, *rest = step
        if kind == "slice":
            return call(self.graph, aten.slice.Tensor, node, dim, rest[0], rest[1], like=self.root)
        sizes = [s if isinstance(s, int) else -1 for s in rest[0]]
        if not sizes:
            return call(self.graph, aten.squeeze.dim, node, dim, like=self.root)
        if sizes.count(-1) > 1:
            raise NotLinear("two symbolic sizes in one split")
        return call(self.graph, aten.unflatten.int, node, dim, sizes, like=self.root)

    def product(self, left: Product, right: Product, keep: Sequence[Axis]) -> Product:
        out = tuple(keep)
        letters = letters_for([*left.axes, *right.axes])

        linear = self._as_linear(left, right, out)
        if linear is not None:
            return Product(linear, out)

        def spell(axes: Sequence[Axis]) -> str:
            return "".join(letters[axis] for axis in axes)

        equation = f"{spell(left.axes)},{spell(right.axes)}->{spell(out)}"
        node = call(self.graph, aten.einsum.default, equation, [left.node, right.node], like=self.root)
        return Product(node, out)

    def _as_linear(self, left: Product, right: Product, out: tuple[Axis, ...]) -> fx.Node | None:
        """A product with a matrix whose columns are summed over is written as the linear map that it is."""
        matrix, summed = right.node, right.axes[1:]
        if is_call(matrix, aten.unflatten) and matrix.args[1] == 1 and len(shape_of(matrix.args[0])) == 2:
            matrix = matrix.args[0]
        rows = len(left.axes) - len(summed)
        if (
            len(shape_of(matrix)) != 2
            or left.axes[rows:] != summed
            or out != (*left.axes[:rows], right.axes[0])
        ):
            return None
        node = left.node
        if len(summed) > 1:
            node = call(self.graph, aten.flatten.using_ints, node, rows, len(left.axes) - 1, like=self.root)
        return call(self.graph, aten.linear.default, node, matrix, like=self.root)

    def add(self, left: fx.Node, right: fx.Node) -> fx.Node:
        return call(self.graph, aten.add.Tensor, left, right, like=self.root)

    def scale(self, node: fx.Node, factor: float) -> fx.Node:
        return call(self.graph, aten.mul.Tensor, node, factor, like=self.root)

    def arrange(self, product: Product, dims: Sequence[tuple[Axis, ...]]) -> fx.Node:
        """Order, broadcast and merge the product's axes into the wanted dims."""
        graph, node = self.graph, product.node
        axes = list(product.axes)
        wanted = [axis for group in dims for axis in group]
        for axis in [a for a in axes if a not in wanted]:
            node = call(graph, aten.squeeze.dim, node, axes.index(axis), like=self.root)
            axes.remove(axis)
        order = [axes.index(axis) for axis in wanted if axis in axes]
        if order != sorted(order):
            node = call(graph, aten.permute.default, node, order, like=self.root)
        missing = [axis for axis in wanted if axis not in axes]
        for position, axis in enumerate(wanted):
            if axis in missing:
                node = call(graph, aten.unsqueeze.default, node, position, like=self.root)
        if missing:
            if not all(isinstance(a.size, int) for a in missing):
                raise NotLinear("a symbolic broadcast")
            sizes = [a.size if a in missing else -1 for a in wanted]
            node = call(graph, aten.expand.default, node, sizes, like=self.root)
        position = 0
        for group in dims:
            if not group:
                node = call(graph, aten.unsqueeze.default, node, position, like=self.root)
            elif len(group) > 1:
                node = call(
                    graph, aten.flatten.using_ints, node, position, position + len(group) - 1, like=self.root
                )
            position += 1
        return node


def letters_for(axes: Sequence[Axis]) -> dict[Axis, str]:
    """One letter per axis: the axis's own wish where it is free, else the next free one."""
    letters: dict[Axis, str] = {}
    wishes = {axis.label[:1] for axis in axes}
    for axis in dict.fromkeys(axes):
        wish = axis.label[:1]
        free = (c for c in "cdefgijklmnopqruvwxyzabhst" if c not in {*letters.values(), *wishes})
        letters[axis] = wish if wish.isalpha() and wish not in letters.values() else next(free)
    return letters
