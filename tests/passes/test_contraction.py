"""The algebra is exact: whatever is read from a graph and written back in any order has the same value."""

import itertools

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv3_compile.tracing import Input
from passes.base import Role, calls
from passes.contraction import CONTRACTIONS, NotLinear, times
from passes.lifting import lift
from passes.verify import Specimen, clone
from passes.writing import Writer
from tests.passes.capture import module_graph

aten = torch.ops.aten


class Views(nn.Module):
    """x · W through a shuffled chain of views, then against itself."""

    def __init__(self, steps: list[str]):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2 * 3 * 4, 5))
        self.steps = steps

    def forward(self, x):
        y = torch.nn.functional.linear(x, self.w).unflatten(-1, (2, 3, 4))
        for step in self.steps:
            y = STEPS[step](y)
        return torch.einsum("bsi,bti->bst", y.flatten(2), y.flatten(2))


STEPS = {
    "swap": lambda y: y.transpose(2, 3) if y.dim() > 3 else y,
    "split": lambda y: (
        torch.cat([part * 2 for part in y.split([1, y.shape[-1] - 1], -1)], -1) if y.shape[-1] > 1 else y
    ),
    "merge": lambda y: y.flatten(-2) if y.dim() > 4 else y,
    "lift": lambda y: y.unsqueeze(2).expand(-1, -1, 2, *y.shape[2:]) if y.dim() < 6 else y,
    "slice": lambda y: y[..., : max(2, y.shape[-1] - 1)],
    "copy": lambda y: y.contiguous() / 3,
    "round": lambda y: torch.div(y, 0.1, rounding_mode="floor"),
}
X = Input("x_BSD", Role.ACTIVATION, ("B", "S", 5), torch.float32)
B, S = sympy.symbols("B S", positive=True, integer=True)


@pytest.mark.parametrize(
    "large, small, expected",
    [(12, 3, 4), (12, 5, None), (3, 12, None), (3, 3, None), (0, 3, None), (3, 0, None)]
    + [(3 * B, B, 3), (3 * B, 3, B), (B * S, S, B), (B, S, None), (B, 3, None), (3, B, None), (B, 3 * B, None)],
)
def test_a_size_divides_another_whatever_is_free(large, small, expected):
    assert times(large, small) == expected


def rewrite_left_to_right(graph) -> int:
    """Multiply every readable product out from left to right; returns how many operands were seen at most."""
    most = 0
    for root in list(calls(graph.graph, *CONTRACTIONS))[::-1]:
        value = lift(root)
        try:
            terms = value.terms
        except NotLinear:
            continue
        with graph.graph.inserting_before(root):
            writer = Writer(graph.graph, root)
            total = None
            kept = {axis for group in value.dims for axis in group}
            for term in terms:
                product = writer.operand(term.operands[0])
                for k, operand in enumerate(term.operands[1:], 2):
                    later = {axis for o in term.operands[k:] for axis in o.axes} | kept
                    axes = dict.fromkeys((*product.axes, *operand.axes))
                    product = writer.product(product, writer.operand(operand), [a for a in axes if a in later])
                node = writer.arrange(product, value.dims)
                node = writer.scale(node, term.scale) if term.scale != 1.0 else node
                total = node if total is None else writer.add(total, node)
                most = max(most, len(term.operands))
        root.replace_all_uses_with(total)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return most


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
def test_any_chain_of_views_is_read_exactly(steps):
    graph = module_graph(Views(steps), X)
    specimen, before = Specimen.of(graph), clone(graph)
    rewrite_left_to_right(graph)
    specimen.certify(before, "left to right")


class Joined(nn.Module):
    def forward(self, x):
        y = torch.cat([x[..., :2] * 2, x[..., 2:]], -1)
        return torch.einsum("bsi,bti->bst", y, y)


def test_a_concatenation_that_is_contracted_becomes_a_sum():
    graph = module_graph(Joined(), X)
    root = list(calls(graph.graph, aten.einsum))[-1]
    assert len(lift(root).terms) == 2


def test_operands_are_read_through_views_down_to_the_weights():
    graph = module_graph(Views(["swap", "copy"]), X)
    root = list(calls(graph.graph, aten.einsum))[-1]
    (term,) = lift(root).terms
    assert [o.node.name for o in term.operands] == ["x_BSD", "w", "x_BSD", "w"]
    assert term.scale == pytest.approx(1 / 9)


def test_axes_are_fresh_at_every_reading():
    graph = module_graph(Views(["swap"]), X)
    root = list(calls(graph.graph, aten.einsum))[-1]
    first, second = lift(root), lift(root)
    axes = [{a for t in v.terms for o in t.operands for a in o.axes} for v in (first, second)]
    assert not axes[0] & axes[1]
    assert len(list(itertools.chain(*axes))) > 0


class Spelled(nn.Module):
    """Two products, the inner one with an ellipsis, the outer one without an arrow; then one with a vector."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        y = torch.einsum("...d,ed->...e", x, self.w)
        return torch.nn.functional.linear(torch.einsum("bse,ez", y, self.w), self.v)


def test_products_are_read_however_their_equation_is_written():
    graph = module_graph(Spelled(), X)
    specimen, before = Specimen.of(graph), clone(graph)
    assert rewrite_left_to_right(graph) == 4
    specimen.certify(before, "left to right")


def test_a_division_that_rounds_ends_the_reading():
    graph = module_graph(Views(["round", "swap"]), X)
    root = list(calls(graph.graph, aten.einsum))[-1]
    (term,) = lift(root).terms
    assert [o.node.target for o in term.operands] == [aten.div.Tensor_mode] * 2 and term.scale == 1.0


class Sliced(nn.Module):
    """Three products, a slice of the first that starts before its beginning."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(*size)) for size in ((5, 10), (5, 7), (7, 3)))

    def forward(self, x):
        return ((x @ self.a)[..., -15:5] @ self.b) @ self.c


def test_a_slice_that_starts_before_the_beginning_is_clamped():
    graph = module_graph(Sliced(), X)
    specimen, before = Specimen.of(graph), clone(graph)
    assert rewrite_left_to_right(graph) == 4
    specimen.certify(before, "left to right")
