"""Normalise the latent, rotate the rope key, write both into the cache: one op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, calls, is_call, same_size, shape_of, sweep, told
from passes.fuse_norm import read_norm
from passes.nodes import CASTS, counts_up, erase_dead, settled, steps_between, users
from passes.products import Part, join, part_of, sources_of_dims
from passes.rewrite import Match, Refused

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class FuseCacheWrite(Pass):
    """u, k = split(kv)
       latent'   = latent  with rows rms_norm(u, w)   at positions
       rope_key' = rope_key with rows rotary(k, cos, sin)  at positions    →    latent', rope_key' = write_cache(kv, …)

    Only where nobody else reads the new rows, and both caches are written at the same positions.
    """  # fmt: skip

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome, graph = Outcome(), graph_module.graph
        for put in calls(graph, aten.index_put):
            rows = rotated_rows(put)
            if rows is None:
                continue
            try:
                outcome.matches.append(fuse(graph, rows))
            except Refused as refused:
                outcome.refuse(refused.node, refused.reason, steps_between(put, refused.node))
        sweep(graph_module)
        return outcome


@dataclass(frozen=True)
class Rows:
    """New rows of one cache: the write, the columns they come from, and the nodes in between."""

    put: fx.Node
    source: fx.Node
    between: tuple[fx.Node, ...]
    norm: Match | None = None
    rotary: fx.Node | None = None


def rotated_rows(put: fx.Node) -> Rows | None:
    """The write of a rotated key without heads, [B, T, R]."""
    if len(shape_of(put)) != 3:
        return None
    between, value = [], settled(put.args[2])
    while not is_call(value, dsv3.rotary):
        if sources_of_dims(value) is None and not is_call(value, *CASTS):
            return None
        between.append(value)
        value = settled(value.args[0])
    rotary, key = value, settled(value.args[0])
    between.append(rotary)
    while sources_of_dims(key) is not None and len(shape_of(key)) > 3:
        between.append(key)
        key = settled(key.args[0])
    return Rows(put, key, tuple(between), rotary=rotary)


def normalised_rows(graph: fx.Graph) -> Iterator[Rows]:
    """Writes of normalised rows [B, T, C]."""
    for put in calls(graph, aten.index_put):
        value = settled(put.args[2])
        casts = (value,) if is_call(value, *CASTS) else ()
        norm = read_norm(value.args[0] if casts else value)
        if norm is not None and len(shape_of(put)) == 3:
            yield Rows(put, norm["x"], (*casts, *norm.inner), norm=norm)


def fuse(graph: fx.Graph, key: Rows) -> str:
    """Replace both writes; returns a line of prose. Raises Refused."""
    columns = part_of(key.source)
    if columns is None:
        raise Refused(key.put, f"the rope key {key.source.name} is no part of a projection")
    latent, latent_columns = find_latent(graph, key, columns)
    assert latent.norm is not None and key.rotary is not None
    positions = same_positions(latent.put, key.put)
    for rows in (latent, key):
        for node in rows.between:
            outside = [u for u in users(node) if u not in (*rows.between, rows.put)]
            if outside:
                raise Refused(rows.put, f"{node.name} is used by {outside[0].name} as well")
    _, cos, sin, interleaved = key.rotary.args
    weight, caches = latent.norm["weight"], (latent.put.args[0], key.put.args[0])
    place = place_for(latent.put, key.put, [columns.source, weight, cos, sin, positions, *caches])
    with graph.inserting_before(place):
        kv = join(graph, latent_columns, columns)
        write = call(
            graph, dsv3.write_cache.default, kv, weight, cos, sin, positions, *caches,
            float(latent.norm["eps"]), interleaved, like=key.put,
        )  # fmt: skip
        written = [call(graph, operator.getitem, write, i, like=key.put) for i in (0, 1)]
    names = f"{latent.put.name}, {key.put.name}"
    for rows, new in zip((latent, key), written, strict=True):
        rows.put.replace_all_uses_with(new)
        erase_dead(graph, rows.put)
    return told(names, write)


def find_latent(graph: fx.Graph, key: Rows, columns: Part) -> tuple[Rows, Part]:
    """The write of the normalised columns in front of the key's."""
    for rows in normalised_rows(graph):
        part = part_of(rows.source)
        if part is not None and part.source is columns.source:
            if part.axis != columns.axis or part.start + part.length != columns.start or part.step != 1:
                raise Refused(key.put, f"the rope key {key.source.name} does not follow the latent {rows.source.name}")
            return rows, part
    raise Refused(key.put, f"no normalised latent from {columns.source.name} is written to a cache")


def same_positions(latent: fx.Node, key: fx.Node) -> fx.Node:
    """The positions [B, S] at which both caches are written."""
    found = []
    for put in (latent, key):
        indices = put.args[1]
        if put.args[3:4] == (True,) or put.kwargs.get("accumulate"):
            raise Refused(put, f"{put.name} adds to what is in the cache")
        if len(indices) != 2 or not numbers_rows(indices[0], shape_of(indices[1])[0]):
            raise Refused(put, f"{put.name} does not write row b of the batch to row b of the cache")
        found.append(settled(indices[1]))
    if found[0] is not found[1]:
        raise Refused(key, f"{latent.name} writes at {found[0].name}, {key.name} at {found[1].name}")
    if len(shape_of(found[0])) != 2:
        raise Refused(key, f"{found[0].name} is not one position per row and query")
    return found[0]


def numbers_rows(index: fx.Node, rows: object) -> bool:
    """Is the index [[0], [1], …], one number per batch row?"""
    index = settled(index)
    if len(shape_of(index)) != 2 or not same_size(shape_of(index)[1], 1) or sources_of_dims(index) is None:
        return False
    count = settled(index.args[0])
    return counts_up(count, 0) and same_size(shape_of(count)[0], rows)


def place_for(latent: fx.Node, key: fx.Node, inputs: list[fx.Node]) -> fx.Node:
    """A node before which all inputs are known and neither cache is read yet."""
    earlier, later = sorted((latent, key))
    if all(node < earlier for node in inputs):
        return earlier
    reader = next((u for u in users(earlier) if u < later), None)
    if reader is not None:
        raise Refused(later, f"{reader.name} reads {earlier.name} before {later.name} can be written")
    return later
