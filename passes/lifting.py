"""Reading a graph backwards through everything linear.

`lift(node)` follows products, views, permutes, slices, concatenations, scaling and sums, and returns the node's value
as an exact formula over operands. Everything else (a norm, a softmax, a cache write) ends the reading and becomes an
operand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from passes.base import Role, equation_of, expression_of, is_call, same_size, shape_of
from passes.contraction import (
    CONTRACTIONS,
    Axis,
    NotLinear,
    Operand,
    Piece,
    Term,
    Value,
    contract,
    unify,
)
from passes.nodes import CASTS, COPIES, RESHAPES, is_division, is_probability
from passes.products import part_of, sources_of_dims
from passes.reshaping import broadcast, concatenated, repeated, reshaped, squeezed

aten = torch.ops.aten


def leaf(node: fx.Node) -> Value:
    axes = tuple(Axis(expression_of(s)) for s in shape_of(node))
    return Value(tuple((a,) for a in axes), (Piece((Term((Operand(node, (), axes),)),)),))


def lift(node: fx.Node, *, top: bool = True) -> Value:
    """The node's value as a sum of products; every call makes fresh axes."""
    reader = next((read for targets, read in READERS if is_call(node, *targets)), None)
    if reader is None:
        return leaf(node)
    try:
        value = reader(node)
    except NotLinear:
        return leaf(node)
    value = replace(value, through=value.through | {node})
    return value if top else _with_cut(node, value)


def is_product(value: Value) -> bool:
    return any(map(_has_product, value.pieces))


def is_product_throughout(value: Value) -> bool:
    """Every piece of it is: a cache behind which new rows are written has one that is not."""
    return all(map(_has_product, value.pieces))


def _has_product(piece: Piece) -> bool:
    return any(len(term.operands) > 1 for term in piece.terms)


def _with_cut(node: fx.Node, value: Value) -> Value:
    """Remember that the graph computes this product itself, where it is a product."""
    if not is_call(node, *CONTRACTIONS) or value.joined is not None or len(value.terms) != 1:
        return value
    (term,) = value.terms
    if term.scale != 1.0:  # the node includes the factor, the covered operands alone do not
        return value
    covered = frozenset(range(len(term.operands)))
    cut = Operand(node, *_flattened_view(value.dims))
    return replace(value, pieces=(Piece((replace(term, cuts=(*term.cuts, (covered, cut))),)),))


def _flattened_view(dims: Sequence[tuple[Axis, ...]]) -> tuple[tuple[tuple[Any, ...], ...], tuple[Axis, ...]]:
    """The splits that take a tensor with merged dims to one axis per dim, and those axes."""
    steps: list[tuple[Any, ...]] = []
    axes: list[Axis] = []
    for group in dims:
        if len(group) != 1:
            steps.append(("unflatten", len(axes), tuple(a.size for a in group)))
        axes.extend(group)
    return tuple(steps), tuple(axes)


def _read(node: Any) -> Value:
    if not isinstance(node, fx.Node):
        raise NotLinear("not a tensor")
    return lift(node, top=False)


def _read_einsum(node: fx.Node) -> Value:
    operands, (letters, out) = node.args[1], equation_of(node)
    if len(operands) != 2 or any(len(set(s)) != len(s) for s in letters):
        raise NotLinear("not a product of two tensors")
    lonely = [c for i, s in enumerate(letters) for c in s if c not in out and c not in letters[1 - i]]
    if lonely:
        raise NotLinear("an axis of one operand is summed away")
    return _read_product(operands[0], operands[1], letters[0], letters[1], out, name=True)


def _read_linear(node: fx.Node) -> Value:
    if len(node.args) > 2 and node.args[2] is not None:
        raise NotLinear("a bias is added")
    x, weight = node.args[:2]
    batch = "abcdefgh"[: len(shape_of(x)) - 1]
    own = "o"[: len(shape_of(weight)) - 1]  # a weight [D] has no outputs of its own
    return _read_product(x, weight, batch + "i", own + "i", batch + own)


def _read_matmul(node: fx.Node) -> Value:
    left, right = node.args[0], node.args[1]
    shape_l, shape_r = shape_of(left), shape_of(right)
    if len(shape_l) < 2 or len(shape_r) < 2:
        raise NotLinear("a vector product")
    rank = max(len(shape_l), len(shape_r)) - 2
    batch = "abcdefgh"[:rank]
    letters_l, letters_r = (
        batch[rank - (len(shape_l) - 2) :] + "ik",
        batch[rank - (len(shape_r) - 2) :] + "ko",
    )
    return _read_product(left, right, letters_l, letters_r, batch + "io")


def _read_product(
    left: fx.Node, right: fx.Node, letters_l: str, letters_r: str, out: str, *, name: bool = False
) -> Value:
    """A product of two nodes; dims of size one are broadcast against those of the other side.

    A concatenation along an axis that the product keeps, or sums against the shares of an attention, is taken as it
    stands: the rows of a cache are not multiplied part by part.
    """
    sides = []
    for node, other, letters in ((left, right, letters_l), (right, left, letters_r)):
        value = _read(node)
        whole = value.joined is not None and (is_probability(other) or _kept(value, letters, out))
        sides.append(leaf(node) if whole and not _of_weights(value) else value)
    a, b = sides
    for letter in dict.fromkeys(letters_l):
        if letter in letters_r:
            one_a, one_b = (
                all(axis.size == 1 for axis in v.dims[letters.index(letter)])
                for v, letters in ((a, letters_l), (b, letters_r))
            )
            if one_a and not one_b:
                a, letters_l = _without(a, letters_l, letter)
            elif one_b and (not one_a or () in (a.dims[letters_l.index(letter)], b.dims[letters_r.index(letter)])):
                b, letters_r = _without(b, letters_r, letter)
    return contract(a, b, letters_l, letters_r, out, name=name)


def _kept(value: Value, letters: str, out: str) -> bool:
    return any(value.joined in group and letter in out for group, letter in zip(value.dims, letters, strict=True))


def _of_weights(value: Value) -> bool:
    operands = (o.node for piece in value.pieces for term in piece.terms for o in term.operands)
    return all(node.op == "placeholder" and node.meta["role"] is Role.WEIGHT for node in operands)


def _is_plain(value: Value) -> bool:
    """Is the value one tensor, seen through views?"""
    terms = [term for piece in value.pieces for term in piece.terms]
    return len(terms) == 1 and len(terms[0].operands) == 1 and terms[0].scale == 1.0


def _without(value: Value, letters: str, letter: str) -> tuple[Value, str]:
    """The value without a dim of size one."""
    dim = letters.index(letter)
    value = squeezed(value, dim)
    return replace(value, dims=value.dims[:dim] + value.dims[dim + 1 :]), letters[:dim] + letters[dim + 1 :]


def _read_same(node: fx.Node) -> Value:
    source = node.args[0]
    if node.meta["val"].dtype != source.meta["val"].dtype:
        raise NotLinear("a cast")
    return _read(source)


def _read_view(node: fx.Node) -> Value:
    """Split and merge axes: walk over both shapes and cut the input's axes where the output's dims end."""
    value, wanted = _read(node.args[0]), [expression_of(s) for s in shape_of(node)]
    if value.through == frozenset() and _merges_features(node):
        raise NotLinear("a plain tensor whose features are merged is an operand as it stands")
    return reshaped(value, wanted)


def _merges_features(node: fx.Node) -> bool:
    """Does the view make one fixed last dim out of several?"""
    before, after = shape_of(node.args[0]), shape_of(node)
    return bool(after) and isinstance(after[-1], int) and isinstance(before[-1], int) and after[-1] > before[-1]


def _read_unsqueeze(node: fx.Node) -> Value:
    value = _read(node.args[0])
    dim = node.args[1] % (len(value.dims) + 1)
    return replace(value, dims=value.dims[:dim] + ((),) + value.dims[dim:])


def _read_squeeze(node: fx.Node) -> Value:
    value = _read(node.args[0])
    which = node.args[1] if isinstance(node.args[1], (list, tuple)) else (node.args[1],)
    gone = {d % len(value.dims) for d in which}
    if any(shape_of(node.args[0])[d] != 1 for d in gone):
        raise NotLinear("a squeeze of a dim that is not one")
    return replace(value, dims=tuple(g for d, g in enumerate(value.dims) if d not in gone))


def _read_permute(node: fx.Node) -> Value:
    value, order = _read(node.args[0]), sources_of_dims(node)
    assert order is not None
    return replace(value, dims=tuple(value.dims[d] for d in order if d is not None))


def _read_expand(node: fx.Node) -> Value:
    value = _read(node.args[0])
    wanted = [expression_of(s) for s in shape_of(node)]
    return broadcast(value, wanted)


def _read_repeat(node: fx.Node) -> Value:
    """Copies beside each other, block after block or element after element: one more axis that no operand has."""
    value = _read(node.args[0])
    if is_call(node, aten.repeat):
        counts = list(node.args[1])
        value = replace(value, dims=((),) * (len(counts) - len(value.dims)) + value.dims)
        return repeated(value, counts, blocks=True)
    if len(node.args) < 3 or node.args[2] is None:
        raise NotLinear("a repetition of the flattened tensor")
    counts = [1] * len(value.dims)
    counts[node.args[2]] = node.args[1]
    return repeated(value, counts, blocks=False)


def _read_part(node: fx.Node) -> Value:
    """A slice, or one piece of a split."""
    part = part_of(node)
    if part is None or part.step != 1:
        raise NotLinear("a strided slice, or one of a symbolic dim")
    value, stop = _read(part.source), part.start + part.length
    if is_call(node, operator.getitem):
        value = replace(value, through=value.through | {node.args[0]})
    if part.start == 0 and same_size(stop, shape_of(part.source)[part.axis]):
        return value
    if len(value.dims[part.axis]) != 1:
        raise NotLinear("a slice of merged dims")
    return value.narrow(value.dims[part.axis][0], part.start, stop)


def _read_cat(node: fx.Node) -> Value:
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))
    if any(len(shape_of(n)) != len(shape_of(node)) for n in node.args[0]):
        raise NotLinear("an empty part without dims")
    parts = [_read(n) for n in node.args[0]]
    if all(_is_plain(part) for part in parts) and not all(_of_weights(part) for part in parts):
        raise NotLinear("a concatenation of plain tensors is an operand as it stands")
    for k, part in enumerate(parts):
        if part.joined is not None or len(part.dims[dim]) != 1:  # merged there: take the tensor as it is
            parts[k] = leaf(node.args[0][k])
    if any(not isinstance(p.dims[dim][0].size, int) for p in parts):
        raise NotLinear("a concatenation along a symbolic axis")
    return concatenated(parts, dim)


def _read_scale(node: fx.Node) -> Value:
    left, right = node.args[0], node.args[1]
    if is_call(node, aten.div) and not is_division(node):
        raise NotLinear("a division that rounds")
    if isinstance(left, (int, float)) and not is_division(node):
        left, right = right, left
    if not isinstance(right, (int, float)):
        raise NotLinear("a product of two tensors element by element")
    factor = 1.0 / right if is_division(node) else float(right)
    value = _read(left)
    pieces = tuple(Piece(tuple(replace(t, scale=t.scale * factor) for t in p.terms), p.axis) for p in value.pieces)
    return replace(value, pieces=pieces)


def _without_axes(value: Value, dim: int) -> Value:
    if any(axis.size != 1 for axis in value.dims[dim]):
        raise NotLinear("a broadcast sum")
    return replace(squeezed(value, dim), dims=(*value.dims[:dim], (), *value.dims[dim + 1 :]))


def _read_add(node: fx.Node) -> Value:
    """A sum of two products over the same dims; a plain operand on either side ends the reading."""
    if node.kwargs or not all(isinstance(n, fx.Node) for n in node.args[:2]):
        raise NotLinear("a sum with a number")
    a, b = _read(node.args[0]), _read(node.args[1])
    if len(a.dims) != len(b.dims) or any(len(t.operands) < 2 for v in (a, b) for p in v.pieces for t in p.terms):
        raise NotLinear("a sum with something that is no product")
    for dim in range(len(a.dims)):
        if (a.dims[dim] == ()) != (b.dims[dim] == ()):
            a, b = (_without_axes(value, dim) for value in (a, b))
        a, b = unify(a, b, dim, dim)
    if a.dims != b.dims:
        raise NotLinear("a sum of different layouts")
    return Value(a.dims, (Piece(a.terms + b.terms),), None, a.through | b.through)


READERS: tuple[tuple[tuple[Any, ...], Callable[[fx.Node], Value]], ...] = (
    ((aten.einsum,), _read_einsum),
    ((aten.linear,), _read_linear),
    ((aten.mm, aten.bmm, aten.matmul), _read_matmul),
    (RESHAPES, _read_view),
    ((*COPIES, *CASTS), _read_same),
    ((aten.unsqueeze,), _read_unsqueeze),
    ((aten.squeeze,), _read_squeeze),
    ((aten.permute, aten.transpose, aten.t), _read_permute),
    ((aten.expand,), _read_expand),
    ((aten.repeat, aten.repeat_interleave), _read_repeat),
    ((aten.slice, operator.getitem), _read_part),
    ((aten.cat,), _read_cat),
    ((aten.mul, aten.div), _read_scale),
    ((aten.add,), _read_add),
)
