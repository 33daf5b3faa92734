"""What every layer's kernels read and no kernel computes, computed once: positions, angles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from codegen.targets import Target
from passes.base import ancestors, call, is_call
from passes.launches import REGROUPINGS, runs_kernel
from passes.products import sources_of_dims

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


def hold_shared(graph: fx.Graph, target: Target) -> None:
    """k(f(x)), l(f(x)), …    →    y = hold(f(x));  k(y), l(y), …

    Inductor computes f(x) anew for each of the calls, and fuses that only where they are close together: a step would
    have a launch of its own between the kernels of every few layers.
    """
    for node in list(graph.nodes):
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            continue
        if len(set(kernels(node, target))) > 1 and not any(runs_kernel(one, target) for one in ancestors(node)):
            with graph.inserting_after(node):
                held = call(graph, dsv3.hold.default, node, like=node)
            node.replace_all_uses_with(held, delete_user_cb=lambda user, held=held: user is not held)


def kernels(node: fx.Node, target: Target) -> Iterator[fx.Node]:
    """The calls of kernels that read a value, through views as well."""
    for user in node.users:
        if runs_kernel(user, target):
            yield user
        elif sources_of_dims(user) is not None or is_call(user, *REGROUPINGS, aten.slice):
            yield from kernels(user, target)
