"""Shared experts are run with the routed ones, by every token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.base import calls
from passes.merge_shared_experts import MergeSharedExperts
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count, reasons
from tests.passes.launches import LAYERS, layer_before

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

E, K, D, I = 5, 2, 6, 4  # noqa: E741


@pytest.mark.slow  # the same pass is spoiled on whole layers in test_mutations.py
@pytest.mark.parametrize(("layer", "shared", "phase"), [("v3", 1, "prefill"), ("v3", 1, "decode"), ("v2", 2, "decode")])
def test_layers_of_the_family(layer, shared, phase):
    graph = layer_before("merge-shared-experts", LAYERS[layer], phase)
    assert len(apply(MergeSharedExperts(), graph, phase).matches) == 1
    assert count(graph, dsv3.swiglu) == 0
    (router,) = calls(graph.graph, dsv3.route)
    assert router.args[11] == shared


class Experts(nn.Module):
    """Routed experts and a shared one; `twist` makes one thing different."""

    def __init__(self, twist: str = ""):
        super().__init__()
        self.twist = twist
        self.router = nn.Parameter(torch.empty(E, D))
        self.gate_up, self.down = nn.Parameter(torch.empty(E, 2 * I, D)), nn.Parameter(torch.empty(E, D, I))
        width = I + 1 if twist == "width" else 2 * I
        self.both, self.out = nn.Linear(D, 2 * width, bias=twist == "bias"), nn.Linear(width, D, bias=False)

    def forward(self, x):
        logits = F.linear(x, self.router)
        if self.twist == "experts":
            logits = logits[:, :4].contiguous()
        indices, weights = dsv3.route(logits, None, "softmax", K, 1, 1, "max", 0.0, False, 0.0, 1.0)
        if self.twist == "weights":
            weights = weights * 2
        more = {"residual": x} if self.twist == "residual" else {}
        limit = 0.5 if self.twist in ("limit", "limits") else None
        y = dsv3.routed_swiglu(x, indices, weights, self.gate_up, self.down, **more, limit=limit)
        both = self.both(x.relu() if self.twist == "input" else x)
        hidden = dsv3.swiglu(both, None if self.twist == "limits" else limit)
        out = y + self.out(hidden)
        return (out, indices) if self.twist == "indices" else (out, hidden) if self.twist == "hidden" else out


def test_a_shared_expert_of_twice_the_width():
    graph = module_graph(Experts(), tensor("x", "B", D))
    assert len(apply(MergeSharedExperts(), graph).matches) == 1
    (experts,) = calls(graph.graph, dsv3.routed_swiglu)
    assert experts.args[3].meta["val"].shape == (E + 2, 2 * I, D)


def test_a_shared_expert_within_the_same_limit():
    graph = module_graph(Experts("limit"), tensor("x", "B", D))
    assert len(apply(MergeSharedExperts(), graph).matches) == 1
    (experts,) = calls(graph.graph, dsv3.routed_swiglu)
    assert experts.args[5:] == (None, 2, None, 0.5)


def test_the_cpu_keeps_them_apart():
    outcome = apply(MergeSharedExperts(), module_graph(Experts(), tensor("x", "B", D)), on="cpu")
    assert not outcome.matches and reasons(outcome) == "on the CPU every expert is a product of its own"


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("width", "the shared expert is 5 wide, which is no multiple of 4"),
        ("bias", "has a bias"),
        ("experts", "does not choose among 5 experts"),
        ("weights", "are not the answer of one router"),
        ("residual", "has more than stacks of gates and ups, and of downs"),
        ("limits", "keep gates and ups within different limits"),
        ("input", "the shared expert reads relu, the others x"),
        ("indices", "are not the answer of one router"),
        ("hidden", "is used by output as well"),
    ],
)
def test_near_misses(twist, reason):
    graph = module_graph(Experts(twist), tensor("x", "B", D))
    outcome = apply(MergeSharedExperts(), graph)
    assert not outcome.matches and reason in reasons(outcome), outcome
