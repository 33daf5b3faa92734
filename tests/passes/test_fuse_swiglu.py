"""silu(gate) · up over the halves of one product is one op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.base import calls
from passes.fuse_swiglu import FuseSwiglu
from passes.merge_projections import MergeProjections
from passes.stream_products import StreamProducts
from tests.passes.capture import CONTEXT, DENSE_LAYER, graph_of, layer_graph, module_graph, tensor
from tests.passes.harness import apply, certified, count, reasons, untouched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

I = 5  # noqa: E741


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def graph_with(function, width: int = 2 * I, dtype: torch.dtype = torch.float32):
    return graph_of(Function(function), [tensor("x", "B", "S", width, dtype=dtype)])


def test_the_merged_projections_of_a_layer():
    graph = layer_graph(DENSE_LAYER)
    MergeProjections().run(graph, CONTEXT)
    assert len(certified(FuseSwiglu(), graph).matches) == 1
    assert count(graph, aten.silu) == 0
    (node,) = calls(graph.graph, dsv3.swiglu)
    assert node.args[0].target is aten.linear.default


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.silu(x[..., :I]) * x[..., I:],
        lambda x: x.narrow(-1, I, I) * F.silu(x.narrow(-1, 0, I)),
        lambda x: F.silu(x.split(I, -1)[0]) * x.split(I, -1)[1],
        lambda x: x[..., :I] * x[..., :I].sigmoid() * x[..., I:],
    ],
    ids=["slices", "up times silu", "split", "sigmoid"],
)
def test_every_way_to_write_it(function):
    graph = graph_with(function)
    assert len(certified(FuseSwiglu(), graph).matches) == 1
    assert count(graph, dsv3.swiglu) == 1 and count(graph, aten.silu, aten.sigmoid, aten.slice) == 0


LIMITED = {
    "clamp": lambda gate, up: F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5),
    "clamp_max": lambda gate, up: F.silu(gate.clamp_max(0.5)) * up.clamp_min(-0.5).clamp_max(0.5),
    "hardtanh": lambda gate, up: F.hardtanh(up, -0.5, 0.5) * F.silu(torch.clip(gate, None, 0.5)),
    "sigmoid": lambda gate, up: gate.clamp(max=0.5) * gate.clamp(max=0.5).sigmoid() * up.clamp(max=0.5).clamp(min=-0.5),
    "in float": lambda gate, up: (F.silu(gate.clamp(max=0.5).float()) * up.float().clamp(-0.5, 0.5)).to(up.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", LIMITED.values(), ids=LIMITED)
def test_gates_and_ups_within_a_limit(function, dtype):
    graph = graph_with(lambda x: function(x[..., :I], x[..., I:]), dtype=dtype)
    assert len(certified(FuseSwiglu(), graph).matches) == 1
    (node,) = calls(graph.graph, dsv3.swiglu)
    assert node.args[1] == 0.5
    assert count(graph, aten.silu, aten.clamp, aten.clamp_min, aten.clamp_max, aten.hardtanh, aten.clip) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda gate, up: F.silu(gate.clamp(max=0.5)) * up.clamp(-0.25, 0.25),
        lambda gate, up: F.silu(gate.clamp(max=0.5)) * up.clamp(max=0.5),
        lambda gate, up: F.silu(gate.clamp(max=0.5)) * up,
        lambda gate, up: F.silu(gate.clamp(-0.5, 0.5)) * up.clamp(-0.5, 0.5),
        lambda gate, up: F.silu(gate.clamp(max=-0.5)) * up.clamp(0.5, -0.5),
        lambda gate, up: F.silu(gate) * up.clamp(-0.5, 0.5),
        lambda gate, up: F.silu(aten.hardtanh(gate).clamp(max=0.5)) * up.clamp(-0.5, 0.5),
        lambda gate, up: F.silu(gate.clamp(max=up.max())) * up,
    ],
    ids=[
        "two limits",
        "ups one-sided",
        "gates only",
        "gates two-sided",
        "a negative limit",
        "ups only",
        "hardtanh",
        "a tensor",
    ],
)
def test_other_bounds_are_refused(function):
    graph = graph_with(lambda x: function(x[..., :I], x[..., I:]))
    assert untouched(FuseSwiglu(), graph).endswith("are not parts of one product")


def test_neighbours_inside_a_wider_product():
    graph = graph_with(lambda x: (x[..., :3].exp(), F.silu(x[..., 3 : 3 + I]) * x[..., 3 + I : 3 + 2 * I]), 16)
    assert len(certified(FuseSwiglu(), graph).matches) == 1


def test_float32_arithmetic_that_is_rounded_at_the_end():
    graph = graph_with(
        lambda x: (F.silu(x[..., :I].float()) * x[..., I:].float()).to(torch.bfloat16), dtype=torch.bfloat16
    )
    assert len(certified(FuseSwiglu(), graph).matches) == 1
    assert count(graph, aten._to_copy, aten.to) == 0


def test_a_gate_that_is_rounded_on_the_way_is_rounded_once():
    graph = graph_with(lambda x: F.silu(x[..., :I].float()).to(torch.bfloat16) * x[..., I:], dtype=torch.bfloat16)
    assert len(certified(FuseSwiglu(), graph).matches) == 1
    assert count(graph, aten._to_copy, aten.to) == 0


class Gated(nn.Module):
    """Gate and up from weights of their own."""

    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist
        self.gate, self.up = (nn.Parameter(torch.empty(I, 6, dtype=torch.float16)) for _ in range(2))

    def forward(self, x):
        gate, up = F.linear(x, self.gate), F.linear(x, self.up)
        return F.silu(up) * gate if self.twist == "up first" else F.silu(gate) * up


@pytest.mark.parametrize(("twist", "fused"), [("", 1), ("up first", 0)])
def test_products_that_share_a_launch_are_parts_of_one(twist, fused):
    graph = module_graph(Gated(twist), tensor("x", 2, 3, 6, dtype=torch.float16))
    assert len(apply(StreamProducts(), graph, phase="any").matches) == count(graph, dsv3.linear_pair) == 1
    outcome = apply(FuseSwiglu(), graph, phase="any")
    assert len(outcome.matches) == count(graph, dsv3.swiglu) == fused
    assert reasons(outcome) == ("" if fused else "slice_tensor does not follow slice_tensor_1 in linear_pair_default")


def halves(x):
    return x[..., :I], x[..., I:]


def silu_used_elsewhere(x):
    gate, up = halves(x)
    gate = F.silu(gate)
    return gate * up, gate.sum()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.silu(x[..., :I]) * (2 * x)[..., I:], "slice and slice are not parts of one product"),
        (lambda x: F.silu(x[..., I:]) * x[..., :I], "slice does not follow slice in x"),
        (lambda x: F.silu(x[..., :3]) * x[..., 3:4], "slice and slice differ in width"),
        (lambda x: F.silu(x[..., ::2]) * x[..., 1::2], "slice does not follow slice in x"),
        (silu_used_elsewhere, "silu is used by sum as well"),
    ],
    ids=["two products", "up first", "widths", "interleaved", "silu used elsewhere"],
)
def test_near_misses(function, reason):
    assert untouched(FuseSwiglu(), graph_with(function)) == reason


def test_a_result_kept_in_float32_is_refused():
    graph = graph_with(lambda x: F.silu(x[..., :I].float()) * x[..., I:].float(), dtype=torch.bfloat16)
    assert untouched(FuseSwiglu(), graph) == "mul is not rounded to torch.bfloat16, in which its inputs are"


def test_a_gate_that_is_cut_to_whole_numbers_is_no_candidate():
    assert not untouched(FuseSwiglu(), graph_with(lambda x: F.silu(x[..., :I]).to(torch.int32) * x[..., I:]))


def test_another_activation_is_no_candidate():
    assert untouched(FuseSwiglu(), graph_with(lambda x: F.gelu(x[..., :I]) * x[..., I:])) == ""
