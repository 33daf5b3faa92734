import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.grouped_linear import grouped_linear, row_tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 17], [16, 1, 0], [0, 0, 1]])
def test_agrees(counts, dtype):
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    x = torch.randn(sum(counts), 37).to(dtype)
    weight = (torch.randn(len(counts), 21, 37) / 6).to(dtype)
    expected = torch.ops.dsv3.grouped_linear(x, weight, offsets)
    torch.testing.assert_close(grouped_linear(x, weight, offsets), expected, atol=2e-3, rtol=2e-3)


def test_many_rows_per_expert_take_the_larger_tiles():
    offsets = torch.tensor([70, 70, 100], dtype=torch.int32)
    x, weight = torch.randn(100, 70), torch.randn(3, 66, 70)
    expected = torch.ops.dsv3.grouped_linear(x, weight, offsets)
    torch.testing.assert_close(grouped_linear(x, weight, offsets), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_weights_may_lie_in_any_order(order):
    offsets, x = torch.tensor([3, 3, 20], dtype=torch.int32), torch.randn(20, 37)
    shape = 3, 21, 37
    weight = torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(3)])
    assert weight.shape == shape and not weight.is_contiguous()
    expected = torch.ops.dsv3.grouped_linear(x, weight, offsets)
    torch.testing.assert_close(grouped_linear(x, weight, offsets), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [0, 0, 4], [17, 1, 15, 0, 33], [16, 16]])
def test_there_are_always_enough_row_tiles(counts):
    needed = sum(-(-count // 16) for count in counts)
    assert needed <= row_tiles(sum(counts), len(counts), 16)
