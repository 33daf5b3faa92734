"""Views, broadcasts, repetitions and concatenations of values with named axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy

from passes.contraction import Axis, NotLinear, Piece, Size, Value, unify


def reshaped(value: Value, wanted: Sequence[Size]) -> Value:
    """Split and merge axes: walk over both shapes and cut the value's axes where the wanted dims end."""
    axes = [axis for group in value.dims for axis in group]
    dims: list[tuple[Axis, ...]] = []
    for size in wanted:
        group: list[Axis] = []
        have: Size = 1
        while have != size:
            if not axes:
                raise NotLinear("a view that cannot be followed")
            axis = axes.pop(0)
            if axis.size == 1:  # merged with others it is nothing
                value = value.substitute(axis, ())
                continue
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
            have = sympy.expand(have * axis.size) if not isinstance(have * axis.size, int) else have * axis.size
        if size == 1 and not group and axes and axes[0].size == 1:
            group.append(axes.pop(0))
        dims.append(tuple(group))
    if any(axis.size != 1 for axis in axes):
        raise NotLinear("a view that cannot be followed")
    if value.joined is not None and any(value.joined in g and len(g) > 1 for g in dims):
        raise NotLinear("a concatenated axis is merged")
    return replace(value, dims=tuple(dims))


def broadcast(value: Value, wanted: Sequence[Size]) -> Value:
    """Dims of size one grown to the wanted sizes; new dims come first."""
    dims = ((),) * (len(wanted) - len(value.dims)) + value.dims
    grown: list[tuple[Axis, ...]] = []
    value = replace(value, dims=dims)
    for dim, size in enumerate(wanted):
        if size != 1 and all(axis.size == 1 for axis in value.dims[dim]):
            value = squeezed(value, dim)
            grown.append((Axis(size),))  # an axis that no operand has: broadcast
        else:
            grown.append(value.dims[dim])
    return replace(value, dims=tuple(grown))


def repeated(value: Value, counts: Sequence[Any], *, blocks: bool) -> Value:
    """Copies along each dim, block after block or element after element: one more axis that no operand has."""
    dims = list(value.dims)
    for dim, times in enumerate(counts):
        if not isinstance(times, int) or (times != 1 and value.joined in dims[dim]):
            raise NotLinear("a repetition that cannot be followed")
        if times != 1:
            dims[dim] = (Axis(times), *dims[dim]) if blocks else (*dims[dim], Axis(times))
    return replace(value, dims=tuple(dims))


def squeezed(value: Value, dim: int) -> Value:
    """The value with the axes of a dim of size one taken out of its operands."""
    for axis in value.dims[dim]:
        value = value.substitute(axis, ())
    return value


def concatenated(parts: list[Value], dim: int) -> Value:
    """Parts side by side along `dim`, where each has one axis of fixed size."""
    parts = list(parts)
    first = parts[0]
    for k in range(1, len(parts)):
        for d in range(len(first.dims)):
            if d != dim:
                first, parts[k] = unify(first, parts[k], d, d)
    parts[0] = first
    # the first part may have been split further while a later one was unified
    for part in parts[1:]:
        if any(part.dims[d] != first.dims[d] for d in range(len(first.dims)) if d != dim):
            raise NotLinear("parts with different layouts")
    joined = Axis(sum(p.dims[dim][0].size for p in parts))
    pieces = tuple(Piece(p.terms, p.dims[dim][0]) for p in parts)
    dims = tuple((joined,) if d == dim else group for d, group in enumerate(first.dims))
    return Value(dims, pieces, joined, frozenset().union(*(p.through for p in parts)))
