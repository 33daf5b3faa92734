"""Where one form of attention overtakes another."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import sympy
import torch

from codegen.targets import target
from model_def.presets import PRESETS
from passes.base import Context, Workload
from passes.canonicalise import Canonicalise
from passes.cost import B, T
from passes.crossover import FormCost, changes, even_queries, even_queries_far, fastest, overtakes, price_forms
from passes.pipeline import Pipeline
from tests.passes.capture import model_layer

CONTEXT = Context("prefill", target("sm_90"), Workload(1, 4096, 4096))


@functools.cache
def forms(name: str = "deepseek-v3") -> dict[str, FormCost]:
    graph = model_layer(PRESETS[name], 0, torch.bfloat16)
    Pipeline((Canonicalise(),)).run(graph, CONTEXT)
    return {price.form: price for price in price_forms(graph, CONTEXT)}


def test_v3_is_even_near_171_queries_of_a_long_context():
    # C(P + V) / (2C + R − P − R − V) with C=512, P=V=128, R=64
    assert even_queries_far(forms()["absorbed"], forms()["expanded"]) == pytest.approx(512 * 256 / 768)


def test_even_forms_need_the_same_operations():
    absorbed, expanded = forms()["absorbed"], forms()["expanded"]
    even = even_queries(absorbed, expanded)
    for context in (1024, 100_000):
        at = {B: 1, T: context, sympy.Symbol("S", positive=True, integer=True): even.subs(T, context)}
        assert sympy.simplify(absorbed.flops.subs(at) - expanded.flops.subs(at)) == 0


def test_a_single_head_has_nothing_to_fold():
    config = dataclasses.replace(PRESETS["toy"], num_attention_heads=1)
    graph = model_layer(config, 0, torch.float32)
    Pipeline((Canonicalise(),)).run(graph, CONTEXT)
    assert [price.form for price in price_forms(graph, CONTEXT)] == ["expanded", "absorbed"]


def test_folding_stores_more_and_computes_more():
    folded, absorbed = forms()["folded"], forms()["absorbed"]
    assert folded.weight_bytes - absorbed.weight_bytes == pytest.approx(872e6, rel=0.01)
    assert folded.flops_at(CONTEXT.workload) > absorbed.flops_at(CONTEXT.workload)


@pytest.mark.parametrize("context", [1024, 65536])
def test_the_overtaking_query_is_the_first_that_is_no_slower(context):
    absorbed, expanded, machine = forms()["absorbed"], forms()["expanded"], target("sm_90")
    queries = overtakes(absorbed, expanded, machine, 1, context)
    assert queries is not None

    def seconds(form: FormCost, count: int) -> float:
        return form.seconds(machine, Workload(1, count, context))

    assert seconds(expanded, queries) <= seconds(absorbed, queries)
    assert seconds(expanded, queries - 1) > seconds(absorbed, queries - 1)


def test_what_is_never_overtaken_is_none():
    absorbed, expanded = forms()["absorbed"], forms()["expanded"]
    assert overtakes(absorbed, expanded, target("sm_90"), 1, 65536, largest=8) is None


def test_absorbing_decodes_faster_from_two_positions_on():
    """Of one position, keys and values are cheaper to rebuild than the query is to project; of more they are not."""
    absorbed, expanded, machine = forms()["absorbed"], forms()["expanded"], target("sm_90")
    assert changes(expanded, absorbed, machine, lambda positions: Workload(1, 1, positions), 4096) == 2
    assert fastest([expanded, absorbed], machine, Workload(1, 1, 1)) is expanded
    assert fastest([expanded, absorbed], machine, Workload(1, 1, 2)) is absorbed


def test_folding_overtakes_nothing_at_the_sizes_of_v3():
    absorbed, folded, machine = forms()["absorbed"], forms()["folded"], target("sm_90")
    assert changes(absorbed, folded, machine, lambda rows: Workload(rows, 1, 4096), 1024) is None


def test_a_batch_that_changes_the_faster_form_is_the_first_that_does():
    """Small weights are soon read in less time than the rows take, and folded ones then save a product per row."""
    absorbed, folded, machine = forms("toy")["absorbed"], forms("toy")["folded"], target("sm_90")

    def at(rows: int) -> Workload:
        return Workload(rows, 1, 1024)

    rows = changes(absorbed, folded, machine, at, 1024)
    assert rows is not None
    assert fastest([absorbed, folded], machine, at(rows - 1)) is absorbed
    assert fastest([absorbed, folded], machine, at(rows)) is folded
