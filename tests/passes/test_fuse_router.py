"""The router's product joins the norm before it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.fuse_router import FuseRouter
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons
from tests.passes.launches import LAYERS, layer_before

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

D, E = 6, 5


@pytest.mark.slow  # the same pass is spoiled on whole layers in test_mutations.py
@pytest.mark.parametrize(("layer", "phase"), [("v3", "prefill"), ("v3", "decode"), ("v2", "decode")])
def test_layers_of_the_family(layer, phase):
    graph = layer_before("fuse-router", LAYERS[layer], phase)
    assert len(apply(FuseRouter(), graph, phase).matches) == 1
    assert count(graph, aten._to_copy) == 0  # the kernel reads the router's weight as it is
    assert count(graph, dsv3.norm_router) == (phase == "decode")


def test_a_dense_layer_has_no_router():
    graph = layer_before("fuse-router", LAYERS["dense"])
    outcome = apply(FuseRouter(), graph)
    assert not outcome.matches and not outcome.refusals


class Router(nn.Module):
    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist
        self.norm, self.weight = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(E, D))
        self.bias = nn.Parameter(torch.empty(E)) if twist == "bias" else None

    def forward(self, x):
        if self.twist in ("sum", "rounded sum"):
            normed, total = dsv3.add_rms_norm(x, x.relu(), self.norm, 1e-6)
        else:
            normed, total = dsv3.rms_norm(x, self.norm, 1e-6), x
        rows = normed.flatten(0, 1)
        if self.twist == "rounded sum":
            return F.linear(rows, self.weight.to(rows.dtype)), rows.relu(), total
        if self.twist == "sum":
            return F.linear(rows.float(), self.weight), rows.relu(), total
        if self.twist == "rounded":
            return F.linear(rows, self.weight.to(rows.dtype)), rows.relu()
        if self.twist == "vector":
            return F.linear(rows.float(), self.weight[0]), rows.relu()
        if self.twist == "residual":
            return dsv3.linear(rows.float(), self.weight, None, x.flatten(0, 1)[:, :E].float()), rows.relu()
        logits = F.linear(rows.float(), self.weight, self.bias)
        if self.twist == "alone":
            return logits
        return logits, (normed if self.twist == "shapes" else rows).relu()


@pytest.mark.parametrize("twist", ["", "shapes"])
def test_a_router_behind_a_view_that_others_read_the_norm_through_or_not(twist):
    graph = module_graph(Router(twist), tensor("x", "B", "S", D, dtype=torch.float16))
    assert len(apply(FuseRouter(), graph).matches) == 1


def test_behind_a_sum_the_product_alone_becomes_exact():
    graph = module_graph(Router("sum"), tensor("x", "B", "S", D, dtype=torch.float16))
    assert len(apply(FuseRouter(), graph).matches) == 1
    assert count(graph, dsv3.linear) == 1 and count(graph, aten.linear, aten._to_copy) == 0
    (product,) = (node for node in graph.graph.nodes if node.target is dsv3.linear.default)
    assert product.args[4] is True and product.meta["val"].dtype == torch.float32
    assert not apply(FuseRouter(), graph).matches


def test_a_target_without_the_kernel_keeps_two_steps():
    graph = module_graph(Router(), tensor("x", "B", "S", D, dtype=torch.float16))
    outcome = apply(FuseRouter(), graph, on="gfx942")
    assert not outcome.matches and reasons(outcome) == "gfx942 has no kernel of its own for norm_router"


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("bias", "has a bias"),
        ("rounded", "is rounded to torch.float16"),
        ("rounded sum", "is rounded to torch.float16"),
        ("residual", "is more than a product"),
        ("vector", "the weight of linear is no matrix"),
        ("alone", ""),
    ],
)
def test_near_misses(twist, reason):
    graph = module_graph(Router(twist), tensor("x", "B", "S", D, dtype=torch.float16))
    outcome = apply(FuseRouter(), graph)
    assert not outcome.matches and reason in reasons(outcome), outcome
