"""Products, rearrangements and parts are read with the right axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.products import join, part_of, product_of, sources_of_dims
from tests.passes.capture import graph_of, tensor

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.empty(3, 4))

    def forward(self, x):
        return self.function(x, self.weight)


def result_of(function):
    graph = graph_of(Function(function), [tensor("x", "B", 5, 4)])
    (result,) = graph.graph.output_node().args[0]
    return result


@pytest.mark.parametrize(
    ("function", "letters"),
    [
        (lambda x, w: torch.einsum("bsd,ed->bse", x, w), ("bsd", "ed", "bse")),
        (lambda x, w: torch.einsum("bsd,ed", x, w), ("bsd", "ed", "bes")),
        (lambda x, w: torch.einsum("...c, ec -> ...e", x, w), ("abc", "ec", "abe")),
        (lambda x, w: torch.einsum("bsd,bsd->sd", x, x[:, :1]), ("bsd", "b1d", "sd")),
        (lambda x, w: torch.nn.functional.linear(x, w), ("aby", "zy", "abz")),
        (lambda x, w: torch.nn.functional.linear(x, w[0]), ("aby", "y", "ab")),
        (lambda x, w: torch.matmul(x, w.transpose(0, 1).unsqueeze(0)), ("axy", "1yz", "axz")),
        (lambda x, w: x * x[:, :1], ("abc", "a1c", "abc")),
        (lambda x, w: x.sum(1), ("abc", "ac")),
        (lambda x, w: x.sum(1, keepdim=True), ("abc", "a1c")),
    ],
)
def test_products(function, letters):
    product = product_of(result_of(function))
    assert product is not None
    assert (*(own for _, own in product.operands), product.out) == letters


def test_what_is_no_product():
    for function in (
        lambda x, w: x + 1,
        lambda x, w: x.sum([]),
        lambda x, w: x * 2,
        lambda x, w: torch.einsum("dd->d", w[:, :3]),
    ):
        assert product_of(result_of(function)) is None


@pytest.mark.parametrize(
    ("function", "sources"),
    [
        (lambda x, w: x.permute(2, 0, 1), (2, 0, 1)),
        (lambda x, w: x.transpose(-1, 0), (2, 1, 0)),
        (lambda x, w: x.unsqueeze(-2), (0, 1, None, 2)),
        (lambda x, w: x[:, None].expand(-1, 7, -1, -1), (0, None, 2, 3)),
        (lambda x, w: x.view(-1, 5, 1, 4), (0, 1, None, 2)),
        (lambda x, w: x.view(-1, 20), None),
        (lambda x, w: x.unflatten(-1, (2, 2)), None),
    ],
)
def test_rearrangements(function, sources):
    assert sources_of_dims(result_of(function)) == sources


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x[..., 1:3], (2, 1, 2, 1)),
        (lambda x, w: x[..., -3:], (2, 1, 3, 1)),
        (lambda x, w: x[:, 1::2], (1, 1, 2, 2)),
        (lambda x, w: x.split([1, 3], -1)[1], (2, 1, 3, 1)),
        (lambda x, w: x.chunk(2, 1)[1], (1, 3, 2, 1)),
        (lambda x, w: x.narrow(1, 2, 2), (1, 2, 2, 1)),
    ],
)
def test_parts(function, expected):
    part = part_of(result_of(function))
    assert part is not None and part.source.name == "x"
    assert (part.axis, part.start, part.length, part.step) == expected


def test_neighbouring_parts_join_to_their_source_or_a_slice_of_it():
    graph = graph_of(Function(lambda x, w: (x[..., :1], x[..., 1:3], x[..., 3:])), [tensor("x", "B", 5, 4)]).graph
    first, middle, last = (part_of(node) for node in graph.output_node().args[0])
    with graph.inserting_before(graph.output_node()):
        assert join(graph, first, last) is None and join(graph, middle, first) is None
        assert tuple(join(graph, first, middle).meta["val"].shape[1:]) == (5, 3)
