"""What kernels share and none of them computes is computed once."""

from __future__ import annotations

import torch
from torch import nn

from codegen.targets import target
from dsv3_compile.held import hold_shared
from passes.base import calls
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


def test_a_target_without_kernels_has_nothing_to_share():
    graph = module_graph(Shared(), tensor("x", 2, D)).graph
    hold_shared(graph, target("sm_80"))
    assert not any(calls(graph, dsv3.hold))
