"""Which indices differ from each other."""

from __future__ import annotations

import operator

import torch
from torch import fx

from passes.base import is_call, same_size, shape_of
from passes.nodes import CASTS, settled
from passes.products import sources_of_dims

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


def distinct(indices: fx.Node, axis: int) -> bool:
    """Are no two of the indices along `axis` equal? So it is with what a top-k or a sort along it chose, with a part of
    that, and with one index."""
    indices = settled(indices)
    if same_size(shape_of(indices)[axis], 1):
        return True
    if is_call(indices, operator.getitem):
        split, number = indices.args
        if is_call(split, aten.topk):
            dim = split.args[2] if len(split.args) > 2 else -1
            return number == 1 and dim % len(shape_of(indices)) == axis
        if is_call(split, aten.sort):
            return number == 1 and _sorted_axis(split, len(shape_of(indices))) == axis
        return is_call(split, dsv3.route) and number == 0 and axis == 1
    if is_call(indices, aten.argsort):
        return _sorted_axis(indices, len(shape_of(indices))) == axis
    if is_call(indices, *CASTS, aten.slice):
        return distinct(indices.args[0], axis)
    sources = sources_of_dims(indices)
    before = None if sources is None else sources[axis]
    return before is not None and distinct(indices.args[0], before)


def _sorted_axis(sort: fx.Node, rank: int) -> int:
    dim = sort.kwargs.get("dim", sort.args[1] if len(sort.args) > 1 else -1)
    assert isinstance(dim, int)
    return dim % rank
