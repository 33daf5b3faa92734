"""What pass tests capture: layers of the family with odd sizes, layers of models, and small modules."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import sympy
import torch
from torch import Tensor, fx, nn

import codegen.ops  # noqa: F401  defines torch.ops.dsv3
from codegen.targets import TARGETS
from dsv3_compile.capture import layer_inputs as model_layer_inputs
from dsv3_compile.tracing import Input, capture_fake, capture_module
from model_def.config import ModelConfig
from model_def.decoder import Layer
from model_def.specs import DenseSpec, LayerSpec, MlaSpec, MoeSpec, RoutingSpec
from passes.base import Context, Role, Workload
from passes.canonicalise import Canonicalise
from passes.inputs import draw, recipes
from passes.verify import clone

CONTEXT = Context("prefill", TARGETS["cpu"], Workload(3, 5, 11))

V3_ROUTING = RoutingSpec(12, 3, "sigmoid", True, 4, 2, "top2", -math.inf, True, 2.5)
V3_ONE_GROUP = RoutingSpec(7, 3, "sigmoid", True, 1, 1, "top2", -math.inf, True, 2.827)
V2_GREEDY = RoutingSpec(7, 2, "softmax", False, 1, 1, "max", 0.0, False, 1.0)
V2_GROUPED = RoutingSpec(15, 4, "softmax", False, 5, 2, "max", 0.0, False, 16.0)

MLA = MlaSpec(3, 13, 11, 6, 4, 5, 0.31, 1e-6)
MLA_WITHOUT_QUERY_RANK = dataclasses.replace(MLA, q_lora_rank=None)
HIDDEN = 14


def moe_layer(routing: RoutingSpec, attention: MlaSpec = MLA) -> LayerSpec:
    return LayerSpec(HIDDEN, attention, MoeSpec(routing, 9, 10), 1e-5)


DENSE_LAYER = LayerSpec(HIDDEN, MLA, DenseSpec(17), 1e-5)


def tensor(name: str, *shape: int | str, dtype: torch.dtype = torch.float32, upper: int | str | None = None) -> Input:
    return Input(name, Role.ACTIVATION, shape, dtype, upper)


def layer_inputs(spec: LayerSpec, queries: int | str = "S", dtype: torch.dtype = torch.float32) -> list[Input]:
    pairs = spec.attention.qk_rope_head_dim // 2  # type: ignore[union-attr]
    caches = [
        Input(name, Role.CACHE, ("B", "T", *width), dtype) for name, width in spec.attention.cache_widths().items()
    ]
    return [
        tensor("x_BSD", "B", queries, spec.hidden, dtype=dtype),
        tensor("cos_BSF", "B", queries, pairs),
        tensor("sin_BSF", "B", queries, pairs),
        tensor("positions_BS", "B", queries, dtype=torch.int64, upper="T"),
        *caches,
    ]


def layer_graph(spec: LayerSpec, queries: int | str = "S", dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """A decoder layer, captured and canonical."""
    return clone(_captured_layer(spec, queries, dtype))


@functools.cache  # capture takes seconds
def _captured_layer(spec: LayerSpec, queries: int | str, dtype: torch.dtype) -> fx.GraphModule:
    return graph_of(Layer(spec, dtype), layer_inputs(spec, queries, dtype))


def model_layer(config: ModelConfig, layer: int, dtype: torch.dtype) -> fx.GraphModule:
    """One decoder layer of a model as a graph."""
    return clone(_captured_model_layer(config, layer, dtype))


@functools.cache  # capture takes seconds
def _captured_model_layer(config: ModelConfig, layer: int, dtype: torch.dtype) -> fx.GraphModule:
    spec = config.layer(layer)
    return capture_fake(functools.partial(Layer, spec, dtype), model_layer_inputs(config, spec, dtype))


def module_graph(module: nn.Module, *inputs: Input) -> fx.GraphModule:
    """A module as it was captured."""
    return capture_module(module, inputs)


def graph_of(module: nn.Module, inputs: Sequence[Input]) -> fx.GraphModule:
    """A module, captured and canonical."""
    graph_module = capture_module(module, inputs)
    Canonicalise().run(graph_module, CONTEXT)
    return graph_module


def random_inputs(module: fx.GraphModule, sizes: Mapping[sympy.Symbol, int], seed: int) -> dict[str, Tensor]:
    """Seeded inputs of a captured graph by placeholder name."""
    return draw(recipes(module, sizes), seed)
