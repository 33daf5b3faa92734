"""What kernels share and none of them computes is computed once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from codegen.targets import target
from dsv3_compile.held import hold_shared
from passes.base import calls, is_call
from tests.passes.capture import module_graph, tensor

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

D = 6


class Shared(nn.Module):
    """Rows that two kernels read: of an input, of one kernel's result; and rows that one kernel reads."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.empty(D, D) for _ in range(5)])

    def forward(self, x):
        first, second, *rest = self.weights
        both, one = x.sin(), x.cos()
        made = dsv3.linear(both, first) + dsv3.linear(both.unsqueeze(0), second).squeeze(0)
        later = made.tanh()
        return dsv3.linear(later, rest[0]) + dsv3.linear(later, rest[1]), dsv3.linear(one, rest[2])


def test_what_several_kernels_read_is_held_where_no_kernel_computes_it():
    graph = module_graph(Shared(), tensor("x", 2, D)).graph
    hold_shared(graph, target("sm_90"))
    graph.lint()
    (held,) = calls(graph, dsv3.hold)
    assert held.args[0].target is aten.sin.default and list(held.args[0].users) == [held] and len(held.users) == 2


class Rotated(nn.Module):
    """Products turned by angles, which are themselves products of positions and frequencies."""

    def __init__(self, products: int = 2, angles: str = "positions"):
        super().__init__()
        self.weights = nn.ParameterList([torch.empty(D, D) for _ in range(products)])
        self.register_buffer("frequencies", torch.empty(D))
        self.angles = angles

    def forward(self, x, positions):
        angle = positions.float()[:, None] @ self.frequencies[None] if self.angles == "positions" else x
        cos = angle.cos().to(x.dtype) * 2
        return tuple((x @ weight) * cos for weight in self.weights)


@pytest.mark.parametrize(("products", "angles", "held"), [(2, "positions", 1), (1, "positions", 0), (2, "rows", 0)])
def test_angles_that_several_layers_turn_by_are_held(products, angles, held):
    inputs = tensor("x", 5, D), tensor("positions", 5, dtype=torch.int64, upper=9)
    graph = module_graph(Rotated(products, angles), *inputs).graph
    hold_shared(graph, target("sm_80"))
    graph.lint()
    found = list(calls(graph, dsv3.hold))
    assert len(found) == held and all(is_call(one.args[0], aten.cos) for one in found)


def test_a_target_without_kernels_has_nothing_to_share():
    graph = module_graph(Shared(), tensor("x", 2, D)).graph
    hold_shared(graph, target("sm_80"))
    assert not any(calls(graph, dsv3.hold))
