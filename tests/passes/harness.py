"""Running one pass on a graph, certified in float64, and what it reports."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from codegen.targets import target
from passes.base import Context, Outcome, Pass, Workload, is_call, sweep
from passes.bisection import relative_error
from passes.inputs import size_values
from passes.verify import EXACT, Specimen, clone, run_float64
from tests.passes.capture import CONTEXT, random_inputs

LONG = {"prefill": Workload(1, 4096, 4096), "decode": Workload(1, 1, 4096), "any": Workload(0, 0, 0)}


def apply(
    one: Pass, graph: fx.GraphModule, phase: str = "decode", on: str = "sm_90", workload: Workload | None = None
) -> Outcome:
    """Run a pass, for a decode step on Hopper unless told otherwise, under the compiler's own certificate: equal to
    1e-10 in float64 on random ragged inputs, or CertificateError."""
    specimen, before = Specimen.of(graph), clone(graph)
    outcome = one.run(graph, Context(phase, target(on), workload or LONG[phase]))
    sweep(graph)
    specimen.certify(before, one.name())
    return outcome


def certified(rewrite: Pass, graph_module: fx.GraphModule, seeds: Sequence[int] = (0, 1)) -> Outcome:
    """Run a pass, for a prompt on the CPU, and compare the graph before and after it without the compiler's help."""
    before = clone(graph_module)
    outcome = rewrite.run(graph_module, CONTEXT)
    sizes = size_values(before)
    for seed in seeds:
        inputs = random_inputs(before, sizes, seed)
        expected, found = (tree_leaves(run_float64(module, inputs)[0]) for module in (before, graph_module))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.isfinite(other).all() and other.abs().max() > 0
            assert relative_error(one, other) <= EXACT
    return outcome


def untouched(rewrite: Pass, graph_module: fx.GraphModule) -> str:
    """Run one pass that must leave the graph as it is, and return the reason it gives, '' for none.

    Numbers at the end of node names differ from one torch to the next and are cut off.
    """
    before = [node.name for node in graph_module.graph.nodes]
    outcome = rewrite.run(graph_module, CONTEXT)
    assert not outcome.matches
    assert [node.name for node in graph_module.graph.nodes] == before
    assert len(outcome.refusals) <= 1, outcome.refusals
    return re.sub(r"_\d+\b", "", outcome.refusals[0].reason) if outcome.refusals else ""


def count(graph: fx.GraphModule, *targets: object) -> int:
    return sum(is_call(node, *targets) for node in graph.graph.nodes)


def reasons(outcome: Outcome) -> str:
    return "; ".join(refusal.reason for refusal in outcome.refusals)
