"""Masked softmax between two products → one attention op, expanded or absorbed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch
from torch import fx

from codegen import ops as _vocabulary  # noqa: F401  registers torch.ops.dsv3
from passes.base import Context, Outcome, Pass, call, calls, is_call, shape_of
from passes.chains import is_probability
from passes.contraction import CONTRACTIONS, Axis, NotLinear, Operand, Term, Value
from passes.lifting import lift
from passes.nodes import steps_between
from passes.rewrite import Refused
from passes.writing import Product, Writer

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseAttention(Pass):
    """P   = softmax(where(t ≤ position, scale · (q̃ · latentᵀ + qR · rope_keyᵀ), −∞))
       out = P · latent                        →   mla_attention(q̃, qR, latent, rope_key, positions, scale)
       out = P · v   with one product q · kᵀ   →   attention(q, k, v, positions, scale)

    The mask must be "cached position ≤ query position"; scores and shares must have no other users.
    """

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        for softmax in calls(graph, aten.softmax, aten._softmax):
            try:
                core = read_core(softmax)
                node = write_core(graph, core)
            except NotAttention as refusal:
                outcome.refuse(softmax, refusal.reason, steps_between(softmax, refusal.node))
                continue
            core.out.replace_all_uses_with(node)
            graph.eliminate_dead_code()
            outcome.matches.append(f"{softmax.name}: {node.target}".replace("dsv3.", "").replace(".default", ""))
        return outcome


class NotAttention(Refused):
    """Why a softmax is not the middle of an attention core, and the node that told."""


@dataclass(frozen=True)
class Core:
    """One attention core: out = softmax(mask(scale · scores)) · values."""

    out: fx.Node  # the product of shares and values
    out_value: Value
    scores: fx.Node
    scores_value: Value
    positions: fx.Node
    scale: float


def read_core(softmax: fx.Node) -> Core:
    rank = len(shape_of(softmax))
    if softmax.args[1] % rank != rank - 1 or rank != 4:
        raise NotAttention(softmax, "not a softmax over the last of four dims")
    shares = only_path(softmax, aten._to_copy, aten.to)
    users = list(shares.users)
    if len(users) != 1 or not is_call(users[0], *CONTRACTIONS):
        readers = ", ".join(user.name for user in users) or "nothing"
        raise NotAttention(shares, f"the shares are used by {readers}, not by one product")
    masked = strip_casts(softmax.args[0])
    scores, keep = read_mask(masked)
    positions = read_positions(keep)
    scores, scale = read_scale(strip_casts(scores))
    for node in (masked, scores):
        if len(node.users) != 1:
            raise NotAttention(node, f"{node.name} is used outside the attention as well")
    return Core(users[0], lift_shallow(users[0]), scores, lift_shallow(scores), positions, scale)


def only_path(node: fx.Node, *through: object) -> fx.Node:
    """Follow single users through the given ops."""
    while len(node.users) == 1 and is_call(next(iter(node.users)), *through):
        node = next(iter(node.users))
    return node


def strip_casts(node: fx.Node) -> fx.Node:
    while is_call(node, aten._to_copy, aten.to):
        node = node.args[0]
    return node


def read_mask(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(scores, mask of what is kept)."""
    if is_call(node, aten.masked_fill) and node.args[2] == -inf:
        return node.args[0], negated(node.args[1])
    if is_call(node, aten.where):
        keep, yes, no = node.args
        if is_minus_infinity(no):
            return yes, keep
        if is_minus_infinity(yes):
            return no, negated(keep)
    raise NotAttention(node, f"{node.name} before the softmax is not a mask with −∞")


def is_minus_infinity(node: object) -> bool:
    if node == -inf:
        return True
    if not isinstance(node, fx.Node):
        return False
    return is_call(node, aten.full, aten.scalar_tensor, aten.full_like) and -inf in node.args


def negated(node: fx.Node) -> fx.Node:
    """The mask whose negation this is."""
    path = []
    while is_call(node, aten.unsqueeze, aten.expand):
        path.append(node)
        node = node.args[0]
    if is_call(node, aten.bitwise_not, aten.logical_not):
        return node.args[0]
    raise NotAttention(node, "the mask is not a negated comparison of positions")


def read_positions(keep: fx.Node) -> fx.Node:
    """The query positions, from a mask arange(T) ≤ positions[:, :, None]."""
    while is_call(keep, aten.unsqueeze, aten.expand):
        keep = keep.args[0]
    if is_call(keep, aten.le):
        cached, query = keep.args
    elif is_call(keep, aten.ge):
        query, cached = keep.args
    else:
        raise NotAttention(keep, f"the mask {keep.name} is not a comparison of positions")
    while is_call(query, aten.unsqueeze, aten.expand):
        query = query.args[0]
    while is_call(cached, aten.unsqueeze, aten.expand):
        cached = cached.args[0]
    if not is_call(cached, aten.arange) or not isinstance(query, fx.Node) or len(shape_of(query)) != 2:
        raise NotAttention(keep, f"the mask {keep.name} does not compare arange with positions [B, S]")
    return query


def read_scale(node: fx.Node) -> tuple[fx.Node, float]:
    scale = 1.0
    while True:
        node = strip_casts(node)
        if is_call(node, aten.mul) and isinstance(node.args[1], (int, float)):
            scale *= node.args[1]
        elif is_call(node, aten.div) and isinstance(node.args[1], (int, float)):
            scale /= node.args[1]
        else:
            return node, scale
        if len(node.users) != 1:
            raise NotAttention(node, f"{node.name} is used outside the attention as well")
        node = node.args[0]


def lift_shallow(node: fx.Node) -> Value:
    """Only the node's own product (or its sum of products): what is computed before stays an operand."""
    value = lift(node)
    try:
        terms = value.terms
    except NotLinear as problem:
        raise NotAttention(node, f"{node.name}: {problem}") from problem
    return Value(value.dims, (type(value.pieces[0])(tuple(shallow(t) for t in terms)),), None, value.through)


def shallow(term: Term) -> Term:
    """Let the largest cuts stand for the operands that they cover."""
    proper = [(covered, o) for covered, o in term.cuts if len(covered) < len(term.operands)]
    cuts = [(covered, o) for covered, o in proper if not any(covered < other for other, _ in proper)]
    hidden = frozenset().union(*(covered for covered, _ in cuts)) if cuts else frozenset()
    plain = [(min([i]), o) for i, o in enumerate(term.operands) if i not in hidden]
    order = sorted([*plain, *((min(covered), o) for covered, o in cuts)], key=lambda pair: pair[0])
    return Term(tuple(o for _, o in order), (), term.scale)


def write_core(graph: fx.Graph, core: Core) -> fx.Node:
    """Insert the op that fits, in place of the core's last product."""
    out_terms, score_terms = core.out_value.terms, core.scores_value.terms
    if len(out_terms) != 1 or any(len(t.operands) != 2 or t.scale != 1.0 for t in (*out_terms, *score_terms)):
        raise NotAttention(core.scores, "the products around the softmax are not plain products of two operands")
    b, h, s, t = axes_of_scores(core)
    values = next(o for o in out_terms[0].operands if not is_probability(o.node))
    with graph.inserting_before(core.out):
        writer = Writer(graph, core.out)
        sides = [query_and_key(term, b, h, s, t) for term in score_terms]
        if len(sides) == 2 and not any(has_head(key, h) for _, key in sides) and len(values.axes) == 3:
            node = latent_core(writer, core, sides, values, (b, h, s, t))
        elif len(sides) == 1 or any(has_head(key, h) for _, key in sides):
            node = expanded_core(writer, core, sides, values, (b, h, s, t))
        else:
            raise NotAttention(core.scores, "neither one product of queries and keys nor a latent and a rotary one")
        return arrange_output(writer, node, core)


def axes_of_scores(core: Core) -> tuple[Axis, Axis, Axis, Axis]:
    dims = core.scores_value.dims
    if any(len(group) != 1 for group in dims):
        raise NotAttention(core.scores, "the scores have merged or broadcast dims")
    b, h, s, t = (group[0] for group in dims)
    return b, h, s, t


def query_and_key(term: Term, b: Axis, h: Axis, s: Axis, t: Axis) -> tuple[Operand, Operand]:
    query = [o for o in term.operands if s in o.axes and t not in o.axes]
    key = [o for o in term.operands if t in o.axes and s not in o.axes]
    if len(query) != 1 or len(key) != 1 or b not in query[0].axes or b not in key[0].axes or h not in query[0].axes:
        raise NotAttention(term.operands[0].node, "the scores are not products of a query [B, S, H] and a key [B, T]")
    return query[0], key[0]


def has_head(key: Operand, h: Axis) -> bool:
    return h in key.axes


def in_order(writer: Writer, operand: Operand, axes: tuple[Axis, ...]) -> fx.Node:
    return writer.arrange(writer.operand(operand), [(axis,) for axis in axes])


def rest(operand: Operand, *known: Axis) -> Axis:
    left = [axis for axis in operand.axes if axis not in known]
    if len(left) != 1:
        raise NotAttention(operand.node, f"{operand.node.name} has {len(left)} widths instead of one")
    return left[0]


def latent_core(
    writer: Writer, core: Core, sides: list[tuple[Operand, Operand]], values: Operand, axes: tuple[Axis, ...]
) -> fx.Node:
    b, h, s, t = axes
    latent_first = sorted(sides, key=lambda side: side[1].node is not values.node or side[1].steps != values.steps)
    (query, latent), (q_rope, rope_key) = latent_first
    if latent.node is not values.node or latent.steps != values.steps:
        raise NotAttention(values.node, f"the values {values.node.name} are not the latent that the scores read")
    query_node = in_order(writer, query, (b, s, h, rest(query, b, s, h)))
    rope_node = in_order(writer, q_rope, (b, s, h, rest(q_rope, b, s, h)))
    latent_node = in_order(writer, latent, (b, t, rest(latent, b, t)))
    key_node = in_order(writer, rope_key, (b, t, rest(rope_key, b, t)))
    return call(
        writer.graph, torch.ops.dsv3.mla_attention.default,
        query_node, rope_node, latent_node, key_node, core.positions, core.scale, like=core.out,
    )  # fmt: skip


def expanded_core(
    writer: Writer, core: Core, sides: list[tuple[Operand, Operand]], values: Operand, axes: tuple[Axis, ...]
) -> fx.Node:
    b, h, s, t = axes
    queries, keys = [], []
    for query, key in sides:
        width = rest(query, b, s, h)
        queries.append(in_order(writer, query, (b, s, h, width)))
        group = [a for a in key.axes if a not in (b, t, width)]
        keys.append(writer.arrange(writer.operand(key), [(b,), (t,), tuple(group) or (h,), (width,)]))
    shares = next(o for o in core.out_value.terms[0].operands if is_probability(o.node))
    batch, heads, _, cached = shares.axes
    width = rest(values, batch, heads, cached)
    if heads not in values.axes:
        raise NotAttention(values.node, f"the values {values.node.name} have no head axis")
    value_node = in_order(writer, values, (batch, cached, heads, width))
    query_node, key_node = (
        nodes[0] if len(nodes) == 1 else call(writer.graph, torch.ops.aten.cat.default, nodes, -1, like=core.out)
        for nodes in (queries, keys)
    )
    return call(
        writer.graph, torch.ops.dsv3.attention.default,
        query_node, key_node, value_node, core.positions, core.scale, like=core.out,
    )  # fmt: skip


def arrange_output(writer: Writer, node: fx.Node, core: Core) -> fx.Node:
    """[B, S, H, width] in the layout that the old product had."""
    shares = next(o for o in core.out_value.terms[0].operands if is_probability(o.node))
    values = next(o for o in core.out_value.terms[0].operands if not is_probability(o.node))
    batch, heads, queries, cached = shares.axes
    width = next(a for a in values.axes if a not in shares.axes)
    order = (batch, queries, heads, width)
    flat: Iterator[Axis] = (axis for group in core.out_value.dims for axis in group)
    if set(flat) != set(order):
        raise NotAttention(core.out, "the result of the core has other axes than B, S, H and a width")
    return writer.arrange(Product(node, order), core.out_value.dims)
