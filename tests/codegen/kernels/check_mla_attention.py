import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels import mla_attention as module
from codegen.kernels.mla_attention import mla_attention


def draw(batch, queries, heads, rank, rope, context, dtype):
    last = torch.randint(queries - 1, context, (batch, 1))
    return (
        torch.randn(batch, queries, heads, rank).to(dtype),
        torch.randn(batch, queries, heads, rope).to(dtype),
        torch.randn(batch, context, rank).to(dtype),
        torch.randn(batch, context, rope).to(dtype),
        last - torch.arange(queries).flip(0),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "batch, queries, heads, rank, rope, context",
    [(1, 1, 1, 16, 16, 1), (2, 1, 3, 24, 6, 45), (1, 4, 6, 33, 12, 70), (3, 2, 20, 16, 8, 33)],
)
@pytest.mark.parametrize("min_split", [32, 256])
def test_agrees(batch, queries, heads, rank, rope, context, dtype, min_split, monkeypatch):
    monkeypatch.setattr(module, "MIN_SPLIT", min_split)
    arguments = draw(batch, queries, heads, rank, rope, context, dtype)
    expected = torch.ops.dsv3.mla_attention(*arguments, 0.2)
    torch.testing.assert_close(mla_attention(*arguments, 0.2), expected, atol=2e-3, rtol=2e-3)


def test_rows_behind_the_last_position_do_not_matter(monkeypatch):
    monkeypatch.setattr(module, "MIN_SPLIT", 32)
    q_latent, q_rope, latent, rope_key, _ = draw(2, 1, 3, 24, 6, 150, torch.float32)
    positions = torch.tensor([[3], [69]])
    for b, last in enumerate((3, 69)):
        latent[b, last + 1 :], rope_key[b, last + 1 :] = torch.nan, torch.nan
    found = mla_attention(q_latent, q_rope, latent, rope_key, positions, 0.2)
    expected = torch.ops.dsv3.mla_attention(
        q_latent, q_rope, latent.nan_to_num(), rope_key.nan_to_num(), positions, 0.2
    )
    torch.testing.assert_close(found, expected)


def test_query_halves_and_cache_prefixes_need_no_copy():
    q = torch.randn(2, 1, 3, 30)
    latent, rope_key = torch.randn(2, 50, 24)[:, :40], torch.randn(2, 50, 6)[:, :40]
    arguments = (q[..., :24], q[..., 24:], latent, rope_key, torch.tensor([[39], [0]]), 0.2)
    torch.testing.assert_close(mla_attention(*arguments), torch.ops.dsv3.mla_attention(*arguments))


@pytest.mark.parametrize("min_split", [32, 256])
def test_padding_sees_nothing_and_is_zero(min_split, monkeypatch):
    monkeypatch.setattr(module, "MIN_SPLIT", min_split)
    *tensors, _ = draw(2, 2, 3, 24, 6, 150, torch.float32)
    arguments = (*tensors, torch.tensor([[-1, 0], [-1, 140]]), 0.2)
    found = mla_attention(*arguments)
    torch.testing.assert_close(found, torch.ops.dsv3.mla_attention(*arguments))
    assert (found[:, 0] == 0).all() and (found[:, 1] != 0).all()
