"""A sum over all experts, rebuilt for the chosen (token, expert) pairs only.

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
from passes.layouts import EXPERT, FEATURE, Layouts, aligned_labels, labels_before
from passes.nodes import CASTS, constant_of, readers, settled
from passes.products import BROADCAST, Product, part_of, product_of, sources_of_dims
from passes.rewrite import Refused

aten = torch.ops.aten
dsv3 = torch.ops.dsv3


class Pairs(Layouts):
    """Writes the sparse form of one sum before it. Raises Refused, naming a node, where that would not be exact."""

    def __init__(self, graph: fx.Graph, gate: fx.Node, total: fx.Node, path: dict[fx.Node, str]) -> None:
        super().__init__(graph, total)
        self.gate, self.total, self.path = gate, total, path
        self.axis = path[gate].index(EXPERT)
        self.tokens = path[gate].replace(EXPERT, "")
        self.experts = shape_of(gate)[self.axis]
        self.rebuilt: set[fx.Node] = {total}  # dense values that the sparse form does without

    def sum(self) -> fx.Node:
        """What replaces the sum."""
        labels = self.path[self.total]
        if any(token not in labels for token in self.tokens):
            raise Refused(self.total, f"{self.total.name} sums over tokens as well as experts")
        self.read_gate()
        value, weights = self.linear(self.total, labels)
        self.refuse_leaks()
        assert value is not None
        features = [size for size, label in zip(shape_of(self.total), labels, strict=True) if label == FEATURE]
        value = self.merged(value, 1, len(features))
        rows = self.call(dsv3.combine_pairs.default, value, self.order, self.multiply(weights))
        return self.unflatten_tokens(rows, labels, features)

    # ---- the gate

    def read_gate(self) -> None:
        """Indices and weights of the scatter, [N, K] each, and the order of the pairs."""
        gate, (base, _, chosen, source) = self.gate, self.gate.args[:4]
        if constant_of(base) != 0:
            raise Refused(gate, f"{gate.name} scatters into {base.name}, which is not all zeros")
        if len(gate.args) > 4 or gate.kwargs:
            raise Refused(gate, f"{gate.name} combines the weights with what was there before")
        if not distinct(chosen, self.axis):
            raise Refused(gate, f"{chosen.name} is no result of a top-k: a token may have one expert twice")
        sizes = shape_of(chosen)
        if not isinstance(self.experts, int) or not isinstance(sizes[self.axis], int):
            raise Refused(gate, "the number of experts is not known")
        if any(not same_size(sizes[d], size) for d, size in enumerate(shape_of(gate)) if d != self.axis):
            raise Refused(gate, f"{gate.name} leaves out tokens")
        if not isinstance(source, fx.Node):
            source = self.call(aten.full_like.default, chosen, source, dtype=gate.meta["val"].dtype)
        elif not all(map(same_size, shape_of(source), sizes)):
            raise Refused(gate, f"{gate.name} scatters a part of {source.name} only")
        self.indices, self.gate_weights = (self.rows(node, self.path[gate]) for node in (chosen, source))
        pairs = self.call(dsv3.sort_pairs.default, self.indices, self.experts)
        self.order, self.offsets = (self.call(operator.getitem, pairs, i) for i in (0, 1))

    def token_of_pair(self) -> fx.Node:
        return self.call(aten.floor_divide.default, self.order, shape_of(self.indices)[1])

    def expert_of_pair(self) -> fx.Node:
        return self.call(aten.index.Tensor, self.merged(self.indices, 0, 2), [self.order])

    # ---- tokens

    def rows(self, node: fx.Node, labels: str) -> fx.Node:
        return self.leading(node, labels, self.tokens)

    def unflatten_tokens(self, rows: fx.Node, labels: str, features: list[Any]) -> fx.Node:
        """[N, O] → the dims of the sum."""
        if len(self.tokens) > 1 or len(features) != 1:
            sizes = [
                size if isinstance(size, int) else self.call(aten.sym_size.int, self.gate, d)
                for d, size in enumerate(shape_of(self.gate))
                if d != self.axis
            ]
            rows = self.call(aten.reshape.default, rows, [*sizes, *features])
        feature_dims = iter(range(len(self.tokens), len(labels)))
        return self.permuted(
            rows, [next(feature_dims) if label == FEATURE else self.tokens.index(label) for label in labels]
        )

    # ---- values on pairs

    def value(self, node: fx.Node, labels: str) -> fx.Node:
        """The node on pairs, [M, *features]; of a node without tokens and experts just [*features]."""
        while settled(node) is not node:
            self.rebuilt.add(node)
            node = node.args[0]
        tokens = [token for token in self.tokens if token in labels]
        if tokens and len(tokens) < len(self.tokens):
            raise Refused(node, f"{node.name} has some of the token axes only")
        if tokens and EXPERT in labels:
            return self.rebuild(node, labels) if FEATURE in labels else self.on_pairs(self.selected(node, labels))
        if tokens:
            return self.call(aten.index.Tensor, self.rows(node, labels), [self.token_of_pair()])
        if EXPERT in labels:
            return self.call(aten.index.Tensor, self.leading(node, labels, EXPERT), [self.expert_of_pair()])
        return self.leading(node, labels, "")

    def on_pairs(self, selected: fx.Node) -> fx.Node:
        """[N, K] → [M] in the order of the pairs."""
        full = self.call(aten.expand_as.default, selected, self.indices)
        return self.call(aten.index.Tensor, self.call(aten.reshape.default, full, [-1]), [self.order])

    def selected(self, node: fx.Node, labels: str) -> fx.Node:
        """A node without features at the chosen experts: [N, K], or what broadcasts to it."""
        if node is self.gate:
            return self.gate_weights
        if node in self.path:
            return self.selected_factor(node, labels)
        if any(token in labels for token in self.tokens):
            if EXPERT not in labels:
                return self.call(aten.unsqueeze.default, self.rows(node, labels), 1)
            scores = self.leading(node, labels, self.tokens)
            return self.call(aten.gather.default, scores, 1, self.indices)
        if EXPERT in labels:
            return self.call(aten.index.Tensor, self.leading(node, labels, EXPERT), [self.indices])
        return self.leading(node, labels, "")

    def selected_factor(self, node: fx.Node, labels: str) -> fx.Node:
        product, sources = product_of(node), sources_of_dims(node)
        if product is not None:
            named = dict(zip(product.out, labels, strict=True)) | {BROADCAST: BROADCAST}
            return self.multiply([self.selected(n, "".join(named[c] for c in cs)) for n, cs in product.operands])
        if sources is not None:
            return self.selected(node.args[0], labels_before(node, labels, sources))
        return self.pointwise(node, labels, self.selected)

    def multiply(self, factors: list[fx.Node]) -> fx.Node:
        result, *rest = factors
        for factor in rest:
            result = self.call(aten.mul.Tensor, result, factor)
        return result

    def rebuild(self, node: fx.Node, labels: str) -> fx.Node:
        """A value of every token and expert, computed on pairs from its inputs."""
        self.rebuilt.add(node)
        part = part_of(node)
        if part is not None and labels[part.axis] == FEATURE:
            if is_call(node, operator.getitem):
                self.rebuilt.add(node.args[0])
            dim = 1 + labels[: part.axis].count(FEATURE)
            stop = part.start + part.length * part.step
            return self.call(aten.slice.Tensor, self.value(part.source, labels), dim, part.start, stop, part.step)
        sources = sources_of_dims(node)
        if sources is not None:
            before = labels_before(node, labels, sources)
            return self.rearranged(node, labels, self.value(node.args[0], before), before)
        product = product_of(node)
        if product is not None:
            value, weights = self.product(node, labels, product)
            return self.multiply_in(value, weights)
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_call(node, *CASTS):
            return self.pointwise(node, labels, self.value)
        raise Refused(node, f"{node.name} may look at several experts at once")

    def pointwise(self, node: fx.Node, labels: str, of: Callable[[fx.Node, str], fx.Node]) -> fx.Node:
        """The same op on the node's inputs at the pairs."""

        def at_pairs(argument: Any) -> Any:
            own = aligned_labels(argument, node, labels)
            value = of(argument, own)
            if any(label in own for label in (EXPERT, *self.tokens)):
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
            value = self.call(aten.squeeze.dims, value, [1 + len(kept) + i for i in range(len(gone))])
        for position, move in enumerate(moves):
            if move is None:
                value = self.call(aten.unsqueeze.default, value, 1 + position)
        if all(map(same_size, shape_of(value)[1:], sizes)):
            return value
        if not all(isinstance(size, int) for size in sizes):
            raise Refused(node, f"{node.name} broadcasts to a size that is not known")
        return self.call(aten.expand.default, value, [-1, *sizes])

    # ---- products

    def linear(self, node: fx.Node, labels: str) -> tuple[fx.Node | None, list[fx.Node]]:
        """A node on the way from the gate to the sum, as (value on pairs or None for one, factors [N, K])."""
        if FEATURE not in labels:
            return None, [self.selected(node, labels)]
        self.rebuilt.add(node)
        product, sources = product_of(node), sources_of_dims(node)
        if product is not None:
            return self.product(node, labels, product)
        source: fx.Node = node.args[0]
        value, weights = self.linear(source, self.path[source])
        if sources is not None:
            return (None if value is None else self.rearranged(node, labels, value, self.path[source])), weights
        if any(isinstance(a, fx.Node) for a in node.args[1:]):
            raise Refused(node, f"{node.name} divides by {node.args[1]} between gate and sum")
        old = self.multiply(weights) if value is None else value
        new = self.call(node.target, old, *node.args[1:], **node.kwargs)
        return (None, [new]) if value is None else (new, weights)

    def product(self, node: fx.Node, labels: str, product: Product) -> tuple[fx.Node | None, list[fx.Node]]:
        """A product as (value on pairs or None for one, factors [N, K])."""
        named = dict(zip(product.out, labels, strict=True))
        for operand, letters in product.operands:
            known = zip(letters, self.path.get(operand, ""), strict=False)
            named |= {c: label for c, label in known if label != FEATURE}
        named[BROADCAST] = BROADCAST

        factors: list[tuple[fx.Node, str]] = []  # on pairs, with the letters of their features
        shared: list[tuple[fx.Node, str]] = []  # neither tokens nor experts
        stacks: list[tuple[fx.Node, str, str]] = []  # one tensor per expert
        weights: list[fx.Node] = []
        for operand, letters in product.operands:
            own = "".join(named.get(c, FEATURE) for c in letters)
            features = "".join(c for c, label in zip(letters, own, strict=True) if label == FEATURE)
            per_token = any(token in own for token in self.tokens)
            if operand in self.path:
                value, more = self.linear(operand, self.path[operand])
                weights += more
                if value is not None:
                    factors.append(self.without_ones(value, letters, self.path[operand]))
            elif not features and (per_token or EXPERT in own):
                weights.append(self.selected(operand, own))
            elif EXPERT in own and not per_token:
                stacks.append((operand, own, features))
            else:
                (factors if per_token else shared).append((self.value(operand, own), features))

        value, letters = self.product_on_pairs(node, product, factors, shared, stacks)
        if value is None:
            return None, weights
        wanted = [c for c in product.out if named[c] in (FEATURE, BROADCAST)]
        value = self.permuted(value, [0, *(1 + letters.index(c) for c in wanted if c != BROADCAST)])
        for position, c in enumerate(wanted):
            if c == BROADCAST:
                value = self.call(aten.unsqueeze.default, value, 1 + position)
        return value, weights

    def without_ones(self, value: fx.Node, letters: str, labels: str) -> tuple[fx.Node, str]:
        own = [c for c, label in zip(letters, labels, strict=True) if label == FEATURE]
        ones = [1 + d for d, c in enumerate(own) if c == BROADCAST]
        value = self.call(aten.squeeze.dims, value, ones) if ones else value
        return value, "".join(c for c in own if c != BROADCAST)

    def product_on_pairs(
        self,
        node: fx.Node,
        product: Product,
        factors: list[tuple[fx.Node, str]],
        shared: list[tuple[fx.Node, str]],
        stacks: list[tuple[fx.Node, str, str]],
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
        self, node: fx.Node, value: fx.Node, letters: str, stack: tuple[fx.Node, str, str], summed: set[str]
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

    def refuse_leaks(self) -> None:
        """Dense values that somebody else needs would be computed all the same."""
        for node in self.rebuilt - {self.total}:
            for reader in readers(node):
                if reader not in self.rebuilt and reader.users:
                    raise Refused(node, f"{node.name} is used by {reader.name} as well")


def distinct(indices: fx.Node, axis: int) -> bool:
    """Are the indices along `axis` the result of a top-k along it, so that no two of a row are equal?"""
    indices = settled(indices)
    if is_call(indices, operator.getitem):
        split, number = indices.args
        if is_call(split, aten.topk):
            dim = split.args[2] if len(split.args) > 2 else -1
            return number == 1 and dim % len(shape_of(indices)) == axis
        return is_call(split, dsv3.route) and number == 0 and axis == 1
    if is_call(indices, *CASTS):
        return distinct(indices.args[0], axis)
    sources = sources_of_dims(indices)
    before = None if sources is None else sources[axis]
    return before is not None and distinct(indices.args[0], before)
