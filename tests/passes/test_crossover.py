"""Where one form of attention overtakes another."""

from __future__ import annotations

import functools

import pytest
import sympy
import torch

from codegen.targets import target
from model_def.presets import PRESETS
from passes.base import Context, Workload
from passes.canonicalise import Canonicalise
from passes.cost import B, T
from passes.crossover import FormCost, even_queries, even_queries_far, overtakes, price_forms
from passes.pipeline import Pipeline
from tests.passes.harness import layer_graph

CONTEXT = Context("prefill", target("sm_90"), Workload(1, 4096, 4096))


@functools.cache
def forms(name: str = "deepseek-v3") -> dict[str, FormCost]:
    graph = layer_graph(PRESETS[name], 0, torch.bfloat16)
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
