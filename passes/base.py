"""What a pass is, what it returns, and the few graph helpers that all passes share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._lazy_graph_module import _LazyGraphModule

from codegen.equations import explicit
from codegen.ops import LAYOUTS
from codegen.targets import Target

aten = torch.ops.aten

END = (1 << 63) - 1  # of an axis, as export writes it


class Role(StrEnum):
    """What an input of a block's graph is; the driver tells, no pass guesses it from a name."""

    ACTIVATION = "activation"
    WEIGHT = "weight"
    CACHE = "cache"
    INPUT = "input"  # of a foreign graph: a tensor of which nothing more is known
    SIZE = "size"  # of a foreign graph: a number


@dataclass(frozen=True)
class Refusal:
    """A candidate that a pass looked at and left alone."""

    node: str
    reason: str
    source: str = ""  # "file:line" of the model line the node came from
    reached: int = 0  # nodes that the pass had recognised; comparable between candidates of one pass


@dataclass
class Outcome:
    """What one pass did to one graph."""

    matches: list[str] = field(default_factory=list)  # one line of prose each
    refusals: list[Refusal] = field(default_factory=list)
    decision: dict[str, Any] = field(default_factory=dict)  # options that would repeat the choices made here

    def refuse(self, node: fx.Node, reason: str, reached: int = 0) -> None:
        self.refusals.append(Refusal(node.name, reason, source_line(node), reached))


@dataclass(frozen=True)
class Workload:
    """Sizes at which costs are compared: batch B, query positions S, context T."""

    batch: int
    queries: int
    context: int


@dataclass(frozen=True)
class Context:
    """What a pass may know besides the graph."""

    phase: str  # "prefill" or "decode"; "any" of a foreign graph
    target: Target
    workload: Workload


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses whose fields are their options."""

    prepares: ClassVar[bool] = False  # are matches of this pass alone no reason to replace a foreign graph?

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        """Change the graph in place and say what was done and what was left."""
        raise TypeError(f"{type(self).__name__} does not define run")

    def decided(self, outcome: Outcome) -> Pass:
        """This pass with the choices of an earlier run pinned."""
        return replace(self, **outcome.decision)

    @classmethod
    def name(cls) -> str:
        """Command-line name: FuseSwiglu → fuse-swiglu."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def source_line(node: fx.Node) -> str:
    """'file:line' of the innermost model frame in the node's stack trace, or ''."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


def told(old: str, new: fx.Node) -> str:
    """One line of prose about what a new node replaces."""
    where = source_line(new)
    return f"{old} → {new.name}" + (f" ({where})" if where else "")


def value_of(argument: Any) -> Any:
    """The fake value of an argument: nodes become their meta['val'], everything else stays."""
    return fx.node.map_arg(argument, lambda node: node.meta["val"])


def fake_mode_of(graph: fx.Graph) -> Any:
    """The FakeTensorMode that the graph's values live in."""
    for node in graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    raise ValueError("the graph has no fake values; was it captured by dsv3_compile.capture?")


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    *args: Any,
    like: fx.Node | None = None,
    **kwargs: Any,
) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value computed at once.

    `like` is the node whose source line and module the new node inherits.
    """
    node = graph.call_function(target, args, kwargs)
    with fake_mode_of(graph):
        node.meta["val"] = fake_result(target, value_of(args), value_of(kwargs))
    if like is not None:
        for key in ("stack_trace", "nn_module_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
    return node


def fake_result(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives on fake tensors. For products, norms and the vocabulary by hand: torch's own way is to compute
    them step by step."""
    if target is aten.einsum.default:
        letters, out = explicit(args[0], [x.ndim for x in args[1]])
        if is_sum_of_products(letters, out):
            return fake_einsum(letters, out, args[1])
    if target is aten.linear.default:
        return fake_linear(*args)
    if target is aten.rms_norm.default and len(args) > 2 and args[0].dtype == getattr(args[2], "dtype", args[0].dtype):
        return args[0].new_empty(args[0].shape)
    return LAYOUTS.get(target, target)(*args, **kwargs)


def fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], *weight.shape[:-1]))


def equation_of(einsum: fx.Node) -> tuple[tuple[str, ...], str]:
    """(letters of every operand, letters of the result): one letter per dim, however the equation is written."""
    equation, operands = einsum.args[:2]
    return explicit(equation, [len(shape_of(operand)) for operand in operands])


def is_sum_of_products(letters: Sequence[str], out: str) -> bool:
    """Is something summed, over two operands? What is not is no matrix product to torch."""
    return len(letters) == 2 and not set("".join(letters)) <= set(out)


def fake_einsum(letters: Sequence[str], out: str, operands: Sequence[Tensor]) -> Tensor:
    """What a product of two tensors gives, in size and strides: torch's own way takes long on symbolic sizes.

    It multiplies [both, left, sum] with [both, sum, right] and permutes, the sides swapped where all axes of the right
    come first in the result; axes of size one count as the other side's.
    """
    sizes = [dict(zip(own, x.shape, strict=True)) for own, x in zip(letters, operands, strict=True)]

    def is_wide(side: int, letter: str) -> bool:
        return letter in sizes[side] and not same_size(sizes[side][letter], 1)

    kinds = {c: (is_wide(0, c), is_wide(1, c)) for c in out}
    both, left = ([c for c in out if kinds[c] == kind] for kind in ((True, True), (True, False)))
    right = [c for c in out if c not in (*both, *left)]
    swapped = "".join(c for c in out if c not in both) == "".join((*right, *left))
    order = [*both, *right, *left] if swapped else [*both, *left, *right]
    known = {**sizes[1], **sizes[0]} | {c: sizes[1][c] for c in out if kinds[c] == (False, True)}
    return operands[0].new_empty([known[c] for c in order]).permute([order.index(c) for c in out])


def placeholders(graph: fx.Graph, role: Role | None = None) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder" and (role is None or n.meta["role"] == role)]


_NO_PACKET = object()


def is_call(node: Any, *targets: Any) -> bool:
    """Is it a call of one of these ops? Overload packets match any of their overloads, view not the one that reads
    the same bits as another dtype.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", _NO_PACKET)
    return node.target in targets or (packet in targets and node.target is not torch.ops.aten.view.dtype)


def calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """Calls of the given ops, in topological order, safe against changes while iterating."""
    return (node for node in list(graph.nodes) if is_call(node, *targets))


def is_mutable(node: fx.Node) -> bool:
    """Does the call write to an argument?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def expression_of(size: Any) -> Any:
    """The sympy expression of a SymInt; an int stays."""
    return getattr(getattr(size, "node", None), "expr", size)


def same_size(left: Any, right: Any) -> bool:
    """Are two sizes (int or SymInt) equal for every value of the symbols?"""
    return bool(expression_of(left) == expression_of(right))


def module_of(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """The graph as a module with the constants of `root`. Its Python is generated when it is first called, as most
    graphs between two passes never are."""
    return _LazyGraphModule(root, graph)


SWEPT = "swept"


def sweep(graph_module: fx.GraphModule) -> None:
    """Remove dead code, check the graph, let its Python follow; nothing if all that was done already."""
    if graph_module.meta.get(SWEPT) == state(graph_module.graph):
        return
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.meta[SWEPT] = state(graph_module.graph)


def state(graph: fx.Graph) -> list[Any]:
    """Equal for a graph and itself later on exactly when nothing was changed in between."""
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all data it is computed from; sizes are not data."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(n for n in current.all_input_nodes if not is_call(n, aten.sym_size))
    return seen
