"""Attention cores become one op, absorbed or expanded; anything that is not quite one stays."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model_def.presets import PRESETS
from passes.base import calls
from passes.fuse_attention import FuseAttention
from passes.inputs import size_values
from passes.open_attention import OpenAttention
from passes.order_contractions import OrderContractions
from passes.pipeline import Pipeline, RequirementError, check_required
from passes.verify import clone, run_float64
from tests.passes.capture import CONTEXT, model_layer, module_graph, random_inputs, tensor
from tests.passes.harness import apply, count, reasons
from tests.passes.mla import HeadFirst, Mla, mla_graph

dsv3 = torch.ops.dsv3


@pytest.mark.parametrize("variant", [Mla, HeadFirst])
@pytest.mark.parametrize("queries", [1, "S"])
def test_the_absorbed_core_reads_the_latent_once(variant, queries):
    graph = mla_graph(variant, queries)
    apply(OrderContractions(decode="absorbed"), graph)
    assert apply(FuseAttention(), graph).matches == ["softmax: mla_attention"]
    assert count(graph, dsv3.mla_attention) == 1
    assert count(graph, torch.ops.aten.softmax) == 0


@pytest.mark.parametrize("variant", [Mla, HeadFirst])
def test_the_expanded_core_keeps_heads(variant):
    graph = mla_graph(variant, "S")
    apply(FuseAttention(), graph, "prefill")
    assert count(graph, dsv3.attention) == 1


class Written(Mla):
    """Behind the cached rows stand new ones, which are products."""

    def __init__(self):
        super().__init__()
        self.latent_proj = nn.Linear(20, 24, bias=False)
        self.rope_key_proj = nn.Linear(20, 6, bias=False)

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        latent = torch.cat([latent_BTC, self.latent_proj(x_BSD)], 1)
        rope_key = torch.cat([rope_key_BTR, self.rope_key_proj(x_BSD)], 1)
        return super().forward(x_BSD, positions_BS, latent, rope_key)

    def scores(self, q_nope, q_rope, k, rope_key):
        return torch.einsum("bshx,bthx->bhst", q_nope, k) + torch.einsum("bshr,btr->bhst", q_rope, rope_key)


def test_only_values_that_are_products_throughout_are_multiplied_out():
    activations = tensor("x_BSD", 2, 1, 20), tensor("positions_BS", 2, 1, dtype=torch.int64, upper=12)
    graph = module_graph(Written(), *activations, tensor("latent_BTC", 2, 11, 24), tensor("rope_key_BTR", 2, 11, 6))
    outcome = apply(FuseAttention(expanded=False), clone(graph))
    assert not outcome.matches and "multiplied out for every cached position" in reasons(outcome)
    apply(OrderContractions(decode="absorbed"), graph)
    assert apply(FuseAttention(expanded=False), graph).matches == ["softmax: mla_attention"]


class Prompt(Mla):
    """A prompt of heads as wide as Hopper's kernel has them, through torch's attention or by hand; `parts` makes whole
    keys of it."""

    def __init__(self, by_torch: bool, parts: bool = True):
        super().__init__(nope=64, rope=32, value=64)
        self.by_torch, self.parts = by_torch, parts
        self.to(torch.bfloat16)

    def forward(self, x_BSD, latent_BTC, rope_key_BTR):
        q = self.q_proj(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv.split([self.nope, self.value], -1)
        if self.parts:
            k = torch.cat([k, rope_key_BTR[:, None].expand(-1, self.heads, -1, -1)], -1)
        else:
            q = q[..., : self.nope]
        if self.by_torch:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        count = x_BSD.shape[1]
        hidden = torch.arange(count)[:, None] < torch.arange(count)
        return (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("by_torch", "parts", "on", "reason"),
    [
        (True, True, "sm_90", ""),
        (False, False, "sm_90", ""),
        (True, False, "sm_90", "lie together as torch's attention takes them"),
        (True, True, "sm_80", "sm_80 has no kernel of its own for attention"),
        (True, True, "cpu", "cpu has no kernel of its own for attention"),
    ],
)
def test_torch_s_attention_stays_where_it_could_not_read_less(by_torch, parts, on, reason):
    wide = (tensor(name, 2, 9, size, dtype=torch.bfloat16) for name, size in (("x", 20), ("latent", 24), ("rope", 32)))
    graph = module_graph(Prompt(by_torch, parts), *wide)
    apply(OpenAttention(), graph, "any", on)
    outcome = apply(FuseAttention(expanded=False), graph, "any", on)
    assert len(outcome.matches) == (reason == "") and reason in reasons(outcome), outcome


def test_what_the_kernel_does_not_serve_stays_torch_s():
    graph = mla_graph(Mla, "S")
    outcome = apply(FuseAttention(expanded=False), graph, "any")
    assert not outcome.matches and "neither bfloat16 nor float16" in reasons(outcome)


class Windowed(Mla):
    """A sliding window is not the mask that the op means."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q = self.q_proj(x_BSD).unflatten(-1, (self.heads, -1))[..., : self.nope]
        k = self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, -1))[..., : self.nope]
        cached = torch.arange(latent_BTC.shape[1])
        hidden = ~((cached <= positions_BS[:, :, None]) & (cached > positions_BS[:, :, None] - 3))
        scores = torch.einsum("bshx,bthx->bhst", q, k).masked_fill(hidden[:, None], -math.inf)
        return torch.einsum("bhst,btc->bhsc", scores.softmax(-1), latent_BTC)


class Finite(Mla):
    """A large negative number is not −∞: a row that sees nothing would average."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q = self.q_proj(x_BSD).unflatten(-1, (self.heads, -1))[..., : self.nope]
        k = self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, -1))[..., : self.nope]
        hidden = torch.arange(latent_BTC.shape[1]) > positions_BS[:, :, None]
        scores = torch.einsum("bshx,bthx->bhst", q, k).masked_fill(hidden[:, None], -1e4)
        return torch.einsum("bhst,btc->bhsc", scores.softmax(-1), latent_BTC)


class Leaking(Mla):
    """Attention shares that are also an output must exist."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q = self.q_proj(x_BSD).unflatten(-1, (self.heads, -1))[..., : self.nope]
        k = self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, -1))[..., : self.nope]
        visible = torch.arange(latent_BTC.shape[1]) <= positions_BS[:, :, None]
        scores = torch.einsum("bshx,bthx->bhst", q, k).masked_fill(~visible[:, None], -math.inf)
        shares = scores.softmax(-1)
        return torch.einsum("bhst,bthx->bshx", shares, k), shares


class Rounded(Mla):
    """Scores that are rounded are no products."""

    def scores(self, q_nope, q_rope, k, rope_key):
        return torch.div(super().scores(q_nope, q_rope, k, rope_key), 0.25, rounding_mode="floor")


class WholeScores(Mla):
    """A cast to whole numbers does more than to round."""

    def scores(self, q_nope, q_rope, k, rope_key):
        return super().scores(q_nope, q_rope, k, rope_key).to(torch.int32).to(q_nope.dtype)


class WholeShares(Mla):
    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q = self.q_proj(x_BSD).unflatten(-1, (self.heads, -1))[..., : self.nope]
        k = self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, -1))[..., : self.nope]
        shares = torch.einsum("bshx,bthx->bhst", q, k).softmax(-1).to(torch.bool).to(k.dtype)
        return torch.einsum("bhst,bthx->bshx", shares, k)


@pytest.mark.parametrize(
    "module, reason",
    [
        (Windowed, "not a comparison of positions"),
        (Finite, "not a mask with −∞"),
        (Leaking, "shares are used by"),
        (Rounded, "not plain products of two operands"),
        (WholeScores, "not plain products of two operands"),
        (WholeShares, "shares are used by"),
    ],
)
def test_near_misses_stay(module, reason):
    graph = mla_graph(module, "S")
    outcome = apply(FuseAttention(), graph)
    assert not outcome.matches and reason in reasons(outcome)
    assert count(graph, torch.ops.aten.softmax) == 1


class Gated(Finite):
    """A softmax that chooses among features, before the attention that is nearly one."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        return super().forward(x_BSD.softmax(-1), positions_BS, latent_BTC, rope_key_BTR)


def test_the_nearest_miss_is_the_softmax_that_is_nearly_attention():
    records = Pipeline((FuseAttention(),)).run(mla_graph(Gated, "S"), CONTEXT)
    assert [refusal.reached for refusal in records[0].refusals] == [0, 1]
    with pytest.raises(RequirementError, match="nearest miss softmax_1 .* before the softmax is not a mask with −∞"):
        check_required(records, ["fuse-attention"])


class Codebook(nn.Module):
    """A choice among rows of a weight, of which another weight has the values."""

    def __init__(self, heads):
        super().__init__()
        self.keys = nn.Parameter(torch.empty(heads, 12, 8))
        self.values = nn.Parameter(torch.empty(heads, 12, 6))

    def forward(self, x):
        keys, values = (self.keys, self.values) if x.dim() == 4 else (self.keys[0], self.values[0])
        return (x @ keys.mT).softmax(-1) @ values


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 5, 8)])
def test_rows_of_a_weight_are_no_positions(shape):
    graph = module_graph(Codebook(3), tensor("x", *shape))
    outcome = apply(FuseAttention(), graph)
    assert not outcome.matches and "are weights, no positions" in reasons(outcome)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definition_decodes_on_its_latent(dtype):
    graph = model_layer(PRESETS["toy"], 0, dtype)
    apply(OrderContractions(decode="absorbed"), graph)
    apply(FuseAttention(), graph)
    assert count(graph, dsv3.mla_attention) == 1
    assert count(graph, torch.ops.aten.clamp_max) == 0  # positions lie in the cache already


class Bounded(nn.Module):
    """Every query sees the positions up to the same one, which may lie behind the context."""

    def __init__(self, visible):
        super().__init__()
        self.visible = visible

    def forward(self, q, k, v):
        scores = torch.einsum("bshx,bthx->bhst", q, k) * 0.3
        hidden = ~self.visible(torch.arange(k.shape[1]), k.shape[1])
        return torch.einsum("bhst,bthx->bshx", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def bounded(visible, context):
    inputs = [tensor("q", 2, 3, 5, 8), tensor("k", 2, context, 5, 8), tensor("v", 2, context, 5, 8)]
    return module_graph(Bounded(visible), *inputs)


@pytest.mark.parametrize("context", [7, "T"])
@pytest.mark.parametrize("last", [0, 4, 100])
def test_no_query_sees_what_lies_behind_the_context(context, last):
    graph = bounded(lambda t, context: t <= last, context)
    assert len(apply(FuseAttention(), graph).matches) == 1
    (attention,) = calls(graph.graph, dsv3.attention)
    inputs = random_inputs(graph, size_values(graph), 0)
    _, values = run_float64(graph, inputs, record=True)
    assert int(values[attention.args[3].name].max()) == min(last, inputs["k"].shape[1] - 1)


@pytest.mark.parametrize(
    ("visible", "reason"),
    [
        (lambda t, context: t <= -1, "hides every position"),
        (lambda t, context: t <= 2.5, "does not compare arange with positions"),
        (lambda t, context: t <= context, "does not compare arange with positions"),
        (lambda t, context: ~(t < context), "does not compare arange with positions"),
        (lambda t, context: t.to(torch.int8) <= 4, "does not compare arange with positions"),
        (lambda t, context: torch.arange(context, dtype=torch.float16) <= 4, "does not compare arange with positions"),
    ],
    ids=["nothing", "a fraction", "a free size", "behind a free size", "wrapping", "rounded"],
)
def test_bounds_that_are_no_positions(visible, reason):
    outcome = FuseAttention().run(bounded(visible, "T"), CONTEXT)
    assert not outcome.matches and reason in reasons(outcome)


class Cast(nn.Module):
    """Positions in another dtype, which may be what they are compared in."""

    def __init__(self, dtype, wide):
        super().__init__()
        self.dtype, self.wide = dtype, wide

    def forward(self, q, k, v, positions):
        hidden = torch.arange(k.shape[1]).to(self.wide) > (positions + 250).to(self.dtype)[:, None, :, None]
        scores = torch.einsum("bshx,bthx->bhst", q, k).masked_fill(hidden, -math.inf)
        return torch.einsum("bhst,bthx->bshx", scores.softmax(-1), v)


@pytest.mark.parametrize(
    ("dtype", "wide", "matches"),
    [
        (torch.uint8, torch.int64, 1),  # which wraps, and is read as it does
        (torch.int32, torch.float32, 1),
        (torch.float32, torch.float32, 1),
        (torch.float16, torch.float32, 0),
    ],
)
def test_positions_are_those_that_are_compared(dtype, wide, matches):
    inputs = [tensor("q", 2, 3, 5, 8), tensor("k", 2, 270, 5, 8), tensor("v", 2, 270, 5, 8)]
    graph = module_graph(Cast(dtype, wide), *inputs, tensor("positions", 2, 3, dtype=torch.int64, upper=20))
    assert len(apply(FuseAttention(), graph).matches) == matches


class Added(nn.Module):
    """A mask that is added to scores of float32."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, q, k, v, positions):
        scores = torch.einsum("bshx,bthx->bhst", q, k) * 0.3
        hidden = torch.arange(k.shape[1]) > positions[:, None, :, None]
        return torch.einsum("bhst,bthx->bshx", (scores + self.mask(hidden)).softmax(-1), v)


def lowest(dtype):
    return lambda hidden: torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def added(mask):
    inputs = [tensor("q", 2, 3, 5, 8), tensor("k", 2, 7, 5, 8), tensor("v", 2, 7, 5, 8)]
    return module_graph(Added(mask), *inputs, tensor("positions", 2, 3, dtype=torch.int64, upper=7))


@pytest.mark.parametrize("mask", [lowest(torch.float32), lowest(torch.bfloat16)], ids=["float32", "bfloat16"])
def test_the_lowest_number_hides(mask):
    assert len(apply(FuseAttention(), added(mask)).matches) == 1


@pytest.mark.parametrize("mask", [lowest(torch.float16), lambda hidden: torch.where(hidden, -10000, 0)])
def test_numbers_that_scores_reach_do_not_hide(mask):
    outcome = apply(FuseAttention(), added(mask))
    assert not outcome.matches and "is not a mask of zero and −∞" in reasons(outcome)
