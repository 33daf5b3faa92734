"""A buffer filled slice by slice is a concatenation; one that is not quite filled stays."""

import pytest
import torch
from torch import nn

from dsv3_compile.tracing import Input
from passes.base import Role
from passes.concatenate_slices import ConcatenateSlices
from tests.passes.capture import module_graph
from tests.passes.harness import apply, count, reasons

aten = torch.ops.aten
INPUTS = (
    Input("a_BTX", Role.ACTIVATION, ("B", "T", 4), torch.float32),
    Input("b_BTX", Role.ACTIVATION, ("B", "T", 3), torch.float32),
)


class Filled(nn.Module):
    """Back to front, the slices broadcast and cast, one written twice."""

    def forward(self, a, b):
        out = a.new_empty(*a.shape[:2], 2, 7, dtype=torch.float64)
        out[..., 4:] = 1.0 + b[:, :, None]
        out[..., :4] = b[:, :, None, :1]
        out[..., :4] = a[:, :, None]
        return out


class Zeros(nn.Module):
    def forward(self, a, b):
        out = torch.zeros(*a.shape[:2], 7)
        out[..., :4], out[..., 4:] = a, b
        return out


class Gap(nn.Module):
    def forward(self, a, b):
        out = torch.zeros(*a.shape[:2], 8)
        out[..., :4], out[..., 5:] = a, b
        return out


class Overlap(nn.Module):
    def forward(self, a, b):
        out = torch.zeros(*a.shape[:2], 6)
        out[..., :4], out[..., 3:] = a, b
        return out


class Strided(nn.Module):
    def forward(self, a, b):
        out = torch.zeros(*a.shape[:2], 8)
        out[..., ::2], out[..., 1::2] = a, a
        return out + b.sum()


class Given(nn.Module):
    """What the slices lie on may not be fresh."""

    def forward(self, a, b):
        out = torch.tanh(torch.cat([a, b], -1))
        out[..., :4] = a
        return out


class Whole(nn.Module):
    """A buffer that one write fills along its first dim, of which nothing is said."""

    def forward(self, a, b):
        return torch.slice_scatter(torch.zeros(5, 4), a.sum((0, 1)).expand(5, 4)) * b.sum()


@pytest.mark.parametrize("module", [Filled, Zeros, Whole])
def test_filled_buffers_become_concatenations(module):
    graph = module_graph(module(), *INPUTS)
    assert len(apply(ConcatenateSlices(), graph).matches) == 1
    assert count(graph, aten.slice_scatter) == 0
    assert count(graph, aten.cat) == 1


@pytest.mark.parametrize(
    "module, reason",
    [
        (Gap, "do not fill the buffer"),
        (Overlap, "cover earlier ones in part"),
        (Strided, "have steps"),
        (Given, "not a fresh buffer"),
    ],
)
def test_near_misses_stay(module, reason):
    graph = module_graph(module(), *INPUTS)
    before = count(graph, aten.slice_scatter)
    outcome = apply(ConcatenateSlices(), graph)
    assert not outcome.matches and reason in reasons(outcome)
    assert count(graph, aten.slice_scatter) == before > 0
