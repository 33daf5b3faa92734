import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.join_heads import join_heads

# One head; odd widths; more heads than a program takes, in blocks that do not divide them.
SHAPES = [(1, 1, 1, 1, 2), (2, 3, 3, 5, 12), (1, 2, 20, 9, 6), (2, 1, 7, 1000, 2)]


def agree(*arguments):
    torch.testing.assert_close(join_heads(*arguments), torch.ops.dsv3.join_heads(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("batch, queries, heads, nope, rope", SHAPES)
def test_agrees(batch, queries, heads, nope, rope, interleaved, dtype):
    first, second = (torch.randn(batch, queries, heads, width).to(dtype) for width in (nope, rope))
    angle = torch.randn(batch, queries, rope // 2)
    agree(first, second, angle.cos(), angle.sin(), interleaved)


@pytest.mark.parametrize("widths", [(1, 1), (5, 3), (16, 9)])
def test_without_angles_any_width_is_joined(widths):
    agree(*(torch.randn(2, 3, 5, width) for width in widths))


def test_parts_of_one_projection_in_any_order_of_its_axes():
    x, angle = torch.randn(2, 3, 5, 17), torch.randn(2, 3, 3)
    agree(x[..., 2:11], x[..., -6:], angle.cos(), angle.sin(), True)
    by_head = x.transpose(1, 2).contiguous().transpose(1, 2)
    agree(by_head[..., :4], x[..., 4:])
    agree(x[..., ::2], x[..., 1::2])


@pytest.mark.parametrize("turned", [True, False])
def test_heads_that_share_a_row(turned):
    first, row, angle = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 6), torch.randn(2, 3, 3)
    shared = row.unsqueeze(2).expand(-1, -1, 5, -1)
    agree(first, shared, *((angle.cos(), angle.sin(), False) if turned else ()))


def test_angles_that_are_a_view():
    angle = torch.randn(3, 2, 8).transpose(0, 1)[..., ::2]
    agree(torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 8), angle.cos(), angle.sin(), True)
    table = torch.randn(3, 2, 8).transpose(0, 1)
    agree(torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 8), table[..., ::2], table[..., 1::2], True)
