"""Weights are bound late: from checkpoint tensors, by recipes, one at a time."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from codegen.targets import TARGETS
from dsv3_compile.program import BlockGraph, Occurrence, Program, bind, content_key, share_weights
from dsv3_compile.tracing import Input, capture_module
from passes.base import Role

WIDTH = 3


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(2, WIDTH))
        self.experts = nn.Parameter(torch.empty(4, 5, WIDTH))

    def forward(self, x):
        return x @ self.gate.T, torch.einsum("bd,eod->beo", x, self.experts)


def block(phase: str) -> BlockGraph:
    return BlockGraph("two", phase, capture_module(Two(), [Input("x", Role.ACTIVATION, ("B", WIDTH), torch.float32)]))


def program(*graphs: BlockGraph) -> Program:
    sources = {"gate": ("g",), "experts": tuple(f"e{i}" for i in range(4))}
    steps = tuple(
        Occurrence("two", layer, {k: tuple(f"{layer}.{s}" for s in v) for k, v in sources.items()}) for layer in (0, 1)
    )
    blocks = {(graph.name, graph.phase): graph for graph in graphs}
    return Program(None, torch.float32, TARGETS["cpu"], blocks, steps, {})


def checkpoint() -> dict[str, torch.Tensor]:
    shapes = {"g": (2, WIDTH), **{f"e{i}": (5, WIDTH) for i in range(4)}}
    return {f"{layer}.{name}": torch.randn(shape) for layer in (0, 1) for name, shape in shapes.items()}


def with_recipe(graph: BlockGraph, name: str, factor: float) -> fx.Node:
    """As hoist-weights leaves it: the weight `gate` becomes `name`, which is factor · gate."""
    (weight,) = [n for n in graph.inputs(Role.WEIGHT) if n.name == "gate"]
    recipe = fx.symbolic_trace(lambda gate: torch.ops.aten.mul.Tensor(gate, factor))
    recipe.graph.find_nodes(op="placeholder")[0].meta["val"] = weight.meta["val"]
    weight.meta["bind"] = recipe
    weight.name = weight.target = name
    return weight


def test_every_occurrence_gets_its_own_tensors():
    tensors = checkpoint()
    bound = dict(bind(program(block("prefill")), tensors.__getitem__))
    assert list(bound) == ["layers.0.gate", "layers.0.experts", "layers.1.gate", "layers.1.experts"]
    assert torch.equal(bound["layers.1.gate"], tensors["1.g"])


def test_several_tensors_are_stacked():
    tensors = checkpoint()
    bound = dict(bind(program(block("prefill")), tensors.__getitem__))
    assert torch.equal(bound["layers.0.experts"], torch.stack([tensors[f"0.e{i}"] for i in range(4)]))


def test_a_weight_used_by_both_phases_is_bound_once():
    keys = [key for key, _ in bind(program(block("prefill"), block("decode")), checkpoint().__getitem__)]
    assert len(keys) == len(set(keys)) == 4


def test_a_recipe_computes_the_bound_tensor():
    graph, tensors = block("prefill"), checkpoint()
    with_recipe(graph, "scaled", 3.0)
    bound = dict(bind(program(graph), tensors.__getitem__))
    torch.testing.assert_close(bound["layers.1.scaled"], 3.0 * tensors["1.g"])


def test_tensors_take_the_dtype_of_the_graph():
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint().items()}
    assert {tensor.dtype for _, tensor in bind(program(block("prefill")), tensors.__getitem__)} == {torch.float32}


def test_tensors_are_bound_one_at_a_time():
    read = []
    tensors = bind(program(block("prefill")), lambda name: read.append(name) or checkpoint()[name])
    next(tensors)
    assert read == ["0.g"]


@pytest.mark.parametrize(("name", "expected"), [("1.g", [2, 3]), ("1.e2", [5, 3])])
def test_a_wrong_shape_is_named(name, expected):
    tensors = checkpoint() | {name: torch.zeros(7, 3)}
    with pytest.raises(ValueError, match=rf"{name} has shape \[7, 3\]; expected \[{expected[0]}, {expected[1]}\]"):
        list(bind(program(block("prefill")), tensors.__getitem__))


def test_equal_recipes_share_a_name_and_unequal_ones_do_not():
    prefill, decode = block("prefill"), block("decode")
    one, other = with_recipe(prefill, "scaled", 3.0), with_recipe(decode, "stretched", 3.0)
    assert content_key(one) == content_key(other)
    share_weights([prefill, decode])
    assert one.name == other.name == other.target == "scaled"

    decode = block("decode")
    different = with_recipe(decode, "scaled", 4.0)
    share_weights([prefill, decode])
    assert (one.name, different.name) == ("scaled", "scaled_decode")


def test_a_shared_name_does_not_collide_with_a_node():
    prefill, decode = block("prefill"), block("decode")
    with_recipe(prefill, "einsum", 3.0)
    share_weights([prefill])
    renamed = with_recipe(decode, "other", 3.0)
    share_weights([prefill, decode])
    assert renamed.name == "einsum"
    decode.module.graph.lint()
    x, experts, gate = torch.randn(2, WIDTH), torch.randn(4, 5, WIDTH), torch.randn(2, WIDTH)
    values = {"einsum": gate, "experts": experts, "x": x}
    first, second = decode.module(*(values[node.name] for node in decode.inputs()))
    torch.testing.assert_close(first, x @ gate.T)
    torch.testing.assert_close(second, torch.einsum("bd,eod->beo", x, experts))
