"""What an op needs of its inputs to give some places of its result: the same places, where it keeps them apart."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.base import call, expression_of, is_call, is_mutable, same_size, shape_of
from passes.cuts import Cut, given_sizes, through_view
from passes.nodes import CASTS, COPIES, RESHAPES, SOFTMAX, is_pointwise, is_random, is_tensor
from passes.products import product_of, sources_of_dims

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

Arguments = tuple[Any, ...]

MATRIX_PRODUCTS = (aten.mm, aten.bmm, aten.matmul)
PRODUCTS = (
    aten.linear, *MATRIX_PRODUCTS, aten.addmm, aten.einsum, aten.scaled_dot_product_attention,
    dsv3.linear, dsv3.linear_pair, dsv3.head_linear, dsv3.norm_router, dsv3.routed_swiglu, dsv3.attention,
    dsv3.mla_attention,
)  # fmt: skip
"""What is worth doing of fewer places."""

# Inputs that have the result's leading dims, by place, and how many last dims the op mixes. Of more than one result,
# all have them.
ROW_BY_ROW: Mapping[Any, tuple[tuple[int, ...], int]] = {
    aten.linear: ((0,), 1),
    aten.rms_norm: ((0,), 1),
    aten.layer_norm: ((0,), 1),
    aten.glu: ((0,), 1),
    dsv3.linear: ((0, 3), 1),
    dsv3.linear_pair: ((0,), 1),
    dsv3.head_linear: ((0,), 2),
    dsv3.norm_router: ((0,), 1),
    dsv3.rms_norm: ((0,), 1),
    dsv3.add_rms_norm: ((0, 1), 1),
    dsv3.swiglu: ((0,), 1),
    dsv3.rotary: ((0, 1, 2), 2),
    dsv3.route: ((0,), 1),
    dsv3.routed_swiglu: ((0, 1, 2, 5), 1),
    dsv3.attention: ((0, 3, 5), 2),
    dsv3.mla_attention: ((0, 1, 4), 2),
}
BATCHED = {dsv3.attention, dsv3.mla_attention}  # their first dim is the caches' as well
REDUCTIONS = (aten.mean, aten.sum, aten.amax, aten.amin, aten.any, aten.all)
ALONG = (*SOFTMAX, aten.log_softmax, aten.cumsum, aten.topk, aten.sort)  # one dim, kept


@dataclass(frozen=True)
class Needs:
    """The cuts of an op's inputs (of others it needs everything), and the op on what is left of them."""

    cuts: Mapping[fx.Node, Cut]
    again: Callable[[fx.Graph, fx.Node, Arguments], fx.Node]


def needs(node: fx.Node, cut: Cut) -> Needs | None:
    """What a node needs of its inputs to give the places of `cut` alone, None where all of it is needed or unknown."""
    if node.op != "call_function" or is_random(node) or is_mutable(node):
        return None
    if any(is_tensor(value) for value in node.kwargs.values()):
        return None
    if node.target is operator.getitem:
        return _needs(node, {0: cut})
    result = _shape(node)
    for rule in (_pointwise, _row_by_row, _reduction, _product, _attention, _view):
        found = rule(node, cut, result)
        if found is not None:
            return found
    return None


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (list, tuple)) else value).shape)


def _needs(node: fx.Node, cuts: Mapping[int, Cut], again: Any = None) -> Needs | None:
    """Cuts of arguments by their place; None where the same input would be needed in two ways."""
    wanted: dict[fx.Node, Cut] = {}
    for place, one in cuts.items():
        if wanted.setdefault(node.args[place], one) != one:
            return None
    whole = [arg for place, arg in enumerate(node.args) if place not in cuts and isinstance(arg, fx.Node)]
    if not wanted or any(node in wanted for node in whole):
        return None
    return Needs(wanted, again or _same)


def _same(graph: fx.Graph, node: fx.Node, args: Arguments) -> fx.Node:
    return call(graph, node.target, *args, like=node, **node.kwargs)


def _broadcast(node: fx.Node, cut: Cut, result: Sequence[Any], places: Sequence[int]) -> dict[int, Cut]:
    """Cuts of arguments that are broadcast to the result's shape: those that have the dim."""
    found = {}
    for place in places:
        own = shape_of(node.args[place])
        dim = cut.dim - len(result) + len(own)
        if dim >= 0 and same_size(own[dim], result[cut.dim]):
            found[place] = cut.at(dim)
    return found


def _pointwise(node: fx.Node, cut: Cut, result: Sequence[Any]) -> Needs | None:
    if not is_pointwise(node) and not is_call(node, *CASTS, *COPIES):
        return None
    places = [place for place, arg in enumerate(node.args) if is_tensor(arg)]
    return _needs(node, _broadcast(node, cut, result, places))


def _row_by_row(node: fx.Node, cut: Cut, result: Sequence[Any]) -> Needs | None:
    places, mixed = ROW_BY_ROW.get(getattr(node.target, "overloadpacket", None), ((), 0))
    if is_call(node, aten.layer_norm, aten.rms_norm):
        mixed = len(node.args[1])
    if not places or cut.dim >= len(result) - mixed or (cut.dim == 0 and node.target.overloadpacket in BATCHED):
        return None
    given = [place for place in places if place < len(node.args) and is_tensor(node.args[place])]
    if any(not same_size(shape_of(node.args[place])[cut.dim], result[cut.dim]) for place in given):
        return None
    return _needs(node, dict.fromkeys(given, cut))


def _reduction(node: fx.Node, cut: Cut, result: Sequence[Any]) -> Needs | None:
    along, reduced = is_call(node, *ALONG), is_call(node, *REDUCTIONS)
    if not (along or reduced) or not is_tensor(node.args[0]):
        return None
    own = shape_of(node.args[0])
    place = 2 if is_call(node, aten.topk) else 1
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", -1 if along else None)
    if given is None or isinstance(given, bool):
        return None
    mixed = {dim % len(own) for dim in (given if isinstance(given, (list, tuple)) else (given,))}
    kept = [dim for dim in range(len(own)) if dim not in mixed]
    if len(result) == len(own):
        return _needs(node, {0: cut}) if cut.dim in kept else None
    return _needs(node, {0: cut.at(kept[cut.dim])}) if kept else None


def _product(node: fx.Node, cut: Cut, result: Sequence[Any]) -> Needs | None:
    """Rows of the left side and of what both sides have; columns would be a part of a weight."""
    if is_call(node, aten.addmm) and cut.dim == 0:
        return _needs(node, {**_broadcast(node, cut, result, [0]), 1: cut})
    product = product_of(node) if is_call(node, *MATRIX_PRODUCTS, aten.einsum) else None
    if product is None or (cut.dim == len(result) - 1 and is_call(node, *MATRIX_PRODUCTS)):
        return None
    letter = product.out[cut.dim]
    wanted: dict[fx.Node, Cut | None] = {}
    for x, own in product.operands:
        asked = cut.at(own.index(letter)) if letter in own else None
        if wanted.setdefault(x, asked) != asked:
            return None
    cuts = {x: one for x, one in wanted.items() if one is not None}
    return Needs(cuts, _same) if cuts and product.out.count(letter) == 1 else None


def _attention(node: fx.Node, cut: Cut, result: Sequence[Any]) -> Needs | None:
    """The queries of an attention. The last one of a causal attention sees all keys, if they are as many as queries."""
    if not is_call(node, aten.scaled_dot_product_attention) or cut.dim != len(result) - 2 or cut.sizes:
        return None
    args = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])
    if node.kwargs.keys() & {"attn_mask", "is_causal"}:
        return None
    queries, keys = shape_of(args[0])[-2], shape_of(args[1])[-2]
    if args[5] and not (same_size(queries, keys) and cut.is_last(expression_of(queries))):
        return None
    wanted = {0: cut.at(len(shape_of(args[0])) - 2)}
    if is_tensor(args[3]):
        wanted |= _broadcast(node, cut, result, [3])

    def again(graph: fx.Graph, node: fx.Node, given: Arguments) -> fx.Node:
        given = (*given[:5], False) if args[5] else given
        return call(graph, node.target, *given, like=node, **node.kwargs)

    return _needs(node, wanted, again)


def _view(node: fx.Node, cut: Cut, result: Sequence[Any]) -> Needs | None:
    if is_call(node, *RESHAPES):
        return _reshape(node, cut, result)
    if is_call(node, aten.cat) and not cut.sizes:
        parts, dim = node.args[0], (node.args[1] if len(node.args) > 1 else 0) % len(result)
        if dim == cut.dim or any(len(shape_of(part)) != len(result) for part in parts):
            return None
        return Needs(dict.fromkeys(parts, cut), _same)
    if not node.args or not is_tensor(node.args[0]):
        return None
    own = shape_of(node.args[0])
    if is_call(node, aten.expand):
        return _expand(node, cut, result)
    dim = _moved(node, cut.dim, own)
    return None if dim is None else _needs(node, {0: cut.at(dim)})


def _moved(node: fx.Node, dim: int, own: Sequence[Any]) -> int | None:
    """The dim of an input of shape `own` that is this dim of a rearrangement or a part of it; None where none is."""
    args, dims = node.args, len(own)
    sources = sources_of_dims(node)
    if sources is not None:
        return sources[dim]
    if is_call(node, aten.select):
        return dim + (dim >= args[1] % dims)
    if is_call(node, aten.unbind):
        return dim + (dim >= (args[1] if len(args) > 1 else 0) % dims)
    if is_call(node, aten.slice, aten.split_with_sizes, aten.split):
        place = 1 if is_call(node, aten.slice) else 2
        return None if dim == (args[place] if len(args) > place else 0) % dims else dim
    return None


def _expand(node: fx.Node, cut: Cut, result: Sequence[Any]) -> Needs | None:
    sizes = list(node.args[1])
    cuts = _broadcast(node, cut, result, [0])
    if not cuts or cut.sizes:
        return None
    sizes[cut.dim] = cut.length

    def again(graph: fx.Graph, node: fx.Node, args: Arguments) -> fx.Node:
        return call(graph, node.target, args[0], sizes, *args[2:], like=node, **node.kwargs)

    return _needs(node, cuts, again)


def _reshape(node: fx.Node, cut: Cut, result: Sequence[Any]) -> Needs | None:
    own = through_view(cut, shape_of(node.args[0]), result)
    if own is None or given_sizes(node.graph, own) is None:
        return None
    # A size that is not known is left to be found out, or is what the view was given for it.
    named = is_call(node, aten.view, aten.reshape, aten._unsafe_view)
    given = node.args[1] if named else [-1] * len(result)
    sizes = [size if isinstance(size, int) else asked for size, asked in zip(result, given, strict=True)]
    width = cut.width()
    sizes[cut.dim] = -1 if width is None else width
    if sum(isinstance(size, int) and size == -1 for size in sizes) > 1:
        return None

    def again(graph: fx.Graph, node: fx.Node, args: Arguments) -> fx.Node:
        return call(graph, aten.reshape.default, args[0], sizes, like=node)

    return Needs({node.args[0]: own}, again)
