"""Where the nodes of a graph are drawn: layers from top to bottom, few crossings, edges that keep clear of nodes.

The method is Sugiyama's: layers by longest path, a waypoint wherever an edge crosses a layer, order by barycentre,
positions by the mean of the neighbours with a least distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import networkx as nx

SWEEPS = 6
WAYPOINT_WIDTH = 0.3  # of a node's width
Point = tuple[float, int]


@dataclass(frozen=True)
class Drawing:
    """Centres in node widths and layers; edges as points from source to target, both ends included."""

    positions: dict[str, Point]
    edges: list[tuple[str, str, list[Point]]]


def drawn_graph(nodes: Sequence[Mapping[str, Any]]) -> nx.DiGraph:
    """What of a snapshot is drawn: no weights, no sizes, and views (which are free) melted into their edges."""
    found = {node["name"]: node for node in nodes}
    hidden = {n["name"] for n in nodes if n["view"] or n["role"] == "weight" or n["op"] == "get_attr"}
    graph = nx.DiGraph()
    for node in nodes:
        if node["name"] in hidden:
            continue
        graph.add_node(node["name"])
        for source in _seen_through(node, found, hidden):
            graph.add_edge(source, node["name"])
    graph.remove_nodes_from([name for name in list(graph) if not graph.degree(name) and found[name]["role"]])
    return graph


def _seen_through(node: Mapping[str, Any], found: Mapping[str, Any], hidden: set[str]) -> dict[str, None]:
    sources: dict[str, None] = {}
    waiting = [name for name in node["inputs"] if found[name]["op"] != "sym_size"]
    while waiting:
        name = waiting.pop(0)
        if name not in hidden:
            sources[name] = None
        elif found[name]["op"] != "sym_size":
            # Of a view's inputs the first is the data; the others are sizes.
            waiting += found[name]["inputs"][:1]
    return sources


def draw(graph: nx.DiGraph) -> Drawing:
    """Coordinates for an acyclic graph."""
    layers = _layers(graph)
    chains: dict[tuple[str, str], list[Any]] = {}
    full = nx.DiGraph()
    full.add_nodes_from(graph)
    for source, target in graph.edges:
        path: list[Any] = [source]
        for layer in range(layers[source] + 1, layers[target]):
            waypoint = (source, target, layer)
            layers[waypoint] = layer
            path.append(waypoint)
        path.append(target)
        nx.add_path(full, path)
        chains[source, target] = path
    rows: list[list[Any]] = [[] for _ in range(max(layers.values(), default=-1) + 1)]
    for node in full:
        rows[layers[node]].append(node)
    x = _place(full, _ordered(full, rows))
    points = {node: (round(x[node], 2), layers[node]) for node in full}
    edges = [(s, t, [points[node] for node in path]) for (s, t), path in chains.items()]
    return Drawing({node: points[node] for node in graph}, edges)


def _layers(graph: nx.DiGraph) -> dict[Any, int]:
    layers: dict[Any, int] = {}
    for node in nx.topological_sort(graph):
        layers[node] = max((layers[p] + 1 for p in graph.predecessors(node)), default=0)
    for node in reversed(list(nx.topological_sort(graph))):
        users = [layers[u] for u in graph.successors(node)]
        # An input is drawn where it is first used, not at the top.
        if users and not graph.in_degree(node):
            layers[node] = min(users) - 1
    return layers


def _ordered(graph: nx.DiGraph, rows: list[list[Any]]) -> list[list[Any]]:
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        order = range(1, len(rows)) if down else range(len(rows) - 2, -1, -1)
        for index in order:
            beside = rows[index - 1 if down else index + 1]
            place = {node: position for position, node in enumerate(beside)}
            near = graph.predecessors if down else graph.successors
            old = {node: position for position, node in enumerate(rows[index])}

            def centre(node: Any, near: Any = near, place: Any = place, old: Any = old) -> float:
                return fmean([place[n] for n in near(node) if n in place] or [old[node]])

            rows[index].sort(key=centre)
    return rows


def _place(graph: nx.DiGraph, rows: list[list[Any]]) -> dict[Any, float]:
    x: dict[Any, float] = {}
    for row in rows:
        for position, node in enumerate(row):
            x[node] = position - (len(row) - 1) / 2
    for sweep in range(2 * SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            near = graph.predecessors if down else graph.successors
            wanted = [fmean([x[n] for n in near(node)] or [x[node]]) for node in row]
            for node, where in zip(row, _apart(row, wanted), strict=True):
                x[node] = where
    left = min(x.values(), default=0.0)
    return {node: where - left for node, where in x.items()}


def _apart(row: list[Any], wanted: list[float]) -> list[float]:
    """The wanted positions moved as little as keeps the order and the distances: merge what would overlap."""
    offsets = [0.0]
    for left, right in zip(row, row[1:], strict=False):
        offsets.append(offsets[-1] + (_width(left) + _width(right)) / 2)
    groups: list[tuple[float, int]] = []  # mean of wanted minus offset, members
    for want, offset in zip(wanted, offsets, strict=True):
        mean, count = want - offset, 1
        while groups and groups[-1][0] > mean:
            before, members = groups.pop()
            mean, count = (before * members + mean * count) / (members + count), members + count
        groups.append((mean, count))
    bases = [mean for mean, count in groups for _ in range(count)]
    return [base + offset for base, offset in zip(bases, offsets, strict=True)]


def _width(node: Any) -> float:
    return WAYPOINT_WIDTH if isinstance(node, tuple) else 1.0
