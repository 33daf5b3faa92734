"""Caches become buffers that are written in place, where nothing reads the old rows afterwards."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import codegen.ops  # noqa: F401  registers the vocabulary
from codegen.targets import TARGETS
from passes.base import Context, Outcome, Role, Workload, call, calls
from passes.lower import Lower
from passes.verify import Specimen, clone

aten, dsv3 = torch.ops.aten, torch.ops.dsv3
CONTEXT = Context("decode", TARGETS["cpu"], Workload(3, 1, 11))
SHAPES = {
    "kv_BSX": (3, 2, 11),
    "weight": (7,),
    "cos_BSF": (3, 2, 2),
    "sin_BSF": (3, 2, 2),
    "positions_BS": (3, 2),
    "latent_BTC": (3, 5, 7),
    "rope_key_BTR": (3, 5, 4),
}
CACHES = ("latent_BTC", "rope_key_BTR")

Nodes = dict[str, fx.Node]


def graph_of(build: Callable[[fx.Graph, Nodes], tuple[fx.Node, ...]]) -> fx.GraphModule:
    """By hand, because export would take the fused op apart."""
    graph, nodes = fx.Graph(), {}
    with FakeTensorMode():
        for name, shape in SHAPES.items():
            dtype = torch.int64 if name == "positions_BS" else torch.float32
            role = Role.CACHE if name in CACHES else Role.WEIGHT if name == "weight" else Role.ACTIVATION
            node = nodes[name] = graph.create_node("placeholder", name, name=name)
            node.meta = {"val": torch.zeros(shape, dtype=dtype), "role": role}
            if name == "positions_BS":
                node.meta["upper"] = 5
    graph.output(build(graph, nodes))
    return fx.GraphModule(nn.Module(), graph)


def lowered(build: Callable[[fx.Graph, Nodes], tuple[fx.Node, ...]]) -> tuple[fx.GraphModule, Outcome]:
    module = graph_of(build)
    before, specimen = clone(module), Specimen.of(module)
    outcome = Lower().run(module, CONTEXT)
    specimen.certify(before, "lower")
    return module, outcome


def halves(graph: fx.Graph, write: fx.Node) -> list[fx.Node]:
    return [call(graph, getitem, write, index) for index in (0, 1)]


def count(module: fx.GraphModule, *targets: Any) -> int:
    return len(list(calls(module.graph, *targets)))


def output_names(module: fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.output_node().args[0]]


def test_the_fused_write_happens_in_place() -> None:
    def build(graph: fx.Graph, nodes: Nodes) -> tuple[fx.Node, ...]:
        latent, rope_key = halves(graph, call(graph, dsv3.write_cache.default, *nodes.values(), 1e-6, True))
        return call(graph, aten.sum.default, latent), latent, rope_key

    module, outcome = lowered(build)
    assert len(outcome.matches) == 1 and not outcome.refusals
    assert count(module, dsv3.write_cache_) == 1 and count(module, dsv3.write_cache) == 0
    assert output_names(module)[1:] == list(CACHES)


def test_a_plain_write_happens_in_place() -> None:
    def build(graph: fx.Graph, nodes: Nodes) -> tuple[fx.Node, ...]:
        return (index_put(graph, nodes, nodes["latent_BTC"]),)

    module, outcome = lowered(build)
    assert outcome.matches == ["index_put_default writes latent_BTC in place"]
    assert count(module, aten.index_put_) == 1 and count(module, aten.index_put) == 0
    assert output_names(module) == ["latent_BTC"]


def index_put(graph: fx.Graph, nodes: Nodes, cache: fx.Node) -> fx.Node:
    row = call(graph, aten.unsqueeze.default, call(graph, aten.arange.default, 3), 1)
    new = call(graph, aten.slice.Tensor, nodes["kv_BSX"], 2, 0, 7)
    return call(graph, aten.index_put.default, cache, [row, nodes["positions_BS"]], new)


def test_reading_the_old_rows_before_the_write_is_no_obstacle() -> None:
    def build(graph: fx.Graph, nodes: Nodes) -> tuple[fx.Node, ...]:
        old = call(graph, aten.sum.default, nodes["latent_BTC"])
        return old, index_put(graph, nodes, nodes["latent_BTC"])

    assert len(lowered(build)[1].matches) == 1


def test_reading_the_old_rows_after_the_write_is_refused() -> None:
    def build(graph: fx.Graph, nodes: Nodes) -> tuple[fx.Node, ...]:
        written = index_put(graph, nodes, nodes["latent_BTC"])
        return written, call(graph, aten.sum.default, nodes["latent_BTC"])

    module, outcome = lowered(build)
    assert [refusal.reason for refusal in outcome.refusals] == ["sum_default reads latent_BTC after it is written"]
    assert count(module, aten.index_put) == 1 and count(module, aten.index_put_) == 0


@pytest.mark.parametrize(
    ("view_of", "arguments"),
    [(aten.slice.Tensor, (1, 0, 2)), (aten.reshape.default, ([15, 7],)), (aten.unbind.int, (0,))],
    ids=str,
)
def test_reading_an_old_row_through_a_view_after_the_write_is_refused(view_of: Any, arguments: tuple) -> None:
    def build(graph: fx.Graph, nodes: Nodes) -> tuple[fx.Node, ...]:
        view = call(graph, view_of, nodes["latent_BTC"], *arguments)
        view = call(graph, getitem, view, 0) if view_of is aten.unbind.int else view
        written = index_put(graph, nodes, nodes["latent_BTC"])
        return written, call(graph, aten.sum.default, view)

    module, outcome = lowered(build)
    assert not outcome.matches and "after it is written" in outcome.refusals[0].reason


@pytest.mark.parametrize("through", ["slice", "whole"])
def test_writing_what_is_read_from_the_same_cache_is_refused(through: str) -> None:
    """Rows that move to the next place would be overwritten before they are read."""

    def build(graph: fx.Graph, nodes: Nodes) -> tuple[fx.Node, ...]:
        cache = nodes["latent_BTC"]
        rows = cache if through == "whole" else call(graph, aten.slice.Tensor, cache, 0, 0, 2)
        order = call(graph, aten.arange.start, int(rows is not cache), 3)
        return (call(graph, aten.index_put.default, cache, [order], rows),)

    module, outcome = lowered(build)
    assert not outcome.matches and "index_put_default writes to latent_BTC what it reads there" in str(outcome)
    assert count(module, aten.index_put) == 1


def test_giving_back_the_old_cache_beside_the_new_one_is_refused() -> None:
    def build(graph: fx.Graph, nodes: Nodes) -> tuple[fx.Node, ...]:
        return index_put(graph, nodes, nodes["latent_BTC"]), nodes["latent_BTC"]

    module, outcome = lowered(build)
    assert not outcome.matches and len(outcome.refusals) == 1


def test_a_fused_write_into_something_computed_is_refused() -> None:
    def build(graph: fx.Graph, nodes: Nodes) -> tuple[fx.Node, ...]:
        doubled = call(graph, aten.mul.Tensor, nodes["latent_BTC"], 2.0)
        arguments = {**nodes, "latent_BTC": doubled}
        return tuple(halves(graph, call(graph, dsv3.write_cache.default, *arguments.values(), 1e-6, True)))

    module, outcome = lowered(build)
    assert [refusal.reason for refusal in outcome.refusals] == ["mul_tensor is not a cache that was handed in"]
    assert count(module, dsv3.write_cache) == 1


def test_an_index_put_into_an_activation_is_no_business_of_this_pass() -> None:
    def build(graph: fx.Graph, nodes: Nodes) -> tuple[fx.Node, ...]:
        zeros = call(graph, aten.zeros_like.default, nodes["latent_BTC"])
        return (index_put(graph, nodes, zeros),)

    module, outcome = lowered(build)
    assert not outcome.matches and not outcome.refusals
