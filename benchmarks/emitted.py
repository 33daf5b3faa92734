"""What the compiler emits for one call of an op, how far its results are off, and tables of both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.build import imported
from codegen.emit import write_kernel
from codegen.record import Operand, TensorSpec, spec_of
from codegen.targets import Target


def emitted(stack: ExitStack, op: str, arguments: list[Any], free: list[str], machine: Target) -> Callable[..., Any]:
    """The launcher that the compiler writes for a call with these arguments."""
    written = write_kernel(op, operands_of(arguments, free), machine)
    return getattr(stack.enter_context(imported(written.source)), op)  # type: ignore[no-any-return]


def operands_of(arguments: list[Any], free: list[str]) -> list[Operand]:
    """Operands as the compiler has them. free: for each of the first arguments the letters of its first sizes, which
    are open there: "BT" is a tensor of any batch and any length."""
    operands = [spec_of(argument) for argument in arguments]
    for number, letters in enumerate(free):
        one = operands[number]
        assert isinstance(one, TensorSpec)
        operands[number] = TensorSpec((*letters, *one.shape[len(letters) :]), one.dtype)
    return operands


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    cells = [[name for name in rows[0]]] + [[_shown(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if value < 0.1 else f"{value:.{2 if value < 10 else 1 if value < 1000 else 0}f}"
    return str(value)
