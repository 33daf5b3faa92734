"""Models of transformers that are built from MLA or DeepSeekMoE and that no pass was written for, in small."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from tests.foreign.models import SIZES, randomised

COMMON = {
    **{name: size for name, size in SIZES.items() if name != "rope_parameters"},  # every config has its own default
    "qk_nope_head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "index_n_heads": 2,
    "index_head_dim": 32, "index_topk": 6, "shared_experts_intermediate_size": 32, "swiglu_limit": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What a decode step of three layers is expected to gain."""

    shown: str  # its name in the documentation
    model: str  # a class of transformers.models.<family>
    latent: int = 3  # layers whose attention is absorbed
    streamed: int = 3  # of these, how many run as attention over latents and positions
    routed: int = 2  # layers whose routing is one op
    grouped: int = 2  # layers whose experts are one op
    sizes: Mapping[str, Any] = field(default_factory=dict)


DENSE = {"routed": 0, "grouped": 0}
LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention", "full_attention"], "num_local_experts": 16}
FAMILIES = {
    "axk1": Family("A.X K1", "AXK1ForCausalLM"),
    "axk2": Family("A.X K2", "AXK2ForCausalLM", streamed=0),
    "bailing_hybrid": Family(
        "Bailing hybrid", "BailingHybridForCausalLM", 2, 2, sizes={**LINEAR_FIRST, "head_dim": 16}
    ),
    "deepseek_v4": Family(
        "DeepSeek-V4",
        "DeepseekV4ForCausalLM",
        *(0, 0),
        sizes={"mlp_layer_types": ["hash_moe", "moe", "moe"], "num_local_experts": 16, "head_dim": 16},
    ),
    "deepseek_v32": Family("DeepSeek-V3.2", "DeepseekV32ForCausalLM", streamed=0),
    "dots1": Family("dots.llm1", "Dots1ForCausalLM", 0, 0),
    "dots3_note": Family("dots3 note", "Dots3NoteForCausalLM", streamed=1),
    "ernie4_5_moe": Family("ERNIE 4.5 MoE", "Ernie4_5_MoeForCausalLM", 0, 0),
    "glm4_moe": Family("GLM-4.5", "Glm4MoeForCausalLM", 0, 0),
    "glm4_moe_lite": Family("GLM-4.7 Flash", "Glm4MoeLiteForCausalLM"),
    "glm_moe_dsa": Family("GLM-5", "GlmMoeDsaForCausalLM", streamed=0),
    "hy_v3": Family("HY V3", "HYV3ForCausalLM", 0, 0),
    "hy_v4": Family("HY V4", "HYV4ForCausalLM", streamed=0),
    "kimi_linear": Family(
        "Kimi Linear",
        "KimiLinearForCausalLM",
        2,
        2,
        sizes={**LINEAR_FIRST, "linear_head_dim": 16, "linear_num_heads": 4, "n_group": 1, "topk_group": 1},
    ),
    "minicpm3": Family("MiniCPM3", "MiniCPM3ForCausalLM", **DENSE),
    "mistral4": Family("Mistral 4", "Mistral4ForCausalLM"),
    "mistral_large4": Family("Mistral Large 4 (text)", "MistralLarge4TextModel", streamed=0),
    "youtu": Family("Youtu-LLM", "YoutuForCausalLM", **DENSE),
}


def build(name: str) -> PreTrainedModel:
    """The family's model with random weights, of those sizes that its config knows."""
    family = FAMILIES[name]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    model: Any = getattr(module, family.model)
    known = model.config_class.__dataclass_fields__
    sizes = {**COMMON, **family.sizes}
    return randomised(model(model.config_class(**{key: value for key, value in sizes.items() if key in known})))
