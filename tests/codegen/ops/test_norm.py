"""rms_norm, add_rms_norm, swiglu."""

import torch
import torch.nn.functional as F

from codegen import ops  # noqa: F401  defines torch.ops.dsv3

dsv3 = torch.ops.dsv3


def test_rms_norm_is_torch_rms_norm_in_double():
    x, weight = torch.randn(3, 2, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(dsv3.rms_norm(x, weight, 1e-5), F.rms_norm(x, (7,), weight, 1e-5))


def test_rms_norm_rounds_once():
    x, weight = torch.randn(64, 33).bfloat16(), torch.randn(33).bfloat16()
    exact = F.rms_norm(x.double(), (33,), weight.double(), 1e-6)
    differing = dsv3.rms_norm(x, weight, 1e-6) != exact.bfloat16()
    # Two roundings would change about a quarter of the elements; fp32 sums change the few next to a boundary.
    assert differing.double().mean() < 0.01


def test_add_rms_norm_returns_the_norm_of_the_rounded_sum_and_the_sum():
    x, residual, weight = torch.randn(5, 7).half(), torch.randn(5, 7).half(), torch.randn(7).half()
    normed, total = dsv3.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, dsv3.rms_norm(total, weight, 1e-6))


def test_swiglu_gates_the_second_half_with_the_first():
    gate_up = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(dsv3.swiglu(gate_up), F.silu(gate_up[:, :5]) * gate_up[:, 5:])
