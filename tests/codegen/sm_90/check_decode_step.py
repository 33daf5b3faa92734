"""What surrounds a decode step's products, in the interpreter: run by test_moe.py."""

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.sm_90.add_rms_norm import add_rms_norm
from codegen.kernels.sm_90.attention_inputs_ import attention_inputs_
from codegen.kernels.sm_90.boxes import aligned
from codegen.kernels.sm_90.head_linear import head_linear
from codegen.kernels.sm_90.linear import SKINNY_ROWS, linear
from codegen.kernels.sm_90.norm_router import MOST_TOKENS, norm_router
from codegen.kernels.sm_90.rms_norm import rms_norm
from codegen.kernels.sm_90.swiglu import swiglu

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


def test_heads_of_any_grouping_of_tokens():
    x, weight = torch.randn(2, 5, 3, 40)[:, ::2], torch.randn(3, 40, 7).transpose(1, 2)
    expected = torch.ops.dsv3.head_linear(x, weight)
    torch.testing.assert_close(head_linear(x, weight), expected, atol=1e-4, rtol=1e-4)


# float32 is the library's at any number of rows; 16-bit rows stream up to SKINNY_ROWS, which needs a GPU.
@pytest.mark.parametrize("dtype, rows", [(torch.float32, 1), (torch.float32, 19), (torch.float16, SKINNY_ROWS + 1)])
@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("added", [True, False])
def test_products_of_many_rows_agree(dtype, rows, eps, added):
    wide = torch.randn(1, rows, 80).to(dtype)
    x, weight = wide[..., 8:48], (torch.randn(24, 40) / 6).to(dtype)
    residual = torch.randn(1, rows, 24).to(dtype) if added else None
    expected = torch.ops.dsv3.linear(x, weight, eps, residual)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(linear(x, weight, eps, residual), expected, atol=tolerance, rtol=tolerance)


def test_rows_that_tensor_copies_cannot_address_are_copied():
    wide = torch.randn(3, 80).half()
    assert aligned(wide[:, 8:48]).data_ptr() == wide[:, 8:48].data_ptr()
    whole = torch.randn(121).half()[1:].view(3, 40)  # copying what is contiguous must not be skipped
    for one in (wide[:, 9:49], torch.randn(3, 44).half()[:, :40], wide[:, ::2], whole):
        copy = aligned(one)
        assert copy.is_contiguous() and copy.storage_offset() == 0 and torch.equal(copy, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 2, 48), (5, 513)])
def test_norms_of_any_rows_agree(shape, dtype):
    wide, residual = torch.randn(*shape[:-1], shape[-1] + 9).to(dtype), torch.randn(shape).to(dtype)
    x, weight = wide[..., 2:-7], torch.randn(shape[-1]).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), torch.ops.dsv3.rms_norm(x, weight, 1e-5))
    expected = torch.ops.dsv3.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(add_rms_norm(x, residual, weight, 1e-5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 2, 14), (2, 2060)])
def test_gates_of_any_rows_agree(shape, dtype):
    gate_up = 3 * torch.randn(*shape[:-1], shape[-1] + 5).to(dtype)[..., 3:-2]
    torch.testing.assert_close(swiglu(gate_up), torch.ops.dsv3.swiglu(gate_up))


@pytest.mark.parametrize("tokens, hidden, experts", [(1, 72, 7), (3, 1100, 6), (MOST_TOKENS + 1, 72, 7)])
def test_the_router_sees_the_rounded_norm(tokens, hidden, experts):
    x, norm, weight = torch.randn(tokens, hidden).half(), torch.randn(hidden), torch.randn(experts, hidden)
    normed, logits = (part.squeeze(1) for part in norm_router(x.unsqueeze(1), norm, 1e-6, weight))
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
