"""Certificates see every change of value, and nothing but changes of value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx, nn

from dsv3_compile.tracing import Input, capture_module
from passes.base import Role
from passes.bisection import first_departure, relative_error
from passes.inputs import size_values
from passes.verify import CertificateError, Specimen, clone, run_float64
from tests.passes.capture import random_inputs

aten = torch.ops.aten


class Small(nn.Module):
    """A cast to float32, a masked softmax, a norm and a product: two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 4))
        self.norm = nn.Parameter(torch.empty(4))

    def forward(self, x, positions):
        hidden = (x.float() * self.norm).to(x.dtype)
        scores = torch.nn.functional.linear(hidden, self.weight)
        masked = scores.masked_fill(torch.arange(6) > positions[..., None], -math.inf)
        return masked.softmax(-1), hidden


@pytest.fixture
def graph():
    inputs = [
        Input("x", Role.ACTIVATION, ("B", "S", 4), torch.bfloat16),
        Input("positions", Role.ACTIVATION, ("B", "S"), torch.int64, 6),
    ]
    return capture_module(Small().to(torch.bfloat16), inputs)


def replaced(graph, old, new):
    """A copy with one operator exchanged for another."""
    changed = clone(graph)
    for node in changed.graph.nodes:
        if node.target is old:
            node.target = new
    return changed


def test_every_float_dtype_is_read_as_float64(graph):
    outputs, values = run_float64(graph, random_inputs(graph, size_values(graph), 0), record=True)
    floating = [v for v in values.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert len(floating) > 4 and {v.dtype for v in floating} == {torch.float64}
    assert torch.get_default_dtype() is torch.float32


def test_an_unchanged_meaning_is_certified(graph):
    specimen = Specimen.of(graph)
    specimen.module = replaced(graph, aten.softmax.int, aten._softmax.default)
    for node in specimen.module.graph.find_nodes(op="call_function", target=aten._softmax.default):
        node.args = (*node.args[:2], False)
    certificate = specimen.certify(graph, "rename on small")
    assert certificate.max_rel_error <= 1e-15
    assert certificate.sizes == {"B": 13, "S": 5}


def test_a_change_is_reported_with_pass_output_and_node(graph):
    specimen = Specimen.of(graph)
    specimen.module = replaced(graph, aten.mul.Tensor, aten.add.Tensor)
    with pytest.raises(CertificateError, match=r"break-norm on small: output 0 differs .*first at mul"):
        specimen.certify(graph, "break-norm on small")


def test_a_change_of_rounding_size_is_too_large(graph):
    before = clone(graph)
    specimen = Specimen.of(graph)
    nudged(graph, 1 + 1e-8)
    with pytest.raises(CertificateError, match="output 0"):
        specimen.certify(before, "scale on small")


def nudged(graph, factor):
    """Let the product's readers see it a little larger."""
    (node,) = graph.graph.find_nodes(op="call_function", target=aten.linear.default)
    with graph.graph.inserting_after(node):
        scaled = graph.graph.call_function(aten.mul.Tensor, (node, factor))
        node.replace_all_uses_with(scaled)
        scaled.args = (node, factor)


def test_small_differences_of_single_passes_add_up_in_the_certificate_of_all(graph):
    specimen = Specimen.of(graph)
    assert specimen.certify_whole("small").max_rel_error == 0.0
    for _ in range(40):
        before = clone(graph)
        nudged(graph, 1 + 1e-11)
        specimen.certify(before, "nudge on small")
    with pytest.raises(CertificateError, match="all passes on small: an output differs by"):
        specimen.certify_whole("small")


def test_a_missing_output_is_reported(graph):
    before = clone(graph)
    specimen = Specimen.of(graph)
    output = graph.graph.output_node()
    output.args = (output.args[0][:1],)
    with pytest.raises(CertificateError, match="2 outputs became 1"):
        specimen.certify(before, "drop on small")


def test_masked_infinities_are_not_taken_for_the_first_difference(graph):
    changed = replaced(graph, aten.softmax.int, aten.log_softmax.int)
    inputs = random_inputs(graph, size_values(graph), 0)
    expected, found = (run_float64(module, inputs, record=True)[1] for module in (graph, changed))
    place = first_departure(graph.graph, changed.graph, expected, found, 1e-10)
    assert place is not None and place.node == "softmax"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_agree_with_themselves_alone(bad):
    value = torch.tensor([4.0, bad, 2.0])
    assert relative_error(value, value.clone()) == 0.0
    assert relative_error(torch.tensor([4.0, bad, 3.0]), value) == 0.25
    assert relative_error(value, torch.tensor([4.0, 1.0, 2.0])) == math.inf
    for other in (torch.tensor([4.0, 1.0, 2.0]), torch.tensor([bad, 4.0, 2.0]), torch.tensor([4.0, bad, bad])):
        assert relative_error(other, value) == math.inf
    for others in {math.nan, math.inf, -math.inf} - {bad}:
        assert relative_error(torch.tensor([4.0, others, 2.0]), value) == math.inf


def test_integers_must_be_equal():
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0.0
    assert relative_error(torch.tensor([1, 3]), torch.tensor([1, 2])) == math.inf


def test_shapes_must_be_equal():
    assert relative_error(torch.zeros(1, 2), torch.zeros(2)) == math.inf


def test_anything_differs_from_zero():
    assert relative_error(torch.tensor([1e-30]), torch.tensor([0.0])) == math.inf


def test_positions_are_distinct_ascending_and_different_per_row(graph):
    positions = random_inputs(graph, size_values(graph), 0)["positions"]
    assert positions.shape == (13, 5)
    assert bool((positions.diff(dim=-1) > 0).all()) and bool(((0 <= positions) & (positions < 6)).all())
    assert len({tuple(row.tolist()) for row in positions}) > 1


def test_vectors_are_negative_and_stay_away_from_zero(graph):
    norms = [random_inputs(graph, size_values(graph), seed)["norm"] for seed in range(20)]
    values = torch.stack(norms)
    assert bool((values < 0).all()) and values.abs().median() > 0.7 and values.std() > 0.1


def test_inputs_repeat_with_the_seed(graph):
    one, two = (random_inputs(graph, size_values(graph), 3) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_bound_weight_is_computed_by_its_recipe(graph):
    inputs = random_inputs(graph, size_values(graph), 0)
    expected, _ = run_float64(graph, inputs)
    recipe = torch.fx.symbolic_trace(lambda norm: torch.ops.aten.mul.Tensor(norm, 3.0))
    (norm,) = [n for n in graph.graph.nodes if n.name == "norm"]
    norm.meta["bind"] = recipe
    found, _ = run_float64(graph, inputs)
    torch.testing.assert_close(found[1], expected[1] * 3.0)


def test_a_clone_shares_no_nodes(graph):
    copy = clone(graph)
    assert str(copy.graph) == str(graph.graph)
    assert not set(copy.graph.nodes) & set(graph.graph.nodes)
    assert all(
        n.meta.get("role") == m.meta.get("role") for n, m in zip(copy.graph.nodes, graph.graph.nodes, strict=True)
    )


def calls(target, *args, **kwargs):
    """A graph of one call on one input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["role"] = Role.ACTIVATION
    graph.output((graph.call_function(target, (x, *args), kwargs),))
    return fx.GraphModule({}, graph)


def test_every_device_is_read_as_the_cpu():
    graph = calls(aten.new_full.default, (2,), 7.0, device=torch.device("meta"))
    (found,), _ = run_float64(graph, {"x": torch.ones(3)})
    assert found.tolist() == [7.0, 7.0]


def test_integers_are_counted_as_on_a_gpu():
    (found,), _ = run_float64(calls(aten.histc.default, 3, 0, 2), {"x": torch.tensor([2, 0, 2], dtype=torch.int32)})
    assert found.tolist() == [1, 0, 2] and found.dtype is torch.int32


def test_the_largest_are_the_first_of_equal_ones_and_lie_as_topk_leaves_them():
    x = torch.tensor([[0.0, 1, 1, 0], [2, 0, 2, 2]])
    ((values, indices),), _ = run_float64(calls(aten.topk.default, 3, -1, True, False), {"x": x})
    assert values.tolist() == [[1, 1, 0], [2, 2, 2]] and indices.tolist() == [[1, 2, 0], [0, 2, 3]]
    assert values.is_contiguous() and indices.is_contiguous()
    ((values, _),), _ = run_float64(calls(aten.topk.default, 1, 0, False), {"x": x})
    assert values.tolist() == [[0, 0, 1, 0]]
