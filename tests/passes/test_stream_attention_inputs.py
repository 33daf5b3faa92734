"""What stands between the projections of a traced decode step and its attention is one op."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsv3_compile.tracing import Input
from passes.base import Role
from passes.launches import FEW_ROWS
from passes.stream_attention_inputs import StreamAttentionInputs
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

H, P, R, C, T = 3, 5, 4, 6, 9


class Attention(nn.Module):
    """The steps as transformers writes them and the passes before leave them; `twist` makes one thing different."""

    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist
        self.up, self.norm = nn.Parameter(torch.empty(H, P, C)), nn.Parameter(torch.empty(C))

    def forward(self, q, kv, cos, sin, start, latent, rope_key):
        twist, (batch, queries, _) = self.twist, q.shape
        at = torch.arange(queries) + start
        heads = q.view(batch, queries, H, P + R)
        nope = heads[..., R:] if twist == "order" else heads[..., :P]
        rope = heads.transpose(1, 2)[..., :R] if twist == "order" else heads.transpose(1, 2).split([P, R], -1)[1]
        u, k = (kv[..., R:], kv[..., :R]) if twist == "key first" else kv.split([C, R], -1)
        k = k.relu() if twist == "other key" else k
        unit = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-6)
        row = (unit if twist == "no norm" else self.norm * unit).view(batch, 1, queries, C)
        key = dsv3.rotary(k.unsqueeze(2), sin if twist == "angles" else cos, sin, True).transpose(1, 2)
        old = latent.relu() if twist == "computed cache" else latent
        new = old.index_copy(2, at, row), rope_key.index_copy(2, at + 1 if twist == "positions" else at, key)
        early = new[0].squeeze(1).sum() if twist == "early" else q.sum()
        q_rope = dsv3.rotary(rope.transpose(1, 2), cos, sin, True)
        q_rope = rope.transpose(1, 2) * 1.5 if twist == "unrotated" else q_rope
        q_latent = torch.einsum("bshp,hpc->bshc", nope, self.up)
        q_latent = q_latent + 1.0 if twist == "added" else q_latent
        caches = [one.squeeze(1) for one in ((old, new[1]) if twist == "old rows" else new)]
        out = dsv3.mla_attention(q_latent, q_rope, *caches, at.expand(batch, queries), 0.3)
        results = (*new, out, q_rope if twist == "leak" else q.relu(), early)
        results = (*results, row.sum()) if twist == "row" else results
        return results[1:] if twist == "kept" else results


def graph_of(twist: str = "", queries: int | str = 1):
    return module_graph(
        Attention(twist),
        tensor("q", 1, queries, H * (P + R)),
        tensor("kv", 1, queries, C + R),
        tensor("cos", 1, queries, R // 2),
        tensor("sin", 1, queries, R // 2),
        Input("start", Role.INPUT, (1,), torch.int64, upper=T - 3),
        Input("latent", Role.INPUT, (1, 1, T if queries != "S" else "T", C), torch.float32),
        Input("rope_key", Role.INPUT, (1, 1, T if queries != "S" else "T", R), torch.float32),
    )


@pytest.mark.parametrize("queries", [1, 2])
def test_the_steps_are_one_op(queries):
    graph = graph_of(queries=queries)
    assert len(apply(StreamAttentionInputs(), graph, phase="any").matches) == 1
    assert count(graph, dsv3.attention_inputs) == 1
    assert count(graph, dsv3.rotary, aten.einsum, aten.index_copy, aten.mean) == 0
    assert count(graph, aten.add) == count(graph, aten.arange) == 1  # the attention's own positions


def test_a_target_without_the_kernel_keeps_the_steps():
    outcome = apply(StreamAttentionInputs(), graph_of(), on="sm_80", phase="any")
    assert not outcome.matches and reasons(outcome) == "sm_80 has no kernel of its own for attention_inputs_"


def test_many_queries_keep_the_steps(monkeypatch):
    monkeypatch.setattr("passes.launches.FEW_ROWS", 1)
    outcome = apply(StreamAttentionInputs(), graph_of(queries=2), phase="any")
    assert not outcome.matches and "has 2 rows; up to 1 are few" in reasons(outcome) and FEW_ROWS > 1


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("order", "are not the two parts of every head"),
        ("key first", "does not follow"),
        ("other key", "are no parts of one projection"),
        ("no norm", "is no norm"),
        ("angles", "rotate differently"),
        ("computed cache", "is no cache that was handed in"),
        ("positions", "write at different positions"),
        ("unrotated", "is no rotation"),
        ("added", "is no product of every head with a weight"),
        ("old rows", "is not a cache with new rows at positions"),
        ("early", "squeeze reads index_copy before mla_attention"),
        ("leak", "alone"),
        ("row", "alone"),
        ("kept", "is not given back"),
    ],
)
def test_near_misses(twist, reason):
    outcome = apply(StreamAttentionInputs(), graph_of(twist), phase="any")
    assert not outcome.matches and reason in reasons(outcome), outcome
