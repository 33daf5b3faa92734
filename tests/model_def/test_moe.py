"""Routing against worked numbers and its own rules; the expert sum against a loop."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model_def.moe import MixtureOfExperts, route
from model_def.specs import MoeSpec, RoutingSpec
from tests.model_def.builders import SMALL, randomise

V3 = RoutingSpec(8, 3, "sigmoid", True, 4, 2, "top2", float("-inf"), True, 2.5)
V2 = RoutingSpec(8, 3, "softmax", False, 4, 2, "max", 0.0, False, 16.0)
LOGITS = torch.tensor([[0.5, -1, 2, 0, -0.5, 1, 0.25, -2]])
BIAS = torch.tensor([0, 0, -0.6, 0, 0.3, -0.1, 0.1, 0.5])


def chosen(spec: RoutingSpec, logits: torch.Tensor, bias: torch.Tensor | None) -> dict[int, float]:
    indices, weights = route(spec, logits, bias)
    return dict(zip(indices[0].tolist(), weights[0].tolist(), strict=True))


def test_v3_routing_with_biases() -> None:
    expected = {4: 0.564918, 6: 0.841191, 5: 1.093891}
    assert chosen(V3, LOGITS, BIAS) == pytest.approx(expected, abs=1e-6)


def test_v3_routing_without_biases_takes_other_groups() -> None:
    assert chosen(V3, LOGITS, torch.zeros(8)).keys() == {2, 5, 3}


def test_v2_group_limited_routing() -> None:
    expected = {2: 7.803711, 5: 2.870825, 3: 1.056117}
    assert chosen(V2, LOGITS, None) == pytest.approx(expected, abs=1e-6)


def test_greedy_routing_is_not_limited_to_groups() -> None:
    found = chosen(replace(V2, groups=1, top_groups=1), LOGITS, None)
    assert found.keys() == {2, 5, 0}


def test_dropped_groups_stay_dropped_when_every_biased_score_is_negative() -> None:
    logits = torch.randn(50, 8)
    expected, _ = route(V3, logits, torch.zeros(8))
    found, _ = route(V3, logits, torch.full((8,), -1.5))
    masked_with_zero, _ = route(replace(V3, masked=0.0), logits, torch.full((8,), -1.5))
    for plain, biased, wrong in zip(expected.tolist(), found.tolist(), masked_with_zero.tolist(), strict=True):
        assert set(biased) == set(plain)
        assert set(wrong) != set(plain)


SEEDS = st.integers(0, 2**31)


@given(SEEDS)
def test_bias_changes_the_selection_but_never_a_weight_of_an_unchanged_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 8, generator=generator)
    plain = chosen(V3, logits, torch.zeros(8))
    biased = chosen(V3, logits, 0.2 * torch.randn(8, generator=generator))
    if plain.keys() == biased.keys():
        assert biased == pytest.approx(plain)


@given(SEEDS)
def test_normalised_weights_sum_to_the_scaling_factor(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, weights = route(V3, 3 * torch.randn(7, 8, generator=generator), torch.randn(8, generator=generator))
    torch.testing.assert_close(weights.sum(-1), torch.full((7,), 2.5))


@given(SEEDS, st.sampled_from([V2, V3]))
def test_no_more_groups_than_allowed(seed: int, spec: RoutingSpec) -> None:
    generator = torch.Generator().manual_seed(seed)
    bias = 5 * torch.randn(8, generator=generator) if spec.bias else None
    indices, _ = route(spec, torch.randn(7, 8, generator=generator), bias)
    assert all(len({i // 2 for i in row}) <= 2 and len(set(row)) == 3 for row in indices.tolist())


def test_v4_scores_by_the_root_of_softplus() -> None:
    spec = replace(V3, scoring="sqrtsoftplus", groups=1, top_groups=1, normalise=False, scale=1.0)
    expected = {4: 0.688532, 6: 0.908812, 5: 1.145976}
    assert chosen(spec, LOGITS, BIAS) == pytest.approx(expected, abs=1e-6)


def layer(scale: float, width: int = 7, shared_width: int = 9, limit: float | None = None) -> MixtureOfExperts:
    spec = MoeSpec(replace(V3, scale=scale), width, shared_width, limit)
    module = randomise(MixtureOfExperts(spec, 20, torch.float64, None))
    assert isinstance(module, MixtureOfExperts)
    return module


def limited(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    if limit is None:
        return F.silu(gate) * up
    at_most = torch.full_like(gate, limit)
    return F.silu(torch.minimum(gate, at_most)) * torch.maximum(torch.minimum(up, at_most), -at_most)


@pytest.mark.parametrize("limit", [None, 0.3])
def test_expert_sum_is_the_loop_over_chosen_experts(limit: float | None) -> None:
    moe = layer(scale=2.5, limit=limit)
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    logits = F.linear(x.flatten(0, 1), moe.gate.weight)
    indices, weights = route(moe.gate.spec, logits, moe.gate.e_score_correction_bias)
    shared, flat = moe.shared_experts, x.flatten(0, 1)
    expected = shared.down_proj(limited(shared.gate_proj(flat), shared.up_proj(flat), limit))
    for n, token in enumerate(x.flatten(0, 1)):
        for e, weight in zip(indices[n], weights[n], strict=True):
            hidden = limited(moe.experts.gate_proj[e] @ token, moe.experts.up_proj[e] @ token, limit)
            expected[n] += weight * (moe.experts.down_proj[e] @ hidden)
    torch.testing.assert_close(moe(x), expected.view_as(x))


def test_zero_scale_leaves_the_shared_experts() -> None:
    moe = layer(scale=0.0)
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    torch.testing.assert_close(moe(x), moe.shared_experts(x))


def test_shared_experts_are_optional() -> None:
    moe = layer(scale=1.0, shared_width=0)
    assert moe.shared_experts is None
    assert moe(torch.randn(1, 2, 20, dtype=torch.float64)).shape == (1, 2, 20)


def test_bias_stays_in_float32_in_a_bfloat16_layer() -> None:
    spec = SMALL.layer(1).ffn
    assert isinstance(spec, MoeSpec)
    gate = MixtureOfExperts(spec, 20, torch.bfloat16, None).gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
