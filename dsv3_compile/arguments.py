"""What a compiled module was compiled for, and whether arguments are that: no guard of Inductor's says it in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils._pytree import tree_flatten
from torch.utils._sympy.printers import PythonPrinter

from passes.base import expression_of


class ModuleError(ValueError):
    """A module, or inputs, that cannot be compiled this way. One line: why."""


@dataclass(frozen=True)
class FreeSize:
    """A size that differs from call to call, and the dim of an argument that it is."""

    argument: int
    axis: int
    lowest: int
    highest: int | None

    def of(self, flat: Sequence[Any]) -> int:
        """Its value in a call. Raises ModuleError where it is out of range."""
        value = flat[self.argument].shape[self.axis]
        if value < self.lowest or (self.highest is not None and value > self.highest):
            most = " and more" if self.highest is None else f" to {self.highest}"
            where = f"argument {self.argument} has size {value} at dim {self.axis}"
            raise ModuleError(f"{where}; the module was compiled for {self.lowest}{most}")
        return value


@dataclass(frozen=True)
class Condition:
    """Something that the trace took for granted of the free sizes."""

    text: str
    holds: Callable[..., bool]


@dataclass(frozen=True)
class Signature:
    """How a module is called: the structure of its arguments and results, and what each flattened argument is."""

    arguments: Any
    results: Any
    constants: Mapping[int, Any]  # by position
    tensors: Mapping[int, Tensor]  # by position; fake, with the free sizes as symbols
    free: tuple[FreeSize, ...]
    shapes: Callable[..., tuple[tuple[int, ...], ...]]  # of the tensors, given the free sizes
    strides: Callable[..., tuple[tuple[int, ...] | None, ...]]  # the same; None where contiguous
    conditions: tuple[Condition, ...]

    @classmethod
    def of(cls, exported: ExportedProgram, inputs: Sequence[fx.Node], example_inputs: Sequence[Any]) -> Signature:
        """Of an exported module, whose tensor arguments are the placeholders `inputs`."""
        flat = tree_flatten((tuple(example_inputs), {}))[0]
        constants = {position: value for position, value in enumerate(flat) if not isinstance(value, Tensor)}
        positions = [position for position in range(len(flat)) if position not in constants]
        fakes = {position: node.meta["val"] for position, node in zip(positions, inputs, strict=True)}
        free = _free_sizes(fakes, exported.range_constraints)
        conditions = _conditions(fakes, free)  # before the fakes are asked anything, which would be noted as well
        shapes = [list(map(expression_of, fake.shape)) for fake in fakes.values()]
        strides = [None if fake.is_contiguous() else list(map(expression_of, fake.stride())) for fake in fakes.values()]
        return cls(
            arguments=exported.call_spec.in_spec,
            results=exported.call_spec.out_spec,
            constants=constants,
            tensors=fakes,
            free=tuple(free.values()),
            shapes=_function(free, _tuple(_text(shape) for shape in shapes)),
            strides=_function(free, _tuple("None" if one is None else _text(one) for one in strides)),
            conditions=conditions,
        )

    def checked(self, flat: Sequence[Any]) -> list[Tensor]:
        """The tensors among flattened arguments. Raises ModuleError for what the module was not compiled for."""
        for position, value in self.constants.items():
            if not _same(flat[position], value):
                raise ModuleError(f"argument {position} is {flat[position]!r}; the module was compiled for {value!r}")
        for position, fake in self.tensors.items():
            given = flat[position]
            if not isinstance(given, Tensor) or _kind(given) != _kind(fake):
                raise ModuleError(f"argument {position} is {_words(given)}; the module was compiled for {_words(fake)}")
        sizes = [one.of(flat) for one in self.free]
        expected = zip(self.tensors, self.shapes(*sizes), self.strides(*sizes), strict=True)
        for position, shape, strides in expected:
            given = flat[position]
            if given.shape != shape:
                found, wanted = list(given.shape), list(self.tensors[position].shape)
                raise ModuleError(f"argument {position} has shape {found}; the module was compiled for {wanted}")
            if not _has_strides(given, strides):
                found, wanted = list(given.stride()), list(self.tensors[position].stride())
                raise ModuleError(f"argument {position} has strides {found}; the module was compiled for {wanted}")
        tensors = [flat[position] for position in self.tensors]
        for condition in self.conditions:
            if not condition.holds(*sizes):
                found = [list(given.shape) for given in tensors]
                raise ModuleError(f"the arguments have shapes {found}; the module was compiled for {condition.text}")
        return tensors


def _same(given: Any, value: Any) -> bool:
    """Whether two constants are one: 1, 1.0 and True are not, two NaNs are."""
    return type(given) is type(value) and (given == value or (given != given and value != value))


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.ndim, tensor.device, tensor.layout


def _words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    layout = "" if value.layout is torch.strided else f", {value.layout}"
    return f"{value.dtype} with {value.ndim} dims on {value.device}{layout}"


def _has_strides(tensor: Tensor, strides: tuple[int, ...] | None) -> bool:
    """Whether elements lie where the compiled code looks for them: strides of dims of one element say nothing."""
    if strides is None:
        return tensor.is_contiguous()
    pairs = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return tensor.numel() == 0 or all(found == wanted for size, found, wanted in pairs if size > 1)


def _free_sizes(fakes: Mapping[int, Tensor], ranges: Mapping[Any, Any]) -> dict[sympy.Symbol, FreeSize]:
    """Every free size. Raises ModuleError for one that only other dims depend on, as Inductor cannot read it there."""
    dims = [
        (expression_of(size), number, axis) for number, fake in fakes.items() for axis, size in enumerate(fake.shape)
    ]
    free: dict[sympy.Symbol, FreeSize] = {}
    for expression, number, axis in sorted(dims, key=lambda dim: not isinstance(dim[0], sympy.Symbol)):
        for symbol in getattr(expression, "free_symbols", set()) - free.keys():
            if expression != symbol:
                raise ModuleError(f"dim {axis} of argument {number} is {expression}, and no dim is {symbol} itself")
            limits = ranges.get(symbol)
            highest = None if limits is None or not limits.upper.is_Integer else int(limits.upper)
            free[symbol] = FreeSize(number, axis, 0 if limits is None else int(limits.lower), highest)
    return free


def _conditions(fakes: Mapping[int, Tensor], free: Mapping[sympy.Symbol, FreeSize]) -> tuple[Condition, ...]:
    """What torch.export noted of the sizes and dims alone do not say: that one divides another, for instance.

    Not that two of them differ: code for sizes that differ is right where they happen to be the same.
    """
    environment = next((fake.fake_mode.shape_env for fake in fakes.values() if isinstance(fake, FakeTensor)), None)
    if environment is None:
        return ()
    names = {symbol: sympy.Symbol(f"argument_{one.argument}.shape[{one.axis}]") for symbol, one in free.items()}
    found: dict[str, Condition] = {}
    for guard in environment.guards:
        expression = environment.simplify(guard.expr)
        if not isinstance(expression, sympy.Ne) and expression.free_symbols and expression.free_symbols <= free.keys():
            text = PythonPrinter().doprint(expression.xreplace(names))
            found[text] = Condition(text, _function(free, PythonPrinter().doprint(expression)))
    return tuple(found.values())


def _text(expressions: Sequence[Any]) -> str:
    return _tuple(PythonPrinter().doprint(sympy.sympify(one)) for one in expressions)


def _tuple(parts: Any) -> str:
    return f"({''.join(f'{part}, ' for part in parts)})"


def _function(free: Mapping[sympy.Symbol, FreeSize], text: str) -> Callable[..., Any]:
    """A formula over the free sizes: calling it takes a microsecond, where sympy would take hundreds."""
    return eval(f"lambda {', '.join(map(str, free))}: {text}", dict(SYMPY_INTERP))
