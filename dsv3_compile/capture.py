"""The distinct blocks of a model, each traced once, in every phase.

Axis letters B, S, T name the free sizes: batch, query positions, cached positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from dsv3_compile.phases import decode_of
from dsv3_compile.program import BlockGraph
from dsv3_compile.tracing import Input, capture_fake
from model_def.config import ModelConfig
from model_def.decoder import Embed, Head, Layer
from model_def.specs import DenseSpec, LayerSpec
from passes.base import Role

CACHE_LETTERS = {"latent": "BTC", "rope_key": "BTR", "keys": "BTGA", "values": "BTGV"}


def block_names(config: ModelConfig) -> list[str]:
    """The block of each layer: "dense" or "moe", numbered when a model has several of a kind."""
    specs = config.layers()
    kinds = {spec: _kind(spec) for spec in specs}
    members: dict[str, list[LayerSpec]] = {}
    for spec, kind in kinds.items():
        members.setdefault(kind, []).append(spec)
    several = {kind for kind, found in members.items() if len(found) > 1}
    return [
        f"{kinds[spec]}_{members[kinds[spec]].index(spec)}" if kinds[spec] in several else kinds[spec] for spec in specs
    ]


def _kind(spec: LayerSpec) -> str:
    return "dense" if isinstance(spec.ffn, DenseSpec) else "moe"


def capture(
    config: ModelConfig,
    dtype: torch.dtype,
    step: Callable[[str, int, int], None] = lambda name, done, total: None,
    layer: Callable[[LayerSpec, torch.dtype], nn.Module] = Layer,
) -> dict[tuple[str, str], BlockGraph]:
    """Every distinct block of a model in every phase, by (name, phase). `layer` builds the module of a layer.

    Weights are fake: nothing of the model's size is allocated. `step` is told the name of each block before it
    is captured, how many are done, and how many there are.
    """
    specs = dict(zip(block_names(config), config.layers(), strict=True))
    layers = {
        name: (functools.partial(layer, spec, dtype), layer_inputs(config, spec, dtype)) for name, spec in specs.items()
    }
    parts: dict[str, tuple[Callable[[], nn.Module], list[Input]]] = {
        "embed": (functools.partial(Embed, config, dtype), embed_inputs(config)),
        **layers,
        "head": (functools.partial(Head, config, dtype), head_inputs(config, dtype)),
    }
    blocks = {}
    for done, (name, (build, inputs)) in enumerate(parts.items()):
        step(name, done, len(parts))
        prefill = BlockGraph(name, "prefill", capture_fake(build, inputs))
        blocks[name, "prefill"], blocks[name, "decode"] = prefill, decode_of(prefill)
    return blocks


def embed_inputs(config: ModelConfig) -> list[Input]:
    return [
        Input("input_ids_BS", Role.ACTIVATION, ("B", "S"), torch.int64, config.vocab_size),
        Input("positions_BS", Role.ACTIVATION, ("B", "S"), torch.int64, config.max_position_embeddings),
    ]


def layer_inputs(config: ModelConfig, spec: LayerSpec, dtype: torch.dtype) -> list[Input]:
    """What a layer takes besides its weights, in calling order; caches last."""
    table = ("B", "S", config.rotary_dim // 2)
    caches = [
        Input(f"{name}_{CACHE_LETTERS[name]}", Role.CACHE, ("B", "T", *width), dtype)
        for name, width in spec.attention.cache_widths().items()
    ]
    return [
        Input("x_BSD", Role.ACTIVATION, ("B", "S", spec.hidden), dtype),
        Input("cos_BSF", Role.ACTIVATION, table, torch.float32),
        Input("sin_BSF", Role.ACTIVATION, table, torch.float32),
        Input("positions_BS", Role.ACTIVATION, ("B", "S"), torch.int64, "T"),
        *caches,
    ]


def head_inputs(config: ModelConfig, dtype: torch.dtype) -> list[Input]:
    return [Input("x_BSD", Role.ACTIVATION, ("B", "S", config.hidden_size), dtype)]
