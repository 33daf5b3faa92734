"""Routing, read from its graph: scores, selection bias, group limit, top-k, weights.

`lead` axes are the tokens' · E experts · G groups · X = E/G experts per group · K experts per token.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, calls, is_call, shape_of, sweep
from passes.nodes import (
    CASTS,
    RESHAPES,
    SOFTMAX,
    VIEWS,
    constant_of,
    counts_up,
    dtype_of,
    over_last_axis,
    same_shape,
    settled,
    steps_between,
    substitute,
    users,
    widens,
)
from passes.products import BROADCAST, sources_of_dims
from passes.rewrite import Found, Number, Op, Refused, Var, matched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

GROUPED = "gx"  # letters of the last two axes of a tensor whose experts are split into groups


@dataclass(frozen=True)
class Limit:
    """Only experts of the best groups may be chosen."""

    groups: int = 1
    top_groups: int = 1
    score: str = "max"
    masked: float = 0.0


@dataclass(frozen=True)
class FuseRouting(Pass):
    """s = sigmoid(z) | softmax(z) | sqrt(softplus(z));  b = s [+ bias]
       [b = −inf | 0 outside the best groups, by max or sum of the two best of b]
       indices = topk(b, K);  w = s[indices] [/ (Σ w + ε)] [· scale]               →    indices, w = route(z, bias, …)

    Exact up to the choice among equal scores. Weights read from biased scores, and other ways to rank groups, are
    other routings and stay. A softmax over the K largest logits is one over all, renormalised.
    """  # fmt: skip

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome, graph = Outcome(), graph_module.graph
        for topk in calls(graph, aten.topk):
            if topk._erased:
                continue
            try:
                new = fuse(graph, topk)
            except Refused as refused:
                outcome.refuse(refused.node, refused.reason, steps_between(topk, refused.node))
            else:
                if new is not None:
                    outcome.matches.append(matched(topk, new))
        sweep(graph_module)
        return outcome


def fuse(graph: fx.Graph, topk: fx.Node) -> fx.Node | None:
    """Replace one selection; None if this top-k selects no experts. Raises Refused for a near miss."""
    indices = piece(topk, 1)
    if indices is None:
        return None
    if len(shape_of(topk.args[0])) < 2:
        return None  # of a single token without an axis of its own
    choice, mask = masked_choice(topk.args[0])
    scores, bias = scores_and_bias(choice)
    if scores is None:
        return fuse_softmax_of_chosen(graph, topk, indices)
    refuse_other_choices(topk)
    if not widens(torch.float32, dtype_of(scores)):
        raise Refused(scores, f"{scores.name} is rounded to {dtype_of(scores)}, which changes the chosen experts")
    limit = Limit() if mask is None else read_limit(choice, *mask)
    weights = chosen_weights(topk, indices, scores, bias, limit)
    normalise, epsilon, scale, end = follow(weights)

    known = scoring_of(scores)
    assert known is not None
    scoring, logits = known
    lead = len(shape_of(logits)) - 1
    with graph.inserting_before(topk):
        flat = logits if lead == 1 else call(graph, aten.flatten.using_ints, logits, 0, lead - 1, like=topk)
        route = call(
            graph, dsv3.route.default, flat, bias, scoring, topk.args[1], limit.groups, limit.top_groups,
            limit.score, limit.masked, normalise, epsilon, scale, like=end,
        )  # fmt: skip
        results = [call(graph, operator.getitem, route, number, like=end) for number in (0, 1)]
        if lead > 1:
            sizes = [call(graph, aten.sym_size.int, logits, d, like=end) for d in range(lead)]
            results = [call(graph, aten.reshape.default, r, [*sizes, topk.args[1]], like=end) for r in results]
    substitute(graph, indices, results[0])
    substitute(graph, end, results[1])
    return route


def refuse_other_choices(topk: fx.Node) -> None:
    """Raises Refused for a top-k that is not of the largest along the last axis."""
    if not over_last_axis(topk, 2, -1) or topk.kwargs.get("largest", True) is not True or topk.args[3:4] == (False,):
        raise Refused(topk, f"{topk.name} does not choose the largest of the last axis")


def fuse_softmax_of_chosen(graph: fx.Graph, topk: fx.Node, indices: fx.Node) -> fx.Node | None:
    """softmax over the K largest logits: the softmax over all, divided by the sum of the chosen."""
    values, logits = piece(topk, 0), topk.args[0]
    softmaxes = [] if values is None else [u for u in users(values) if is_call(u, *SOFTMAX) and over_last_axis(u, 1)]
    runs_experts = any(is_call(u, dsv3.sort_pairs, aten.scatter) for u in users(indices))
    if len(softmaxes) != 1 or len(users(values)) != 1 or not runs_experts or len(shape_of(logits)) != 2:
        return None  # what is sampled from the largest logits looks alike, and is no routing
    refuse_other_choices(topk)
    (end,) = softmaxes
    if not widens(torch.float32, dtype_of(end)):
        raise Refused(end, f"{end.name} is rounded to {dtype_of(end)}")
    _, epsilon, scale, last = follow(end)
    scale /= 1 + epsilon  # what a softmax is divided by, if anything, is 1 + ε
    with graph.inserting_before(topk):
        route = call(
            graph, dsv3.route.default, logits, None, "softmax", topk.args[1], 1, 1, "max", 0.0, True, 0.0, scale,
            like=end,
        )  # fmt: skip
        results = [call(graph, operator.getitem, route, number, like=end) for number in (0, 1)]
    substitute(graph, indices, results[0])
    substitute(graph, last, results[1])
    return route


# ---- selection --------------------------------------------------------------------------------------------------


def piece(node: fx.Node, number: int) -> fx.Node | None:
    """The node that takes one result of a call with several, if anybody does."""
    return next((u for u in node.users if is_call(u, operator.getitem) and u.args[1] == number and users(u)), None)


def masked_choice(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, fx.Node, bool, float] | None]:
    """What the experts are chosen by before masking, and (masking node, mask, mask is true for kept, value)."""
    node = settled(node)
    inside = node
    while is_call(inside, *RESHAPES):
        inside = settled(inside.args[0])
    for target, order in ((aten.masked_fill, (0, 1, 2)), (aten.where, (1, 0, 2)), (aten.where, (2, 0, 1))):
        if is_call(inside, target):
            data, mask, value = (inside.args[i] for i in order)
            number = constant_of(value)
            if number is not None and constant_of(data) is None and same_shape(ungrouped(data), node):
                return ungrouped(data), (inside, mask, order == (1, 0, 2), number)
    if is_call(inside, aten.mul) and all(isinstance(a, fx.Node) for a in inside.args[:2]):
        for data, mask in (inside.args[:2], inside.args[1::-1]):
            if scores_and_bias(ungrouped(data))[0] is not None:
                return ungrouped(data), (inside, mask, True, 0.0)
    return node, None


def ungrouped(node: Any) -> Any:
    """[lead, E] behind [lead, G, X]."""
    node = settled(node)
    if is_call(node, *VIEWS) and len(shape_of(node)) == len(shape_of(node.args[0])) + 1:
        return settled(node.args[0])
    return node


def scores_and_bias(choice: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """(scores of the logits, selection bias or None), or (None, None) for anything else."""
    if scoring_of(choice) is not None:
        return choice, None
    if is_call(choice, aten.add) and all(isinstance(a, fx.Node) for a in choice.args[:2]) and not choice.kwargs:
        for scores, bias in (choice.args[:2], choice.args[1::-1]):
            found = scores_and_bias(settled(scores))
            if found[0] is not None and found[1] is None and len(shape_of(bias)) == 1:
                return found[0], bias
    return None, None


def scoring_of(scores: Any) -> tuple[str, fx.Node] | None:
    """(what `route` calls them, their logits) of scores."""
    if is_call(scores, aten.sigmoid):
        return "sigmoid", scores.args[0]
    if is_call(scores, aten.softmax, aten._softmax) and over_last_axis(scores, 1):
        return "softmax", scores.args[0]
    if is_call(scores, aten.sqrt) and is_call(softplus := settled(scores.args[0]), aten.softplus):
        plain = softplus.args[1:] in ((), (1,), (1, 20)) and not softplus.kwargs
        return ("sqrtsoftplus", softplus.args[0]) if plain else None
    return None


# ---- the group limit --------------------------------------------------------------------------------------------


def read_limit(choice: fx.Node, masking: fx.Node, mask: fx.Node, kept: bool, masked: float) -> Limit:
    """The group limit behind a mask over experts; `kept`: the mask is true where experts stay."""
    lead = "abcd"[: len(shape_of(choice)) - 1]
    chosen, kept = groups_of_mask(masking, mask, lead, kept)
    if not kept:
        raise Refused(masking, f"{masking.name} drops the best groups instead of the others")
    if masked > 0:
        raise Refused(masking, f"{masking.name} gives dropped experts the score {masked:g}, with which they can win")
    selection = settled(chosen)
    if not (is_call(selection, operator.getitem) and selection.args[1] == 1 and is_call(selection.args[0], aten.topk)):
        raise Refused(masking, f"the groups in {masking.name} are not the result of a top-k")
    topk = selection.args[0]
    ranked = settled(topk.args[0])
    score, values = group_score(ranked)
    by = ungrouped(values)
    if by is not choice:
        raise Refused(ranked, f"groups are ranked by {by.name}, but experts are chosen by {choice.name}")
    return Limit(shape_of(ranked)[-1], topk.args[1], score, masked)


def groups_of_mask(masking: fx.Node, node: fx.Node, lead: str, kept: bool) -> tuple[fx.Node, bool]:
    """The indices [lead, groups] that a mask over experts was scattered from; its axes are followed to the scatter."""
    letters = lead + (GROUPED if len(shape_of(node)) == len(lead) + 2 else "e")
    while True:
        node = settled(node)
        sources = sources_of_dims(node)
        if is_call(node, aten.bitwise_not, aten.logical_not):
            kept = not kept
        elif is_call(node, aten.eq) and node.args[1] == 0:
            kept = not kept
        elif is_call(node, aten.gt, aten.ne) and node.args[1] == 0 or is_call(node, *CASTS):
            pass
        elif letters[-1] == "e" and is_call(node, *VIEWS) and len(shape_of(node.args[0])) == len(lead) + 2:
            letters = lead + GROUPED  # experts of one group are neighbours
        elif letters[-1] == "e" and is_call(node, aten.repeat_interleave) and over_last_axis(node, 2):
            letters = lead + "g"
        elif sources is not None and letters[-1] != "e":
            before = {source: letters[d] for d, source in enumerate(sources) if source is not None}
            letters = "".join(before.get(d, BROADCAST) for d in range(len(shape_of(node.args[0]))))
        elif is_call(node, aten.scatter) and letters == lead + "g" and node.args[1] % len(letters) == len(lead):
            base, value = constant_of(node.args[0]), constant_of(node.args[3])
            if (base, value) not in ((0.0, 1.0), (1.0, 0.0)):
                raise Refused(masking, f"{node.name} is no mask of ones and zeros")
            return node.args[2], kept if value == 1.0 else not kept
        else:
            raise Refused(masking, f"the mask of {masking.name} comes from {node.name}, not from chosen groups")
        node = node.args[0]


def group_score(ranked: fx.Node) -> tuple[str, fx.Node]:
    """How groups are scored, and the scores of their experts [lead, G, X]."""
    if is_call(ranked, aten.amax) and over_last_axis(ranked, 1):
        return "max", settled(ranked.args[0])
    if is_call(ranked, operator.getitem) and ranked.args[1] == 0 and is_call(ranked.args[0], aten.max):
        if over_last_axis(ranked.args[0], 1):
            return "max", settled(ranked.args[0].args[0])
    if is_call(ranked, aten.sum) and over_last_axis(ranked, 1):
        best = settled(ranked.args[0])
        if is_call(best, operator.getitem) and best.args[1] == 0 and is_call(best.args[0], aten.topk):
            topk = best.args[0]
            if over_last_axis(topk, 2, -1) and topk.args[1] in (1, 2):
                return ("max", "top2")[topk.args[1] - 1], settled(topk.args[0])
            raise Refused(ranked, f"groups are ranked by the sum of the {topk.args[1]} best; known are 1 and 2")
    raise Refused(ranked, f"groups are ranked by {ranked.name}; known are their best, and the sum of their two best")


# ---- weights ----------------------------------------------------------------------------------------------------


def chosen_weights(topk: fx.Node, indices: fx.Node, scores: fx.Node, bias: fx.Node | None, limit: Limit) -> fx.Node:
    """The scores of the chosen experts."""
    values, gathers = piece(topk, 0), [u for u in users(indices) if reads_at(u, indices)]
    allowed = shape_of(scores)[-1] // limit.groups * limit.top_groups
    if topk.args[1] > allowed:
        raise Refused(topk, f"{topk.args[1]} experts are chosen among {allowed}: some of them are masked, and equal")
    if values is not None:
        if bias is not None:
            raise Refused(values, f"the weights {values.name} are scores with the bias {bias.name} in them")
        if gathers:
            raise Refused(values, f"weights are read twice, as {values.name} and {gathers[0].name}")
        return values
    for gather in gathers:
        if settled(gather.args[0]) is not scores:
            raise Refused(gather, f"the weights are read from {gather.args[0].name}, not from {scores.name}")
    if len(gathers) != 1:
        raise Refused(topk, "the scores of the chosen experts are not read")
    return gathers[0]


def reads_at(node: fx.Node, indices: fx.Node) -> bool:
    """Does the node read its first input at the indices of every row?"""
    if is_call(node, aten.gather):
        return node.args[2] is indices and over_last_axis(node, 1)
    if is_call(node, aten.take_along_dim):
        return node.args[1] is indices and over_last_axis(node, 2)
    if not is_call(node, aten.index) or len(node.args[1]) != 2 or node.args[1][1] is not indices:
        return False
    rows = settled(node.args[1][0])
    return is_call(rows, aten.unsqueeze) and shape_of(rows)[1:] == (1,) and counts_up(rows.args[0], 0)


def follow(weights: fx.Node) -> tuple[bool, float, float, fx.Node]:
    """(normalised, epsilon, scale, last node) of what is done to the weights, as far as nobody else reads them."""
    total = Op((aten.sum,), (Var("w"),), check=lambda node: over_last_axis(node, 1) and node.args[2:3] == (True,))
    division = Var("w") / (total + Number("epsilon")) | Var("w") / total
    normalise, epsilon, scale, end = False, 0.0, 1.0, weights
    for node in users(end):
        for found in division.search(node, Found({"w": end})):
            if all(u in (*found.inner, node) for inner in (end, *found.inner[1:]) for u in users(inner)):
                normalise, epsilon, end = True, float(found.bound.get("epsilon", 0.0)), node
                break
    (node, *others) = users(end) or [None]
    if not others and is_call(node, aten.mul) and same_shape(node, end):
        factor = next((a for a in node.args[:2] if not isinstance(a, fx.Node)), None)
        if factor is not None:
            scale, end = float(factor), node
    return normalise, epsilon, scale, end
