"""What happens around a pass: statistics, certificates, options, requirements."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import fx, nn

from codegen.targets import TARGETS
from dsv3_compile.tracing import Input, capture_module
from model_def.decoder import Layer
from passes.base import Context, Outcome, Pass, Role, Workload, call, calls, fake_mode_of
from passes.pipeline import DEFAULT_PIPELINE, Pipeline, RequirementError, check_required
from passes.settings import PassError
from passes.verify import CertificateError, Specimen
from tests.passes.capture import DENSE_LAYER, layer_inputs

aten = torch.ops.aten
CONTEXT = Context("prefill", TARGETS["cpu"], Workload(2, 8, 8))


@dataclass(frozen=True)
class DoubleByAdding(Pass):
    """2 · x → x + x"""

    factor: float = 2.0
    limit: int | None = None
    form: Literal["add", "keep"] = "add"
    loud: bool = False
    names: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome = Outcome()
        for node in calls(graph_module.graph, aten.mul):
            x, factor = node.args
            if factor != self.factor:
                outcome.refuse(node, f"the factor is {factor}")
                continue
            if self.form == "add":
                with graph_module.graph.inserting_before(node):
                    node.replace_all_uses_with(call(graph_module.graph, aten.add.Tensor, x, x, like=node))
                outcome.matches.append(node.name)
        return outcome


@dataclass(frozen=True)
class LargeOnly(Pass):
    """A choice that depends on sizes: fires on wide products, or where an earlier run did."""

    fire: bool | None = None

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        (node,) = calls(graph_module.graph, aten.mul)
        fire = node.meta["val"].shape[-1] > 100 if self.fire is None else self.fire
        return Outcome(matches=[node.name] if fire else [], decision={"fire": fire})


@dataclass(frozen=True)
class Wrong(DoubleByAdding):
    """2 · x → x"""

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        for node in calls(graph_module.graph, aten.mul):
            node.replace_all_uses_with(node.args[0])
        return Outcome(matches=["all"])


class Twice(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def twice(width: int = 4, factor: float = 2.0) -> fx.GraphModule:
    return capture_module(Twice(factor), [Input("x", Role.ACTIVATION, ("B", "S", width), torch.float32)])


def test_a_record_says_what_a_pass_did():
    module = twice()
    (record,) = Pipeline((DoubleByAdding(),)).run(module, CONTEXT, "toy prefill", Specimen.of(module))
    assert (record.name, record.spec) == ("double-by-adding", repr(DoubleByAdding()))
    assert len(record.matches) == 1 and not record.refusals
    assert record.nodes_before == record.nodes_after == 3
    assert record.seconds > 0
    assert record.cost_before.launches == record.cost_after.launches == 1
    assert record.certificate is not None and record.certificate.max_rel_error == 0.0
    assert any(calls(module.graph, aten.add)) and not any(calls(module.graph, aten.mul))


def test_a_refusal_names_node_line_and_reason():
    (record,) = Pipeline((DoubleByAdding(),)).run(twice(factor=3.0), CONTEXT)
    (refusal,) = record.refusals
    assert refusal.reason == "the factor is 3.0" and refusal.source.startswith("test_pipeline.py:")
    assert record.certificate is None


def test_passes_run_in_order_and_are_announced():
    told = []
    Pipeline((DoubleByAdding(), LargeOnly(fire=False))).run(
        (twice(factor=3.0)), CONTEXT, step=lambda name, number: told.append((number, name))
    )
    assert told == [(0, "double-by-adding"), (1, "large-only")]


def test_a_wrong_pass_stops_with_its_name_and_block():
    module = twice()
    with pytest.raises(CertificateError, match="wrong on moe decode: output 0 differs"):
        Pipeline((Wrong(),)).run(module, CONTEXT, "moe decode", Specimen.of(module))


def test_a_wrong_pass_is_found_on_a_small_twin():
    small = twice(width=3)
    with pytest.raises(CertificateError, match="wrong on moe decode"):
        Pipeline((Wrong(),)).run(twice(width=7000), CONTEXT, "moe decode", Specimen.of(small, proxy=True))


def test_the_small_twin_follows_the_decisions_of_the_real_block():
    specimen = Specimen.of(twice(width=3), proxy=True)
    (record,) = Pipeline((LargeOnly(),)).run(twice(width=7000), CONTEXT, "block", specimen)
    assert len(record.matches) == 1 and record.certificate is not None and record.certificate.proxy


def test_a_twin_that_matches_differently_is_an_error():
    specimen = Specimen.of(twice(width=3, factor=3.0), proxy=True)
    with pytest.raises(CertificateError, match=r"1 matches, but 0 on the small block \(mul: the factor is 3.0\)"):
        Pipeline((DoubleByAdding(),)).run(twice(width=7000), CONTEXT, "block", specimen)


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("double-by-adding.factor=3", "factor", 3.0),
        ("double-by-adding.limit=7", "limit", 7),
        ("double-by-adding.limit=none", "limit", None),
        ("double-by-adding.form=keep", "form", "keep"),
        ("double-by-adding.loud=true", "loud", True),
        ("double-by-adding.names=a, b", "names", ("a", "b")),
    ],
)
def test_settings_are_read_as_the_declared_type(setting: str, field: str, value: Any):
    (one,) = Pipeline((DoubleByAdding(),)).configured([setting]).passes
    assert getattr(one, field) == value and type(getattr(one, field)) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("double-by-adding", "is not of the form pass.field=value"),
        ("double-by-adding.factor", "is not of the form pass.field=value"),
        ("triple.factor=3", "unknown pass 'triple'; accepted: double-by-adding"),
        ("double-by-adding.speed=3", "has no option 'speed'; accepted: factor, limit, form, loud, names"),
        ("double-by-adding.limit=many", "accepted: a whole number"),
        ("double-by-adding.factor=", "accepted: a number"),
        ("double-by-adding.form=fast", "accepted: add, keep"),
        ("double-by-adding.loud=1", "accepted: true, false"),
    ],
)
def test_a_setting_that_cannot_be_read_says_what_could(setting: str, message: str):
    with pytest.raises(PassError, match=message):
        Pipeline((DoubleByAdding(),)).configured([setting])


def test_a_value_that_a_pass_itself_rejects_is_named():
    with pytest.raises(PassError, match="order-contractions.decode=sideways: .*expanded"):
        Pipeline().configured(["order-contractions.decode=sideways"])


def test_two_settings_of_one_pass_add_up():
    (one,) = (
        Pipeline((DoubleByAdding(),)).configured(["double-by-adding.factor=3", "double-by-adding.loud=true"]).passes
    )
    assert one == DoubleByAdding(factor=3.0, loud=True)


def test_a_disabled_pass_is_left_out():
    pipeline = Pipeline((DoubleByAdding(), LargeOnly()))
    assert pipeline.configured(disable=["large-only"]).passes == (DoubleByAdding(),)
    with pytest.raises(PassError, match="unknown pass 'larger'"):
        pipeline.configured(disable=["larger"])


def test_a_required_pass_without_a_match_names_its_nearest_miss():
    records = Pipeline((DoubleByAdding(),)).run(twice(factor=3.0), CONTEXT)
    with pytest.raises(RequirementError, match=r"double-by-adding did not fire: nearest miss mul \(.*\): the factor"):
        check_required(records, ["double-by-adding"])


@dataclass(frozen=True)
class Demanding(Pass):
    """Refuses every sum after as many nodes as the number that is added."""

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome = Outcome()
        for node in calls(graph_module.graph, aten.add):
            outcome.refuse(node, f"stopped after {node.args[1]}", node.args[1])
        return outcome


class Sums(nn.Module):
    def forward(self, x):
        return x + 1 + 3 + 2 + 3


def test_the_nearest_miss_is_the_first_of_those_that_got_furthest():
    module = capture_module(Sums(), [Input("x", Role.ACTIVATION, ("B", 4), torch.float32)])
    records = Pipeline((Demanding(),)).run(module, CONTEXT)
    names = [refusal.node for refusal in records[0].refusals]
    with pytest.raises(RequirementError, match=rf"nearest miss {names[1]} .*stopped after 3"):
        check_required(records, ["demanding"])


def test_a_required_pass_that_fired_once_is_enough():
    pipeline = Pipeline((DoubleByAdding(),))
    records = pipeline.run(twice(factor=3.0), CONTEXT) + pipeline.run(twice(), CONTEXT)
    check_required(records, ["double-by-adding"])


def test_the_default_pipeline_holds_each_pass_once_and_reads_back_from_its_specs():
    names = [one.name() for one in DEFAULT_PIPELINE]
    assert len(names) == len(set(names))
    scope = {type(one).__name__: type(one) for one in DEFAULT_PIPELINE}
    assert tuple(eval(repr(one), scope) for one in DEFAULT_PIPELINE) == DEFAULT_PIPELINE
    assert all(dataclasses.is_dataclass(one) and type(one).__doc__ for one in DEFAULT_PIPELINE)


def test_the_passes_can_end_early_and_run_twice():
    names = [one.name() for one in Pipeline().configured(until="fuse-routing", repeat=["canonicalise"]).passes]
    assert names[:2] == ["canonicalise", "canonicalise"] and names[-1] == "fuse-routing"
    assert "lower" not in names


def test_the_last_pass_may_be_left_out_itself():
    names = [one.name() for one in Pipeline().configured(disable=["fuse-routing"], until="fuse-routing").passes]
    assert names == [one.name() for one in Pipeline().configured(until="fuse-routing").passes][:-1]


def test_a_pass_that_stands_twice_is_set_left_out_and_ended_after_as_one():
    pipeline = Pipeline((DoubleByAdding(), LargeOnly(), DoubleByAdding(), LargeOnly()))
    assert pipeline.configured(["double-by-adding.factor=3"]).passes[::2] == (DoubleByAdding(factor=3),) * 2
    assert pipeline.configured(disable=["large-only"]).passes == (DoubleByAdding(),) * 2
    assert pipeline.configured(until="double-by-adding").passes == pipeline.passes[:3]


@dataclass(frozen=True)
class Pinning(DoubleByAdding):
    """Compares a free size with the value it has as an example."""

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        size = next(iter(graph_module.graph.nodes)).meta["val"].shape[1]
        assert size == size.node.hint
        return Outcome()


def test_a_pass_that_pins_a_free_size_is_named():
    with pytest.raises(CertificateError, match=r"pinning on block: the size s\d+ became \d+$"):
        Pipeline((DoubleByAdding(), Pinning())).run(twice(), CONTEXT)


def test_no_pass_pins_a_free_size():
    """Comparing a free size with == asks for its example value, and the graph would hold for that value alone."""
    # 2 · S is the width of a query head at the example value of S.
    module = capture_module(Layer(DENSE_LAYER, torch.float32), layer_inputs(DENSE_LAYER))
    shapes = fake_mode_of(module.graph).shape_env
    before = [str(guard.expr) for guard in shapes.guards]
    Pipeline().run(module, CONTEXT)
    assert [str(guard.expr) for guard in shapes.guards] == before
