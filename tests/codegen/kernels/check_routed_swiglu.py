import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.routed_swiglu import routed_swiglu


def draw(tokens, experts, top_k, hidden, width, dtype, choose_from):
    indices = torch.stack([torch.randperm(choose_from)[:top_k] for _ in range(tokens)])
    return (
        torch.randn(tokens, hidden).to(dtype),
        indices,
        torch.rand(tokens, top_k),
        (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype),
        (torch.randn(experts, hidden, width) / width**0.5).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "tokens, experts, top_k, hidden, width, choose_from",
    [(1, 1, 1, 5, 3, 1), (1, 7, 3, 70, 33, 7), (13, 5, 2, 37, 19, 5), (20, 9, 1, 8, 40, 2)],
)
def test_agrees(tokens, experts, top_k, hidden, width, choose_from, dtype):
    arguments = draw(tokens, experts, top_k, hidden, width, dtype, choose_from)
    expected = torch.ops.dsv3.routed_swiglu(*arguments)
    torch.testing.assert_close(routed_swiglu(*arguments), expected, atol=4e-3, rtol=4e-3)


def test_weights_of_experts_nobody_chose_are_not_read():
    x, indices, weights, gate_up, down = draw(3, 6, 2, 9, 5, torch.float32, 3)
    gate_up[3:], down[3:] = torch.nan, torch.nan
    expected = torch.ops.dsv3.routed_swiglu(x, indices, weights, gate_up, down)
    torch.testing.assert_close(routed_swiglu(x, indices, weights, gate_up, down), expected)


@pytest.mark.parametrize("transposed", [(), ("gate", "up", "down"), ("down",), ("up",)])
def test_stacks_may_be_apart_and_transposed(transposed):
    x, indices, weights, gate_up, down = draw(7, 5, 2, 9, 20, torch.float32, 5)
    stacks = dict(zip(("gate", "up", "down"), (*gate_up.chunk(2, 1), down), strict=True))
    for name in transposed:
        stacks[name] = stacks[name].transpose(1, 2).contiguous().transpose(1, 2)
    expected = torch.ops.dsv3.routed_swiglu(x, indices, weights, gate_up, down)
    arguments = x, indices, weights, stacks["gate"], stacks["down"], None, 0, stacks["up"]
    torch.testing.assert_close(torch.ops.dsv3.routed_swiglu(*arguments), expected)
    torch.testing.assert_close(routed_swiglu(*arguments), expected)


def test_gates_and_ups_may_take_turns():
    x, indices, weights, gate_up, down = draw(7, 5, 2, 9, 20, torch.float32, 5)
    turns = gate_up.unflatten(1, (2, 20)).transpose(1, 2).flatten(1, 2).contiguous()
    found = routed_swiglu(x, indices, weights, turns[:, ::2], down, None, 0, turns[:, 1::2])
    torch.testing.assert_close(found, torch.ops.dsv3.routed_swiglu(x, indices, weights, gate_up, down))


def test_gates_and_ups_stay_within_a_limit():
    more = None, 0, None, 0.7
    arguments = draw(7, 5, 2, 9, 20, torch.float32, 5)
    expected = torch.ops.dsv3.routed_swiglu(*arguments, *more)
    torch.testing.assert_close(routed_swiglu(*arguments, *more), expected)
    assert not expected.isclose(torch.ops.dsv3.routed_swiglu(*arguments)).all()


def test_a_residual_is_added_before_rounding():
    arguments = draw(5, 6, 2, 9, 5, torch.float16, 6)
    residual = 100 * torch.randn(5, 20).half()[:, 3:12]
    expected = torch.ops.dsv3.routed_swiglu(*(a.float() if a.dtype == torch.half else a for a in arguments))
    found = routed_swiglu(*arguments, residual)
    torch.testing.assert_close(found, (expected + residual.float()).half(), atol=0, rtol=2e-3)
    torch.testing.assert_close(found, torch.ops.dsv3.routed_swiglu(*arguments, residual), atol=0, rtol=2e-3)
