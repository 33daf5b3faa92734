"""Products of few rows go to the kernel that streams weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codegen.kernels.sm_90.linear import SKINNY_ROWS
from passes.launches import FEW_ROWS
from passes.stream_products import StreamProducts
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

D = 6


class Products(nn.Module):
    """One, two or three products of the same rows."""

    def __init__(self, products: int = 1, twist: str = ""):
        super().__init__()
        self.twist = twist
        self.weights = nn.ParameterList([torch.empty(5 + i, D, dtype=torch.float16) for i in range(products)])
        self.bias = nn.Parameter(torch.empty(5, dtype=torch.float16)) if twist == "bias" else None

    def forward(self, x):
        if self.twist == "exact":
            return F.linear(x.float(), self.weights[0].float())
        if self.twist == "wide":
            return F.linear(x.float(), self.weights[0].float() * 2)
        if self.twist == "no weight":
            return F.linear(x, x[0])
        if self.twist == "vector":
            return F.linear(x, self.weights[0][0])
        return [F.linear(x, weight, self.bias) for weight in self.weights]


def rows(*shape):
    return tensor("x", *shape, D, dtype=torch.float16)


@pytest.mark.parametrize(("products", "pairs", "single"), [(1, 0, 1), (2, 1, 0), (3, 1, 1)])
def test_products_of_the_same_rows_share_a_launch(products, pairs, single):
    graph = module_graph(Products(products), rows(2, 3))
    assert len(apply(StreamProducts(), graph, phase="any").matches) == pairs + single
    assert (count(graph, dsv3.linear_pair), count(graph, dsv3.linear)) == (pairs, single)
    assert count(graph, aten.linear) == 0


@pytest.mark.parametrize("shape", [(1,), ("B", 3), (FEW_ROWS + 1,)])
def test_a_float32_product_of_narrow_factors_reads_them_as_they_are(shape):
    graph = module_graph(Products(twist="exact"), rows(*shape))
    assert len(apply(StreamProducts(), graph, phase="any").matches) == 1
    (product,) = (node for node in graph.graph.nodes if node.target is dsv3.linear.default)
    assert product.args[4] is True and product.meta["val"].dtype is torch.float32
    assert count(graph, aten._to_copy) == 0


def test_few_rows_are_those_that_the_kernel_streams():
    assert FEW_ROWS == SKINNY_ROWS


def test_decode_has_few_rows_whatever_the_batch():
    assert apply(StreamProducts(), module_graph(Products(), rows("B", 1)), phase="decode").matches


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (("B", 1), "nothing says that linear has few rows"),
        ((FEW_ROWS + 1,), f"linear has {FEW_ROWS + 1} rows; up to {FEW_ROWS} are few"),
    ],
)
def test_many_rows_are_the_library_s(shape, reason):
    outcome = apply(StreamProducts(), module_graph(Products(), rows(*shape)), phase="any")
    assert not outcome.matches and reasons(outcome) == reason


def test_a_target_without_the_kernel_keeps_the_product():
    outcome = apply(StreamProducts(), module_graph(Products(), rows(3)), on="sm_80", phase="any")
    assert not outcome.matches and reasons(outcome) == "sm_80 has no kernel of its own for linear"


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("bias", "has a bias"),
        ("wide", "is not one of 16-bit floats"),
        ("no weight", "is no product with a weight"),
        ("vector", "the weight of linear is no matrix"),
    ],
)
def test_near_misses(twist, reason):
    outcome = apply(StreamProducts(), module_graph(Products(twist=twist), rows(2, 2)), phase="any")
    assert not outcome.matches and reason in reasons(outcome), outcome
