"""The model's configuration: read from any config.json of the family, checked once, frozen.

Field names are those of Hugging Face's config.json, except `attention`, `head_dim` (of "gqa" attention only)
and `quantization`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from model_def.rope import RopeScaling
from model_def.specs import DenseSpec, GqaSpec, LayerSpec, MlaSpec, MoeSpec, RoutingSpec
from model_def.validate import DTYPES, ConfigError, allows_none, check_model, check_scaling, check_types

# transformers and DeepSeek's own code leave the two norms inside MLA at the norm's default, whatever
# rms_norm_eps says.
MLA_NORM_EPS = 1e-6

# What the reference implementations do regardless of the file; "custom" is for architectures of one's own.
UNLIMITED: dict[str, Any] = {"swiglu_limit": None}
FORCED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax", "norm_topk_prob": False, "rope_interleave": True, **UNLIMITED},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", **UNLIMITED},
    "kimi_k2": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", **UNLIMITED},
    "glm4_moe_lite": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", **UNLIMITED},
    "youtu": {"n_routed_experts": None, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0, **UNLIMITED},
    "custom": {},
}
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "youtu": "YoutuForCausalLM",
    "custom": "DeepseekV3ForCausalLM",
}
# Every published file of a model with experts has these, null at times. Without them implementations assume different
# numbers.
NEVER_ABSENT = (
    "q_lora_rank",
    "n_routed_experts",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
# What a kind without experts does not know, and its class in transformers does not take.
EXPERT_FIELDS = {
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "topk_method",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "num_nextn_predict_layers",
}
ROPE_KEYS = {f.name for f in fields(RopeScaling)} | {
    "type",
    "rope_type",
    "rope_theta",
    "truncate",
    "partial_rotary_factor",
}


@dataclass(frozen=True)
class BlockQuantization:
    """FP8 (e4m3) weights of a checkpoint, one scale per block."""

    block: tuple[int, int] = (128, 128)
    scale_format: str | None = None  # "ue8m0": scales are powers of two


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model. Construction checks everything; ConfigError says what is wrong."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    model_type: str = "deepseek_v3"
    attention: str = "mla"  # "mla" | "gqa"
    num_key_value_heads: int | None = None  # of "gqa" attention; MLA has one latent whatever it says
    head_dim: int | None = None  # of "gqa" attention
    q_lora_rank: int | None = None
    kv_lora_rank: int | tuple[int, ...] | None = None  # one number, or one per layer
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    moe_intermediate_size: int | None = None
    n_routed_experts: int | None = None  # None: every layer is dense
    n_shared_experts: int = 0
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    swiglu_limit: float | None = None  # of gates, and of ups in both directions; of every SwiGLU
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    torch_dtype: str = "bfloat16"
    quantization: BlockQuantization | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in forced_fields(self.model_type).items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, but {self.model_type} always has {value!r}; "
                    "use model_type 'custom' to choose"
                )
        check_model(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> ModelConfig:
        """From the contents of a config.json. Keys that change nothing at inference are passed over."""
        if not isinstance(document, dict):
            raise ConfigError(f"expected a JSON object, got {type(document).__name__}")
        forced = forced_fields(document.get("model_type", "deepseek_v3"))
        if document.get("mlp_bias"):
            raise ConfigError("mlp_bias is true; accepted: false")
        values = {f.name: document[f.name] for f in fields(cls) if f.name in document}
        # null stands for the default wherever the field has no meaning for None
        values = {name: v for name, v in values.items() if v is not None or allows_none(cls, name)}
        for ours, theirs in (("torch_dtype", "dtype"), ("num_nextn_predict_layers", "num_mtp_layers")):
            if document.get(theirs) is not None:
                values.setdefault(ours, document[theirs])
        if isinstance(values.get("torch_dtype"), str):
            values["torch_dtype"] = values["torch_dtype"].removeprefix("torch.")  # written so by some tools
        for name in ("kv_lora_rank", "eos_token_id"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        if values.get("attention", "mla") == "mla":
            values.pop("head_dim", None)  # transformers stores the rotary width there
        values |= _rope_fields(document) | _dense_layers(document)
        if document.get("quantization_config") is not None:
            values["quantization"] = _quantization(document["quantization_config"])
        values |= forced
        if document.get("model_type") == "deepseek_v2":
            values.setdefault("topk_method", "greedy")
        missing = [f.name for f in fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
        if document.get("model_type") != "custom":
            unknown = EXPERT_FIELDS if "n_routed_experts" in forced else set()
            given = document.keys() | values.keys() | unknown
            missing += [name for name in NEVER_ABSENT if name not in given]
        if missing:
            raise ConfigError(f"{missing[0]} is missing")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """From a config.json, or from the folder that holds one.

        End tokens in the folder's generation_config.json go before those of its config.json, as in transformers.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        config = _read(file, cls.from_dict)
        generation = path / "generation_config.json"
        return _read(generation, config.with_end_tokens) if generation.is_file() else config

    def with_end_tokens(self, document: dict[str, Any]) -> ModelConfig:
        """The end tokens of a generation_config.json in place of the config's own, if it names any."""
        if not isinstance(document, dict):
            raise ConfigError(f"expected a JSON object, got {type(document).__name__}")
        ends = document.get("eos_token_id")
        if ends is None:
            return self
        return dataclasses.replace(self, eos_token_id=tuple(ends) if isinstance(ends, list) else ends)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that `from_dict`, and transformers for its own types, read back."""
        document: dict[str, Any] = {"architectures": [ARCHITECTURES[self.model_type]]}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.name not in NEVER_ABSENT:
                continue
            if f.name == "rope_scaling":
                scaling = {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
                document[f.name] = {"type": "yarn", **scaling}
            elif f.name == "quantization":
                document["quantization_config"] = {
                    "quant_method": "fp8",
                    "fmt": "e4m3",
                    "activation_scheme": "dynamic",
                    "weight_block_size": list(value.block),
                    **({"scale_fmt": value.scale_format} if value.scale_format else {}),
                }
            elif f.name == "attention" and value == "mla":
                continue
            elif "n_routed_experts" in forced_fields(self.model_type) and f.name in EXPERT_FIELDS:
                continue
            else:
                document[f.name] = list(value) if isinstance(value, tuple) else value
        if self.model_type == "glm4_moe_lite":  # which is all that its class in transformers looks at
            layers = range(self.num_hidden_layers)
            document["mlp_layer_types"] = ["sparse" if self.is_moe(layer) else "dense" for layer in layers]
        return document

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.torch_dtype]

    @property
    def rotary_dim(self) -> int:
        """R: how many numbers of a query are rotated."""
        return _given(self.head_dim if self.attention == "gqa" else self.qk_rope_head_dim)

    def is_moe(self, layer: int) -> bool:
        """Dense layers come first; later ones are sparse wherever moe_layer_freq divides their index."""
        if self.n_routed_experts is None or layer < self.first_k_dense_replace:
            return False
        return layer % self.moe_layer_freq == 0

    def layer(self, index: int) -> LayerSpec:
        """What layer `index` is made of; equal specs are the same block."""
        if not 0 <= index < self.num_hidden_layers:
            raise IndexError(f"layer {index} of a model with {self.num_hidden_layers} layers")
        return self._spec(index, self.is_moe(index))

    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(self.layer(i) for i in range(self.num_hidden_layers))

    def mtp_layer(self) -> LayerSpec:
        """The layer inside the multi-token-prediction module: the last layer's attention, and experts."""
        return self._spec(self.num_hidden_layers - 1, self.n_routed_experts is not None)

    def _spec(self, index: int, moe: bool) -> LayerSpec:
        ffn = self._experts() if moe else DenseSpec(self.intermediate_size, self.swiglu_limit)
        return LayerSpec(self.hidden_size, self._attention(index), ffn, self.rms_norm_eps)

    def _attention(self, index: int) -> MlaSpec | GqaSpec:
        factor = 1.0 if self.rope_scaling is None else self.rope_scaling.score_factor()
        if self.attention == "gqa":
            head_dim = _given(self.head_dim)
            kv_heads = self.num_key_value_heads or self.num_attention_heads
            scale = head_dim**-0.5 * factor
            return GqaSpec(self.num_attention_heads, kv_heads, head_dim, scale, self.rope_interleave)
        nope, rope = _given(self.qk_nope_head_dim), _given(self.qk_rope_head_dim)
        ranks = self.kv_lora_rank
        return MlaSpec(
            heads=self.num_attention_heads,
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=ranks[index] if isinstance(ranks, tuple) else _given(ranks),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=_given(self.v_head_dim),
            scale=(nope + rope) ** -0.5 * factor,
            norm_eps=MLA_NORM_EPS,
            interleaved=self.rope_interleave,
        )

    def _experts(self) -> MoeSpec:
        grouped = self.topk_method != "greedy" and self.topk_group < self.n_group
        biased = self.topk_method == "noaux_tc"
        routing = RoutingSpec(
            experts=_given(self.n_routed_experts),
            top_k=_given(self.num_experts_per_tok),
            scoring=self.scoring_func,
            bias=biased,
            groups=self.n_group if grouped else 1,
            top_groups=self.topk_group if grouped else 1,
            group_score="top2" if biased else "max",
            # Biased scores may be negative; softmax scores cannot, so V2's 0 masks as well.
            masked=float("-inf") if biased or self.scoring_func != "softmax" else 0.0,
            normalise=self.norm_topk_prob,
            scale=self.routed_scaling_factor,
        )
        width = _given(self.moe_intermediate_size)
        return MoeSpec(routing, width, width * self.n_shared_experts, self.swiglu_limit)


def _read(file: Path, parse: Callable[[Any], ModelConfig]) -> ModelConfig:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{file}: is not JSON ({error})") from error
    try:
        return parse(document)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def forced_fields(model_type: Any) -> dict[str, Any]:
    if not isinstance(model_type, str) or model_type not in FORCED:
        raise ConfigError(f"model_type is {model_type!r}; accepted: {', '.join(FORCED)}")
    return FORCED[model_type]


def _dense_layers(document: dict[str, Any]) -> dict[str, Any]:
    """first_k_dense_replace from `mlp_layer_types`, where a file has that: the kind of every layer."""
    kinds = document.get("mlp_layer_types")
    if kinds is None:
        return {}
    layers = len(kinds) if isinstance(kinds, list) else 0
    dense = kinds.index("sparse") if layers and "sparse" in kinds else layers
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ConfigError(
            f"mlp_layer_types is {kinds!r}; accepted: 'dense' for the first layers, 'sparse' for all others"
        )
    if document.get("num_hidden_layers", layers) != layers:
        raise ConfigError(f"mlp_layer_types names {layers} layers of {document['num_hidden_layers']}; accepted: all")
    return {"first_k_dense_replace": dense, "moe_layer_freq": 1}


def _rope_fields(document: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, from the old keys or from transformers v5's `rope_parameters`."""
    key = "rope_parameters" if document.get("rope_parameters") is not None else "rope_scaling"
    given = document.get(key) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{key} is {given!r}; accepted: an object or null")
    for part in (given.get("partial_rotary_factor"), document.get("partial_rotary_factor")):
        if part not in (None, 1):
            raise ConfigError(f"partial_rotary_factor is {part!r}; accepted: 1")
    theta = given.get("rope_theta", document.get("rope_theta"))
    values: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{key} has the type {kind!r}; accepted: 'default', 'yarn'")
    values["rope_scaling"] = None
    if kind == "yarn":
        unknown = sorted(given.keys() - ROPE_KEYS)
        if unknown or given.get("truncate") is False:
            raise ConfigError(f"{key} has {(unknown or ['truncate: false'])[0]}, which is not supported")
        numbers = {f.name: given[f.name] for f in fields(RopeScaling) if given.get(f.name) is not None}
        for name in ("factor", "original_max_position_embeddings"):
            if name not in numbers:
                raise ConfigError(f"{key}.{name} is missing")
        values["rope_scaling"] = check_scaling(RopeScaling(**numbers), f"{key}.")
    return values


def _quantization(given: Any) -> BlockQuantization:
    if not isinstance(given, dict) or given.get("quant_method") != "fp8":
        method = given.get("quant_method") if isinstance(given, dict) else given
        raise ConfigError(f"quantization_config.quant_method is {method!r}; accepted: 'fp8'")
    block = given.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise ConfigError(f"quantization_config.weight_block_size is {block!r}; accepted: two sizes")
    return BlockQuantization((block[0], block[1]), given.get("scale_fmt"))


def _given(value: Any) -> int:
    """A size that `check_model` has made sure is there."""
    assert isinstance(value, int)
    return value
