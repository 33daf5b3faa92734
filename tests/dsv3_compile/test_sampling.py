"""The next token: greedy, nucleus, seeds, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_compile.sampling import LOWEST_TEMPERATURE, Sampler

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()


def drawn(sampler: Sampler) -> torch.Tensor:
    return torch.stack([sampler(LOGITS) for _ in range(2000)])


def test_temperature_zero_takes_the_largest() -> None:
    assert Sampler(0.0, 1.0, 0)(LOGITS).tolist() == [0, 3]


def test_frequencies_follow_the_probabilities() -> None:
    shares = torch.nn.functional.one_hot(drawn(Sampler(1.0, 1.0, 0)), 4).double().mean(0)
    torch.testing.assert_close(shares, LOGITS.exp().double(), atol=0.04, rtol=0)


@pytest.mark.parametrize(("top_p", "allowed"), [(0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2})])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, allowed: set[int]) -> None:
    assert set(drawn(Sampler(1.0, top_p, 0))[:, 0].tolist()) == allowed


def test_equal_seeds_give_equal_tokens() -> None:
    first, second, third = (drawn(Sampler(1.0, 1.0, seed)) for seed in (7, 7, 8))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_a_low_temperature_sharpens() -> None:
    assert set(drawn(Sampler(0.02, 1.0, 0))[:, 0].tolist()) == {0}


def test_the_lowest_temperature_takes_the_largest() -> None:
    assert Sampler(LOWEST_TEMPERATURE, 1.0, 0)(1e4 * LOGITS).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [
        *((temperature, 1.0) for temperature in (-1.0, 1e-300, float("nan"), float("inf"), "a", None, True, 1j)),
        *((1.0, top_p) for top_p in (0.0, 1.1, "1", None, True)),
    ],
)
def test_impossible_settings_are_refused(temperature: Any, top_p: Any) -> None:
    with pytest.raises(ValueError, match=r"(temperature|top_p) is .*; expected"):
        Sampler(temperature, top_p, 0)


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1, 1.5, None, True])
def test_a_seed_that_torch_does_not_take_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed is .*expected a whole number"):
        Sampler(1.0, 1.0, seed)
    Sampler(1.0, 1.0, (1 << 64) - 1)
