"""rotary: both pairings, against the published vector and against complex multiplication."""

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
