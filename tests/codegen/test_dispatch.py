"""Which kernel stands behind an op on a GPU; launching them is tests/codegen/test_kernels_on_gpu.py's."""

import importlib

import pytest
import torch
from torch import fx
from torch.library import opcheck

from codegen import dispatch
from codegen.direct import DirectLaunches
from codegen.dispatch import launcher
from codegen.ops.registry import COMPOSITE, OPAQUE, one_call, serve
from codegen.planned import Planned
from codegen.record import record_launches
from codegen.targets import target
from codegen.tuning import available, own_form
from tests.codegen.calls import operands

dsv3 = torch.ops.dsv3


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_a_target_without_forms_of_its_own_runs_the_plain_ones(name):
    plain = importlib.import_module("codegen.kernels.mla_attention").mla_attention
    assert launcher("mla_attention", target(name)) is plain


@pytest.mark.parametrize(("dtype", "own"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_own_form_runs_what_it_serves(dtype, own, monkeypatch):
    calls = []
    for place in ("codegen.kernels", "codegen.kernels.sm_90"):
        module = importlib.import_module(f"{place}.routed_swiglu")
        monkeypatch.setattr(module, "routed_swiglu", lambda *_, place=place: calls.append(place))
    x, gate_up, down = (torch.empty(*shape, dtype=dtype) for shape in ((3, 16), (4, 16, 16), (4, 16, 8)))
    launcher("routed_swiglu", target("sm_90"))(x, torch.empty(3, 2), torch.empty(3, 2), gate_up, down)
    assert calls == ["codegen.kernels.sm_90" if own else "codegen.kernels"]


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_every_op_that_stays_one_call_is_offered_once(name, monkeypatch):
    offered = []
    monkeypatch.setattr(dispatch, "serve", lambda op, key, implementation: offered.append((op, key)))
    dispatch.register(target(name))
    twins = [f"{op}_call" for op in COMPOSITE if own_form(op, target(name))]
    assert ("linear_call" in twins) == (name == "sm_90")
    served = [op for op in OPAQUE if available(op, target(name))]
    assert sorted(offered) == sorted((op, "CUDA") for op in (*served, *twins))


def test_kernels_behind_ops_are_launched_directly_and_still_recorded(monkeypatch):
    monkeypatch.setattr(dispatch, "serve", lambda *_: None)
    dispatch.register(target("sm_90"))
    dispatch.register(target("sm_90"))
    kernel = importlib.import_module("codegen.kernels.rms_norm").rms_norm_kernel
    assert isinstance(kernel.run, DirectLaunches) and not isinstance(kernel.run.through_triton, DirectLaunches)
    (launch,) = record_launches(launcher("rms_norm", target("sm_80")), operands("rms_norm"), target("sm_80"))
    assert launch.kernel == "rms_norm_kernel" and not kernel.run.known


@pytest.mark.parametrize(("name", "planned"), [("sm_90", True), ("sm_80", True), ("gfx942", False)])
def test_calls_are_planned_where_all_launches_are_direct(name, planned, monkeypatch):
    runs = []
    monkeypatch.setattr(dispatch, "serve", lambda op, key, run: runs.append(run))
    dispatch.register(target(name))
    assert runs and all(isinstance(run, Planned) == planned for run in runs)
    assert not planned or not list(dispatch._kernels())


def test_ops_with_a_kernel_of_the_target_stay_one_call():
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    per_head = graph.call_function(dsv3.head_linear.default, (x, weight))
    graph.output(graph.call_function(dsv3.rotary.default, (per_head, x, x, True)))
    dispatch.call_kernels(graph, target("sm_90"))
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
        "dsv3.head_linear_call.default",
        "dsv3.rotary.default",  # which Inductor fuses better
    ]


def test_a_twin_computes_the_same_and_gives_it_as_a_kernel_does():
    x, weight = torch.randn(3, 5, 2, 16), torch.randn(2, 7, 16)
    found = one_call("head_linear")(x, weight)
    assert torch.equal(found, dsv3.head_linear(x, weight)) and found.is_contiguous()
    opcheck(one_call("head_linear"), (x, weight), test_utils=("test_schema", "test_faketensor"))


def test_an_implementation_serves_its_dispatch_key_only():
    seen = []
    serve("sort_pairs", "XPU", lambda *arguments: seen.append(arguments) or (torch.empty(0), torch.empty(0)))
    torch.ops.dsv3.sort_pairs(torch.tensor([[1, 0]]), 2)
    assert not seen
