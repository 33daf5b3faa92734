"""Routing becomes one op, with the attributes its graph spells."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from model_def.moe import route
from model_def.specs import RoutingSpec
from passes.base import calls
from passes.fuse_routing import FuseRouting
from passes.sparsify_experts import SparsifyExperts
from tests.passes.capture import (
    CONTEXT,
    V2_GREEDY,
    V2_GROUPED,
    V3_ONE_GROUP,
    V3_ROUTING,
    graph_of,
    layer_graph,
    moe_layer,
    tensor,
)
from tests.passes.harness import certified, count, untouched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

EPSILON = 1e-20
NONE = {"groups": 1, "top_groups": 1, "group_score": "max", "masked": 0.0}


class Router(nn.Module):
    """Logits in, indices and weights out."""

    def __init__(self, function, experts: int):
        super().__init__()
        self.function = function
        self.bias = nn.Parameter(torch.empty(experts))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(logits, self.bias)


def routing_graph(function, experts: int, *lead: str, dtype: torch.dtype = torch.float32):
    return graph_of(Router(function, experts), [tensor("logits", *(lead or ("B",)), experts, dtype=dtype)])


def attributes(graph) -> dict:
    (node,) = calls(graph.graph, dsv3.route)
    names = [argument.name for argument in node.target._schema.arguments if argument.name != "always"]
    return dict(zip(names, node.args, strict=True))  # experts that are always chosen are another pass's


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (V3_ROUTING, dict(groups=4, top_groups=2, group_score="top2", masked=-math.inf)),
        (V3_ONE_GROUP, NONE),
        (V2_GREEDY, NONE),
        (V2_GROUPED, dict(groups=5, top_groups=2, group_score="max", masked=0.0)),
    ],
    ids=["v3", "v3-one-group", "v2", "v2-groups"],
)
def test_the_definitions_routing(spec: RoutingSpec, expected: dict):
    graph = routing_graph(lambda z, b: route(spec, z, b if spec.bias else None), spec.experts)
    outcome = certified(FuseRouting(), graph)
    assert len(outcome.matches) == 1 and not outcome.refusals
    found = attributes(graph)
    assert (found.pop("logits").name, getattr(found.pop("bias"), "name", None)) == (
        "logits",
        "bias" if spec.bias else None,
    )
    assert found == dict(
        scoring=spec.scoring,
        top_k=spec.top_k,
        normalise=spec.normalise,
        epsilon=EPSILON if spec.normalise else 0.0,
        scale=spec.scale,
        **expected,
    )
    assert count(graph, aten.topk, aten.gather, aten.sigmoid, aten.softmax, aten.scatter) == 0


def test_a_whole_layer_after_sparsify_experts():
    graph = layer_graph(moe_layer(V3_ROUTING))
    SparsifyExperts().run(graph, CONTEXT)
    assert len(certified(FuseRouting(), graph).matches) == 1
    assert count(graph, aten.topk, aten.scatter, aten.masked_fill) == 1  # the attention's mask


# ---- other ways to write the same


def kept_groups(values: Tensor, top: int) -> Tensor:
    return torch.zeros_like(values).scatter(1, values.topk(top, -1).indices, 1)


def v3(logits, bias, *, score=None, mask=None, weights=None, post=lambda w: w):
    """DeepSeek-V3 with twelve experts in four groups, and one step replaced."""
    scores = logits.sigmoid()
    choice = scores + bias
    grouped = choice.view(-1, 4, 3)
    group_scores = (score or (lambda x: x.topk(2, -1)[0].sum(-1)))(grouped)
    kept = kept_groups(group_scores, 2)
    masked = (mask or (lambda c, k: c.masked_fill(~spread(k).bool(), -math.inf)))(choice, kept)
    values, indices = masked.topk(3, -1)
    return indices, post(weights(scores, choice, values, indices) if weights else scores.gather(1, indices))


def spread(kept: Tensor) -> Tensor:
    return kept.unsqueeze(-1).expand(-1, 4, 3).reshape(-1, 12)


VARIANTS = {
    "mask over experts": {},
    "where": {"mask": lambda c, k: torch.where(spread(k) > 0, c, -math.inf)},
    "where not": {"mask": lambda c, k: torch.where(spread(k) == 0, -math.inf, c)},
    "repeat_interleave": {"mask": lambda c, k: c.masked_fill(k.repeat_interleave(3, 1) == 0, -math.inf)},
    "product with the mask": {"mask": lambda c, k: c * spread(k), "score": lambda x: x.amax(-1)},
    "max": {"score": lambda x: x.max(-1).values},
    "finite mask": {"mask": lambda c, k: c.masked_fill(~spread(k).bool(), -1e4)},
    "no epsilon": {"post": lambda w: 2.5 * (w / w.sum(-1, keepdim=True))},
    "scaled only": {"post": lambda w: w * 2.5},
    "cast": {"post": lambda w: (w / (w.sum(-1, keepdim=True) + 1e-9)).to(torch.bfloat16).float()},
}


@pytest.mark.parametrize("steps", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_way_to_write_it(steps):
    # Positive biases: among experts that a mask has made equal to zero, any choice is right.
    graph = routing_graph(lambda z, b: v3(z, b.abs(), **steps), 12)
    outcome = certified(FuseRouting(), graph)
    assert len(outcome.matches) == 1 and not outcome.refusals
    assert count(graph, aten.topk, aten.gather, aten.scatter) == 0


def test_attributes_are_captured_exactly():
    steps = dict(VARIANTS["product with the mask"], post=lambda w: w / (w.sum(-1, keepdim=True) + 3e-7) * 1.75)
    graph = routing_graph(lambda z, b: v3(z, b.abs(), **steps), 12)
    certified(FuseRouting(), graph)
    found = attributes(graph)
    assert [found[k] for k in ("masked", "group_score", "epsilon", "scale")] == [0.0, "max", 3e-7, 1.75]


def test_weights_may_be_the_values_of_the_top_k():
    def greedy(logits, bias):
        weights, indices = logits.softmax(-1).topk(3, -1)
        return indices, weights * 16.0

    graph = routing_graph(greedy, 7)
    assert len(certified(FuseRouting(), graph).matches) == 1


def rooted(softplus):
    def routing(logits, bias):
        scores = softplus(logits).sqrt()
        indices = (scores + bias).topk(3, -1, sorted=False).indices
        weights = scores.gather(1, indices)
        return indices, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 1.5

    return routing_graph(routing, 7)


def test_scores_may_be_roots_of_softplus():
    graph = rooted(torch.nn.functional.softplus)
    assert len(certified(FuseRouting(), graph).matches) == 1
    found = attributes(graph)
    assert (found["scoring"], found["logits"].name) == ("sqrtsoftplus", "logits")
    for other in (lambda z: torch.nn.functional.softplus(z, 2.0), lambda z: torch.nn.functional.softplus(z, 1.0, 3.0)):
        assert untouched(FuseRouting(), rooted(other)) == ""


def test_two_token_axes():
    graph = routing_graph(lambda z, b: route(V3_ROUTING, z, b), 12, "B", "S")
    assert len(certified(FuseRouting(), graph).matches) == 1


def test_one_group_may_keep_its_group_step():
    def routing(logits, bias):
        scores = logits.sigmoid()
        choice = scores + bias
        kept = kept_groups(choice.view(-1, 1, 7).topk(2, -1)[0].sum(-1), 1)
        choice = choice.masked_fill(~kept.unsqueeze(-1).expand(-1, 1, 7).reshape(-1, 7).bool(), -math.inf)
        indices = choice.topk(3, -1).indices
        return indices, scores.gather(1, indices)

    graph = routing_graph(routing, 7)
    assert len(certified(FuseRouting(), graph).matches) == 1
    assert attributes(graph)["groups"] == 1


def test_raw_weights_used_elsewhere_end_the_match_there():
    def routing(logits, bias):
        scores = logits.sigmoid()
        indices = scores.topk(3, -1).indices
        weights = scores.gather(1, indices)
        return indices, weights / weights.sum(-1, keepdim=True), weights.sum(-1).exp()

    graph = routing_graph(routing, 7)
    assert len(certified(FuseRouting(), graph).matches) == 1
    assert attributes(graph)["normalise"] is False


# ---- near misses

NEAR_MISSES = {
    "sum of three": (
        {"score": lambda x: x.topk(3, -1)[0].sum(-1)},
        "groups are ranked by the sum of the 3 best; known are 1 and 2",
    ),
    "mean": (
        {"score": lambda x: x.mean(-1)},
        "groups are ranked by mean; known are their best, and the sum of their two best",
    ),
    "positive mask": (
        {"mask": lambda c, k: c.masked_fill(~spread(k).bool(), 1.0)},
        "masked_fill gives dropped experts the score 1, with which they can win",
    ),
    "inverted mask": (
        {"mask": lambda c, k: c.masked_fill(spread(k).bool(), -math.inf)},
        "masked_fill drops the best groups instead of the others",
    ),
    "strided groups": (
        {"mask": lambda c, k: c.masked_fill(k.unsqueeze(1).expand(-1, 3, 4).reshape(-1, 12) == 0, -math.inf)},
        "the mask of masked_fill comes from scatter, not from chosen groups",
    ),
    "biased weights": (
        {"weights": lambda scores, choice, values, indices: choice.gather(1, indices)},
        "the weights are read from add, not from sigmoid",
    ),
    "biased values": (
        {"weights": lambda scores, choice, values, indices: values},
        "the weights getitem are scores with the bias bias in them",
    ),
}


@pytest.mark.parametrize(("steps", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_near_misses(steps, reason):
    assert untouched(FuseRouting(), routing_graph(lambda z, b: v3(z, b, **steps), 12)) == reason


def test_scores_rounded_to_bfloat16_are_refused():
    graph = routing_graph(lambda z, b: v3(z, b), 12, dtype=torch.bfloat16)
    assert untouched(FuseRouting(), graph) == "sigmoid is rounded to torch.bfloat16, which changes the chosen experts"


def test_groups_ranked_by_other_scores_than_the_experts():
    def routing(logits, bias):
        scores = logits.sigmoid()
        choice = scores + bias
        kept = kept_groups(scores.view(-1, 4, 3).amax(-1), 2)
        indices = choice.masked_fill(spread(kept) == 0, -math.inf).topk(3, -1).indices
        return indices, scores.gather(1, indices)

    assert untouched(FuseRouting(), routing_graph(routing, 12)) == (
        "groups are ranked by sigmoid, but experts are chosen by add"
    )


def masked_values(scores, kept):
    weights, indices = (scores * spread(kept)).topk(4, -1)
    return indices, weights


def scores_of_masked_experts(scores, kept):
    indices = scores.masked_fill(spread(kept) == 0, -math.inf).topk(4, -1).indices
    return indices, scores.gather(1, indices)


@pytest.mark.parametrize("choose", [masked_values, scores_of_masked_experts])
def test_more_experts_than_the_best_groups_hold(choose):
    def routing(logits, bias):
        scores = logits.softmax(-1)
        return choose(scores, kept_groups(scores.view(-1, 4, 3).amax(-1), 1))

    assert untouched(FuseRouting(), routing_graph(routing, 12)) == (
        "4 experts are chosen among 3: some of them are masked, and equal"
    )


def test_a_single_token_without_an_axis_is_no_routing():
    def routing(logits, bias):
        weights, indices = logits[0].softmax(-1).topk(3, -1)
        return indices, weights

    assert untouched(FuseRouting(), routing_graph(routing, 12)) == ""


def test_a_top_k_of_something_else_is_no_routing():
    assert untouched(FuseRouting(), routing_graph(lambda z, b: (z.topk(2, -1).indices, z.topk(2, -1).values), 7)) == ""
