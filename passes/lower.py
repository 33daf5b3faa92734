"""lower: caches are written in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from passes.base import Context, Outcome, Pass, Role, call, calls, sweep
from passes.nodes import vocabulary_op

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class Write:
    """A functional cache write, and its form in place."""

    node: fx.Node
    caches: tuple[fx.Node, ...]  # what is overwritten
    results: tuple[fx.Node, ...]  # what stands for the caches afterwards
    in_place: Any


@dataclass(frozen=True)
class Lower(Pass):
    """latent', rope_key' = write_cache(kv, …, latent, rope_key)      write_cache_(kv, …, latent, rope_key)
    attention(q, latent', rope_key')                             →    attention(q, latent, rope_key)

    The same for a plain index_put into a cache (MHA, GQA). Not where the old rows are read afterwards, or
    while they are written.
    """

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome = Outcome()
        graph = graph_module.graph
        for write in _writes(graph):
            reason = _why_not(write, graph)
            if reason is not None:
                outcome.refuse(write.node, reason)
                continue
            with graph.inserting_before(write.node):
                call(graph, write.in_place, *write.node.args, like=write.node, **write.node.kwargs)
            for cache, result in zip(write.caches, write.results, strict=True):
                result.replace_all_uses_with(cache)
                graph.erase_node(result)
            if write.node not in write.results:
                graph.erase_node(write.node)
            names = ", ".join(cache.name for cache in write.caches)
            outcome.matches.append(f"{write.node.name} writes {names} in place")
        sweep(graph_module)
        return outcome


def _writes(graph: fx.Graph) -> Iterator[Write]:
    for node in calls(graph, dsv3.write_cache, aten.index_put):
        if node.target is aten.index_put.default:
            if isinstance(node.args[0], fx.Node) and node.args[0].meta.get("role") is Role.CACHE:
                yield Write(node, (node.args[0],), (node,), aten.index_put_.default)
            continue
        caches = node.args[5:7]
        halves = {user.args[1]: user for user in node.users}
        if all(user.target is getitem for user in node.users) and len(halves) == 2:
            yield Write(node, caches, (halves[0], halves[1]), dsv3.write_cache_.default)


def _why_not(write: Write, graph: fx.Graph) -> str | None:
    order = {node: index for index, node in enumerate(graph.nodes)}
    inputs = tree_leaves([write.node.args, write.node.kwargs])
    for cache in write.caches:
        if cache.meta.get("role") is not Role.CACHE:
            return f"{cache.name} is not a cache that was handed in"
        if inputs.count(cache) > 1:
            return f"{write.node.name} writes to {cache.name} what it reads there"
        for reader in readers_of(cache):
            if _may_be_view(reader) and reader in inputs:
                return f"{write.node.name} writes to {cache.name} what it reads there as {reader.name}"
            if reader is not write.node and order[reader] > order[write.node]:
                return f"{reader.name} reads {cache.name} after it is written"
    return None


def readers_of(cache: fx.Node) -> Iterator[fx.Node]:
    """Everything that reads the memory of a cache, through views as well."""
    for user in cache.users:
        yield user
        if _may_be_view(user):
            yield from readers_of(user)


def _may_be_view(node: fx.Node) -> bool:
    target = node.target
    if target is getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if vocabulary_op(node):
        return False  # the vocabulary returns new tensors
    composite = torch._C.DispatchKey.CompositeImplicitAutograd  # reshape and its like: a view or a copy
    aliases = any(result.alias_info is not None for result in target._schema.returns)
    return aliases or target.has_kernel_for_dispatch_key(composite)
