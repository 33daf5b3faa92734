"""Run one pass on a small module: capture once, certify in float64, report."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx, nn

from codegen.targets import target
from dsv3_compile.capture import layer_inputs
from dsv3_compile.tracing import Input, capture_fake, capture_module
from model_def.config import ModelConfig
from model_def.decoder import Layer
from passes.base import Context, Outcome, Pass, Workload, is_call, sweep
from passes.verify import Specimen, clone
from tests.passes.mla import Mla, inputs

LONG = {"prefill": Workload(1, 4096, 4096), "decode": Workload(1, 1, 4096), "any": Workload(0, 0, 0)}


def layer_graph(config: ModelConfig, layer: int, dtype: torch.dtype) -> fx.GraphModule:
    """One decoder layer of a model as a graph."""
    return clone(_captured_layer(config, layer, dtype))


def mla_graph(variant: type[Mla] = Mla, queries: int | str = 1, **options: Any) -> fx.GraphModule:
    """One of the hand-written attentions as a graph; `options` are its sizes."""
    return clone(_captured_mla(variant, queries, tuple(sorted(options.items()))))


def module_graph(module: nn.Module, *inputs: Input) -> fx.GraphModule:
    return capture_module(module, inputs)


@functools.cache  # capture takes seconds
def _captured_layer(config: ModelConfig, layer: int, dtype: torch.dtype) -> fx.GraphModule:
    spec = config.layer(layer)
    return capture_fake(functools.partial(Layer, spec, dtype), layer_inputs(config, spec, dtype))


@functools.cache
def _captured_mla(variant: type[Mla], queries: int | str, options: tuple[tuple[str, Any], ...]) -> fx.GraphModule:
    sizes = {name: size for name, size in options if name in ("hidden", "rank", "rope")}
    return capture_module(variant(**dict(options)), inputs(queries=queries, **sizes))


def apply(
    one: Pass, graph: fx.GraphModule, phase: str = "decode", on: str = "sm_90", workload: Workload | None = None
) -> Outcome:
    """Run a pass and certify it: equal to 1e-10 in float64 on random ragged inputs, or CertificateError."""
    specimen, before = Specimen.of(graph), clone(graph)
    outcome = one.run(graph, Context(phase, target(on), workload or LONG[phase]))
    sweep(graph)
    specimen.certify(before, one.name())
    return outcome


def count(graph: fx.GraphModule, *targets: object) -> int:
    return sum(is_call(node, *targets) for node in graph.graph.nodes)


def reasons(outcome: Outcome) -> str:
    return "; ".join(refusal.reason for refusal in outcome.refusals)
