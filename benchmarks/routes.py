"""Looking at what a graph's routing chooses, and choosing for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Routes = list[tuple[Tensor, Tensor]]  # indices and weights [N, K], one pair for a layer that routes
Route = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def watched(functions: Iterable[Callable[..., Any]]) -> Iterator[Routes]:
    """Collects what the routing of these graphs chooses."""
    found: Routes = []

    def watching(route: Route) -> Route:
        def run(*arguments: Any) -> tuple[Tensor, Tensor]:
            found.append(route(*arguments))
            return found[-1]

        return run

    with _replaced(functions, watching):
        yield found


@contextmanager
def forced(functions: Iterable[Callable[..., Any]], routes: Routes) -> Iterator[Routes]:
    """Gives these graphs the routes; collects what they would have chosen."""
    own: Routes = []
    given = iter(routes)

    def forcing(route: Route) -> Route:
        def run(*arguments: Any) -> tuple[Tensor, Tensor]:
            own.append(route(*arguments))
            return next(given)

        return run

    with _replaced(functions, forcing):
        yield own


@contextmanager
def _replaced(functions: Iterable[Callable[..., Any]], wrapped: Callable[[Route], Route]) -> Iterator[None]:
    """Graphs call a kernel by a name of their own, or the op."""
    op = torch.ops.dsv3.route
    with ExitStack() as stack:
        for function in functions:
            names = function.__globals__
            kernels = {name: wrapped(value) for name, value in names.items() if name.startswith("route_kernel")}
            stack.enter_context(mock.patch.dict(names, kernels))
        stack.enter_context(mock.patch.object(op, "default", wrapped(op.default)))
        yield


def rerouted(ours: Routes, theirs: Routes) -> int:
    """How many tokens get other experts, over all pairs of routes."""
    pairs = zip(ours, theirs, strict=True)
    return sum(int((one[0].sort(-1).values != other[0].sort(-1).values).any(-1).sum()) for one, other in pairs)
