"""RMSNorm, however it is written, is one op; with a residual sum in front it takes the sum along."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.base import calls
from passes.fuse_norm import FuseNorm
from tests.passes.capture import DENSE_LAYER, graph_of, layer_graph, tensor
from tests.passes.harness import certified, count, untouched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

D = 7


class Norm(nn.Module):
    def __init__(self, function, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.empty(D, dtype=dtype))

    def forward(self, x, r):
        return self.function(x, r, self.weight)


def graph_with(function, dtype: torch.dtype = torch.float32):
    return graph_of(Norm(function, dtype), [tensor(name, "B", "S", D, dtype=dtype) for name in "xr"])


def test_a_layer_has_four_norms_and_one_residual_sum_before_a_norm():
    graph = layer_graph(DENSE_LAYER)
    assert len(certified(FuseNorm(), graph).matches) == 4
    assert count(graph, dsv3.rms_norm) == 3 and count(graph, dsv3.add_rms_norm) == 1
    assert count(graph, aten.rms_norm) == 0
    assert count(graph, aten.add) == 3  # two of the rotations, and the last sum, which no norm follows here


def hf(x, r, w):
    y = x.to(torch.float32)
    return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


FORMS = {
    "aten": lambda x, r, w: F.rms_norm(x, (D,), w, 1e-5),
    "transformers": hf,
    "product of squares": lambda x, r, w: x * w * torch.rsqrt((x * x).mean((-1,), keepdim=True) + 1e-5),
    "square": lambda x, r, w: x * (torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w),
    "division": lambda x, r, w: x / torch.sqrt(1e-5 + x.pow(2).mean(-1, True)) * w,
    "power": lambda x, r, w: w * (x * (x.pow(2).mean(2, True) + 1e-5) ** -0.5),
    "reciprocal": lambda x, r, w: x * (1 / (x.pow(2).mean(-1, True) + 1e-5).sqrt()) * w,
}


@pytest.mark.parametrize("function", FORMS.values(), ids=FORMS.keys())
def test_every_way_to_write_it(function):
    graph = graph_with(function)
    assert len(certified(FuseNorm(), graph).matches) == 1
    (node,) = calls(graph.graph, dsv3.rms_norm)
    assert node.args[0].name == "x" and node.args[2] == 1e-5
    assert count(graph, aten.mean, aten.mul, aten.rsqrt) == 0


def test_the_sum_stays_for_its_other_readers():
    def function(x, r, w):
        total = x + r
        return F.rms_norm(total, (D,), w, 1e-5), total * 2, F.rms_norm(total, (D,), w, 1e-6)

    graph = graph_with(function)
    assert len(certified(FuseNorm(), graph).matches) == 2
    assert count(graph, dsv3.add_rms_norm) == count(graph, dsv3.rms_norm) == 1 and count(graph, aten.add) == 0


@pytest.mark.parametrize("other", [lambda r: r[:, :1], lambda r: 2.0], ids=["broadcast", "a number"])
def test_another_sum_is_no_residual(other):
    graph = graph_with(lambda x, r, w: F.rms_norm(x + other(r), (D,), w, 1e-5) + r)
    assert len(certified(FuseNorm(), graph).matches) == 1
    assert count(graph, dsv3.add_rms_norm) == 0


def test_float32_arithmetic_on_bfloat16_that_is_rounded_once():
    def function(x, r, w):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * w.float()).to(x.dtype)

    graph = graph_with(function, torch.bfloat16)
    assert len(certified(FuseNorm(), graph).matches) == 1
    assert count(graph, aten._to_copy, aten.to) == 0


def used_elsewhere(x, r, w):
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x * inverse * w, inverse + 1


@pytest.mark.parametrize(
    ("function", "dtype", "reason"),
    [
        (hf, torch.bfloat16, "_to_copy rounds to torch.bfloat16 before the weight is applied"),
        (used_elsewhere, torch.float32, "rsqrt is used by add as well"),
        (lambda x, r, w: F.rms_norm(x, (D,), None, 1e-5), torch.float32, "rms_norm has no weight"),
        (lambda x, r, w: F.rms_norm(x, (D,), w), torch.float32, "rms_norm has no eps of its own"),
        (lambda x, r, w: F.rms_norm(x, x.shape[1:], eps=1e-5), torch.float32, "rms_norm normalises 2 axes"),
        (
            lambda x, r, w: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) * r,
            torch.float32,
            "the weight r is not one number per element of the last axis",
        ),
    ],
    ids=["rounded twice", "used elsewhere", "no weight", "no eps", "two axes", "weight per position"],
)
def test_near_misses(function, dtype, reason):
    assert untouched(FuseNorm(), graph_with(function, dtype)) == reason


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r, w: x * torch.rsqrt(x.pow(2).mean(1, True) + 1e-5) * w,
        lambda x, r, w: x * torch.rsqrt(x.pow(2).sum(-1, True) + 1e-5) * w,
        lambda x, r, w: r * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) * w,
        lambda x, r, w: (x - x.mean(-1, True)) * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) * w,
    ],
    ids=["other axis", "sum", "other numerator", "centred"],
)
def test_other_formulas_are_no_candidates(function):
    assert untouched(FuseNorm(), graph_with(function)) == ""
