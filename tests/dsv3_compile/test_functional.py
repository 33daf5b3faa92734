"""Graphs with writes in place, through functional form and back: values, and who shares memory with whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dsv3_compile
from codegen.targets import target
from dsv3_compile import backend
from dsv3_compile.functional import callable_again, functional
from passes.base import Context, Workload
from passes.canonicalise import Canonicalise


class Module(nn.Module):
    """Two buffers, and what is done with them."""

    def __init__(self, step: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("a", torch.randn(3, 4))
        self.register_buffer("b", torch.randn(3, 4))

    def forward(self, x: Tensor) -> Any:
        return self.step(self, x)


def shifted(m: Any, x: Tensor) -> Any:
    m.b.copy_(m.a)
    m.a.copy_(x)
    return x * 2


def shifted_and_read(m: Any, x: Tensor) -> Any:
    read = m.a.sum()
    m.b.copy_(m.a)
    m.a.copy_(x)
    return x + read


def swapped(m: Any, x: Tensor) -> Any:
    old = m.a.clone()
    m.a.copy_(m.b)
    m.b.copy_(old)
    return x * 2


def rolled(m: Any, x: Tensor) -> Any:
    m.a.copy_(torch.cat([m.a[1:], x[:1]]))
    return m.a * 2


def views_of_old_values(m: Any, x: Tensor) -> Any:
    m.b.copy_(m.a.flip(0).flip(0)[:, :1].expand(3, 4))
    m.a.copy_(x)
    return x * 2


def old_value(m: Any, x: Tensor) -> Any:
    old = m.a.clone()
    m.a.copy_(x)
    return old


def one_value_for_two(m: Any, x: Tensor) -> Any:
    y = x + 1
    m.a.copy_(y)
    m.b.copy_(y)
    return x * 2


def the_buffer(m: Any, x: Tensor) -> Any:
    m.a.copy_(x + 1)
    return m.a


def views_of_the_buffer(m: Any, x: Tensor) -> Any:
    m.a.copy_(x + 1)
    m.b[1:].copy_(x[1:])
    return m.a[1:], m.b.split(2)[0].mT, m.b[1:].unsqueeze(0)


def the_value(m: Any, x: Tensor) -> Any:
    y = x + 1
    m.a.copy_(y)
    return y


def a_copy_of_the_input(m: Any, x: Tensor) -> Any:
    return x.clone(), x


def two_equal(m: Any, x: Tensor) -> Any:
    return x + 1, x + 1


def two_equal_views(m: Any, x: Tensor) -> Any:
    y = x * 3
    return y.view(4, 3), y[1:], y.clone()


def a_constant(m: Any, x: Tensor) -> Any:
    return torch.tensor([1.0, 2.0, 3.0, 4.0])


STEPS = [
    shifted, shifted_and_read, swapped, rolled, views_of_old_values, old_value, one_value_for_two, the_buffer,
    views_of_the_buffer, the_value, a_copy_of_the_input, two_equal, two_equal_views, a_constant,
]  # fmt: skip


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def there_and_back(traced: fx.GraphModule, examples: Sequence[Any]) -> fx.GraphModule:
    found = functional(traced)
    Canonicalise().run(found.module, Context("any", target("cpu"), Workload(0, 0, 0)))
    return callable_again(found)


def followed(call: Callable[[Tensor], Any], module: Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results of three calls, written to after each, and all that is left in inputs and buffers."""
    seen = []
    for x in inputs:
        results = call(x)
        for result in results if isinstance(results, tuple) else (results,):
            seen.append(result.clone())
            result.mul_(-2)
            seen += [x.clone(), module.a.clone(), module.b.clone(), result.clone()]
    return seen


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_values_and_shared_memory_are_those_of_the_module(step: Callable[..., Any]) -> None:
    module, again = Module(step), Module(step)
    again.load_state_dict(module.state_dict())
    inputs = [torch.randn(3, 4) for _ in range(3)]
    expected = followed(module, module, [x.clone() for x in inputs])
    run = torch.compile(again, backend=lambda *graph: there_and_back(*graph).forward)
    for one, two in zip(followed(run, again, [x.clone() for x in inputs]), expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("step", [shifted, shifted_and_read, swapped, old_value], ids=lambda step: step.__name__)
def test_inductor_keeps_old_values(step: Callable[..., Any]) -> None:
    module, again = Module(step), Module(step)
    again.load_state_dict(module.state_dict())
    x = torch.randn(3, 4)
    expected = followed(module, module, [x.clone()])
    run = torch.compile(again, backend=lambda *graph: backend.inductor(there_and_back(*graph), graph[1], None, {}))
    for one, two in zip(followed(run, again, [x.clone()]), expected, strict=True):
        assert torch.allclose(one, two)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_module_compiled_whole_does_the_same(step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if step in (one_value_for_two, the_buffer, views_of_the_buffer):
        pytest.skip("torch.export refuses the first, and gives buffers back as tensors of their own")
    monkeypatch.setattr(backend, "inductor", lambda graph, *_: graph.forward)
    module, again = Module(step), Module(step)
    again.load_state_dict(module.state_dict())
    inputs = [torch.randn(3, 4) for _ in range(3)]
    expected = followed(module, module, [x.clone() for x in inputs])
    run = dsv3_compile.compile(again, (torch.randn(3, 4),))
    for one, two in zip(followed(run, again, [x.clone() for x in inputs]), expected, strict=True):
        assert torch.equal(one, two)


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) + self[1](x)


def test_inputs_of_one_short_name_are_told_apart() -> None:
    module, x = Twice(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    run = torch.compile(module.forward, backend=lambda *graph: there_and_back(*graph).forward)
    assert torch.equal(run(x), module(x))
