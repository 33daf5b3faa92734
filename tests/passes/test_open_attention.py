"""Fused attention is opened into products and put together again, with the same numbers for every kind of mask."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsv3_compile.tracing import Input
from passes.base import Role
from passes.close_attention import CloseAttention
from passes.nodes import SOFTMAX
from passes.open_attention import OpenAttention
from tests.passes.capture import module_graph
from tests.passes.harness import apply, count, reasons

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention


class Attention(nn.Module):
    """Queries of four heads over keys and values of two, projected from rows that are shared."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, n, bias=False) for n in (20, 10, 6))

    def keys(self, rows_BTX):
        return self.k_proj(rows_BTX)

    def forward(self, x_BSX, rows_BTX):
        q, k, v = self.q_proj(x_BSX), self.keys(rows_BTX), self.v_proj(rows_BTX)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y, heads in ((q, 4), (k, 2), (v, 2)))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.mask(x_BSX, rows_BTX), **self.options)

    def mask(self, x_BSX, rows_BTX):
        return {}


class Bool(Attention):
    """The first query sees nothing: its result is zero, not a number that is none."""

    def mask(self, x_BSX, rows_BTX):
        visible = rows_BTX[:, None, None, :, 0] > x_BSX[:, None, :, None, 0]
        return {"attn_mask": visible & (torch.arange(x_BSX.shape[1]) > 0)[:, None]}


class Float(Attention):
    def mask(self, x_BSX, rows_BTX):
        return {"attn_mask": rows_BTX[:, None, None, :, 0] * x_BSX[:, None, :, None, 0]}


class Rotated(Attention):
    """Keys turned after their projection: no weight stands right before them."""

    def keys(self, rows_BTX):
        return self.k_proj(rows_BTX) * rows_BTX.sum(-1, keepdim=True)


class Stepped(Attention):
    """Every other column first, as rotations are written that pair neighbours."""

    def keys(self, rows_BTX):
        keys = self.k_proj(rows_BTX)
        return torch.cat([keys[..., 0::2], keys[..., 1::2]], -1)


def graph_of(module, dtype=torch.float32):
    sizes = {"x_BSX": (2, 5, 6), "rows_BTX": (2, 9, 6)}
    return module_graph(module.to(dtype), *(Input(n, Role.ACTIVATION, s, dtype) for n, s in sizes.items()))


@pytest.mark.parametrize("module", [Attention(), Attention(scale=0.7), Attention(is_causal=True), Bool(), Float()])
def test_there_and_back_again(module):
    graph = graph_of(module)
    calls = [node.kwargs for node in graph.graph.find_nodes(op="call_function", target=SDPA.default)]
    assert len(apply(OpenAttention(), graph).matches) == 1
    assert count(graph, SDPA) == 0 and count(graph, aten.matmul) == 2
    assert len(apply(CloseAttention(), graph).matches) == 1
    assert count(graph, SDPA) == 1 and count(graph, aten.matmul, *SOFTMAX, aten.repeat_interleave) == 0
    (closed,) = graph.graph.find_nodes(op="call_function", target=SDPA.default)
    assert closed.kwargs["enable_gqa"] == calls[0]["enable_gqa"]
    assert closed.args[5] == ("is_causal" in module.options)


def test_a_float_mask_keeps_its_dtype():
    graph = graph_of(Float(), torch.bfloat16)
    for one in (OpenAttention(), CloseAttention()):
        assert one.run(graph, None).matches
    (closed,) = graph.graph.find_nodes(op="call_function", target=SDPA.default)
    assert closed.args[3].meta["val"].dtype == torch.bfloat16


class Eager(nn.Module):
    """Products around a plain softmax were never a call."""

    softmax = staticmethod(torch.softmax)

    def forward(self, x_BSX, rows_BTX):
        shares = self.softmax(torch.matmul(x_BSX[:, None], rows_BTX[:, None].transpose(2, 3)), -1)
        return torch.matmul(shares, rows_BTX[:, None])


class Shared(Eager):
    """Shares that are an output must exist."""

    softmax = staticmethod(aten._safe_softmax)

    def forward(self, x_BSX, rows_BTX):
        shares = self.softmax(torch.matmul(x_BSX[:, None], rows_BTX[:, None].transpose(2, 3)), -1)
        return torch.matmul(shares, rows_BTX[:, None]), shares


class Reordered(Eager):
    """Scores that are a sum stay products."""

    softmax = staticmethod(aten._safe_softmax)

    def forward(self, x_BSX, rows_BTX):
        x, rows = x_BSX[:, None], rows_BTX[:, None]
        scores = torch.matmul(x[..., :2], rows[..., :2].mT) + torch.matmul(x[..., 2:], rows[..., 2:].mT)
        return torch.matmul(self.softmax(scores, -1), rows)


@pytest.mark.parametrize(
    "one, module, reason",
    [
        (OpenAttention(), Attention(dropout_p=0.5), "dropout"),
        (OpenAttention(), Rotated(), "the edge linear_1 → mul multiplies element by element"),
        (OpenAttention(), Stepped(), "takes columns in steps, which is not followed"),
        (CloseAttention(), Eager(), ""),
        (CloseAttention(), Shared(), "is used by"),
        (CloseAttention(), Reordered(), "is no product of queries"),
    ],
)
def test_near_misses_stay(one, module, reason):
    graph = graph_of(module)
    before = count(graph, SDPA, *SOFTMAX)
    outcome = one.run(graph, None)
    assert not outcome.matches and reason in reasons(outcome)
    assert count(graph, SDPA, *SOFTMAX) == before == 1
