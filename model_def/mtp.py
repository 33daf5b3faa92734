"""Multi-token prediction: one more layer that drafts the token after next (DeepSeek-V3, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_def.attention import linear
from model_def.config import ModelConfig
from model_def.decoder import Layer
from model_def.rope import cos_sin


class SharedHead(nn.Module):
    """The module's own norm before the model's output projection."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.head = linear(config.hidden_size, config.vocab_size, dtype, device)

    def forward(self, x_BSD: Tensor) -> Tensor:
        logits_BSV = self.head(self.norm(x_BSD))
        return logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))


class MultiTokenPrediction(nn.Module):
    """x' = [norm(embedding of t_{i+1}) ; norm(h_i)]·W_ehᵀ, one MoE layer, head: logits of t_{i+2}.

    The embedding comes first, as in the released weights; the report prints the other order.
    h_i is the model's hidden state at i. Whether it is taken behind the model's final norm is not said
    by the report; with `normed` (the default, as in transformers) it is.
    `embed_tokens`, `norm` and `shared_head.head` are the main model's own weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        normed: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden, dtype=dtype, device=device)
        self.norm = nn.RMSNorm(hidden, eps, dtype=dtype, device=device) if normed else None
        self.enorm = nn.RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.hnorm = nn.RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.eh_proj = linear(2 * hidden, hidden, dtype, device)
        self.block = Layer(config.mtp_layer(), dtype, device)
        self.shared_head = SharedHead(config, dtype, device)

    def forward(
        self,
        next_ids_BS: Tensor,
        x_BSD: Tensor,
        positions_BS: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """next_ids[b, s] follows the token at positions[b, s]; x is what the last layer gave there.

        → float32 logits [B, S, V] of the token after next_ids, and this layer's own two caches.
        """
        config = self.config
        cos_BSF, sin_BSF = cos_sin(positions_BS, config.rotary_dim, config.rope_theta, config.rope_scaling)
        hidden_BSD = x_BSD if self.norm is None else self.norm(x_BSD)
        embedding_BSD = self.embed_tokens(next_ids_BS)
        joined_BSD = self.eh_proj(torch.cat([self.enorm(embedding_BSD), self.hnorm(hidden_BSD)], -1))
        drafted_BSD, first, second = self.block(joined_BSD, cos_BSF, sin_BSF, positions_BS, first, second)
        return self.shared_head(drafted_BSD), first, second
