"""Layers of the family as the passes that fuse launches find them."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from codegen.targets import target
from model_def.specs import LayerSpec
from passes.base import Context, Role, placeholders, sweep
from passes.pipeline import DEFAULT_PIPELINE
from passes.verify import clone
from tests.passes.capture import DENSE_LAYER, MLA_WITHOUT_QUERY_RANK, V2_GREEDY, V3_ROUTING, layer_graph, moe_layer
from tests.passes.harness import LONG


def with_shared(layer: LayerSpec, width: int) -> LayerSpec:
    return dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, shared_width=width))  # type: ignore[type-var]


# One shared expert, and two; routed ones are 9 wide.
V3_LAYER = with_shared(moe_layer(V3_ROUTING), 9)
V2_LAYER = with_shared(moe_layer(V2_GREEDY, MLA_WITHOUT_QUERY_RANK), 18)
LAYERS = {"v3": V3_LAYER, "v2": V2_LAYER, "dense": DENSE_LAYER}


def layer_before(name: str, layer: LayerSpec, phase: str = "decode", on: str = "sm_90") -> fx.GraphModule:
    """A layer in 16 bits, as far as the pass of this name."""
    return clone(_stages(layer, phase, on)[name])


@functools.cache
def _stages(layer: LayerSpec, phase: str, on: str) -> dict[str, fx.GraphModule]:
    """The layer before every pass, by the pass's name."""
    graph = layer_graph(layer, 1 if phase == "decode" else "S", torch.float16)
    context, found = Context(phase, target(on), LONG[phase]), {}
    for one in DEFAULT_PIPELINE:
        found[one.name()] = clone(graph)
        for weight in placeholders(found[one.name()].graph, Role.WEIGHT):
            weight.meta.pop("bind", None)  # what is bound is a weight like any other for the passes behind
        with enable_python_dispatcher():
            one.run(graph, context)
        sweep(graph)
    return found
