"""Rotation of pairs by position-dependent angles as one op.

B batch · S positions · H heads · R rotary width · F = R/2 pairs.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import call, is_call, same_size, shape_of
from passes.nodes import VIEWS, cast, dtype_of, is_pointwise, keeps, over_last_axis, settled, uncast
from passes.products import BROADCAST, Part, join, part_of, sources_of_dims
from passes.rewrite import Cast, Match, Op, Pattern, Rewrite, Var

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


def last_axis_of_result(node: fx.Node) -> bool:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim in (-1, len(shape_of(node)) - 1)


def merges_last_axes(node: fx.Node) -> bool:
    # A plain == on a free size would pin it to its example value.
    merged, before = shape_of(node), shape_of(node.args[0])
    return len(merged) == len(before) - 1 and same_size(merged[-1], 2 * before[-2])


first, second = Cast(Var("first")), Cast(Var("second"))
cos, sin = Cast(Var("cos")), Cast(Var("sin"))
turned = (first * cos - second * sin, first * sin + second * cos)
turned_back = (first * cos + second * sin, second * cos - first * sin)


def in_pairs(two: tuple[Pattern, Pattern], name: str) -> Pattern:
    stacked = Op((aten.stack,), (two,), check=last_axis_of_result)
    return Op(VIEWS, (stacked,), check=merges_last_axes, name=name)


def in_halves(two: tuple[Pattern, Pattern], name: str) -> Pattern:
    return Op((aten.cat,), (two,), check=last_axis_of_result, name=name)


ROTATION = (
    in_pairs(turned, "pairs")
    | in_halves(turned, "halves")
    | Cast(Var("x")) * cos + Cast(in_halves((-second, first), "halves")) * sin
    | in_pairs(turned_back, "back")
    | in_halves(turned_back, "back")
)


@dataclass(frozen=True)
class FuseRotary(Rewrite):
    """a, b = pairs of x                                      pairs: (2i, 2i+1), or (i, i + F)
       y = pairs of (a·cos − b·sin, a·sin + b·cos)       →    y = rotary(x, cos, sin, interleaved)

    `x * cos2 + rotate_half(x) * sin2` is the same over halves, if cos2 and sin2 repeat. Without a head axis, and with
    the head axis before the positions, x goes through views.
    """  # fmt: skip

    before: ClassVar[Pattern] = ROTATION

    def when(self, match: Match) -> str | None:
        rotation = read_rotation(match)
        return rotation if isinstance(rotation, str) else match.leak()

    def after(self, graph: fx.Graph, match: Match) -> fx.Node:
        rotation = read_rotation(match)
        assert isinstance(rotation, Rotation)
        x = rotation.pairs.whole(graph)
        if not keeps(match.root, dtype_of(uncast(x))):
            x = uncast(x)
        x = cast(graph, x, dtype_of(match.root)) if keeps(match.root, dtype_of(x)) else x
        if rotation.layout == "bsf":
            x = call(graph, aten.unsqueeze.default, x, 2, like=match.root)
        elif rotation.layout == "bhsf":
            x = call(graph, aten.transpose.int, x, 1, 2, like=match.root)
        cos, sin = (table.halved(graph) for table in (rotation.cos, rotation.sin))
        y = call(graph, dsv3.rotary.default, x, cos, sin, rotation.pairs.interleaved, like=match.root)
        if rotation.layout == "bsf":
            return call(graph, aten.squeeze.dim, y, 2, like=match.root)
        return call(graph, aten.transpose.int, y, 1, 2, like=match.root) if rotation.layout == "bhsf" else y


@dataclass(frozen=True)
class PairsOf:
    """The tensor whose pairs are rotated; the first and last part of it where it lies in something wider."""

    source: fx.Node
    interleaved: bool
    parts: tuple[Part, Part] | None = None

    def whole(self, graph: fx.Graph) -> fx.Node:
        return self.source if self.parts is None else join(graph, *self.parts)


@dataclass(frozen=True)
class Table:
    """cos or sin of every pair's angle, [B, S, F], or [B, S, 2F] with two equal halves."""

    node: fx.Node
    pairs: int

    def halved(self, graph: fx.Graph) -> fx.Node:
        if shape_of(self.node)[-1] == self.pairs:
            return self.node
        if is_call(self.node, aten.cat):
            return self.node.args[0][0]
        return call(graph, aten.slice.Tensor, self.node, 2, 0, self.pairs, like=self.node)


@dataclass(frozen=True)
class Rotation:
    pairs: PairsOf
    layout: str
    cos: Table
    sin: Table


def read_rotation(match: Match) -> Rotation | str:
    """The rotation that a match spells, or why it is none ('': not even nearly)."""
    pairs = pairs_of(match["first"], match["second"])
    if pairs is None or ("x" in match.bound and match["x"] is not pairs.source):
        return ""
    if "back" in match.bound:
        return f"{match.root.name} turns pairs by the negative angle"
    if pairs.interleaved is not ("pairs" in match.bound):
        read, written = ("neighbours", "halves") if pairs.interleaved else ("halves", "neighbours")
        return f"{match.root.name} reads pairs as {read} and writes them as {written}"
    shape = shape_of(match["first"])
    for node in (pairs.source, match.root):
        if not all(map(same_size, shape_of(node)[:-1], shape[:-1])):
            return f"rows of {node.name} are grouped otherwise than the pairs"
    for layout in ("bsf",) if len(shape) == 3 else ("bshf", "bhsf"):
        cos, sin = (table_of(match[name], layout, shape) for name in ("cos", "sin"))
        if cos is not None and sin is not None:
            return Rotation(pairs, layout, cos, sin)
    return f"{match['cos'].name} is not known to hold one number per row, position and pair"


def pairs_of(first: fx.Node, second: fx.Node) -> PairsOf | None:
    """The tensor that two nodes are the first and second members of all pairs of."""
    a, b = member_of(first), member_of(second)
    if a is not None and b is not None:
        return PairsOf(a[0], True) if (a[0], a[1], b[1]) == (b[0], 0, 1) else None
    one, two = part_of(first), part_of(second)
    if one is None or two is None or one.source is not two.source or one.length != two.length:
        return None
    size, last = shape_of(one.source)[one.axis], len(shape_of(one.source)) - 1
    if one.axis != last or two.axis != last:
        return None
    if (one.start, two.start, one.step, two.step) == (0, 1, 2, 2) and size == 2 * one.length:
        return PairsOf(one.source, True)
    if one.step == two.step == 1 and two.start == one.start + one.length:
        return PairsOf(one.source, False, (one, two))
    return None


def member_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, i) where node is member i of the pairs of neighbours: x viewed as [.., F, 2], at i of the last axis."""
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.unbind):
        view, number = settled(node.args[0].args[0]), node.args[1]
        if not over_last_axis(node.args[0], 1, 0):
            return None
    elif is_call(node, aten.select) and over_last_axis(node, 1):
        view, number = settled(node.args[0]), node.args[2] % 2
    else:
        return None
    if (
        not is_call(view, *VIEWS)
        or not same_size(shape_of(view)[-1], 2)
        or len(shape_of(view)) != len(shape_of(view.args[0])) + 1
    ):
        return None
    x = settled(view.args[0])
    return (x, number) if same_size(shape_of(x)[-1], 2 * shape_of(view)[-2]) else None


def table_of(node: fx.Node, layout: str, shape: tuple[Any, ...]) -> Table | None:
    """The table [B, S, F] that is broadcast to the pairs' `shape`, whose axes are `layout`."""
    node = uncast(node)
    own = shape_of(node)
    if len(own) > len(layout):
        return None
    letters = "".join(
        BROADCAST if c == "h" and same_size(size, 1) else c for c, size in zip(layout[-len(own) :], own, strict=True)
    )
    while letters != "bsf":
        sources = sources_of_dims(node)
        if sources is None:
            return None
        before = {source: letters[d] for d, source in enumerate(sources) if source is not None}
        node = uncast(node.args[0])
        letters = "".join(before.get(d, BROADCAST) for d in range(len(shape_of(node))))
    wanted = [size for c, size in zip(layout, shape, strict=True) if c in "bs"]
    if not all(same_size(a, b) for a, b in zip(shape_of(node), wanted, strict=False)):
        return None
    width = shape_of(node)[-1]
    if width == shape[-1]:
        return Table(node, width)
    return Table(node, shape[-1]) if width == 2 * shape[-1] and halves_are_equal(node) else None


def halves_are_equal(node: fx.Node) -> bool:
    """Does the last axis hold the same numbers twice?"""
    node = uncast(node)
    if is_call(node, aten.cat):
        parts = node.args[0]
        return len(parts) == 2 and parts[0] is parts[1] and last_axis_of_result(node)
    inputs = node.all_input_nodes
    return is_pointwise(node) and len(inputs) == 1 and halves_are_equal(inputs[0])
