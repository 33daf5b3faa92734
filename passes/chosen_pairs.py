"""Experts that a graph computes for chosen pairs already, rebuilt on pairs sorted by expert.

Labels as in passes/pair_numbers.py, sizes as in passes/pairs.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.base import is_call, same_size, shape_of
from passes.grouped_calls import GroupedCall, grouped_call
from passes.layouts import EXPERT, FEATURE
from passes.nodes import CASTS, dtype_of, is_division, is_pointwise, settled, uncast
from passes.pair_numbers import CHOICE, PAIR, PUTS, RANK, TOKEN, PairNumbers
from passes.pairs import Pairs
from passes.products import BROADCAST, Part, part_of, product_of, sources_of_dims
from passes.rewrite import Refused

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


class ChosenPairs(Pairs):
    """The sum `total` over each token's experts. `computed`: the nodes that depend on an expert's weights."""

    def __init__(
        self, graph: fx.Graph, total: fx.Node, path: dict[fx.Node, str], numbers: PairNumbers, computed: set[fx.Node]
    ) -> None:
        super().__init__(graph, total, path)
        self.numbers, self.computed = numbers, computed
        indices = numbers.chosen
        if len(numbers.grid) > 2:
            indices = self.call(aten.flatten.using_ints, indices, 0, len(numbers.grid) - 2)
        assert numbers.experts is not None
        self.sort(indices, numbers.experts)

    def sum(self, value: fx.Node | None, weights: list[fx.Node], features: int) -> fx.Node:
        """What replaces the sum: [N, O]."""
        self.refuse_leaks()
        if value is None:
            raise Refused(self.total, f"{self.total.name} sums weights only")
        if not weights:
            weights = [self.call(aten.ones_like.default, self.indices, dtype=value.meta["val"].dtype)]
        factor = self.multiply(weights)
        if not all(map(same_size, shape_of(factor), shape_of(self.indices))):
            factor = self.call(aten.expand_as.default, factor, self.indices)
        return self.combine(value, factor, features)

    def shaped(self, rows: fx.Node, labels: str) -> fx.Node:
        """[N, O] with the dims of the sum."""
        shape = shape_of(self.total)
        features = [size for size, label in zip(shape, labels, strict=True) if label == FEATURE]
        tokens = [label for label in labels if label != FEATURE]
        if len(tokens) > 1 or len(features) != 1:
            known = [shape[labels.index(token)] for token in sorted(tokens)]
            sizes = [self.size(size) if len(tokens) > 1 else -1 for size in known]
            rows = self.call(aten.reshape.default, rows, [*sizes, *features])
        numbered = iter(range(len(tokens), len(labels)))
        order = [next(numbered) if label == FEATURE else sorted(tokens).index(label) for label in labels]
        return self.permuted(rows, order)

    def size(self, size: Any) -> Any:
        """A size as an argument: a number, or the node that has it as its value."""
        if isinstance(size, int):
            return size
        for node in self.graph.nodes:
            if node is self.total:
                break
            if isinstance(node.meta.get("val"), torch.SymInt) and same_size(node.meta["val"], size):
                return node
        raise Refused(self.total, f"a size of {self.total.name} is not known to the graph")

    # ---- values on pairs

    def behind(self, node: fx.Node) -> fx.Node:
        """The node behind copies."""
        while settled(node) is not node:
            self.note(node)
            node = node.args[0]
        return node

    def note(self, node: fx.Node) -> None:
        if node in self.computed:
            self.rebuilt.add(node)
            if is_call(node, *PUTS):  # into what was made like a value, only to be overwritten
                self.rebuilt |= self.computed & set(node.all_input_nodes)

    def value(self, node: fx.Node, labels: str) -> fx.Node:
        node, lead = self.behind(node), _lead(labels)
        if lead in ("", EXPERT, TOKEN, self.numbers.grid[:-1]) and node in self.computed:
            raise Refused(node, f"{node.name} looks at several pairs at once")
        if lead == EXPERT:
            if labels.count(FEATURE) > 1:
                raise Refused(node, f"{node.name} is copied for every pair before it is multiplied")
            return self.call(aten.index.Tensor, self.leading(node, labels, EXPERT), [self.expert_of_pair()])
        if lead in (TOKEN, self.numbers.grid[:-1]):
            return self.call(aten.index.Tensor, self.leading(node, labels, lead), [self.token_of_pair()])
        if lead == "":
            return self.leading(node, labels, "")
        if FEATURE in labels or node in self.computed:
            return self.rebuild(node, labels)
        return self.on_pairs(self.selected(node, labels))

    def rebuild(self, node: fx.Node, labels: str) -> fx.Node:
        """A value of every pair, computed in the order of ours."""
        self.note(node)
        source = self.numbers.source(node, labels)
        if source is not None:
            return self.value(*source)
        grouped = grouped_call(node)
        if grouped is not None:
            value, weights = self.grouped(node, labels, grouped)
            return self.multiply_in(value, weights)
        part = self.part(node, labels)
        if part is not None:
            return part
        rearranged = self.moved(node, labels, self.value)
        if rearranged is not None:
            return rearranged
        product = product_of(node)
        if product is not None:
            return self.multiply_in(*self.product(node, labels, product))
        if _pointwise(node):
            return self.pointwise(node, labels, self.value)
        if node not in self.computed and _lead(labels) in (PAIR, self.numbers.grid):
            flat = self.leading(node, labels, _lead(labels))
            number = self.token_of_pair() if self.numbers.one else self.order  # one form for rows of tokens
            return self.call(aten.index.Tensor, flat, [number])
        raise unknown(node, f"{node.name} may look at several pairs at once")

    def moved(self, node: fx.Node, labels: str, of: Any) -> fx.Node | None:
        """A rearrangement, done to the features of its input."""
        regrouped = self.numbers.regrouped(node, labels)
        if regrouped is not None:
            value = of(node.args[0], regrouped)
            sizes = [size for size, label in zip(shape_of(node), labels, strict=True) if label == FEATURE]
            for known in (value, *value.args[:1]) if is_call(value, aten.unsqueeze) else (value,):
                if len(shape_of(known)) == 1 + len(sizes) and all(map(same_size, shape_of(known)[1:], sizes)):
                    return known
            return self.call(aten.reshape.default, value, [-1, *sizes])
        if is_call(node, aten.select):
            return self.one_of(node, labels, of)
        before = None if sources_of_dims(node) is None else self.numbers.before(node, labels)
        return None if before is None else self.rearranged(node, labels, of(*before), before[1])

    def one_of(self, node: fx.Node, labels: str, of: Any) -> fx.Node:
        """One index of a feature's axis."""
        source, axis, index = node.args
        axis %= len(shape_of(source))
        if same_size(shape_of(source)[axis], 1):
            return of(source, labels[:axis] + BROADCAST + labels[axis:])
        value = of(source, labels[:axis] + FEATURE + labels[axis:])
        return self.call(aten.select.int, value, 1 + labels[:axis].count(FEATURE), index)

    # ---- weights

    def selected(self, node: fx.Node, labels: str) -> fx.Node:
        node, lead = self.behind(node), _lead(labels)
        self.note(node)
        if lead in ("", CHOICE):
            return self.leading(node, labels, lead)
        if lead in (TOKEN, self.numbers.grid[:-1]):
            return self.call(aten.unsqueeze.default, self.leading(node, labels, lead), 1)
        if lead == EXPERT:
            return self.call(aten.index.Tensor, self.leading(node, labels, EXPERT), [self.indices])
        before = self.numbers.source(node, labels) or self.numbers.before(node, labels)
        if before is not None and FEATURE not in before[1]:
            return self.selected(*before)
        if node not in self.computed and sorted(lead) == sorted(self.numbers.grid):
            grid = self.leading(node, labels, self.numbers.grid[:-1])
            return grid
        if node not in self.computed and lead == PAIR:
            return self.call(aten.reshape.default, self.leading(node, labels, PAIR), [-1, self.numbers.top_k])
        product = product_of(node)
        if product is not None and not product.summed():
            named = dict(zip(product.out, labels, strict=True)) | {BROADCAST: BROADCAST}
            return self.multiply([self.selected(n, "".join(named[c] for c in own)) for n, own in product.operands])
        if _pointwise(node):
            return self.pointwise(node, labels, self.selected)
        raise unknown(node, f"{node.name} is no weight of single pairs")

    def linear(self, node: fx.Node, labels: str) -> tuple[fx.Node | None, list[fx.Node]]:
        node = self.behind(node)
        if node not in self.computed:
            return (self.value(node, labels), []) if FEATURE in labels else (None, [self.selected(node, labels)])
        self.note(node)
        source = self.numbers.source(node, labels)
        if source is not None:
            return self.linear(*source)
        grouped = grouped_call(node)
        if grouped is not None:
            return self.grouped(node, labels, grouped)
        weights: list[fx.Node] = []

        def without_weights(inside: fx.Node, own: str) -> fx.Node:
            value, more = self.linear(inside, own)
            weights.extend(more)
            return self.multiply_in(value, []) if value is not None else self.on_pairs(self.multiply([weights.pop()]))

        rearranged = self.moved(node, labels, without_weights)
        if rearranged is not None:
            return rearranged, weights
        product = product_of(node)
        if product is not None:
            return self.product(node, labels, product)
        number = _factor(node)
        if number is not None or is_call(node, *CASTS):
            value = without_weights(node.args[0], labels)
            if number is None:
                known = uncast(value)  # what was widened for the weights alone
                if dtype_of(known) == dtype_of(node):
                    return known, weights
                return self.call(node.target, value, *node.args[1:], **node.kwargs), weights
            if not weights:
                weights.append(self.call(aten.ones_like.default, self.indices, dtype=value.meta["val"].dtype))
            return value, [*weights[:-1], self.call(aten.mul.Tensor, weights[-1], number)]
        return self.value(node, labels), []

    # ---- products

    def stack_of(self, node: fx.Node, labels: str) -> tuple[fx.Node, str] | None:
        lead = _lead(labels)
        if lead == EXPERT:
            return node, labels
        if lead in ("", TOKEN) or FEATURE not in labels:
            return None
        source = self.numbers.source(node, labels)
        if source is not None:
            return self.stack_of(*source)
        part = part_of(node)
        if part is not None and labels[part.axis] == FEATURE:
            whole = self.stack_of(part.source, labels)
            return None if whole is None else self.part_of_stack(*whole, part, labels)
        sources = sources_of_dims(node)
        before = None if sources is None else self.numbers.before(node, labels)
        inside = None if before is None else self.stack_of(*before)
        if inside is None or sources is None or before is None:
            return None
        stack, own = inside
        behind = [source for source, label in zip(sources, labels, strict=True) if label == FEATURE]
        features = [d for d, label in enumerate(before[1]) if label == FEATURE]
        if sorted(behind, key=str) != sorted(features, key=str):
            return None
        order = [1 + features.index(source) for source in behind if source is not None]
        return self.permuted(self.leading(stack, own, EXPERT), [0, *order]), EXPERT + FEATURE * len(order)

    def part_of_stack(self, stack: fx.Node, own: str, part: Part, labels: str) -> tuple[fx.Node, str]:
        dim = 1 + labels[: part.axis].count(FEATURE)
        stack = self.leading(stack, own, EXPERT)
        return self.call(aten.slice.Tensor, stack, dim, part.start, part.stop, part.step), EXPERT + own.replace(
            EXPERT, ""
        )

    def linear_operand(
        self, node: fx.Node, letters: str, labels: str
    ) -> tuple[fx.Node | None, str, list[fx.Node]] | None:
        if _lead(labels) in ("", EXPERT) or self.stack_of(node, labels) is not None:
            return None
        if FEATURE not in labels:
            return (self.value(node, labels), "", []) if node in self.computed else None
        wide = [not same_size(size, 1) for size in shape_of(node)]
        kept = "".join(
            BROADCAST if label == FEATURE and not many else label for label, many in zip(labels, wide, strict=True)
        )
        if FEATURE not in kept and node not in self.computed:
            return None, "", [self.selected(node, kept)]
        own = kept if FEATURE in kept else labels
        value, weights = self.linear(node, own)
        return value, "".join(c for c, label in zip(letters, own, strict=True) if label == FEATURE), weights

    def grouped(self, node: fx.Node, labels: str, found: GroupedCall) -> tuple[fx.Node, list[fx.Node]]:
        """Somebody else's grouped product, with our order and offsets."""
        if labels != RANK + FEATURE:
            raise Refused(node, f"the rows of {node.name} are used without being sorted back")
        value, weights = self.linear(found.rows, labels)
        if value is None:
            raise Refused(node, f"{node.name} multiplies weights only")
        if not self.numbers.sorted_by_expert():
            raise Refused(node, f"the rows of {node.name} are not sorted by the experts that its offsets count")
        if not self.numbers.counted_by(found.offsets):
            raise Refused(node, f"the offsets {found.offsets.name} do not count {self.numbers.chosen.name}")
        if found.stack in self.computed or not same_size(shape_of(found.stack)[0], self.numbers.experts):
            raise Refused(node, f"{found.stack.name} does not hold one matrix for each expert")
        stack = self.permuted(found.stack, [0, 2, 1])
        return self.call(dsv3.grouped_linear.default, value, stack, self.offsets), weights


def _lead(labels: str) -> str:
    return "".join(label for label in labels if label not in (FEATURE, BROADCAST))


def unknown(node: fx.Node, reason: str) -> Refused:
    """Why a node cannot be read on pairs: its index, or `reason`."""
    if is_call(node, aten.index, aten.index_select, aten.embedding, aten.gather):
        index = node.all_input_nodes[-1].name
        reason = f"{node.name} picks by {index}: no number of a chosen expert, a token or a pair in this order"
    return Refused(node, reason)


def _pointwise(node: fx.Node) -> bool:
    return is_pointwise(node) or is_call(node, *CASTS)


def _factor(node: fx.Node) -> float | None:
    """The number that a node multiplies its only input by."""
    if is_call(node, aten.neg):
        return -1.0
    if (is_call(node, aten.mul) or is_division(node)) and isinstance(node.args[1], (int, float)):
        return float(node.args[1]) if is_call(node, aten.mul) else 1 / node.args[1]
    return None
