"""Graphs node by node: products, layouts, sizes, and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from codegen.onnx import Builder, ExportError
from tests.codegen.onnx.run import activation, check, graph_of, model_of

B, S = 2, 3
x = activation("x", "B", "S", 6)
y = activation("y", 6, 4)
X, Y = torch.randn(B, S, 6), torch.randn(6, 4)

FUNCTIONS = {
    "views with free sizes": lambda x, y: (x.flatten(0, 1), x.unflatten(2, (2, 3)).transpose(1, 2), x.permute(2, 0, 1)),
    "pieces": lambda x, y: (*x.split([1, 5], -1), *x.chunk(2, 2), x[..., 1:], x[..., 2], *y.unbind(1)),
    "joined": lambda x, y: (torch.cat([x, 2 * x], 1), torch.stack([y, y + 1], -1), x.unsqueeze(1).squeeze(1)),
    "grown": lambda x, y: (x.unsqueeze(2).expand(-1, -1, 3, -1), torch.zeros(x.shape[0], 2) + 1),
    "pointwise": lambda x, y: (
        x - 2,
        3 - x,
        x / 3,
        x.sigmoid() + F.silu(x),
        x.square(),
        x.abs() ** 0.5,
        x.clamp(-1, 1),
    ),
    "compared": lambda x, y: (torch.where(x > 0, x, 0.0), x.masked_fill(x <= 0.1, -1.0), (x > 0) & ~(x > 1)),
    "reduced": lambda x, y: (x.sum(1), x.mean(-1, keepdim=True), x.amax((0, 1)), x.softmax(-1)),
    "products": lambda x, y: (x @ y, F.linear(x, y.T), F.linear(x, y.T, y[0]), F.linear(x, y[:, 0])),
    "einsum": lambda x, y: (torch.einsum("bsd,de->bse", x, y), torch.einsum("bsd,btd->bst", x, x)),
    "einsum without an arrow": lambda x, y: (torch.einsum("bsd,de", x, y), torch.einsum("bsd,bsd", x, x)),
    "einsum with an ellipsis": lambda x, y: (
        torch.einsum("...d,de->...e", x, y),
        torch.einsum("...sd,...de->...se", x, y[None]),
    ),
    "einsum of several summed axes": lambda x, y: (
        torch.einsum("bshp,hpc->bsc", x.unflatten(2, (2, 3)), y.unflatten(0, (2, 3))),
        torch.einsum("bshp,hpc->bshc", x.unflatten(2, (2, 3)), y.unflatten(0, (2, 3))),
    ),
    "chosen": lambda x, y: (*x.topk(2, -1), x.gather(2, x.topk(2, -1).indices), y[:, 1]),
    "counted": lambda x, y: (torch.arange(x.shape[1]) + 1, torch.arange(4) * 2.5),
    "converted": lambda x, y: (x.to(torch.float16), (x * 10).to(torch.int64)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_onnx_computes_what_torch_computes(name):
    torch.manual_seed(0)
    check(FUNCTIONS[name], [x, y], X, Y)


def test_writes_into_a_cache_of_keys():
    inputs = [
        activation("cache", "B", 7, 2, 5),
        activation("positions", "B", "S", dtype=torch.int64),
        activation("new", "B", "S", 2, 5),
    ]

    def function(cache, positions, new):
        return cache.index_put((torch.arange(cache.shape[0]).unsqueeze(-1), positions), new)

    positions = torch.tensor([[4, 5, 6], [0, 1, 2]])
    check(function, inputs, torch.randn(B, 7, 2, 5), positions, torch.randn(B, S, 2, 5))


def test_constants_are_computed_before_the_model_runs():
    model = model_of(graph_of(lambda x: x * (torch.arange(6) * 2.0).cos().exp(), activation("x", "B", "S", 6)))
    assert [node.op_type for node in model.graph.node if node.op_type != "Shape"] == ["Mul"]


def test_constants_that_differ_have_names_that_differ():
    b = Builder()
    assert len({b.constant(1), b.ints(1), b.ints(1, 1), b.ints(1, 1, 1)}) == len(b.initializers) == 4


def from_line_7(graph):
    for node in graph.graph.nodes:
        node.meta["stack_trace"] = 'File "/home/me/model.py", line 7, in forward\n    return y'
    return graph


def test_nodes_say_where_they_come_from():
    model = model_of(from_line_7(graph_of(lambda x, y: x @ y, x, y)))
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    properties = {entry.key: entry.value for entry in node.metadata_props}
    assert node.name == "model/matmul.MatMul"
    assert properties == {"module": "model", "source": "model.py:7"}


def test_an_operator_without_a_form_is_named_with_its_node_and_line():
    with pytest.raises(ExportError, match=r"aten\.erfinv\.default has no ONNX form: node erfinv of model \(model.py:7"):
        model_of(from_line_7(graph_of(lambda x: torch.erfinv(x), x)))


def test_a_bitwise_not_of_integers_is_refused():
    numbers = activation("n", "B", dtype=torch.int64)
    with pytest.raises(ExportError, match=r"aten\.bitwise_not.*accepted: torch\.bool: node bitwise_not"):
        model_of(graph_of(lambda n: ~n, numbers))
