"""What every layer reads and none computes, computed once: positions, angles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from codegen.targets import Target
from passes.base import ancestors, call, is_call
from passes.launches import REGROUPINGS, runs_kernel
from passes.nodes import of_positions
from passes.products import sources_of_dims

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

COSTLY = (aten.cos, aten.sin)  # of large angles: dozens of instructions


def hold_shared(graph: fx.Graph, target: Target) -> None:
    """k(f(x)), l(f(x)), …                →    y = hold(f(x));  k(y), l(y), …
       (W x) · cos(a), (V x) · cos(a), …  →    y = hold(cos(a));  (W x) · y, (V x) · y, …

    Inductor computes f(x) anew for each of the calls, and fuses that only where they are close together: a step would
    have a launch of its own between the kernels of every few layers. Sines it computes anew for every number that
    they are multiplied with, in every layer.
    """  # fmt: skip
    for node in list(graph.nodes):
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            continue
        if len(set(kernels(node, target))) > 1 and not any(runs_kernel(one, target) for one in ancestors(node)):
            _hold(graph, node)
    given = of_positions(graph)
    for node in list(graph.nodes):
        if is_call(node, *COSTLY) and node in given and len(set(readers_beyond(node, given))) > 1:
            _hold(graph, node)


def _hold(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        held = call(graph, dsv3.hold.default, node, like=node)
    node.replace_all_uses_with(held, delete_user_cb=lambda user: user is not held)


def kernels(node: fx.Node, target: Target) -> Iterator[fx.Node]:
    """The calls of kernels that read a value, through views as well."""
    for user in node.users:
        if runs_kernel(user, target):
            yield user
        elif sources_of_dims(user) is not None or is_call(user, *REGROUPINGS, aten.slice):
            yield from kernels(user, target)


def readers_beyond(node: fx.Node, given: set[fx.Node]) -> Iterator[fx.Node]:
    """Who reads a value, directly or through others that are given, and is not given."""
    for user in node.users:
        if user in given and not is_call(user, dsv3.hold):
            yield from readers_beyond(user, given)
        else:
            yield user
