"""Ops of other libraries: what they were called with, and what they give, which nothing but a call can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names that its op has for them, in their order; None for those left out."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    known = node.kwargs | dict(zip(names, node.args, strict=False))
    return {name: known.get(name) for name in names}


def gives(target: torch._ops.OpOverload, arguments: Sequence[Tensor], expected: Tensor) -> bool:
    """Is this what the op computes? It is opaque, so it is asked."""
    try:
        found = target(*arguments)
    except Exception:  # whatever somebody else's op raises
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
