"""What surrounds a decode step's products, in the interpreter: run by test_moe.py."""

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.sm_90.attention_inputs_ import attention_inputs_
from codegen.kernels.sm_90.head_linear import head_linear
from codegen.kernels.sm_90.norm_router import norm_router

CAPACITY = 9


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


@pytest.mark.parametrize("tokens, heads, depth, width", [(1, 3, 40, 24), (19, 2, 72, 33)])
def test_every_head_has_its_own_product(tokens, heads, depth, width):
    x, weight = torch.randn(tokens, heads, depth), torch.randn(heads, width, depth)
    expected = torch.einsum("nhd,hod->nho", x, weight)
    torch.testing.assert_close(head_linear(x, weight), expected, atol=1e-4, rtol=1e-4)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(head_linear(x, turned), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens, hidden, experts", [(1, 72, 7), (3, 1100, 6)])
def test_the_router_sees_the_rounded_norm(tokens, hidden, experts):
    x, norm, weight = torch.randn(tokens, hidden).half(), torch.randn(hidden), torch.randn(experts, hidden)
    normed, logits = norm_router(x, norm, 1e-6, weight)
    expected = torch.ops.dsv3.rms_norm(x, norm, 1e-6)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(logits, normed.float() @ weight.T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "batch, queries, heads, nope, rank, rope, interleaved",
    [(1, 1, 3, 16, 40, 12, True), (19, 1, 2, 24, 72, 8, False), (2, 3, 2, 20, 36, 8, True)],
)
def test_attention_inputs_agree_with_the_separate_steps(batch, queries, heads, nope, rank, rope, interleaved):
    both = torch.randn(batch, queries, heads * (nope + rope) + rank + rope)
    q, kv = both.split([heads * (nope + rope), rank + rope], -1)
    weight, norm = torch.randn(heads, nope + 5, rank)[:, :nope], torch.randn(rank)
    cos, sin = torch.randn(2, batch, queries, rope // 2)
    positions = torch.stack([torch.randperm(CAPACITY)[:queries] for _ in range(batch)])
    latent, rope_key = torch.randn(batch, CAPACITY, rank), torch.randn(batch, CAPACITY, rope)
    caches = torch.ops.dsv3.write_cache(kv, norm, cos, sin, positions, latent, rope_key, 1e-6, interleaved)
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).split([nope, rope], -1)
    expected = (
        torch.einsum("bshp,hpc->bshc", q_nope, weight),
        torch.ops.dsv3.rotary(q_rope, cos, sin, interleaved),
    )
    found = attention_inputs_(q, kv, weight, norm, cos, sin, positions, latent, rope_key, 1e-6, interleaved)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((latent, rope_key), caches)
