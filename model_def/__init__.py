"""What is computed: plain PyTorch that reads like the paper."""

from model_def.config import BlockQuantization, ConfigError, ModelConfig
from model_def.decoder import Decoder, Embed, Head, Layer
from model_def.mtp import MultiTokenPrediction
from model_def.names import blocks, build, sources
from model_def.presets import PRESETS
from model_def.rope import RopeScaling
from model_def.specs import DenseSpec, GqaSpec, LayerSpec, MlaSpec, MoeSpec, RoutingSpec

__all__ = [
    "PRESETS",
    "BlockQuantization",
    "ConfigError",
    "Decoder",
    "DenseSpec",
    "Embed",
    "GqaSpec",
    "Head",
    "Layer",
    "LayerSpec",
    "MlaSpec",
    "ModelConfig",
    "MoeSpec",
    "MultiTokenPrediction",
    "RopeScaling",
    "RoutingSpec",
    "blocks",
    "build",
    "sources",
]
