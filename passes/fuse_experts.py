"""Sorting, the two grouped products and the weighted sum of a routed SwiGLU as one op."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import call, is_call, shape_of
from passes.nodes import settled, users
from passes.rewrite import Found, Match, Number, Op, Pattern, Rewrite, Var

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


pairs = Op((dsv3.sort_pairs,), (Var("indices"),))
order, offsets = (Op((operator.getitem,), (pairs, Number(value=i))) for i in (0, 1))
token_of_pair = Op((aten.floor_divide,), (order, Number("top_k")))
x_of_pair = Op((aten.index,), (Var("x"), (token_of_pair,)))


def grouped(inputs: Pattern, weight: str, name: str) -> Pattern:
    return Op((dsv3.grouped_linear,), (inputs, Var(weight), offsets), name=name)


hidden = Op((dsv3.swiglu,), (grouped(x_of_pair, "gate_up", "first"),), name="hidden")
experts = Op((dsv3.combine_pairs,), (grouped(hidden, "down", "second"), order, Var("weights")))


@dataclass(frozen=True)
class FuseExperts(Rewrite):
    """order, offsets = sort_pairs(indices)
       h = swiglu(grouped_linear(x[order // K], gate_up, offsets))      →    routed_swiglu(x, indices, weights,
       combine_pairs(grouped_linear(h, down, offsets), order, weights)                     gate_up, down)

    Experts that are no SwiGLU keep the grouped form.
    """  # fmt: skip

    before: ClassVar[Pattern] = Op((dsv3.combine_pairs,), (Var("y"),))

    def when(self, match: Match) -> str | None:
        found = routed(match.root)
        if found is None:
            return what_differs(match["y"])
        if found["top_k"] != shape_of(found["indices"])[1]:
            return f"pairs are divided by {found['top_k']}, a token has {shape_of(found['indices'])[1]}"
        for name in ("first", "hidden", "second"):
            if len(users(found[name])) > 1:
                return f"{found[name].name} is used by {users(found[name])[1].name} as well"
        return None

    def after(self, graph: fx.Graph, match: Match) -> fx.Node:
        found = routed(match.root)
        assert found is not None
        arguments = (found[name] for name in ("x", "indices", "weights", "gate_up", "down"))
        return call(graph, dsv3.routed_swiglu.default, *arguments, like=match.root)


def routed(root: fx.Node) -> Mapping[str, Any] | None:
    """The whole of a routed SwiGLU that ends in `root`."""
    return next((found.bound for found in experts.search(root, Found())), None)


def what_differs(y: fx.Node) -> str:
    if not is_call(y, dsv3.grouped_linear):
        return f"the experts do not end in a grouped product but in {y.name}"
    hidden_value = settled(y.args[0])
    if not is_call(hidden_value, dsv3.swiglu):
        return f"the experts are no SwiGLU: {hidden_value.name} stands between their products"
    return f"{hidden_value.name} does not follow a grouped product of the sorted tokens"
