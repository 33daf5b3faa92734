"""What a graph gives back as new values of its inputs: caches are written in place, counters counted together.

The passes compare graphs by what they return, so they see new caches beside old ones. Behind them, an op that fills a
cache writes into the input itself: otherwise every step would copy the cache.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from dsv3_compile.functional import Functional
from passes.base import call, calls, is_call, placeholders, shape_of
from passes.launches import regrouped_from
from passes.nodes import erase_dead

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


def write_in_place(found: Functional) -> None:
    """… latent', rope_key' = attention_inputs(…, latent, rope_key)    →    … = attention_inputs_(…, latent, rope_key)

    Where the results are the new values of the inputs that the caches are views of, and nobody else reads those.
    """
    graph = found.module.graph
    inputs, values = placeholders(graph), graph.output_node().args[0]
    given_back = {inputs[position]: values[k] for k, position in enumerate(found.written)}
    for node in calls(graph, dsv3.attention_inputs):
        results = {user.args[1]: user for user in node.users}
        caches = dict(zip((2, 3), node.args[7:9], strict=True))
        memories = {i: memory_of(cache) for i, cache in caches.items()}
        if not all(comes_back(memories[i], results.get(i), given_back) for i in caches):
            continue
        with graph.inserting_before(node):
            new = call(graph, dsv3.attention_inputs_.default, *node.args, like=node)
            for i in (0, 1):
                results[i].replace_all_uses_with(call(graph, operator.getitem, new, i, like=node))
        for i, cache in caches.items():
            given_back[memories[i]].replace_all_uses_with(memories[i])
            results[i].replace_all_uses_with(cache)
        erase_dead(graph, node)
    graph.eliminate_dead_code()


def count_together(found: Functional) -> None:
    """p' = p + 1, q' = q + 1, …    →    p', q', … = _foreach_add([p, q, …], 1)

    Where they are new values of inputs and nobody else reads them: every layer's cache counts its own rows, and nothing
    else would put so many sums of nothing in common into one launch.
    """
    graph = found.module.graph
    inputs, output = placeholders(graph), graph.output_node()
    counted: dict[tuple[Any, ...], list[tuple[fx.Node, fx.Node]]] = {}
    for k, position in enumerate(found.written):
        value, one = output.args[0][k], inputs[position]
        counts = is_call(value, aten.add) and value.args[0] is one and isinstance(value.args[1], int)
        if counts and not value.kwargs and len(value.users) == 1 and output.args[0].count(value) == 1:
            held = one.meta["val"]
            counted.setdefault((value.args[1], held.dtype, held.device), []).append((one, value))
    for (step, *_), pairs in counted.items():
        if len(pairs) == 1:
            continue
        with graph.inserting_before(output):
            sums = call(graph, aten._foreach_add.Scalar, [one for one, _ in pairs], step)
            for i, (_, value) in enumerate(pairs):
                value.replace_all_uses_with(call(graph, operator.getitem, sums, i, like=value))
    graph.eliminate_dead_code()


def memory_of(cache: fx.Node) -> fx.Node:
    """What a cache is a view of: nothing that may be a copy, and nothing that others read."""
    while is_call(cache, aten.squeeze) and len(cache.users) == 1:
        cache = cache.args[0]
    return cache


def comes_back(memory: fx.Node, result: fx.Node | None, given_back: Mapping[fx.Node, fx.Node]) -> bool:
    """Is a result all of the new value of an input that nobody else reads?"""
    value = given_back.get(memory)
    if value is None or result is None or len(memory.users) != 1:
        return False
    return regrouped_from(value)[0] is result and shape_of(value) == shape_of(memory)
