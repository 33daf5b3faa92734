"""Sorting, the two grouped products and the weighted sum of a routed SwiGLU as one op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import call, is_call, shape_of
from passes.fuse_swiglu import gated
from passes.nodes import cast, dtype_of, keeps, settled, uncast
from passes.products import Part, part_of
from passes.rewrite import Cast, Found, Match, Number, Op, Pattern, Rewrite, Var

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


pairs = Op((dsv3.sort_pairs,), (Var("indices"),))
order, offsets = (Op((operator.getitem,), (pairs, Number(value=i))) for i in (0, 1))
token_of_pair = Op((aten.floor_divide,), (order, Number("top_k")))
x_of_pair = Cast(Op((aten.index,), (Var("x"), (token_of_pair,))), lossy=True)


def grouped(inputs: Pattern, weight: str, name: str) -> Pattern:
    return Op((dsv3.grouped_linear,), (inputs, Var(weight), offsets), name=name)


@dataclass(frozen=True)
class Rows(Pattern):
    """The sorted tokens times some rows of every expert's matrix: a whole grouped product, or a part of one."""

    name: str

    def search(self, value: Any, found: Found) -> Iterator[Found]:
        node = settled(value)
        part = part_of(node) if isinstance(node, fx.Node) else None
        if part is not None:
            if part.axis != len(shape_of(node)) - 1:
                return
            found = found.cover(node)
            value = part.source
            if is_call(node, operator.getitem):
                found = found.cover(node.args[0])
        for product in grouped(x_of_pair, f"{self.name} stack", f"{self.name} product").search(value, found):
            yield product.bind(self.name, part)


by_op = Op((dsv3.swiglu,), (grouped(x_of_pair, "gate stack", "gate product"),), name="swiglu")
hidden = by_op | gated(Rows("gate"), Rows("up"))
results = grouped(Cast(hidden, lossy=True), "down", "second")
experts = Op((dsv3.combine_pairs,), (Cast(results), order, Var("weights")))


@dataclass(frozen=True)
class FuseExperts(Rewrite):
    """order, offsets = sort_pairs(indices)
       h = swiglu(grouped_linear(x[order // K], gate_up, offsets))      →    routed_swiglu(x, indices, weights,
       combine_pairs(grouped_linear(h, down, offsets), order, weights)                     gate_up, down)

    Gates and ups may also be products with stacks of their own, or parts of one in another order. Experts that are no
    SwiGLU keep the grouped form.
    """  # fmt: skip

    joined: bool = True  # gates and ups that are apart become one stack, stored anew; else they stay where they are

    before: ClassVar[Pattern] = Op((dsv3.combine_pairs,), (Var("y"),))

    def when(self, match: Match) -> str | None:
        found = routed(match.root)
        if found is None:
            return what_differs(match["y"])
        if found["top_k"] != shape_of(found["indices"])[1]:
            return f"pairs are divided by {found['top_k']}, a token has {shape_of(found['indices'])[1]}"
        stacks = [found[name] for name in ("gate stack", "up stack", "down") if name in found.bound]
        dtype, *others = dict.fromkeys(map(dtype_of, stacks))
        if others:
            listed = ", ".join(f"{stack.name} {dtype_of(stack)}" for stack in stacks)
            return f"the experts' weights differ in dtype: {listed}"
        if keeps(match.root, dtype):
            return f"{match.root.name} is not rounded to {dtype}, in which its experts are"
        products = min(found[name] for name in ("gate product", "up product") if name in found.bound)
        # The sorted pairs and their tokens may be read by others: both forms make them.
        return Match(found.root, found.bound, tuple(node for node in found.inner if not node < products)).leak()

    def after(self, graph: fx.Graph, match: Match) -> fx.Node:
        found = routed(match.root)
        assert found is not None
        x, indices, weights, gate, down = (found[name] for name in ("x", "indices", "weights", "gate stack", "down"))
        x, apart, limit = cast(graph, x, dtype_of(gate)), None, limit_of(found)
        if "up" in found.bound:
            gate, up = (rows_of(graph, found[f"{name} stack"], found[name]) for name in ("gate", "up"))
            if self.joined:
                gate = call(graph, aten.cat.default, [gate, up], 1, like=match.root)
            else:
                apart = up
        # What stands in front of the last argument that is none of the defaults.
        more = [None, 0, apart, limit] if limit is not None else [None, 0, apart] if apart is not None else []
        return call(graph, dsv3.routed_swiglu.default, x, indices, weights, gate, down, *more, like=match.root)


def rows_of(graph: fx.Graph, stack: fx.Node, part: Part | None) -> fx.Node:
    """Of every expert's matrix the rows that a part of the product came from."""
    if part is None:
        return stack
    return call(graph, aten.slice.Tensor, stack, 1, part.start, part.stop, part.step, like=stack)


def limit_of(found: Match) -> float | None:
    """What gates and ups are kept within."""
    op = found.get("swiglu")
    if op is None:
        return found["limit"]
    return op.args[1] if len(op.args) > 1 else None


def routed(root: fx.Node) -> Match | None:
    """The whole of a routed SwiGLU that ends in `root`."""
    return next((Match(root, found.bound, found.inner) for found in experts.search(root, Found())), None)


def what_differs(y: fx.Node) -> str:
    y = uncast(y)
    if not is_call(y, dsv3.grouped_linear):
        return f"the experts do not end in a grouped product but in {y.name}"
    hidden_value = settled(y.args[0])
    by_hand = gated(Var("gate"), Var("up")).search(hidden_value, Found())
    if not is_call(hidden_value, dsv3.swiglu) and next(by_hand, None) is None:
        return f"the experts are no SwiGLU: {hidden_value.name} stands between their products"
    return f"{hidden_value.name} does not follow a grouped product of the sorted tokens"
