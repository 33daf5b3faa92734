"""Run one pass on a small module: capture, certify in float64, report."""

from __future__ import annotations

from torch import fx, nn

from codegen.targets import target
from dsv3_compile.capture import Input, capture_module, layer_inputs
from model_def.config import ModelConfig
from model_def.decoder import Layer
from passes.base import Context, Outcome, Pass, Workload, is_call, sweep
from passes.verify import Specimen, clone

LONG = {"prefill": Workload(1, 4096, 4096), "decode": Workload(1, 1, 4096)}


def layer_graph(config: ModelConfig, layer: int, dtype: object) -> fx.GraphModule:
    """One decoder layer as a graph."""
    spec = config.layer(layer)
    return capture_module(Layer(spec, dtype), layer_inputs(config, spec, dtype))


def module_graph(module: nn.Module, *inputs: Input) -> fx.GraphModule:
    return capture_module(module, inputs)


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
