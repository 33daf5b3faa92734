"""Complex numbers become pairs of real ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.real_arithmetic import RealArithmetic
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons

aten = torch.ops.aten


class Rotation(nn.Module):
    """Pairs of x turned by angles, as DeepSeek and transformers write it."""

    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist

    def forward(self, x, angles):
        turn = torch.polar(torch.ones_like(angles) * 1.5, angles).unsqueeze(2)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        if self.twist == "conjugated":
            turn = turn.conj_physical()
        if self.twist == "scaled":
            turn = turn * 2.0
        turned = pairs * turn * turn if self.twist == "twice" else pairs * turn
        return torch.view_as_real(turned.transpose(1, 2)).flatten(-2).to(x.dtype)


def rotation(twist=""):
    return module_graph(Rotation(twist), tensor("x", "B", "S", 3, 8), tensor("angles", "B", "S", 4))


@pytest.mark.parametrize("twist", ["", "twice"])
def test_nothing_complex_is_left(twist):
    graph = rotation(twist)
    assert len(apply(RealArithmetic(), graph).matches) == 1
    assert not any(count(graph, op) for op in (aten.view_as_complex, aten.view_as_real, aten.polar))
    values = pytree.tree_leaves([node.meta.get("val") for node in graph.graph.nodes])
    assert not any(value.is_complex() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("twist", "reason"),
    [("conjugated", "neither a view nor a product of pairs and angles"), ("scaled", "product of pairs and angles")],
)
def test_near_misses(twist, reason):
    outcome = apply(RealArithmetic(), rotation(twist))
    assert not outcome.matches and reason in reasons(outcome), outcome
