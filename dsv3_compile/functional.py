"""From a graph that Dynamo traced to the form the passes read: functional ATen calls, inputs with roles.

Dynamo's inputs may be written in place (a static cache); functionally such a write is one more output. `callable_again`
puts the writes back, so that the result can stand in for Dynamo's graph.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import disable_fake_tensor_cache

from dsv3_compile.tracing import tidy
from passes.base import Role, module_of

aten = torch.ops.aten

NAME_LENGTH = 60  # of an input: Dynamo spells the whole path, wrapper by wrapper


class NotFunctional(ValueError):
    """A graph that cannot be brought to functional form. One line: why."""


@dataclass(frozen=True)
class Functional:
    """`module` takes Dynamo's inputs and returns the new values of the `written` ones, then Dynamo's outputs."""

    module: fx.GraphModule
    written: tuple[int, ...]  # positions of inputs that are overwritten


def functional(traced: fx.GraphModule) -> Functional:
    """Dynamo's graph with every mutation spelled out, down to ATen calls that autograd would still see whole.

    Sizes stay the symbols that Dynamo gave them. Raises NotFunctional for graphs that hold parameters themselves
    or whose mutations have no functional form.
    """
    if any(True for _ in traced.parameters()):
        raise NotFunctional("the graph holds parameters instead of taking them as inputs")
    inputs = traced.graph.find_nodes(op="placeholder")
    values = [node.meta["example_value"] for node in inputs]
    mode = detect_fake_mode(values)
    try:
        with torch.no_grad(), disable_fake_tensor_cache(mode) if mode else contextlib.nullcontext():
            exported, signature = aot_export_module(
                traced, values, trace_joint=False, pre_dispatch=True, decompositions={}
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
    return Functional(module, written)


def _rebuilt(exported: fx.GraphModule, originals: Sequence[fx.Node]) -> fx.GraphModule:
    """The same graph with readable input names, roles, and of every stack trace the frames of the model."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    remaining = iter(originals)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            original = next(remaining)
            copies[node] = graph.placeholder(short_name(original.name))
            copies[node].meta = {"val": node.meta["val"], "role": role_of(original)}
        elif node.op == "output":
            graph.output(tuple(fx.node.map_arg(node.args[0], copies.__getitem__)))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = tidy(node.meta)
            if node.op == "get_attr" and "val" not in copies[node].meta:
                copies[node].meta["val"] = _fake(exported, node)
    return module_of(exported, graph)


def _fake(exported: fx.GraphModule, node: fx.Node) -> Any:
    """A constant of the graph as the fake value that its readers expect."""
    mode = next(n.meta["val"].fake_mode for n in exported.graph.nodes if hasattr(n.meta.get("val"), "fake_mode"))
    return mode.from_tensor(getattr(exported, str(node.target)), static_shapes=True)


def role_of(placeholder: fx.Node) -> Role:
    """Parameters and buffers of a module are weights; of anything else handed in nothing is known."""
    if not isinstance(placeholder.meta["example_value"], Tensor):
        return Role.SIZE
    if isinstance(placeholder.meta["example_value"], nn.Parameter):
        return Role.WEIGHT
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    guard = None if source is None else source.guard_source
    from_module = guard is not None and (guard.is_unspecialized_nn_module() or guard.is_specialized_nn_module())
    return Role.WEIGHT if from_module else Role.INPUT


def short_name(name: str) -> str:
    """`l_self_modules_layers_modules_0_parameters_weight_` → `layers_0_weight`."""
    name = re.sub(r"^l_+(self_+)?|_+$", "", name)
    name = re.sub(r"(^|_)(modules|parameters|buffers)(?=_)", "", name).strip("_")
    return name[-NAME_LENGTH:].lstrip("_0123456789") or "input"


def callable_again(rewritten: Functional) -> fx.GraphModule:
    """A graph with Dynamo's calling convention: inputs overwritten in place, only Dynamo's outputs returned."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(rewritten.module.graph, copies)
    values = cast(tuple[Any, ...], results)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    written = [(values[k], inputs[position]) for k, position in enumerate(rewritten.written)]
    overwritten = {target for value, target in written if value is not target}
    # What an input held before is read before the first of them is overwritten.
    before = {value: graph.call_function(aten.clone.default, (value,)) for value in values if value in overwritten}
    for value, clone in before.items():
        clone.meta["val"] = value.meta["val"]
    for value, target in written:
        if value is target:  # written in place
            continue
        copy = graph.call_function(aten.copy_.default, (target, before.get(value, value)))
        copy.meta["val"] = target.meta["val"]
    # An output that is the new value of an input is that input: the caller may rely on sharing its memory.
    shared = {**before, **{value: target for value, target in reversed(written) if value not in before}}
    graph.output(tuple(shared.get(value, value) for value in values[len(rewritten.written) :]))
    return fx.GraphModule(rewritten.module, graph)
