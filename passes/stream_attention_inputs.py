"""What stands between the projections of a few new tokens and their attention over a cache: one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import Context, call, is_call, same_size, shape_of, told
from passes.fuse_head_products import HeadProduct, head_product
from passes.fuse_norm import nearest_norm
from passes.launches import SIZED, FuseLaunches, why_not_few
from passes.nodes import counts_up, erase_dead, settled, users, weights_only
from passes.products import Part, join, part_of, sources_of_dims
from passes.rewrite import Match, Refused

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class Columns:
    """Where a value comes from: `part` of the last axis of a source, and for every axis of the value the source's."""

    part: Part
    axes: tuple[int | None, ...]

    @property
    def source(self) -> fx.Node:
        return self.part.source

    def lies_as(self, value: fx.Node, *axes: int | None) -> bool:
        """Are the value's axes these of the source? Those of size one may be any."""
        pairs = zip(self.axes, axes, shape_of(value), strict=True)
        return all(found == wanted or same_size(size, 1) for found, wanted, size in pairs)


@dataclass(frozen=True)
class Inputs:
    """What one attention is given, as arguments of the op, and the values that it replaces."""

    queries: fx.Node  # [B, S, H·(P+R)]
    absorbed: HeadProduct
    new: tuple[Part, Part]  # columns of a projection [B, S, ..] for the latent and the rope key
    norm: Match
    rotation: tuple[fx.Node, fx.Node, bool]  # cos, sin, interleaved
    puts: tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class StreamAttentionInputs(FuseLaunches):
    """u, k = split(kv)
       latent'   = index_copy(latent, positions, rms_norm(u, w))
       rope_key' = index_copy(rope_key, positions, rotary(k, cos, sin))     →    q_latent, q_rope, latent', rope_key'
       q_latent = einsum(q[.., :P], U)                                              = attention_inputs(q, kv, U, …)
       q_rope = rotary(q[.., P:], cos, sin)

    In any order of the axes. For few tokens, of which each of the steps is a launch; the caches are those of somebody
    else, and written in place where the graph gives them back (`dsv3_compile/in_place.py`).
    """  # fmt: skip

    op: ClassVar[str] = "attention_inputs_"

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, dsv3.mla_attention):
            return ""
        try:
            inputs_of(node)
        except Refused as refused:
            return refused.reason
        return None

    def outside(self, node: fx.Node, context: Context) -> str | None:
        return why_not_few(node, shape_of(node)[:2], context)

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        found = inputs_of(node)
        heads, out, depth = found.absorbed.order
        with graph.inserting_before(node):
            weight = found.absorbed.weight
            if (heads, depth, out) != (0, 1, 2):
                weight = call(graph, aten.permute.default, weight, [heads, depth, out], like=node)
            kv = join(graph, *found.new)
            caches = [rows_of(graph, put) for put in found.puts]
            positions = call(graph, aten.expand.default, positions_of(graph, found.puts[0]), shape_of(node)[:2])
            new = call(
                graph, dsv3.attention_inputs.default, found.queries, kv, weight, found.norm["weight"],
                *found.rotation[:2], positions, *caches, float(found.norm["eps"]), found.rotation[2], like=node,
            )  # fmt: skip
            results = [call(graph, operator.getitem, new, i, like=node) for i in range(4)]
            written = [
                call(graph, aten.reshape.default, result, shape_of(put), like=put)
                for result, put in zip(results[2:], found.puts, strict=True)
            ]
        old = node.args[:4]
        node.args = (*results, *node.args[4:])
        for dead in old:
            erase_dead(graph, dead)
        for put, value in zip(found.puts, written, strict=True):
            put.replace_all_uses_with(value)
            erase_dead(graph, put)
        return told(", ".join(put.name for put in found.puts), new)


def inputs_of(attention: fx.Node) -> Inputs:
    """Everything that the op does for an attention. Raises Refused."""
    q_latent, q_rope = attention.args[:2]
    for half in (q_latent, q_rope):
        if users(half) != [attention]:
            raise Refused(attention, f"{half.name} is not read by {attention.name} alone")
    absorbed = head_product(q_latent)
    if absorbed is None:
        raise Refused(attention, f"{q_latent.name} is no product of every head with a weight")
    turned = rotation_of(q_rope, attention)
    puts = put_of(attention.args[2], attention), put_of(attention.args[3], attention)
    if puts[0].args[2] is not puts[1].args[2]:
        raise Refused(attention, f"{puts[0].name} and {puts[1].name} write at different positions")
    norm = norm_of(puts[0])
    key = rotation_of(puts[1].args[3], puts[1])
    if key.args[1:] != turned.args[1:]:
        raise Refused(attention, f"{key.name} and {turned.name} rotate differently")
    queries = whole_heads(absorbed.x, turned.args[0], attention)
    new = columns_of(norm["x"]), columns_of(key.args[0])
    if new[0].source is not new[1].source or len(shape_of(new[0].source)) != 3:
        raise Refused(attention, f"{norm['x'].name} and {key.args[0].name} are no parts of one projection")
    in_order = new[0].part.start + new[0].part.length == new[1].part.start
    if not (in_order and new[0].lies_as(norm["x"], 0, 1, 2) and new[1].lies_as(key.args[0], 0, 1, None, 2)):
        raise Refused(attention, f"{key.args[0].name} does not follow {norm['x'].name} in {new[0].source.name}")
    return Inputs(queries, absorbed, (new[0].part, new[1].part), norm, key.args[1:], puts)


def columns_of(value: Any) -> Columns:
    """Follow views and parts of the last axis upwards as far as they go."""
    value = settled(value)
    axes: tuple[int | None, ...] = tuple(range(len(shape_of(value))))
    start, length = 0, shape_of(value)[-1]
    while True:
        value = settled(value)
        part, sources = part_of(value), sources_of_dims(value)
        if part is not None and part.axis == axes[-1] and part.step == 1:
            start, value = start + part.start, part.source
        elif sources is not None and sources[axes[-1] or 0] is not None:
            axes, value = tuple(None if d is None else sources[d] for d in axes), value.args[0]
        else:
            return Columns(Part(value, len(shape_of(value)) - 1, start, length), axes)


def rotation_of(value: fx.Node, reader: fx.Node) -> fx.Node:
    """The rotation [B, S, H, R] that a value is, whole and with its axes in this order; as rows of a cache in its."""
    found = columns_of(value)
    if not is_call(found.source, dsv3.rotary):
        raise Refused(reader, f"{value.name} is no rotation")
    order = (0, 1, 2, 3) if is_call(reader, dsv3.mla_attention) else new_rows(reader, 0, 1, 3)
    if not (found.lies_as(value, *order) and same_size(found.part.length, shape_of(found.source)[-1])):
        raise Refused(reader, f"{value.name} holds the rotation {found.source.name} in another order")
    return found.source


def put_of(cache: fx.Node, attention: fx.Node) -> fx.Node:
    """The write of new rows [.., S, ..] that a cache [B, T, C] is read behind."""
    found = columns_of(cache)
    put = found.source
    if not is_call(put, aten.index_copy):
        raise Refused(attention, f"{cache.name} is not a cache with new rows at positions")
    axis, rank = put.args[1] % len(shape_of(put)), len(shape_of(put))
    others = [size for d, size in enumerate(shape_of(put)) if d not in (0, axis, rank - 1)]
    whole = same_size(found.part.length, shape_of(put)[-1]) and found.lies_as(cache, 0, axis, rank - 1)
    if not whole or not 0 < axis < rank - 1 or not all(same_size(size, 1) for size in others):
        raise Refused(attention, f"{put.name} does not write rows of {cache.name}")
    if put.args[0].op != "placeholder" or users(put.args[0]) != [put]:
        raise Refused(attention, f"{put.args[0].name} is no cache that was handed in and that {put.name} alone reads")
    if not any(user.op == "output" for user in users(put)):
        raise Refused(attention, f"{put.name} is not given back")
    early = next((user for user in users(put) if user < attention and not leads_to(user, attention)), None)
    if early is not None:
        raise Refused(attention, f"{early.name} reads {put.name} before {attention.name}")
    if users(put.args[3]) != [put]:
        raise Refused(attention, f"{put.args[3].name} is not read by {put.name} alone")
    return put


def leads_to(node: fx.Node, reader: fx.Node) -> bool:
    """Is it the reader, or a view that is read by nobody else?"""
    if node is reader:
        return True
    return sources_of_dims(node) is not None and all(leads_to(user, reader) for user in users(node))


def new_rows(put: fx.Node, batch: int, row: int, column: int) -> tuple[int | None, ...]:
    """The axes of what a write puts into a cache, by what they mean."""
    rank = len(shape_of(put))
    return tuple({0: batch, put.args[1] % rank: row, rank - 1: column}.get(d) for d in range(rank))


def norm_of(put: fx.Node) -> Match:
    """The norm [B, S, C] of which a write puts the rows into a cache."""
    found = columns_of(put.args[3])
    norm = nearest_norm(found.source, rounded=True)
    if not isinstance(norm, Match):
        raise Refused(put, norm or f"{put.args[3].name} is no norm")
    whole = same_size(found.part.length, shape_of(norm.root)[-1])
    if len(shape_of(norm.root)) != 3 or not whole or not found.lies_as(put.args[3], *new_rows(put, 0, 1, 2)):
        raise Refused(put, f"{put.args[3].name} holds the norm {norm.root.name} in another order")
    if not weights_only(norm["weight"]):
        raise Refused(put, f"{norm['weight'].name} is no weight")
    return norm


def whole_heads(nope: fx.Node, rope: fx.Node, attention: fx.Node) -> fx.Node:
    """The tensor [B, S, H·(P+R)] whose heads are `nope` and then `rope`. Raises Refused."""
    first, second = columns_of(nope), columns_of(rope)
    rows = [settled(one.source.args[0]) for one in (first, second) if is_call(one.source, *SIZED, aten.unflatten)]
    shapes = [shape_of(one.source) for one in (first, second)]
    if len(rows) == 2 and rows[0] is rows[1] and len(shape_of(rows[0])) == 3 and shapes[0] == shapes[1]:
        parts = (first.part.start, first.part.length, second.part.length)
        if parts[0] == 0 and second.part.start == parts[1] and shapes[0][-1] == sum(parts) and len(shapes[0]) == 4:
            ordered = first.lies_as(nope, 0, 1, 2, 3) and second.lies_as(rope, 0, 1, 2, 3)
            if ordered and same_size(shape_of(rows[0])[2], shapes[0][2] * shapes[0][3]):
                return rows[0]
    raise Refused(attention, f"{nope.name} and {rope.name} are not the two parts of every head")


def rows_of(graph: fx.Graph, put: fx.Node) -> fx.Node:
    """The cache that a write changes, [B, T, C]: without its other axes, which are of size one."""
    rank = len(shape_of(put))
    others = [d for d in range(rank) if d not in (0, put.args[1] % rank, rank - 1)]
    return call(graph, aten.squeeze.dims, put.args[0], others, like=put) if others else put.args[0]


def positions_of(graph: fx.Graph, put: fx.Node) -> fx.Node:
    """Where a write puts its rows, [S]. A single one counted from a start is at that start, which nobody need add."""
    index = put.args[2]
    if is_call(index, aten.add) and shape_of(index) == (1,) and not index.kwargs:
        for count, start in (index.args, index.args[::-1]):
            if counts_up(count, 0):
                return call(graph, aten.reshape.default, start, [1], like=index)
    return index
