"""The kernels behind `torch.ops.dsv3` on a GPU, for graphs that call the vocabulary itself (torch.compile)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from triton.runtime.jit import JITFunction

from codegen.direct import DirectLaunches, not_direct
from codegen.ops.registry import COMPOSITE, OPAQUE, one_call, serve
from codegen.planned import Planned
from codegen.targets import Target
from codegen.tuning import KERNELS, available, own_form


def register(target: Target) -> None:
    """Let every op that stays one call run its kernel for `target` on GPU tensors; NVIDIA's kernels are launched
    directly, and calls of a kind that has been seen are planned. For the whole process, once."""
    served = {op: launcher(op, target) for op in OPAQUE if available(op, target)}
    for op in COMPOSITE:
        if own_form(op, target):
            one_call(op)
            served[f"{op}_call"] = launcher(op, target)
    if target.backend == "cuda":
        for kernel in _kernels():
            kernel.run = DirectLaunches(kernel)
        served = {op: Planned(run) for op, run in served.items()}  # which only hear of direct launches
    for op, run in served.items():
        serve(op, "CUDA", run)


def _kernels() -> Iterator[JITFunction]:
    """Of all kernel files that have been imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("codegen.kernels."):
            yield from not_direct(module)


def call_kernels(graph: fx.Graph, target: Target) -> None:
    """Keep compilers from tracing through the ops for which the target has a kernel of its own."""
    calls = {getattr(torch.ops.dsv3, op).default: op for op in COMPOSITE if own_form(op, target)}
    for node in graph.nodes:
        if node.target in calls:
            node.target = one_call(calls[node.target])


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
