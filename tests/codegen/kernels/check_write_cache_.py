import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.write_cache_ import write_cache_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rank, rope, positions", [(1, 2, [[0]]), (24, 6, [[4, 5], [0, 8]]), (33, 12, [[7], [2]])])
def test_agrees_and_leaves_other_rows_alone(rank, rope, positions, interleaved, dtype):
    positions = torch.tensor(positions)
    batch, queries = positions.shape
    kv = torch.randn(batch, queries, rank + rope + 3).to(dtype)[..., : rank + rope]
    angle = torch.randn(batch, queries, rope // 2)
    latent, rope_key = torch.randn(batch, 9, rank).to(dtype), torch.randn(batch, 9, rope).to(dtype)
    arguments = (kv, torch.randn(rank).to(dtype), angle.cos(), angle.sin(), positions)
    expected = torch.ops.dsv3.write_cache(*arguments, latent, rope_key, 1e-6, interleaved)
    assert write_cache_(*arguments, latent, rope_key, 1e-6, interleaved) is None
    torch.testing.assert_close((latent, rope_key), expected)


def test_prefix_of_a_longer_cache():
    kv, weight, angle = torch.randn(2, 1, 10), torch.randn(6), torch.randn(2, 1, 2)
    latent, rope_key = torch.randn(2, 9, 6)[:, :5], torch.randn(2, 9, 4)[:, :5]
    arguments = (kv, weight, angle.cos(), angle.sin(), torch.tensor([[4], [0]]))
    expected = torch.ops.dsv3.write_cache(*arguments, latent, rope_key, 1e-6, True)
    write_cache_(*arguments, latent, rope_key, 1e-6, True)
    torch.testing.assert_close((latent, rope_key), expected)


def test_a_cache_that_cannot_be_written_is_refused():
    kv, weight, angle = torch.randn(2, 1, 10), torch.randn(6), torch.randn(2, 1, 2)
    latent, rope_key = torch.randn(2, 6, 9).mT, torch.randn(2, 9, 4)
    with pytest.raises(ValueError, match="last axis of latent and rope_key must be contiguous"):
        write_cache_(kv, weight, angle.cos(), angle.sin(), torch.tensor([[4], [0]]), latent, rope_key, 1e-6, True)
