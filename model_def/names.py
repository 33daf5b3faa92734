"""Which checkpoint tensors feed a block: the published names of the Hugging Face checkpoints."""

from __future__ import annotations

import functools
import re

import torch

from model_def.config import ModelConfig
from model_def.decoder import Embed, Head, Layer
from model_def.mtp import MultiTokenPrediction
from model_def.specs import LayerSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
Block = str | int  # "embed", a layer's index, "head" or "mtp"


def blocks(config: ModelConfig) -> tuple[Block, ...]:
    """The blocks of the main model, in the order in which they run."""
    return ("embed", *range(config.num_hidden_layers), "head")


def build(
    config: ModelConfig,
    block: Block,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.nn.Module:
    """The module of one block, untrained."""
    if block == "embed":
        return Embed(config, dtype, device)
    if block == "head":
        return Head(config, dtype, device)
    if block == "mtp":
        return MultiTokenPrediction(config, dtype=dtype, device=device)
    if isinstance(block, int):
        return Layer(config.layer(block), dtype, device)
    raise ValueError(f"block is {block!r}; accepted: 'embed', a layer's index, 'head', 'mtp'")


def sources(config: ModelConfig, block: Block) -> dict[str, tuple[str, ...]]:
    """Parameter or buffer of `build(config, block)` → the checkpoint tensors it consists of.

    Several names are stacked along a new first dimension (experts, in their order).
    """
    head = EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
    if block == "embed":
        return {"embed_tokens.weight": (EMBEDDING,)}
    if block == "head":
        return {"norm.weight": (FINAL_NORM,), "lm_head.weight": (head,)}
    if block == "mtp":
        prefix = f"model.layers.{config.num_hidden_layers}."
        own = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
        return {
            "embed_tokens.weight": (EMBEDDING,),
            "norm.weight": (FINAL_NORM,),
            "shared_head.head.weight": (head,),
            **{name: (prefix + name,) for name in own},
            **{f"block.{name}": found for name, found in _layer(config.mtp_layer(), prefix).items()},
        }
    if isinstance(block, int):
        return _layer(config.layer(block), f"model.layers.{block}.")
    raise ValueError(f"block is {block!r}; accepted: 'embed', a layer's index, 'head', 'mtp'")


def _layer(spec: LayerSpec, prefix: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, experts in _tensors(spec):
        stacked = re.fullmatch(r"mlp\.experts\.(\w+)", name)
        if stacked:
            each = (f"{prefix}mlp.experts.{e}.{stacked[1]}.weight" for e in range(experts))
            found[name] = tuple(each)
        else:
            found[name] = (prefix + name,)
    return found


@functools.cache
def _tensors(spec: LayerSpec) -> tuple[tuple[str, int], ...]:
    """Names of a layer's parameters and buffers, each with its first size."""
    return tuple((name, t.shape[0]) for name, t in Layer(spec, device="meta").state_dict().items())
