"""Experts that a module writes for the chosen pairs become grouped products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.fuse_experts import FuseExperts
from passes.fuse_swiglu import FuseSwiglu
from passes.group_experts import GroupExperts
from tests.passes.capture import CONTEXT, graph_of, tensor
from tests.passes.harness import certified, count, untouched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

E, K, D, I = 7, 2, 6, 5  # noqa: E741

# Grouped products that nobody here has heard of: one that is what it looks like, and one that is not.
LIBRARY = torch.library.Library("zoo", "DEF")
LIBRARY.define("add_to_rows(Tensor out, Tensor index, Tensor src) -> Tensor")
LIBRARY.define("put_into_rows(Tensor out, Tensor index, Tensor src) -> Tensor")
for name in ("add_to_rows", "put_into_rows"):
    torch.library.register_fake(f"zoo::{name}", lambda out, index, src: torch.empty_like(out), lib=LIBRARY)
LIBRARY.impl("add_to_rows", lambda out, index, src: out.scatter_add(0, index, src), "CompositeExplicitAutograd")
LIBRARY.impl("put_into_rows", lambda out, index, src: out.scatter(0, index, src), "CompositeExplicitAutograd")
for name in ("multiply_groups", "multiply_groups_backwards"):
    LIBRARY.define(f"{name}(Tensor a, Tensor b, Tensor offs) -> Tensor")
    torch.library.register_fake(f"zoo::{name}", lambda a, b, offs: a.new_empty(a.shape[0], b.shape[2]), lib=LIBRARY)


def groups(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    ends = [0, *offs.tolist()]
    return torch.cat([a[ends[e] : ends[e + 1]] @ b[e] for e in range(len(b))])


LIBRARY.impl("multiply_groups", groups, "CompositeExplicitAutograd")
LIBRARY.impl("multiply_groups_backwards", lambda a, b, offs: groups(a, b.flip(0), offs), "CompositeExplicitAutograd")
multiply_groups = torch.ops.zoo.multiply_groups


class Layer(nn.Module):
    """A routed layer whose experts are given as a function of (module, x, indices, weights)."""

    def __init__(self, experts: Callable[..., Tensor], indices: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.experts, self.indices = experts, indices or (lambda scores: scores.topk(K, -1).indices)
        self.router, self.other = nn.Parameter(torch.empty(E, D)), nn.Parameter(torch.empty(E, D))
        self.gate_up, self.down = nn.Parameter(torch.empty(E, 2 * I, D)), nn.Parameter(torch.empty(E, D, I))
        self.up_t, self.down_t = nn.Parameter(torch.empty(E, D, 2 * I)), nn.Parameter(torch.empty(E, I, D))
        self.b1, self.b2, self.scale = (nn.Parameter(torch.empty(s)) for s in ((E, 2 * I), (E, D), (E,)))
        self.norm = nn.Parameter(torch.empty(D))

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.router).sigmoid()
        indices = self.indices(scores)
        return self.experts(self, x, indices, scores.gather(-1, indices))


def graph_with(experts, indices=None, shape=("B", D)):
    return graph_of(Layer(experts, indices), [tensor("x", *shape)])


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def ends(ids: Tensor) -> Tensor:
    return torch.histc(ids.float(), bins=E, min=0, max=E - 1).cumsum(0).to(torch.int32)


def bmm(weight: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)


# ---- weights gathered for every pair


def gathered_and_batched(m, x, indices, weights):
    ids = indices.reshape(-1)
    h = swiglu(bmm(m.gate_up[ids], x.repeat_interleave(K, 0)))
    y = bmm(m.down[ids], h) * weights.reshape(-1).unsqueeze(-1)
    return y.view(x.shape[0], K, D).sum(1)


def gathered_with_einsum(m, x, indices, weights):
    h = swiglu(torch.einsum("nkid,nd->nki", m.gate_up[indices], x))
    return torch.einsum("nki,nkdi,nk->nd", h, m.down[indices], weights)


def gathered_with_matmul(m, x, indices, weights):
    h = swiglu((m.gate_up[indices] @ x[:, None, :, None]).squeeze(-1))
    y = (m.down[indices] @ h.unsqueeze(-1)).squeeze(-1)
    return (weights.unsqueeze(1) @ y).squeeze(1)


def gathered_transposed(m, x, indices, weights):
    ids = torch.flatten(indices)
    rows = x[:, None].expand(-1, K, -1).reshape(-1, D)
    h = swiglu(torch.bmm(rows.unsqueeze(1), m.up_t.index_select(0, ids)).squeeze(1))
    y = torch.einsum("md,mdo->mo", h, m.down_t[ids])
    return torch.sum(y.unflatten(0, indices.shape) * weights[..., None], dim=1)


def added_to_the_tokens(m, x, indices, weights):
    token = torch.arange(x.shape[0]).repeat_interleave(K)
    ids = indices.flatten()
    y = bmm(m.down[ids], swiglu(bmm(m.gate_up[ids], x[token])))
    return torch.zeros_like(x).index_add(0, token, y * weights.flatten()[:, None])


def scores_before_the_last_product(m, x, indices, weights):
    h = swiglu(torch.einsum("nkid,nd->nki", m.gate_up[indices], x)) * weights.unsqueeze(-1) * 2.5
    return torch.einsum("nki,nkdi->nd", h, m.down[indices])


# ---- pairs sorted by expert


def sorted_and_grouped(m, x, indices, weights):
    ids, order = indices.reshape(-1).sort()
    offsets = ends(ids)
    h = swiglu(multiply_groups(x[order // K], m.gate_up.transpose(1, 2), offsets))
    y = multiply_groups(h, m.down.transpose(1, 2), offsets) * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return y[back].view(x.shape[0], K, D).sum(1)


def sorted_back_by_argsort(m, x, indices, weights):
    order = indices.flatten().argsort(stable=True)
    offsets = F.one_hot(indices, E).sum((0, 1)).cumsum(0).to(torch.int32)
    h = swiglu(multiply_groups(x.repeat_interleave(K, 0)[order], m.up_t, offsets))
    y = multiply_groups(h, m.down_t, offsets)[order.argsort()]
    return (y.view(-1, K, D) * weights.unsqueeze(-1)).sum(1)


def written_back_into_place(m, x, indices, weights):
    ids, order = indices.flatten().sort()
    offsets = torch.searchsorted(ids, torch.arange(E), right=True)
    y = multiply_groups(swiglu(multiply_groups(x[order // K], m.up_t, offsets)), m.down_t, offsets)
    pairs = torch.empty_like(y)
    pairs[order] = y
    return torch.einsum("nkd,nk->nd", pairs.view(*indices.shape, -1), weights)


def sorted_and_added(m, x, indices, weights):
    order = indices.flatten().argsort()
    token = order // K
    offsets = (indices.unsqueeze(-1) == torch.arange(E)).sum((0, 1)).cumsum(0)
    y = multiply_groups(swiglu(multiply_groups(x[token], m.up_t, offsets)), m.down_t, offsets)
    rows = token[:, None].expand(-1, D)
    return torch.zeros_like(x).scatter_add(0, rows, y * weights.flatten()[order][:, None])


def counted_by_a_mask(m, x, indices, weights):
    chosen = torch.zeros(x.shape[0], E, dtype=torch.bool).scatter(-1, indices, True)
    order = indices.flatten().argsort(stable=True)
    offsets = chosen.sum(0).cumsum(0, dtype=torch.int32)
    y = multiply_groups(swiglu(multiply_groups(x[order // K], m.up_t, offsets)), m.down_t, offsets)
    return torch.zeros_like(x).index_add(0, order // K, y * weights.flatten()[order][:, None])


def added_by_a_library(m, x, indices, weights, add=torch.ops.zoo.add_to_rows):
    order = indices.flatten().argsort(stable=True)
    offsets = ends(indices.flatten())
    y = multiply_groups(swiglu(multiply_groups(x[order // K], m.up_t, offsets)), m.down_t, offsets)
    rows = (order // K).reshape(-1, 1).expand(-1, D)
    return add(torch.zeros_like(x), rows, src=y * weights.flatten()[order][:, None])


SWIGLU = [
    gathered_and_batched, gathered_with_einsum, gathered_with_matmul, gathered_transposed, added_to_the_tokens,
    scores_before_the_last_product, sorted_and_grouped, sorted_back_by_argsort, written_back_into_place,
    sorted_and_added, counted_by_a_mask, added_by_a_library,
]  # fmt: skip


@pytest.mark.parametrize("experts", SWIGLU)
def test_every_way_to_write_a_swiglu_is_one_op(experts):
    graph = graph_with(experts)
    outcome = certified(GroupExperts(), graph)
    assert len(outcome.matches) == 1 and not outcome.refusals
    FuseSwiglu().run(graph, CONTEXT)
    assert len(certified(FuseExperts(), graph).matches) == 1
    assert count(graph, dsv3.routed_swiglu) == 1
    assert count(graph, multiply_groups, aten.index, aten.sort, aten.argsort, aten.bmm, aten.einsum) == 0


def test_what_was_widened_for_the_weights_alone_is_not():
    def experts(m, x, indices, weights):
        order = indices.flatten().argsort(stable=True)
        h = swiglu(multiply_groups(x[order // K], m.up_t, ends(indices.flatten())))
        y = multiply_groups(h, m.down_t, ends(indices.flatten()))
        y = (y.float() * weights.float().flatten()[order][:, None]).to(x.dtype)
        return torch.zeros_like(x).index_add(0, order // K, y)

    graph = graph_of(Layer(experts).to(torch.bfloat16), [tensor("x", "B", D, dtype=torch.bfloat16)])
    assert len(certified(GroupExperts(), graph).matches) == 1
    FuseSwiglu().run(graph, CONTEXT)
    assert len(certified(FuseExperts(), graph).matches) == 1


# ---- experts of other kinds


def per_expert_bias(m, x, indices, weights):
    ids = indices.flatten()
    h = F.gelu(bmm(m.gate_up[ids], x.repeat_interleave(K, 0)) + m.b1[ids])[:, :I]
    y = (bmm(m.down[ids], h) + m.b2[ids]) * weights.view(-1, 1)
    return y.view(-1, K, D).sum(1)


def per_expert_bias_sorted(m, x, indices, weights):
    ids, order = indices.flatten().sort()
    h = multiply_groups(x[order // K], m.up_t, ends(ids)) + m.b1[ids]
    y = multiply_groups(h[:, :I].relu() * h[:, I:], m.down_t, ends(ids)) + m.b2[ids]
    return torch.zeros_like(x).index_add(0, order // K, y * weights.flatten()[order].unsqueeze(-1))


def per_expert_scale(m, x, indices, weights):
    h = torch.einsum("nkid,nd->nki", m.gate_up[indices], x)[..., :I].tanh()
    return torch.einsum("nki,nkdi,nk,nk->nd", h, m.down[indices], weights, m.scale[indices])


def normalised_experts(m, x, indices, weights):
    h = swiglu(torch.einsum("nkid,nd->nki", m.gate_up[indices], x))
    y = torch.einsum("nki,nkdi->nkd", h, m.down[indices])
    y = y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) * m.norm
    return (y * weights.unsqueeze(-1)).sum(1)


def scores_on_the_input(m, x, indices, weights):
    rows = x.unsqueeze(1) * weights.unsqueeze(-1)
    return torch.einsum(
        "nki,nkdi->nd", swiglu(torch.einsum("nkid,nkd->nki", m.gate_up[indices], rows)), m.down[indices]
    )


def added_to_a_shared_expert(m, x, indices, weights):
    shared, token = F.linear(x, m.other[:D]), torch.arange(x.shape[0]).repeat_interleave(K)
    y = bmm(m.down[indices.flatten()], swiglu(bmm(m.gate_up[indices.flatten()], x[token])))
    return shared.index_add(0, token, y * weights.view(-1, 1))


@pytest.mark.parametrize(
    "experts",
    [per_expert_bias, per_expert_bias_sorted, per_expert_scale, normalised_experts, scores_on_the_input,
     added_to_a_shared_expert],
)  # fmt: skip
def test_biases_scales_norms_and_other_activations_keep_the_grouped_form(experts):
    graph = graph_with(experts)
    outcome = certified(GroupExperts(), graph)
    assert len(outcome.matches) == 1 and not outcome.refusals
    assert count(graph, dsv3.grouped_linear) == 2 and count(graph, dsv3.combine_pairs) == 1
    assert count(graph, multiply_groups, aten.bmm, aten.einsum) == 0


@pytest.mark.parametrize("experts", [gathered_and_batched, sorted_and_grouped])
def test_one_token_and_rows_of_tokens(experts):
    def rows(m, x, indices, weights):
        flat = experts(m, x.view(-1, D), indices.view(-1, K), weights.view(-1, K))
        return flat.view(x.shape)

    for shape in ((1, D), (1, 1, D), ("B", "S", D)):
        graph = graph_with(rows if len(shape) > 2 else experts, shape=shape)
        assert len(certified(GroupExperts(), graph).matches) == 1


class Picked(nn.Module):
    """What a top-k chose picks matrices."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.empty(E, D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.stack.index_select(0, x.topk(1, -1).indices.flatten())


@pytest.mark.parametrize("shape", [(), ("B", 2, 1, 1, 2, E)], ids=["none", "five"])
def test_more_token_axes_than_letters_and_none(shape):
    assert untouched(GroupExperts(), graph_of(Picked(), [tensor("x", *shape)])) == ""


def squeezed_and_summed(m, x, indices, weights):
    ids = indices.squeeze(-1)
    y = bmm(m.down[ids], swiglu(bmm(m.gate_up[ids], x)))
    return torch.einsum("nkd,nk->nd", y.unsqueeze(1), weights)


def sorted_without_division(m, x, indices, weights):
    ids, order = indices.flatten().sort()
    y = multiply_groups(swiglu(multiply_groups(x[order], m.up_t, ends(ids))), m.down_t, ends(ids))
    return torch.zeros_like(x).index_add(0, order, y * weights.flatten()[order].unsqueeze(-1))


@pytest.mark.parametrize("experts", [*SWIGLU, squeezed_and_summed, sorted_without_division])
@pytest.mark.parametrize("tokens", ["B", 1])
def test_of_one_expert_per_token_the_pairs_are_the_tokens(experts, tokens, monkeypatch):
    monkeypatch.setitem(globals(), "K", 1)
    graph = graph_with(experts, shape=(tokens, D))
    outcome = certified(GroupExperts(), graph)
    assert len(outcome.matches) == 1 and not outcome.refusals
    FuseSwiglu().run(graph, CONTEXT)
    assert len(certified(FuseExperts(), graph).matches) == 1
    assert count(graph, multiply_groups, aten.index, aten.sort, aten.argsort, aten.bmm, aten.einsum) == 0


# ---- any mixture of all that


ROWS = {
    "repeated": lambda x: x.repeat_interleave(K, 0),
    "expanded": lambda x: x[:, None].expand(-1, K, -1).reshape(-1, D),
    "picked": lambda x: x[torch.arange(x.shape[0] * K) // K],
}
PRODUCTS = {  # weight [M, O, I], rows [M, I]
    "bmm": bmm,
    "matmul": lambda w, h: (h[:, None] @ w.transpose(1, 2))[:, 0],
    "einsum": lambda w, h: torch.einsum("moi,mi->mo", w, h),
}
PICKS = {"indexed": lambda w, ids: w[ids], "selected": lambda w, ids: torch.index_select(w, 0, ids)}
SUMS = {
    "sum": lambda y, x: y.view(-1, K, D).sum(1),
    "einsum": lambda y, x: torch.einsum("nkd->nd", y.unflatten(0, (-1, K))),
    "added": lambda y, x: torch.zeros_like(x).index_add(0, torch.arange(x.shape[0] * K) // K, y),
}


@given(
    rows=st.sampled_from(sorted(ROWS)), product=st.sampled_from(sorted(PRODUCTS)), pick=st.sampled_from(sorted(PICKS)),
    total=st.sampled_from(sorted(SUMS)), transposed=st.booleans(), split=st.booleans(), ordered=st.booleans(),
    early=st.booleans(),
)  # fmt: skip
@settings(max_examples=8)
def test_any_mixture_matches(rows, product, pick, total, transposed, split, ordered, early):
    def experts(m, x, indices, weights):
        ids, scores, values = indices.flatten(), weights.reshape(-1, 1), ROWS[rows](x)
        order = ids.argsort()
        if ordered:
            ids, scores, values = ids[order], scores[order], values[order]
        gate_up = PICKS[pick](m.up_t, ids).transpose(1, 2) if transposed else PICKS[pick](m.gate_up, ids)
        if split:
            h = F.silu(PRODUCTS[product](gate_up[:, :I], values)) * PRODUCTS[product](gate_up[:, I:], values)
        else:
            h = swiglu(PRODUCTS[product](gate_up, values))
        y = PRODUCTS[product](PICKS[pick](m.down, ids), scores * h if early else h)
        y = y if early else scores * y
        return SUMS[total](y[order.argsort()] if ordered else y, x)

    graph = graph_with(experts)
    assert len(certified(GroupExperts(), graph, seeds=(0,)).matches) == 1
    assert count(graph, dsv3.grouped_linear) == (3 if split else 2)
    assert count(graph, aten.bmm, aten.matmul, aten.einsum) == 0


# ---- near misses


def sorted_by(indices_of, scores_of=None, counted=None, most=None, multiply=multiply_groups):
    """`sorted_and_added` with one part taken from elsewhere."""

    def experts(m, x, indices, weights):
        others = F.linear(x, m.other).topk(K, -1).indices
        ids, order = indices_of(indices, others).flatten().sort()
        by = order if scores_of is None else scores_of(indices, others).flatten().argsort()
        offsets = ends(indices if counted is None else counted(indices, others))
        offsets = offsets if most is None else offsets.clamp(max=most)
        y = multiply(swiglu(multiply(x[order // K], m.up_t, offsets)), m.down_t, offsets)
        return torch.zeros_like(x).index_add(0, order // K, y * weights.flatten()[by].unsqueeze(-1))

    return experts


def hidden_used_elsewhere(m, x, indices, weights):
    h = swiglu(torch.einsum("nkid,nd->nki", m.gate_up[indices], x))
    return torch.einsum("nki,nkdi,nk->nd", h, m.down[indices], weights) + h.sum((1, 2))[:, None]


def softmax_over_the_chosen(m, x, indices, weights):
    h = torch.einsum("nkid,nd->nki", m.gate_up[indices], x)[..., :I].softmax(1)
    return torch.einsum("nki,nkdi,nk->nd", h, m.down[indices], weights)


def never_summed(m, x, indices, weights):
    return torch.einsum("nki,nkdi,nk->nkd", swiglu(torch.einsum("nkid,nd->nki", m.gate_up[indices], x)),
                        m.down[indices], weights)  # fmt: skip


def clamped_indices(m, x, indices, weights):
    return gathered_with_einsum(m, x, indices.clamp(0, E - 2), weights)


def rows_left_sorted(m, x, indices, weights):
    ids, order = indices.flatten().sort()
    y = multiply_groups(swiglu(multiply_groups(x[order // K], m.up_t, ends(ids))), m.down_t, ends(ids))
    return (y.view(-1, K, D) * weights.unsqueeze(-1)).sum(1)


def weights_multiplied_by_hand(m, x, indices, weights):
    h = swiglu((m.gate_up[indices] * x[:, None, None]).sum(-1))
    return torch.einsum("nki,nkdi,nk->nd", h, m.down[indices], weights)


def put_by_a_library(m, x, indices, weights):
    return added_by_a_library(m, x, indices, weights, torch.ops.zoo.put_into_rows)


def every_expert_in_turn(m, x, indices, weights):
    scores = torch.zeros(x.shape[0], E).scatter(-1, indices, weights)
    return sum(scores[:, e, None] * F.linear(swiglu(F.linear(x, m.gate_up[e])), m.down[e]) for e in range(E))


def every_expert_where_it_was_chosen(m, x, indices, weights):
    y = torch.zeros_like(x)
    for e in range(E):
        y = y + F.linear(swiglu(F.linear(x, m.gate_up[e])), m.down[e]) * (weights * (indices == e)).sum(-1, True)
    return y


def first(indices, others):
    return indices


def second(indices, others):
    return others


def results_picked(m, x, indices, weights):
    results = torch.einsum("nef,exf->nex", swiglu(torch.einsum("nd,efd->nef", x, m.gate_up)), m.down)
    return (results.gather(1, indices[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1)


APART = f"{E} experts are computed one by one: multiply all at once, by one stack"
NEAR_MISSES = {
    "used-elsewhere": (hidden_used_elsewhere, "mul is used by sum as well"),
    "softmax": (softmax_over_the_chosen, "softmax may look at several pairs at once"),
    "not-summed": (never_summed, "nothing sums index over its experts"),
    "clamped": (clamped_indices, "index picks by clamp: no number of a chosen expert, a token or a pair in this order"),
    "left-sorted": (rows_left_sorted, "the rows of multiply_groups are used without being sorted back"),
    "put": (put_by_a_library, "nothing sums multiply_groups over its experts"),
    "by-hand": (weights_multiplied_by_hand, "gate_up is copied for every pair before it is multiplied"),
    "in-turn": (every_expert_in_turn, APART),
    "results": (results_picked, "gather picks from the results of all experts: pick weights, or sum with a gate"),
    "where-chosen": (every_expert_where_it_was_chosen, APART),
    "offsets-of-another": (
        sorted_by(first, counted=second),
        "the rows of multiply_groups are not sorted by the experts that its offsets count",
    ),
    "order-of-another": (
        sorted_by(second),
        "the rows of multiply_groups are not sorted by the experts that its offsets count",
    ),
    "scores-of-another": (
        sorted_by(first, scores_of=second),
        "index picks by argsort: no number of a chosen expert, a token or a pair in this order",
    ),
    "wrong-offsets": (sorted_by(first, most=3), "the offsets clamp do not count getitem"),
    "another-op": (sorted_by(first, multiply=torch.ops.zoo.multiply_groups_backwards), ""),
}  # fmt: skip


@pytest.mark.parametrize(("experts", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
@pytest.mark.parametrize("top_k", [K, 1])
def test_near_misses(experts, reason, top_k, monkeypatch):
    monkeypatch.setitem(globals(), "K", top_k)
    assert untouched(GroupExperts(), graph_with(experts)) == reason


def test_indices_that_no_top_k_chose_may_point_outside_the_experts():
    def hashed(scores):
        return (scores[:, :K] * 1000).to(torch.int64) % E

    assert untouched(GroupExperts(), graph_with(gathered_and_batched, hashed)) == ""
    refusal = untouched(GroupExperts(), graph_with(sorted_by(first), hashed))
    assert refusal == "what _to_copy counts was not chosen by a top-k"
