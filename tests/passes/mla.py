"""Small ways to write MLA that nobody's pass was written for, and its near misses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsv3_compile.tracing import Input, capture_module
from passes.base import Role
from passes.verify import clone


class Mla(nn.Module):
    """MLA over a given latent and rope key; `between` sits between up-projection and heads, `keys_out` leaks keys."""

    def __init__(
        self,
        heads: int = 3,
        nope: int = 10,
        rope: int = 6,
        value: int = 7,
        rank: int = 24,
        hidden: int = 20,
        between: Callable[[Tensor], Tensor] | None = None,
        keys_out: bool = False,
    ):
        super().__init__()
        self.heads, self.nope, self.rope, self.value = heads, nope, rope, value
        self.q_proj = nn.Linear(hidden, heads * (nope + rope), bias=False)
        self.kv_b_proj = nn.Linear(rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=False)
        self.between, self.keys_out = between, keys_out

    def forward(self, x_BSD: Tensor, positions_BS: Tensor, latent_BTC: Tensor, rope_key_BTR: Tensor):
        q = self.q_proj(x_BSD).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        kv = self.kv_b_proj(latent_BTC)
        if self.between is not None:
            kv = self.between(kv)
        k, v = kv.unflatten(-1, (self.heads, -1)).split([self.nope, self.value], -1)
        scores = self.scores(q_nope, torch.tanh(q_rope), k, rope_key_BTR)
        visible = torch.arange(latent_BTC.shape[1], device=x_BSD.device) <= positions_BS[:, :, None]
        shares = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1)
        out = self.o_proj(torch.einsum("bhst,bthv->bshv", shares, v).flatten(-2))
        return (out, k) if self.keys_out else out

    def scores(self, q_nope: Tensor, q_rope: Tensor, k: Tensor, rope_key: Tensor) -> Tensor:
        q = torch.cat([q_nope, q_rope], -1)
        k = torch.cat([k, rope_key[:, :, None].expand(-1, -1, self.heads, -1)], -1)
        return torch.einsum("bshx,bthx->bhst", q, k) * (self.nope + self.rope) ** -0.5


class HeadFirst(Mla):
    """Head-first layout, two products added, batched matmul, division by the root."""

    def scores(self, q_nope: Tensor, q_rope: Tensor, k: Tensor, rope_key: Tensor) -> Tensor:
        nope = torch.matmul(q_nope.transpose(1, 2), k.permute(0, 2, 3, 1))
        rope = torch.einsum("bshr,btr->bhst", q_rope, rope_key)
        return (nope + rope) / math.sqrt(self.nope + self.rope)


def inputs(hidden: int = 20, rank: int = 24, rope: int = 6, queries: int | str = 1) -> list[Input]:
    return [
        Input("x_BSD", Role.ACTIVATION, ("B", queries, hidden), torch.float32),
        Input("positions_BS", Role.ACTIVATION, ("B", queries), torch.int64, "T"),
        Input("latent_BTC", Role.CACHE, ("B", "T", rank), torch.float32),
        Input("rope_key_BTR", Role.CACHE, ("B", "T", rope), torch.float32),
    ]


def mla_graph(variant: type[Mla] = Mla, queries: int | str = 1, **options: Any) -> fx.GraphModule:
    """One of the hand-written attentions as a graph; `options` are its sizes."""
    return clone(_captured_mla(variant, queries, tuple(sorted(options.items()))))


@functools.cache
def _captured_mla(variant: type[Mla], queries: int | str, options: tuple[tuple[str, Any], ...]) -> fx.GraphModule:
    sizes = {name: size for name, size in options if name in ("hidden", "rank", "rope")}
    return capture_module(variant(**dict(options)), inputs(queries=queries, **sizes))
