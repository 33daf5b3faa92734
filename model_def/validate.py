"""What makes a configuration impossible, each thing with one clear line."""

from __future__ import annotations

import functools
import math
import types
import typing
from typing import TYPE_CHECKING, Any

import torch

from model_def.rope import RopeScaling

if TYPE_CHECKING:
    from model_def.config import ModelConfig

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
CHOICES = {
    "attention": ("mla", "gqa"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "scoring_func": ("softmax", "sigmoid", "sqrtsoftplus"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "torch_dtype": tuple(DTYPES),
    "num_nextn_predict_layers": (0, 1),
}
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "swiglu_limit",
)


class ConfigError(ValueError):
    """A configuration that cannot be: one line naming the field and what would be accepted."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@functools.cache
def alternatives(cls: type, name: str) -> tuple[Any, ...]:
    """The types a dataclass field may have: int | None → (int, NoneType)."""
    hint = typing.get_type_hints(cls)[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def allows_none(cls: type, name: str) -> bool:
    return types.NoneType in alternatives(cls, name)


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(v, int) for v in value)
    if kind in (int, float):
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_types(config: Any, prefix: str = "") -> None:
    """Fields have their declared types, floats are finite. Whole numbers where a fraction may stand become floats."""
    for name in config.__dataclass_fields__:
        value, accepted = getattr(config, name), alternatives(config.__class__, name)
        if float in accepted and int not in accepted and _is_a(value, int):
            object.__setattr__(config, name, float(value))
        elif not any(_is_a(value, kind) for kind in accepted):
            words = " or ".join("null" if k is types.NoneType else getattr(k, "__name__", "list") for k in accepted)
            raise ConfigError(f"{prefix}{name} is {value!r}; accepted: {words}")
        elif isinstance(value, float):
            require(math.isfinite(value), f"{prefix}{name} is {value}; accepted: a finite number")


def check_scaling(scaling: RopeScaling, prefix: str) -> RopeScaling:
    check_types(scaling, prefix)
    for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
        value = getattr(scaling, name)
        require(value > 0, f"{prefix}{name} is {value}; accepted: a positive number")
    return scaling


def check_model(config: ModelConfig) -> None:
    """Raises ConfigError for the first impossible size or unknown choice."""
    for name, accepted in CHOICES.items():
        value = getattr(config, name)
        words = ", ".join(repr(a) for a in accepted)
        require(value in accepted, f"{name} is {value!r}; accepted: {words}")
    for name in SIZES:
        value = getattr(config, name)
        require(value is None or value > 0, f"{name} is {value}; accepted: a positive number")
    for name in ("n_shared_experts", "first_k_dense_replace"):
        value = getattr(config, name)
        require(value >= 0, f"{name} is {value}; accepted: zero or more")
    _check_gqa(config) if config.attention == "gqa" else _check_mla(config)
    rotary = config.rotary_dim
    name = "head_dim" if config.attention == "gqa" else "qk_rope_head_dim"
    require(rotary % 2 == 0, f"{name} is {rotary}; accepted: an even number, since dimensions turn in pairs")
    if config.rope_scaling is not None:
        check_scaling(config.rope_scaling, "rope_scaling.")
        require(config.rope_theta > 1, f"rope_theta is {config.rope_theta}; accepted: a number above 1")
    if config.n_routed_experts is not None:
        _check_experts(config)


def _check_gqa(config: ModelConfig) -> None:
    require(config.head_dim is not None, "head_dim is missing, which attention 'gqa' needs")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    require(
        heads % kv_heads == 0,
        f"num_key_value_heads is {kv_heads}; accepted: a divisor of num_attention_heads {heads}",
    )


def _check_mla(config: ModelConfig) -> None:
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        require(getattr(config, name) is not None, f"{name} is missing, which attention 'mla' needs")
    ranks = config.kv_lora_rank if isinstance(config.kv_lora_rank, tuple) else (config.kv_lora_rank,)
    positive = all(rank is not None and rank > 0 for rank in ranks)
    require(positive, f"kv_lora_rank is {config.kv_lora_rank}; accepted: positive numbers")
    require(
        not isinstance(config.kv_lora_rank, tuple) or len(ranks) == config.num_hidden_layers,
        f"kv_lora_rank has {len(ranks)} entries; accepted: one number, or one per layer ({config.num_hidden_layers})",
    )


def _check_experts(config: ModelConfig) -> None:
    for name in ("moe_intermediate_size", "num_experts_per_tok"):
        require(getattr(config, name) is not None, f"{name} is missing, which n_routed_experts needs")
    experts, top_k = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    require(top_k <= experts, f"num_experts_per_tok is {top_k}; accepted: at most n_routed_experts {experts}")
    if config.topk_method == "greedy":
        return
    groups, top_groups = config.n_group, config.topk_group
    require(experts % groups == 0, f"n_group is {groups}; accepted: a divisor of n_routed_experts {experts}")
    require(top_groups <= groups, f"topk_group is {top_groups}; accepted: at most n_group {groups}")
    allowed = top_groups * (experts // groups)
    require(
        top_k <= allowed,
        f"num_experts_per_tok is {top_k}; accepted: at most {allowed}, as many experts as topk_group "
        f"{top_groups} groups hold",
    )
    require(
        config.topk_method != "noaux_tc" or top_groups == groups or experts // groups >= 2,
        f"n_group is {groups}; accepted: groups of two experts or more, since a group scores by its two best",
    )
