import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 2, 14), (2, 2060)])
def test_agrees(shape, dtype):
    gate_up = 3 * torch.randn(shape).to(dtype)
    torch.testing.assert_close(swiglu(gate_up), torch.ops.dsv3.swiglu(gate_up))
