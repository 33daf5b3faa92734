"""Masked softmax between two products → one attention op, expanded or absorbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from codegen.targets import Target
from codegen.tuning import own_form
from passes.base import Context, Outcome, Pass, call, calls, is_call, shape_of
from passes.contraction import CONTRACTIONS, Axis, NotLinear, Operand, Term, Value
from passes.fuse_rotary import last_axis_of_result
from passes.lifting import is_product, is_product_throughout, lift
from passes.masks import SCORES, NotAttention, Visible, read_mask, unfold
from passes.nodes import (
    CASTS,
    RESHAPES,
    SOFTMAX,
    dtype_of,
    is_division,
    is_probability,
    is_rounding,
    steps_between,
    vocabulary_op,
    weights_only,
)
from passes.products import REARRANGEMENTS
from passes.score_axes import Axes, dims_of, identity, is_batch_alone, is_one, unfolded
from passes.writing import Product, Writer

aten = torch.ops.aten

# Of a factor between mask and softmax: with less, what the lowest number of float16 hides would keep a share.
LEAST_BEHIND = 2**-10


@dataclass(frozen=True)
class FuseAttention(Pass):
    """P   = softmax(where(t ≤ position, scale · (q̃ · latentᵀ + qR · rope_keyᵀ), −∞))
       out = P · latent                        →   mla_attention(q̃, qR, latent, rope_key, positions, scale)
       out = P · v   with one product q · kᵀ   →   attention(q, k, v, positions, scale)

    The mask must be "cached position ≤ query position", or none; scores and shares must have no other users. Heads may
    be folded into the batch, and one query per request left out, so that the softmax has three dims. Cores whose keys
    and values are multiplied out for every head are, unless `expanded`, for the target's own kernel alone, and only
    where torch's attention was not called, or keys would have to be put together for it from parts.
    """

    expanded: bool = True

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        for softmax in calls(graph, *SOFTMAX):
            try:
                core = read_core(softmax)
                node = write_core(graph, core, self.expanded, context.target)
            except NotAttention as refusal:
                reached = 0 if refusal.node is None else steps_between(softmax, refusal.node)
                outcome.refuse(softmax, str(refusal), reached)
                continue
            core.out.replace_all_uses_with(node)
            graph.eliminate_dead_code()
            outcome.matches.append(f"{softmax.name}: {op_behind(node)}")
        return outcome


def op_behind(node: fx.Node) -> str:
    """The name of the attention op behind rearrangements of its result."""
    while (op := vocabulary_op(node)) is None:
        node = node.args[0]
    return op


@dataclass(frozen=True)
class Core:
    """One attention core: out = softmax(mask(scale · scores)) · values."""

    out: fx.Node  # the product of shares and values
    out_value: Value
    scores: fx.Node
    scores_value: Value
    visible: Visible
    scale: float  # of the first product; others are scaled through their queries
    by_torch: bool  # torch's own attention, opened


def read_core(softmax: fx.Node) -> Core:
    rank = len(shape_of(softmax))
    if softmax.args[1] % rank != rank - 1 or rank not in SCORES:
        raise NotAttention("not a softmax over the last of three or four dims")
    shares = only_path(softmax, *CASTS, *REARRANGEMENTS)
    users = list(shares.users)
    if len(users) != 1 or not is_call(users[0], *CONTRACTIONS):
        raise NotAttention(
            f"the shares are used by {', '.join(u.name for u in users) or 'nothing'}, not by one product"
        )
    masked, behind = read_scale(strip_folding(strip_casts(softmax.args[0])))
    scores, visible = read_mask(masked)
    scores, scale = read_scale(strip_casts(scores))
    if rank == 3 and not is_product(lift(scores)):  # of three dims are most softmaxes that choose among anything
        raise NotAttention(f"{scores.name} before the softmax is no product")
    if visible != Visible() and not behind >= LEAST_BEHIND:
        raise NotAttention(f"what {masked.name} hides is multiplied by {behind:g} before the softmax", masked)
    scale *= behind
    for node in (masked, scores):
        if len(node.users) != 1:
            raise NotAttention(f"{node.name} is used outside the attention as well", node)
    value = lift_shallow(scores)
    by_torch = is_call(softmax, aten._safe_softmax)
    return Core(users[0], lift_shallow(users[0]), scores, value, visible, scale * value.terms[0].scale, by_torch)


def only_path(node: fx.Node, *through: object) -> fx.Node:
    """Follow single users through the given ops, as long as they give floats."""
    while len(node.users) == 1 and is_call(user := next(iter(node.users)), *through):
        if not dtype_of(user).is_floating_point:
            break
        node = user
    return node


def strip_casts(node: fx.Node) -> fx.Node:
    while is_rounding(node):
        node = node.args[0]
    return node


def strip_folding(node: fx.Node) -> fx.Node:
    """Scores [B, H, S, T] where they are folded to [B·H, S, T] for the softmax alone."""
    found = unfold(node) if is_call(node, *RESHAPES) else None
    if found is None:
        return node
    if len(node.users) != 1:
        raise NotAttention(f"{node.name} is used outside the attention as well", node)
    return found[0]


def read_scale(node: fx.Node) -> tuple[fx.Node, float]:
    scale = 1.0
    while True:
        node = strip_casts(node)
        if is_call(node, aten.mul) and isinstance(node.args[1], (int, float)):
            scale *= node.args[1]
        elif is_division(node) and isinstance(node.args[1], (int, float)):
            scale /= node.args[1]
        else:
            return node, scale
        if len(node.users) != 1:
            raise NotAttention(f"{node.name} is used outside the attention as well", node)
        node = node.args[0]


def lift_shallow(node: fx.Node) -> Value:
    """Only the node's own product (or its sum of products): what is computed before stays an operand."""
    value = lift(node)
    try:
        terms = value.terms
    except NotLinear as problem:
        raise NotAttention(f"{node.name}: {problem}") from problem
    return Value(value.dims, (type(value.pieces[0])(tuple(shallow(t) for t in terms)),), None, value.through)


def shallow(term: Term) -> Term:
    """Let the largest cuts stand for the operands that they cover."""
    proper = [(covered, o) for covered, o in term.cuts if len(covered) < len(term.operands)]
    cuts = [(covered, o) for covered, o in proper if not any(covered < other for other, _ in proper)]
    hidden = frozenset().union(*(covered for covered, _ in cuts)) if cuts else frozenset()
    plain = [(min([i]), o) for i, o in enumerate(term.operands) if i not in hidden]
    order = sorted([*plain, *((min(covered), o) for covered, o in cuts)], key=lambda pair: pair[0])
    return Term(tuple(o for _, o in order), (), term.scale)


def write_core(graph: fx.Graph, core: Core, expanded: bool, target: Target) -> fx.Node:
    """Insert the op that fits, in place of the core's last product."""
    out_terms, score_terms = core.out_value.terms, core.scores_value.terms
    plain = all(len(t.operands) == 2 for t in (*out_terms, *score_terms))
    if len(out_terms) != 1 or not plain or out_terms[0].scale != 1.0:
        raise NotAttention("the products around the softmax are not plain products of two operands", core.scores)
    shares, values = sorted(out_terms[0].operands, key=lambda operand: not is_probability(operand.node))
    core, axes, out_axes = read_axes(core, shares)
    if is_probability(values.node) or out_axes.s in values.axes and out_axes.s.size != 1:
        raise NotAttention(f"the values {values.node.name} differ from query to query", values.node)
    sides = [query_and_key(term, axes) for term in score_terms]
    read = [core.out, values.node, *(operand.node for query, key, _ in sides for operand in (query, key))]
    if len(dtypes := {str(dtype_of(node)).removeprefix("torch.") for node in read}) > 1:
        raise NotAttention(
            f"queries, keys, values and result are of different dtypes: {', '.join(sorted(dtypes))}", core.out
        )
    if not expanded and is_product_throughout(lift(values.node)):
        reason = why_left_to_torch(core, sides, values, axes, out_axes, target)
        if reason is not None:
            multiplied = f"the values {values.node.name} are multiplied out for every cached position"
            raise NotAttention(f"{multiplied}, and {reason}", values.node)
    with graph.inserting_before(core.out):
        writer = Writer(graph, core.out)
        latent = next((key for _, key, _ in sides if identity(key) == identity(values)), None)
        if latent is not None and len(sides) > 1 and not axes.heads(*(key for _, key, _ in sides)):
            node = latent_core(writer, core, sides, latent, axes)
        else:
            node = grouped_core(writer, core, sides, values, axes, out_axes)
        return arrange_output(writer, node, core, values, out_axes)


def read_axes(core: Core, shares: Operand) -> tuple[Core, Axes, Axes]:
    """The core with its mask as of scores [B, H, S, T], and the axes of its scores and of its shares."""
    groups: Sequence[Sequence[Axis]] = core.scores_value.dims
    share_groups: Sequence[Sequence[Axis]] = dims_of(shares)
    visible = core.visible
    if 3 in (len(groups), len(share_groups)):
        batched = is_batch_alone(core.scores_value)
        groups, share_groups = unfolded(groups, batched), unfolded(share_groups, batched)
        visible = visible.unfolded(batched)
    queries = visible.queries or (1 if is_one(groups[1]) and not is_one(groups[2]) else 2)
    axes = Axes.of(groups, queries)
    if not visible.fits(axes.b.size):
        raise NotAttention("the mask has rows for another batch", core.scores)
    return replace(core, visible=visible), axes, Axes.of(share_groups, queries)


def why_left_to_torch(
    core: Core, sides: Sequence[Side], values: Operand, axes: Axes, out_axes: Axes, target: Target
) -> str | None:
    """Why torch's attention is to be used for keys and values of every head, or None."""
    own = own_form("attention", target)
    if own is None:
        return f"{target.name} has no kernel of its own for attention"
    keys = [key for _, key, _ in sides]
    if core.by_torch and len(keys) == 1 and not is_put_together(keys[0].node):
        return f"the keys {keys[0].node.name} lie together as torch's attention takes them"
    key_widths, width = [axes.width(key).size for key in keys], out_axes.width(values).size
    if not all(isinstance(one, int) for one in (*key_widths, width)):
        return "the width of a head is free"
    widths = sum(key_widths), sum(key_widths), width
    q, k, v = (torch.empty((1, 1, 1, one), dtype=dtype_of(values.node), device="meta") for one in widths)
    return own.serves(q, k, v, torch.empty((1, 1), dtype=torch.int64, device="meta"), core.scale)


def is_put_together(keys: fx.Node) -> bool:
    """Are these parts of every head side by side?"""
    while is_call(keys, *REARRANGEMENTS):
        keys = keys.args[0]
    return is_call(keys, aten.cat) and last_axis_of_result(keys)


def query_nodes(writer: Writer, core: Core, sides: Sequence[Side], axes: Axes) -> list[fx.Node]:
    """Queries [B, S, H, A] of all products, scaled so that `core.scale` fits them all."""
    nodes = []
    for query, _, factor in sides:
        node = in_order(writer, query, (axes.b,), (axes.s,), axes.h, (axes.width(query),))
        own = factor / core.scores_value.terms[0].scale
        nodes.append(node if own == 1.0 else writer.scale(node, own))
    return nodes


Side = tuple[Operand, Operand, float]
"""Query, key and factor of one of the products that the scores add up."""


def query_and_key(term: Term, axes: Axes) -> Side:
    query = [o for o in term.operands if axes.t not in o.axes]
    key = [o for o in term.operands if axes.t in o.axes]
    for operand in key:
        if weights_only(operand.node):
            raise NotAttention(f"the keys {operand.node.name} are weights, no positions", operand.node)
    wanted = {axis for axis in (axes.s, *axes.h) if axis.size != 1}
    if len(query) != 1 or len(key) != 1 or not wanted <= set(query[0].axes) or axes.s in wanted & set(key[0].axes):
        raise NotAttention("the scores are not products of a query [B, S, H] and a key [B, T]", term.operands[0].node)
    if axes.b.size != 1 and not all(axes.b in o.axes for o in (query[0], key[0])):
        raise NotAttention("the scores are not products of a query [B, S, H] and a key [B, T]", term.operands[0].node)
    return query[0], key[0], term.scale


def in_order(writer: Writer, operand: Operand, *dims: tuple[Axis, ...]) -> fx.Node:
    """The operand with these dims; axes of size one that it lacks are put in."""
    wanted = [() if is_one(group) and not set(group) & set(operand.axes) else group for group in dims]
    return writer.arrange(writer.operand(operand), wanted)


def latent_core(writer: Writer, core: Core, sides: list[Side], latent: Operand, axes: Axes) -> fx.Node:
    """The keys that are not the latent stand beside each other as one rope key."""
    b, t = (axes.b,), (axes.t,)
    latent_first = sorted(sides, key=lambda side: side[1] is not latent)
    queries = query_nodes(writer, core, latent_first, axes)
    keys = [in_order(writer, key, b, t, (axes.width(key),)) for _, key, _ in latent_first]
    positions = core.visible.write(writer.graph, queries[0], keys[0])
    return call(
        writer.graph, torch.ops.dsv3.mla_attention.default, queries[0], beside(writer, queries[1:]),
        keys[0], beside(writer, keys[1:]), positions, core.scale, like=core.out,
    )  # fmt: skip


def beside(writer: Writer, nodes: list[fx.Node]) -> fx.Node:
    if len(nodes) == 1:
        return nodes[0]
    return call(writer.graph, aten.cat.default, nodes, -1, like=writer.root)


def grouped_core(writer: Writer, core: Core, sides: list[Side], values: Operand, axes: Axes, out_axes: Axes) -> fx.Node:
    """Keys and values of as many heads as they have; a head that all queries' heads share is one."""
    b, t = (axes.b,), (axes.t,)
    groups = max(len(axes.heads(*(key for _, key, _ in sides))), len(out_axes.heads(values)))
    if [a.size for a in axes.h] != [a.size for a in out_axes.h] and groups not in (0, len(axes.h)):
        raise NotAttention("the heads of keys and values are grouped differently", core.out)
    group, out_group = (axes.h[:groups], out_axes.h[:groups]) if groups < len(axes.h) else (axes.h, out_axes.h)
    queries = query_nodes(writer, core, sides, axes)
    keys = [in_order(writer, key, b, t, group, (axes.width(key),)) for _, key, _ in sides]
    value_node = in_order(writer, values, (out_axes.b,), (out_axes.t,), out_group, (out_axes.width(values),))
    query_node, key_node = beside(writer, queries), beside(writer, keys)
    positions = core.visible.write(writer.graph, query_node, key_node)
    return call(
        writer.graph, torch.ops.dsv3.attention.default,
        query_node, key_node, value_node, positions, core.scale, like=core.out,
    )  # fmt: skip


def arrange_output(writer: Writer, node: fx.Node, core: Core, values: Operand, axes: Axes) -> fx.Node:
    """[B, S, H, width] in the layout that the old product had."""
    order = ((axes.b,), (axes.s,), axes.h, (axes.width(values),))
    flat = [axis for group in core.out_value.dims for axis in group if axis.size != 1]
    if set(flat) != {axis for group in order for axis in group if axis.size != 1}:
        raise NotAttention("the result of the core has other axes than B, S, H and a width", core.out)
    if len(axes.h) != 1:
        sizes = [axis.size for axis in axes.h]
        node = call(writer.graph, aten.unflatten.int, node, 2, sizes, like=core.out)
    return writer.arrange(Product(node, tuple(axis for group in order for axis in group)), core.out_value.dims)
