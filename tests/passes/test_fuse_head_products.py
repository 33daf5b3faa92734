"""One product per head is one op in decode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.fuse_head_products import FuseHeadProducts
from passes.launches import FEW_ROWS
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons
from tests.passes.launches import LAYERS, layer_before

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

H, D, O = 3, 6, 5  # noqa: E741


@pytest.mark.slow  # the same pass is spoiled on whole layers in test_mutations.py
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_the_family(layer):
    graph = layer_before("fuse-head-products", LAYERS[layer])
    assert len(apply(FuseHeadProducts(), graph).matches) == 1
    assert count(graph, aten.einsum) == 0


class Heads(nn.Module):
    def __init__(self, equation: str, *shape: int):
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.empty(shape))

    def forward(self, x):
        return torch.einsum(self.equation, x, self.weight)


@pytest.mark.parametrize(
    ("equation", "shape"), [("bshd,hod->bsho", (H, O, D)), ("bshd,dho->bsho", (D, H, O)), ("xyzw,ozw->xyzo", (O, H, D))]
)
def test_any_order_of_the_weights_axes(equation, shape):
    graph = module_graph(Heads(equation, *shape), tensor("x", "B", 1, H, D))
    assert len(apply(FuseHeadProducts(), graph).matches) == 1


class Deep(Heads):
    def forward(self, x):
        for _ in range(600):
            x = x + 1
        return super().forward(x)


def test_behind_many_layers():
    graph = module_graph(Deep("bshd,hod->bsho", H, O, D), tensor("x", "B", 1, H, D))
    assert len(apply(FuseHeadProducts(), graph).matches) == 1


def test_a_target_without_the_kernel_keeps_the_einsum():
    outcome = apply(
        FuseHeadProducts(), module_graph(Heads("bshd,hod->bsho", H, O, D), tensor("x", "B", 1, H, D)), on="sm_80"
    )
    assert not outcome.matches and reasons(outcome) == "sm_80 has no kernel of its own for head_linear"


def test_rows_are_counted_without_the_heads():
    heads = FEW_ROWS + 1
    graph = module_graph(Heads("bshd,hod->bsho", heads, O, D), tensor("x", 1, 1, heads, D))
    assert len(apply(FuseHeadProducts(), graph, phase="any").matches) == 1
    graph = module_graph(Heads("bshd,hod->bsho", H, O, D), tensor("x", 1, FEW_ROWS + 1, H, D))
    outcome = apply(FuseHeadProducts(), graph, phase="any")
    assert not outcome.matches and f"has {FEW_ROWS + 1} rows" in reasons(outcome)


def test_prefill_is_the_library_s():
    graph = module_graph(Heads("bshd,hod->bsho", H, O, D), tensor("x", "B", "S", H, D))
    assert not apply(FuseHeadProducts(), graph, phase="prefill").matches
    assert count(graph, aten.einsum) == 1


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bshd,hod->bhso", (H, O, D)),  # heads in front
        ("bshd,od->bsho", (O, D)),  # one weight for all heads
        ("bshd,hod->bso", (H, O, D)),  # heads are summed
        ("bshd,hds->bsh", (H, D, 1)),
    ],
)
def test_near_misses(equation, shape):
    graph = module_graph(Heads(equation, *shape), tensor("x", "B", 1, H, D))
    outcome = apply(FuseHeadProducts(), graph)
    assert not outcome.matches and reasons(outcome) == "its axes are not those of one product per head"
