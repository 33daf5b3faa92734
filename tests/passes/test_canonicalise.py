"""Everything gets one spelling, and nothing else changes."""

import torch
from torch import nn

from dsv3_compile.tracing import Input
from passes.base import Role
from passes.canonicalise import Canonicalise
from tests.passes.capture import CONTEXT, module_graph
from tests.passes.harness import apply, count

aten = torch.ops.aten
X = Input("x_BSD", Role.ACTIVATION, ("B", "S", 6), torch.float32)


class Wordy(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        x = x.clone().to(torch.float32).view(x.shape).contiguous() + 0
        rows = x.flatten(0, 1)
        return torch.addmm(self.b, rows, self.w.t()), torch.mm(rows, self.w.t()), torch.mm(rows, self.w.t())


class Scaled(nn.Module):
    """addmm with factors is not linear, and a cast is not a copy."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return torch.addmm(self.b, x.flatten(0, 1), self.w.t(), beta=2.0), x.to(torch.float64)


class Bits(nn.Module):
    def forward(self, x):
        return x.view(torch.int32) + 1, x.view(torch.float64) + 1


def test_a_view_as_another_dtype_stays_what_it_is():
    graph = module_graph(Bits(), X)
    Canonicalise().run(graph, CONTEXT)
    assert count(graph, aten.view.dtype) == 2


def test_copies_vanish_products_become_linear_and_repeats_merge():
    graph = module_graph(Wordy(), X)
    apply(Canonicalise(), graph)
    assert count(graph, aten.linear) == 2
    assert count(graph, aten.mm, aten.addmm, aten.clone, aten._to_copy, aten.add, aten.view) == 0


def test_near_misses_stay():
    graph = module_graph(Scaled(), X)
    apply(Canonicalise(), graph)
    assert count(graph, aten.addmm) == 1
    assert count(graph, aten._to_copy, aten.to) == 1


class BatchedProducts(nn.Module):
    """Products onto nothing, scaled or not, one onto something, and one onto a half of it."""

    def forward(self, x):
        square = x.mT @ x
        return [
            torch.baddbmm(torch.full_like(square, torch.nan), x.mT, x, beta=0, alpha=0.5),
            torch.baddbmm(torch.zeros_like(square), x.mT, x),
            torch.baddbmm(square, x.mT, x),
            torch.baddbmm(torch.ones_like(square), x.mT, x, beta=0.5),
        ]


def test_a_batched_product_that_adds_nothing_is_one():
    graph = module_graph(BatchedProducts(), X)
    apply(Canonicalise(), graph)
    assert count(graph, aten.baddbmm) == 2
    assert count(graph, aten.bmm) == count(graph, aten.mul) == 1  # both products are the same one


class First(nn.Module):
    def forward(self, x):
        return x.unsqueeze(1).tanh()[:, 0], x.tanh()[:, 0]


def test_the_first_of_one_is_a_squeeze():
    graph = module_graph(First(), X)
    apply(Canonicalise(), graph)
    assert count(graph, aten.squeeze) == count(graph, aten.select) == 1


class Parts(nn.Module):
    """The first rows of a cache, a slice that was just put there, and a copy over old content."""

    def forward(self, x):
        rows = torch.cat([x.new_empty(0), x], 1)
        both = torch.cat([rows, torch.tanh(rows)], -1)
        return torch.ops.aten.copy(torch.zeros_like(x), both[..., 6:]) + both[..., :6]


class OtherParts(nn.Module):
    """Slices across a seam, and a copy that casts."""

    def forward(self, x):
        both = torch.cat([x, torch.tanh(x)], -1)
        return both[..., 5:11], torch.ops.aten.copy(torch.zeros_like(x, dtype=torch.float64), both[..., 1:7])


def test_parts_of_what_was_put_together_are_the_parts():
    graph = module_graph(Parts(), X)
    apply(Canonicalise(), graph)
    assert count(graph, aten.cat, aten.slice, aten.copy) == 0


def test_other_parts_stay():
    graph = module_graph(OtherParts(), X)
    apply(Canonicalise(), graph)
    assert count(graph, aten.slice) == 2
    assert count(graph, aten.cat) == count(graph, aten.copy) == 1


class Cast(nn.Module):
    def forward(self, x):
        return torch.tanh(x).type_as(x.to(torch.float16)), torch.exp(x).type_as(x)


def test_a_cast_to_another_value_s_dtype_is_a_cast():
    graph = module_graph(Cast(), X)
    apply(Canonicalise(), graph)
    assert count(graph, aten.type_as) == 0
    (cast,) = (node for node in graph.graph.nodes if node.target is aten._to_copy.default)
    assert cast.kwargs == {"dtype": torch.float16}


class WithoutColumns(nn.Module):
    """A network of width zero beside x; in the last result it makes x larger."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(0, 6)), nn.Parameter(torch.empty(6, 0))
        self.wide = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        nothing = nn.functional.linear(nn.functional.silu(nn.functional.linear(x, self.up)), self.down)
        same = nn.functional.linear(x, self.wide)
        return x + nothing, nothing + same, x + same, torch.tanh(x[:1, :1]) + nothing


def test_what_sums_no_index_adds_nothing():
    graph = module_graph(WithoutColumns(), X)
    apply(Canonicalise(), graph)
    first, second, *_ = graph.graph.output_node().args[0]
    assert first.op == "placeholder" and second.target is aten.linear.default
    assert count(graph, aten.add) == 2


class Rounded(nn.Module):
    """Divisions by one that round, and products with a matrix that a permute leaves as it is."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        rows = x.flatten(0, 1)
        floor, trunc = (torch.div(rows, 1, rounding_mode=mode) for mode in ("floor", "trunc"))
        return floor, trunc, torch.mm(rows, self.w.permute(0, 1)), torch.mm(rows, self.w.transpose(1, -1))


def test_divisions_that_round_and_matrices_as_they_are_stay():
    graph = module_graph(Rounded(), X)
    apply(Canonicalise(), graph)
    assert count(graph, aten.div) == 2 and count(graph, aten.mm) == 2


class Logarithms(nn.Module):
    """Of negative numbers, and of zero: no number, and −∞."""

    def forward(self, x):
        return torch.log(x) * 2, torch.log(x - x), torch.log(x)


def test_values_that_are_no_numbers_before_and_after_are_certified():
    graph = module_graph(Logarithms(), X)
    assert apply(Canonicalise(), graph).matches
    assert count(graph, aten.log) == 2


class Reread(nn.Module):
    """Bits read as another dtype, and a copy that puts numbers beside each other that are to be complex ones."""

    def forward(self, x):
        pairs = x.unflatten(-1, (2, 3)).transpose(-1, -2).contiguous()
        return x.view(torch.int32) + 0, torch.view_as_real(torch.view_as_complex(pairs) * 2)


def test_what_reads_bits_or_layout_reads_what_it_did():
    graph = module_graph(Reread(), X)
    apply(Canonicalise(), graph)
    assert count(graph, aten.view.dtype) == count(graph, aten.contiguous, aten.clone) == 1
