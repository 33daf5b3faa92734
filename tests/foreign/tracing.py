"""Graphs of other people's models, as torch.compile hands them over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from dsv3_compile.functional import Functional, functional


def graphs_of(module: nn.Module, run: Callable[[Callable[..., Any]], Any], **options: Any) -> list[Functional]:
    """Every graph that Dynamo makes of `module` while `run` calls it, in functional form; nothing is compiled."""
    found: list[Functional] = []

    def collect(traced: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        found.append(functional(traced))
        return traced.forward

    torch._dynamo.reset()
    with torch.no_grad():
        run(torch.compile(module, backend=collect, **options))
    return found
