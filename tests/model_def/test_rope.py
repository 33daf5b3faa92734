"""Rotation and YaRN against worked numbers."""

import math
from dataclasses import replace

import pytest
import torch

from model_def import PRESETS, RopeScaling
from model_def.rope import cos_sin, frequencies_F, rotate

DEEPSEEK = RopeScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
KIMI = RopeScaling(32.0, 4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)


def test_rotation_of_neighbouring_pairs() -> None:
    cos, sin = cos_sin(torch.tensor([3]), 4, 1e4, None)
    turned = rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), cos, sin)
    torch.testing.assert_close(turned, torch.tensor([[-1.2722325, -1.8388650, 2.8786681, 4.0881867]]))


def test_rotation_of_halves_is_the_same_rotation_of_permuted_numbers() -> None:
    x = torch.randn(5, 3, 8)
    cos, sin = cos_sin(torch.arange(5)[:, None], 8, 1e4, None)
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    neighbours = rotate(x, cos, sin)
    expected = torch.cat([neighbours[..., 0::2], neighbours[..., 1::2]], -1)
    torch.testing.assert_close(rotate(halves, cos, sin, interleaved=False), expected)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 16, dtype=torch.float64)

    def score(at: int, of: int) -> float:
        (cos_q, cos_k), (sin_q, sin_k) = cos_sin(torch.tensor([at, of]), 16, 1e4, None)
        return float(rotate(q, cos_q, sin_q) @ rotate(k, cos_k, sin_k))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-2)


def test_rotation_in_bfloat16_rounds_once() -> None:
    x = torch.randn(4, 8).bfloat16()
    cos, sin = cos_sin(torch.arange(4), 8, 1e4, None)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize(
    ("scaling", "theta", "bounds"),
    [(DEEPSEEK, 1e4, (10, 23)), (KIMI, 5e4, (19, 20))],
    ids=["deepseek", "kimi"],
)
def test_ramp_bounds(scaling: RopeScaling, theta: float, bounds: tuple[int, int]) -> None:
    assert scaling.ramp_bounds(64, theta) == bounds


def test_equal_bounds_become_a_step_instead_of_a_division_by_zero() -> None:
    scaling = RopeScaling(4.0, 4096, beta_fast=700.0, beta_slow=700.0)
    low, high = scaling.ramp_bounds(8, 1e4)
    assert high - low == pytest.approx(0.001)
    assert frequencies_F(8, 1e4, scaling).isfinite().all()


FREQUENCIES = {
    "deepseek": (
        DEEPSEEK,
        1e4,
        {
            0: 1.0,
            8: 0.1,
            10: 5.623413252e-02,
            11: 3.900692657e-02,
            12: 2.687936011e-02,
            14: 1.244795587e-02,
            16: 5.5e-03,
            18: 2.249365301e-03,
            20: 7.905694150e-04,
            22: 1.778279410e-04,
            23: 3.333803580e-05,
            31: 3.333803580e-06,
        },
    ),
    "kimi": (
        KIMI,
        5e4,
        {18: 2.274203757e-03, 19: 1.621759908e-03, 20: 3.614046774e-05, 21: 2.577216816e-05},
    ),
}


@pytest.mark.parametrize("name", FREQUENCIES)
def test_yarn_frequencies(name: str) -> None:
    scaling, theta, expected = FREQUENCIES[name]
    found = frequencies_F(64, theta, scaling)
    for pair, value in expected.items():
        assert found[pair].item() == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize(
    ("factor", "mscale", "scale"),
    [(40.0, 1.0, 0.1352337788), (40.0, 0.707, 0.1147213868), (32.0, 1.0, 0.1308607997)],
)
def test_softmax_scale_of_192_wide_heads(factor: float, mscale: float, scale: float) -> None:
    scaling = RopeScaling(factor, 4096, mscale=mscale, mscale_all_dim=mscale)
    assert 192**-0.5 * scaling.score_factor() == pytest.approx(scale, rel=1e-8)


@pytest.mark.parametrize(
    ("preset", "scale"),
    [("deepseek-v3", 0.1352337788), ("deepseek-v2", 0.1147213868), ("moonlight", 0.0721687836)],
)
def test_softmax_scale_of_the_presets(preset: str, scale: float) -> None:
    assert PRESETS[preset].layer(0).attention.scale == pytest.approx(scale, rel=1e-8)


def test_table_factor_is_one_for_equal_mscales() -> None:
    assert DEEPSEEK.table_factor() == 1.0


def test_table_factor_without_mscales() -> None:
    plain = RopeScaling(40.0, 4096)
    assert plain.table_factor() == pytest.approx(0.1 * math.log(40) + 1)
    assert plain.score_factor() == 1.0


def test_given_attention_factor_wins() -> None:
    assert replace(DEEPSEEK, attention_factor=1.5).table_factor() == 1.5


def test_table_carries_the_factor() -> None:
    cos, sin = cos_sin(torch.arange(9), 8, 1e4, replace(DEEPSEEK, attention_factor=1.5))
    torch.testing.assert_close(cos**2 + sin**2, torch.full((9, 4), 2.25))


def test_no_extension_below_a_factor_of_one() -> None:
    assert replace(DEEPSEEK, factor=0.5).magnitude(1.0) == 1.0
