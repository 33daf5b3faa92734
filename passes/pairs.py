"""Values of the chosen (token, expert) pairs, rebuilt from a graph that holds them in another form.

Dims carry labels (passes/layouts.py). A value *on pairs* has shape [M, *features].
N tokens · K experts per token · E experts · M = N·K pairs, sorted by expert · O features in one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.base import is_call, same_size, shape_of
from passes.layouts import EXPERT, FEATURE, Layouts, aligned_labels
from passes.nodes import readers
from passes.products import BROADCAST, Product, part_of, sources_of_dims
from passes.rewrite import Refused

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

Stack = tuple[fx.Node, str, str]
"""One tensor per expert, the labels of its dims, and the letters of its features."""


class Pairs(Layouts):
    """Writes the sparse form of one sum before it. Raises Refused, naming a node, where that would not be exact.

    Subclasses say how the graph holds values: `value`, `selected`, `linear` and the operands of a product.
    """

    def __init__(self, graph: fx.Graph, total: fx.Node, path: dict[fx.Node, str]) -> None:
        super().__init__(graph, total)
        self.total, self.path = total, path
        self.rebuilt: set[fx.Node] = {total}  # values that the sparse form does without

    def value(self, node: fx.Node, labels: str) -> fx.Node:
        """The node on pairs, [M, *features]; of a node without tokens and experts just [*features]."""
        raise NotImplementedError

    def selected(self, node: fx.Node, labels: str) -> fx.Node:
        """A node without features at the chosen experts: [N, K], or what broadcasts to it."""
        raise NotImplementedError

    def linear(self, node: fx.Node, labels: str) -> tuple[fx.Node | None, list[fx.Node]]:
        """A node in which the weights are a factor, as (value on pairs or None for one, factors [N, K])."""
        raise NotImplementedError

    def stack_of(self, node: fx.Node, labels: str) -> tuple[fx.Node, str] | None:
        """The tensors of all experts behind an operand that is the one of the pair's expert, and their labels."""
        raise NotImplementedError

    def linear_operand(
        self, node: fx.Node, letters: str, labels: str
    ) -> tuple[fx.Node | None, str, list[fx.Node]] | None:
        """An operand of a product in which the weights may be a factor: its value on pairs, with the letters of its
        features, and the factors; or None."""
        raise NotImplementedError

    # ---- pairs

    def sort(self, indices: fx.Node, experts: int) -> None:
        """indices [N, K]: the order of the pairs, and where each expert's end."""
        self.indices = indices
        pairs = self.call(dsv3.sort_pairs.default, indices, experts)
        self.order, self.offsets = (self.call(operator.getitem, pairs, i) for i in (0, 1))

    def token_of_pair(self) -> fx.Node:
        return self.call(aten.floor_divide.default, self.order, shape_of(self.indices)[1])

    def expert_of_pair(self) -> fx.Node:
        return self.call(aten.index.Tensor, self.merged(self.indices, 0, 2), [self.order])

    def on_pairs(self, selected: fx.Node) -> fx.Node:
        """[N, K] → [M] in the order of the pairs."""
        full = self.call(aten.expand_as.default, selected, self.indices)
        return self.call(aten.index.Tensor, self.call(aten.reshape.default, full, [-1]), [self.order])

    def combine(self, value: fx.Node, weights: fx.Node, features: int) -> fx.Node:
        """[N, O]: the weighted sum over each token's pairs."""
        return self.call(dsv3.combine_pairs.default, self.merged(value, 1, features), self.order, weights)

    def refuse_leaks(self) -> None:
        """Values that somebody else needs would be computed all the same."""
        for node in self.rebuilt - {self.total}:
            for reader in readers(node):
                if reader not in self.rebuilt and reader.users:
                    raise Refused(node, f"{node.name} is used by {reader.name} as well")

    # ---- factors

    def multiply(self, factors: list[fx.Node]) -> fx.Node:
        result, *rest = factors
        for factor in rest:
            result = self.call(aten.mul.Tensor, result, factor)
        return result

    # ---- ops on features

    def part(self, node: fx.Node, labels: str) -> fx.Node | None:
        """A slice or a piece of a split along a feature, cut from the source on pairs."""
        part = part_of(node)
        if part is None or labels[part.axis] != FEATURE:
            return None
        if is_call(node, operator.getitem):
            self.rebuilt.add(node.args[0])
        dim = 1 + labels[: part.axis].count(FEATURE)
        return self.call(aten.slice.Tensor, self.value(part.source, labels), dim, part.start, part.stop, part.step)

    def pointwise(self, node: fx.Node, labels: str, of: Callable[[fx.Node, str], fx.Node]) -> fx.Node:
        """The same op on the node's inputs at the pairs."""

        def at_pairs(argument: Any) -> Any:
            own = aligned_labels(argument, node, labels)
            value = of(argument, own)
            if any(label not in (FEATURE, BROADCAST) for label in own):
                for _ in range(labels.count(FEATURE) - own.count(FEATURE)):
                    value = self.call(aten.unsqueeze.default, value, 1)
            return value

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), at_pairs)
        return self.call(node.target, *args, **kwargs)

    def rearranged(self, node: fx.Node, labels: str, value: fx.Node, before: str) -> fx.Node:
        """Move, add and broadcast the features of a value like a rearrangement does."""
        sources = sources_of_dims(node)
        assert sources is not None
        numbers = {d: 1 + i for i, d in enumerate(d for d, label in enumerate(before) if label == FEATURE)}
        sizes, moves = [], []
        for size, source, label in zip(shape_of(node), sources, labels, strict=True):
            if label == FEATURE:
                sizes.append(size)
                moves.append(None if source is None else numbers[source])
        kept = [move for move in moves if move is not None]
        gone = [number for number in numbers.values() if number not in kept]
        value = self.permuted(value, [0, *kept, *gone])
        if gone:
            value = self.squeezed(value, [1 + len(kept) + i for i in range(len(gone))])
        for position, move in enumerate(moves):
            if move is None:
                value = self.call(aten.unsqueeze.default, value, 1 + position)
        if all(map(same_size, shape_of(value)[1:], sizes)):
            return value
        if not all(isinstance(size, int) for size in sizes):
            raise Refused(node, f"{node.name} broadcasts to a size that is not known")
        return self.call(aten.expand.default, value, [-1, *sizes])

    # ---- products

    def product(self, node: fx.Node, labels: str, product: Product) -> tuple[fx.Node | None, list[fx.Node]]:
        """A product as (value on pairs or None for one, factors [N, K])."""
        named = {c: FEATURE if label == BROADCAST else label for c, label in zip(product.out, labels, strict=True)}
        for operand, letters in product.operands:
            known = zip(letters, self.path.get(operand, ""), strict=False)
            named |= {c: label for c, label in known if label != FEATURE}
        named[BROADCAST] = BROADCAST

        factors: list[tuple[fx.Node, str]] = []  # on pairs, with the letters of their features
        shared: list[tuple[fx.Node, str]] = []  # neither tokens nor experts
        stacks: list[Stack] = []  # one tensor per expert
        weights: list[fx.Node] = []
        for operand, letters in product.operands:
            own = "".join(named.get(c, FEATURE) for c in letters)
            features = "".join(c for c, label in zip(letters, own, strict=True) if label == FEATURE)
            varies = any(label not in (FEATURE, BROADCAST) for label in own)
            found = self.linear_operand(operand, letters, own)
            stack = self.stack_of(operand, own) if features else None
            if found is not None:
                value, features, more = found
                weights += more
                if value is not None:
                    factors.append((value, features))
            elif varies and not features:
                weights.append(self.selected(operand, own))
            elif stack is not None:
                stacks.append((*stack, features))
            else:
                (factors if varies else shared).append((self.value(operand, own), features))

        value, letters = self.product_on_pairs(node, product, factors, shared, stacks)
        if value is None:
            return None, weights
        return self.features_of(value, letters, product.out, labels), weights

    def features_of(self, value: fx.Node, letters: str, out: str, labels: str) -> fx.Node:
        """A product's features as its output has them: those of size one added, those that are broadcast dropped."""
        kept = [c for c, label in zip(out, labels, strict=True) if label == FEATURE]
        real = [c for c in kept if c in letters]
        ones = [c for c in letters if c not in real]
        value = self.permuted(value, [0, *(1 + letters.index(c) for c in (*real, *ones))])
        if ones:
            value = self.squeezed(value, [1 + len(real) + i for i in range(len(ones))])
        for position, c in enumerate(kept):
            if c not in letters:
                value = self.call(aten.unsqueeze.default, value, 1 + position)
        return value

    def without_ones(self, value: fx.Node, letters: str, labels: str) -> tuple[fx.Node, str]:
        own = [c for c, label in zip(letters, labels, strict=True) if label == FEATURE]
        ones = [1 + d for d, c in enumerate(own) if c == BROADCAST]
        value = self.squeezed(value, ones) if ones else value
        return value, "".join(c for c in own if c != BROADCAST)

    def product_on_pairs(
        self,
        node: fx.Node,
        product: Product,
        factors: list[tuple[fx.Node, str]],
        shared: list[tuple[fx.Node, str]],
        stacks: list[Stack],
    ) -> tuple[fx.Node | None, str]:
        """Value and feature letters of Π factors · Π shared · Π stacks[expert of the pair]."""
        summed = product.summed()
        known = {c for _, letters in factors for c in letters}
        grouped = [stack for stack in stacks if known & summed & set(stack[2])]
        for stack, own, letters in stacks:
            if (stack, own, letters) not in grouped:
                factors.append((self.value(stack, own), letters))
        if len(grouped) > 1:
            raise Refused(node, f"{node.name} multiplies {grouped[0][0].name} with {grouped[1][0].name}")
        known = {c for _, letters in factors for c in letters}
        for constant, letters in shared:
            if not set(letters) <= known:
                raise Refused(node, f"{constant.name} in {node.name} has no expert axis")
        if not factors:
            return None, ""

        letters = "".join(dict.fromkeys(c for _, one in factors for c in one))
        value = self.multiply([self.aligned(one, own, letters) for one, own in factors + shared])
        if grouped:
            value, letters = self.grouped_product(node, value, letters, grouped[0], summed)
        gone = [1 + d for d, c in enumerate(letters) if c in summed]
        if gone:
            value = self.call(aten.sum.dim_IntList, value, gone)
        return value, "".join(c for c in letters if c not in summed)

    def aligned(self, value: fx.Node, own: str, letters: str) -> fx.Node:
        """Features in the order of `letters`, with dims of size one for the missing ones."""
        lead = len(shape_of(value)) - len(own)  # the pair dim, which a shared tensor lacks
        order = sorted(range(len(own)), key=lambda d: letters.index(own[d]))
        value = self.permuted(value, [*range(lead), *(lead + d for d in order)])
        for position, c in enumerate(letters):
            if c not in own:
                value = self.call(aten.unsqueeze.default, value, lead + position)
        return value

    def grouped_product(
        self, node: fx.Node, value: fx.Node, letters: str, stack: Stack, summed: set[str]
    ) -> tuple[fx.Node, str]:
        """Rows of one expert's pairs times that expert's matrix."""
        weight, labels, own = stack
        inner = [c for c in own if c in letters and c in summed]
        outer = [c for c in own if c not in letters]
        if len(inner) != len(letters) or len(inner) + len(outer) != len(own):
            left = next(c for c in letters if c not in inner)
            raise Refused(node, f"axis {left} of {node.name} is neither summed nor the experts'")
        value = self.permuted(value, [0, *(1 + letters.index(c) for c in inner)])
        weight = self.leading(weight, labels, EXPERT)
        weight = self.permuted(weight, [0, *(1 + own.index(c) for c in outer + inner)])
        sizes = list(shape_of(weight)[1 : 1 + len(outer)])
        weight = self.merged(self.merged(weight, 1 + len(outer), len(inner)), 1, len(outer))
        value = self.call(dsv3.grouped_linear.default, self.merged(value, 1, len(inner)), weight, self.offsets)
        if len(outer) != 1:
            value = self.call(aten.reshape.default, value, [-1, *sizes])
        return value, "".join(outer)

    def multiply_in(self, value: fx.Node | None, weights: list[fx.Node]) -> fx.Node:
        if not weights:
            assert value is not None
            return value
        factor = self.on_pairs(self.multiply(weights))
        if value is None:
            return factor
        for _ in shape_of(value)[1:]:
            factor = self.call(aten.unsqueeze.default, factor, -1)
        return self.call(aten.mul.Tensor, value, factor)
