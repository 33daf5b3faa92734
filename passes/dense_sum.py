"""A sum over all experts, rebuilt for the chosen (token, expert) pairs only.

Labels and sizes as in passes/pairs.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.base import is_call, same_size, shape_of
from passes.distinct import distinct
from passes.layouts import EXPERT, FEATURE, labels_before
from passes.nodes import CASTS, constant_of, is_pointwise, settled
from passes.pairs import Pairs
from passes.products import BROADCAST, product_of, sources_of_dims
from passes.rewrite import Refused

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


class DenseSum(Pairs):
    """The sum `total` of products with the scattered `gate`; `path` labels the nodes between the two."""

    def __init__(self, graph: fx.Graph, gate: fx.Node, total: fx.Node, path: dict[fx.Node, str]) -> None:
        super().__init__(graph, total, path)
        self.gate = gate
        self.axis = path[gate].index(EXPERT)
        self.tokens = path[gate].replace(EXPERT, "")
        self.experts = shape_of(gate)[self.axis]

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
        rows = self.combine(value, self.multiply(weights), len(features))
        return self.unflatten_tokens(rows, labels, features)

    def read_gate(self) -> None:
        """Indices and weights of the scatter, [N, K] each, and the order of the pairs."""
        gate, (base, _, chosen, source) = self.gate, self.gate.args[:4]
        if constant_of(base) != 0:
            raise Refused(gate, f"{gate.name} scatters into {base.name}, which is not all zeros")
        if len(gate.args) > 4 or gate.kwargs:
            raise Refused(gate, f"{gate.name} combines the weights with what was there before")
        if not distinct(chosen, self.axis):
            raise Refused(gate, f"{chosen.name} is neither a top-k nor sorted: a token may have one expert twice")
        sizes = shape_of(chosen)
        if not isinstance(self.experts, int) or not isinstance(sizes[self.axis], int):
            raise Refused(gate, "the number of experts is not known")
        if any(not same_size(sizes[d], size) for d, size in enumerate(shape_of(gate)) if d != self.axis):
            raise Refused(gate, f"{gate.name} leaves out tokens")
        if not isinstance(source, fx.Node):
            source = self.call(aten.full_like.default, chosen, source, dtype=gate.meta["val"].dtype)
        elif not all(map(same_size, shape_of(source), sizes)):
            raise Refused(gate, f"{gate.name} scatters a part of {source.name} only")
        indices, self.gate_weights = (self.rows(node, self.path[gate]) for node in (chosen, source))
        self.sort(indices, self.experts)

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

    def rebuild(self, node: fx.Node, labels: str) -> fx.Node:
        """A value of every token and expert, computed on pairs from its inputs."""
        self.rebuilt.add(node)
        part = self.part(node, labels)
        if part is not None:
            return part
        sources = sources_of_dims(node)
        if sources is not None:
            before = labels_before(node, labels, sources)
            return self.rearranged(node, labels, self.value(node.args[0], before), before)
        product = product_of(node)
        if product is not None:
            value, weights = self.product(node, labels, product)
            return self.multiply_in(value, weights)
        if is_pointwise(node) or is_call(node, *CASTS):
            return self.pointwise(node, labels, self.value)
        raise Refused(node, f"{node.name} may look at several experts at once")

    # ---- operands of products

    def stack_of(self, node: fx.Node, labels: str) -> tuple[fx.Node, str] | None:
        per_token = any(token in labels for token in self.tokens)
        return None if per_token or EXPERT not in labels else (node, labels)

    def linear_operand(
        self, node: fx.Node, letters: str, labels: str
    ) -> tuple[fx.Node | None, str, list[fx.Node]] | None:
        if node not in self.path:
            return None
        value, weights = self.linear(node, self.path[node])
        if value is None:
            return None, "", weights
        return *self.without_ones(value, letters, self.path[node]), weights

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
