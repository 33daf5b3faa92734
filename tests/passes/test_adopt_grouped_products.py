"""Another library's grouped products, where the experts around them stay as they are written."""

from __future__ import annotations

import pytest
import torch

from passes.adopt_grouped_products import AdoptGroupedProducts
from passes.cost import cost
from tests.passes import test_group_experts as zoo
from tests.passes.capture import CONTEXT
from tests.passes.harness import certified, count, untouched

dsv3 = torch.ops.dsv3

BACKWARDS = torch.ops.zoo.multiply_groups_backwards
SORTED = [
    zoo.sorted_and_grouped,
    zoo.sorted_back_by_argsort,
    zoo.written_back_into_place,  # int64 offsets
    zoo.per_expert_bias_sorted,
    zoo.sorted_by(zoo.second),  # group-experts refuses it: the rows are another top-k's
    zoo.rows_left_sorted,
]


@pytest.mark.parametrize("top_k", [zoo.K, 1])
@pytest.mark.parametrize("experts", SORTED)
def test_both_products_become_ours(experts, top_k, monkeypatch):
    monkeypatch.setattr(zoo, "K", top_k)
    graph = zoo.graph_with(experts)
    outcome = certified(AdoptGroupedProducts(), graph, seeds=(0,))
    assert len(outcome.matches) == 2 and not outcome.refusals
    assert count(graph, dsv3.grouped_linear) == 2 and count(graph, zoo.multiply_groups) == 0


def test_theirs_and_ours_cost_the_same():
    graph = zoo.graph_with(zoo.sorted_and_grouped, shape=(4, zoo.D))
    before = cost(graph.graph)
    AdoptGroupedProducts().run(graph, CONTEXT)
    ours = cost(graph.graph)
    assert (before.flops, before.bytes, before.launches) == (ours.flops, ours.bytes, ours.launches)
    pairs = 4 * zoo.K
    assert before.flops == 2 * 4 * zoo.D * zoo.E + 2 * pairs * 3 * zoo.D * zoo.I


def short_offsets(m, x, indices, weights):
    offsets = zoo.ends(indices).clamp(max=3)
    return zoo.multiply_groups(x, m.up_t, offsets)


def half_the_rows(m, x, indices, weights):
    return zoo.multiply_groups(x, m.up_t, zoo.ends(indices))


@pytest.mark.parametrize("experts", [short_offsets, half_the_rows])
def test_rows_that_nothing_counts_are_refused(experts):
    refused = untouched(AdoptGroupedProducts(), zoo.graph_with(experts))
    assert refused.startswith("the offsets") and refused.endswith("are not known to count all rows")


def test_what_only_looks_like_a_grouped_product_stays():
    assert untouched(AdoptGroupedProducts(), zoo.graph_with(zoo.sorted_by(zoo.first, multiply=BACKWARDS))) == ""
