"""Complex numbers as pairs of real ones, which Inductor can fuse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, calls, is_call, sweep, told
from passes.nodes import COPIES, VIEWS

aten = torch.ops.aten
MOVES = (*VIEWS, *COPIES, aten.unsqueeze, aten.squeeze, aten.transpose, aten.permute)


@dataclass(frozen=True)
class RealArithmetic(Pass):
    """view_as_real(view_as_complex(x) · polar(r, θ))    →    stack(x₀·r·cos θ − x₁·r·sin θ, x₀·r·sin θ + x₁·r·cos θ)

    The same for any product of such numbers, and through views.
    """

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        known: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for node in calls(graph, aten.view_as_real):
            reason = why_not(node.args[0])
            if reason is not None:
                outcome.refuse(node, reason)
                continue
            parts = real_parts(graph, node.args[0], known)
            with graph.inserting_before(node):
                new = call(graph, aten.stack.default, list(parts), -1, like=node)
            node.replace_all_uses_with(new)
            outcome.matches.append(told(node.name, new))
        sweep(graph_module)
        return outcome


def why_not(number: fx.Node) -> str | None:
    """What computes a complex number that is not of real parts, or None."""
    if is_call(number, aten.view_as_complex, aten.polar):
        return None
    if is_call(number, aten.mul) and all(isinstance(factor, fx.Node) for factor in number.args):
        return next((reason for factor in number.args if (reason := why_not(factor))), None)
    if is_call(number, *MOVES):
        return why_not(number.args[0])
    if not number.meta["val"].is_complex():
        return f"{number.name} is a real factor"
    return f"{number.name} is complex, and neither a view nor a product of pairs and angles"


def real_parts(
    graph: fx.Graph, number: fx.Node, known: dict[fx.Node, tuple[fx.Node, fx.Node]]
) -> tuple[fx.Node, fx.Node]:
    """Its real and its imaginary part, computed right before it."""
    if number in known:
        return known[number]
    if is_call(number, aten.mul):
        (a, b), (c, d) = (real_parts(graph, factor, known) for factor in number.args)
    elif is_call(number, *MOVES):
        a, b = real_parts(graph, number.args[0], known)
    with graph.inserting_before(number):
        if is_call(number, aten.view_as_complex):
            first, second = (call(graph, aten.select.int, number.args[0], -1, i, like=number) for i in (0, 1))
        elif is_call(number, aten.polar):
            size, angle = number.args
            turned = [call(graph, op, angle, like=number) for op in (aten.cos.default, aten.sin.default)]
            first, second = (call(graph, aten.mul.Tensor, size, part, like=number) for part in turned)
        elif is_call(number, aten.mul):
            products = [call(graph, aten.mul.Tensor, *pair, like=number) for pair in ((a, c), (b, d), (a, d), (b, c))]
            first = call(graph, aten.sub.Tensor, *products[:2], like=number)
            second = call(graph, aten.add.Tensor, *products[2:], like=number)
        else:
            first, second = (
                call(graph, number.target, part, *number.args[1:], like=number, **number.kwargs) for part in (a, b)
            )
    known[number] = first, second
    return known[number]
