import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.add_rms_norm import add_rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2, 7), (5, 48)])
def test_agrees(shape, dtype):
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    expected = torch.ops.dsv3.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(add_rms_norm(x, residual, weight, 1e-5), expected)


def test_columns_that_are_not_neighbours():
    x, residual, weight = torch.randn(7, 3, 2).transpose(0, 2), torch.randn(2, 3, 9)[..., :7], torch.randn(7)
    expected = torch.ops.dsv3.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(add_rms_norm(x, residual, weight, 1e-6), expected)
