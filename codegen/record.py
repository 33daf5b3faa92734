"""Which kernels a launcher launches, with which constants: found by running it on fake tensors."""

from __future__ import annotations

import ast
import itertools
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction, mangle_type

from codegen.targets import Target

# Sizes to try for every free size: one row, few, many. Odd ones, so that no alignment is seen that is not there.
TRIED_SIZES = (1, 23, 4099)
ALIGNMENT = 16
ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LOCK = threading.Lock()


@dataclass(frozen=True)
class TensorSpec:
    """What a kernel is compiled for: sizes are numbers, or text in free sizes ("B", "B*S"); strides in elements.

    Without strides the tensor is contiguous.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype
    strides: tuple[int | str, ...] | None = None

    def fake(self, sizes: Mapping[str, int]) -> torch.Tensor:
        """An empty tensor on a GPU that need not be there; called under a FakeTensorMode."""
        shape = [_value(size, sizes) for size in self.shape]
        if self.strides is None:
            return torch.empty(shape, dtype=self.dtype, device="cuda:0")
        strides = [_value(stride, sizes) for stride in self.strides]
        return torch.empty_strided(shape, strides, dtype=self.dtype, device="cuda:0")

    def free_sizes(self) -> set[str]:
        texts = [size for size in (*self.shape, *(self.strides or ())) if isinstance(size, str)]
        return {n.id for text in texts for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}


Operand = TensorSpec | int | float | bool | str | None


@dataclass(frozen=True)
class Launch:
    """One kernel as it is launched: constants and types by parameter name, launch options by theirs."""

    kernel: str
    constants: Mapping[str, Any]  # constexpr parameters, and pointers that are None
    types: Mapping[str, str]  # of the run-time parameters, as triton spells them
    aligned: tuple[str, ...]  # parameters that are multiples of 16 whatever the free sizes are
    options: Mapping[str, Any]  # num_warps, num_stages, ...

    def same_code(self) -> tuple[Any, ...]:
        """Equal for launches that run the same machine code, alignment aside."""
        parts = (self.constants, self.types, self.options)
        return (self.kernel, *(tuple((key, repr(value)) for key, value in part.items()) for part in parts))


def spec_of(value: Any, letters: Mapping[str, str] | None = None) -> Operand:
    """The operand for an argument of a graph: a (fake) tensor, a number, a text, or None.

    letters: names of free sizes by torch's name for them, such as {"s27": "B"}. ValueError for anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        shape, strides = (tuple(_size(s, letters or {}) for s in part) for part in (value.shape, value.stride()))
        return TensorSpec(shape, value.dtype, strides)
    raise ValueError(f"an operand is a {type(value).__name__}; accepted: tensors, numbers, texts, None")


def record_launches(
    launcher: Callable[..., Any],
    operands: Sequence[Operand],
    target: Target,
    tried: Mapping[str, Sequence[int]] | Sequence[int] = TRIED_SIZES,
) -> list[Launch]:
    """All launches that differ, over the tried values of the free sizes, in the order they happen.

    tried: the values of every free size; or of some, by name, the others having the usual ones.
    """
    found: dict[Any, Launch] = {}
    with _LOCK, _watched(target) as seen:
        for arguments in _tried(operands, tried):
            seen.clear()
            launcher(*arguments)
            for launch in seen:
                key = launch.same_code()
                before = found.get(key, launch)
                aligned = tuple(name for name in before.aligned if name in launch.aligned)
                found[key] = replace(launch, aligned=aligned)
    return list(found.values())


def fitting(serves: Callable[..., str | None] | None, operands: Sequence[Operand], target: Target) -> bool:
    """Does a form of a kernel serve these operands whatever their free sizes are? `serves` gives a reason if not."""
    if serves is None:
        return True
    with _LOCK, _watched(target):
        return all(serves(*arguments) is None for arguments in _tried(operands, TRIED_SIZES))


def _tried(operands: Sequence[Operand], tried: Mapping[str, Sequence[int]] | Sequence[int]) -> Iterator[list[Any]]:
    """Arguments with every combination of tried sizes; under a FakeTensorMode."""
    free = sorted(set().union(*(o.free_sizes() for o in operands if isinstance(o, TensorSpec))))
    choices = [tried.get(name, TRIED_SIZES) if isinstance(tried, Mapping) else tried for name in free]
    for values in itertools.product(*choices):
        sizes = dict(zip(free, values, strict=True))
        yield [o.fake(sizes) if isinstance(o, TensorSpec) else o for o in operands]


def _here(ours: Callable[..., Any], usual: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is `ours` in this thread and the usual one in others, which may be running a model."""
    thread = threading.get_ident()

    def chosen(*arguments: Any, **named: Any) -> Any:
        return (ours if threading.get_ident() == thread else usual)(*arguments, **named)

    return chosen


@contextmanager
def _watched(target: Target) -> Iterator[list[Launch]]:
    """In this thread launches are noted instead of run, and the target answers for the device that is not there."""
    seen: list[Launch] = []

    def noted(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: seen.append(_launch(kernel, args, kwargs))

    device, properties = SimpleNamespace(multi_processor_count=target.processors), torch.cuda.get_device_properties
    if torch.cuda.is_available():
        torch.cuda.init()  # asks the device that is there, and must not be told of another
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(JITFunction, "__getitem__", _here(noted, JITFunction.__getitem__)),
        mock.patch.object(torch.cuda, "get_device_properties", _here(lambda _: device, properties)),
        warnings.catch_warnings(),
    ):
        # Tensor descriptors ask a fake tensor for its address, to see that it is aligned: it is 0.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield seen


def _launch(kernel: JITFunction, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Launch:
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args, strict=False)) | {key: value for key, value in kwargs.items() if key in names}
    constants, types, aligned = {}, {}, []
    for parameter in kernel.params:
        value = given[parameter.name] if parameter.name in given else parameter.default
        if parameter.is_constexpr or value is None:
            constants[parameter.name] = value
            continue
        types[parameter.name] = mangle_type(value)
        divisible = isinstance(value, int) and not isinstance(value, bool) and value % ALIGNMENT == 0
        if isinstance(value, torch.Tensor) or divisible:
            aligned.append(parameter.name)
    options = {key: value for key, value in kwargs.items() if key not in names}
    return Launch(kernel.__name__, constants, types, tuple(aligned), options)


def _size(size: Any, letters: Mapping[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return str(expression.xreplace({s: type(s)(letters.get(str(s), str(s))) for s in expression.free_symbols}))


def _value(size: int | str, sizes: Mapping[str, int]) -> int:
    """A size's number; ValueError if its text is not arithmetic in free sizes."""

    def evaluate(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](evaluate(node.left), evaluate(node.right))
        raise ValueError(f"size {size!r} is not arithmetic (+ - * // %) in free sizes and whole numbers")

    return size if isinstance(size, int) else evaluate(ast.parse(size, mode="eval").body)
