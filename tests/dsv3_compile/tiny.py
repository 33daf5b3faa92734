"""A model of the family with odd, all-different sizes, small enough to compile in seconds."""

from __future__ import annotations

import functools
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import dsv3_compile.driver as driver
from dsv3_compile.capture import capture
from dsv3_compile.options import Options
from dsv3_compile.program import BlockGraph, Program
from model_def import names
from model_def.config import ModelConfig
from model_def.decoder import Decoder, Layer
from model_def.presets import PRESETS
from passes.verify import clone

TINY = replace(
    PRESETS["deepseek-v3"],
    hidden_size=30,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=3,
    q_lora_rank=26,
    kv_lora_rank=22,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=6,
    intermediate_size=34,
    moe_intermediate_size=14,
    n_routed_experts=12,
    n_shared_experts=1,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    vocab_size=61,
    max_position_embeddings=64,
    num_nextn_predict_layers=0,
    bos_token_id=None,
    eos_token_id=None,
    quantization=None,
    torch_dtype="float32",
)
EXPERTS_OF_V4 = replace(  # low enough a limit that every token meets it
    TINY, model_type="custom", num_hidden_layers=2, n_group=1, topk_group=1, scoring_func="sqrtsoftplus",
    swiglu_limit=0.2,
)  # fmt: skip
OPTIONS = Options(max_batch=3, max_length=32, no_weights=True)


@functools.cache  # captured once for all tests that only look
def blocks() -> dict[tuple[str, str], BlockGraph]:
    return capture(TINY, torch.float32)


def captured_before(
    config: ModelConfig, dtype: torch.dtype, step: Any, layer: Any = Layer
) -> dict[tuple[str, str], BlockGraph]:
    """Stands in for `capture` where capturing is not what a test is about."""
    if (config, dtype, layer) != (TINY, torch.float32, Layer):
        return capture(config, dtype, step, layer)
    return {key: BlockGraph(block.name, block.phase, clone(block.module)) for key, block in blocks().items()}


@functools.cache  # compiled and certified once
def program() -> Program:
    with patch.object(driver, "capture", captured_before):
        return driver.build(TINY, OPTIONS)


@contextmanager
def no_room(limit: int = 10_000) -> Iterator[None]:
    """The operating system takes no file of more bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def trained_looking(config: ModelConfig, seed: int = 0) -> Decoder:
    """A model with random weights of sensible sizes; selection biases are large enough to matter."""
    torch.manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn_like(tensor)
            vector = 0.3 * noise if "bias" in name else 1 + 0.2 * noise
            tensor.copy_(vector if tensor.ndim < 2 else noise * tensor.shape[-1] ** -0.5)
    return model


def checkpoint_of(model: Decoder) -> dict[str, Tensor]:
    """Its weights under the names of a checkpoint, experts one by one."""
    tensors: dict[str, Tensor] = {}
    for block in names.blocks(model.config):
        module = model.layers[block] if isinstance(block, int) else getattr(model, block)
        for name, sources in names.sources(model.config, block).items():
            tensor = module.state_dict()[name]
            tensors |= zip(sources, tensor.unbind(0) if len(sources) > 1 else [tensor], strict=True)
    return tensors
