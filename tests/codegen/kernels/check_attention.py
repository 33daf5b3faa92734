import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.attention import attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "batch, queries, heads, groups, key_width, value_width, context",
    [(1, 1, 1, 1, 1, 1, 1), (2, 5, 3, 3, 24, 16, 9), (1, 70, 6, 2, 12, 20, 131), (2, 3, 4, 1, 40, 7, 3)],
)
def test_agrees(batch, queries, heads, groups, key_width, value_width, context, dtype):
    q = torch.randn(batch, queries, heads, key_width).to(dtype)
    k = torch.randn(batch, context, groups, key_width).to(dtype)
    v = torch.randn(batch, context, groups, value_width).to(dtype)
    first = torch.randint(context - queries + 1, (batch, 1))
    positions = first + torch.arange(queries)
    expected = torch.ops.dsv3.attention(q, k, v, positions, 0.3)
    torch.testing.assert_close(attention(q, k, v, positions, 0.3), expected, atol=2e-3, rtol=2e-3)


def test_values_that_are_columns_of_a_wider_tensor():
    kv = torch.randn(2, 9, 3, 11)
    q, positions = torch.randn(2, 4, 3, 6), torch.arange(4).repeat(2, 1)
    arguments = (q, kv[..., :6], kv[..., 6:], positions, 0.4)
    torch.testing.assert_close(attention(*arguments), torch.ops.dsv3.attention(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads, groups, rows, widths", [(3, 3, 1, (24, 12)), (6, 2, 2, (16, 16)), (4, 4, 1, (7, 40))])
def test_a_second_part_of_every_head(heads, groups, rows, widths, dtype):
    (width, rope), context = widths, 70
    q, q_rope = torch.randn(2, 9, heads, width + rope).to(dtype).split([width, rope], -1)
    k, k_rope = torch.randn(2, context, groups, width).to(dtype), torch.randn(2, context, rows, rope).to(dtype)
    v, positions = torch.randn(2, context, groups, 5).to(dtype), torch.tensor([[0], [61]]) + torch.arange(9)
    arguments = (q, k, v, positions, 0.3, q_rope, k_rope)
    expected = torch.ops.dsv3.attention(*arguments)
    torch.testing.assert_close(attention(*arguments), expected, atol=2e-3, rtol=2e-3)


def test_padding_sees_nothing_and_is_zero():
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 70, 2, 16), torch.randn(2, 70, 2, 5)
    arguments = (q, k, v, torch.tensor([[-1, 0, 1], [-1, -1, 64]]), 0.3)
    found = attention(*arguments)
    torch.testing.assert_close(found, torch.ops.dsv3.attention(*arguments))
    seen = arguments[3] >= 0
    assert (found[~seen] == 0).all() and (found[seen] != 0).all()
