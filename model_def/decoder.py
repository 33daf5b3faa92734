"""The decoder as a sequence of blocks: embed, one block per layer, head.

B batch · S query positions · T cached positions · D hidden · F rotary pairs · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model_def.attention import GroupedQueryAttention, MultiHeadLatentAttention, linear
from model_def.config import ModelConfig
from model_def.moe import MixtureOfExperts, SwiGlu
from model_def.rope import cos_sin
from model_def.specs import DenseSpec, LayerSpec, MlaSpec

Caches = list[tuple[Tensor, Tensor]]


class Embed(nn.Module):
    """Token ids and positions → hidden states and the rotary table that all layers share."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)

    def forward(self, input_ids_BS: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64, int64 → x [B, S, D], cos and sin float32 [B, S, F]."""
        config = self.config
        cos_BSF, sin_BSF = cos_sin(positions_BS, config.rotary_dim, config.rope_theta, config.rope_scaling)
        return self.embed_tokens(input_ids_BS), cos_BSF, sin_BSF


class Layer(nn.Module):
    """x ← x + Attention(norm(x)); x ← x + FFN(norm(x))."""

    def __init__(
        self,
        spec: LayerSpec,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.spec = spec
        hidden = spec.hidden
        self.input_layernorm = nn.RMSNorm(hidden, spec.eps, dtype=dtype, device=device)
        self.self_attn: nn.Module
        if isinstance(spec.attention, MlaSpec):
            self.self_attn = MultiHeadLatentAttention(spec.attention, hidden, dtype, device)
        else:
            self.self_attn = GroupedQueryAttention(spec.attention, hidden, dtype, device)
        self.post_attention_layernorm = nn.RMSNorm(hidden, spec.eps, dtype=dtype, device=device)
        self.mlp: nn.Module
        if isinstance(spec.ffn, DenseSpec):
            self.mlp = SwiGlu(hidden, spec.ffn.width, spec.ffn.limit, dtype, device)
        else:
            self.mlp = MixtureOfExperts(spec.ffn, hidden, dtype, device)

    def cache_widths(self) -> dict[str, tuple[int, ...]]:
        """Names of the two caches and the shape of one token's row in each."""
        return self.spec.attention.cache_widths()

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSF: Tensor,
        sin_BSF: Tensor,
        positions_BS: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`first` and `second` are the caches in the order of `cache_widths`, each [B, T, ...].

        MLA: latent [B, T, C] and rope_key [B, T, R]; GQA: keys and values [B, T, G, A].
        """
        attended_BSD, first, second = self.self_attn(
            self.input_layernorm(x_BSD), cos_BSF, sin_BSF, positions_BS, first, second
        )
        x_BSD = x_BSD + attended_BSD
        x_BSD = x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))
        return x_BSD, first, second


class Head(nn.Module):
    """Hidden states of the last layer → logits."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.lm_head = linear(config.hidden_size, config.vocab_size, dtype, device)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] → [B, S, V], float32 (float64 in a float64 model)."""
        logits_BSV = self.lm_head(self.norm(x_BSD))
        return logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))


class Decoder(nn.Module):
    """The whole model, uncompiled."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        self.embed = Embed(config, dtype, device)
        layers = [Layer(config.layer(i), dtype, device) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.head = Head(config, dtype, device)
        if config.tie_word_embeddings:
            self.head.lm_head.weight = self.embed.embed_tokens.weight

    def empty_caches(
        self,
        batch: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Caches:
        """Zeroed caches of every layer for `length` positions."""

        def empty(width: tuple[int, ...]) -> Tensor:
            return torch.zeros(batch, length, *width, dtype=dtype, device=device)

        widths = [spec.attention.cache_widths().values() for spec in self.config.layers()]
        return [(empty(first), empty(second)) for first, second in widths]

    def trunk(
        self, input_ids_BS: Tensor, positions_BS: Tensor, caches: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Caches]:
        """Everything but the head: → what the last layer gives [B, S, D], and the new caches."""
        x_BSD, cos_BSF, sin_BSF = self.embed(input_ids_BS, positions_BS)
        written: Caches = []
        for layer, (first, second) in zip(self.layers, caches, strict=True):
            x_BSD, first, second = layer(x_BSD, cos_BSF, sin_BSF, positions_BS, first, second)
            written.append((first, second))
        return x_BSD, written

    def forward(
        self, input_ids_BS: Tensor, positions_BS: Tensor, caches: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Caches]:
        """int64, int64, caches → logits float32 [B, S, V], and the caches with this step's rows."""
        x_BSD, written = self.trunk(input_ids_BS, positions_BS, caches)
        return self.head(x_BSD), written
