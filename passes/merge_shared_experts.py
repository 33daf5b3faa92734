"""Shared experts as experts that every token chooses: one launch for all of them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from codegen.targets import Target
from passes.base import call, is_call, same_size, shape_of, told
from passes.launches import FuseLaunches, only_reader, regrouped_from
from passes.nodes import CASTS, dtype_of, erase_dead, users, weights_only
from passes.rewrite import Found, Op, Var

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

routed = Op((dsv3.routed_swiglu,), tuple(map(Var, ("x", "indices", "weights", "gate_up", "down"))), name="routed")
first = Op((aten.linear,), (Var("shared_x"), Var("shared_gate_up")), name="first")
second = Op((aten.linear,), (Op((dsv3.swiglu,), (first,), name="hidden"), Var("shared_down")), name="second")
both = routed + second


@dataclass(frozen=True)
class MergeSharedExperts(FuseLaunches):
    """indices, w = route(z, …, K)                  indices, w = route(z, …, K, always=n)
       routed_swiglu(x, indices, w, GU, D)     →    routed_swiglu(x, indices, w, [GU; GU'], [D; D'], always=n)
         + swiglu(x · GU'ᵀ) · D'ᵀ

    A shared expert n times as wide as a routed one is n experts, each with weight 1. Not on the CPU, where every
    expert is a product of its own and nothing is saved.
    """  # fmt: skip

    op: ClassVar[str] = "routed_swiglu"

    def lacks(self, target: Target) -> str | None:
        return "on the CPU every expert is a product of its own" if target.backend == "cpu" else None

    def when(self, node: fx.Node) -> str | None:
        found = experts_of(node)
        return "" if found is None else why_not(found, node)

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        found = experts_of(node)
        assert found is not None
        chosen_by_router = chosen_by(found["indices"])
        assert chosen_by_router is not None
        router, _ = chosen_by_router
        width = shape_of(found["down"])[2]
        count = shape_of(found["shared_down"])[1] // width
        with graph.inserting_before(router):
            more = call(graph, dsv3.route.default, *router.args, count, like=router)
            chosen = [call(graph, operator.getitem, more, i, like=router) for i in (0, 1)]
        with graph.inserting_before(node):
            weights = stacked(graph, found, count, width)
            rest = (None, count, *found["routed"].args[7:])
            new = call(graph, dsv3.routed_swiglu.default, found["x"], *chosen, *weights, *rest, like=found["routed"])
        node.replace_all_uses_with(new)
        erase_dead(graph, node)
        return told(node.name, new)


def experts_of(node: fx.Node) -> Mapping[str, Any] | None:
    """The parts of a sum of routed experts and a shared one."""
    return next((found.bound for found in both.search(node, Found())), None)


def why_not(found: Mapping[str, Any], node: fx.Node) -> str | None:
    indices, weights = (chosen_by(found[name]) for name in ("indices", "weights"))
    if indices is None or weights is None or indices[0] is not weights[0] or (indices[1], weights[1]) != (0, 1):
        return f"{found['indices'].name} and {found['weights'].name} are not the answer of one router"
    if tuple(found["routed"].args[5:8]) not in ((), (None, 0, None)):
        return f"{found['routed'].name} has more than stacks of gates and ups, and of downs"
    limits = [tuple(found[name].args[first:]) for name, first in (("routed", 8), ("hidden", 1))]
    if limits[0] != limits[1]:
        return f"{found['routed'].name} and {found['hidden'].name} keep gates and ups within different limits"
    router = indices[0]
    if any(len(shape_of(found[name])) != 2 for name in ("shared_gate_up", "shared_down")):
        return f"the weights of {found['first'].name} and {found['second'].name} are no matrices"
    experts, _, width = shape_of(found["down"])
    shared_width = shape_of(found["shared_down"])[1]
    if not same_size(shape_of(router.args[0])[-1], experts):
        return f"{router.name} does not choose among {experts} experts"
    if regrouped_from(found["x"])[0] is not regrouped_from(found["shared_x"])[0]:
        return f"the shared expert reads {found['shared_x'].name}, the others {found['x'].name}"
    if shared_width % width:
        return f"the shared expert is {shared_width} wide, which is no multiple of {width}"
    if any(len(one.args) > 2 and one.args[2] is not None for one in (found["first"], found["second"])):
        return "the shared expert has a bias"
    named = [found[name] for name in ("gate_up", "down", "shared_gate_up", "shared_down")]
    if len({dtype_of(weight) for weight in named}) > 1 or not all(map(weights_only, named)):
        return "the weights of the experts are not weights of one dtype"
    for name, reader in (("routed", node), ("second", node), ("hidden", found["second"]), ("first", found["hidden"])):
        leak = only_reader(found[name], [], reader)
        if leak is not None:
            return leak
    return None


def chosen_by(value: fx.Node) -> tuple[fx.Node, int] | None:
    """(router, which of its results) behind casts, if these experts are all that reads it."""
    while is_call(value, *CASTS) and len(users(value)) == 1:
        value = value.args[0]
    if not is_call(value, operator.getitem) or not is_call(value.args[0], dsv3.route) or len(users(value)) != 1:
        return None
    router = value.args[0]
    return None if len(router.args) > 11 else (router, value.args[1])


def stacked(graph: fx.Graph, found: Mapping[str, Any], count: int, width: int) -> tuple[fx.Node, fx.Node]:
    """Weights [E+n, 2I, D] and [E+n, D, I], the shared ones behind the others."""
    like = found["second"]
    halves = call(graph, aten.unflatten.int, found["shared_gate_up"], 0, [2, count, width], like=like)
    experts = call(graph, aten.permute.default, halves, [1, 0, 2, 3], like=like)
    gate_up = call(graph, aten.flatten.using_ints, experts, 1, 2, like=like)
    columns = call(graph, aten.unflatten.int, found["shared_down"], 1, [count, width], like=like)
    down = call(graph, aten.permute.default, columns, [1, 0, 2], like=like)
    return (
        call(graph, aten.cat.default, [found["gate_up"], gate_up], like=like),
        call(graph, aten.cat.default, [found["down"], down], like=like),
    )
