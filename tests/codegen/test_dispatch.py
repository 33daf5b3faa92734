"""Which kernel stands behind an op on a GPU; launching them is tests/codegen/test_kernels_on_gpu.py's."""

import importlib

import pytest
import torch

from codegen import dispatch
from codegen.dispatch import launcher
from codegen.ops.registry import OPAQUE, serve
from codegen.targets import target


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


def test_every_op_that_stays_one_call_is_offered_once(monkeypatch):
    offered = []
    monkeypatch.setattr(dispatch, "serve", lambda op, key, implementation: offered.append((op, key)))
    dispatch.register(target("sm_90"))
    assert sorted(offered) == sorted((op, "CUDA") for op in OPAQUE)


def test_an_implementation_serves_its_dispatch_key_only():
    seen = []
    serve("sort_pairs", "XPU", lambda *arguments: seen.append(arguments) or (torch.empty(0), torch.empty(0)))
    torch.ops.dsv3.sort_pairs(torch.tensor([[1, 0]]), 2)
    assert not seen
