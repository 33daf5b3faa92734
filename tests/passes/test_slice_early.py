"""Slices are taken before the ops whose results they are of."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.base import is_call, shape_of
from passes.cuts import Cut, through_view
from passes.slice_early import SliceEarly
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, reasons

D, HEADS, EXPERTS, WIDTH = 12, 3, 5, 6
dsv3 = torch.ops.dsv3


class Then(nn.Module):
    """A function of x and some weights, and what of its result is asked for."""

    def __init__(self, function: Callable[..., Tensor], asked: Callable[[Tensor], Tensor] = lambda y: y[:, -1:]):
        super().__init__()
        self.function, self.asked = function, asked
        self.square, self.other = nn.Linear(D, D, bias=False), nn.Linear(D, D)
        self.norm = nn.Parameter(torch.empty(D))
        self.gate_up = nn.Parameter(torch.empty(EXPERTS, 2 * WIDTH, D))
        self.down = nn.Parameter(torch.empty(EXPERTS, D, WIDTH))
        self.router = nn.Linear(D, EXPERTS, bias=False)

    def forward(self, x):
        return self.asked(self.function(self, x))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attention(own: Then, x: Tensor, causal: bool = True, mask: bool = False) -> Tensor:
    keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if mask else None
    y = F.scaled_dot_product_attention(heads(own.square(x)), heads(own.other(x)), heads(x), keep, is_causal=causal)
    return own.square(y.transpose(1, 2).flatten(2))


def experts(own: Then, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, D)
    indices, weights = dsv3.route(own.router(tokens), None, "softmax", 2, 1, 1, "max", 0.0, True, 0.0, 1.0)
    return dsv3.routed_swiglu(tokens, indices, weights, own.gate_up, own.down).view(x.shape)


def layer(own: Then, x: Tensor) -> Tensor:
    x = x + attention(own, F.rms_norm(x, (D,), own.norm))
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * own.norm
    return x + experts(own, y) + own.other(F.silu(own.square(y)))


CHAINS: dict[str, Callable[[Then, Tensor], Tensor]] = {
    "layer": layer,
    "attention": attention,
    "all_to_all": lambda own, x: attention(own, x, causal=False),
    "masked": lambda own, x: attention(own, x, causal=False, mask=True),
    "experts": experts,
    "mask_of_rows": lambda own, x: own.square(x).masked_fill(x.sum(-1, keepdim=True) > 0, 0.5),
    "matmul": lambda own, x: torch.matmul(own.square(x), own.norm.expand(D, D)),
    "addmm": lambda own, x: torch.addmm(own.norm, own.square(x).flatten(0, 1), own.other.weight).view(x.shape),
    "einsum": lambda own, x: torch.einsum("bsd,ed->bse", own.square(x), own.other.weight),
    "parts": lambda own, x: torch.cat(own.square(x).split([4, 8], -1)[::-1], -1),
    "softmax": lambda own, x: own.square(x).softmax(-1).topk(4, -1).values,
    "permuted": lambda own, x: own.square(x).permute(2, 0, 1).unsqueeze(0).squeeze(0).permute(1, 2, 0),
    "norms": lambda own, x: F.layer_norm(dsv3.rms_norm(own.square(x), own.norm, 1e-6), (D,), own.norm),
    "sum_and_norm": lambda own, x: sum(dsv3.add_rms_norm(own.square(x), x, own.norm, 1e-6)),
    "repeated": lambda own, x: own.square(x).unsqueeze(2).expand(-1, -1, 3, -1).flatten(2),
}


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_products_are_of_what_is_asked_for(chain: str, free: bool) -> None:
    graph = module_graph(Then(CHAINS[chain]), tensor("x", 3, "S" if free else 9, D))
    outcome = apply(SliceEarly(), graph, "any")
    assert len(outcome.matches) == 1 and not outcome.refusals
    keys = 1 if chain in ("attention", "all_to_all", "masked", "layer") else 0  # of every position
    products = [node for node in graph.graph.nodes if is_call(node, torch.ops.aten.linear)]
    assert products and sum(shape_of(node)[:-1] not in ((3, 1), (3,)) for node in products) == keys


@pytest.mark.parametrize(
    "asked",
    [lambda y: y[:, -1], lambda y: y[:, 0], lambda y: y[:, 2:4], lambda y: y[:, -3:], lambda y: y[1:2]],
    ids=["last", "first", "some", "several", "row"],
)
def test_any_slice_or_selection(asked) -> None:
    graph = module_graph(
        Then(lambda own, x: own.other(F.silu(experts(own, own.square(x)))), asked), tensor("x", 3, 9, D)
    )
    assert len(apply(SliceEarly(), graph, "any").matches) == 1


def test_two_slices_of_the_same_places_are_one() -> None:
    def twice(own: Then, x: Tensor) -> Tensor:
        y = own.square(x)
        return torch.cat([y[:, -1:], own.other(y)[:, -1:]], 1)

    graph = module_graph(Then(twice, lambda y: y), tensor("x", "B", "S", D))
    assert len(apply(SliceEarly(), graph, "any").matches) == 2
    sizes = [shape_of(node)[1] for node in graph.graph.nodes if is_call(node, torch.ops.aten.linear)]
    assert sizes == [1, 1]


REFUSED: dict[str, tuple[Callable[[Then, Tensor], Tensor], str]] = {
    "read_whole": (lambda own, x: torch.cat([(y := own.square(x))[:, -1:], y.sum(1, keepdim=True)], 1), "reads other"),
    "other_places": (lambda own, x: (y := own.square(x))[:, -1:] + y[:, :1], "reads other parts of linear"),
    "mixed": (lambda own, x: own.square(x).cumsum(1)[:, -1:], "does not keep what lies along dim 1 apart"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_needed_whole_stays(case: str) -> None:
    function, reason = REFUSED[case]
    graph = module_graph(Then(function, lambda y: y), tensor("x", "B", "S", D))
    before = str(graph.graph)
    outcome = apply(SliceEarly(), graph, "any")
    assert reason in reasons(outcome) and not outcome.matches and str(graph.graph) == before


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x: F.silu(x)[:, -1:],
        lambda own, x: own.square(x)[:, 1:],
        lambda own, x: own.square(x)[..., :4],
        lambda own, x: own.square(F.dropout(x, 0.5, training=True)).mul(0)[:, :0],
        lambda own, x: (own.square.weight @ own.other.weight)[:3] @ x.transpose(1, 2),
    ],
    ids=["no_product", "most", "columns", "nothing", "weights"],
)
def test_nothing_is_said_where_nothing_is_gained(function) -> None:
    graph = module_graph(Then(function, lambda y: y), tensor("x", 3, 9, D))
    outcome = apply(SliceEarly(), graph, "any")
    assert not outcome.refusals


def test_the_last_of_fewer_queries_than_keys_is_not_causal_in_its_place() -> None:
    def shifted(own: Then, x: Tensor) -> Tensor:
        q, k = heads(own.square(x)[:, :4]), heads(x)
        return own.other(F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2).flatten(2))

    graph = module_graph(Then(shifted), tensor("x", 3, 9, D))
    apply(SliceEarly(), graph, "any")  # certified: such a query sees four keys
    (kept,) = [node for node in graph.graph.nodes if is_call(node, torch.ops.aten.scaled_dot_product_attention)]
    assert shape_of(kept)[2] == 4


STEPS: list[Callable[[Then, Tensor], Tensor]] = [
    lambda own, x: own.square(x),
    lambda own, x: x + own.other(x),
    lambda own, x: F.silu(x) * x,
    lambda own, x: x.flatten(0, 1).relu().view(x.shape),
    lambda own, x: x.transpose(1, 2).exp().neg().transpose(1, 2),
    lambda own, x: x.unflatten(2, (3, 4)).mean(2, keepdim=True).expand(-1, -1, 3, -1).flatten(2),
    lambda own, x: torch.cat([x[..., 6:], x[..., :6]], -1),
    lambda own, x: x - x.amax(-1, keepdim=True),
    lambda own, x: x + x.mean((0, 1)),
    lambda own, x: x.flip(1) if x.shape[1] > 99 else x.cumsum(0),
    experts,
    attention,
    lambda own, x: x.softmax(1),
    lambda own, x: x.reshape(x.shape[0] * x.shape[1], 1, D).sigmoid().reshape(x.shape),
]


@pytest.mark.parametrize("seed", range(16))
def test_chains_drawn_at_random_stay_what_they_are(seed: int) -> None:
    draw = random.Random(seed)
    steps = [draw.choice(STEPS) for _ in range(draw.randint(3, 7))]

    def chain(own: Then, x: Tensor) -> Tensor:
        for step in steps:
            x = step(own, x)
        return x

    asked = draw.choice([lambda y: y[:, -1:], lambda y: y[:, 3], lambda y: y[1:2], lambda y: y[:, :2]])
    graph = module_graph(Then(chain, asked), tensor("x", 4, 9, D))
    before = asked(torch.empty(4, 9, D)).shape
    apply(SliceEarly(), graph, "any")
    (result,) = graph.graph.output_node().args[0]
    assert shape_of(result) == before


@pytest.mark.parametrize(
    "given, result, cut, expected",
    [
        ((6, 7), (2, 3, 7), Cut(1, 1, 2), Cut(0, 1, 2, (2, 3), 1)),
        ((2, 3, 7), (6, 7), Cut(0, 1, 2, (2, 3), 1), Cut(1, 1, 2)),
        ((6, 7), (6, 7, 1), Cut(0, 1, 2, (2, 3), 1), Cut(0, 1, 2, (2, 3), 1)),
        ((1, 3, 7), (3, 7), Cut(0, 1, 2), Cut(1, 1, 2)),
        ((3, 7), (3, 1, 7), Cut(2, 1, 2), Cut(1, 1, 2)),
        ((2, 3, 8), (2, 3, 4, 2), Cut(1, 1, 2), Cut(1, 1, 2)),
        ((6, 4), (4, 6), Cut(0, 1, 2), None),
        ((2, 3), (6,), Cut(0, 1, 2), None),
        ((3, 2), (6,), Cut(0, 1, 2, (2, 3), 1), None),
    ],
)
def test_cuts_are_followed_through_views(given, result, cut, expected) -> None:
    assert through_view(cut, given, result) == expected
    if expected is not None:
        x = torch.arange(torch.Size(given).numel()).view(given)
        assert torch.equal(_taken(x.view(result), cut).flatten(), _taken(x, expected).flatten())


def _taken(x: Tensor, cut: Cut) -> Tensor:
    if not cut.sizes:
        return x.narrow(cut.dim, cut.start, cut.length)
    return x.unflatten(cut.dim, cut.sizes).narrow(cut.dim + cut.inner, cut.start, cut.length)
