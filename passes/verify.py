"""Certificates: a graph before and after a rewrite, run on the same random inputs in float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from passes.base import module_of, placeholders, source_line
from passes.bisection import Departure, first_departure, relative_error
from passes.grouped_calls import grouped_product
from passes.inputs import Recipe, draw, recipes, size_values

EXACT = 1e-10  # float64 leaves six digits for reassociated sums; a wrong rewrite misses by far more


@dataclass(frozen=True)
class Certificate:
    """What was compared, and how far apart the two graphs were."""

    max_rel_error: float
    bound: float = EXACT
    dtype: str = "float64"
    sizes: Mapping[str, int] = field(default_factory=dict)  # values of the symbolic sizes
    proxy: bool = False  # ran on a scaled-down block in place of the real one
    skipped: tuple[str, ...] = ()  # what was not compared, and why


@dataclass(frozen=True)
class Failure:
    """What it takes to see a failed certificate again."""

    before: fx.GraphModule
    after: fx.GraphModule
    recipes: Sequence[Recipe]
    seed: int
    departure: Departure | None


class CertificateError(Exception):
    """A pass changed what a block computes. `failure` is None where no two graphs were compared."""

    def __init__(self, message: str, failure: Failure | None = None) -> None:
        super().__init__(message)
        self.failure = failure


class NodeError(Exception):
    """A node that cannot be computed."""

    def __init__(self, node: fx.Node, error: Exception) -> None:
        lines = str(error).splitlines() or [""]
        super().__init__(f"{node.name}: {type(error).__name__}: {lines[0]}")
        self.departure = Departure(node.name, node.name, math.inf, source_line(node))


class Float64Interpreter(fx.Interpreter):
    """Runs a graph with every floating-point dtype, stated or default, read as float64, and every device as the CPU."""

    def __init__(self, module: fx.GraphModule, record: bool = False, graph: fx.Graph | None = None) -> None:
        super().__init__(module, garbage_collect_values=not record, graph=graph)
        self.record: dict[str, Any] | None = {} if record else None

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:  # whatever an operator raises
            raise NodeError(n, error) from error
        if self.record is not None:
            self.record[n.name] = result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map(_widen, (args, kwargs))
        if target is torch.ops.aten.topk.default:
            target = _first_largest
        if target is torch.ops.aten._grouped_mm.default:  # has no kernel for float64
            target = grouped_product
        if target is torch.ops.aten.histc.default and not args[0].is_floating_point():  # counts integers on a GPU only
            return super().call_function(target, (args[0].to(torch.float64), *args[1:]), kwargs).to(args[0].dtype)
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map(_widen, super().get_attr(target, args, kwargs))


def _first_largest(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    """topk in the one order that two graphs can share: sorted, and of equal numbers the first ones."""
    values, indices = x.sort(dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, Tensor):
        return value.to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
    return value


def run_float64(
    module: fx.GraphModule, inputs: Mapping[str, Any], record: bool = False, graph: fx.Graph | None = None
) -> tuple[Any, dict[str, Any]]:
    """Outputs of a graph, and with `record` every node's value by name.

    `inputs` holds values by placeholder name. A weight with a recipe (`meta["bind"]`) is computed by it from
    original weights, which must then be among the inputs. graph: to be run in place of the module's own, whose
    constants it reads. Raises NodeError.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # what a graph draws at random is the same before and after
            # Cloned: a lowered graph writes its caches in place.
            arguments = tree_map(_copied, [_argument(node, inputs) for node in placeholders(graph or module.graph)])
            interpreter = Float64Interpreter(module, record, graph)
            outputs = interpreter.run(*arguments, enable_io_processing=False)
    finally:
        torch.set_default_dtype(default)
    return outputs, interpreter.record or {}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _argument(node: fx.Node, inputs: Mapping[str, Tensor]) -> Tensor:
    recipe = node.meta.get("bind")
    if recipe is None:
        return inputs[str(node.target)]
    names = [str(n.target) for n in placeholders(recipe.graph)]
    arguments = (inputs[name] for name in names)
    (value,) = tree_leaves(Float64Interpreter(recipe).run(*arguments, enable_io_processing=False))
    return value


@dataclass
class Specimen:
    """A graph on its way through the passes, with the inputs it is certified on and the values it has there."""

    module: fx.GraphModule
    recipes: Sequence[Recipe]
    seed: int
    sizes: Mapping[str, int]
    proxy: bool
    inputs: Mapping[str, Tensor]
    outputs: list[Any]
    values: Mapping[str, Any]  # of every node, by name
    captured: Sequence[Any]  # the outputs before any pass

    @classmethod
    def of(cls, module: fx.GraphModule, seed: int = 0, proxy: bool = False) -> Specimen:
        sizes = size_values(module)
        how = recipes(module, sizes)
        inputs = draw(how, seed)
        outputs, values = run_float64(module, inputs, record=True)
        letters = {symbol: letter for letter, symbol in module.meta.get("dims", {}).items()}
        named = {str(letters.get(symbol, symbol)): value for symbol, value in sizes.items()}
        leaves = tree_leaves(outputs)
        return cls(module, how, seed, named, proxy, inputs, leaves, values, leaves)

    def snapshot(self) -> fx.GraphModule:
        """The graph as it is now, to be compared with what a pass makes of it."""
        return clone(self.module)

    def certify(self, before: fx.GraphModule, label: str) -> Certificate:
        """Compare the outputs of `module`, just rewritten, with those it had as `before`.

        `label` names pass and block. Raises CertificateError naming the output that differs and the first node
        that does, or the node at which the graph no longer runs.
        """
        if str(self.module.graph) == str(before.graph):
            return Certificate(0.0, sizes=self.sizes, proxy=self.proxy)
        try:
            results, values = run_float64(self.module, self.inputs, record=True)
        except NodeError as stopped:
            message = f"{label}: the graph no longer runs: {stopped}"
            raise self._failed(before, message, stopped.departure) from stopped
        found = tree_leaves(results)
        if len(found) != len(self.outputs):
            raise self._failed(before, f"{label}: {len(self.outputs)} outputs became {len(found)}", None)
        errors = [relative_error(one, other) for one, other in zip(found, self.outputs, strict=True)]
        for index, error in enumerate(errors):
            if not error <= EXACT:
                place = first_departure(before.graph, self.module.graph, self.values, values, EXACT)
                where = f"; first at {place}, off by {place.error:.3g}" if place else ""
                message = f"{label}: output {index} differs by {error:.3g} (bound {EXACT:g}){where}"
                raise self._failed(before, message, place)
        self.outputs, self.values = found, values
        return Certificate(max(errors, default=0.0), sizes=self.sizes, proxy=self.proxy)

    def certify_whole(self, label: str) -> Certificate:
        """Compare the outputs of `module` with those of the block as it was captured: all passes together.

        `label` names the block. Raises CertificateError; no single pass is to blame then.
        """
        pairs = zip(self.outputs, self.captured, strict=True)
        error = max((relative_error(one, other) for one, other in pairs), default=0.0)
        if not error <= EXACT:
            raise CertificateError(f"all passes on {label}: an output differs by {error:.3g} (bound {EXACT:g})")
        return Certificate(error, sizes=self.sizes, proxy=self.proxy)

    def _failed(self, before: fx.GraphModule, message: str, place: Departure | None) -> CertificateError:
        return CertificateError(message, Failure(before, self.module, self.recipes, self.seed, place))


def clone(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph; nodes keep names, meta and fake values."""
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output(result)
    copy = module_of(module, graph)
    copy.meta.update(module.meta)
    return copy
