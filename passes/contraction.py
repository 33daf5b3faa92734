"""Sums of products of tensors with named axes: the algebra behind absorption.

    value[dims] = Σ_terms scale · Σ_(axes not in dims) operand_1[axes] · operand_2[axes] · …

A concatenation along an axis that is later contracted becomes a sum of terms; one that is not stays in pieces.
A value that the graph already computes on the way is remembered as a *cut*: it may stand for the operands it
covers. `passes.lifting` reads such formulas from a graph, `passes.writing` writes them back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import fx

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
            edges = list(accumulate((p.axis.size for p in self.pieces if p.axis), initial=0))
            for piece, low, high in zip(self.pieces, edges, edges[1:], strict=False):
                if (low, high) == (start, stop) and piece.axis is not None:
                    dims = _swap(self.dims, old, (piece.axis,))
                    return replace(self, dims=dims, pieces=(Piece(piece.terms),), joined=None)
            raise NotLinear("a slice across the seam of a concatenation")
        new = Axis(stop - start, old.label)
        return replace(self.map(lambda o: o.narrow(old, start, stop, new)), dims=_swap(self.dims, old, (new,)))


def _swap(dims: tuple[tuple[Axis, ...], ...], old: Axis, new: Sequence[Axis]) -> tuple[tuple[Axis, ...], ...]:
    return tuple(tuple(a for axis in group for a in (new if axis is old else (axis,))) for group in dims)


def times(large: Size, small: Size) -> Size | None:
    """How many times the larger size is the smaller; None unless that is a whole number, whatever free sizes are."""
    if isinstance(large, int) and isinstance(small, int):
        return large // small if large > small > 0 and large % small == 0 else None
    quotient = large / small
    return None if not quotient.is_integer else int(quotient) if quotient.is_Integer else quotient


def unify(a: Value, b: Value, dim_a: int, dim_b: int) -> tuple[Value, Value]:
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
            if x.size == 1 != y.size:
                a = a.substitute(x, ())
                continue
            if y.size == 1 != x.size:
                b = b.substitute(y, ())
                continue
            if x.size == y.size:
                if y is b.joined and x is not a.joined:
                    a = a.substitute(x, (y,))
                else:
                    b = b.substitute(y, (x,))
            elif (rest := times(x.size, y.size)) is not None:
                a = a.substitute(x, (Axis(y.size, y.label), Axis(rest, x.label)))
                continue
            elif (rest := times(y.size, x.size)) is not None:
                b = b.substitute(y, (Axis(x.size, x.label), Axis(rest, y.label)))
                continue
            else:
                raise NotLinear("sizes do not match")
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
            a, b = unify(a, b, dim_a, dim_b)
    groups = {**dict(zip(letters_a, a.dims, strict=True)), **dict(zip(letters_b, b.dims, strict=True))}
    for letter, group in groups.items():
        if name and len(group) == 1:
            group[0].label = group[0].label or letter
    dims = tuple(groups[letter] for letter in out)
    kept = {axis for group in dims for axis in group}
    summed = [axis for group in groups.values() for axis in group if axis not in kept]
    through = a.through | b.through
    if a.joined is None and b.joined is None:
        return Value(dims, (Piece(_products(a.pieces[0].terms, b.pieces[0].terms, summed)),), None, through)
    joined = a.joined or b.joined
    if a.joined is not None and b.joined is not None and a.joined is not b.joined:
        raise NotLinear("two concatenations meet in one product")
    assert joined is not None
    pieces, start = [], 0
    for k in range(len((a if a.joined else b).pieces)):
        axis = (a if a.joined else b).pieces[k].axis
        assert axis is not None
        side_a, side_b = (_segment(v, joined, k, axis, start) for v in (a, b))
        pieces.append(Piece(_products(side_a, side_b, [axis if one is joined else one for one in summed]), axis))
        start += axis.size
    if joined in kept:
        return Value(dims, tuple(pieces), joined, through)
    return Value(dims, (Piece(tuple(t for p in pieces for t in p.terms)),), None, through)


def _segment(value: Value, joined: Axis, k: int, axis: Axis, start: int) -> tuple[Term, ...]:
    """The terms of one side of a product, restricted to segment k of the concatenated axis."""
    if value.joined is None:  # only the other side is concatenated: slice this one to the segment
        return tuple(t.map(lambda o: o.narrow(joined, start, start + axis.size, axis)) for t in value.pieces[0].terms)
    piece = value.pieces[k]
    own = piece.axis
    assert own is not None
    return tuple(t.map(lambda o: o.substitute(own, (axis,))) for t in piece.terms)


def _products(left: Sequence[Term], right: Sequence[Term], summed: Sequence[Axis]) -> tuple[Term, ...]:
    return tuple(_with_repeats(x.times(y), summed) for x in left for y in right)


def _with_repeats(term: Term, summed: Sequence[Axis]) -> Term:
    """A sum over an axis that no operand has only repeats the term."""
    held = {axis for operand in term.operands for axis in operand.axes}
    repeats = [axis.size for axis in summed if axis not in held]
    if not all(isinstance(size, int) for size in repeats):
        raise NotLinear("a sum over a broadcast axis of symbolic size")
    return replace(term, scale=term.scale * prod(repeats))
