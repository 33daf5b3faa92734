"""ATen operators as ONNX nodes: what is left in a block's graph beside the op vocabulary."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from codegen.equations import explicit
from codegen.onnx.builder import Builder, ExportError, Value, expression, same
from codegen.onnx.translate import Translation, translation

aten = torch.ops.aten

# Pointwise


def _pointwise(kind: str) -> Translation:
    def apply(b: Builder, node: fx.Node, *operands: Any, alpha: float = 1) -> str:
        dtype = _common_dtype(node)
        first, *rest = [_operand(b, operand, dtype) for operand in operands]
        if alpha != 1:
            rest = [b.op("Mul", rest[0], b.scalar(alpha, dtype))]
        return b.op(kind, first, *rest)

    return apply


def _common_dtype(node: fx.Node) -> torch.dtype:
    """What torch computes a pointwise op in: the promotion of its operands."""
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
    dtypes = torch.result_type(values[0], values[1]) if len(values) > 1 else node.meta["val"].dtype
    return dtypes


def _operand(b: Builder, operand: Any, dtype: torch.dtype) -> str:
    if isinstance(operand, Value):
        return b.cast(operand, dtype)
    if isinstance(operand, torch.SymInt):
        name = b.size(operand)
        return name if dtype == torch.int64 else b.cast(name, dtype)
    return b.scalar(operand, dtype)


for _operator, _kind in (
    (aten.add, "Add"),
    (aten.sub, "Sub"),
    (aten.mul, "Mul"),
    (aten.div.Tensor, "Div"),
    (aten.div.Scalar, "Div"),
    (aten.maximum, "Max"),
    (aten.minimum, "Min"),
    (aten.le, "LessOrEqual"),
    (aten.lt, "Less"),
    (aten.ge, "GreaterOrEqual"),
    (aten.gt, "Greater"),
    (aten.eq, "Equal"),
    (aten.pow.Tensor_Scalar, "Pow"),
    (aten.neg, "Neg"),
    (aten.exp, "Exp"),
    (aten.sqrt, "Sqrt"),
    (aten.reciprocal, "Reciprocal"),
    (aten.sigmoid, "Sigmoid"),
    (aten.cos, "Cos"),
    (aten.sin, "Sin"),
    (aten.tanh, "Tanh"),
    (aten.relu, "Relu"),
    (aten.abs, "Abs"),
):
    translation(_operator)(_pointwise(_kind))


@translation(aten.rsub)
def rsub(b: Builder, node: fx.Node, x: Value, other: Any, alpha: float = 1) -> str:
    dtype = node.meta["val"].dtype
    scaled = b.cast(x, dtype) if alpha == 1 else b.op("Mul", b.cast(x, dtype), b.scalar(alpha, dtype))
    return b.op("Sub", _operand(b, other, dtype), scaled)


@translation(aten.rsqrt)
def rsqrt(b: Builder, node: fx.Node, x: Value) -> str:
    return b.op("Reciprocal", b.op("Sqrt", x))


@translation(aten.square)
def square(b: Builder, node: fx.Node, x: Value) -> str:
    return b.op("Mul", x, x)


@translation(aten.silu)
def silu(b: Builder, node: fx.Node, x: Value) -> str:
    return b.op("Mul", x, b.op("Sigmoid", x))


@translation(aten.clamp)
def clamp(b: Builder, node: fx.Node, x: Value, low: float | None = None, high: float | None = None) -> str:
    limits = [None if limit is None else b.scalar(limit, x.dtype) for limit in (low, high)]
    return b.op("Clip", x, *limits)


@translation(aten.where)
def where(b: Builder, node: fx.Node, condition: Value, yes: Any, no: Any) -> str:
    dtype = node.meta["val"].dtype
    return b.op("Where", condition, _operand(b, yes, dtype), _operand(b, no, dtype))


@translation(aten.masked_fill.Scalar)
def masked_fill(b: Builder, node: fx.Node, x: Value, mask: Value, number: float) -> str:
    return b.op("Where", mask, b.scalar(number, x.dtype), x)


def _logical(kind: str) -> Translation:
    def apply(b: Builder, node: fx.Node, *operands: Value) -> str:
        for x in operands:
            if x.dtype != torch.bool:
                raise ExportError(f"of {x.dtype}; accepted: torch.bool")
        return b.op(kind, *operands)

    return apply


translation(aten.logical_not, aten.bitwise_not)(_logical("Not"))
translation(aten.logical_and, aten.bitwise_and.Tensor, aten.__and__.Tensor)(_logical("And"))
translation(aten.logical_or, aten.bitwise_or.Tensor, aten.__or__.Tensor)(_logical("Or"))


@translation(aten._to_copy, aten.to.dtype)
def to_copy(b: Builder, node: fx.Node, x: Value, *_: Any, **__: Any) -> str:
    return b.cast(x, node.meta["val"].dtype)


@translation(aten.clone, aten.alias, aten.contiguous, aten.detach)
def unchanged(b: Builder, node: fx.Node, x: Value, **_: Any) -> str:
    return b.name_of(x)


# Reductions


def _reduction(kind: str) -> Translation:
    def apply(b: Builder, node: fx.Node, x: Value, axes: Any = None, keepdim: bool = False, **_: Any) -> str:
        listed = [axes] if isinstance(axes, int) else list(axes or range(len(x.shape)))
        return b.op(kind, b.cast(x, node.meta["val"].dtype), b.ints(*listed), keepdims=int(keepdim))

    return apply


for _operator, _kind in ((aten.sum, "ReduceSum"), (aten.mean, "ReduceMean"), (aten.amax, "ReduceMax")):
    translation(_operator)(_reduction(_kind))


@translation(aten.softmax.int, aten._softmax)
def softmax(b: Builder, node: fx.Node, x: Value, axis: int, *_: Any, **__: Any) -> str:
    return b.op("Softmax", b.cast(x, node.meta["val"].dtype), axis=axis)


@translation(aten.topk)
def topk(
    b: Builder, node: fx.Node, x: Value, k: int, axis: int = -1, largest: bool = True, ordered: bool = True
) -> tuple[str, ...]:
    return b.ops("TopK", 2, x, b.ints(k), axis=axis, largest=int(largest), sorted=int(ordered))


# Products


@translation(aten.linear)
def linear(b: Builder, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> str:
    matrix = len(weight.shape) > 1
    product = b.op("MatMul", x, (weight.transposed or b.swapped(weight, 2)) if matrix else weight)
    return product if bias is None else b.op("Add", product, bias)


@translation(aten.mm, aten.bmm, aten.matmul)
def matmul(b: Builder, node: fx.Node, left: Value, right: Value) -> str:
    return b.op("MatMul", left, right)


@translation(aten.einsum)
def einsum(b: Builder, node: fx.Node, equation: str, operands: list[Value]) -> str:
    """Two operands become one batched MatMul whose constant operand can be laid out ahead of time."""
    letters, out = explicit(equation, [len(x.shape) for x in operands])
    if len(operands) != 2 or any(len(set(term)) < len(term) for term in letters):
        return b.op("Einsum", *operands, equation=equation)
    left, right = letters
    shared = [a for a in out if a in left and a in right]
    summed = [a for a in left if a in right and a not in out]
    rows = [a for a in out if a in left and a not in right]
    columns = [a for a in out if a in right and a not in left]
    if len(shared) + len(summed) + len(rows) < len(left) or len(shared) + len(summed) + len(columns) < len(right):
        return b.op("Einsum", *operands, equation=equation)  # an axis of one operand alone is summed
    sizes = dict(zip(left, operands[0].shape, strict=True))
    for letter, size in zip(right, operands[1].shape, strict=True):
        if not same(sizes.setdefault(letter, size), size):
            return b.op("Einsum", *operands, equation=equation)  # broadcast along an axis of size one
    first = _grouped(b, operands[0], left, sizes, (shared, rows, summed))
    second = _grouped(b, operands[1], right, sizes, (shared, summed, columns))
    order = [*shared, *rows, *columns]
    product = Value(b.op("MatMul", first, second), (*(sizes[a] for a in shared), None, None), node.meta["val"].dtype)
    apart = _ungrouped(b, product, [sizes[a] for a in order], len(rows) == 1 == len(columns))
    perm = [order.index(a) for a in out]
    return apart if perm == sorted(perm) else b.op("Transpose", apart, perm=perm)


def _grouped(b: Builder, x: Value, term: str, sizes: dict[str, Any], groups: tuple[list[str], ...]) -> str:
    """Axes in the order of the groups; of the last two groups, each becomes one axis."""
    shared, inner, outer = groups
    perm = [term.index(a) for a in (*shared, *inner, *outer)]
    name = b.name_of(x) if perm == sorted(perm) else b.op("Transpose", x, perm=perm)
    if len(inner) == 1 == len(outer):
        return name
    merged = [math.prod(expression(sizes[a]) for a in group) for group in (inner, outer)]
    now = Value(name, tuple(x.shape[i] for i in perm), x.dtype)
    return b.reshape(now, [*(sizes[a] for a in shared), *merged])


def _ungrouped(b: Builder, x: Value, sizes: list[Any], whole: bool) -> str:
    return b.name_of(x) if whole else b.reshape(Value(x.name, x.shape[:-2], x.dtype), sizes)


# Layout


@translation(aten.view, aten.reshape, aten._unsafe_view, aten.unflatten, aten.flatten)
def reshape(b: Builder, node: fx.Node, x: Value, *_: Any) -> str:
    return b.reshape(x, node.meta["val"].shape)


@translation(aten.unsqueeze)
def unsqueeze(b: Builder, node: fx.Node, x: Value, axis: int) -> str:
    return b.op("Unsqueeze", x, b.ints(axis))


@translation(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(b: Builder, node: fx.Node, x: Value, axes: Any) -> str:
    listed = [axes] if isinstance(axes, int) else list(axes)
    return b.op("Squeeze", x, b.ints(*[a for a in listed if same(x.shape[a], 1)]))


@translation(aten.transpose.int, aten.t, aten.permute)
def permute(b: Builder, node: fx.Node, x: Value, *axes: Any) -> str:
    rank = len(x.shape)
    perm = list(range(rank))
    if node.target is aten.permute.default:
        perm = [axis % rank for axis in axes[0]]
    else:
        one, two = axes or (0, 1)
        perm[one], perm[two] = perm[two], perm[one]
    return b.op("Transpose", x, perm=perm)


@translation(aten.expand)
def expand(b: Builder, node: fx.Node, x: Value, sizes: Any, **_: Any) -> str:
    # 1 leaves an axis as it is, so that only axes that grow are named.
    grown = node.meta["val"].shape
    offset = len(grown) - len(x.shape)
    wanted = [1 if i >= offset and same(x.shape[i - offset], size) else size for i, size in enumerate(grown)]
    return b.op("Expand", x, b.shape(wanted))


@translation(aten.cat)
def cat(b: Builder, node: fx.Node, parts: list[Value], axis: int = 0) -> str:
    dtype = node.meta["val"].dtype
    return b.op("Concat", *[b.cast(part, dtype) for part in parts], axis=axis)


@translation(aten.stack)
def stack(b: Builder, node: fx.Node, parts: list[Value], axis: int = 0) -> str:
    axis = axis % len(node.meta["val"].shape)
    return b.op("Concat", *[b.op("Unsqueeze", part, b.ints(axis)) for part in parts], axis=axis)


@translation(aten.split_with_sizes, aten.split.Tensor, aten.split.sizes, aten.chunk, aten.unbind)
def split(b: Builder, node: fx.Node, x: Value, *given: Any, **named: Any) -> tuple[str, ...]:
    parts = node.meta["val"]
    unbind = node.target is aten.unbind.int
    axis = named.get("dim", given[0] if unbind and given else given[1] if len(given) > 1 else 0)
    sizes = [1 if unbind else int(part.shape[axis]) for part in parts]
    names = b.ops("Split", len(sizes), x, b.ints(*sizes), axis=axis)
    return tuple(b.op("Squeeze", name, b.ints(axis)) for name in names) if unbind else names


@translation(aten.slice.Tensor)
def slice_(
    b: Builder, node: fx.Node, x: Value, axis: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    last = b.ints(torch.iinfo(torch.int64).max) if end is None else b.size(end)
    return b.op("Slice", x, b.size(start or 0), last, b.ints(axis), b.ints(step))


@translation(aten.select.int)
def select(b: Builder, node: fx.Node, x: Value, axis: int, index: Any) -> str:
    return b.op("Squeeze", b.op("Gather", x, b.size(index), axis=axis), b.ints(axis))


@translation(aten.arange)
def arange(b: Builder, node: fx.Node, *limits: Any, **_: Any) -> str:
    start, end, step = (0, *limits, 1)[-3:] if len(limits) == 1 else (*limits, 1)[:3]
    numbers = [b.op("Squeeze", b.size(limit)) for limit in (start, end, step)]
    return b.cast(Value(b.op("Range", *numbers), (), torch.int64), node.meta["val"].dtype)


@translation(aten.full, aten.zeros, aten.ones)
def full(b: Builder, node: fx.Node, sizes: Any, number: float | None = None, **_: Any) -> str:
    value = node.meta["val"]
    if number is None:
        number = float(node.target is aten.ones.default)
    return b.op("Expand", b.scalar(number, value.dtype), b.shape(value.shape))


@translation(aten.full_like, aten.zeros_like, aten.ones_like)
def full_like(b: Builder, node: fx.Node, x: Value, number: float | None = None, **_: Any) -> str:
    if number is None:
        number = float(node.target is aten.ones_like.default)
    return b.op("Expand", b.scalar(number, node.meta["val"].dtype), b.op("Shape", x))


# Indexing


@translation(aten.embedding)
def embedding(b: Builder, node: fx.Node, table: Value, indices: Value, *_: Any, **__: Any) -> str:
    return b.op("Gather", table, indices, axis=0)


@translation(aten.index_select)
def index_select(b: Builder, node: fx.Node, x: Value, axis: int, indices: Value) -> str:
    return b.op("Gather", x, indices, axis=axis)


@translation(aten.gather)
def gather(b: Builder, node: fx.Node, x: Value, axis: int, indices: Value, **_: Any) -> str:
    return b.op("GatherElements", x, indices, axis=axis)


@translation(aten.scatter.src, aten.scatter.value)
def scatter(b: Builder, node: fx.Node, x: Value, axis: int, indices: Value, source: Any) -> str:
    if not isinstance(source, Value):
        source = b.op("Expand", b.scalar(source, x.dtype), b.op("Shape", indices))
    return b.op("ScatterElements", x, indices, source, axis=axis)


@translation(aten.index_put)
def index_put(
    b: Builder, node: fx.Node, x: Value, indices: list[Value | None], values: Value, accumulate: bool = False
) -> str:
    """Index tensors of the leading axes, broadcast against each other."""
    given = [index for index in indices if index is not None]
    if accumulate or indices[: len(given)] != given or values.shape[: len(values.shape)] == ():
        raise ExportError("only replacing writes at indices of the leading axes have an ONNX form")
    rank = len(values.shape) - (len(x.shape) - len(given))
    common = b.shape(values.shape[:rank])
    columns = [b.op("Unsqueeze", b.op("Expand", index, common), b.ints(-1)) for index in given]
    return b.op("ScatterND", x, b.op("Concat", *columns, axis=-1), values)
