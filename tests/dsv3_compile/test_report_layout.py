"""Drawings of graphs: nothing overlaps, every edge runs from its source down to its target."""

from __future__ import annotations

from itertools import combinations, pairwise

import networkx as nx
import pytest

from dsv3_compile.report.layout import draw, drawn_graph
from tests.dsv3_compile import tiny

BLOCKS = [("embed", "prefill"), ("moe", "prefill"), ("moe", "decode"), ("head", "decode")]


def snapshots(key):
    return tiny.program().graphs[key]["snapshots"]


@pytest.mark.parametrize("key", BLOCKS)
def test_nodes_of_a_layer_stand_apart(key):
    for snapshot in snapshots(key):
        for (x, y), (other, layer) in combinations(draw(drawn_graph(snapshot["nodes"])).positions.values(), 2):
            assert y != layer or abs(x - other) >= 0.99


@pytest.mark.parametrize("key", BLOCKS)
def test_edges_run_down_layer_by_layer(key):
    for snapshot in snapshots(key):
        drawing = draw(drawn_graph(snapshot["nodes"]))
        for source, target, path in drawing.edges:
            assert path[0] == drawing.positions[source] and path[-1] == drawing.positions[target]
            assert all(below[1] == above[1] + 1 for above, below in pairwise(path))


def test_views_are_melted_into_edges():
    snapshot = snapshots(("moe", "decode"))[-1]
    graph = drawn_graph(snapshot["nodes"])
    views = {node["name"] for node in snapshot["nodes"] if node["view"]}
    assert views and not views & set(graph)
    assert nx.is_directed_acyclic_graph(graph)


def test_an_empty_graph_is_an_empty_drawing():
    assert draw(nx.DiGraph()).positions == {}
