"""From a module to a block graph: one trace on fake tensors, with weights and caches as inputs.

The free sizes B, S and T are symbols from the start, one for all inputs, so that nothing has to be solved for
afterwards: torch.export, which finds out which sizes are equal, takes four times as long over a block.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._export.utils import _compiling_state_context
from torch._functorch.aot_autograd import aot_export_module
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.value_ranges import ValueRanges

from passes.base import Role, is_mutable, module_of, sweep

aten = torch.ops.aten

LARGEST = {"B": 1 << 16, "S": 1 << 24, "T": 1 << 24}
EXAMPLE = {"B": 3, "S": 5, "T": 11}  # different, and none is 0 or 1: torch takes those for constants

_TORCH_HOME = torch.__path__[0]


class CaptureError(ValueError):
    """A module that cannot become a block."""


@dataclass(frozen=True)
class Input:
    """An activation or cache of a block. Letters in `shape` are free sizes; integers lie in [0, upper)."""

    name: str
    role: Role
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    upper: int | str | None = None


def capture_fake(build: Callable[[], nn.Module], inputs: Sequence[Input]) -> fx.GraphModule:
    """The module that `build` makes, as a block graph, with fake weights: nothing of its size is allocated."""
    mode = _symbolic_mode()
    with mode:
        module = build()
    return capture_module(module, inputs, mode)


def capture_module(
    module: nn.Module, inputs: Sequence[Input], fake_mode: FakeTensorMode | None = None
) -> fx.GraphModule:
    """Any module as a block graph: weights first, then `inputs`, each a placeholder with its role.

    `fake_mode` is the mode the module was built under, if it was. The graph is functional; `meta["dims"]` of
    the result holds the symbols of the free sizes by letter. Raises CaptureError for modules that overwrite an
    input, do something else for other sizes, or hold tensor constants: those have no place in a checkpoint, buffers do.
    """
    mode = fake_mode or _symbolic_mode()
    letters = list(dict.fromkeys(letter for one in inputs for letter in _letters(one)))
    sizes = {letter: _free_size(mode.shape_env, letter) for letter in letters}
    symbols = {size.node.expr: letter for letter, size in sizes.items()}
    weights = {name: _fake(mode, tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    with mode:
        examples = [_example(one, sizes) for one in inputs]
    # Where opt_einsum is installed, torch.einsum would ask it for an order, and it fixes the free sizes.
    with _compiling_state_context(), mode, torch.no_grad(), torch.backends.opt_einsum.flags(enabled=False):
        traced = make_fx(
            _Call(module.eval(), list(weights)), _spelled_out(), pre_dispatch=True, record_module_stack=True
        )(*weights.values(), *examples)  # fmt: skip
    for node in traced.graph.find_nodes(op="get_attr"):
        raise CaptureError(f"tensor constant {node.target} in the module; register it as a buffer")
    if any(is_mutable(node) for node in traced.graph.nodes):
        traced = _functional(traced)
    _check_free(mode.shape_env, symbols)
    return _block_graph(traced, list(weights), inputs, sizes)


class _Call:
    """A module as a function of its weights and inputs; `_orig_mod` is where make_fx looks for submodules."""

    def __init__(self, module: nn.Module, weights: Sequence[str]) -> None:
        self._orig_mod, self._weights = module, weights

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(self._weights)
        named = dict(zip(self._weights, tensors[:count], strict=True))
        results = functional_call(self._orig_mod, named, tensors[count:])
        return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def _symbolic_mode() -> FakeTensorMode:
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    mode.cache_enabled = False  # with symbols for sizes, to rebuild a known result takes longer than to find it anew
    return mode


def _letters(one: Input) -> list[str]:
    return [size for size in one.shape if isinstance(size, str)]


def _free_size(env: ShapeEnv, letter: str) -> torch.SymInt:
    """A size that stays a symbol, from 1 to the largest of its kind."""
    source, example = ConstantSource(letter), EXAMPLE[letter]
    limits = StrictMinMaxConstraint(vr=ValueRanges(1, LARGEST[letter]), warn_only=False)
    symbol = env.create_symbol(example, source, DimDynamic.DYNAMIC, limits)
    return env.create_symintnode(symbol, hint=example, source=source)


def _example(one: Input, sizes: Mapping[str, torch.SymInt]) -> torch.Tensor:
    return torch.empty([sizes[size] if isinstance(size, str) else size for size in one.shape], dtype=one.dtype)


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)


@functools.cache
def _spelled_out() -> dict[OpOverload, Callable[..., Any]]:
    """What is never a node of its own: composites that may return a view, such as flatten, and slices of everything.

    Traced before autograd, composites stay whole. Passes read linear, einsum or softmax so, and views by what they
    come down to.
    """
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    found: dict[OpOverload, Callable[..., Any]] = {aten.slice.Tensor: _slice}
    for name, _, overload in (one.removeprefix("aten::").partition(".") for one in names if one.startswith("aten::")):
        op = getattr(getattr(aten, name), overload or "default")
        aliases = any(argument.alias_info is not None for argument in op._schema.arguments)
        if aliases or torch.Tag.maybe_aliasing_or_mutating in op.tags:  # dropout, which does nothing here
            found[op] = op.decompose
    return found


def _slice(x: torch.Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    whole = start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end == sys.maxsize))
    return x if whole else NotImplemented


def _check_free(env: ShapeEnv, symbols: Mapping[Any, str]) -> None:
    """Raise CaptureError for a question about a free size that the trace has answered for its examples only."""
    for guard in env.guards:
        asked = guard.expr.xreplace({symbol: sympy.Symbol(letter) for symbol, letter in symbols.items()})
        raise CaptureError(f"the module takes another path unless {asked}; a block is one graph for all sizes")


def _functional(traced: fx.GraphModule) -> fx.GraphModule:
    """The same with buffers that are filled in place as new values: one more trace, for those that need it."""
    values = [node.meta["val"] for node in traced.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        exported, signature = aot_export_module(
            traced, values, trace_joint=False, pre_dispatch=True, decompositions=_spelled_out()
        )
    if signature.user_inputs_to_mutate:
        raise CaptureError("the module overwrites an input in place; a block returns new values")
    return exported


def _block_graph(
    traced: fx.GraphModule, weights: Sequence[str], inputs: Sequence[Input], sizes: Mapping[str, torch.SymInt]
) -> fx.GraphModule:
    block = module_of(nn.Module(), fx.Graph())
    graph = block.graph
    given = [(name.replace(".", "_"), Role.WEIGHT) for name in weights] + [(one.name, one.role) for one in inputs]
    copies: dict[fx.Node, fx.Node] = {}
    for old, (name, role) in zip(traced.graph.find_nodes(op="placeholder"), given, strict=True):
        # With an explicit name the shape letters keep their case.
        copies[old] = new = graph.create_node("placeholder", name, name=name)
        new.meta = {"role": role, "val": old.meta["val"]}
    taken = list(copies.values())[len(weights) :]
    for node, one in zip(taken, inputs, strict=True):
        if one.upper is not None:
            node.meta["upper"] = sizes[one.upper] if isinstance(one.upper, str) else one.upper

    numbers = {size.node.expr: _read_size(graph, letter, taken, inputs) for letter, size in sizes.items()}
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        known = numbers.get(value.node.expr) if isinstance(value, torch.SymInt) else None
        if known is None:
            known = _two_by_two(graph, node, copies) or graph.node_copy(node, copies.__getitem__)
            known.meta = tidy(node.meta)
            if isinstance(value, torch.SymInt):
                numbers[value.node.expr] = known
        copies[node] = known
    graph.output(fx.node.map_arg(traced.graph.output_node().args[0], copies.__getitem__))
    block.meta["dims"] = {letter: size.node.expr for letter, size in sizes.items()}
    sweep(block)
    return block


def _two_by_two(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """A product or sum of sizes as Python can compute it: make_fx hands operator.mul as many factors as there are."""
    if node.target not in (operator.mul, operator.add) or len(node.args) < 3:
        return None
    values = [copies[one] if isinstance(one, fx.Node) else one for one in node.args]
    result, *others = values
    for value in others:
        fakes = [one.meta["val"] if isinstance(one, fx.Node) else one for one in (result, value)]
        result = graph.call_function(node.target, (result, value))
        result.meta["val"] = node.target(*fakes)
    return result


def _read_size(graph: fx.Graph, letter: str, taken: Sequence[fx.Node], inputs: Sequence[Input]) -> fx.Node:
    """A node that bears the letter of a free size."""
    node, one = next(pair for pair in zip(taken, inputs, strict=True) if letter in pair[1].shape)
    axis = one.shape.index(letter)
    read = graph.create_node("call_function", aten.sym_size.int, (node, axis), name=letter)
    read.meta["val"] = node.meta["val"].shape[axis]
    return read


def tidy(meta: dict[str, Any]) -> dict[str, Any]:
    """What the passes need of a node's record; of its stack, the frames of the model."""
    kept: dict[str, Any] = {key: meta[key] for key in ("val", "nn_module_stack") if key in meta}
    frames = re.findall(r'File "[^"]+", line \d+.*\n(?:    .*\n?)?', meta.get("stack_trace") or "")
    kept["stack_trace"] = "  " + "  ".join(frame for frame in frames if _TORCH_HOME not in frame)
    return kept
