import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.rms_norm import rms_norm

SHAPES = [(1, 1), (3, 2, 7), (5, 48), (2, 513)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), torch.ops.dsv3.rms_norm(x, weight, 1e-5))


def test_rows_of_a_wider_tensor_need_no_copy():
    wide, weight = torch.randn(4, 3, 20), torch.randn(13)
    x = wide[..., 5:18]
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.ops.dsv3.rms_norm(x, weight, 1e-6))
