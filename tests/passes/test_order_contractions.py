"""Absorption is derived: for any sizes and layouts, costed, forcible, and refused with the edge named."""

import dataclasses

import pytest
import sympy
import torch

from model_def.presets import PRESETS
from passes.base import Workload
from passes.canonicalise import Canonicalise
from passes.cost import T, cost
from passes.order_contractions import OrderContractions
from tests.passes.capture import model_layer
from tests.passes.harness import apply, reasons
from tests.passes.mla import HeadFirst, Mla, mla_graph

DECODE, PREFILL = Workload(2, 1, 999), Workload(1, 4096, 4096)


def per_context(graph) -> sympy.Expr:
    """FLOPs that one more cached position costs."""
    return sympy.diff(cost(graph.graph).flops, T)


@pytest.mark.parametrize("heads, rank", [(3, 24), (3, 512), (16, 256), (128, 24), (128, 512)])
def test_decode_absorbs_for_any_head_count_and_rank(heads, rank):
    graph = mla_graph(heads=heads, rank=rank)
    expanded = per_context(graph)
    outcome = apply(OrderContractions(), graph)
    assert [m.split(": ")[1].split(",")[0] for m in outcome.matches] == ["absorbed", "absorbed"]
    # scores over rank + rope, values over rank; nothing of size (p + v)·c per cached position is left
    assert per_context(graph) == 2 * sympy.Symbol("B", positive=True, integer=True) * heads * (2 * rank + 6)
    assert per_context(graph) != expanded


@pytest.mark.parametrize("variant", [Mla, HeadFirst])
@pytest.mark.parametrize("form", ["expanded", "absorbed", "folded"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_form_can_be_forced_and_is_equal(variant, form, phase):
    graph = mla_graph(variant, 1 if phase == "decode" else "S")
    apply(Canonicalise(), graph, phase)
    outcome = apply(OrderContractions(**{phase: form}), graph, phase)
    assert outcome.decision == {phase: f"{form}+{form}"}


def test_prefill_of_a_fresh_prompt_stays_expanded_and_says_so():
    graph = mla_graph(queries="S", heads=16, nope=128, value=128, rank=512, rope=64, hidden=384)
    outcome = apply(OrderContractions(), graph, "prefill")
    assert outcome.decision == {"prefill": "expanded+expanded"}
    assert not outcome.matches and "stays expanded" in reasons(outcome)


def test_an_order_that_was_asked_for_is_not_called_the_cheapest():
    outcome = apply(OrderContractions(decode="expanded"), mla_graph())
    assert {refusal.reason for refusal in outcome.refusals} == {"stays expanded, as order-contractions.decode asks"}


def test_layout_does_not_matter():
    graph = mla_graph(HeadFirst)
    assert apply(OrderContractions(), graph).decision == {"decode": "absorbed+absorbed"}


@pytest.mark.parametrize("preset, layer", [("toy", 0), ("toy", 1), ("moonlight", 0)])
def test_the_definition_absorbs_in_decode(preset, layer):
    config = PRESETS[preset]
    if preset != "toy":
        config = dataclasses.replace(
            config, hidden_size=64, num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=24, intermediate_size=40
        )
    graph = model_layer(config, layer, torch.float32)
    assert apply(OrderContractions(), graph).decision == {"decode": "absorbed+absorbed"}


def test_a_nonlinearity_between_is_refused_with_its_edge():
    graph = mla_graph(between=torch.relu)
    outcome = apply(OrderContractions(), graph)
    assert not outcome.matches
    assert "linear_1 → relu" in reasons(outcome)


def test_keys_used_elsewhere_are_refused_with_the_user_named():
    graph = mla_graph(keys_out=True, rank=64)
    outcome = apply(OrderContractions(), graph)
    assert not outcome.matches
    assert "must be computed anyway" in reasons(outcome) and "output" in reasons(outcome)


def test_folding_needs_leave_to_grow_the_weights():
    small, large = (mla_graph(hidden=8, nope=30, rank=12) for _ in range(2))
    frugal = apply(OrderContractions(), small, workload=DECODE)
    generous = apply(OrderContractions(storage_growth=10.0), large, workload=DECODE)
    assert "folded" not in frugal.decision["decode"]
    assert "folded" in generous.decision["decode"]


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="order-contractions.decode: 'fast' is none of auto, expanded"):
        OrderContractions(decode="fast")


def test_decisions_can_be_pinned_and_repeated():
    first, second = (mla_graph() for _ in range(2))
    one = OrderContractions()
    pinned = one.decided(apply(one, first))
    assert pinned.decode == "absorbed+absorbed"
    assert apply(pinned, second, workload=PREFILL).decision == {"decode": "absorbed+absorbed"}
