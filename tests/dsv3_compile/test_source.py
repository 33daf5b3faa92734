"""A graph as Python text gives the same numbers, and refuses what it cannot say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx, nn

from dsv3_compile.loading import load_graph
from dsv3_compile.source import graph_source
from dsv3_compile.tracing import Input, capture_module
from passes.base import Role
from passes.inputs import size_values
from tests.dsv3_compile import tiny
from tests.passes.capture import random_inputs


def reloaded(module: fx.GraphModule, tmp_path: Path):
    path = tmp_path / "graph.py"
    path.write_text(graph_source(module, "A graph."))
    return load_graph(path)


@pytest.mark.parametrize("key", list(tiny.blocks()), ids=" ".join)
def test_a_graph_read_back_computes_the_same(key: tuple[str, str], tmp_path: Path) -> None:
    module = tiny.blocks()[key].module
    inputs = random_inputs(module, size_values(module), 0)
    arguments = [inputs[node.name] for node in module.graph.nodes if node.op == "placeholder"]
    arguments = [a.float() if a.is_floating_point() else a for a in arguments]
    expected, found = module(*arguments), reloaded(module, tmp_path)(*arguments)
    for left, right in zip(expected, found, strict=True):
        assert torch.equal(left, right)


def captured(forward) -> fx.GraphModule:
    class Module(nn.Module):
        def forward(self, x_BS):
            return (forward(x_BS),)

    return capture_module(Module(), [Input("x_BS", Role.ACTIVATION, ("B", "S"), torch.float32)])


def test_sizes_are_named_by_the_legend(tmp_path: Path) -> None:
    text = graph_source(captured(lambda x: x.new_zeros(x.shape[0] * 2, x.shape[1]) + 1), "Sizes.")
    assert "# activation float32 [B, S]" in text
    assert "[2*B, S]" in text


def test_views_are_written_as_python(tmp_path: Path) -> None:
    module = captured(lambda x: x.unsqueeze(-1).expand(-1, -1, 4)[..., 1::2] + x.shape[1])
    text = graph_source(module, "Views.")
    assert all(part in text for part in (".unsqueeze(-1)", "[:, :, 1::2]", ".expand([-1, -1, 4])", "x_BS.shape[1]"))
    x = torch.randn(2, 5)
    assert torch.equal(reloaded(module, tmp_path)(x)[0], module(x)[0])


def test_infinities_survive(tmp_path: Path) -> None:
    module = captured(lambda x: x.masked_fill(x > 0, float("-inf")))
    found = reloaded(module, tmp_path)(torch.tensor([[1.0, -2.0]]))
    assert torch.equal(found[0], torch.tensor([[float("-inf"), -2.0]]))


def test_values_are_freed_after_their_last_use() -> None:
    module = captured(lambda x: x.exp().sin().cos())
    for number, node in enumerate(module.graph.nodes):
        node.meta["stack_trace"] = f'File "model.py", line {number}, in forward\n    line {number}\n'
    text = graph_source(module, "Three steps.")
    assert text.index("del exp") > text.index("aten.sin")
    assert "del cos" not in text


def test_a_call_that_is_no_operator_is_refused_by_name() -> None:
    module = captured(lambda x: x + 1)
    (add,) = (node for node in module.graph.nodes if node.op == "call_function")
    add.target = print
    with pytest.raises(ValueError, match="add calls .*print"):
        graph_source(module, "Not an operator.")


def test_small_constants_are_written_out_and_large_ones_refused(tmp_path: Path) -> None:
    graph = fx.Graph()
    constant = graph.get_attr("table")
    graph.output((constant,))
    root = nn.Module()
    root.table = torch.tensor([1.5, float("inf"), float("nan")], dtype=torch.float16)
    (found,) = reloaded(fx.GraphModule(root, graph), tmp_path)()
    assert found.dtype == torch.float16 and torch.equal(found[:2], root.table[:2]) and found[2].isnan()
    root.table = torch.zeros(5000)
    with pytest.raises(ValueError, match="table is a constant"):
        graph_source(fx.GraphModule(root, graph), "Too large.")
