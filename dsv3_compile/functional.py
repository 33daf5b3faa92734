"""From a graph that Dynamo traced to the form the passes read: functional ATen calls, inputs with roles.

Dynamo's inputs may be written in place (a static cache); functionally such a write is one more output. `callable_again`
puts the writes back, so that the result can stand in for Dynamo's graph.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import CompileContext, detect_fake_mode
from torch._subclasses.fake_tensor import disable_fake_tensor_cache
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from dsv3_compile.autocast import Unspoken, spell_out_casts, surrounding, switching
from dsv3_compile.owners import owner_of, owners, views_between
from dsv3_compile.tracing import tidy
from passes.base import Role, call, is_call, module_of, placeholders
from passes.nodes import is_tensor, viewed

aten = torch.ops.aten

SWITCHES = (
    torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast,
)  # fmt: skip
NAME_LENGTH = 60  # of an input: Dynamo spells the whole path, wrapper by wrapper


class NotFunctional(ValueError):
    """A graph that cannot be brought to functional form. One line: why."""


Shown = tuple[fx.Node, list[fx.Node]]  # an input, and views, each of the one before


@dataclass(frozen=True)
class Functional:
    """`module` takes Dynamo's inputs and returns the new values of the `written` ones, then Dynamo's outputs."""

    module: fx.GraphModule
    written: tuple[int, ...]  # positions of inputs that are overwritten
    owners: tuple[Hashable, ...]  # of the memory of each returned value, before any pass


def functional(traced: fx.GraphModule) -> Functional:
    """Dynamo's graph with every mutation spelled out, down to ATen calls that autograd would still see whole.

    Sizes stay the symbols that Dynamo gave them. Raises NotFunctional for graphs that hold parameters themselves
    or whose mutations have no functional form.
    """
    if any(True for _ in traced.parameters()):
        raise NotFunctional("the graph holds parameters instead of taking them as inputs")
    if any("functorch" in getattr(node.target, "__module__", "") for node in traced.graph.nodes):
        raise NotFunctional("the graph maps over an axis (vmap), or differentiates")  # torch stops half-way through it
    inputs = traced.graph.find_nodes(op="placeholder")
    values = [node.meta["example_value"] for node in inputs]
    mode = detect_fake_mode(values)
    try:
        cache = disable_fake_tensor_cache(mode) if mode else contextlib.nullcontext()
        with torch.no_grad(), cache, switching(traced) as acting:
            exported, signature = aot_export_module(
                acting, values, trace_joint=False, pre_dispatch=True, decompositions={}
            )
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise NotFunctional(f"torch cannot make it functional: {str(error).strip().splitlines()[0]}") from error
    if signature.buffers_to_mutate:
        raise NotFunctional("the graph overwrites a buffer of its own")
    module = _rebuilt(exported, inputs)
    order = {name: position for position, name in enumerate(signature.user_inputs)}
    written = tuple(order[name] for name in signature.user_inputs_to_mutate.values())
    for position in written:
        module.graph.find_nodes(op="placeholder")[position].meta["role"] = Role.INPUT
    return Functional(module, written, owners(module.graph))


def _rebuilt(exported: fx.GraphModule, originals: Sequence[fx.Node]) -> fx.GraphModule:
    """The same graph with readable input names, roles, and of every stack trace the frames of the model.

    Without switches: nobody trains, and what autocast casts is cast by the graph.
    """
    graph = fx.Graph()
    for node in exported.graph.find_nodes(op="get_attr"):
        node.meta["val"] = _fake(exported, node)
    try:
        spell_out_casts(exported.graph, surrounding())
    except Unspoken as problem:
        raise NotFunctional(str(problem)) from problem
    copies: dict[fx.Node, fx.Node] = {}
    remaining = iter(originals)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            original = next(remaining)
            copies[node] = graph.placeholder(short_name(original.name))
            copies[node].target = copies[node].name  # which is told apart where two short names are the same
            copies[node].meta = {
                "val": node.meta["val"], "role": role_of(original), "stays": _stays(original),
                "source": getattr(original, "_dynamo_source", None),
            }  # fmt: skip
        elif node.op == "output":
            graph.output(tuple(fx.node.map_arg(node.args[0], copies.__getitem__)))
        elif node.target not in SWITCHES:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = tidy(node.meta)
    return module_of(exported, graph)


def _fake(exported: fx.GraphModule, node: fx.Node) -> Any:
    """A constant of the graph as the fake value that its readers expect; None for a graph of its own."""
    value = getattr(exported, str(node.target))
    if not isinstance(value, Tensor):
        return None
    mode = next(n.meta["val"].fake_mode for n in exported.graph.nodes if hasattr(n.meta.get("val"), "fake_mode"))
    return mode.from_tensor(value, static_shapes=True)


def why_unreadable(found: Functional) -> str:
    """Why no pass may look at a graph, or ''."""
    for node in found.module.graph.nodes:
        held = getattr(found.module, str(node.target)) if node.op == "get_attr" else None
        if not isinstance(held, (Tensor, fx.GraphModule, type(None))):
            return f"the graph holds what is no tensor: {node.target}"
        if is_call(node, aten.as_strided, aten.as_strided_scatter, aten.as_strided_copy):
            return f"{node.name} reads memory, in whatever order values lie there"
        if any(map(free_unbacked_symbols, tree_leaves(node.meta.get("val")))):
            return (
                f"the size of {node.name} depends on data; where capture_dynamic_output_shape_ops is off, graphs end"
                " there and passes see the parts"
            )
    return ""


def role_of(placeholder: fx.Node) -> Role:
    """Parameters and buffers of a module are weights; of anything else handed in nothing is known."""
    if not isinstance(placeholder.meta["example_value"], Tensor):
        return Role.SIZE
    if isinstance(placeholder.meta["example_value"], nn.Parameter):
        return Role.WEIGHT
    return Role.WEIGHT if from_module(placeholder) else Role.INPUT


def from_module(placeholder: fx.Node) -> bool:
    """Does an input of Dynamo's belong to a module, and not to the call?"""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    guard = None if source is None else source.guard_source
    return guard is not None and (guard.is_unspecialized_nn_module() or guard.is_specialized_nn_module())


def _stays(placeholder: fx.Node) -> bool:
    """Will an input of Dynamo's lie at the same address in the next call? Of a module, or marked by its owner."""
    return bool((placeholder.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))


def short_name(name: str) -> str:
    """`l_self_modules_layers_modules_0_parameters_weight_` → `layers_0_weight`."""
    name = re.sub(r"^l_+(self_+)?|_+$", "", name)
    name = re.sub(r"(^|_)(modules|parameters|buffers)(?=_)", "", name).strip("_")
    return name[-NAME_LENGTH:].lstrip("_0123456789") or "input"


def callable_again(rewritten: Functional) -> fx.GraphModule:
    """A graph with Dynamo's calling convention: inputs overwritten in place, only Dynamo's outputs returned.

    Results share memory with inputs and with each other where they did before the passes, and nowhere else.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(rewritten.module.graph, copies)
    values = cast(tuple[Any, ...], results)
    inputs = placeholders(graph)
    targets = [inputs[position] for position in rewritten.written]
    updates = list(zip(values, targets, rewritten.owners, strict=False))
    overwritten = {target for value, target, _ in updates if value is not target}  # others were written in place
    returned, owned = list[Any](), dict[fx.Node, Hashable]()
    shown: dict[int, Shown] = {}  # by place among the results
    for value, owner in zip(values[len(targets) :], rewritten.owners[len(targets) :], strict=True):
        place = _shown_input(value, owner, updates) if is_tensor(value) else None
        if place is not None:
            shown[len(returned)] = place
        elif is_tensor(value):
            now = owner_of(value)
            kept = now not in overwritten and _lies_as_before(now, owner, inputs, owned)
            value = value if kept else snapshot(graph, value)
        returned.append(value)
    # What an input held before is read before the first of them is overwritten.
    news = [snapshot(graph, v) if v is not t and owner_of(v) in overwritten else v for v, t, _ in updates]
    for value, target in zip(news, targets, strict=True):
        if value is not target:
            call(graph, aten.copy_.default, target, value, like=target)
    for number, (target, views) in shown.items():
        returned[number] = _view_again(graph, target, views)
    graph.output(tuple(returned))
    return _as_from_dynamo(fx.GraphModule(rewritten.module, graph))


def _as_from_dynamo(module: fx.GraphModule) -> fx.GraphModule:
    """Tell Inductor which inputs stay where they are, in Dynamo's terms, the only ones it reads.

    Without, a recorded graph (mode="reduce-overhead") has a copy of every weight and fills it at every call, and a call
    looks at every address.
    """
    module.meta["dynamo_compile_id"] = CompileContext.current_compile_id()
    # Parameters are inputs here; what the graph holds itself are constants.
    held = module.named_buffers(remove_duplicate=False)
    module._param_name_to_source = {name: ConstantSource(name) for name, _ in held}
    for node in placeholders(module.graph):
        node._dynamo_source = node.meta.get("source")
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"} if node.meta.get("stays") else {}
    return module


def _shown_input(value: fx.Node, owner: Hashable, updates: Sequence[tuple[fx.Node, fx.Node, Hashable]]) -> Shown | None:
    """The input, and the views of it, that a result is where it is its new value: the caller may write to either."""
    for new, target, known in updates:
        views = views_between(new, value) if known == owner and isinstance(known, str) else None
        if views is not None:
            return target, views
    return None


def _view_again(graph: fx.Graph, target: fx.Node, views: Sequence[fx.Node]) -> fx.Node:
    """The same views, but of `target`."""
    last = target
    for view in views:
        source = viewed(view)
        last = graph.node_copy(view, lambda node, source=source, last=last: last if node is source else node)
    return last


def _lies_as_before(now: fx.Node, owner: Hashable, inputs: list[fx.Node], owned: dict[fx.Node, Hashable]) -> bool:
    """Is `now` the memory that a result lay in before the passes? owned: those of the results that came earlier."""
    if now in inputs:
        return owner == inputs.index(now)
    return owner == (now.name if now.op == "get_attr" else owned.setdefault(now, owner))


def snapshot(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """A copy of its own. Inductor takes aten.clone of an input that it overwrites for the input (pytorch#198131)."""
    return call(graph, torch.ops.prims.clone.default, value, like=value)
