"""Attention over a cache, as the equations say it; the fast forms are the compiler's to find.

B batch · S query positions · T cached positions · D hidden · H heads · P no-position width · R rotary width ·
F = R/2 · V value width · C latent rank · G key-value heads · A head width.

Rows are written into the cache at `positions`, and a query sees what lies at its own position and before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model_def.rope import rotate
from model_def.specs import GqaSpec, MlaSpec


def linear(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device | str | None) -> nn.Linear:
    """y = x · Wᵀ; no projection of this family has a bias."""
    return nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device)


def write(cache: Tensor, rows: Tensor, positions_BS: Tensor) -> Tensor:
    """The cache [B, T, ...] with rows [B, S, ...] at their positions."""
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None]
    return cache.index_put((batch, positions_BS), rows)


def softmax_up_to(positions_BS: Tensor, scores_BHST: Tensor, scale: float) -> Tensor:
    """Softmax of scale · scores over the cached positions t ≤ positions[b, s], in float32 or wider."""
    wide = torch.promote_types(scores_BHST.dtype, torch.float32)
    visible_BST = torch.arange(scores_BHST.shape[-1], device=positions_BS.device) <= positions_BS[:, :, None]
    scores_BHST, dtype = scores_BHST.to(wide) * scale, scores_BHST.dtype
    return scores_BHST.masked_fill(~visible_BST[:, None], -math.inf).softmax(-1).to(dtype)


class MultiHeadLatentAttention(nn.Module):
    """MLA of DeepSeek-V2, section 2.1. The cache holds the normalised latent and the rotated key of each
    token; keys and values of all heads are rebuilt from it."""

    def __init__(self, spec: MlaSpec, hidden: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.spec = spec
        queries = spec.heads * spec.qk_head_dim
        if spec.q_lora_rank is None:
            self.q_proj = linear(hidden, queries, dtype, device)
        else:
            self.q_a_proj = linear(hidden, spec.q_lora_rank, dtype, device)
            self.q_a_layernorm = nn.RMSNorm(spec.q_lora_rank, spec.norm_eps, dtype=dtype, device=device)
            self.q_b_proj = linear(spec.q_lora_rank, queries, dtype, device)
        self.kv_a_proj_with_mqa = linear(hidden, spec.kv_lora_rank + spec.qk_rope_head_dim, dtype, device)
        self.kv_a_layernorm = nn.RMSNorm(spec.kv_lora_rank, spec.norm_eps, dtype=dtype, device=device)
        keys_and_values = spec.heads * (spec.qk_nope_head_dim + spec.v_head_dim)
        self.kv_b_proj = linear(spec.kv_lora_rank, keys_and_values, dtype, device)
        self.o_proj = linear(spec.heads * spec.v_head_dim, hidden, dtype, device)

    def queries(self, x_BSD: Tensor) -> Tensor:
        if self.spec.q_lora_rank is None:
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        return q.unflatten(-1, (self.spec.heads, self.spec.qk_head_dim))

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSF: Tensor,
        sin_BSF: Tensor,
        positions_BS: Tensor,
        latent_BTC: Tensor,
        rope_key_BTR: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """→ attended [B, S, D] and the two caches with this step's rows."""
        spec = self.spec
        nope, rope = spec.qk_nope_head_dim, spec.qk_rope_head_dim
        q_nope_BSHP, q_rope_BSHR = self.queries(x_BSD).split([nope, rope], -1)
        q_rope_BSHR = rotate(q_rope_BSHR, cos_BSF[:, :, None], sin_BSF[:, :, None], spec.interleaved)

        down_BSC, key_BSR = self.kv_a_proj_with_mqa(x_BSD).split([spec.kv_lora_rank, rope], -1)
        latent_BTC = write(latent_BTC, self.kv_a_layernorm(down_BSC), positions_BS)
        rope_key_BTR = write(rope_key_BTR, rotate(key_BSR, cos_BSF, sin_BSF, spec.interleaved), positions_BS)

        kv_BTHX = self.kv_b_proj(latent_BTC).unflatten(-1, (spec.heads, -1))
        k_nope_BTHP, v_BTHV = kv_BTHX.split([nope, spec.v_head_dim], -1)

        q_BSHX = torch.cat([q_nope_BSHP, q_rope_BSHR], -1)
        k_BTHX = torch.cat([k_nope_BTHP, rope_key_BTR[:, :, None].expand(-1, -1, spec.heads, -1)], -1)
        scores_BHST = torch.einsum("bshx,bthx->bhst", q_BSHX, k_BTHX)
        shares_BHST = softmax_up_to(positions_BS, scores_BHST, spec.scale)
        out_BSHV = torch.einsum("bhst,bthv->bshv", shares_BHST, v_BTHV)
        return self.o_proj(out_BSHV.flatten(-2)), latent_BTC, rope_key_BTR


class GroupedQueryAttention(nn.Module):
    """Attention with whole keys and values in the cache, shared by H/G heads each (Ainslie et al. 2023)."""

    def __init__(self, spec: GqaSpec, hidden: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.spec = spec
        self.q_proj = linear(hidden, spec.heads * spec.head_dim, dtype, device)
        self.k_proj = linear(hidden, spec.kv_heads * spec.head_dim, dtype, device)
        self.v_proj = linear(hidden, spec.kv_heads * spec.head_dim, dtype, device)
        self.o_proj = linear(spec.heads * spec.head_dim, hidden, dtype, device)

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSF: Tensor,
        sin_BSF: Tensor,
        positions_BS: Tensor,
        keys_BTGA: Tensor,
        values_BTGA: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """→ attended [B, S, D] and the two caches with this step's rows."""
        spec = self.spec
        cos, sin = cos_BSF[:, :, None], sin_BSF[:, :, None]
        q_BSHA = rotate(self.q_proj(x_BSD).unflatten(-1, (spec.heads, -1)), cos, sin, spec.interleaved)
        k_BSGA = rotate(self.k_proj(x_BSD).unflatten(-1, (spec.kv_heads, -1)), cos, sin, spec.interleaved)
        keys_BTGA = write(keys_BTGA, k_BSGA, positions_BS)
        values_BTGA = write(values_BTGA, self.v_proj(x_BSD).unflatten(-1, (spec.kv_heads, -1)), positions_BS)

        k_BTHA = keys_BTGA.repeat_interleave(spec.heads // spec.kv_heads, 2)
        v_BTHA = values_BTGA.repeat_interleave(spec.heads // spec.kv_heads, 2)
        scores_BHST = torch.einsum("bsha,btha->bhst", q_BSHA, k_BTHA)
        shares_BHST = softmax_up_to(positions_BS, scores_BHST, spec.scale)
        out_BSHA = torch.einsum("bhst,btha->bsha", shares_BHST, v_BTHA)
        return self.o_proj(out_BSHA.flatten(-2)), keys_BTGA, values_BTGA
