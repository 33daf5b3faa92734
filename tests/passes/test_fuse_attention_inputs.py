"""Absorbing, rotating and writing the cache are one op before a decode step's attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsv3_compile.tracing import Input
from passes.base import Role
from passes.fuse_attention_inputs import FuseAttentionInputs
from passes.lower import Lower
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons
from tests.passes.launches import LAYERS, layer_before

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

H, P, R, C = 3, 5, 4, 6


@pytest.mark.slow  # the same pass is spoiled on whole layers in test_mutations.py
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_the_family(layer):
    graph = layer_before("fuse-attention-inputs", LAYERS[layer])
    assert len(apply(FuseAttentionInputs(), graph).matches) == 1
    assert count(graph, dsv3.write_cache_, dsv3.rotary) == 0 and count(graph, aten.einsum) == 1


class Attention(nn.Module):
    """The steps as the passes before leave them; `twist` makes one thing different."""

    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist
        self.up, self.norm = nn.Parameter(torch.empty(H, P, C)), nn.Parameter(torch.empty(C))

    def forward(self, q, kv, cos, sin, positions, latent, rope_key):
        latent, rope_key = dsv3.write_cache(kv, self.norm, cos, sin, positions, latent, rope_key, 1e-6, True)
        heads = q.view(-1, 1, H, P + R)
        rope_first = self.twist == "order"
        nope, rope = (heads[..., R:], heads[..., :R]) if rope_first else (heads[..., :P], heads[..., P:])
        if self.twist == "angles":
            cos, sin = sin, cos
        extra = latent.sum() if self.twist == "between" else 0.0
        q_latent = torch.einsum("bshp,hpc->bshc", nope, self.up)
        if self.twist == "added":
            q_latent = q_latent + 1.0
        q_rope = dsv3.rotary(rope, cos, sin, True)
        if self.twist == "unrotated":
            q_rope = rope.contiguous()
        at = positions + 0 if self.twist == "positions" else positions
        out = dsv3.mla_attention(q_latent, q_rope, latent, rope_key, at, 0.3)
        return out + extra, q_rope if self.twist == "leak" else q.relu(), latent, rope_key


def graph_of(twist: str):
    graph = module_graph(
        Attention(twist),
        tensor("q", "B", 1, H * (P + R)),
        tensor("kv", "B", 1, C + R),
        tensor("cos", "B", 1, R // 2),
        tensor("sin", "B", 1, R // 2),
        tensor("positions", "B", 1, dtype=torch.int64, upper="T"),
        Input("latent", Role.CACHE, ("B", "T", C), torch.float32),
        Input("rope_key", Role.CACHE, ("B", "T", R), torch.float32),
    )
    assert apply(Lower(), graph).matches
    return graph


def test_a_target_without_the_kernel_keeps_the_steps():
    outcome = apply(FuseAttentionInputs(), graph_of(""), on="sm_80")
    assert not outcome.matches and reasons(outcome) == "sm_80 has no kernel of its own for attention_inputs_"


def test_the_steps_written_by_hand():
    graph = graph_of("")
    assert len(apply(FuseAttentionInputs(), graph).matches) == 1
    assert count(graph, dsv3.write_cache_, dsv3.rotary, aten.einsum) == 0


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("order", "are not the two parts of every head"),
        ("angles", "rotate differently"),
        ("between", "between its write and"),
        ("added", "is no product of every head with a weight"),
        ("unrotated", "is no rotation"),
        ("positions", "are not written at"),
        ("leak", "alone"),
    ],
)
def test_near_misses(twist, reason):
    graph = graph_of(twist)
    outcome = apply(FuseAttentionInputs(), graph)
    assert not outcome.matches and reason in reasons(outcome), outcome
