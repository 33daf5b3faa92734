"""Cuts: places along one dim of a tensor, and where they lie in the tensor that it is a view of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
import torch
from torch import fx

from passes.base import END, call, expression_of, placeholders

aten = torch.ops.aten

Size = Any  # int or sympy expression


@dataclass(frozen=True)
class Cut:
    """Places start to stop along a dim, both as in x[start:stop]; start is negative where the dim's size is free.

    sizes: the dim is read as several, and the places lie along `inner` of them: rows of some positions, of rows for all
    positions of all sequences.
    """

    dim: int
    start: int
    stop: int
    sizes: tuple[Size, ...] = ()
    inner: int = 0

    @property
    def length(self) -> int:
        return 1 if self.stop == END else self.stop - self.start

    def at(self, dim: int) -> Cut:
        """The same places of another tensor's dim."""
        return Cut(dim, self.start, self.stop, self.sizes, self.inner)

    def is_last(self, size: Size) -> bool:
        """Is it the last place of a dim of this size?"""
        return self.stop == END or (self.start == size - 1 and self.stop == size)

    def width(self) -> int | None:
        """How many places the dim has once it is cut, None if that depends on a free size."""
        others = [size for number, size in enumerate(self.sizes) if number != self.inner]
        return self.length * prod(others) if all(isinstance(size, int) for size in others) else None


def take(graph: fx.Graph, x: fx.Node, cut: Cut, like: fx.Node) -> fx.Node:
    """The places of x."""
    if not cut.sizes:
        return call(graph, aten.slice.Tensor, x, cut.dim, cut.start, cut.stop, like=like)
    sizes = given_sizes(graph, cut)
    split = call(graph, aten.unflatten.int, x, cut.dim, sizes, like=like)
    taken = call(graph, aten.slice.Tensor, split, cut.dim + cut.inner, cut.start, cut.stop, like=like)
    return call(graph, aten.flatten.using_ints, taken, cut.dim, cut.dim + len(cut.sizes) - 1, like=like)


def given_sizes(graph: fx.Graph, cut: Cut) -> list[Any] | None:
    """The sizes as a view is given them, the last free one left to be found out; None where another free one is not
    among the graph's inputs."""
    known = {expression_of(n.meta["val"]): n for n in placeholders(graph) if isinstance(n.meta["val"], torch.SymInt)}
    free = [number for number, size in enumerate(cut.sizes) if not isinstance(size, int)]
    if any(cut.sizes[number] not in known for number in free[:-1]):
        return None
    return [
        size if isinstance(size, int) else -1 if number == free[-1] else known[size]
        for number, size in enumerate(cut.sizes)
    ]


def through_view(cut: Cut, given: Sequence[Any], result: Sequence[Any]) -> Cut | None:
    """The cut of a tensor of shape `given` that leaves what `cut` leaves of its view of shape `result`, if any."""
    before, after = ([expression_of(size) for size in shape] for shape in (given, result))
    groups = _groups(before, after)
    found = next(((b, a) for b, a in groups or () if cut.dim in a), None)
    if found is None:
        return None
    wide = [dim for dim in found[0] if before[dim] != 1]
    others = [dim for dim in found[1] if after[dim] != 1 and dim != cut.dim]
    if cut.sizes:
        return None if others else _split(cut, wide, before)
    if len(wide) != 1:
        return None
    if not others:
        return cut.at(wide[0])
    return Cut(wide[0], cut.start, cut.stop, tuple(after[dim] for dim in found[1]), found[1].index(cut.dim))


def _split(cut: Cut, wide: list[int], before: list[Size]) -> Cut | None:
    """Of a cut of a dim that is read as several: the cut of the one dim, or of one of the several that it came from."""
    if len(wide) == 1:
        return cut.at(wide[0])
    several = [(number, size) for number, size in enumerate(cut.sizes) if size != 1]
    if [size for _, size in several] != [before[dim] for dim in wide]:
        return None
    place = [number for number, _ in several].index(cut.inner)
    return Cut(wide[place], cut.start, cut.stop)


def _groups(before: list[Size], after: list[Size]) -> list[tuple[list[int], list[int]]] | None:
    """Dims of both shapes in the smallest runs that hold the same elements; None where that cannot be told."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        own, other = [i], [j]
        have, want = sympy.sympify(before[i]), sympy.sympify(after[j])
        i, j = i + 1, j + 1
        while have != want:
            ratio = sympy.cancel(want / have)
            if ratio.as_numer_denom()[1] == 1 and i < len(before):
                have *= before[i]
                own.append(i)
                i += 1
            elif ratio.as_numer_denom()[0] == 1 and j < len(after):
                want *= after[j]
                other.append(j)
                j += 1
            else:
                return None
        groups.append((own, other))
    # What is left has size one; it holds the same as nothing, or belongs to the last run.
    if groups:
        groups[-1][0].extend(range(i, len(before)))
        groups[-1][1].extend(range(j, len(after)))
    return groups
