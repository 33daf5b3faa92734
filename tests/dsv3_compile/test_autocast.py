"""Autocast spelled out: the compiled function casts where the eager one does, by the same passes as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import dsv3_compile
from dsv3_compile import backend
from dsv3_compile.functional import NotFunctional, functional

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs run as they are, so that the same casts give the same bits."""
    monkeypatch.setattr(backend, "inductor", lambda module, *_: module.forward)
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def products(x: Tensor, w: Tensor) -> Any:
    return F.linear(x, w), x @ w.mT, torch.einsum("ta,oa->to", x, w), torch.tensordot(x, w, ([1], [1])), x.mv(w[0])


def attention(x: Tensor, w: Tensor) -> Any:
    q, k = F.linear(x, w)[None, None], F.rms_norm(x, [6])[None, None]
    mixed = F.scaled_dot_product_attention(q, k, k), F.scaled_dot_product_attention(k, q, q, is_causal=True)
    return *mixed, (q @ k.mT).softmax(-1) @ k


def joined(x: Tensor, w: Tensor) -> Any:
    return torch.cat([F.linear(x, w), x]), F.linear(x, w) + x, x.to(BF16).relu().sum()


def routing(x: Tensor, w: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        weights, indices = F.linear(x.float(), w.float()).sigmoid().topk(2)
    return weights / weights.sum(-1, keepdim=True), indices, F.linear(x, w)


def narrow_inside(x: Tensor, w: Tensor) -> Any:
    with torch.autocast("cpu", torch.float16):
        h = F.linear(x, w)
        with torch.autocast("cpu", enabled=False):
            h = F.linear(h.float(), w)
    return F.linear(h, w) * F.linear(x, w)


def to_a_type_the_device_has_not(x: Tensor, w: Tensor) -> Any:
    with torch.autocast("cpu", torch.float32):
        return F.linear(x, w)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("call", [products, attention, joined, routing, narrow_inside, to_a_type_the_device_has_not])
def test_a_compiled_call_casts_as_the_eager_one(
    call: Callable[..., Any], around: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = torch.randn(5, 6), torch.randn(6, 6)
    # As if a pass had found something: else the graph goes on as it came.
    monkeypatch.setattr(backend, "improve", lambda found, *_: (True, None))
    with torch.autocast("cpu", BF16, enabled=around):
        found, expected = torch.compile(call, backend="dsv3")(x, w), call(x, w)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_passes_read_what_autocast_casts() -> None:
    x, w = torch.randn(5, 6), torch.randn(6, 6)
    with torch.autocast("cpu", BF16):
        (weights, indices, _), expected = torch.compile(routing, backend="dsv3")(x, w), routing(x, w)
    assert torch.allclose(weights, expected[0]) and torch.equal(indices, expected[1])
    (block,) = dsv3_compile.last_report()["blocks"]
    assert {one["name"]: len(one["matches"]) for one in block["passes"]}["fuse-routing"] == 1


def test_a_trace_that_stops_under_autocast_leaves_none_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return F.linear(x, x).relu()

    def stopping(*_: Any) -> Tensor:
        raise RuntimeError("stop here")

    traced: list[Any] = []
    torch.compile(call, backend=lambda module, _: traced.append(module) or module.forward)(torch.randn(5, 6))
    (module,) = traced
    (relu,) = (node for node in module.graph.nodes if "relu" in str(node.target))
    relu.op, relu.target = "call_function", stopping
    with pytest.raises(NotFunctional, match="stop here"):
        functional(module)
    assert not torch.is_autocast_enabled("cpu")


def test_what_no_cast_explains_goes_to_inductor_as_it_came() -> None:
    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return torch.inner(x, x)

    x = torch.randn(5, 6)
    assert torch.equal(torch.compile(call, backend="dsv3")(x), call(x))
    assert dsv3_compile.last_report()["fallback"] == "inner casts inside under autocast, which the graph cannot say"
