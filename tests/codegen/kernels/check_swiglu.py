import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.swiglu import swiglu


@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 2, 14), (2, 2060)])
def test_agrees(shape, dtype, limit):
    gate_up = 3 * torch.randn(shape).to(dtype)
    gate_up.view(-1)[0] = torch.nan
    found, expected = swiglu(gate_up, limit), torch.ops.dsv3.swiglu(gate_up, limit)
    torch.testing.assert_close(found, expected, equal_nan=True)
