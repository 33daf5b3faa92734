"""What the integers of a graph number: tokens, choices, experts, pairs.

Labels of dims: `N` the tokens, letters `tuvw` several token axes, `K` the experts of a token, `P` its pairs n·K + k in
that order, `S` the pairs in the order of the graph's own sort, `E` all experts, `.` a feature, `1` broadcast. An
integer that indexes an axis reads as the label of that axis.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch import fx

from passes.base import is_call, same_size, shape_of
from passes.counts import counted_indices, uncast_integers
from passes.layouts import EXPERT, FEATURE, TOKEN_AXES, has_labels, labels_before
from passes.nodes import RESHAPES, counts_up
from passes.products import BROADCAST, sources_of_dims

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

TOKEN, CHOICE, PAIR, RANK = "NKPS"
PUTS = (aten.index_put, aten.index_copy, aten.scatter)


def chosen_experts(node: Any) -> int | None:
    """If it holds the result of a top-k over the last of few enough axes: how many there were to choose from."""
    if not is_call(node, operator.getitem):
        return None
    split, number = node.args
    if is_call(split, aten.topk) and number == 1 and has_labels(len(shape_of(node))):
        axis = split.args[2] if len(split.args) > 2 else -1
        return shape_of(split.args[0])[-1] if axis in (-1, len(shape_of(node)) - 1) else None
    return shape_of(split.args[0])[-1] if is_call(split, dsv3.route) and number == 0 else None


def chosen_behind(indices: Any) -> fx.Node | None:
    """The top-k that integers were computed from."""
    queue = list(indices) if isinstance(indices, (list, tuple)) else [indices]
    seen: set[fx.Node] = set()
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if chosen_experts(node) is not None:
            return node
        if node.op == "call_function" and not is_call(node, aten.topk):
            queue.extend(node.all_input_nodes)
    return None


class PairNumbers:
    """Reads indices and rearrangements of the pairs that one top-k chose."""

    def __init__(self, chosen: fx.Node) -> None:
        *tokens, top_k = shape_of(chosen)
        self.chosen = chosen
        self.grid = (TOKEN if len(tokens) == 1 else TOKEN_AXES[: len(tokens)]) + CHOICE
        self.top_k, self.experts = top_k, chosen_experts(chosen)
        self.one = same_size(top_k, 1)  # then the pairs are the tokens, in the same order
        count = prod(tokens)
        self.sizes = {TOKEN: count, CHOICE: top_k, PAIR: count * top_k, RANK: count * top_k, EXPERT: self.experts}
        self.sizes |= dict(zip(self.grid, (*tokens, top_k), strict=True))
        self.sort: fx.Node | None = None  # the one whose order `S` stands for

    def reads(self, node: Any, labels: str) -> str | None:
        """The label of the axis that integers with dims `labels` index, or None."""
        node = uncast_integers(node)
        if not isinstance(node, fx.Node):
            return None
        if node is self.chosen and self._is_grid(labels):
            return EXPERT
        if counts_up(node, 0) and labels in (TOKEN, CHOICE, PAIR, RANK):
            return labels
        if is_call(node, aten.floor_divide, aten.div, aten.__rshift__) and self.reads(node.args[0], labels) == PAIR:
            return TOKEN if self._divides(node) else None
        if is_call(node, aten.remainder) and node.args[1] == self.top_k:
            return CHOICE if self.reads(node.args[0], labels) == PAIR else None
        if labels == RANK and (number := self._of_sort(node)) is not None:
            return PAIR if number else self.reads(self.sorted_by(), PAIR)
        if labels == PAIR and is_call(node, aten.argsort, aten.sort) and self.reads(node.args[0], RANK) == PAIR:
            return RANK
        if labels == PAIR and is_call(node, operator.getitem) and is_call(node.args[0], aten.sort):
            return RANK if node.args[1] == 1 and self.reads(node.args[0].args[0], RANK) == PAIR else None
        before = self.source(node, labels) or self.before(node, labels)
        return None if before is None else self.reads(*before)

    def reads_token(self, node: Any, labels: str) -> bool:
        """Do integers with dims `labels` index the tokens? With one expert each, a pair's number is its token's."""
        read = self.reads(node, labels)
        return read == TOKEN or (read == PAIR and self.one)

    def _is_grid(self, labels: str) -> bool:
        """Are these the dims of the top-k? With one expert each, they are those of the pairs and one of size one."""
        return (labels.replace(PAIR, TOKEN).replace(BROADCAST, CHOICE) if self.one else labels) == self.grid

    def _divides(self, node: fx.Node) -> bool:
        floors = is_call(node, aten.floor_divide) or node.kwargs.get("rounding_mode") in ("floor", "trunc")
        return floors and node.args[1] == self.top_k

    def _of_sort(self, node: fx.Node) -> int | None:
        """Which result of a sort of all pairs it is: 0 the sorted values, 1 their pairs. The first one seen counts."""
        sort, number = (node, 1) if is_call(node, aten.argsort) else (node.args[0], node.args[1])
        if not is_call(sort, aten.argsort, aten.sort) or len(shape_of(node)) != 1:
            return None
        self.sort = self.sort or sort
        return number if self.sort is sort else None

    def sorted_by(self) -> fx.Node:
        assert self.sort is not None
        return self.sort.args[0]

    def sorted_by_expert(self) -> bool:
        """Do the experts of the pairs ascend in the graph's own order?"""
        if self.sort is None or self.sort.kwargs.get("descending") or True in self.sort.args[1:]:
            return False
        return self.reads(self.sorted_by(), PAIR) == EXPERT

    def counted_by(self, offsets: fx.Node) -> bool:
        """Do offsets [E] say where the pairs of each expert end?"""
        indices, only_sorted = counted_indices(offsets) or (None, False)
        if indices is None:
            return False
        forms = (RANK,) if only_sorted else (PAIR, RANK, self.grid, TOKEN + CHOICE)
        rank = len(shape_of(indices))
        return any(len(form) == rank and self.reads(indices, form) == EXPERT for form in forms)

    # ---- where dims come from

    def source(self, node: fx.Node, labels: str) -> tuple[fx.Node, str] | None:
        """For a node that picks or moves whole rows along axes of pairs: what from, and its labels."""
        if is_call(node, aten.index):
            return self._picked(node.args[0], node.args[1], labels)
        if is_call(node, aten.index_select) and node.args[1] == 0:
            return self._picked(node.args[0], node.args[2:], labels)
        if is_call(node, aten.embedding):
            return self._picked(node.args[0], node.args[1:2], labels)
        if is_call(node, aten.gather, aten.take_along_dim):
            return self._gathered(node, labels)
        if is_call(node, aten.repeat_interleave) and labels[0] == PAIR and self._repeats_rows(node):
            return self._sized(node.args[0], TOKEN + labels[1:])
        if is_call(node, aten.index_put) and not any(node.args[3:]):
            return self._put(node.args[1], node.args[2], labels)
        if is_call(node, aten.index_copy) and node.args[1] == 0:
            return self._put(node.args[2:3], node.args[3], labels)
        if is_call(node, aten.scatter) and node.args[1] == 0 and isinstance(node.args[3], fx.Node):
            return self._put(node.args[2:3], node.args[3], labels)
        return None

    def _repeats_rows(self, node: fx.Node) -> bool:
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return node.args[1] == self.top_k and (axis == 0 or (axis is None and len(shape_of(node.args[0])) == 1))

    def _picked(self, source: fx.Node, indices: Any, labels: str) -> tuple[fx.Node, str] | None:
        """source[i, j, …] with indices of the same rank."""
        if any(i is None for i in indices):
            return None
        (rank, *others) = {len(shape_of(i)) for i in indices}
        read = [self.reads(i, labels[:rank]) for i in indices]
        if others or None in read:
            return None
        return self._sized(source, "".join(map(str, read)) + labels[rank:])

    def _gathered(self, node: fx.Node, labels: str) -> tuple[fx.Node, str] | None:
        """source[i[a, b], b]: along the first axis."""
        source, axis, index = node.args if is_call(node, aten.gather) else (node.args[0], *node.args[2:], node.args[1])
        if axis != 0 or not all(map(same_size, shape_of(source)[1:], shape_of(index)[1:])):
            return None
        read = self.reads(index, labels)
        return None if read is None else self._sized(source, read + labels[1:])

    def _put(self, indices: Any, values: fx.Node, labels: str) -> tuple[fx.Node, str] | None:
        """Rows written to the places of all pairs."""
        other = {PAIR: RANK, RANK: PAIR}.get(labels[0])
        if same_size(self.sizes[PAIR], 1) and is_call(values, *RESHAPES) and len(shape_of(values)) < len(labels):
            values = values.args[0]  # torch writes a single row without its axis
        if other is None or len(indices) != 1 or len(shape_of(values)) != len(labels):
            return None
        own = other + labels[1 : len(shape_of(indices[0]))]
        return self._sized(values, other + labels[1:]) if self.reads(indices[0], own) == labels[0] else None

    def _sized(self, node: fx.Node, labels: str) -> tuple[fx.Node, str] | None:
        """The node with its labels, unless a labelled axis is longer than it should be."""
        fits = (
            same_size(size, self.sizes.get(label, size)) for size, label in zip(shape_of(node), labels, strict=True)
        )
        return (node, labels) if all(fits) else None

    def before(self, node: fx.Node, labels: str) -> tuple[fx.Node, str] | None:
        """The input of a rearrangement, and its labels."""
        if node.op != "call_function" or not node.args:
            return None
        regrouped = self.regrouped(node, labels)
        if regrouped is not None:
            return node.args[0], regrouped
        sources = sources_of_dims(node)
        if sources is None:
            return None
        own = labels_before(node, labels, sources)
        if self.one and CHOICE in labels and CHOICE not in own:  # what is left of the pairs are the pairs
            own = own.replace(TOKEN, PAIR)
        return node.args[0], own

    def regrouped(self, node: fx.Node, labels: str) -> str | None:
        """Labels of a reshape's input whose leading dims hold the same pairs or tokens in the same order."""
        lead = labels.rstrip(FEATURE + BROADCAST)
        if not is_call(node, *RESHAPES) or any(label in (FEATURE, BROADCAST, EXPERT) for label in lead):
            return None
        sizes = shape_of(node.args[0])
        rest = labels[len(lead) :]
        width = prod(shape_of(node)[len(lead) :])
        fitting = [
            own
            for own in self._same_order(lead)
            if len(own) <= len(sizes)
            and all(map(same_size, sizes, (self.sizes[label] for label in own)))
            and same_size(width, prod(sizes[len(own) :]))
        ]
        if not fitting or {FEATURE, BROADCAST} <= set(rest):
            return None
        if FEATURE in rest:
            return fitting[0] + FEATURE * (len(sizes) - len(fitting[0]))
        own = max(fitting, key=len)  # an axis of size one is better known as the only choice than as nothing
        return own + BROADCAST * (len(sizes) - len(own))

    def _same_order(self, lead: str) -> tuple[str, ...]:
        tokens = self.grid[:-1]
        if lead in (TOKEN, tokens):
            return tuple(dict.fromkeys((lead, TOKEN, tokens)))
        if lead in (PAIR, TOKEN + CHOICE, self.grid):
            return tuple(dict.fromkeys((lead, PAIR, TOKEN + CHOICE, self.grid)))
        return (lead,) if lead in (RANK, CHOICE) else ()
