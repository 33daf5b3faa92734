"""No wrong rewrite gets past its certificate: what every pass writes is spoiled in every way we know."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import fx

from codegen.targets import target
from dsv3_compile.capture import capture
from dsv3_compile.program import BlockGraph
from passes.base import Context, Outcome, Pass, Workload, sweep
from passes.pipeline import DEFAULT_PIPELINE, Pipeline
from passes.verify import CertificateError, Specimen, clone
from tests.dsv3_compile import tiny
from tests.passes.spoiling import Change, changes

BLOCKS = (("embed", "prefill"), ("dense", "decode"), ("moe", "prefill"), ("moe", "decode"), ("head", "decode"))
WORKLOADS = {"prefill": Workload(1, 4096, 4096), "decode": Workload(8, 1, 4096)}


@dataclass(frozen=True)
class Stage:
    """One pass on one block: the graphs around it, and the specimen as the pass found it."""

    name: str
    label: str
    before: fx.GraphModule
    after: fx.GraphModule
    specimen: Specimen


@functools.cache
def blocks() -> dict[tuple[str, str], BlockGraph]:
    """In 16 bits: only there the router, which computes in 32, is no sibling of the experts' products."""
    return capture(tiny.TINY, torch.float16)


@functools.cache
def stages(block: str, phase: str) -> list[Stage]:
    """Every pass that changed the block; captured, run and evaluated once."""
    module = clone(blocks()[block, phase].module)
    context = Context(phase, target("sm_90"), WORKLOADS[phase])
    specimen = Specimen.of(module)
    found = []
    for one in DEFAULT_PIPELINE:
        before, as_found = clone(module), replace(specimen)
        one.run(module, context)
        sweep(module)
        label = f"{one.name()} on {block} {phase}"
        specimen.certify(before, label)
        if str(module.graph) != str(before.graph):
            found.append(Stage(one.name(), label, before, clone(module), as_found))
    return found


def mutants(stage: Stage) -> Iterator[tuple[str, str, Change]]:
    """(node, what is wrong with it, how to do it) for the nodes that the pass wrote or rewired."""
    before = {node.name: node.format_node() for node in stage.before.graph.nodes}
    for node in stage.after.graph.nodes:
        if before.get(node.name) != node.format_node() and node.users:
            for what, change in changes(node):
                yield node.name, what, change


def spoiled(stage: Stage, node: str, change: Change) -> fx.GraphModule:
    mutant = clone(stage.after)
    change(mutant.graph, next(n for n in mutant.graph.nodes if n.name == node))
    return mutant


def suspects(stage: Stage, mutant: fx.GraphModule, node: str, what: str) -> set[str]:
    """What a certificate may rightly name: the spoiled node, what stands in its place, and all computed from them.

    Of two operands that were swapped, each stands in the other's place.
    """
    sound = {n.name: n.format_node() for n in stage.after.graph.nodes}
    found = {node}
    for n in mutant.graph.nodes:
        # Left out: one of its operands stands in its place.
        if n.name == node and (not n.users or (" and " in what and what.endswith("swapped"))):
            found |= {m.name for m in n.all_input_nodes}
        if (sound.get(n.name) != n.format_node() and n.op != "output") or found & {m.name for m in n.all_input_nodes}:
            found.add(n.name)
    return found


@pytest.mark.parametrize(("block", "phase"), BLOCKS)
def test_no_mutant_survives(block, phase):
    survivors, misplaced = [], []
    for stage in stages(block, phase):
        for node, what, change in mutants(stage):
            mutant = spoiled(stage, node, change)
            try:
                replace(stage.specimen, module=mutant).certify(stage.before, stage.label)
                survivors.append(f"{stage.label}: {node}: {what}")
            except CertificateError as error:
                assert str(error).startswith(stage.label)
                place = error.failure.departure
                if place is None or place.node not in suspects(stage, mutant, node, what):
                    misplaced.append(f"{stage.label}: {node}: {what}: found at {place}")
    assert survivors == []
    assert misplaced == []


def test_every_pass_is_spoiled_in_some_way():
    tried = {stage.name for key in BLOCKS for stage in stages(*key) if next(mutants(stage), None)}
    assert tried == {one.name() for one in DEFAULT_PIPELINE}


@dataclass(frozen=True)
class Planted(Pass):
    """A pass, and then one change to what it wrote."""

    one: Pass
    node: str
    change: Change

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome = self.one.run(graph_module, context)
        self.change(graph_module.graph, next(n for n in graph_module.graph.nodes if n.name == self.node))
        return outcome


@pytest.mark.parametrize(
    ("name", "op", "what"),
    [
        ("fuse-attention", "mla_attention", "scale "),  # 1 / sqrt(c + r) in place of 1 / sqrt(p + r)
        ("fuse-attention", "mla_attention", "positions_BS one too small"),
        ("fuse-routing", "route", "masked -inf made 0"),
        ("fuse-routing", "route", "normalise flipped"),
        ("fuse-routing", "route", "scale 2.5"),
        ("fuse-rotary", "rotary", "interleaved flipped"),
        ("fuse-norm", "rms_norm", "eps 1e-06"),
        ("fuse-norm", "getitem", "residual or norm left out"),
        ("merge-projections", "getitem", "in place of"),
        ("order-contractions", "einsum", "reversed along its last axis"),
        ("fuse-experts", "routed_swiglu", "in another order of experts"),
        ("fuse-swiglu", "swiglu", ""),
        ("fuse-cache-write", "write_cache", "interleaved flipped"),
    ],
)
def test_the_faults_people_make_are_among_the_mutants(name, op, what):
    found = [
        mutant
        for stage in stages("moe", "decode")
        if stage.name == name
        for node, mutant, _ in mutants(stage)
        if op in str(next(n for n in stage.after.graph.nodes if n.name == node).target)
        or any(op in str(u.target) for u in next(n for n in stage.after.graph.nodes if n.name == node).users)
    ]
    assert any(what in mutant for mutant in found), found


def test_a_wrong_pass_stops_the_pipeline_and_is_named():
    (stage,) = [stage for stage in stages("moe", "decode") if stage.name == "fuse-attention"]
    node, _, change = next(mutant for mutant in mutants(stage) if mutant[1].startswith("scale"))
    module = clone(blocks()["moe", "decode"].module)
    wrong = [Planted(one, node, change) if one.name() == stage.name else one for one in DEFAULT_PIPELINE]
    context = Context("decode", target("sm_90"), WORKLOADS["decode"])
    with pytest.raises(CertificateError, match=rf"planted on moe decode: output \d differs .*first at {node}"):
        Pipeline(tuple(wrong)).run(module, context, "moe decode", Specimen.of(module))
