"""Kernels on the GPU of this machine, at widths of real models, in bfloat16, which the interpreter lacks."""

import importlib
import math

import pytest
import torch

from codegen import dispatch, ops  # noqa: F401  ops defines torch.ops.dsv3
from codegen.dispatch import launcher
from codegen.planned import Planned
from codegen.targets import target
from tests.codegen.calls import LOOSE, WRITTEN, copies, outcomes
from tests.codegen.strides import elsewhere, repeated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16


def normal(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda").to(dtype)


def both(op, *arguments, kernels="codegen.kernels"):
    """(kernel's result, reference's result in float32), on copies of the arguments."""
    launcher = getattr(importlib.import_module(f"{kernels}.{op}"), op)
    own = copies(arguments)
    wide = [x.float() if isinstance(x, torch.Tensor) and x.dtype == BF16 else x for x in own]
    found, expected = launcher(*own), getattr(torch.ops.dsv3, op)(*wide)
    return (own[5:7], wide[5:7]) if found is None else (found, expected)


def assert_near(found, expected, tolerance=1e-2):
    if isinstance(found, torch.Tensor):
        found, expected = [found], [expected]
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert one.isfinite().all() and error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("rows, width", [(1, 7168), (33, 1536), (4097, 512)])
def test_norms(rows, width):
    x, residual, weight = normal(rows, width), normal(rows, width), normal(width)
    assert_near(*both("rms_norm", x, weight, 1e-6))
    assert_near(*both("add_rms_norm", x, residual, weight, 1e-6))


def test_swiglu_and_rotary():
    assert_near(*both("swiglu", normal(33, 4096)))
    assert_near(*both("swiglu", normal(33, 4096), 0.7))
    angle = normal(2, 9, 32, dtype=torch.float32)
    assert_near(*both("rotary", normal(2, 9, 128, 192)[..., 128:], angle.cos(), angle.sin(), True))


def test_cache_write():
    angle = normal(3, 1, 32, dtype=torch.float32)
    positions = torch.tensor([[5], [0], [63]], device="cuda")
    caches = normal(3, 64, 512), normal(3, 64, 64)
    arguments = (normal(3, 1, 576), normal(512), angle.cos(), angle.sin(), positions, *caches, 1e-6, True)
    assert_near(*both("write_cache_", *arguments))


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [1, 3, 16, 33])
def test_products_stream_on_hopper(rows):
    x, first, second = normal(rows, 2048), normal(2816, 2048), normal(576, 2048)
    for op, arguments in (("linear_pair", (x, first, second)), ("linear", (x, second, None, None, True))):
        launcher = getattr(importlib.import_module(f"codegen.kernels.sm_90.{op}"), op)
        wide = [one.double() if isinstance(one, torch.Tensor) else one for one in arguments]
        found = launcher(*arguments)
        assert found.dtype == (BF16 if op == "linear_pair" else torch.float32)
        assert_near(found, getattr(torch.ops.dsv3, op)(*wide), 1e-2 if op == "linear_pair" else 1e-5)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_what_stands_between_products_overlaps_them_on_hopper(rows):
    """One behind the other, so that each starts while the one before still writes what it reads."""
    x, residual, norm = normal(rows, 2048), normal(rows, 2048), normal(2048)
    weights = [normal(*shape) / 45 for shape in ((2048, 2048), (1408, 2048), (1408, 2048), (2048, 1408))]

    def chain(run, x, residual, norm, first, gate, up, down):
        normed, total = run("add_rms_norm")(run("linear")(x, first), residual, norm, 1e-6)
        hidden = run("swiglu")(run("linear_pair")(normed, gate, up))
        return total, run("rms_norm")(run("linear")(hidden, down, None, total), norm, 1e-6)

    def own(op):
        return getattr(importlib.import_module(f"codegen.kernels.sm_90.{op}"), op)

    inputs = [x, residual, norm, *weights]
    expected = chain(lambda op: getattr(torch.ops.dsv3, op), *(one.double() for one in inputs))
    for _ in range(20):
        assert_near(chain(own, *inputs), expected)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("heads, rank, rope", [(16, 512, 64), (128, 512, 64), (3, 24, 12), (20, 384, 32), (6, 192, 64)])
@pytest.mark.parametrize("queries, batch", [(1, 1), (1, 5), (4, 2)])
def test_mla_attention(heads, rank, rope, queries, batch, dtype):
    if dtype == torch.float32 and rank > 256:
        pytest.skip("a tile of 512 float32 columns does not fit")
    context = 3001
    last = torch.randint(queries, context, (batch, 1), device="cuda")
    last[0] = context - 1
    positions = last - torch.arange(queries, device="cuda").flip(0)
    q = normal(batch, queries, heads, rank, dtype=dtype), normal(batch, queries, heads, rope, dtype=dtype)
    cache = normal(batch, context, rank, dtype=dtype), normal(batch, context, rope, dtype=dtype)
    found, expected = both("mla_attention", *q, *cache, positions, 1 / math.sqrt(rank + rope))
    assert_near(found, expected, 1e-2 if dtype == BF16 else 1e-5)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("growth", [1, 30, 1000])  # of the last rows' scores over the first ones'
@pytest.mark.parametrize(
    "heads, rank, rope", [(16, 512, 64), (128, 512, 64), (20, 384, 32), (6, 192, 64), (1, 128, 16)]
)
@pytest.mark.parametrize("queries, batch", [(1, 1), (1, 5), (4, 2), (1, 150)])
def test_mla_attention_on_hopper(queries, batch, heads, rank, rope, growth, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    context = 3001
    last = torch.randint(queries, context, (batch, 1), device="cuda")
    last[0] = context - 1
    positions = last - torch.arange(queries, device="cuda").flip(0)
    q = normal(batch, queries, heads, rank), normal(batch, queries, heads, rope)
    cache = normal(batch, context, rank), normal(batch, context, rope)
    cache[1].mul_(torch.linspace(1, growth, context, device="cuda")[:, None])
    arguments = (*q, *cache, positions, 1 / math.sqrt(rank + rope))
    assert_near(*both("mla_attention", *arguments, kernels="codegen.kernels.sm_90"))


@pytest.mark.parametrize("queries, heads, groups, widths", [(1, 16, 16, (192, 128)), (517, 6, 2, (128, 128))])
def test_attention(queries, heads, groups, widths):
    q, k, v = normal(2, queries, heads, widths[0]), normal(2, 600, groups, widths[0]), normal(2, 600, groups, widths[1])
    positions = torch.tensor([[0], [600 - queries]], device="cuda") + torch.arange(queries, device="cuda")
    assert_near(*both("attention", q, k, v, positions, 0.07))


def test_attention_over_parts_of_projections():
    arguments = prompt(2, 517, 600, 6, 2, (128, 64, 128), BF16)
    assert_near(*both("attention", *arguments))


def prompt(batch, queries, context, heads, groups, widths, dtype):
    """Arguments of attention in parts: keys and values of one projection, a rope key that all heads share."""
    width, rope, value_width = widths
    q, q_rope = normal(batch, queries, heads, width + rope, dtype=dtype).split([width, rope], -1)
    k, v = normal(batch, context, groups, width + value_width, dtype=dtype).split([width, value_width], -1)
    first = torch.randint(context - queries + 1, (batch, 1), device="cuda")
    first[-1] = context - queries
    positions = first + torch.arange(queries, device="cuda")
    return q, k, v, positions, 0.07, q_rope.contiguous(), normal(batch, context, 1, rope, dtype=dtype)


# One query, ragged ends of tiles, a context before, positions in any order; 4 heads share keys; both dtypes.
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("widths", [(128, 64, 128), (64, 32, 64), (128, 0, 128), (192, 64, 256), (256, 0, 64)])
@pytest.mark.parametrize(
    "batch, queries, context, heads, groups, shuffled",
    [(1, 1, 1, 1, 1, False), (2, 130, 515, 16, 16, False), (2, 515, 515, 8, 2, True), (1, 2048, 2048, 16, 16, False)],
)
def test_attention_on_hopper(batch, queries, context, heads, groups, shuffled, widths, dtype):
    q, k, v, positions, scale, *rope = prompt(batch, queries, context, heads, groups, widths, dtype)
    if shuffled:
        positions = positions[:, torch.randperm(queries)]
    hidden = torch.arange(context, device="cuda") > positions.amax(1, keepdim=True)
    inputs = [q, k.clone(), v.clone(), positions, scale, *(rope if widths[1] else ())]
    for one in (inputs[1], inputs[2]):
        one[hidden] = math.nan
    launcher = importlib.import_module("codegen.kernels.sm_90.attention").attention
    wide = [x.float().nan_to_num() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for x in inputs]
    assert_near(launcher(*inputs), torch.ops.dsv3.attention(*wide), 4e-3)


@pytest.mark.parametrize("tokens", [1, 1000])
@pytest.mark.parametrize(
    "experts, top_k, groups, top_groups, scoring, group_score, masked",
    [
        (256, 8, 8, 4, "sigmoid", "top2", -math.inf),
        (160, 6, 8, 3, "softmax", "max", 0.0),
        (256, 6, 1, 1, "sqrtsoftplus", "max", 0.0),
        (384, 8, 1, 1, "sigmoid", "top2", -math.inf),
    ],
)
def test_route(tokens, experts, top_k, groups, top_groups, scoring, group_score, masked):
    logits, bias = normal(tokens, experts, dtype=torch.float32), normal(experts, dtype=torch.float32)
    (indices, weights), (expected, expected_weights) = both(
        "route", logits, bias, scoring, top_k, groups, top_groups, group_score, masked, True, 1e-20, 2.5
    )
    same = (indices == expected).all(1)
    assert same.double().mean() > 0.995  # exp differs in the last bit between the two, which can turn a tie
    torch.testing.assert_close(weights[same], expected_weights[same])


@pytest.mark.parametrize("tokens", [1, 7, 200, 700])  # 200 and 700: tiles of 64 and of 128 rows
def test_experts(tokens):
    experts, top_k, hidden, width = 64, 6, 2048, 1408
    indices = torch.stack([torch.randperm(experts, device="cuda")[:top_k] for _ in range(tokens)])
    found, expected = both("sort_pairs", indices, experts)
    torch.testing.assert_close(found, expected)
    x, weights = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
    gate_up = normal(experts, 2 * width, hidden) / hidden**0.5
    down = normal(experts, hidden, width) / width**0.5
    assert_near(*both("routed_swiglu", x, indices, weights, gate_up, down))
    assert_near(*both("routed_swiglu", x, indices, weights, gate_up, down, None, 0, None, 0.7))
    order, offsets = expected
    assert_near(*both("grouped_linear", x[order // top_k], gate_up, offsets))
    # Somebody else's stacks: gates and ups apart, and as inputs times outputs.
    gate, up, turned = (stack.transpose(1, 2).contiguous().transpose(1, 2) for stack in (*gate_up.chunk(2, 1), down))
    assert_near(*both("routed_swiglu", x, indices, weights, gate, turned, None, 0, up))
    assert_near(*both("grouped_linear", x[order // top_k], gate, offsets))


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "experts, tokens, dtype, shared, stored",
    [
        (64, 1, BF16, 1, "apart"),
        (64, 2, BF16, 2, "in turns"),
        (64, 5, BF16, 1, "together"),
        (64, 5, BF16, 0, "apart"),
        (64, 40, BF16, 2, "together"),
        (64, 90, BF16, 2, "together"),
        (64, 230, BF16, 1, "apart"),
        (3, 13, BF16, 1, "apart"),
        (64, 700, BF16, 2, "together"),
        (64, 2100, BF16, 0, "apart"),
        (64, 2100, torch.float16, 0, "together"),
        (64, 2100, BF16, 2, "together"),
        (64, 2100, BF16, 1, "in turns"),
        (64, 4099, BF16, 1, "together"),
    ],
)
def test_experts_in_tiles_on_hopper(experts, tokens, dtype, shared, stored):
    top_k, hidden, width = min(6, experts - shared), 2056, 1416  # multiples of 8, not of 16
    launcher = importlib.import_module("codegen.kernels.sm_90.routed_swiglu").routed_swiglu
    indices = torch.rand(tokens, experts - shared, device="cuda").topk(top_k, -1).indices
    always = torch.arange(experts - shared, experts, device="cuda").expand(tokens, shared)
    indices, weights = torch.cat([indices, always], 1), torch.rand(tokens, top_k + shared, device="cuda")
    x, residual = normal(tokens, hidden), normal(tokens, hidden)
    gate_up = normal(experts, 2 * width, hidden) / hidden**0.5
    down = normal(experts, hidden, width) / width**0.5
    x, gate_up, down, residual = (one.to(dtype) for one in (x, gate_up, down, residual))
    weights = weights.to(dtype) if stored == "apart" else weights
    wide = [one.float() for one in (gate_up, down, residual)]
    expected = torch.ops.dsv3.routed_swiglu(x.float(), indices, weights, *wide)
    gate, up = gate_up, None
    if stored == "apart":
        gate, up = (half.contiguous() for half in gate_up.chunk(2, 1))
    elif stored == "in turns":
        turns = gate_up.unflatten(1, (2, width)).transpose(1, 2).flatten(1, 2)
        gate, up = turns[:, ::2], turns[:, 1::2]
    for _ in range(3):  # the next call's first kernels may start while the last ones of this run
        found = launcher(x, indices, weights, gate, down, residual, shared, up)
    assert_near(found, expected)
    limited = torch.ops.dsv3.routed_swiglu(x.float(), indices, weights, *wide, shared, None, 0.7)
    assert_near(launcher(x, indices, weights, gate, down, residual, shared, up, 0.7), limited)


def latent_operands(batch=2, heads=16, rank=512, rope=64, context=100):
    """(angle, positions, latent cache, cache of rotary keys)"""
    angle = normal(batch, 1, rope // 2, dtype=torch.float32)
    positions = torch.tensor([[context - 1], [7]], device="cuda")
    return angle, positions, normal(batch, context, rank), normal(batch, context, rope)


def operands_on_hopper(op, rows):
    """Operands that the kernels of Hopper serve where they are aligned."""
    x, norm = normal(rows, 256), normal(256)
    pairs = torch.rand(rows, 8, device="cuda").topk(2, -1)
    angle, positions, *caches = latent_operands()
    turns = angle.cos(), angle.sin()
    return {
        "rms_norm": (x, norm, 1e-6),
        "add_rms_norm": (x, normal(rows, 256), norm, 1e-6),
        "swiglu": (normal(rows, 512),),
        "linear": (x, normal(192, 256), 1e-6, normal(rows, 192)),
        "linear_pair": (x, normal(128, 256), normal(64, 256)),
        "head_linear": (normal(rows, 4, 128), normal(4, 64, 128)),
        "norm_router": (x, norm, 1e-6, normal(64, 256)),
        "route": (
            *(normal(rows, 64, dtype=torch.float32), normal(64, dtype=torch.float32)),
            *("sigmoid", 6, 8, 3, "top2", -math.inf, True, 1e-20, 2.5),
        ),
        "routed_swiglu": (
            *(x, pairs.indices, pairs.values, normal(8, 256, 256) / 16, normal(8, 256, 128) / 11),
            normal(rows, 256),
        ),
        "mla_attention": (normal(2, 1, 16, 512), normal(2, 1, 16, 64), *caches, positions, 0.04),
        "attention": (
            *(normal(2, 130, 4, 192), normal(2, 130, 4, 192), normal(2, 130, 4, 128)),
            *(torch.arange(130, device="cuda").expand(2, -1), 0.07),
        ),
        "attention_inputs_": (
            *(normal(2, 1, 16 * 192), normal(2, 1, 576), normal(16, 128, 512) / 11, normal(512)),
            *(*turns, positions, *caches, 1e-6, True),
        ),
        "write_cache_": (normal(2, 1, 576), normal(512), *turns, positions, *caches, 1e-6, True),
    }[op]


ROWS = {"linear": (3, 100), "linear_pair": (3, 100), "head_linear": (3, 100), "norm_router": (3, 600)}
ROWS["routed_swiglu"] = (1, 30, 300)
ON_HOPPER = ["rms_norm", "add_rms_norm", "swiglu", "route", "mla_attention", "attention", *WRITTEN, *ROWS]


def results_on_hopper(op, operands):
    return outcomes(op, launcher(op, target("sm_90")), operands)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        if one.is_floating_point():
            assert_near(one, other)
        else:
            assert torch.equal(one, other)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("op, rows", [(op, rows) for op in ON_HOPPER for rows in ROWS.get(op, (3,))])
def test_operands_may_lie_anywhere_on_hopper(op, rows):
    """Read where they lie, copied, or given to the plain form: as operands that are packed."""
    given = operands_on_hopper(op, rows)

    def results(place=None, moved=None):
        operands = copies(given)
        if place is not None:
            operands[place] = moved
        return results_on_hopper(op, operands)

    expected = results()
    for place, operand in enumerate(given):
        if not isinstance(operand, torch.Tensor):
            continue
        for _, moved in elsewhere(operand):
            if place in WRITTEN.get(op, ()) and moved.stride(-1) != 1:
                with pytest.raises(ValueError, match="must be contiguous"):
                    results(place, moved)
            else:
                assert_same(results(place, moved), expected)
        if place not in WRITTEN.get(op, ()):
            assert_same(results(place, repeated(operand)), results(place, repeated(operand).contiguous()))


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("op, rows", [(op, rows) for op in ON_HOPPER if op in LOOSE for rows in ROWS.get(op, (3,))])
def test_operands_may_have_dtypes_of_their_own_on_hopper(op, rows):
    given, of = operands_on_hopper(op, rows), {BF16: torch.float32, torch.float32: BF16, torch.int64: torch.int32}
    for place in LOOSE[op]:
        operands = copies(given)
        operands[place] = operands[place].to(of[operands[place].dtype])
        expected = outcomes(op, getattr(torch.ops.dsv3, op), copies(operands))
        assert_same(results_on_hopper(op, operands), expected)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("op, rows", [(op, rows) for op in ON_HOPPER for rows in ROWS.get(op, (3,))])
def test_a_repeated_call_gives_what_the_launcher_gives_on_hopper(op, rows):
    """Of operands that are packed, and of each that lies somewhere else."""
    dispatch.register(target("sm_90"))  # launches are direct, or no plan would hear of them
    run, launch = Planned(launcher(op, target("sm_90"))), launcher(op, target("sm_90"))
    given = operands_on_hopper(op, rows)
    moves = [(None, None)]
    for place, operand in enumerate(given):
        if isinstance(operand, torch.Tensor) and place not in WRITTEN.get(op, ()):
            moves += [(place, move) for move, _ in enumerate(elsewhere(operand))]
    for place, move in moves:
        for _ in range(4):
            operands = operands_on_hopper(op, rows)
            if place is not None:
                operands = list(operands)
                operands[place] = list(elsewhere(operands[place]))[move][1]
            expected = outcomes(
                op, launch, [x.clone() if i in WRITTEN.get(op, ()) else x for i, x in enumerate(operands)]
            )
            with torch._C._AutoDispatchBelowAutograd():  # as torch calls an op
                found = outcomes(op, run, operands)
            assert_same(found, expected)
        if place is None and rows <= 3:
            assert list(run.plans.values()) != [None], "a decode step's op is to be repeated"
