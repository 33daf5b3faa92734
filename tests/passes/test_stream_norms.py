"""A norm between kernels is a kernel of its own."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from passes.fuse_router import FuseRouter
from passes.launches import FEW_ROWS
from passes.stream_norms import StreamNorms
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

D = 6
HALF = torch.float16


class Chain(nn.Module):
    """A product, a norm as transformers writes it, and a product; as a layer has them, or nearly."""

    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist
        self.first, self.second = (nn.Parameter(torch.empty(D, D, dtype=HALF)) for _ in range(2))
        self.weight = nn.Parameter(torch.empty(D, dtype=HALF))

    def forward(self, x, residual):
        made = x * 2 if self.twist == "no kernel before" else dsv3.linear(x, self.first)
        if self.twist == "part":
            made = dsv3.linear_pair(x, self.first, self.second)[..., 2 : D + 2]
        if self.twist.startswith("sum"):
            made = residual + made
        weight = x.flatten()[:D] if self.twist == "no weight" else self.weight
        wide = made.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        normed = (weight * unit.to(torch.bfloat16 if self.twist == "narrower" else HALF)).to(HALF)
        if self.twist == "read elsewhere":
            return dsv3.linear(normed, self.second), normed + 1
        if self.twist == "returned":
            return dsv3.linear(normed, self.second), normed
        if self.twist == "view":
            normed = normed.reshape(-1, D)
        return dsv3.linear(normed, self.second), made if self.twist == "sum" else None


def graph(twist="", *shape):
    return module_graph(Chain(twist), *(tensor(name, *(shape or (2, 3)), D, dtype=HALF) for name in ("x", "residual")))


@pytest.mark.parametrize("twist", ["", "part", "view"])
def test_a_norm_between_kernels_is_one_call(twist):
    module = graph(twist)
    assert len(apply(StreamNorms(), module, phase="any").matches) == 1
    assert count(module, dsv3.rms_norm) == 1
    assert count(module, aten.mul, aten.mean, aten.rsqrt, aten._to_copy, aten.to) == 0


def test_a_residual_sum_goes_along_and_stays_for_its_other_readers():
    module = graph("sum")
    assert len(apply(StreamNorms(), module, phase="any").matches) == 1
    assert count(module, dsv3.add_rms_norm) == 1 and count(module, aten.add) == 0
    (both,) = (node for node in module.graph.nodes if node.target is dsv3.add_rms_norm.default)
    assert {user.args[1] for user in both.users if user.target is operator.getitem} == {0, 1}


def test_decode_has_few_rows_whatever_the_batch():
    assert apply(StreamNorms(), graph("", "B", 1), phase="decode").matches


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (("B", 1), "nothing says that mul_1 has few rows"),
        ((FEW_ROWS + 1,), f"mul_1 has {FEW_ROWS + 1} rows; up to {FEW_ROWS} are few"),
    ],
)
def test_norms_of_many_rows_are_inductor_s(shape, reason):
    outcome = apply(StreamNorms(), graph("", *shape), phase="any")
    assert not outcome.matches and reasons(outcome) == reason


def test_a_target_without_the_kernel_keeps_the_norm():
    outcome = apply(StreamNorms(), graph(), on="sm_80", phase="any")
    assert not outcome.matches and reasons(outcome) == "sm_80 has no kernel of its own for rms_norm"


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("no kernel before", "mul comes from no kernel of sm_90"),
        ("no weight", "slice_1 is no weight"),
        ("narrower", "rounds to torch.bfloat16 before the weight is applied"),
        ("read elsewhere", "add_1 reads mul_1 and is no kernel of sm_90"),
        ("returned", "output reads mul_1 and is no kernel of sm_90"),
    ],
)
def test_near_misses(twist, reason):
    outcome = apply(StreamNorms(), graph(twist), phase="any")
    assert not outcome.matches and reason in reasons(outcome), outcome


class Router(nn.Module):
    """The rows of a streamed norm in two shapes: the router's, and another product's."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.router = (nn.Parameter(torch.empty(D, D, dtype=HALF)) for _ in range(3))
        self.weight = nn.Parameter(torch.empty(D, dtype=HALF))

    def forward(self, x):
        normed = dsv3.rms_norm(dsv3.linear(x, self.first), self.weight, 1e-6)
        rows = normed.reshape(-1, D)
        return dsv3.linear(rows, self.router, None, None, True), rows.relu(), dsv3.linear(normed, self.second)


def test_a_streamed_router_joins_its_norm():
    module = module_graph(Router(), tensor("x", 2, 3, D, dtype=HALF))
    assert len(apply(FuseRouter(), module, phase="any").matches) == 1
    assert count(module, dsv3.norm_router) == 1 and count(module, dsv3.rms_norm) == 0
    assert count(module, dsv3.linear) == 2
