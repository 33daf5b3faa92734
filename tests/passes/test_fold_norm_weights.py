"""A norm's weight is multiplied into the weights that read the norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.base import Role, placeholders
from passes.fold_norm_weights import FoldNormWeights
from passes.pipeline import Pipeline
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons
from tests.passes.launches import LAYERS, layer_before

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

D, O = 6, 5  # noqa: E741


@pytest.mark.slow  # the same pass is spoiled on whole layers in test_mutations.py
@pytest.mark.parametrize(("layer", "folded"), [("v3", 2), ("v2", 1), ("dense", 3)])
def test_layers_of_the_family(layer, folded):
    graph = layer_before("fold-norm-weights", LAYERS[layer])
    assert len(apply(FoldNormWeights(), graph).matches) == folded
    assert count(graph, dsv3.rms_norm) == 0


def test_both_phases_bind_the_same_weights():
    bound = []
    for phase in ("prefill", "decode"):
        graph = layer_before("hoist-weights", LAYERS["v3"], phase)
        apply(Pipeline().find("hoist-weights"), graph, phase)
        bound.append({node.name for node in placeholders(graph.graph, Role.WEIGHT)})
    assert bound[0] == bound[1]


class Norm(nn.Module):
    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist
        self.norm, self.weight = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(O, D))
        self.other = nn.Parameter(torch.empty(3, D))
        self.bias = nn.Parameter(torch.empty(O)) if twist == "bias" else None

    def forward(self, x):
        normed = dsv3.rms_norm(x, x[0, 0] if self.twist == "computed" else self.norm, 1e-6)
        product = F.linear(normed, self.weight, self.bias)
        if self.twist == "read":
            return product, normed.relu()
        if self.twist == "vector":
            return F.linear(normed, self.weight[0])
        if self.twist == "turned":
            return F.linear(self.weight, normed[0])
        return (product, F.linear(normed, self.other)) if self.twist == "two" else product


@pytest.mark.parametrize(("twist", "products"), [("", 1), ("two", 2)])
def test_every_product_gets_the_weight(twist, products):
    graph = module_graph(Norm(twist), tensor("x", "B", "S", D))
    assert len(apply(FoldNormWeights(), graph).matches) == 1
    assert count(graph, dsv3.linear) == products and count(graph, dsv3.rms_norm) == 0


def test_a_target_without_the_kernel_keeps_the_norm():
    outcome = apply(FoldNormWeights(), module_graph(Norm(), tensor("x", "B", "S", D)), on="sm_80")
    assert not outcome.matches and reasons(outcome) == "sm_80 has no kernel of its own for linear"


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("bias", "has a bias"),
        ("read", "which is no product with a weight"),
        ("computed", "is no weight"),
        ("vector", "is no matrix"),
        ("turned", ""),
    ],
)
def test_near_misses(twist, reason):
    graph = module_graph(Norm(twist), tensor("x", "B", "S", D))
    outcome = apply(FoldNormWeights(), graph)
    assert not outcome.matches and reason in reasons(outcome), outcome
