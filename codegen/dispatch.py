"""The kernels behind `torch.ops.dsv3` on a GPU, for graphs that call the vocabulary itself (torch.compile)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from codegen.ops.registry import OPAQUE, serve
from codegen.targets import Target
from codegen.tuning import KERNELS, available, own_form


def register(target: Target) -> None:
    """Let every op that stays one call run its kernel for `target` on GPU tensors; once per process."""
    for op in OPAQUE:
        if available(op, target):
            serve(op, "CUDA", launcher(op, target))


def launcher(op: str, target: Target) -> Callable[..., Any]:
    """A function with the op's signature: the target's own form where it serves the arguments, else the plain one."""
    own = own_form(op, target)
    plain = None
    if (KERNELS / f"{op}.py").is_file():
        plain = getattr(importlib.import_module(f"codegen.kernels.{op}"), op)
    if own is None:
        assert plain is not None, f"{op} has no kernel"
        return plain
    fast, serves = getattr(own, op), getattr(own, "serves", None)
    if plain is None or serves is None:
        return fast

    def either(*arguments: Any) -> Any:
        return fast(*arguments) if serves(*arguments) is None else plain(*arguments)

    return either
