"""Launches of a kind that has been launched before, straight to their machine code.

Triton finds out at every launch anew what kind of arguments it was given. That takes the host longer than all else that
a launch needs, and more for every tensor descriptor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launched:
    """One launch as it was asked for, and the code that ran."""

    code: CompiledKernel
    blocks: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: Sequence[Any]  # in the order of the kernel's parameters, which are behind the arguments


_NOTED: ContextVar[list[Launched | None] | None] = ContextVar("launches that somebody wants to know of", default=None)


@contextmanager
def note_launches() -> Iterator[list[Launched | None]]:
    """Collects the launches of this thread; None for one that was not of a kind that can be launched directly."""
    noted: list[Launched | None] = []
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def _note(known: tuple[CompiledKernel, list[Any]] | None, grid: Any, arguments: tuple[Any, ...]) -> None:
    noted = _NOTED.get()
    if noted is not None:
        noted.append(Launched(known[0], (*grid, 1, 1)[:3], arguments, known[1]) if known else None)


class DirectLaunches:
    """What runs in a kernel's place: the first launch of a kind goes through triton, later ones do not.

    Two launches are of a kind if triton would run the same code for them, on an NVIDIA GPU. Constants are given by
    name: launches that do otherwise go through triton.
    """

    def __init__(self, kernel: JITFunction) -> None:
        self.through_triton = kernel.run
        self.variable = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
        self.constant = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        self.known: dict[Any, tuple[CompiledKernel, list[Any]]] = {}  # code, and the constants it was made for
        self.layouts: list[Any] = []  # of known kinds, so that no other gets the identity of one of them

    def __call__(self, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel:
        active = driver.active
        device = active.get_current_device()
        kinds, given = zip(*map(kind_of, arguments), strict=True)
        key = (device, kinds, *options, *options.values())
        known = self.known.get(key)
        if known is None or warmup or watched():
            code = self.through_triton(*arguments, grid=grid, warmup=warmup, **options)
            by_name = any(name in options for name in self.variable)
            if not warmup and not by_name and len(arguments) == len(self.variable):
                self.known[key] = known = code, [options[name] for name in self.constant]
                self.layouts += [value.layout for value in arguments if hasattr(value, "block_shape")]
            _note(known, grid, arguments)
            return code
        _note(known, grid, arguments)
        code, constants = known
        blocks = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        code.run(*blocks, stream, code.function, code.packed_metadata, None, None, None, *given, *constants)
        return code


def not_direct(module: ModuleType) -> Iterator[JITFunction]:
    """What a module's launchers launch, as far as it is not launched directly yet."""
    for kernel in vars(module).values():
        if isinstance(kernel, JITFunction) and not isinstance(kernel.run, DirectLaunches):
            yield kernel


def watched() -> bool:
    """Does a profiler want to hear of launches?"""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def kind_of(value: Any) -> tuple[Any, Any]:
    """What triton makes other code for, and what it launches it with.

    It builds in a size of 1, and that 16 divides a number or an address. Where it is given an address in place of a
    tensor, it need not ask the driver whether the GPU can read there, which it can if the tensor lies on one.
    """
    if isinstance(value, torch.Tensor):
        address = value.data_ptr()
        kind = value.dtype if address % 16 == 0 else (value.dtype, "anywhere")
        return (kind, address) if value.is_cuda else ((kind, value.device), value)
    if type(value) is int:
        if value == 1:
            return 1, value
        by_16 = 16 if value % 16 == 0 else 0
        return by_16 if -(1 << 31) <= value < 1 << 31 else (by_16, "large"), value
    if hasattr(value, "block_shape"):
        return (value.base.dtype, *value.block_shape, id(value.layout)), value
    return type(value), value
