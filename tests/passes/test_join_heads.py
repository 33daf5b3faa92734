"""The two parts of every head are put side by side by one op, which rotates the second on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.join_heads import JoinHeads
from passes.pipeline import FOREIGN_PIPELINE
from tests.passes.capture import tensor
from tests.passes.harness import apply, count, module_graph, reasons
from tests.passes.launches import LAYERS, layer_before

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

H, P, R = 3, 5, 4


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_the_family(layer):
    graph = layer_before("join-heads", LAYERS[layer], "prefill")
    assert len(apply(JoinHeads(), graph, "prefill").matches) == 2
    assert count(graph, aten.cat, dsv3.rotary) == 0
    queries, keys = (node for node in graph.graph.nodes if node.target is dsv3.join_heads.default)
    assert len(queries.args) == 5 and len(keys.args) == 2


class Heads(nn.Module):
    """Queries as the passes before leave them; `twist` makes one thing different."""

    def __init__(self, twist: str = "", interleaved: bool = True):
        super().__init__()
        self.twist, self.interleaved = twist, interleaved

    def forward(self, q, cos, sin):
        twist = self.twist
        first, rope = q.unflatten(-1, (H, P + R)).split([P, R], -1)
        if twist == "one angle":
            cos, sin = cos[:, :1], sin[:, :1]
        second = dsv3.rotary(rope, cos, sin, self.interleaved)
        if twist == "copied":
            second = second.contiguous()
        if twist == "unrotated":
            second = rope
        if twist == "shared":
            second = rope[:, :, :1].expand(-1, -1, H, -1)
        if twist == "through":
            second = second.neg()
        if twist == "dtype":
            second = second.half()
        if twist == "integers":
            return torch.cat([first.long(), second.long()], -1)
        if twist == "three":
            return torch.cat([first, second, second], -1)
        if twist == "both":
            return torch.cat([second, second], -1)
        if twist == "axis":
            return torch.cat([first[..., :R], second], 2)
        if twist == "free heads":
            return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], -1)
        if twist == "flat":
            return torch.cat([first.flatten(-2), second.flatten(-2)], -1)
        joined = torch.cat([first, second], -1)
        return (joined, second) if twist == "leak" else joined


def graph_of(twist: str, interleaved: bool = True):
    angles = (tensor(name, "B", "S", R // 2) for name in ("cos", "sin"))
    return module_graph(Heads(twist, interleaved), tensor("q", "B", "S", H * (P + R)), *angles)


@pytest.mark.parametrize("twist", ["", "copied"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_a_rotation_is_taken_in(twist, interleaved):
    graph = graph_of(twist, interleaved)
    assert len(apply(JoinHeads(), graph, "prefill").matches) == 1
    assert count(graph, aten.cat, dsv3.rotary) == 0


@pytest.mark.parametrize("twist", ["unrotated", "shared"])
def test_parts_that_are_not_rotated(twist):
    graph = graph_of(twist)
    (told,) = apply(JoinHeads(), graph, "prefill").matches
    assert count(graph, aten.cat) == 0 and "stays" not in told
    assert count(graph, aten.clone) == 0  # shared heads are read where they are


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("leak", "stays: it is read by output as well"),
        ("both", "stays: it is read by both parts as well"),
        ("one angle", "is not one angle per row, position and pair"),
        ("through", ""),
    ],
)
def test_a_rotation_that_stays_a_step_of_its_own(twist, reason):
    graph = graph_of(twist)
    (told,) = apply(JoinHeads(), graph, "prefill").matches
    assert reason in told
    assert count(graph, aten.cat) == 0 and count(graph, dsv3.rotary) == 1


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("axis", "is not over the last axis"),
        ("three", "has 3 parts"),
        ("dtype", "differ in dtype"),
        ("integers", "holds no floats"),
        ("free heads", "are not known numbers"),
        ("flat", ""),
    ],
)
def test_near_misses(twist, reason):
    graph = graph_of(twist)
    outcome = apply(JoinHeads(), graph, "prefill")
    assert not outcome.matches and count(graph, aten.cat) == 1
    assert len(outcome.refusals) == (reason != "") and reason in reasons(outcome)


@pytest.mark.parametrize("on", ["sm_80", "sm_100", "gfx942"])
def test_every_gpu_has_the_kernel(on):
    assert len(apply(JoinHeads(), graph_of(""), "prefill", on=on).matches) == 1


def test_on_the_cpu_the_steps_stay():
    outcome = apply(JoinHeads(), graph_of(""), "prefill", on="cpu")
    assert not outcome.matches and reasons(outcome) == "on the CPU a code generator fuses the steps"


def test_foreign_graphs_are_left_alone():
    assert JoinHeads() not in FOREIGN_PIPELINE
