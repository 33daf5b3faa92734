"""What a decode step does between its projections and the attention: one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import call, is_call, same_size, shape_of, told
from passes.fuse_head_products import HeadProduct, head_product
from passes.launches import FuseLaunches
from passes.lower import readers_of
from passes.nodes import erase_dead, settled, users
from passes.products import Part, part_of

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class Inputs:
    """The nodes between the projections and one attention."""

    write: fx.Node
    absorbed: HeadProduct
    rotary: fx.Node
    queries: fx.Node  # [B, S, H·(P+R)]


@dataclass(frozen=True)
class FuseAttentionInputs(FuseLaunches):
    """write_cache_(kv, w, cos, sin, positions, latent, rope_key)
       q_latent = einsum(q[.., :P], U)                          →    q_latent, q_rope = attention_inputs_(q, kv, U, …)
       q_rope = rotary(q[.., P:], cos, sin)

    Where the two halves of the query are all of every head, only the attention reads them, and nothing reads the
    caches in between.
    """  # fmt: skip

    op: ClassVar[str] = "attention_inputs_"

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, dsv3.mla_attention):
            return ""
        found = inputs_of(node)
        return found if isinstance(found, str) else None

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        found = inputs_of(node)
        assert isinstance(found, Inputs)
        kv, norm_weight, cos, sin, positions, latent, rope_key, eps, interleaved = found.write.args
        weight, order = found.absorbed.weight, found.absorbed.order
        order = [order[0], order[2], order[1]]  # heads, P, C
        with graph.inserting_before(node):
            if order != [0, 1, 2]:
                weight = call(graph, aten.permute.default, weight, order, like=node)
            both = call(
                graph, dsv3.attention_inputs_.default, found.queries, kv, weight, norm_weight, cos, sin, positions,
                latent, rope_key, eps, interleaved, like=node,
            )  # fmt: skip
            halves = [call(graph, operator.getitem, both, i, like=node) for i in (0, 1)]
        old = node.args[:2]
        node.args = (*halves, *node.args[2:])
        for dead in old:
            erase_dead(graph, dead)
        graph.erase_node(found.write)
        return told(f"{found.write.name}, {found.rotary.name}", both)


def inputs_of(attention: fx.Node) -> Inputs | str:
    """Everything that the fused op does for an attention, or why it cannot."""
    q_latent, q_rope, latent, rope_key, positions, _ = attention.args
    for half in (q_latent, q_rope):
        if users(half) != [attention]:
            return f"{half.name} is not read by {attention.name} alone"
    absorbed = head_product(q_latent)
    if absorbed is None:
        return f"{q_latent.name} is no product of every head with a weight"
    if not is_call(q_rope, dsv3.rotary):
        return f"{q_rope.name} is no rotation"
    write = next((user for user in users(latent) if is_call(user, dsv3.write_cache_) and user < attention), None)
    if write is None or write.args[4:7] != (positions, latent, rope_key):
        return f"{latent.name} and {rope_key.name} are not written at {positions.name} before"
    for cache in (latent, rope_key):
        for reader in readers_of(cache):
            if write < reader < attention:
                return f"{reader.name} touches {cache.name} between its write and {attention.name}"
    if (q_rope.args[1:3], q_rope.args[3]) != (write.args[2:4], write.args[8]):
        return f"{q_rope.name} and {write.name} rotate differently"
    nope, rope = part_of(settled(absorbed.x)), part_of(settled(q_rope.args[0]))
    queries = whole_heads(nope, rope)
    if queries is None:
        return f"{absorbed.x.name} and {q_rope.args[0].name} are not the two parts of every head"
    return Inputs(write, absorbed, q_rope, queries)


def whole_heads(nope: Part | None, rope: Part | None) -> fx.Node | None:
    """The tensor [B, S, H·(P+R)] whose heads are `nope` and then `rope`, or None."""
    if nope is None or rope is None or (nope.start, nope.step, rope.step) != (0, 1, 1) or rope.start != nope.length:
        return None
    heads = [settled(part.source) for part in (nope, rope)]
    if any(not is_call(one, aten.view, aten.reshape, aten.unflatten) for one in heads):
        return None
    if any(len(shape_of(one)) != 4 or part.axis != 3 for one, part in zip(heads, (nope, rope), strict=True)):
        return None
    if not all(same_size(a, b) for a, b in zip(*map(shape_of, heads), strict=True)):
        return None
    rows = [settled(one.args[0]) for one in heads]
    if rows[0] is not rows[1] or len(shape_of(rows[0])) != 3 or shape_of(heads[0])[3] != nope.length + rope.length:
        return None
    merged = shape_of(heads[0])[2] * shape_of(heads[0])[3]
    return rows[0] if same_size(shape_of(rows[0])[2], merged) else None
