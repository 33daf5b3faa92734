"""Norm, rotation and both cache writes of one projection are one op."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model_def.rope import rotate
from passes.base import Role, calls
from passes.fuse_cache_write import FuseCacheWrite
from passes.fuse_rotary import FuseRotary
from passes.merge_projections import MergeProjections
from tests.passes.capture import CONTEXT, DENSE_LAYER, MLA_WITHOUT_QUERY_RANK, graph_of, layer_graph, tensor
from tests.passes.harness import certified, count, untouched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

C, R = 5, 4


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_a_layer(interleaved, merged):
    attention = dataclasses.replace(MLA_WITHOUT_QUERY_RANK, interleaved=interleaved)
    graph = layer_graph(dataclasses.replace(DENSE_LAYER, attention=attention), 1)
    for rewrite in (MergeProjections(), FuseRotary()) if merged else (FuseRotary(),):
        rewrite.run(graph, CONTEXT)
    assert len(certified(FuseCacheWrite(), graph).matches) == 1
    assert count(graph, aten.index_put) == 0 and count(graph, dsv3.rotary) == 1
    (write,) = calls(graph.graph, dsv3.write_cache)
    assert write.args[-2:] == (MLA_WITHOUT_QUERY_RANK.norm_eps, interleaved)


class Cache(nn.Module):
    """Writes one projection into two caches, with one step replaced."""

    def __init__(self, **steps):
        super().__init__()
        self.steps = steps
        self.weight = nn.Parameter(torch.empty(C))

    def forward(self, kv, cos, sin, positions, other, latent, rope_key):
        u, k = self.steps.get("split", lambda kv: kv.split([C, R], -1))(kv)
        normed = self.steps.get("norm", norm)(u, self.weight)
        turned = rotate(k, cos, sin, True)
        batch = torch.arange(latent.shape[0])[:, None]
        rows = self.steps.get("rows", lambda b: b)(batch)
        latent = latent.index_put((batch, positions), normed)
        late = self.steps.get("positions", lambda p, o: p)(positions, other)
        rope_key = rope_key.index_put((rows, late), turned, accumulate=self.steps.get("accumulate", False))
        return latent, rope_key, *self.steps.get("more", lambda normed, turned: ())(normed, turned)


def norm(u, weight):
    return F.rms_norm(u, (C,), weight, 1e-6)


def graph_with(**steps):
    width = steps.pop("width", C + R)
    inputs = [
        tensor("kv", "B", "S", width),
        tensor("cos", "B", "S", R // 2),
        tensor("sin", "B", "S", R // 2),
        tensor("positions", "B", "S", dtype=torch.int64, upper="T"),
        tensor("other", "B", "S", dtype=torch.int64, upper="T"),
        *(
            dataclasses.replace(tensor(name, "B", "T", size), role=Role.CACHE)
            for name, size in (("latent", C), ("rope_key", R))
        ),
    ]
    graph = graph_of(Cache(**steps), inputs)
    FuseRotary().run(graph, CONTEXT)
    return graph


def written_out(u, weight):
    return weight * (u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"norm": written_out},
        {"split": lambda kv: (kv[..., 3 : 3 + C], kv[..., 3 + C : 3 + C + R]), "width": C + R + 6},
    ],
    ids=["plain", "norm written out", "columns of something wider"],
)
def test_every_way_to_write_it(steps):
    graph = graph_with(**steps)
    assert len(certified(FuseCacheWrite(), graph).matches) == 1
    assert count(graph, aten.index_put, aten.rms_norm, dsv3.rotary) == 0


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ({"more": lambda normed, turned: (normed.exp(),)}, "rms_norm is used by exp as well"),
        ({"more": lambda normed, turned: (turned.exp(),)}, "squeeze_dim is used by exp as well"),
        ({"positions": lambda p, o: o}, "index_put writes at positions, index_put at other"),
        ({"rows": lambda b: b.flip(0)}, "index_put does not write row b of the batch to row b of the cache"),
        ({"rows": lambda b: 0 * b}, "index_put does not write row b of the batch to row b of the cache"),
        ({"accumulate": True}, "index_put adds to what is in the cache"),
        ({"norm": lambda u, w: u * w}, "no normalised latent from kv is written to a cache"),
        (
            {"split": lambda kv: kv.split([R, C], -1)[::-1]},
            "the rope key getitem does not follow the latent getitem",
        ),
        (
            {"split": lambda kv: (kv[..., :C], (2 * kv)[..., C:])},
            "no normalised latent from mul is written to a cache",
        ),
    ],
    ids=["latent used", "key used", "positions", "reversed rows", "one row", "adds", "no norm", "order", "two sources"],
)
def test_near_misses(steps, reason):
    assert untouched(FuseCacheWrite(), graph_with(**steps)) == reason
