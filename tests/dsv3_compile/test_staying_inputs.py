"""Inductor is told which inputs lie where they lay: weights, buffers, and caches marked by their owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from transformers import StaticCache

import dsv3_compile
from dsv3_compile import backend
from tests.foreign.models import deepseek_v3
from tests.passes.mla import Mla

Moving = list[tuple[int, list[int]]]  # of every compiled graph: how many inputs it has, and which of them may move


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moving]:
    """What Inductor hears, up to where it would write code."""
    heard: Moving = []

    def inner(module: fx.GraphModule, examples: Sequence[Any], *, static_input_idxs: Sequence[int], **_: Any) -> Any:
        heard.append((len(examples), sorted(set(range(len(examples))) - set(static_input_idxs))))
        return make_boxed_func(module.forward)

    def inductor(module: fx.GraphModule, examples: Sequence[Any], *_: Any) -> Callable[..., Any]:
        return compile_fx(module, list(examples), inner_compile=inner)

    monkeypatch.setattr(backend, "inductor", inductor)
    torch.manual_seed(0)
    torch._dynamo.reset()
    backend._reports.clear()
    with torch.no_grad():
        yield heard


def test_the_same_inputs_stay_as_without_the_passes(moving: Moving) -> None:
    model = deepseek_v3(num_hidden_layers=2)
    ids, heard, results = torch.randint(0, 97, (2, 7)), list[Moving](), list[Tensor]()
    for one in (backend.inductor, "dsv3"):
        torch._dynamo.reset()
        moving.clear()
        compiled = torch.compile(model, backend=one)
        cache = StaticCache(config=model.config, max_cache_len=24)
        compiled(ids, use_cache=True, past_key_values=cache)
        results.append(compiled(ids[:, :1], past_key_values=cache).logits)
        heard.append(list(moving))
    assert len(dsv3_compile.reports()) == 2 and not any(report["fallback"] for report in dsv3_compile.reports())
    plain, ours = heard
    assert plain == ours and all(len(others) < 10 < inputs for inputs, others in ours)
    torch.testing.assert_close(*results)


class Offset(Mla):
    """Latent attention of which the graph holds a constant."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs) + torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5]).repeat(4)


def test_constants_of_a_graph_stay(moving: Moving) -> None:
    module, example = Offset().eval(), inputs()
    found = torch.compile(module, backend="dsv3", dynamic=False)(*example)
    torch.testing.assert_close(found, module(*example))
    assert not dsv3_compile.last_report()["fallback"]
    ((count, others),) = moving
    assert count - len(others) >= 4 and len(others) == 4


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = torch.tensor([[19], [17], [0]])
    return torch.randn(3, 1, 20), positions, torch.randn(3, 20, 24), torch.randn(3, 20, 6)


class Remembering(nn.Module):
    """Latent attention, and a buffer of how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Mla()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, *inputs: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.attention(*inputs)


def test_all_that_a_module_holds_stays(moving: Moving) -> None:
    module = Remembering().eval()
    example = inputs()
    found = dsv3_compile.compile(module, example)
    expected = module(*example)
    torch.testing.assert_close(found(*example), expected)
    assert module.calls == 2
    assert moving == [(8, [4, 5, 6, 7])]  # three weights and the buffer come first
