"""The op vocabulary as ONNX nodes of the standard domain.

Axis letters follow docs/architecture.md. Routing and softmax compute in float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from onnx import TensorProto, helper
from torch import fx

import codegen.ops  # noqa: F401  registers the vocabulary
from codegen.onnx.builder import ONNX_TYPES, Builder, Scope, Value
from codegen.onnx.translate import translation

dsv3 = torch.ops.dsv3


@translation(dsv3.rms_norm)
def rms_norm(b: Builder, node: fx.Node, x: Value, weight: Value, eps: float) -> str:
    return _rms_norm(b, x, weight, eps)


def _rms_norm(b: Builder, x: Value | str, weight: Value, eps: float) -> str:
    return b.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)


@translation(dsv3.add_rms_norm)
def add_rms_norm(b: Builder, node: fx.Node, x: Value, residual: Value, weight: Value, eps: float) -> tuple[str, str]:
    total = b.op("Add", x, residual)
    return _rms_norm(b, total, weight, eps), total


@translation(dsv3.swiglu)
def swiglu(b: Builder, node: fx.Node, gate_up: Value, limit: float | None = None) -> str:
    return _swiglu(b, gate_up, gate_up.dtype, limit)


def _swiglu(b: Builder, gate_up: Value | str, dtype: torch.dtype, limit: float | None) -> str:
    gate, up = b.ops("Split", 2, gate_up, axis=-1, num_outputs=2)
    if limit is not None:
        low, high = (b.scalar(bound, dtype) for bound in (-limit, limit))
        gate, up = b.op("Clip", gate, None, high), b.op("Clip", up, low, high)
    return b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)


@translation(dsv3.rotary)
def rotary(b: Builder, node: fx.Node, x: Value, cos: Value, sin: Value, interleaved: bool) -> str:
    heads, width = int(x.shape[2]), int(x.shape[3])
    flat = b.op("Reshape", x, b.ints(0, 0, heads * width))
    return b.op("Reshape", _rotary(b, flat, x.dtype, heads, cos, sin, interleaved), b.ints(0, 0, heads, width))


def _rotary(b: Builder, x: str, dtype: torch.dtype, heads: int, cos: Value, sin: Value, interleaved: bool) -> str:
    """x [B, S, H·R]."""
    tables = [b.once(("angles", table.name, dtype), partial(b.cast, table, dtype)) for table in (cos, sin)]
    return b.op("RotaryEmbedding", x, *tables, num_heads=heads, interleaved=int(interleaved))


@translation(dsv3.write_cache)
def write_cache(
    b: Builder,
    node: fx.Node,
    kv: Value,
    weight: Value,
    cos: Value,
    sin: Value,
    positions: Value,
    latent: Value,
    rope_key: Value,
    eps: float,
    interleaved: bool,
) -> tuple[str, str]:
    rank, width = int(weight.shape[0]), int(rope_key.shape[-1])
    down, key = b.ops("Split", 2, kv, b.ints(rank, width), axis=-1)
    rows = _rms_norm(b, down, weight, eps)
    key = _rotary(b, key, kv.dtype, 1, cos, sin, interleaved)
    where = b.once(("rows", positions.name), lambda: _cache_rows(b, positions))
    return b.op("ScatterND", latent, where, rows), b.op("ScatterND", rope_key, where, key)


def _cache_rows(b: Builder, positions: Value) -> str:
    """[B, S, 2]: (b, positions[b, s])."""
    with b.within(Scope("model", "cache_rows")):
        batch = b.op("Range", b.constant(0), b.op("Squeeze", b.size(positions.shape[0])), b.constant(1))
        rows = b.op("Expand", b.op("Unsqueeze", batch, b.ints(1)), b.op("Shape", positions))
        pair = [b.op("Unsqueeze", one, b.ints(-1)) for one in (rows, b.name_of(positions))]
        return b.op("Concat", *pair, axis=-1)


def _visible(b: Builder, positions: Value, context: Any, axis: int) -> str:
    """Slots t ≤ positions[b, s]: bool [B, S, T] with an axis of 1 inserted for the heads."""

    def make() -> str:
        with b.within(Scope("model", "visible")):
            slots = b.op("Range", b.constant(0), b.op("Squeeze", b.size(context)), b.constant(1))
            seen = b.op("LessOrEqual", slots, b.op("Unsqueeze", positions, b.ints(2)))
            return b.op("Unsqueeze", seen, b.ints(axis))

    return b.once(("visible", positions.name, axis), make)


@translation(dsv3.mla_attention)
def mla_attention(
    b: Builder,
    node: fx.Node,
    q_latent: Value,
    q_rope: Value,
    latent: Value,
    rope_key: Value,
    positions: Value,
    scale: float,
) -> str:
    """Plain products: all heads of a row read one latent, so they are one matrix, which `Attention` does not see."""
    heads, rank = int(q_latent.shape[2]), int(q_latent.shape[3])
    dtype, factor = q_latent.dtype, b.scalar(scale, q_latent.dtype)
    scores = [
        b.op("MatMul", b.op("Mul", b.op("Reshape", q, b.ints(0, -1, int(q.shape[3]))), factor), b.swapped(key, 3))
        for q, key in ((q_latent, latent), (q_rope, rope_key))
    ]
    total = b.op("Reshape", b.op("Add", *scores), b.shape((*q_latent.shape[:3], latent.shape[1])))
    if dtype != torch.float32:
        total = b.cast(total, torch.float32)
    hidden = b.scalar(-math.inf, torch.float32)
    total = b.op("Where", _visible(b, positions, latent.shape[1], 2), total, hidden)
    shares = b.op("Softmax", total, axis=-1)
    if dtype != torch.float32:
        shares = b.cast(shares, dtype)
    flat = b.op("Reshape", shares, b.op("Concat", b.ints(0, -1), b.size(latent.shape[1]), axis=0))
    return b.op("Reshape", b.op("MatMul", flat, latent), b.ints(0, -1, heads, rank))


@translation(dsv3.attention)
def attention(b: Builder, node: fx.Node, q: Value, k: Value, v: Value, positions: Value, scale: float) -> str:
    heads, groups, width = int(q.shape[2]), int(k.shape[2]), int(v.shape[3])
    flat = [b.op("Reshape", x, b.ints(0, 0, int(x.shape[2]) * int(x.shape[3]))) for x in (q, k, v)]
    visible = _visible(b, positions, k.shape[1], 1)
    out = b.op("Attention", *flat, visible, q_num_heads=heads, kv_num_heads=groups, scale=scale)
    return b.op("Reshape", out, b.ints(0, 0, heads, width))


@translation(dsv3.route)
def route(
    b: Builder,
    node: fx.Node,
    logits: Value,
    bias: Value | None,
    scoring: str,
    top_k: int,
    groups: int,
    top_groups: int,
    group_score: str,
    masked: float,
    normalise: bool,
    epsilon: float,
    scale: float,
) -> tuple[str, str]:
    """TopK gives the lowest index on ties, as the standard requires."""
    wide, experts = torch.float32, int(logits.shape[1])
    values = b.cast(logits, wide)
    if scoring == "sigmoid":
        scores = b.op("Sigmoid", values)
    elif scoring == "sqrtsoftplus":
        scores = b.op("Sqrt", b.op("Softplus", values))
    else:
        scores = b.op("Softmax", values, axis=-1)
    choice = scores if bias is None else b.op("Add", scores, b.cast(bias, wide))
    if top_groups < groups:
        members = experts // groups
        grouped = b.op("Reshape", choice, b.ints(-1, groups, members))
        best = 1 if group_score == "max" else min(2, members)
        largest, _ = b.ops("TopK", 2, grouped, b.ints(best), axis=-1)
        _, chosen = b.ops("TopK", 2, b.op("ReduceSum", largest, b.ints(-1), keepdims=0), b.ints(top_groups), axis=-1)
        # [N, top_groups, 1] against [G]: which groups are among the chosen ones.
        member = b.op("Equal", b.op("Unsqueeze", chosen, b.ints(-1)), b.ints(*range(groups)))
        kept = b.op("ReduceMax", b.op("Cast", member, to=TensorProto.INT32), b.ints(1), keepdims=0)
        kept = b.op("Unsqueeze", b.op("Cast", kept, to=TensorProto.BOOL), b.ints(-1))
        choice = b.op("Reshape", b.op("Where", kept, grouped, b.scalar(masked, wide)), b.ints(-1, experts))
    _, indices = b.ops("TopK", 2, choice, b.ints(top_k), axis=-1)
    weights = b.op("GatherElements", scores, indices, axis=-1)
    if normalise:
        total = b.op("Add", b.op("ReduceSum", weights, b.ints(-1), keepdims=1), b.scalar(epsilon, wide))
        weights = b.op("Div", weights, total)
    return indices, b.op("Mul", weights, b.scalar(scale, wide))


def limit_of(residual: None = None, always: int = 0, up: None = None, limit: float | None = None) -> float | None:
    """Of what may follow the weights of a routed_swiglu, all that an export has: the rest is GPUs'."""
    assert (residual, always, up) == (None, 0, None)
    return limit


def one_token_experts(
    b: Builder, node: fx.Node, x: Value, indices: Value, weights: Value, gate_up: Value, down: Value, *more: Any
) -> str:
    """routed_swiglu for few rows: gathers the weights that each row chose, N·K·3·D·I numbers of them."""
    first, second = (w.transposed or b.swapped(w, 3) for w in (gate_up, down))
    rows = b.op("Unsqueeze", x, b.ints(1, 2))  # [N, 1, 1, D] times [N, K, D, 2I]
    inner = _swiglu(b, b.op("MatMul", rows, b.op("Gather", first, indices, axis=0)), x.dtype, limit_of(*more))
    out = b.op("Squeeze", b.op("MatMul", inner, b.op("Gather", second, indices, axis=0)), b.ints(2))
    weighted = b.op("Mul", _widened(b, out, x.dtype), b.op("Unsqueeze", b.cast(weights, torch.float32), b.ints(-1)))
    return _rounded(b, b.op("ReduceSum", weighted, b.ints(1), keepdims=0), x.dtype)


@translation(dsv3.routed_swiglu)
def many_token_experts(
    b: Builder, node: fx.Node, x: Value, indices: Value, weights: Value, gate_up: Value, down: Value, *more: Any
) -> str:
    """Loop over the experts that somebody chose: rows of their tokens, two products, weighted addition."""
    top_k = int(indices.shape[1])
    flat = b.op("Reshape", indices, b.ints(-1))
    shares = b.op("Reshape", b.cast(weights, torch.float32), b.ints(-1, 1))
    chosen = b.op("Unique", flat, sorted=1)
    trips = b.op("Squeeze", b.op("Shape", chosen))
    empty = b.op("Expand", b.scalar(0.0, torch.float32), b.op("Shape", x))
    first, second = (w.transposed or b.swapped(w, 3) for w in (gate_up, down))
    prefix = b.unique(f"{b.scope.module}/{b.scope.node}.expert")
    with b.body() as nodes:
        expert = b.op("Gather", chosen, f"{prefix}.number", axis=0)
        pairs = b.op("Squeeze", b.op("NonZero", b.op("Equal", flat, expert)), b.ints(0))
        tokens = b.op("Div", pairs, b.constant(top_k))
        both = b.op("MatMul", b.op("Gather", x, tokens, axis=0), b.op("Gather", first, expert, axis=0))
        inner = _swiglu(b, both, x.dtype, limit_of(*more))
        out = _widened(b, b.op("MatMul", inner, b.op("Gather", second, expert, axis=0)), x.dtype)
        weighted = b.op("Mul", out, b.op("Gather", shares, pairs, axis=0))
        where = b.op("Unsqueeze", tokens, b.ints(1))
        total = b.op("ScatterND", f"{prefix}.sum", where, weighted, reduction="add")
        going = b.op("Identity", f"{prefix}.going")
    sizes: list[str | int | None] = ["tokens", int(x.shape[1])]
    body = helper.make_graph(
        nodes,
        prefix,
        [
            helper.make_tensor_value_info(f"{prefix}.number", TensorProto.INT64, []),
            helper.make_tensor_value_info(f"{prefix}.going", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"{prefix}.sum", TensorProto.FLOAT, sizes),
        ],
        [
            helper.make_tensor_value_info(going, TensorProto.BOOL, []),
            helper.make_tensor_value_info(total, TensorProto.FLOAT, sizes),
        ],
    )
    return _rounded(b, b.op("Loop", trips, b.constant(True), empty, body=body), x.dtype)


def _widened(b: Builder, x: str, dtype: torch.dtype) -> str:
    return x if dtype == torch.float32 else b.op("Cast", x, to=TensorProto.FLOAT)


def _rounded(b: Builder, x: str, dtype: torch.dtype) -> str:
    return x if dtype == torch.float32 else b.op("Cast", x, to=ONNX_TYPES[dtype])
