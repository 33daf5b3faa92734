"""Prefill attention on Hopper in the interpreter, with torch's own causal attention in cuDNN's place."""

import pytest
import torch
import torch.nn.functional as F

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.sm_90 import attention as prefill

SCALE = 0.2


def draw(batch, queries, cached, heads):
    q, k = torch.randn(batch, queries, heads, 192), torch.randn(batch, cached, heads, 192)
    return q, k, torch.randn(batch, cached, heads, 64)


@pytest.fixture
def library(monkeypatch):
    """Counts its calls; spoils nothing that the mask of a fresh prompt allows."""
    calls = []

    def causal(q, k, v, scale):
        calls.append(q.shape)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=scale)
        return out.transpose(1, 2).contiguous()

    monkeypatch.setattr(prefill, "causal", causal)
    return calls


def agree(q, k, v, positions):
    found = prefill.attention(q, k, v, positions, SCALE)
    torch.testing.assert_close(found, torch.ops.dsv3.attention(q, k, v, positions, SCALE), atol=1e-4, rtol=1e-4)


def test_a_fresh_prompt_goes_to_the_library(library):
    agree(*draw(2, 70, 70, 2), torch.arange(70).expand(2, 70))
    assert len(library) == 1


def test_queries_at_other_positions_are_computed_again(library):
    positions = torch.arange(130).repeat(2, 1)
    positions[1, 64:] = positions[1, 64:].flip(0)
    agree(*draw(2, 130, 130, 1), positions)
    assert len(library) == 1


def test_what_the_library_computed_stands(library, monkeypatch):
    monkeypatch.setattr(prefill, "causal", lambda q, k, v, scale: torch.full((1, 70, 1, 64), 7.0))
    found = prefill.attention(*draw(1, 70, 70, 1), torch.arange(70)[None], SCALE)
    assert found.eq(7).all()


def test_queries_behind_a_context_go_to_the_plain_kernel(library):
    agree(*draw(1, 5, 80, 2), torch.arange(75, 80)[None])
    assert not library


def test_without_cudnn_the_plain_kernel_serves():
    assert prefill.causal(*draw(1, 9, 9, 1), SCALE) is None
    agree(*draw(1, 9, 9, 1), torch.arange(9)[None])
