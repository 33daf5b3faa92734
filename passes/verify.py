"""Certificates: a graph before and after a rewrite, run on the same random inputs in float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from passes.base import Role, placeholders, source_line

EXACT = 1e-10  # float64 leaves six digits for reassociated sums; a wrong rewrite misses by far more


@dataclass(frozen=True)
class Certificate:
    """What was compared, and how far apart the two graphs were."""

    max_rel_error: float
    bound: float = EXACT
    dtype: str = "float64"
    sizes: Mapping[str, int] = field(default_factory=dict)  # values of the symbolic sizes
    proxy: bool = False  # ran on a scaled-down block in place of the real one


class CertificateError(Exception):
    """A pass changed what a block computes."""


class Float64Interpreter(fx.Interpreter):
    """Runs a graph with every floating-point dtype, stated or default, read as float64."""

    def __init__(self, module: fx.GraphModule, record: bool = False) -> None:
        super().__init__(module, garbage_collect_values=not record)
        self.record: dict[str, Any] | None = {} if record else None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.record is not None:
            self.record[n.name] = result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map(_widen, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map(_widen, super().get_attr(target, args, kwargs))


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64)
    return value


def run_float64(
    module: fx.GraphModule, inputs: Mapping[str, Tensor], record: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Outputs of a graph, and with `record` every node's value by name.

    `inputs` holds values by placeholder name. A weight with a recipe (`meta["bind"]`) is computed by it from
    original weights, which must then be among the inputs.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            # Cloned: a lowered graph writes its caches in place.
            arguments = [_argument(node, inputs).clone() for node in placeholders(module.graph)]
            interpreter = Float64Interpreter(module, record)
            outputs = interpreter.run(*arguments, enable_io_processing=False)
    finally:
        torch.set_default_dtype(default)
    return outputs, interpreter.record or {}


def _argument(node: fx.Node, inputs: Mapping[str, Tensor]) -> Tensor:
    recipe = node.meta.get("bind")
    if recipe is None:
        return inputs[str(node.target)]
    names = [str(n.target) for n in recipe.graph.nodes if n.op == "placeholder"]
    arguments = (inputs[name] for name in names)
    (value,) = tree_leaves(Float64Interpreter(recipe).run(*arguments, enable_io_processing=False))
    return value


def size_values(module: fx.GraphModule) -> dict[sympy.Symbol, int]:
    """Small, all-different values for the free sizes of a graph, ascending in order of first appearance.

    A block's inputs show batch, queries, context in that order, so a row's queries fit into its context.
    """
    symbols: dict[sympy.Symbol, None] = {}
    for node in placeholders(module.graph):
        for size in node.meta["val"].shape:
            symbols |= dict.fromkeys(getattr(expression_of(size), "free_symbols", ()))
    return dict(zip(symbols, (3, 5, 11, 13, 17), strict=False))


def random_inputs(module: fx.GraphModule, sizes: Mapping[sympy.Symbol, int], seed: int) -> dict[str, Tensor]:
    """Seeded inputs of a captured graph by placeholder name, scaled as in a trained model.

    Matrices are N(0, 1/fan-in). Vectors are ±(1 + 0.2 N): norm weights do not mind the sign, and selection
    biases of both signs are what tells masking with −inf from masking with 0. Integers are drawn per row,
    distinct and ascending, below the placeholder's `meta["upper"]` (vocabulary, or the context T).
    """
    generator = torch.Generator().manual_seed(seed)
    return {str(node.target): _random(node, sizes, generator) for node in placeholders(module.graph)}


def _random(node: fx.Node, sizes: Mapping[sympy.Symbol, int], generator: torch.Generator) -> Tensor:
    fake = node.meta["val"]
    shape = [_number(size, sizes) for size in fake.shape]
    if not fake.is_floating_point():
        upper = _number(node.meta["upper"], sizes)
        return _ascending(shape, upper, generator).to(fake.dtype)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if node.meta["role"] is not Role.WEIGHT:
        return normal
    if len(shape) < 2:
        sign = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
        return sign * (1 + 0.2 * normal)
    return normal / math.sqrt(shape[-1])


def _ascending(shape: list[int], upper: int, generator: torch.Generator) -> Tensor:
    *rows, width = shape
    if width > upper:
        return torch.randint(0, upper, shape, generator=generator)
    draw = torch.rand([*rows, upper], generator=generator)
    return draw.argsort(-1)[..., :width].sort(-1).values


def expression_of(size: Any) -> Any:
    """The sympy expression of a SymInt; an int stays."""
    return getattr(getattr(size, "node", None), "expr", size)


def _number(size: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    expression = expression_of(size)
    return int(expression.subs(sizes)) if isinstance(expression, sympy.Expr) else int(expression)


def relative_error(found: Any, expected: Any) -> float:
    """max|found − expected| / max|expected|; infinite for another shape, a NaN or an infinity."""
    if not isinstance(expected, Tensor):
        return 0.0 if found == expected else math.inf
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    if not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return math.inf
    difference = (found - expected).abs().amax().item() if expected.numel() else 0.0
    if difference == 0.0:
        return 0.0
    scale = expected.abs().amax().item()
    return difference / scale if scale else math.inf


@dataclass
class Specimen:
    """A graph on its way through the passes, with the inputs it is certified on and its current outputs."""

    module: fx.GraphModule
    inputs: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    proxy: bool
    outputs: list[Any]

    @classmethod
    def of(cls, module: fx.GraphModule, seed: int = 0, proxy: bool = False) -> Specimen:
        sizes = size_values(module)
        inputs = random_inputs(module, sizes, seed)
        outputs = tree_leaves(run_float64(module, inputs)[0])
        letters = {symbol: letter for letter, symbol in module.meta.get("dims", {}).items()}
        named = {str(letters.get(symbol, symbol)): value for symbol, value in sizes.items()}
        return cls(module, inputs, named, proxy, outputs)

    def certify(self, before: fx.GraphModule, label: str, bound: float = EXACT) -> Certificate:
        """Compare the outputs of `module`, just rewritten, with those it had as `before`.

        `label` names pass and block. Raises CertificateError naming the output that differs and the first
        node that does.
        """
        if str(self.module.graph) == str(before.graph):
            return Certificate(0.0, bound, sizes=self.sizes, proxy=self.proxy)
        found = tree_leaves(run_float64(self.module, self.inputs)[0])
        if len(found) != len(self.outputs):
            raise CertificateError(f"{label}: {len(self.outputs)} outputs became {len(found)}")
        worst = 0.0
        for index, (one, other) in enumerate(zip(found, self.outputs, strict=True)):
            error = relative_error(one, other)
            if not error <= bound:
                where = first_difference(before, self.module, self.inputs, bound)
                raise CertificateError(f"{label}: output {index} differs by {error:.3g} (bound {bound:g}){where}")
            worst = max(worst, error)
        self.outputs = found
        return Certificate(worst, bound, sizes=self.sizes, proxy=self.proxy)


def first_difference(before: fx.GraphModule, after: fx.GraphModule, inputs: Mapping[str, Tensor], bound: float) -> str:
    """Rewrites keep the names of the nodes they leave: the first kept node whose value moved is the place."""
    _, expected = run_float64(before, inputs, record=True)
    _, found = run_float64(after, inputs, record=True)
    for node in after.graph.nodes:
        if node.op != "call_function" or node.name not in expected:
            continue
        pairs = zip(tree_leaves(found[node.name]), tree_leaves(expected[node.name]), strict=False)
        if not all(relative_error(_settled(one), _settled(other)) <= bound for one, other in pairs):
            line = source_line(node)
            return f"; first at {node.name}" + (f" ({line})" if line else "")
    return ""


def _settled(value: Any) -> Any:
    """Masks put infinities inside a graph, where they are no fault."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.nan_to_num(nan=math.nan, posinf=1.0, neginf=-1.0)
    return value


def clone(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph; nodes keep names, meta and fake values."""
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output(result)
    copy = fx.GraphModule(module, graph)
    copy.meta.update(module.meta)
    return copy
