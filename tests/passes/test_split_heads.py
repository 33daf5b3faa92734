"""Attention reads the parts of its heads where they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.pipeline import FOREIGN_PIPELINE
from passes.split_heads import SplitHeads
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons
from tests.passes.launches import LAYERS, layer_before

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

H, P, R, V = 3, 5, 4, 6


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_the_family(layer):
    graph = layer_before("split-heads", LAYERS[layer], "prefill")
    assert len(apply(SplitHeads(), graph, "prefill").matches) == 1
    assert count(graph, aten.cat) == 0
    (attention,) = (node for node in graph.graph.nodes if node.target is dsv3.attention.default)
    assert attention.args[6].meta["val"].shape[2] == 1  # the rope key that all heads share


class Heads(nn.Module):
    """Attention as the passes before leave it; `twist` makes one thing different."""

    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist

    def forward(self, q, kv, row, positions):
        twist = self.twist
        q, q_rope = q.unflatten(-1, (H, P + R)).split([P, R], -1)
        k, v = kv.unflatten(-1, (H, P + V)).split([P, V], -1)
        k_rope = row.unsqueeze(2).expand(-1, -1, H, -1)
        if twist == "own keys":
            k_rope = k[..., :R]
        if twist == "dtype":
            k_rope = k_rope.half()
        if twist == "axis":
            return dsv3.attention(torch.cat([q, q], 2), torch.cat([k, k], 2), torch.cat([v, v], 2), positions, 0.3)
        if twist == "whole keys":
            keys = kv.unflatten(-1, (H, P + V))[..., : P + R]
            return dsv3.attention(torch.cat([q, q_rope], -1), keys, v, positions, 0.3)
        if twist == "whole queries":
            return dsv3.attention(q, torch.cat([k[..., :1], k_rope], -1), v, positions, 0.3)
        if twist == "three":
            keys, queries = torch.cat([k[..., :3], k[..., 3:], k_rope], -1), torch.cat([q, q_rope], -1)
        elif twist == "cut elsewhere":
            rest = torch.cat([q[..., R:], q_rope], -1)
            keys, queries = torch.cat([k, k_rope], -1), torch.cat([q[..., :R], rest], -1)
        else:
            keys, queries = torch.cat([k, k_rope], -1), torch.cat([q, q_rope], -1)
        out = dsv3.attention(queries, keys, v, positions, 0.3)
        return (out, keys) if twist == "leak" else out


def graph_of(twist: str):
    positions = tensor("positions_BS", "B", "S", dtype=torch.int64, upper="S")
    inputs = tensor("q", "B", "S", H * (P + R)), tensor("kv", "B", "S", H * (P + V)), tensor("row", "B", "S", R)
    return module_graph(Heads(twist), *inputs, positions)


@pytest.mark.parametrize(("twist", "heads"), [("", 1), ("own keys", H)])
def test_parts_are_read_where_they_are(twist, heads):
    graph = graph_of(twist)
    assert len(apply(SplitHeads(), graph, "prefill").matches) == 1
    assert count(graph, aten.cat, aten.clone) == 0
    (attention,) = (node for node in graph.graph.nodes if node.target is dsv3.attention.default)
    assert attention.args[6].meta["val"].shape[2] == heads


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("leak", "is read by output as well"),
        ("whole keys", "is not put together from parts"),
        ("three", "has 3 parts"),
        ("dtype", "differ in dtype"),
        ("axis", "is not over the last axis"),
        ("cut elsewhere", "queries are cut at 4, keys at 5"),
        ("whole queries", ""),
    ],
)
def test_near_misses(twist, reason):
    graph = graph_of(twist)
    before = count(graph, aten.cat)
    outcome = apply(SplitHeads(), graph, "prefill")
    assert not outcome.matches and count(graph, aten.cat) == before
    assert len(outcome.refusals) == (reason != "") and reason in reasons(outcome)


@pytest.mark.parametrize("on", ["sm_80", "sm_100", "gfx942"])
def test_every_gpu_reads_parts(on):
    assert len(apply(SplitHeads(), graph_of(""), "prefill", on=on).matches) == 1


def test_on_the_cpu_heads_stay_whole():
    outcome = apply(SplitHeads(), graph_of(""), "prefill", on="cpu")
    assert not outcome.matches and reasons(outcome) == "on the CPU attention is torch's, which wants whole heads"


def test_foreign_graphs_are_left_alone():
    assert SplitHeads() not in FOREIGN_PIPELINE
