"""record_launches: what a launcher launches is learnt without a GPU, over all free sizes."""

import threading

import pytest
import torch

from codegen.kernels.mla_attention import mla_attention
from codegen.kernels.rms_norm import rms_norm, rms_norm_kernel
from codegen.record import TensorSpec, fitting, record_launches, spec_of
from codegen.targets import target
from tests.codegen.calls import operands

SM_80 = target("sm_80")


def test_constants_types_and_options_of_a_launch():
    (launch,) = record_launches(rms_norm, operands("rms_norm"), SM_80)
    assert launch.kernel == "rms_norm_kernel"
    assert launch.constants == {
        "residual": None,
        "total": None,
        "EPS": 1e-6,
        "ADD": False,
        "D": 72,
        "BLOCK_D": 128,
        "OVERLAPPED": False,
    }
    assert launch.types == dict(x="*bf16", weight="*bf16", normed="*bf16", x_stride="i32", residual_stride="i32")
    assert launch.options == {"num_warps": 1}


def test_every_form_that_some_size_needs_is_found():
    launches = record_launches(mla_attention, operands("mla_attention"), SM_80)
    assert [launch.kernel for launch in launches].count("merge_splits_kernel") == 1
    forms = {launch.constants["SPLIT"] for launch in launches if launch.kernel == "mla_attention_kernel"}
    assert forms == {True, False}


def test_only_what_every_size_keeps_aligned_is_called_aligned():
    def with_width(width):
        x = TensorSpec(("N", width), torch.bfloat16)
        return record_launches(rms_norm, (x, TensorSpec((width,), torch.bfloat16), 1e-6), SM_80)[0]

    assert "x_stride" in with_width(64).aligned
    assert "x_stride" not in with_width(72).aligned
    x = TensorSpec(("N", 8), torch.bfloat16, ("8*N", 1))
    (launch,) = record_launches(rms_norm, (x, TensorSpec((8,), torch.bfloat16), 1e-6), SM_80)
    assert "x_stride" not in launch.aligned


def test_another_thread_launches_as_usual_meanwhile(monkeypatch):
    theirs = []
    monkeypatch.setattr(rms_norm_kernel, "run", lambda *arguments, **options: theirs.append((arguments, options)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: "theirs")

    def elsewhere():
        rms_norm_kernel[(7,)](torch.cuda.get_device_properties(device=0))

    def launch(*arguments):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return rms_norm(*arguments)

    (launched,) = record_launches(launch, operands("rms_norm"), SM_80)
    assert launched.kernel == "rms_norm_kernel" and launched.constants["D"] == 72
    assert theirs and all(one == (("theirs",), {"grid": (7,), "warmup": False}) for one in theirs)


def test_operands_of_a_traced_call_keep_free_sizes():
    seen = {}

    def backend(graph_module, inputs):
        letters = {str(i.node.expr): "N" for i in inputs if isinstance(i, torch.SymInt)}
        node = next(n for n in graph_module.graph.nodes if n.op == "call_method")
        seen["spec"] = spec_of(node.meta["example_value"], letters)
        return graph_module

    x = torch.randn(5, 6)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: x.transpose(0, 1), backend=backend)(x)
    assert seen["spec"] == TensorSpec((6, "N"), torch.float32, (1, 6))


def test_an_operand_of_another_kind_is_named():
    with pytest.raises(ValueError, match="an operand is a list; accepted: tensors, numbers, texts, None"):
        spec_of([1, 2])


def test_sizes_are_arithmetic_in_free_sizes():
    x, weight = TensorSpec(("B*(S + 1)//2", 8), torch.bfloat16), TensorSpec((8,), torch.bfloat16)
    assert x.free_sizes() == {"B", "S"}
    assert record_launches(rms_norm, (x, weight, 1e-6), SM_80)
    with pytest.raises(ValueError, match=r"size 'exit\(\)' is not arithmetic"):
        record_launches(rms_norm, (TensorSpec(("exit()", 8), torch.bfloat16), weight, 1e-6), SM_80)


def test_a_form_must_serve_every_size():
    def up_to_a_hundred(x, weight, eps):
        return None if x.shape[0] <= 100 else "more than 100 rows"

    x, weight = TensorSpec(("N", 8), torch.bfloat16), TensorSpec((8,), torch.bfloat16)
    assert not fitting(up_to_a_hundred, (x, weight, 1e-6), SM_80)
    assert fitting(up_to_a_hundred, (TensorSpec((4, 8), torch.bfloat16), weight, 1e-6), SM_80)
    assert fitting(None, (x, weight, 1e-6), SM_80)
