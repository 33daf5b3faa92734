"""Kernels for a GPU target: one for every distinct call of the op vocabulary, and which node runs which."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import getitem
from pathlib import Path
from typing import Any

from torch import fx

from codegen.emit import EmittedKernel, KernelSource, compile_kernels, write_kernel
from codegen.record import Operand, TensorSpec, spec_of
from codegen.targets import Target
from codegen.tuning import available
from dsv3_compile.artifact import Progress
from dsv3_compile.program import BlockGraph, Program
from dsv3_compile.source import KernelCall, axis_letters
from passes.base import is_call, value_of
from passes.nodes import vocabulary_op


@dataclass(frozen=True)
class Bindings:
    """What a program's graphs launch."""

    kernels: dict[str, EmittedKernel]  # by name
    calls: dict[tuple[str, str], dict[str, KernelCall]]  # (block, phase) → node name → kernel


def bind_kernels(program: Program, progress: Progress) -> Bindings:
    """Write and compile a kernel for every call that has one; the others run as their torch reference.

    Calls that differ only in free sizes share a kernel. Nothing is emitted for the CPU.
    """
    calls: dict[tuple[str, str], dict[str, KernelCall]] = {key: {} for key in program.blocks}
    if program.target.backend == "cpu":
        return Bindings({}, calls)
    written = _written(program, calls, progress)
    return Bindings({kernel.name: kernel for kernel in compile_kernels(written, program.target)}, calls)


def _written(
    program: Program, calls: dict[tuple[str, str], dict[str, KernelCall]], progress: Progress
) -> Iterator[KernelSource]:
    """The kernels of a program, each once; notes in `calls` which node runs which."""
    known: dict[str, str] = {}  # a call's op and operands → kernel name
    for key, block in program.blocks.items():
        for node, op, operands in _calls(block, program.target):
            call = f"{op}{operands!r}"
            if call not in known:
                progress(f"kernel {op}")
                kernel = write_kernel(op, operands, program.target)
                fresh = kernel.name not in known.values()
                known[call] = kernel.name
                if fresh:
                    yield kernel
            calls[key][node.name] = KernelCall(op, known[call])


def write_kernels(bindings: Bindings, folder: Path) -> None:
    """`<name>.py`, its machine code beside it, and `<name>.json` with what launching the code takes."""
    folder.mkdir()
    for name, kernel in bindings.kernels.items():
        (folder / f"{name}.py").write_text(kernel.source)
        (folder / f"{name}.json").write_text(json.dumps(kernel.metadata, indent=1) + "\n")
        for file, code in kernel.binaries.items():
            (folder / file).write_bytes(code)


def _calls(block: BlockGraph, target: Target) -> Iterator[tuple[fx.Node, str, list[Operand]]]:
    letters = axis_letters(block.module)
    for node in block.module.graph.nodes:
        op = vocabulary_op(node)
        if op is not None and available(op, target):
            yield node, op, [_operand(argument, letters) for argument in _arguments(node)]


def _arguments(node: fx.Node) -> list[Any]:
    """In the order of the op's signature, defaults filled in."""
    schema = node.target._schema
    named = {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}
    return [named.get(a.name, a.default_value) for a in schema.arguments]


def _operand(argument: Any, letters: dict[str, str]) -> Operand:
    operand = spec_of(value_of(argument), letters)
    producer = argument.args[0] if is_call(argument, getitem) else argument
    if isinstance(operand, TensorSpec) and vocabulary_op(producer):
        return replace(operand, strides=None)  # a kernel's outputs are contiguous, whatever those of its reference
    return operand
