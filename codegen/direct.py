"""Launches of a kind that has been launched before, straight to their machine code.

Triton finds out at every launch anew what kind of arguments it was given. That takes the host longer than all else that
a launch needs, and more for every tensor descriptor.
"""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class DirectLaunches:
    """What runs in a kernel's place: the first launch of a kind goes through triton, later ones do not.

    Two launches are of a kind if triton would run the same code for them, on an NVIDIA GPU.
    """

    def __init__(self, kernel: JITFunction) -> None:
        self.through_triton = kernel.run
        self.parameters = [(parameter.name, parameter.is_constexpr) for parameter in kernel.params]
        self.known: dict[Any, CompiledKernel] = {}
        self.layouts: list[Any] = []  # of known kinds, so that no other gets the identity of one of them

    def __call__(self, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel:
        device = driver.active.get_current_device()
        kinds = [
            value if constant else kind_of(value)
            for value, (_, constant) in zip(arguments, self.parameters, strict=False)
        ]
        key = (device, *kinds, *options.items())
        code = self.known.get(key)
        if code is None or warmup or watched():
            code = self.through_triton(*arguments, grid=grid, warmup=warmup, **options)
            if not any(name in options for name, constant in self.parameters if not constant):
                self.known[key] = code
                self.layouts += [value.layout for value in arguments if hasattr(value, "block_shape")]
            return code
        constants = [options[name] for name, _ in self.parameters[len(arguments) :]]
        blocks = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        code.run(*blocks, stream, code.function, code.packed_metadata, None, None, None, *arguments, *constants)
        return code


def watched() -> bool:
    """Does a profiler want to hear of launches?"""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def kind_of(value: Any) -> Any:
    """What triton makes other code for: it builds in a size of 1, and that 16 divides a number or an address."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31
    if hasattr(value, "block_shape"):
        return value.base.dtype, *value.block_shape, id(value.layout)
    return type(value)
