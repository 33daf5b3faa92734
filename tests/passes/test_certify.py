"""Regional certificates: equal rewrites pass, wrong ones are caught, what is too large is named."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

from codegen.targets import target
from passes import certify
from passes.base import Context, Outcome, Pass, Workload, call, calls, placeholders, sweep
from passes.canonicalise import Canonicalise
from passes.certify import RegionalSpecimen
from passes.fuse_norm import FuseNorm
from passes.fuse_routing import FuseRouting
from passes.pipeline import Pipeline
from passes.verify import CertificateError
from tests.foreign.tracing import graphs_of

aten = torch.ops.aten
ANY = Context("any", target("cpu"), Workload(0, 0, 0))


class Tower(nn.Module):
    """Equal layers, so that what is changed in one is changed in all."""

    def __init__(self, layers: int = 3, width: int = 6) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(2, width, width) for _ in range(layers))
        self.norms = nn.ParameterList(torch.randn(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for weight, norm in zip(self.weights, self.norms, strict=True):
            y = torch.tanh((x @ weight[0]) @ weight[1])
            x = x + y
            x = nn.functional.rms_norm(x, x.shape[-1:], norm, 1e-5)
        return x


@dataclass(frozen=True)
class Rescale(Pass):
    """tanh(x) → tanh(x · factor), which is another function unless the factor is 1."""

    factor: float = 1.0
    only: int | None = None

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome = Outcome()
        for index, node in enumerate(calls(graph_module.graph, aten.tanh)):
            if self.only in (None, index):
                with graph_module.graph.inserting_before(node):
                    scaled = call(graph_module.graph, aten.mul.Tensor, node.args[0], self.factor)
                    node.replace_all_uses_with(call(graph_module.graph, aten.tanh.default, scaled))
                outcome.matches.append(node.name)
        sweep(graph_module)
        return outcome


def tower(**sizes: int) -> fx.GraphModule:
    module = Tower(**sizes)
    (found,) = graphs_of(module, lambda f: f(torch.randn(4, module.norms[0].shape[0])))
    return found.module


def test_equal_layers_are_run_once() -> None:
    module = tower(layers=5)
    specimen = RegionalSpecimen(module)
    (record,) = Pipeline((Rescale(),)).run(module, ANY, "tower", specimen)
    assert len(record.matches) == 5 and record.certificate is not None
    assert record.certificate.max_rel_error == 0.0 and not record.certificate.skipped
    assert len(specimen.known) == 1


@pytest.mark.parametrize("layer", range(3))
def test_one_wrong_layer_among_right_ones_is_caught(layer: int) -> None:
    module = tower()
    passes = (Rescale(), Rescale(1.0 + 1e-6, only=layer))
    with pytest.raises(CertificateError, match=r"rescale on tower: tanh\S* differs by \S+ \(bound 1e-10\)"):
        Pipeline(passes).run(module, ANY, "tower", RegionalSpecimen(module))


@pytest.mark.parametrize("only", [0, 2])
def test_a_changed_output_and_a_changed_start_are_regions_too(only: int) -> None:
    module = tower(layers=3)
    with pytest.raises(CertificateError):
        Pipeline((Rescale(0.5, only),)).run(module, ANY, "tower", RegionalSpecimen(module))


@dataclass(frozen=True)
class Everywhere(Rescale):
    """The same, and as much of the result: nothing reads it alike, so that all of a graph is one root."""

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome = super().run(graph_module, context)
        (last,) = graph_module.graph.output_node().all_input_nodes
        with graph_module.graph.inserting_after(last):
            scaled = call(graph_module.graph, aten.mul.Tensor, last, 1.0)
        last.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return outcome


def test_equal_layers_above_a_changed_result_are_run_once_and_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "MOST_NUMBERS", 200)  # more than one layer's, fewer than two layers'
    specimen = RegionalSpecimen(tower(layers=5))
    (record,) = Pipeline((Everywhere(),)).run(specimen.module, ANY, "tower", specimen)
    assert record.certificate is not None and not record.certificate.skipped
    assert len(specimen.known) == 2


@pytest.mark.parametrize("layer", range(3))
def test_a_wrong_layer_above_a_changed_result_is_caught(layer: int) -> None:
    specimen = RegionalSpecimen(tower())
    with pytest.raises(CertificateError, match=r"everywhere on tower: \S+ differs by"):
        Pipeline((Everywhere(1.0 + 1e-6, only=layer),)).run(specimen.module, ANY, "tower", specimen)


@dataclass(frozen=True)
class Undone(Pass):
    """tanh(x W V) → tanh((2 x W) V / factor): the product with V reads another value than before."""

    factor: float = 2.0

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        for node in calls(graph, aten.tanh):
            second = node.args[0]
            with graph.inserting_before(second):
                second.replace_input_with(second.args[0], call(graph, aten.mul.Tensor, second.args[0], 2.0))
            with graph.inserting_before(node):
                node.replace_input_with(second, call(graph, aten.div.Tensor, second, self.factor))
            outcome.matches.append(node.name)
        return outcome


@pytest.mark.parametrize("factor", [2.0, 2.001])
def test_what_is_changed_and_undone_need_not_be_equal_in_between(factor: float) -> None:
    specimen = RegionalSpecimen(tower())
    if factor != 2.0:
        with pytest.raises(CertificateError):
            Pipeline((Undone(factor),)).run(specimen.module, ANY, "tower", specimen)
        return
    (record,) = Pipeline((Undone(),)).run(specimen.module, ANY, "tower", specimen)
    assert len(record.matches) == 3 and record.certificate is not None and not record.certificate.skipped


class Residual(nn.Module):
    """The sum goes on, and so does its norm: the fused op computes both from the summands."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm
        return total + normed @ self.weight


def test_values_that_are_related_are_drawn_together() -> None:
    (found,) = graphs_of(Residual(), lambda f: f(torch.randn(3, 6), torch.randn(3, 6)))
    (record,) = Pipeline((FuseNorm(),)).run(found.module, ANY, "residual", RegionalSpecimen(found.module))
    assert record.matches and record.certificate is not None and record.certificate.max_rel_error <= 1e-10


class Written(nn.Module):
    """A row of a cache is written, and rows up to it are read; the row comes from a table, far above."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Parameter(torch.randn(1000, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, token: Tensor, position: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        rows = cache.index_copy(0, position, nn.functional.embedding(token, self.table) @ self.weight)
        turned = rows.mT  # which others read as well
        return torch.where(torch.arange(9) <= position, turned, 0.5).tanh(), turned.exp()


@dataclass(frozen=True)
class Turn(Pass):
    """where(m, rowsᵀ, c) → where(m[:, None], rows, c)ᵀ"""

    factor: float = 1.0

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        for node in calls(graph, aten.where):
            mask, turned, other = node.args
            with graph.inserting_before(node):
                mask = call(graph, aten.unsqueeze.default, mask, 1)
                rows = call(graph, aten.mul.Tensor, turned.args[0], self.factor)
                chosen = call(graph, aten.where.ScalarOther, mask, rows, other)
                node.replace_all_uses_with(call(graph, aten.transpose.int, chosen, 0, 1))
            outcome.matches.append(node.name)
        sweep(graph_module)
        return outcome


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_of_what_lies_above_related_values_only_what_relates_them_is_run(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify, "MOST_NUMBERS", 1000)  # fewer than the table holds
    inputs = torch.tensor([7]), torch.tensor([4]), torch.randn(9, 6)
    (found,) = graphs_of(Written(), lambda f: f(*inputs))
    specimen = RegionalSpecimen(found.module, {"token": inputs[0], "position": inputs[1]})
    if factor != 1.0:
        with pytest.raises(CertificateError):
            Pipeline((Turn(factor),)).run(found.module, ANY, "written", specimen)
        return
    (record,) = Pipeline((Turn(),)).run(found.module, ANY, "written", specimen)
    assert record.matches and record.certificate is not None and not record.certificate.skipped


class Counted(nn.Module):
    """Layers that read as much as counters of their own say."""

    def forward(self, x: Tensor, *counters: Tensor) -> Tensor:
        for counter in counters:
            x = torch.where(torch.arange(6) <= counter, x.mT, 0.5) @ x
        return x


@pytest.mark.parametrize(("counts", "run"), [((3, 3, 3), 1), ((3, 4, 3), 2)])
def test_layers_are_equal_if_what_was_given_to_them_is(counts: tuple[int, ...], run: int) -> None:
    counters = [torch.tensor([count]) for count in counts]
    (found,) = graphs_of(Counted(), lambda f: f(torch.randn(6, 6), *counters))
    inputs = [node for node in placeholders(found.module.graph) if node.meta["val"].dtype == torch.int64]
    specimen = RegionalSpecimen(found.module, dict(zip([one.name for one in inputs], counters, strict=True)))
    (record,) = Pipeline((Turn(),)).run(found.module, ANY, "counted", specimen)
    assert len(record.matches) == 3 and len(specimen.known) == run


class Turned(nn.Module):
    """A view that only numbers which lie as they did can be given."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x.mT + y.mT
        return torch.tanh(z.mT.view(24)) + 1


def test_values_are_drawn_as_they_lie() -> None:
    (found,) = graphs_of(Turned(), lambda f: f(torch.randn(4, 6), torch.randn(4, 6)))
    specimen = RegionalSpecimen(found.module)
    (record,) = Pipeline((Rescale(),)).run(found.module, ANY, "turned", specimen)
    assert record.certificate is not None and not record.certificate.skipped
    assert [isinstance(error, float) for error in specimen.known.values()] == [True]


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 1, 5), (1,), ()])
def test_a_drawn_value_has_the_strides_asked_for(shape: tuple[int, ...]) -> None:
    for axes in itertools.permutations(range(len(shape))):
        like = torch.randn([shape[axis] for axis in axes]).permute(sorted(range(len(axes)), key=axes.__getitem__))
        drawn = torch.randn(shape)
        laid = certify.laid_out(drawn, like.stride())
        assert laid.stride() == like.stride() and torch.equal(laid, drawn)
    gaps = torch.randn(4, 6)[:, ::2]
    assert certify.laid_out(torch.randn(4, 3), gaps.stride()).is_contiguous()
    assert certify.laid_out(torch.randn(4, 3), (0, 1)).is_contiguous()


class Router(nn.Module):
    def __init__(self, experts: int = 8) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(experts, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(x @ self.gate.T)
        weights, indices = torch.topk(scores, 3, dim=-1, sorted=False)
        return indices, weights / (weights.sum(-1, keepdim=True) + 1e-20)


def test_integers_are_computed_from_what_they_depend_on() -> None:
    (found,) = graphs_of(Router(), lambda f: f(torch.randn(5, 6)))
    (record,) = Pipeline((FuseRouting(),)).run(found.module, ANY, "router", RegionalSpecimen(found.module))
    assert record.matches and record.certificate is not None and record.certificate.max_rel_error <= 1e-10


class GroupedRouter(nn.Module):
    """Experts of dropped groups stay behind with a score of zero, and so may come before biased scores below it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        biased = scores + self.bias
        groups = biased.view(-1, 3, 4).topk(2, dim=-1)[0].sum(-1).topk(1, dim=-1, sorted=False)[1]
        kept = torch.zeros(len(logits), 3).scatter(1, groups, 1).unsqueeze(-1).expand(-1, 3, 4).reshape(-1, 12)
        indices = biased.masked_fill(~kept.bool(), 0.0).topk(4, dim=-1, sorted=False)[1]
        weights = scores.gather(1, indices)
        return indices, weights / (weights.sum(-1, keepdim=True) + 1e-20)


@pytest.mark.parametrize("seed", range(6))
def test_equal_scores_are_chosen_alike_before_and_after(seed: int) -> None:
    (found,) = graphs_of(GroupedRouter(), lambda f: f(torch.randn(5, 12)))
    specimen = RegionalSpecimen(found.module, seed=seed)
    _, record = Pipeline((Canonicalise(), FuseRouting())).run(found.module, ANY, "router", specimen)
    assert record.matches and record.certificate is not None and record.certificate.max_rel_error <= 1e-10


def test_what_is_too_large_is_named_and_the_rest_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "MOST_NUMBERS", 100)
    module = tower(width=12)
    (record,) = Pipeline((Rescale(),)).run(module, ANY, "tower", RegionalSpecimen(module))
    assert record.certificate is not None and len(record.certificate.skipped) == 3
    assert "not certified" in record.certificate.skipped[0] and "GB" in record.certificate.skipped[0]


class Parts(nn.Module):
    """A weight of 144 numbers, looked at in two more ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.weight.unflatten(0, (3, 4))
        return x @ parts[:, :2].transpose(1, 2) @ parts[:, 2:, :2]


def test_views_hold_no_numbers_of_their_own() -> None:
    (found,) = graphs_of(Parts(), lambda f: f(torch.randn(3, 2, 12)))
    assert 144 + 72 < certify._numbers(found.module.graph, {}) < 2 * 144


def test_free_sizes_are_made_small_where_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "MOST_NUMBERS", 4000)
    (found,) = graphs_of(Tower(), lambda f: f(torch.randn(1000, 6)), dynamic=True)
    (record,) = Pipeline((Rescale(),)).run(found.module, ANY, "tower", RegionalSpecimen(found.module))
    assert record.certificate is not None and not record.certificate.skipped
    with pytest.raises(CertificateError):
        Pipeline((Rescale(0.9),)).run(found.module, ANY, "tower", RegionalSpecimen(found.module))


class Dropping(nn.Module):
    """Dropout at work, between what is rewritten above it and below it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.tanh(x @ self.weight), 0.5, training=True)
        mask = torch.bernoulli(torch.full_like(x, 0.5)).bool()
        q = torch.tanh(torch.where(mask, x, -x))[None]
        return torch.tanh(nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.3))


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_what_is_drawn_at_random_is_the_same_on_both_sides(factor: float) -> None:
    (found,) = graphs_of(Dropping(), lambda f: f(torch.randn(5, 6)))
    pipeline, specimen = Pipeline((Rescale(factor),)), RegionalSpecimen(found.module)
    if factor == 1:
        (record,) = pipeline.run(found.module, ANY, "dropping", specimen)
        assert len(record.matches) == 3 and record.certificate is not None and record.certificate.max_rel_error == 0
    else:
        with pytest.raises(CertificateError, match="differs"):
            pipeline.run(found.module, ANY, "dropping", specimen)
