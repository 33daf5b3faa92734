"""An ONNX graph under construction: nodes with readable names, constants stored once, sizes by letter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import sympy
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

ONNX_TYPES = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}


class ExportError(ValueError):
    """Something that has no ONNX form: one line naming op, node and model line."""


@dataclass(frozen=True)
class Value:
    """A tensor of the ONNX graph, with the shape and dtype it has in the block's graph.

    `transposed` names it with its last two axes swapped, where that is how it is stored; `name` is then "".
    """

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    transposed: str = ""


@dataclass(frozen=True)
class Scope:
    """Where the nodes being added come from."""

    module: str = "model"  # path of the module in the model
    node: str = ""  # the node of the block's graph
    source: str = ""  # "file:line" of the model


class Builder:
    """Collects the nodes and constants of one model; every method that adds a node returns its value names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.scope = Scope()
        self.domains: set[str] = {""}
        self._taken: dict[str, int] = {}
        self._constants: dict[Any, str] = {}
        self._once: dict[Any, Any] = {}
        self._letters: dict[str, str] = {}  # letter of a free size → value that holds it, int64 [1]
        self._symbols: dict[sympy.Symbol, str] = {}  # of the block being translated → letter

    # Nodes

    def op(self, kind: str, *inputs: str | Value | None, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, results: int, *inputs: str | Value | None, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Add a node with several outputs. A missing optional input is None."""
        name = self.unique("/".join(filter(None, (self.scope.module, self.scope.node))) + f".{kind}")
        outputs = [name] if results == 1 else [f"{name}:{index}" for index in range(results)]
        names = [self.name_of(one) for one in inputs]
        given = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(kind, names, outputs, name=name, domain=domain, **given)
        origin = {"module": self.scope.module, "source": self.scope.source}
        helper.set_model_props(node, {key: text for key, text in origin.items() if text})
        self.nodes.append(node)
        self.domains.add(domain)
        return tuple(outputs)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give values other names, such as those of the model's outputs, wherever they are written and read."""

        def go(nodes: Iterable[onnx.NodeProto]) -> None:
            for node in nodes:
                for field in (node.input, node.output):
                    field[:] = [names.get(name, name) for name in field]
                for body in bodies(node):
                    go(body.node)

        go(self.nodes)

    def name_of(self, value: str | Value | None) -> str:
        """The name of a value as it stands in the block's graph; a transposed weight is turned back, once."""
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if not value.transposed:
            return value.name
        return self.once(("turned back", value.transposed), lambda: self.swapped(value.transposed, len(value.shape)))

    def swapped(self, value: str | Value, rank: int) -> str:
        """The last two axes exchanged."""
        return self.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])

    def unique(self, name: str) -> str:
        # A name with a number may be somebody's own: constants are called after what they hold, [1, 1] is "1_1".
        free = name
        while free in self._taken:
            free = f"{name}_{self._taken[name]}"
            self._taken[name] += 1
        self._taken[free] = 1
        return free

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What the whole model shares, such as the causal mask: made where it is first asked for."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    @contextlib.contextmanager
    def within(self, scope: Scope) -> Iterator[None]:
        before, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = before

    @contextlib.contextmanager
    def body(self) -> Iterator[list[onnx.NodeProto]]:
        """Nodes added inside go to the list, for the body of a Loop; values from outside stay visible."""
        outside, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outside

    # Constants

    def constant(self, array: Any, dtype: torch.dtype | None = None) -> str:
        """An initializer inside the model file; equal ones are stored once."""
        tensor = torch.as_tensor(array, dtype=dtype).contiguous()
        data = tensor.numpy()
        key = (data.dtype.str, data.shape, data.tobytes())
        if key not in self._constants:
            short = "_".join(str(item) for item in data.flatten()) if data.size <= 4 else f"{data.dtype}_{data.size}"
            name = self.unique(f"constant.{data.dtype}.{short}" if data.size else f"constant.{data.dtype}.empty")
            self._constants[key] = name
            self.initializers[name] = numpy_helper.from_array(np.asarray(data), name)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        return self.constant(list(values), torch.int64)

    # Sizes

    def let(self, letter: str, value: str) -> None:
        """Say which value (int64 [1]) holds a free size."""
        self._letters[letter] = value

    def letter(self, letter: str) -> str:
        """The value that holds a free size."""
        return self._letters[letter]

    def enter(self, dims: Mapping[str, sympy.Symbol]) -> None:
        """Say how the next block's graph writes the free sizes."""
        self._symbols = {symbol: letter for letter, symbol in dims.items()}

    def size(self, size: Any) -> str:
        """A size of the block's graph, int or symbolic, as int64 [1]."""
        return self._size(expression(size).subs({s: sympy.Symbol(letter) for s, letter in self._symbols.items()}))

    def _size(self, formula: sympy.Expr) -> str:
        if formula.is_Integer:
            return self.ints(int(formula))
        if formula.is_Symbol and formula.name in self._letters:
            return self._letters[formula.name]
        kinds = {sympy.Add: "Add", sympy.Mul: "Mul"}
        if formula.func not in kinds:
            raise ExportError(f"{self.scope.node}: the size {formula} has no ONNX form")

        def make() -> str:
            with self.within(Scope("model", str(formula).replace(" ", ""))):
                first, *rest = [self._size(part) for part in formula.args]
                for part in rest:
                    first = self.op(kinds[formula.func], first, part)
            return first

        return self.once(("size", formula), make)

    def shape(self, sizes: Sequence[Any]) -> str:
        """Sizes as one int64 tensor."""
        if all(expression(size).is_Integer for size in sizes):
            return self.ints(*map(int, sizes))
        return self.op("Concat", *[self.size(size) for size in sizes], axis=0)

    def reshape(self, x: Value, sizes: Sequence[Any]) -> str:
        """With sizes written as constants wherever ONNX can infer the free ones."""
        wanted = [expression(size) for size in sizes]
        kept = [i < len(x.shape) and expression(x.shape[i]) == size for i, size in enumerate(wanted)]
        numbers = [0 if keep else int(s) if s.is_Integer else None for keep, s in zip(kept, wanted, strict=True)]
        if numbers.count(None) <= 1:
            return self.op("Reshape", x, self.ints(*(-1 if n is None else n for n in numbers)))
        return self.op("Reshape", x, self.shape(sizes))

    # Small recipes that several translations use

    def cast(self, x: Value | str, dtype: torch.dtype) -> str:
        if isinstance(x, Value) and x.dtype == dtype:
            return self.name_of(x)
        if dtype not in ONNX_TYPES:
            raise ExportError(f"{self.scope.node}: dtype {dtype}; accepted: {', '.join(map(str, ONNX_TYPES))}")
        return self.op("Cast", x, to=ONNX_TYPES[dtype])

    def scalar(self, number: float, dtype: torch.dtype) -> str:
        return self.constant(number, dtype)


def expression(size: Any) -> sympy.Expr:
    """An int, SymInt or sympy expression as a sympy expression."""
    return sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)


def same(left: Any, right: Any) -> bool:
    """Are two sizes equal for every value of the free ones?"""
    return bool(expression(left) == expression(right))


def value_like(name: str, fake: Tensor) -> Value:
    return Value(name, tuple(fake.shape), fake.dtype)


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Graphs inside a node."""
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
