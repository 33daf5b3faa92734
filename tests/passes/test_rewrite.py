"""Patterns, and the loop that applies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

from passes.base import call
from passes.rewrite import Found, Match, Number, Op, Pattern, Rewrite, Var
from tests.passes.capture import CONTEXT, graph_of, tensor
from tests.passes.harness import certified, count, untouched

aten = torch.ops.aten

sine = Op((aten.sin,), (Var("x"),))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


def graph_with(function):
    return graph_of(Function(function), [tensor("x", "B", 5), tensor("y", "B", 5)])


def found(pattern: Pattern, function) -> list[dict]:
    """What the names stand for in every match of the pattern at the output."""
    (result,) = graph_with(function).graph.output_node().args[0]
    return [{k: getattr(v, "name", v) for k, v in one.bound.items()} for one in pattern.search(result, Found())]


def test_sums_and_products_commute():
    assert found(sine * Var("y"), lambda x, y: y * x.sin()) == [{"x": "x", "y": "y"}]
    assert found(sine + Var("y"), lambda x, y: y + x.sin()) == [{"x": "x", "y": "y"}]


def test_differences_do_not_commute():
    assert found(sine - Var("y"), lambda x, y: y - x.sin()) == []


def test_a_name_is_one_node():
    assert found(Var("x") * Var("x"), lambda x, y: x * y) == []
    assert found(Var("x") * Op((aten.sin,), (Var("x"),)), lambda x, y: x * x.sin()) != []


def test_numbers_are_captured():
    assert found(Var("x") + Number("eps"), lambda x, y: x + 1e-7) == [{"x": "x", "eps": 1e-7}]
    assert found(Var("x") + Number(value=2), lambda x, y: x + 3) == []


def test_a_division_that_rounds_is_no_quotient():
    assert found(Var("x") / Var("y"), lambda x, y: x / y) == [{"x": "x", "y": "y"}]
    assert found(Var("x") / Var("y"), lambda x, y: torch.div(x, y, rounding_mode="floor")) == []


def test_a_scaled_sum_is_another_sum():
    assert found(Var("x") + Var("y"), lambda x, y: torch.add(x, y, alpha=2)) == []


def test_alternatives_are_tried_in_order():
    pattern = sine * Var("y") | Var("a") * Var("b")
    assert [sorted(one) for one in found(pattern, lambda x, y: x.sin() * y)][0] == ["x", "y"]


@dataclass(frozen=True)
class SwapFactors(Rewrite):
    """sin(x) * y → y * sin(x)"""

    before: ClassVar[Pattern] = Op((aten.sin,), (Var("x"),), name="sine") * Var("y")

    def when(self, match: Match) -> str | None:
        return match.leak()

    def after(self, graph: fx.Graph, match: Match) -> fx.Node:
        sine = call(graph, aten.sin.default, match["x"], like=match.root)
        return call(graph, aten.mul.Tensor, match["y"], sine, like=match.root)


def test_the_loop_replaces_every_match_and_reports_lines():
    graph = graph_with(lambda x, y: (x.sin() * y, y.sin() * x))
    outcome = certified(SwapFactors(), graph)
    assert len(outcome.matches) == 2 and count(graph, aten.sin) == 2
    assert all("test_rewrite.py:" in line for line in outcome.matches)


@pytest.mark.parametrize("copy", [lambda t: t, lambda t: t.clone()], ids=["directly", "through a copy"])
def test_an_intermediate_value_with_another_reader_is_refused(copy):
    graph = graph_with(lambda x, y: (x.sin() * y, copy(x.sin()).exp()))
    assert untouched(SwapFactors(), graph) == "sin is used by exp as well"


def test_refusals_name_node_and_source_line():
    graph = graph_with(lambda x, y: (x.sin() * y, x.sin().exp()))
    (refusal,) = SwapFactors().run(graph, CONTEXT).refusals
    assert refusal.node.startswith("mul") and refusal.source.startswith("test_rewrite.py:")
