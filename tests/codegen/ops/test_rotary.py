"""rotary and join_heads: both pairings, against the published vector and against complex multiplication."""

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3

dsv3 = torch.ops.dsv3


def test_published_vector():
    angle = 3.0 * torch.tensor([1.0, 1e-2]).view(1, 1, 2)  # position 3, base 1e4, R = 4
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    expected = torch.tensor([-1.2722325, -1.8388650, 2.8786681, 4.0881867])
    torch.testing.assert_close(dsv3.rotary(x, angle.cos(), angle.sin(), True).flatten(), expected)


def test_half_split_pairs_are_the_same_rotation_in_another_layout():
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 4)
    split = x.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    interleaved = dsv3.rotary(x, angle.cos(), angle.sin(), True)
    found = dsv3.rotary(split, angle.cos(), angle.sin(), False)
    torch.testing.assert_close(found, interleaved.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2))


def by_complex_numbers(x, angle, interleaved):
    """Every pair as one number, times e^(i·angle)."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle).unsqueeze(2)
    found = torch.view_as_real(turned)
    return (found if interleaved else found.mT).flatten(-2)


@pytest.mark.parametrize("interleaved", [True, False])
def test_heads_are_joined_with_what_is_rotated(interleaved):
    first, second, angle = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 1, 6), torch.randn(2, 3, 3)
    expected = torch.cat([first, by_complex_numbers(second, angle, interleaved).expand(-1, -1, 5, -1)], -1)
    shared = second.expand(-1, -1, 5, -1)
    torch.testing.assert_close(dsv3.join_heads(first, shared, angle.cos(), angle.sin(), interleaved), expected)
    torch.testing.assert_close(dsv3.join_heads(first, shared), torch.cat([first, shared], -1))


def test_what_is_joined_in_sixteen_bits_is_rounded_once():
    first, second, angle = torch.randn(2, 3, 5, 7).half(), torch.randn(2, 3, 5, 6).half(), torch.randn(2, 3, 3)
    found = dsv3.join_heads(first, second, angle.cos(), angle.sin(), True)
    expected = by_complex_numbers(second.float(), angle, True).half()
    assert found.dtype == torch.float16 and torch.equal(found[..., :7], first)
    torch.testing.assert_close(found[..., 7:], expected)
