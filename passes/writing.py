"""Writing operands, products and sums into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.base import call, is_call, shape_of
from passes.contraction import Axis, NotLinear, Operand
from passes.nodes import dtype_of

aten = torch.ops.aten


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

    def cast(self, product: Product, dtype: torch.dtype) -> Product:
        if dtype_of(product.node) == dtype:
            return product
        return Product(call(self.graph, aten._to_copy.default, product.node, dtype=dtype, like=self.root), product.axes)

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
        if len(shape_of(matrix)) != 2 or left.axes[rows:] != summed or out != (*left.axes[:rows], right.axes[0]):
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
                node = call(graph, aten.flatten.using_ints, node, position, position + len(group) - 1, like=self.root)
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
