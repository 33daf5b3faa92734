"""Ways in which people write MLA, each a decode step over given caches.

B batch · S queries · T cached · D hidden · H heads · G groups · C latent rank · R rope width · N width without rope
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_compile.tracing import Input
from passes.base import Role

HIDDEN, HEADS, NOPE, ROPE, VALUE, RANK = 20, 3, 10, 6, 7, 24
WIDTH = NOPE + ROPE


def inputs(
    queries: int | str = 1, dtype: torch.dtype = torch.float32, batch: int | str = 2, cached: int | str = 33
) -> list[Input]:
    """Numbers of sizes, or letters for free ones."""
    return [
        Input("x_BSD", Role.ACTIVATION, (batch, queries, HIDDEN), dtype),
        Input("positions_BS", Role.ACTIVATION, (batch, queries), torch.int64, cached),
        Input("latent_BTC", Role.CACHE, (batch, cached, RANK), dtype),
        Input("rope_key_BTR", Role.CACHE, (batch, cached, ROPE), dtype),
    ]


def causal(positions_BS: Tensor, latent_BTC: Tensor) -> Tensor:
    """[B, 1, S, T]: what a query sees."""
    return (torch.arange(latent_BTC.shape[1]) <= positions_BS[:, :, None])[:, None]


class HeadFirst(nn.Module):
    """As transformers has it: heads first, a fused up-projection, the rope key expanded, fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * WIDTH, bias=False)
        self.kv_b_proj = nn.Linear(RANK, HEADS * (NOPE + VALUE), bias=False)
        self.o_proj = nn.Linear(HEADS * VALUE, HIDDEN, bias=False)

    def queries(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, S, N], and [B, H, S, R] as if rotated"""
        q = self.q_proj(x_BSD).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        q_nope, q_rope = q.split([NOPE, ROPE], -1)
        return q_nope, torch.tanh(q_rope)

    def keys_and_values(self, latent_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, T, N] and [B, H, T, V]"""
        kv = self.kv_b_proj(latent_BTC).unflatten(-1, (HEADS, NOPE + VALUE)).transpose(1, 2)
        k, v = kv.split([NOPE, VALUE], -1)
        return k, v

    def rope_keys(self, rope_key_BTR: Tensor) -> Tensor:
        """[B, H, T, R]"""
        return rope_key_BTR[:, None].expand(-1, HEADS, -1, -1)

    def mask(self, positions_BS: Tensor, latent_BTC: Tensor) -> Tensor | None:
        return causal(positions_BS, latent_BTC)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, S, V]"""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def forward(self, x_BSD: Tensor, positions_BS: Tensor, latent_BTC: Tensor, rope_key_BTR: Tensor) -> Tensor:
        q_nope, q_rope = self.queries(x_BSD)
        k_nope, v = self.keys_and_values(latent_BTC)
        q, k = torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, self.rope_keys(rope_key_BTR)], -1)
        out = self.attend(q, k, v, self.mask(positions_BS, latent_BTC))
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FilledBuffers(HeadFirst):
    """Queries and keys written slice by slice into new tensors, the rope key broadcast by the assignment."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q_nope, q_rope = self.queries(x_BSD)
        k_nope, v = self.keys_and_values(latent_BTC)
        q, k = q_nope.new_empty(*q_nope.shape[:3], WIDTH), k_nope.new_empty(*k_nope.shape[:3], WIDTH)
        q[..., :NOPE], q[..., NOPE:] = q_nope, q_rope
        k[..., :NOPE], k[..., NOPE:] = k_nope, rope_key_BTR[:, None]
        out = self.attend(q, k, v, self.mask(positions_BS, latent_BTC))
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SequenceFirst(HeadFirst):
    """The sequence before the heads, einsums, a softmax in float32 over [B, S, H, T], as DeepSeek's own code has it."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q = torch.cat([part.transpose(1, 2) for part in self.queries(x_BSD)], -1)
        kv = self.kv_b_proj(latent_BTC).view(*latent_BTC.shape[:2], HEADS, NOPE + VALUE)
        k_nope, v = torch.split(kv, [NOPE, VALUE], dim=-1)
        k = torch.cat([k_nope, rope_key_BTR[:, :, None].expand(-1, -1, HEADS, -1)], -1)
        scores = torch.einsum("bshd,bthd->bsht", q, k) * WIDTH**-0.5
        hidden = ~causal(positions_BS, latent_BTC).transpose(1, 2)
        shares = scores.masked_fill(hidden, -math.inf).softmax(-1, dtype=torch.float32).type_as(x_BSD)
        return self.o_proj(torch.einsum("bsht,bthd->bshd", shares, v).flatten(2))


class AlreadyAbsorbed(HeadFirst):
    """DeepSeek's other way: the up-projection in the query and behind the shares."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q_nope, q_rope = (part.transpose(1, 2) for part in self.queries(x_BSD))
        up_HYC = self.kv_b_proj.weight.view(HEADS, NOPE + VALUE, RANK)
        q_latent = torch.einsum("bshd,hdc->bshc", q_nope, up_HYC[:, :NOPE])
        scores = torch.einsum("bshc,btc->bsht", q_latent, latent_BTC)
        scores = (scores + torch.einsum("bshr,btr->bsht", q_rope, rope_key_BTR)) * WIDTH**-0.5
        scores = scores + torch.where(causal(positions_BS, latent_BTC), 0.0, -math.inf).transpose(1, 2)
        mixed = torch.einsum("bsht,btc->bshc", scores.softmax(-1), latent_BTC)
        return self.o_proj(torch.einsum("bshc,hdc->bshd", mixed, up_HYC[:, -VALUE:]).flatten(2))


class SplitUpProjection(HeadFirst):
    """One matrix for keys, another for values."""

    def __init__(self):
        super().__init__()
        self.k_b_proj = nn.Linear(RANK, HEADS * NOPE, bias=False)
        self.v_b_proj = nn.Linear(RANK, HEADS * VALUE, bias=False)

    def keys_and_values(self, latent_BTC):
        k, v = self.k_b_proj(latent_BTC), self.v_b_proj(latent_BTC)
        return (one.view(*latent_BTC.shape[:2], HEADS, -1).permute(0, 2, 1, 3) for one in (k, v))


class MatrixPerHead(HeadFirst):
    """The up-projection as one matrix [C, N + V] per head."""

    def __init__(self):
        super().__init__()
        self.up_HCY = nn.Parameter(torch.empty(HEADS, RANK, NOPE + VALUE))

    def keys_and_values(self, latent_BTC):
        return torch.matmul(latent_BTC[:, None], self.up_HCY).split([NOPE, VALUE], -1)


class BiasedQueries(HeadFirst):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * WIDTH)


class BiasedOutput(HeadFirst):
    def __init__(self):
        super().__init__()
        self.o_proj = nn.Linear(HEADS * VALUE, HIDDEN)


class BiasedUpProjection(HeadFirst):
    def __init__(self):
        super().__init__()
        self.kv_b_proj = nn.Linear(RANK, HEADS * (NOPE + VALUE))


class OneDownProjection(HeadFirst):
    """Queries, latent and rope key of the new token from one concatenated matrix; the latent joins its cache."""

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Linear(HIDDEN, 14 + RANK + ROPE, bias=False)
        self.q_b_proj = nn.Linear(14, HEADS * WIDTH, bias=False)
        self.norm = nn.RMSNorm(RANK)

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q_a, latent, rope_key = self.down_proj(x_BSD).split([14, RANK, ROPE], -1)
        latent_BTC = torch.cat([latent_BTC, self.norm(latent)], 1)
        k_rope = self.rope_keys(torch.cat([rope_key_BTR, torch.tanh(rope_key)], 1))
        q = self.q_b_proj(F.silu(q_a)).view(*x_BSD.shape[:2], HEADS, WIDTH).transpose(1, 2)
        k_nope, v = self.keys_and_values(latent_BTC)
        k = torch.cat([k_nope, k_rope], -1)
        out = F.scaled_dot_product_attention(q.clone(), k, v).transpose(1, 2).flatten(2)
        return self.o_proj(out), latent_BTC


class OneCache(HeadFirst):
    """Latent and rope key side by side in one cache."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        cache_BTE = torch.tanh(torch.cat([latent_BTC, rope_key_BTR], -1))
        latent_BTC, rope_key_BTR = cache_BTE.split([RANK, ROPE], -1)
        return super().forward(x_BSD, positions_BS, latent_BTC, rope_key_BTR)


class NoRope(HeadFirst):
    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        k, v = self.keys_and_values(latent_BTC)
        out = self.attend(self.queries(x_BSD)[0], k, v, self.mask(positions_BS, latent_BTC))
        return self.o_proj(out.transpose(1, 2).flatten(2)) + rope_key_BTR.sum()


class WideValues(HeadFirst):
    """Values wider than keys."""

    def __init__(self):
        super().__init__()
        self.kv_b_proj = nn.Linear(RANK, HEADS * (NOPE + 19), bias=False)
        self.o_proj = nn.Linear(HEADS * 19, HIDDEN, bias=False)

    def keys_and_values(self, latent_BTC):
        kv = self.kv_b_proj(latent_BTC).unflatten(-1, (HEADS, NOPE + 19)).transpose(1, 2)
        return kv.split([NOPE, 19], -1)


class GroupedLatents(nn.Module):
    """Two groups of heads, each with a latent of its own; no rope part."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, 4 * NOPE, bias=False)
        self.up_GCY = nn.Parameter(torch.empty(2, RANK // 2, 2 * (NOPE + VALUE)))
        self.o_proj = nn.Linear(4 * VALUE, HIDDEN, bias=False)

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q = self.q_proj(x_BSD).view(*x_BSD.shape[:2], 2, 2, NOPE)
        latent_BTGC = latent_BTC.unflatten(-1, (2, RANK // 2))
        kv = torch.einsum("btgc,gcy->btgy", latent_BTGC, self.up_GCY).unflatten(-1, (2, NOPE + VALUE))
        k, v = kv.split([NOPE, VALUE], -1)
        q, k, v = (one.flatten(2, 3).transpose(1, 2) for one in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, causal(positions_BS, latent_BTC))
        return self.o_proj(out.transpose(1, 2).flatten(2)) + rope_key_BTR.sum()


class ComplexRotation(HeadFirst):
    """Queries rotated as complex numbers."""

    def queries(self, x_BSD):
        q_nope, q_rope = super().queries(x_BSD)
        turn = torch.polar(torch.ones(ROPE // 2), torch.arange(ROPE // 2) + 1.0)
        pairs = torch.view_as_complex(q_rope.float().unflatten(-1, (ROPE // 2, 2)))
        return q_nope, torch.view_as_real(pairs * turn).flatten(3).type_as(q_rope)


class HalfSplitRotation(HeadFirst):
    """Queries rotated in halves."""

    def queries(self, x_BSD):
        q_nope, q_rope = super().queries(x_BSD)
        angle = (torch.arange(ROPE // 2) + 1.0).repeat(2)
        first, second = q_rope.chunk(2, -1)
        return q_nope, q_rope * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


class Eager(HeadFirst):
    """transformers' eager attention: products, an added float mask, a softmax in float32."""

    def mask(self, positions_BS, latent_BTC):
        lowest = torch.finfo(torch.float32).min
        return torch.where(causal(positions_BS, latent_BTC), 0.0, lowest)

    def attend(self, q, k, v, mask):
        scores = torch.matmul(q, k.transpose(2, 3)) * WIDTH**-0.5 + mask
        shares = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(shares, 0.1, self.training), v)


class ScaledApart(HeadFirst):
    """Each of the products that the scores add up has its own factor."""

    def attend(self, q, k, v, mask):
        scores = 0.3 * q[..., :NOPE] @ k[..., :NOPE].mT + (q[..., NOPE:] @ k[..., NOPE:].mT) / 5.0
        return torch.matmul(scores.masked_fill(~mask, -math.inf).softmax(-1), v)


class ScaledBehindMask(HeadFirst):
    """As textbooks have it: what is hidden is masked before all is scaled."""

    hidden = -math.inf
    divisor = WIDTH**0.5

    def attend(self, q, k, v, mask):
        scores = (q @ k.mT).masked_fill(~mask, self.hidden)
        return (scores / self.divisor).softmax(-1) @ v


class LowestBehindMask(ScaledBehindMask):
    hidden = torch.finfo(torch.float32).min


class FarBelowBehindMask(ScaledBehindMask):
    hidden = -1e9


class NegativeBehindMask(ScaledBehindMask):
    """What is masked comes out highest: no attention."""

    hidden = torch.finfo(torch.float32).min
    divisor = -(WIDTH**0.5)


class HiddenByLittle(ScaledBehindMask):
    """A number that scores may reach."""

    hidden = -20.0


class TriangularMask(Eager):
    """A square float mask with −∞ above its diagonal, over as many queries as there are rows."""

    leading: tuple[int, ...] = ()

    def mask(self, positions_BS, latent_BTC):
        return torch.full((*self.leading, positions_BS.shape[1], latent_BTC.shape[1]), -math.inf).triu(1)


class TriangularMaskOfFourDims(TriangularMask):
    leading = (1, 1)


class HeadsInBatch(HeadFirst):
    """Heads folded into the batch for `bmm`, scores unfolded to be masked."""

    def attend(self, q, k, v, mask):
        batch, _, queries, _ = q.shape
        q, k, v = (one.reshape(batch * HEADS, *one.shape[2:]) for one in (q, k, v))
        scores = self.scores(q, k)
        if mask is not None:
            scores = self.masked(scores, mask, batch)
        return torch.bmm(scores.softmax(-1), v).view(batch, HEADS, queries, -1)

    def scores(self, q, k):
        return torch.bmm(q * WIDTH**-0.5, k.transpose(1, 2))

    def masked(self, scores, mask, batch):
        unfolded = scores.view(batch, HEADS, *scores.shape[1:]).masked_fill(~mask, -math.inf)
        return unfolded.view(scores.shape)


class RepeatedMask(HeadsInBatch):
    """A mask for every head of the batch, as torch's own multi-head attention wants it."""

    def masked(self, scores, mask, batch):
        return scores.masked_fill(~mask[:, 0].repeat_interleave(HEADS, 0), -math.inf)


class ExpandedMask(HeadsInBatch):
    def masked(self, scores, mask, batch):
        lowest = torch.finfo(scores.dtype).min
        added = torch.where(mask, 0.0, lowest).expand(-1, HEADS, -1, -1).reshape(scores.shape)
        return scores + added


class ScaledByProduct(HeadsInBatch):
    """As Megatron-LM has it: scaled by `baddbmm`, which adds nothing of an empty buffer."""

    beta = 0.0

    def scores(self, q, k):
        empty = q.new_zeros if self.beta else q.new_empty
        return torch.baddbmm(empty(*q.shape[:2], k.shape[1]), q, k.mT, beta=self.beta, alpha=WIDTH**-0.5)


class ScaledByProductOntoZeros(ScaledByProduct):
    beta = 1.0


class HeadsInBatchUnmasked(HeadsInBatch):
    def mask(self, positions_BS, latent_BTC):
        return None


class MasksOfRows(HeadsInBatch):
    """Rows of the folded batch have masks of their own."""

    def masked(self, scores, mask, batch):
        last = torch.arange(batch * HEADS)[:, None, None]
        return scores.masked_fill(torch.arange(scores.shape[2]) > last, -math.inf)


class MasksOfHeads(HeadsInBatch):
    """Each head sees as far as its number says."""

    def masked(self, scores, mask, batch):
        last = torch.arange(HEADS)[None, :, None, None].expand(batch, -1, *scores.shape[1:]).reshape(scores.shape)
        return scores.masked_fill(torch.arange(scores.shape[2]) > last, -math.inf)


class MasksOfAnotherBatch(HeadsInBatch):
    """Folded in the same number of rows from others: three requests of two heads where scores have two of three."""

    def masked(self, scores, mask, batch):
        last = torch.arange(HEADS)[:, None, None].repeat_interleave(batch, 0)
        return scores.masked_fill(torch.arange(scores.shape[2]) > last, -math.inf)


class OneQuery(HeadFirst):
    """A decode step that knows of no queries: [B, H, N], [B, T, C], scores [B, H, T]."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        q_nope_BHN, q_rope_BHR = (part[:, :, 0] for part in self.queries(x_BSD))
        up_HYC = self.kv_b_proj.weight.view(HEADS, NOPE + VALUE, RANK)
        q_BHC = torch.einsum("bhn,hnc->bhc", q_nope_BHN, up_HYC[:, :NOPE])
        scores_BHT = q_BHC @ latent_BTC.mT + q_rope_BHR @ rope_key_BTR.mT
        scores_BHT = self.masked(scores_BHT * WIDTH**-0.5, positions_BS)
        mixed_BHC = scores_BHT.softmax(-1) @ latent_BTC
        return self.o_proj(torch.einsum("bhc,hvc->bhv", mixed_BHC, up_HYC[:, NOPE:]).flatten(1))[:, None]

    def masked(self, scores_BHT, positions_BS):
        hidden_BT = torch.arange(scores_BHT.shape[2]) > positions_BS
        return scores_BHT.masked_fill(hidden_BT[:, None], -math.inf)


class OneQueryUnmasked(OneQuery):
    def masked(self, scores_BHT, positions_BS):
        return scores_BHT


class NoMask(HeadFirst):
    def mask(self, positions_BS, latent_BTC):
        return None


class RepeatedRopeKey(HeadFirst):
    def rope_keys(self, rope_key_BTR):
        return rope_key_BTR.unsqueeze(1).repeat(1, HEADS, 1, 1)


class InterleavedRopeKey(HeadFirst):
    def rope_keys(self, rope_key_BTR):
        return rope_key_BTR.unsqueeze(1).repeat_interleave(HEADS, 1)


class ScaledLatent(HeadFirst):
    def keys_and_values(self, latent_BTC):
        return super().keys_and_values(latent_BTC * 0.5)


class NormalisedLatent(HeadFirst):
    """The norm behind the cache: its result takes the latent's place."""

    def keys_and_values(self, latent_BTC):
        return super().keys_and_values(F.rms_norm(latent_BTC, (RANK,)))


class PaddedMask(HeadFirst):
    """Some cached positions hold padding."""

    def mask(self, positions_BS, latent_BTC):
        return causal(positions_BS, latent_BTC) & (latent_BTC[:, None, None, :, 0] > -1)


class FloatMask(HeadFirst):
    """A slope over the distance, which no comparison of positions gives."""

    def mask(self, positions_BS, latent_BTC):
        return (torch.arange(latent_BTC.shape[1]) - positions_BS[:, None, :, None]) * 0.1


class BentKeys(HeadFirst):
    def keys_and_values(self, latent_BTC):
        k, v = super().keys_and_values(latent_BTC)
        return torch.tanh(k), v


class KeysReturned(HeadFirst):
    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        out = super().forward(x_BSD, positions_BS, latent_BTC, rope_key_BTR)
        return (out, *self.keys_and_values(latent_BTC))


class ExpandedCaches(HeadFirst):
    """transformers ≤ 4.57: the rows before this step come in as keys and values of every head."""

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        old_k = latent_BTC.tanh()[:, None, :, :WIDTH].expand(-1, HEADS, -1, -1)
        old_v = latent_BTC.tanh()[:, None, :, -VALUE:].expand(-1, HEADS, -1, -1)
        latent = torch.tanh(x_BSD.repeat(1, 1, 2)[..., :RANK])
        k_nope, v = self.keys_and_values(latent)
        k = torch.cat([old_k, torch.cat([k_nope, self.rope_keys(latent[..., :ROPE])], -1)], 2)
        q = torch.cat(self.queries(x_BSD), -1)
        out = F.scaled_dot_product_attention(q, k, torch.cat([old_v, v], 2))
        return self.o_proj(out.transpose(1, 2).flatten(2)) + rope_key_BTR.sum(), k
