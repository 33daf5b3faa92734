"""A residual sum becomes part of the product that it is added to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.fuse_residual import FuseResidual
from passes.launches import FEW_ROWS
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons
from tests.passes.launches import LAYERS, layer_before

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

D = 6


@pytest.mark.slow  # the same pass is spoiled on whole layers in test_mutations.py
@pytest.mark.parametrize("layer", ["v3", "v2", "dense"])
def test_layers_of_the_family(layer):
    graph = layer_before("fuse-residual", LAYERS[layer], "decode")
    assert len(apply(FuseResidual(), graph, "decode").matches) == 2
    assert count(graph, aten.add, dsv3.add_rms_norm) == 0


@pytest.mark.slow
def test_of_a_prompt_only_the_experts_take_the_residual():
    graph = layer_before("fuse-residual", LAYERS["v3"], "prefill")
    outcome = apply(FuseResidual(), graph, "prefill")
    assert len(outcome.matches) == 1 and "has many rows" in reasons(outcome)
    assert count(graph, dsv3.add_rms_norm) == 1


class Sum(nn.Module):
    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist
        self.first = nn.Linear(D, D, bias=twist == "bias")
        self.norm = nn.Parameter(torch.empty(D))

    def forward(self, x):
        if self.twist == "activations":
            return x + F.linear(x, x[0, :D].contiguous())
        if self.twist == "vector":
            return x[..., 0] + F.linear(x, self.norm)
        product = self.first(x)
        if self.twist == "norm":
            return dsv3.add_rms_norm(x, product, self.norm, 1e-6)
        if self.twist == "broadcast":
            return x[:1] + product
        total = product + x
        return (total, product) if self.twist == "leak" else total


@pytest.mark.parametrize("twist", ["", "norm"])
def test_either_order_and_a_norm_of_the_sum(twist):
    graph = module_graph(Sum(twist), tensor("x", "B", "S", D))
    assert len(apply(FuseResidual(), graph).matches) == 1
    assert count(graph, dsv3.rms_norm) == (twist == "norm")


@pytest.mark.parametrize(("tokens", "matches"), [(FEW_ROWS, 1), (FEW_ROWS + 1, 0)])
def test_before_a_norm_a_product_of_many_rows_stays(tokens, matches):
    graph = module_graph(Sum("norm"), tensor("x", 1, tokens, D))
    outcome = apply(FuseResidual(), graph)
    assert len(outcome.matches) == matches and ("has many rows" in reasons(outcome)) != bool(matches)


@pytest.mark.parametrize(
    ("twist", "tokens", "reason"),
    [
        ("", FEW_ROWS, ""),
        ("", FEW_ROWS + 1, f"linear has {FEW_ROWS + 1} rows"),
        ("", "S", "nothing says that linear has"),
        ("norm", FEW_ROWS + 1, f"{FEW_ROWS + 1} rows"),
    ],
)
def test_sums_behind_products_of_many_rows_may_be_left_to_others(twist, tokens, reason):
    graph = module_graph(Sum(twist), tensor("x", 1, tokens, D))
    outcome = apply(FuseResidual(many=False), graph, "any")
    assert len(outcome.matches) == (reason == "") and reason in reasons(outcome)


def test_a_target_without_the_kernel_keeps_the_sum():
    outcome = apply(FuseResidual(), module_graph(Sum(), tensor("x", "B", "S", D)), on="sm_80")
    assert not outcome.matches and reasons(outcome) == "sm_80 has no kernel of its own for linear"


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("bias", "has a bias"),
        ("leak", "is used by output as well"),
        ("activations", "is no product with a weight"),
        ("vector", "the weight of linear is no matrix"),
        ("broadcast", ""),
    ],
)
def test_near_misses(twist, reason):
    shape = ("B", "S", D) if twist != "activations" else ("B", 9, D)
    graph = module_graph(Sum(twist), tensor("x", *shape))
    outcome = apply(FuseResidual(), graph)
    assert not outcome.matches and reason in reasons(outcome), outcome


class Regrouped(nn.Module):
    """The product of x [A, B, D] seen as [B, A, D]."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D, D, bias=False)

    def forward(self, x, residual):
        return residual + self.first(x).view(residual.shape)


@pytest.mark.parametrize("rows", [(1, 5), (3, 5)])
def test_rows_that_are_grouped_otherwise_than_the_residual(rows):
    graph = module_graph(Regrouped(), tensor("x", *rows, D), tensor("residual", *rows[::-1], D))
    outcome = apply(FuseResidual(), graph)
    assert not outcome.matches and reasons(outcome) == "rows of linear and residual are grouped differently"
