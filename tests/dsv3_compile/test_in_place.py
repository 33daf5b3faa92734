"""A cache that a graph gives back is written where it lies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from codegen.targets import target
from dsv3_compile.functional import callable_again
from dsv3_compile.in_place import count_together, write_in_place
from passes.base import Context, Workload, calls
from passes.canonicalise import Canonicalise
from passes.pipeline import apply
from tests.foreign.tracing import graphs_of

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

H, P, R, C, T = 3, 5, 4, 6, 9


class Step(nn.Module):
    """One step with caches [1, 1, T, ..], written as a static cache is; `twist` makes one thing different."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.twist = twist
        self.up, self.norm = nn.Parameter(torch.randn(H, P, C)), nn.Parameter(torch.randn(C))

    def forward(self, q, kv, cos, sin, positions, latent, rope_key):
        old = latent.relu() if self.twist == "computed" else latent
        caches = old.squeeze(1), rope_key.squeeze(1)
        read = latent.sum() if self.twist == "read" else 0.0
        new = dsv3.attention_inputs(q, kv, self.up, self.norm, cos, sin, positions, *caches, 1e-6, True)
        out = dsv3.mla_attention(*new, positions, 0.3) + read
        latent.copy_(new[2].unsqueeze(1) * (2.0 if self.twist == "scaled" else 1.0))
        if self.twist != "dropped":
            rope_key.copy_(new[3].unsqueeze(1))
        return out


def draw() -> list[torch.Tensor]:
    torch.manual_seed(0)
    widths = (H * (P + R), C + R, R // 2, R // 2)
    rows = [torch.randn(1, 1, width) for width in widths]
    return [*rows, torch.tensor([[4]]), torch.randn(1, 1, T, C), torch.randn(1, 1, T, R)]


@pytest.mark.parametrize("twist", ["", "read", "computed", "scaled", "dropped"])
def test_what_is_written_in_place_is_what_was_given_back(twist):
    step = Step(twist)
    (found,) = graphs_of(step, lambda run: run(*draw()))
    apply(Canonicalise(), found.module, Context("any", target("sm_90"), Workload(0, 0, 0)))
    write_in_place(found)
    graph = callable_again(found)
    assert any(calls(graph.graph, dsv3.attention_inputs_)) == (not twist)
    assert any(calls(graph.graph, aten.copy_)) == bool(twist)
    expected, inputs = draw(), draw()
    weights = dict(step.named_parameters())
    names = ("q", "kv", "cos", "sin", "positions", "latent", "rope_key")
    given = {**weights, **dict(zip(names, inputs, strict=True))}
    with torch.no_grad():
        (out,) = graph(*(given[node.target] for node in graph.graph.find_nodes(op="placeholder")))
        torch.testing.assert_close(out, step(*expected))
    torch.testing.assert_close(inputs, expected)
    assert not torch.equal(inputs[5], draw()[5])


class Counters(nn.Module):
    """Three counters of which two may be counted together."""

    def forward(self, x, first, second, third):
        total = x + first + second
        first.add_(1)
        second.copy_(second + 1)
        third.add_(2)
        return total + third


def test_counters_of_equal_steps_are_one_call():
    def values():
        return [torch.randn(3, generator=torch.Generator().manual_seed(0)), *(torch.tensor(n) for n in (3, 5, 7))]

    (found,) = graphs_of(Counters(), lambda run: run(*values()))
    apply(Canonicalise(), found.module, Context("any", target("sm_90"), Workload(0, 0, 0)))
    count_together(found)
    graph = callable_again(found)
    (together,) = calls(graph.graph, aten._foreach_add)
    assert len(together.args[0]) == 2 and together.args[1] == 1
    expected, inputs = values(), values()
    names = [node.target for node in graph.graph.find_nodes(op="placeholder")]
    given = dict(zip(("x", "first", "second", "third"), inputs, strict=True))
    (out,) = graph(*(given[name] for name in names))
    assert torch.equal(out, Counters()(*expected)) and inputs[1:] == expected[1:]
