"""Rotary embedding, however it is written, is one op."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from passes.base import calls
from passes.fuse_rotary import FuseRotary
from tests.passes.capture import DENSE_LAYER, MLA_WITHOUT_QUERY_RANK, graph_of, layer_graph, tensor
from tests.passes.harness import certified, count, untouched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

H, R = 3, 6
F = R // 2


class Rotation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, cos, sin):
        return self.function(x, cos, sin)


def graph_with(function, x=("B", "S", H, R), width: int = F, dtype: torch.dtype = torch.float32):
    tables = [tensor(name, "B", "S", width) for name in ("cos", "sin")]
    return graph_of(Rotation(function), [tensor("x", *x, dtype=dtype), *tables])


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_layer_rotates_queries_and_the_rope_key(interleaved):
    attention = dataclasses.replace(MLA_WITHOUT_QUERY_RANK, interleaved=interleaved)
    graph = layer_graph(dataclasses.replace(DENSE_LAYER, attention=attention), 1)
    assert len(certified(FuseRotary(), graph).matches) == 2
    assert [node.args[3] for node in calls(graph.graph, dsv3.rotary)] == [interleaved] * 2
    assert count(graph, aten.stack, aten.sub) == 0


def turned(a, b, cos, sin):
    return a * cos - b * sin, a * sin + b * cos


def neighbours(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(turned(a, b, cos[:, :, None], sin[:, :, None]), -1).flatten(-2)


def selected(x, cos, sin):
    pairs = x.reshape(*x.shape[:-1], F, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.stack([c * a - s * b, c * b + s * a], dim=-1).reshape(x.shape)


def strided(x, cos, sin):
    return torch.stack(turned(x[..., ::2], x[..., 1::2], cos[:, :, None], sin[:, :, None]), -1).flatten(3)


def halves(x, cos, sin):
    return torch.cat(turned(*x.chunk(2, -1), cos[:, :, None], sin[:, :, None]), -1)


def rotate_half(x):
    return torch.cat((-x[..., F:], x[..., :F]), -1)


def repeated_tables(x, cos, sin):
    cos, sin = (torch.cat((t, t), -1).unsqueeze(2) for t in (cos, sin))
    return x * cos + rotate_half(x) * sin


def repeated_angles(x, cos, sin):
    cos, sin = torch.cat((cos, cos), -1).cos() * 1.3, torch.cat((cos, cos), -1).sin() * 1.3
    return x * cos[:, :, None] + rotate_half(x) * sin[:, :, None]


def heads_first(x, cos, sin):
    x = x.transpose(1, 2)
    return torch.cat(turned(*x.chunk(2, -1), cos[:, None], sin[:, None]), -1)


@pytest.mark.parametrize(
    ("function", "interleaved"),
    [(neighbours, True), (selected, True), (strided, True), (halves, False), (repeated_tables, False),
     (repeated_angles, False), (heads_first, False)],
)  # fmt: skip
def test_every_way_to_write_it(function, interleaved):
    graph = graph_with(function)
    assert len(certified(FuseRotary(), graph).matches) == 1
    (node,) = calls(graph.graph, dsv3.rotary)
    assert node.args[3] is interleaved
    assert count(graph, aten.stack, aten.neg, aten.sub) == 0


def test_a_key_without_heads():
    def function(x, cos, sin):
        return torch.cat(turned(*x.chunk(2, -1), cos, sin), -1)

    graph = graph_with(function, ("B", "S", R))
    assert len(certified(FuseRotary(), graph).matches) == 1


def test_a_part_of_something_wider():
    def function(x, cos, sin):
        return torch.cat(turned(x[..., 5 : 5 + F], x[..., 5 + F :], cos[:, :, None], sin[:, :, None]), -1)

    graph = graph_with(function, ("B", "S", H, 5 + R))
    assert len(certified(FuseRotary(), graph).matches) == 1


def test_float32_rotation_of_bfloat16():
    graph = graph_with(lambda x, c, s: neighbours(x.float(), c, s).to(x.dtype), dtype=torch.bfloat16)
    assert len(certified(FuseRotary(), graph).matches) == 1
    (node,) = calls(graph.graph, dsv3.rotary)
    assert node.args[0].name == "x" and count(graph, aten._to_copy, aten.to) == 0


def test_a_float32_result_of_bfloat16_keeps_its_dtype():
    graph = graph_with(lambda x, c, s: neighbours(x, c, s), dtype=torch.bfloat16)
    assert len(certified(FuseRotary(), graph).matches) == 1
    (result,) = graph.graph.output_node().args[0]
    assert result.meta["val"].dtype is torch.float32


def turned_back(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


def neighbours_to_halves(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat(turned(a, b, cos[:, :, None], sin[:, :, None]), -1)


def partly_used(x, cos, sin):
    a, b = turned(*x.chunk(2, -1), cos[:, :, None], sin[:, :, None])
    return torch.cat((a, b), -1), a.exp()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (turned_back, "cat turns pairs by the negative angle"),
        (neighbours_to_halves, "cat reads pairs as neighbours and writes them as halves"),
        (partly_used, "sub is used by exp as well"),
        (
            lambda x, c, s: halves(x, c[:1], s[:1]),
            "unsqueeze is not known to hold one number per row, position and pair",
        ),
    ],
    ids=["negative angle", "other layout", "used elsewhere", "table without rows"],
)
def test_near_misses(function, reason):
    assert untouched(FuseRotary(), graph_with(function)) == reason


def test_tables_of_full_width_that_need_not_repeat():
    graph = graph_with(lambda x, c, s: x * c[:, :, None] + rotate_half(x) * s[:, :, None], width=R)
    assert untouched(FuseRotary(), graph) == "unsqueeze is not known to hold one number per row, position and pair"


@pytest.mark.parametrize(
    "two",
    [
        lambda a, b, c, s: (a * c - b * s, a * s - b * c),
        lambda a, b, c, s: (a * c - b * s, a * c + b * s),
        lambda a, b, c, s: (a * c - a * s, a * s + a * c),
    ],
    ids=["reflection", "wrong factors", "one half only"],
)
def test_other_mixtures_are_no_candidates(two):
    def function(x, cos, sin):
        return torch.cat(two(*x.chunk(2, -1), cos[:, :, None], sin[:, :, None]), -1)

    assert untouched(FuseRotary(), graph_with(function)) == ""


def rows_regrouped_before(x, c, s):
    a, b = x.view(2, 5, H, F, 2).unbind(-1)
    return torch.stack(turned(a, b, c[:, :, None], s[:, :, None]), -1).flatten(-2)


def rows_regrouped_behind(x, c, s):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(turned(a, b, c[:, :, None], s[:, :, None]), -1).view(5, 2, H, R)


@pytest.mark.parametrize(
    ("function", "rows", "name"), [(rows_regrouped_before, (5, 2), "x"), (rows_regrouped_behind, (2, 5), "view")]
)
def test_a_view_that_regroups_rows_along_with_pairs_is_not_read_over(function, rows, name):
    inputs = [tensor("x", *rows, H, R), tensor("cos", 2, 5, F), tensor("sin", 2, 5, F)]
    reason = f"rows of {name} are grouped otherwise than the pairs"
    assert untouched(FuseRotary(), graph_of(Rotation(function), inputs)) == reason
