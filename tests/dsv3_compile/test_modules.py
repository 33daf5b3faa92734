"""dsv3_compile.compile(module, example_inputs): any module, exported once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import dsv3_compile
from dsv3_compile import backend
from dsv3_compile.modules import CompiledModule, ModuleError
from tests.passes.mla import Mla


class Counting(nn.Module):
    """A buffer that is written, one that is no part of the checkpoint, a flag, a dict, and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(5, 7)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("offset", torch.randn(7), persistent=False)

    def forward(self, x: Tensor, double: bool, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls.add_(1)
        y = self.map(x) + extra["bias"] + self.offset
        return {"y": y * 2 if double else y, "calls": self.calls + 0.5}


@pytest.fixture(autouse=True)
def graphs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without Inductor, whose C++ takes long; it is tested with the backend."""
    monkeypatch.setattr(backend, "inductor", lambda module, *_: module.forward)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


EXTRA = {"bias": torch.randn(7, generator=torch.Generator().manual_seed(1))}


def compiled() -> tuple[Counting, CompiledModule]:
    module = Counting().eval()
    free = ({0: Dim("N", min=1, max=64)}, None, {"bias": None})
    return module, dsv3_compile.compile(module, (torch.randn(4, 5), True, EXTRA), dynamic_shapes=free)


def test_structure_free_sizes_and_buffers_are_those_of_the_module() -> None:
    module, found = compiled()
    assert module.calls == 0  # compiling runs nothing
    for rows in (1, 9):
        x = torch.randn(rows, 5)
        out = found(x, True, EXTRA)
        assert torch.allclose(out["y"], 2 * (module.map(x) + EXTRA["bias"] + module.offset), atol=1e-6)
    assert module.calls == 2 and out["calls"] == 2.5
    module.map.weight.zero_()  # parameters are shared, not copied
    assert torch.allclose(found(x, True, EXTRA)["y"], 2 * (module.map.bias + EXTRA["bias"] + module.offset), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 5), False, EXTRA), "argument 1 is False; the module was compiled for True"),
        ((torch.ones(2, 6), True, EXTRA), r"tensor 0 has shape \[2, 6\]"),
        ((torch.ones(2, 5, dtype=torch.float64), True, EXTRA), "tensor 0 is not torch.float32"),
        ((torch.ones(2, 5), True), "another structure"),
    ],
)
def test_other_arguments_than_exported_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    _, found = compiled()
    with pytest.raises(ModuleError, match=message):
        found(*arguments)


def test_what_cannot_be_captured_whole_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ModuleError, match=r"torch\.export cannot capture Branching"):
        dsv3_compile.compile(Branching(), (torch.randn(3),))
    with pytest.raises(ModuleError, match="expected a tuple of arguments"):
        dsv3_compile.compile(nn.Linear(2, 2), torch.randn(3, 2))


def test_no_backward_pass_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def inductor(module: Any, *_: Any) -> Any:
        traced.append(torch.is_grad_enabled())
        return module.forward

    monkeypatch.setattr(backend, "inductor", inductor)
    with torch.enable_grad():
        found = dsv3_compile.compile(nn.Linear(2, 3), (torch.randn(5, 2),))
        assert not found(torch.randn(5, 2)).requires_grad
    assert traced == [False]


def test_attention_on_a_latent_is_absorbed_in_a_module_of_ones_own() -> None:
    batch, context = 3, 200
    module, positions = Mla().eval(), torch.tensor([[199], [17], [0]])
    example = (torch.randn(batch, 1, 20), positions, torch.randn(batch, context, 24), torch.randn(batch, context, 6))
    found = dsv3_compile.compile(module, example)
    expected = module(*example)
    assert (found(*example) - expected).abs().max() <= 1e-5 * expected.abs().max()
    (block,) = found.report["blocks"]
    assert {one["name"]: len(one["matches"]) for one in block["passes"]}["order-contractions"] == 2
