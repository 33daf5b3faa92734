"""What one layer is made of. Layers with equal specs are the same block with other weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention: keys and values are rebuilt from one cached latent per token."""

    heads: int
    q_lora_rank: int | None  # None: queries come from one projection
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float  # of the scores, YaRN's m² included
    norm_eps: float
    interleaved: bool = True  # rotary pairs are (2i, 2i+1), else (i, i + R/2)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def cache_widths(self) -> dict[str, tuple[int, ...]]:
        """Shape, per token, of each cached tensor."""
        return {"latent": (self.kv_lora_rank,), "rope_key": (self.qk_rope_head_dim,)}


@dataclass(frozen=True)
class GqaSpec:
    """Grouped-query attention, for comparison; as many kv_heads as heads make it multi-head attention."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    interleaved: bool = True

    def cache_widths(self) -> dict[str, tuple[int, ...]]:
        """Shape, per token, of each cached tensor."""
        return {"keys": (self.kv_heads, self.head_dim), "values": (self.kv_heads, self.head_dim)}


@dataclass(frozen=True)
class DenseSpec:
    """One SwiGLU MLP. limit: of its gates, and of its ups in both directions; None: none."""

    width: int
    limit: float | None = None


@dataclass(frozen=True)
class RoutingSpec:
    """Which experts a token uses, and with which weights."""

    experts: int
    top_k: int
    scoring: str  # "sigmoid" | "softmax" | "sqrtsoftplus"
    bias: bool  # a bias that enters the selection and never the weights
    groups: int  # 1: no group limit
    top_groups: int
    group_score: str  # "top2": sum of the two best in the group | "max"
    masked: float  # what experts of dropped groups score in the selection
    normalise: bool
    scale: float


@dataclass(frozen=True)
class MoeSpec:
    """Routed experts plus the shared experts, which are one MLP of their joint width (0: none); limit: as of a dense
    one."""

    routing: RoutingSpec
    width: int
    shared_width: int
    limit: float | None = None


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer: attention and feed-forward network, each behind a norm and a residual sum."""

    hidden: int
    attention: MlaSpec | GqaSpec
    ffn: DenseSpec | MoeSpec
    eps: float
