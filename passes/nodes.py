"""Questions about nodes that all local rewrites ask, and the replacing and erasing of nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from codegen.ops import NAMESPACE
from passes.base import Role, call, is_call, placeholders, same_size, shape_of

aten = torch.ops.aten

CASTS = (aten._to_copy, aten.to)
COPIES = (aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy)
RESHAPES = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten)
VIEWS = (*RESHAPES, aten.expand, aten.slice)
ASSERTIONS = (aten._assert_tensor_metadata,)
SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)


def steps_between(start: fx.Node, end: fx.Node) -> int:
    """The fewest edges between two nodes, against or along the flow: how far a pass has come from where it began."""
    reached, edge, steps = {start}, [start], 0
    while end not in reached and edge:
        edge = [n for node in edge for n in (*node.all_input_nodes, *node.users) if n not in reached]
        reached |= set(edge)
        steps += 1
    return steps


def over_last_axis(node: fx.Node, position: int, default: int | None = None) -> bool:
    """Does the call's axis argument, at `position`, name the last axis of its input alone?"""
    axis = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    axes = axis if isinstance(axis, (list, tuple)) else (axis,)
    last = len(shape_of(node.args[0])) - 1
    return len(axes) == 1 and axes[0] in (-1, last)


def is_tensor(value: Any) -> bool:
    """Is it a node that is a tensor, and not a number or a free size?"""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def vocabulary_op(node: Any) -> str | None:
    """The name of the op of our vocabulary that a node calls, or None."""
    target = node.target if isinstance(node, fx.Node) else None
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return None
    return target._schema.name.removeprefix(f"{NAMESPACE}::")


def is_pointwise(node: fx.Node) -> bool:
    """Does torch say that every number of the result depends on those at its own place alone?"""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_random(node: fx.Node) -> bool:
    """Does it draw numbers, so that running it again gives another value?"""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if is_call(node, aten.scaled_dot_product_attention):
        return (node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)) != 0.0
    return not is_call(node, aten.dropout) or bool(node.args[1] != 0.0 and node.args[2])


def same_shape(left: fx.Node, right: fx.Node) -> bool:
    a, b = shape_of(left), shape_of(right)
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def dtype_of(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def settled(value: Any) -> Any:
    """The node behind copies, casts to the same dtype and views of the same shape."""
    while is_call(value, *CASTS, *COPIES, *VIEWS):
        source = value.args[0]
        if dtype_of(source) != dtype_of(value) or not same_shape(source, value):
            return value
        value = source
    return value


def uncast(value: Any) -> Any:
    """The node behind casts that lose nothing."""
    value = settled(value)
    while is_call(value, *CASTS) and widens(dtype_of(value.args[0]), dtype_of(value)):
        value = settled(value.args[0])
    return value


def is_rounding(node: Any) -> bool:
    """Is it a cast of floats to floats? One to whole numbers or to bools gives other values."""
    return is_call(node, *CASTS) and all(dtype_of(one).is_floating_point for one in (node, node.args[0]))


def widens(old: torch.dtype, new: torch.dtype) -> bool:
    return old.is_floating_point and new.is_floating_point and torch.promote_types(old, new) == new


def viewed(node: fx.Node) -> fx.Node | None:
    """The argument that the schema says the results share memory with."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # getitem and the like: part of another node's results
        return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if not any(one.alias_info for one in schema.returns):
        return None
    shared = (value for value, one in zip(node.args, schema.arguments, strict=False) if one.alias_info)
    return next((value for value in shared if isinstance(value, fx.Node)), None)


def of_positions(graph: fx.Graph) -> set[fx.Node]:
    """What is computed of integers and vectors alone, such as positions and frequencies: the same for every layer."""
    found = set[fx.Node]()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function":
            same = found.issuperset(node.all_input_nodes)
        else:
            same = not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2
        if same and node.op != "output":
            found.add(node)
    return found


def users(node: fx.Node) -> list[fx.Node]:
    """Who reads the node, the capture's assertions about its dtype left out."""
    return [user for user in node.users if not is_call(user, *ASSERTIONS)]


def readers(node: fx.Node) -> list[fx.Node]:
    """Users of the node's value, also those that read it through copies and views of the same shape."""
    return [r for user in users(node) for r in (readers(user) if settled(user) is not user else [user])]


def constant_of(value: Any) -> float | None:
    """The number that a scalar or a filled tensor holds everywhere."""
    value = settled(value)
    if isinstance(value, (int, float)):
        return float(value)
    if is_call(value, aten.full, aten.full_like):
        return float(value.args[1])
    if is_call(value, aten.scalar_tensor):
        return float(value.args[0])
    if isinstance(value, fx.Node) and value.op == "get_attr":
        held = getattr(value.graph.owning_module, str(value.target))
        return float(held) if isinstance(held, torch.Tensor) and held.numel() == 1 else None
    if is_call(value, aten.zeros, aten.zeros_like, aten.new_zeros):
        return 0.0
    return 1.0 if is_call(value, aten.ones, aten.ones_like, aten.new_ones) else None


def counts_up(node: Any, start: int) -> bool:
    """Is it start, start + 1, …?"""
    if not is_call(node, aten.arange) or len(shape_of(node)) != 1:
        return False
    bounds = node.args if len(node.args) > 1 else (0, *node.args)
    return bounds[0] == start and (len(bounds) < 3 or bounds[2] == 1)


def weights_only(node: fx.Node) -> bool:
    """Is the value computed from weights alone?"""
    seen, stack = {node}, [node]
    while stack:
        one = stack.pop()
        is_weight = one.op == "placeholder" and one.meta["role"] is Role.WEIGHT
        if not one.all_input_nodes and not is_weight:
            return False
        stack.extend(source for source in one.all_input_nodes if source not in seen)
        seen.update(one.all_input_nodes)
    return True


def from_weights(graph: fx.Graph) -> frozenset[fx.Node]:
    """The weights, and all calls of which `weights_only` is true."""
    found = set(placeholders(graph, Role.WEIGHT))
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def is_division(node: Any) -> bool:
    """Is it x / y? What is rounded to whole numbers is not."""
    return is_call(node, aten.div) and node.kwargs.get("rounding_mode") is None


def why_no_product(linear: fx.Node) -> str | None:
    """Why a linear is something else than the product of its input with a weight [O, D], or None."""
    if len(linear.args) > 2 and linear.args[2] is not None:
        return f"{linear.name} has a bias"
    if not weights_only(linear.args[1]):
        return f"{linear.name} is no product with a weight"
    return None if len(shape_of(linear.args[1])) == 2 else f"the weight of {linear.name} is no matrix"


def substitute(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """Let the users of `old` read `new`, cast to the dtype they expect, and erase what is dead now."""
    if dtype_of(new) != dtype_of(old):
        for user in users(old):
            if is_call(user, *CASTS) and dtype_of(user) == dtype_of(new):
                user.replace_all_uses_with(new)
                graph.erase_node(user)
        with graph.inserting_after(new):
            replacement = cast(graph, new, dtype_of(old)) if users(old) else new
    else:
        replacement = new
    old.replace_all_uses_with(replacement)
    erase_dead(graph, old)


def keeps(node: fx.Node, dtype: torch.dtype) -> bool:
    """Does anybody see more of the node's value than `dtype` holds?"""
    if widens(dtype_of(node), dtype):
        return False
    return any(not is_call(user, *CASTS, *VIEWS) or keeps(user, dtype) for user in users(node))


def cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if dtype_of(node) == dtype:
        return node
    return call(graph, aten._to_copy.default, node, dtype=dtype, like=node)


def erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Erase the node and what only it kept alive, so that nothing counts as used by dead code."""
    if users(node) or node.op in ("placeholder", "output"):
        return
    for assertion in list(node.users):
        graph.erase_node(assertion)
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        if not source._erased:
            erase_dead(graph, source)


def bring_before(place: fx.Node, weight: fx.Node) -> None:
    """Move what a weight is computed from before `place`, where it stands behind it."""
    if weight.op == "placeholder" or weight < place:
        return
    for source in weight.all_input_nodes:
        bring_before(place, source)
    place.prepend(weight)


def is_probability(node: fx.Node) -> bool:
    """Is the node a softmax, possibly cast afterwards?"""
    return softmax_behind(node) is not None


def softmax_behind(node: fx.Node) -> fx.Node | None:
    """The softmax behind rounding of its result, or None."""
    while is_rounding(node) or is_call(node, aten.clone):
        node = node.args[0]
    return node if is_call(node, *SOFTMAX) else None
