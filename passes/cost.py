"""What a graph costs: FLOPs, bytes, launches and weight storage, symbolic in B, S and T.

FLOPs are those of the products (two per multiply-accumulate), as torch.utils.flop_counter counts them when the graph
runs. Attention counts every query with every position of the context, also those that a causal mask hides, before
and after fusion: a kernel that skips them does up to half of that in the prefill of a fresh prompt.
Bytes are what one run must move: every product and fused op reads its operands and writes its result; chains of
elementwise ops count as one kernel, which reads and writes only at its ends; views are free; a cache write moves the
rows it writes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from codegen.ops import NAMESPACE
from codegen.targets import Target
from passes.base import Role, Workload, equation_of, expression_of, is_call, placeholders
from passes.grouped_calls import grouped_call

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

B, S, T = sympy.symbols("B S T", positive=True, integer=True)
SizeOf = Callable[[Any], Any]  # a dim (int or SymInt) → number or sympy expression

VIEWS = (
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze,
    aten.permute, aten.transpose, aten.t, aten.expand, aten.slice, aten.split_with_sizes, aten.split, aten.chunk,
    aten.select, aten.unbind, aten.alias, aten.detach, aten.sym_size, operator.getitem, operator.mul, operator.add,
)  # fmt: skip
NOT_ELEMENTWISE = (
    aten.einsum, aten.linear, aten.mm, aten.bmm, aten.matmul, aten.addmm, aten.scaled_dot_product_attention,
    aten.softmax, aten._softmax, aten.topk, aten.sort, aten.scatter, aten.index_put, aten.index_put_,
    aten.index, aten.embedding,
    aten.gather, aten.sum, aten.mean, aten.amax, aten.rms_norm, aten.index_add, aten.cat, aten.stack,
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Totals of a graph; numbers, or sympy expressions in B, S and T."""

    flops: Any
    bytes: Any
    launches: int
    weight_bytes: int
    cache_bytes_per_token: int

    def at(self, workload: Workload) -> Cost:
        """The same totals as numbers for given sizes."""
        sizes = {B: workload.batch, S: workload.queries, T: workload.context}
        flops, moved = (int(sympy.sympify(e).subs(sizes)) for e in (self.flops, self.bytes))
        return Cost(flops, moved, self.launches, self.weight_bytes, self.cache_bytes_per_token)


@dataclass(frozen=True)
class NodeCost:
    """FLOPs and bytes of one node, and whether it starts a kernel of its own."""

    flops: Any = 0
    bytes: Any = 0
    launches: int = 0

    def seconds(self, target: Target) -> float:
        """Roofline time: the larger of arithmetic and traffic. Launches are left out: fusion decides them later."""
        return max(self.flops / target.flops, self.bytes / target.bandwidth)


def cost(graph: fx.Graph, size: SizeOf | None = None) -> Cost:
    """Totals of a graph: numbers where `size` gives numbers, else expressions in B, S and T."""
    size = size or symbolic_sizes(graph)
    each = node_costs(graph, size).values()
    caches = [n.meta["val"] for n in placeholders(graph, Role.CACHE)]
    return Cost(
        sympy.expand(sum((c.flops for c in each), sympy.Integer(0))),
        sympy.expand(sum((c.bytes for c in each), sympy.Integer(0))),
        sum(c.launches for c in each),
        sum(int(_bytes(n.meta["val"], int)) for n in placeholders(graph, Role.WEIGHT)),
        sum(prod(v.shape[2:]) * v.element_size() for v in caches),
    )


def symbol_names(graph: fx.Graph) -> dict[Any, sympy.Symbol]:
    """Which of the graph's own symbols are B, S and T: read off the dims of its activations and caches."""
    names: dict[Any, sympy.Symbol] = {}
    for role, second in ((Role.CACHE, T), (Role.ACTIVATION, S)):
        for node in placeholders(graph, role):
            for dim, name in zip(node.meta["val"].shape[:2], (B, second), strict=False):
                if not isinstance(dim, int):
                    names.setdefault(dim.node.expr, name)
    return names


def traced_sizes(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """The value that each free size of a foreign graph had when it was traced."""
    values = [node.meta["val"] for role in (Role.SIZE, Role.INPUT) for node in placeholders(graph, role)]
    sizes = [size for value in values for size in getattr(value, "shape", (value,)) if isinstance(size, torch.SymInt)]
    return {size.node.expr: size.node.hint for size in sizes if size.node.expr.is_Symbol and size.node.hint is not None}


def symbolic_sizes(graph: fx.Graph) -> SizeOf:
    names = symbol_names(graph)

    @functools.cache  # a graph asks for the same few sizes thousands of times
    def named(expression: Any) -> Any:
        return sympy.sympify(expression).subs(names)

    return lambda dim: dim if isinstance(dim, int) else named(expression_of(dim))


def concrete_sizes(graph: fx.Graph, workload: Workload) -> SizeOf:
    """Sizes as integers for one workload; those of a foreign graph, which nobody named, as they were traced."""
    sizes = {B: workload.batch, S: workload.queries, T: workload.context}
    values = traced_sizes(graph) | {symbol: sizes[name] for symbol, name in symbol_names(graph).items()}

    @functools.cache
    def numbered(expression: Any) -> int:
        return int(sympy.sympify(expression).subs(values))

    return lambda dim: dim if isinstance(dim, int) else numbered(expression_of(dim))


def node_costs(graph: fx.Graph, size: SizeOf) -> dict[fx.Node, NodeCost]:
    return {node: node_cost(node, size) for node in graph.nodes if node.op == "call_function"}


def is_view(node: fx.Node) -> bool:
    called = node.op == "call_function" and _is_among_views(node.target)
    return called or not isinstance(node.meta.get("val"), (FakeTensor, tuple, list))


def is_elementwise(node: Any) -> bool:
    """Would a code generator fuse this node with its elementwise neighbours?"""
    if not isinstance(node, fx.Node) or node.op != "call_function" or is_view(node):
        return False
    fused = _may_be_elementwise(node.target) and _packet(node) not in flop_registry
    return fused and grouped_call(node) is None


# A graph asks these of the same few operators thousands of times.


@functools.cache
def _is_among_views(target: Any) -> bool:
    return target in VIEWS or getattr(target, "overloadpacket", None) in VIEWS


@functools.cache
def _may_be_elementwise(target: Any) -> bool:
    packet = getattr(target, "overloadpacket", target)
    return packet not in NOT_ELEMENTWISE and not str(packet).startswith(f"{NAMESPACE}.")


def node_cost(node: fx.Node, size: SizeOf) -> NodeCost:
    """Cost of one node; views and the inside of elementwise chains are free."""
    if is_view(node):
        return NodeCost()
    value = node.meta["val"]
    if is_elementwise(node):
        reads = sum(_bytes(n.meta["val"], size) for n in _sources(node) if not is_elementwise(n))
        outside = any(not is_elementwise(user) for user in _readers(node))
        first = not any(is_elementwise(n) for n in _sources(node))
        return NodeCost(0, reads + (_bytes(value, size) if outside else 0), int(first))
    moved = sum(_bytes(n.meta["val"], size) for n in node.all_input_nodes) + _bytes(value, size)
    grouped = grouped_call(node)
    if grouped is not None:
        flops = 2 * prod(_shape(grouped.rows, size)) * _shape(node, size)[1]
        return NodeCost(flops, _grouped(grouped.rows, grouped.stack, size, moved), 1)
    traffic = TRAFFIC.get(_op_name(node))
    return NodeCost(_product_flops(node, size), moved if traffic is None else traffic(node, size, moved), 1)


def _sources(node: fx.Node) -> list[fx.Node]:
    """Inputs, seen through views."""
    found = []
    for source in node.all_input_nodes:
        while source.op == "call_function" and is_view(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if isinstance(source.meta.get("val"), FakeTensor):
            found.append(source)
    return list(dict.fromkeys(found))


def _readers(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    for user in node.users:
        found.extend(_readers(user) if user.op == "call_function" and is_view(user) else [user])
    return found


def _bytes(value: Any, size: SizeOf) -> Any:
    if isinstance(value, (tuple, list)):
        return sum(_bytes(v, size) for v in value)
    if not isinstance(value, torch.Tensor):
        return 0
    return prod((size(d) for d in stored_dims(value)), start=1) * value.element_size()


def stored_dims(value: torch.Tensor) -> list[Any]:
    """Dims of the memory behind a tensor: a broadcast dim (stride 0) is stored once."""
    return [
        d
        for d, stride in zip(value.shape, value.stride(), strict=True)
        if not (isinstance(stride, int) and stride == 0)
    ]


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _op_name(node: fx.Node) -> str:
    return str(_packet(node))


def _shape(node: Any, size: SizeOf) -> list[Any]:
    return [size(d) for d in node.meta["val"].shape]


def _shapes(argument: Any, size: SizeOf) -> Any:
    """Shapes in place of tensors, as torch hands them to the formulas of its counter."""
    fakes = fx.node.map_arg(argument, lambda node: node.meta["val"])
    return tree_map(lambda v: [size(d) for d in v.shape] if isinstance(v, torch.Tensor) else v, fakes)


def _product_flops(node: fx.Node, size: SizeOf) -> Any:
    if is_call(node, aten.einsum):
        return _einsum_flops(*equation_of(node), [_shape(o, size) for o in node.args[1]])
    if is_call(node, aten.linear, aten.mm, aten.bmm, aten.matmul, dsv3.linear, dsv3.head_linear):
        return 2 * prod(_shape(node, size)) * _shape(node.args[0], size)[-1]
    if is_call(node, dsv3.norm_router):
        return 2 * prod(_shape(node.args[0], size)) * _shape(node.args[3], size)[0]
    if is_call(node, aten.addmm):
        return 2 * prod(_shape(node, size)) * _shape(node.args[1], size)[-1]
    if is_call(node, aten.scaled_dot_product_attention):
        q, k, v = (_shape(argument, size) for argument in node.args[:3])
        return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return 0  # what a graph in the graph costs, nobody changes
    formula = flop_registry.get(_packet(node))  # the vocabulary's own are there too
    return 0 if formula is None else formula(*_shapes(node.args, size), out_val=_shapes(node, size))


def _einsum_flops(letters: Sequence[str], out: str, shapes: list[list[Any]]) -> Any:
    """Pairs from left to right, as torch multiplies; a pair in which nothing is summed is elementwise."""
    known = [(c, s) for own, shape in zip(letters, shapes, strict=True) for c, s in zip(own, shape, strict=True)]
    sizes = dict(sorted(known, key=lambda one: one[1] != 1))  # a dim of size one is broadcast against wider ones
    have, flops = letters[0], 0
    for k in range(1, len(letters)):
        both = dict.fromkeys(have + letters[k])
        later = set("".join(letters[k + 1 :]) + out)
        if any(c not in later for c in both):
            flops += 2 * prod(sizes[c] for c in both)
        have = "".join(c for c in both if c in later)
    return flops


# ---- ops whose traffic is not inputs plus outputs; each is given that sum ---------------------------------------


def _write_cache(node: fx.Node, size: SizeOf, moved: Any) -> Any:
    return 2 * _bytes(node.args[0].meta["val"], size)


def _index_put(node: fx.Node, size: SizeOf, moved: Any) -> Any:
    return 2 * _bytes(node.args[2].meta["val"], size)


def _embedding(node: fx.Node, size: SizeOf, moved: Any) -> Any:
    return 2 * _bytes(node.meta["val"], size)


def _attention_inputs(node: fx.Node, size: SizeOf, moved: Any) -> Any:
    """Of the caches only the new rows move, also where they are results."""
    caches = sum(_bytes(cache.meta["val"], size) for cache in node.args[7:9])
    return moved - caches * (len(node.meta["val"]) // 2) + _bytes(node.args[1].meta["val"], size)


def _routed_swiglu(node: fx.Node, size: SizeOf, moved: Any) -> Any:
    (tokens, _), (_, selected) = (_shape(argument, size) for argument in node.args[:2])
    experts = _shape(node.args[3], size)[0]
    weights = sum(_bytes(stack.meta["val"], size) for stack in (*node.args[3:5], *node.args[7:8]) if stack is not None)
    always = node.args[6] if len(node.args) > 6 else 0
    active = always + _active(experts - always, selected - always, tokens)
    return moved - weights + _share(weights, active / experts)


def _grouped_linear(node: fx.Node, size: SizeOf, moved: Any) -> Any:
    return _grouped(node.args[0], node.args[1], size, moved)


def _grouped(rows: Any, stack: Any, size: SizeOf, moved: Any) -> Any:
    pairs, experts = (_shape(argument, size)[0] for argument in (rows, stack))
    weights = _bytes(stack.meta["val"], size)
    return moved - weights + _share(weights, _active(experts, 1, pairs) / experts)


def _active(experts: Any, selected: Any, tokens: Any) -> Any:
    """Expected number of experts in use when every token picks `selected` different ones evenly."""
    left_out = 1 - sympy.sympify(selected) / experts
    # Of thousands of tokens the exact fraction has thousands of digits.
    return experts * (1 - (float(left_out) if isinstance(tokens, int) else left_out) ** tokens)


def _share(size: Any, part: Any) -> Any:
    """A part of so many bytes, in whole bytes where it is a number."""
    return round(float(size * part)) if sympy.sympify(size * part).is_number else size * part


TRAFFIC: dict[str, Callable[[fx.Node, SizeOf, Any], Any]] = {
    "dsv3.write_cache": _write_cache,
    "dsv3.write_cache_": _write_cache,
    "dsv3.attention_inputs": _attention_inputs,
    "dsv3.attention_inputs_": _attention_inputs,
    "dsv3.routed_swiglu": _routed_swiglu,
    "dsv3.grouped_linear": _grouped_linear,
    "aten.index_put": _index_put,
    "aten.index_put_": _index_put,
    "aten.embedding": _embedding,
}
