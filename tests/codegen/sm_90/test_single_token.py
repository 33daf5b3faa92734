"""Experts of a single token: the streaming kernels, thread by thread on the CPU."""

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.sm_90 import single_token

from .emulator import emulated


@pytest.mark.parametrize("always, apart", [(0, False), (1, True), (2, False)])
@pytest.mark.parametrize("processors", [3, 40])  # several tiles per program, and programs that have none
def test_the_chosen_experts_are_summed(always, apart, processors, monkeypatch):
    monkeypatch.setattr(single_token, "COLUMNS", 64)
    monkeypatch.setattr(single_token, "RING_BYTES", 3 * 2 * 8 * 64 * 2)
    experts, hidden, width, chosen = 7, 136, 72, 3  # no multiples of a step, and a tile that is not full
    routed = torch.randperm(experts - always)[: chosen - always]
    indices = torch.cat([routed, torch.arange(experts - always, experts)]).unsqueeze(0)
    weights = torch.rand(1, chosen)
    x, residual = (torch.randn(1, hidden).bfloat16() for _ in range(2))
    gate_up = (torch.randn(experts, 2 * width, hidden) * hidden**-0.5).bfloat16()
    gate, up = (half.clone() if apart else half for half in gate_up.chunk(2, 1))
    down = (torch.randn(experts, hidden, width) * width**-0.5).bfloat16()
    for added in (None, residual):
        with emulated(processors):
            found = single_token.single_token_swiglu(x, indices, weights, gate, up, down, added, always)
        exact = [x.double(), indices, weights, gate_up.double(), down.double()]
        expected = torch.ops.dsv3.routed_swiglu(*exact, None if added is None else added.double(), always)
        assert (found.double() - expected).norm() / expected.norm() < 6e-3
