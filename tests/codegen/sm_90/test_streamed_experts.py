"""Experts of one token or a few: the streaming kernels, thread by thread on the CPU."""

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.sm_90 import streamed_experts

from .emulator import emulated


@pytest.mark.parametrize("always, stored, limit", [(0, "together", None), (1, "apart", 0.7), (2, "in turns", None)])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("processors", [3, 40])  # several tiles per program, and programs that have none
def test_the_chosen_experts_are_summed(always, stored, limit, tokens, processors, monkeypatch):
    monkeypatch.setattr(streamed_experts, "COLUMNS", 64)
    monkeypatch.setattr(streamed_experts, "RING_BYTES", 3 * 2 * 8 * 64 * 2)
    experts, hidden, width, chosen = 7, 136, 72, 3  # no multiples of a step, and a tile that is not full
    routed = torch.rand(tokens, experts - always).topk(chosen - always).indices
    indices = torch.cat([routed, torch.arange(experts - always, experts).expand(tokens, always)], 1)
    weights = torch.rand(tokens, chosen)
    x, residual = (torch.randn(tokens, hidden).bfloat16() for _ in range(2))
    gate_up = (torch.randn(experts, 2 * width, hidden) * hidden**-0.5).bfloat16()
    gate, up = (half.clone() if stored == "apart" else half for half in gate_up.chunk(2, 1))
    if stored == "in turns":
        turns = torch.stack([gate, up], 2).flatten(1, 2)
        gate, up = turns[:, ::2], turns[:, 1::2]
    down = (torch.randn(experts, hidden, width) * width**-0.5).bfloat16()
    for added in (None, residual):
        with emulated(processors):
            found = streamed_experts.streamed_swiglu(x, indices, weights, gate, up, down, added, always, limit)
        exact = [x.double(), indices, weights, gate_up.double(), down.double()]
        more = None if added is None else added.double(), always, None, limit
        expected = torch.ops.dsv3.routed_swiglu(*exact, *more)
        assert (found.double() - expected).norm() / expected.norm() < 6e-3
