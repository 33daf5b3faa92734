import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.rotary import rotary


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("batch, queries, heads, width", [(1, 1, 1, 2), (2, 3, 3, 12), (1, 2, 20, 8)])
def test_agrees(batch, queries, heads, width, interleaved, dtype):
    x, angle = torch.randn(batch, queries, heads, width).to(dtype), torch.randn(batch, queries, width // 2)
    expected = torch.ops.dsv3.rotary(x, angle.cos(), angle.sin(), interleaved)
    torch.testing.assert_close(rotary(x, angle.cos(), angle.sin(), interleaved), expected)


def test_last_columns_of_wider_heads():
    x, angle = torch.randn(2, 3, 5, 17)[..., -6:], torch.randn(2, 3, 3)
    expected = torch.ops.dsv3.rotary(x, angle.cos(), angle.sin(), True)
    torch.testing.assert_close(rotary(x, angle.cos(), angle.sin(), True), expected)
