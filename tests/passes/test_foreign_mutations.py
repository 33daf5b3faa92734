"""The passes that read other people's code, spoiled like those of the default pipeline: on transformers' own layer."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from codegen.targets import target
from dsv3_compile.capture import capture
from dsv3_compile.phases import fix_sizes
from dsv3_compile.transformers_layers import TransformersLayers
from passes.base import END, Context, call, sweep
from passes.canonicalise import Canonicalise
from passes.pipeline import DEFAULT_PIPELINE, FOREIGN_PIPELINE
from passes.scatter_one_hots import ScatterOneHots
from passes.verify import CertificateError, Specimen, clone
from tests.dsv3_compile import tiny
from tests.passes.capture import module_graph, tensor
from tests.passes.test_mutations import WORKLOADS, Stage, mutants, spoiled
from tests.passes.test_scatter_one_hots import HIDDEN, Experts, multiplied

CONFIG = replace(tiny.TINY, num_hidden_layers=2, hidden_size=36, moe_intermediate_size=12)
FOREIGN = {one.name() for one in FOREIGN_PIPELINE} - {one.name() for one in DEFAULT_PIPELINE}


@functools.cache
def stages() -> list[Stage]:
    """What the foreign passes did to an MoE layer in prefill, where an attention is opened and closed again, and of
    whose result the last position is asked for."""
    module = capture(CONFIG, torch.float32, layer=TransformersLayers(CONFIG))["moe", "prefill"].module
    module = fix_sizes(module, {"B": 7})
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        last = call(module.graph, torch.ops.aten.slice.Tensor, output.args[0][0], 1, -1, END)
    output.args = ((last, *output.args[0][1:]),)
    context, specimen, found = Context("prefill", target("cpu"), WORKLOADS["prefill"]), Specimen.of(module), []
    for one in FOREIGN_PIPELINE:
        before, as_found = clone(module), replace(specimen)
        one.run(module, context)
        sweep(module)
        label = f"{one.name()} on moe prefill"
        specimen.certify(before, label)
        if one.name() in FOREIGN - {ScatterOneHots.name()}:
            found.append(Stage(one.name(), label, before, clone(module), as_found))
    return [*found, one_hots()]


def one_hots() -> Stage:
    """transformers scatters its gates itself, so these experts are others."""
    module = module_graph(Experts(multiplied), tensor("x_ND", 5, HIDDEN))
    context = Context("prefill", target("cpu"), WORKLOADS["prefill"])
    Canonicalise().run(module, context)
    before, specimen, label = clone(module), Specimen.of(module), f"{ScatterOneHots.name()} on experts"
    ScatterOneHots().run(module, context)
    specimen.certify(before, label)
    return Stage(ScatterOneHots.name(), label, before, clone(module), replace(specimen))


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_no_mutant_survives(name: str) -> None:
    (stage,) = [stage for stage in stages() if stage.name == name]
    tried, survivors = 0, []
    for node, what, change in mutants(stage):
        tried += 1
        mutant = spoiled(stage, node, change)
        try:
            replace(stage.specimen, module=mutant).certify(stage.before, stage.label)
            survivors.append(f"{node}: {what}")
        except CertificateError as error:
            assert str(error).startswith(stage.label)
    assert tried and survivors == []
