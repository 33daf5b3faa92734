"""dsv3_compile.compile(module, example_inputs): any module, exported once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import dsv3_compile
from codegen import dispatch
from codegen.targets import TARGETS
from dsv3_compile import backend
from dsv3_compile.functional import Functional
from dsv3_compile.modules import CompiledModule, ModuleError
from passes.base import calls
from passes.settings import PassError
from tests.passes.mla import Mla

INDUCTOR = backend.inductor


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
    """Without Inductor, whose C++ takes long; what it makes of a graph is tested once, below."""
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
        ((torch.ones(2, 6), True, EXTRA), r"argument 0 has shape \[2, 6\]"),
        (
            (torch.ones(2, 5, dtype=torch.float64), True, EXTRA),
            "argument 0 is torch.float64 with 2 dims on cpu; the module was compiled for torch.float32",
        ),
        ((torch.ones(2, 5, device="meta"), True, EXTRA), "argument 0 is torch.float32 with 2 dims on meta; .* on cpu"),
        ((torch.ones(2, 5).to_sparse(), True, EXTRA), r"argument 0 is .*, torch\.sparse_coo; the module"),
        ((torch.ones(5, 2).T, True, EXTRA), r"argument 0 has strides \[1, 2\]; the module was compiled for \[5, 1\]"),
        ((torch.ones(65, 5), True, EXTRA), "argument 0 has size 65 at dim 0; the module was compiled for 1 to 64"),
        ((torch.ones(2, 5), 1, EXTRA), "argument 1 is 1; the module was compiled for True"),
        ((torch.ones(2, 5), torch.ones(2), EXTRA), "argument 1 is tensor"),
        (([1.0], True, EXTRA), "another structure"),
        ((1.0, True, EXTRA), "argument 0 is a float; the module was compiled for torch.float32 with 2 dims on cpu"),
        ((torch.ones(2, 5), True), "another structure"),
    ],
)
def test_other_arguments_than_exported_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    _, found = compiled()
    with pytest.raises(ModuleError, match=message):
        found(*arguments)


class Halves(nn.Module):
    """Sizes that depend on each other: by the caller's word, or because of what is computed."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.flatten().view(-1, 4).sum() + y


PAIR = 2 * Dim("pair", min=2, max=8)
DEPENDENT = [
    (
        ({0: PAIR}, {0: PAIR.root}),
        [(12, 6), (4, 2)],
        (12, 5),
        r"argument 0 has shape \[12, 6\]; the module was compiled for \[2\*s",
    ),
    (({0: PAIR}, {0: PAIR.root}), [(16, 8)], (18, 9), "argument 1 has size 9 at dim 0; .* compiled for 2 to 8"),
    (({0: Dim.AUTO}, {0: Dim.AUTO}), [(6, 5), (6, 6)], (7, 5), r"compiled for .*argument_0\.shape\[0\]\) % 4\) == 0"),
]


@pytest.mark.parametrize(("free", "rows", "other", "message"), DEPENDENT, ids=["derived", "range", "divides"])
def test_sizes_that_depend_on_each_other_are_held_to_it(
    free: Any, rows: list[tuple[int, int]], other: tuple[int, int], message: str
) -> None:
    module = Halves()
    found = dsv3_compile.compile(module, (torch.randn(8, 6), torch.randn(4, 2)), dynamic_shapes=free)
    for x, y in ((torch.randn(x, 6), torch.randn(y, 2)) for x, y in rows):
        torch.testing.assert_close(found(x, y), module(x, y))
    with pytest.raises(ModuleError, match=message):
        found(torch.randn(other[0], 6), torch.randn(other[1], 2))


def test_a_size_that_no_dim_has_is_refused() -> None:
    with pytest.raises(ModuleError, match=r"dim 0 of argument 0 is 2\*\w+, and no dim is \w+ itself"):
        dsv3_compile.compile(nn.ReLU(), (torch.randn(8, 6),), dynamic_shapes=({0: PAIR},))


def test_strides_that_are_not_contiguous_are_those_of_the_example() -> None:
    free = ({0: Dim("rows", max=9)},)
    found = dsv3_compile.compile(nn.ReLU(), (torch.randn(3, 4).T,), dynamic_shapes=free)
    for x in (torch.randn(3, 5).T, torch.randn(1, 3)):  # of a single row the strides do not matter
        assert torch.equal(found(x), x.relu())
    with pytest.raises(ModuleError, match=r"strides \[3, 1\]"):
        found(torch.randn(5, 3))


def test_the_module_is_left_in_the_mode_it_was_in() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval(), Branching())
    module.append(nn.Linear(2, 2))
    flags = [one.training for one in module.modules()]
    with pytest.raises(ModuleError, match="cannot capture Sequential"):
        dsv3_compile.compile(module, (torch.randn(3, 2),))
    assert [one.training for one in module.modules()] == flags
    del module[2]
    x = torch.randn(3, 2)
    found = dsv3_compile.compile(module, (x,))
    assert module.training and not module[1].training
    assert not found.training
    torch.testing.assert_close(found(x), module[2](module[0](x)))


class Scaled(nn.Module):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return x * factor


def test_numbers_are_constants_and_never_free() -> None:
    x = torch.ones(3)
    with pytest.raises(ModuleError, match="argument factor is neither a tensor nor a constant; only sizes can be free"):
        dsv3_compile.compile(Scaled(), (x, 3), dynamic_shapes=({}, Dim.DYNAMIC))
    assert dsv3_compile.compile(Scaled(), (x, float("nan")))(x, float("nan")).isnan().all()


def test_layers_of_one_name_are_told_apart() -> None:
    module, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(3, 2)
    torch.testing.assert_close(dsv3_compile.compile(module, (x,))(x), module(x))


def test_a_compiled_module_is_neither_moved_nor_loaded_into() -> None:
    _, found = compiled()
    assert found.to("cpu").float().to(torch.float32) is found
    for move in (found.half, found.double, lambda: found.to("meta"), lambda: nn.Sequential(found).bfloat16()):
        with pytest.raises(ModuleError, match="^compiled for torch.float32 on cpu, not .*; move the original"):
            move()
    with pytest.raises(ModuleError, match="no state of its own; load into the module"):
        found.load_state_dict({}, strict=False)


def test_options_are_checked_before_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(PassError, match="unknown pass 'absorb'"):
        dsv3_compile.compile(nn.ReLU(), (torch.ones(2),), options={"disable": ("absorb",)})


def test_inductor_compiles_what_was_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", INDUCTOR)
    module, found = compiled()
    for rows in (1, 9):
        x = torch.randn(rows, 5)
        torch.testing.assert_close(found(x, True, EXTRA)["y"], 2 * (module.map(x) + EXTRA["bias"] + module.offset))
    assert module.calls == 2


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_what_cannot_be_captured_whole_is_refused() -> None:
    with pytest.raises(ModuleError, match=r"torch\.export cannot capture Branching"):
        dsv3_compile.compile(Branching(), (torch.randn(3),))
    with pytest.raises(ModuleError, match="expected a tuple of arguments"):
        dsv3_compile.compile(nn.Linear(2, 2), torch.randn(3, 2))


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 4, 2)


def test_a_size_that_cannot_be_free_is_named() -> None:
    with pytest.raises(ModuleError, match=r"cannot capture Fixed: .*marked T as dynamic .* constant \(8\)"):
        dsv3_compile.compile(Fixed(), (torch.randn(3, 8),), dynamic_shapes={"x": {1: torch.export.Dim("T", max=64)}})


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


class Gated(nn.Module):
    """What the passes know: a norm, SwiGLU, and products with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, 1e-6)
        self.gate, self.up, self.down = nn.Linear(64, 96, False), nn.Linear(64, 96, False), nn.Linear(96, 64, False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_a_gpu_gets_the_kernels_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(backend, "inductor", lambda graph, *_: compiled.append(graph) or graph.forward)
    monkeypatch.setattr(backend, "target_of", lambda _: TARGETS["sm_90"])
    monkeypatch.setattr(dispatch, "register", lambda _: None)
    module, x = Gated().bfloat16(), torch.randn(2, 64).bfloat16()
    found, expected = dsv3_compile.compile(module, (x,))(x), module(x)
    assert (found - expected).norm() <= 2e-2 * expected.norm()
    called = {str(node.target) for node in compiled[0].graph.nodes}
    assert {f"dsv3.{op}.default" for op in ("linear_pair_call", "swiglu_call", "linear_call")} <= called


def test_a_graph_on_which_a_pass_stops_goes_to_inductor_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(found: Functional, *_: Any) -> None:
        for node in calls(found.module.graph, torch.ops.aten.linear):
            node.replace_all_uses_with(node.args[0])
        raise ZeroDivisionError("half-way")

    monkeypatch.setattr(backend, "lower", lower)
    module, x = Mla().eval(), torch.randn(3, 1, 20)
    example = (x, torch.tensor([[19], [17], [0]]), torch.randn(3, 20, 24), torch.randn(3, 20, 6))
    found = dsv3_compile.compile(module, example)
    assert found.report["fallback"] == "lowering stopped with ZeroDivisionError: half-way"
    torch.testing.assert_close(found(*example), module(*example))
