"""Products with weights, alone and with what joins them: against the plain formula in float64."""

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3

dsv3 = torch.ops.dsv3


def rms(x, eps):
    return torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("eps", [None, 1e-2])
@pytest.mark.parametrize("added", [True, False])
def test_linear(eps, added):
    x, weight = torch.randn(2, 3, 7).double(), torch.randn(5, 7).double()
    residual = torch.randn(2, 3, 5).double() if added else None
    expected = (x if eps is None else x / rms(x, eps)) @ weight.T + (residual if added else 0)
    found = dsv3.linear(x, weight, eps, residual)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_linear_rounds_once():
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    residual = (100 * torch.randn(3, 5)).bfloat16()
    exact = dsv3.linear(x.double(), weight.double(), 1e-6, residual.double())
    torch.testing.assert_close(dsv3.linear(x, weight, 1e-6, residual), exact.bfloat16(), atol=0, rtol=2**-7)


def test_a_folded_norm_weight_gives_the_product_of_the_norm():
    x, norm, weight = torch.randn(4, 9).double(), torch.randn(9).double(), torch.randn(6, 9).double()
    expected = torch.nn.functional.linear(dsv3.rms_norm(x, norm, 1e-5), weight)
    torch.testing.assert_close(dsv3.linear(x, weight * norm, 1e-5), expected, atol=1e-12, rtol=1e-12)


def test_the_router_sees_the_rounded_norm_and_computes_in_float32():
    x, norm, weight = torch.randn(3, 9).bfloat16(), torch.randn(9).bfloat16(), torch.randn(4, 9)
    normed, logits = dsv3.norm_router(x, norm, 1e-6, weight)
    assert torch.equal(normed, dsv3.rms_norm(x, norm, 1e-6))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, normed.float() @ weight.T)


def test_every_head_has_its_own_product():
    x, weight = torch.randn(2, 5, 3, 7), torch.randn(3, 4, 7)
    expected = torch.stack([x[:, :, head] @ weight[head].T for head in range(3)], 2)
    torch.testing.assert_close(dsv3.head_linear(x, weight), expected)


@pytest.mark.parametrize("interleaved", [True, False])
def test_attention_inputs_are_the_separate_steps(interleaved):
    batch, heads, nope, rank, half, capacity = 2, 3, 5, 6, 2, 7
    q, kv = torch.randn(batch, 1, heads * (nope + 2 * half)), torch.randn(batch, 1, rank + 2 * half)
    weight, norm = torch.randn(heads, nope, rank), torch.randn(rank)
    cos, sin = torch.randn(2, batch, 1, half)
    positions = torch.tensor([[4], [0]])
    caches = torch.randn(batch, capacity, rank), torch.randn(batch, capacity, 2 * half)
    expected = dsv3.write_cache(kv, norm, cos, sin, positions, *caches, 1e-6, interleaved)
    old = [cache.clone() for cache in caches]
    copies = dsv3.attention_inputs(q, kv, weight, norm, cos, sin, positions, *caches, 1e-6, interleaved)
    assert all(map(torch.equal, caches, old))
    q_latent, q_rope = dsv3.attention_inputs_(q, kv, weight, norm, cos, sin, positions, *caches, 1e-6, interleaved)
    torch.testing.assert_close(caches, expected)
    torch.testing.assert_close(copies, (q_latent, q_rope, *caches))
    by_head = q.view(batch, 1, heads, -1)
    torch.testing.assert_close(q_latent, torch.einsum("bshp,hpc->bshc", by_head[..., :nope], weight))
    torch.testing.assert_close(q_rope, dsv3.rotary(by_head[..., nope:], cos, sin, interleaved))
