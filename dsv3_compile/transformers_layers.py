"""transformers' own layers as blocks: their code is captured, on the checkpoint tensors that our definition names.

    dsv3c compile FOLDER --from transformers

What is compiled is what transformers computes, cache update and attention interface included; embedding and output
head, which have nothing to find, are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model_def.attention import write
from model_def.config import ModelConfig
from model_def.decoder import Layer
from model_def.specs import LayerSpec


class TransformersError(ValueError):
    """A model that transformers does not have, or transformers itself missing. One line: what would help."""


class SlotCache:
    """What a layer of transformers takes for its cache: new rows are written at their positions, all rows come back.

    Tensors are [B, T, width] here and [B, 1, T, width] for the layer.
    """

    def __init__(self, tensors: tuple[Tensor, Tensor], positions: Tensor) -> None:
        self.tensors, self.positions = tensors, positions

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = keys.squeeze(1), values.squeeze(1)
        first, second = (write(old, new, self.positions) for old, new in zip(self.tensors, rows, strict=True))
        self.tensors = first, second
        return first.unsqueeze(1), second.unsqueeze(1)


class TransformersLayer(Layer):
    """A decoder layer that holds the weights of `Layer` and computes what transformers does with them."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype, layer: nn.Module, complex_rotation: bool) -> None:
        super().__init__(spec, dtype)
        self._theirs = (layer,)  # in a tuple, so that its parameters are not this module's
        self._complex_rotation = complex_rotation

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSF: Tensor,
        sin_BSF: Tensor,
        positions_BS: Tensor,
        latent_BTC: Tensor,
        rope_key_BTR: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cache = SlotCache((latent_BTC, rope_key_BTR), positions_BS)
        slots = torch.arange(latent_BTC.shape[1], device=x_BSD.device)
        mask = (slots <= positions_BS[:, :, None])[:, None]
        if self._complex_rotation:
            rotation: Any = torch.complex(cos_BSF, sin_BSF)
        else:
            rotation = tuple(torch.cat([half, half], -1).to(x_BSD.dtype) for half in (cos_BSF, sin_BSF))
        (layer,) = self._theirs
        arguments = dict(
            attention_mask=mask, position_ids=positions_BS, past_key_values=cache, use_cache=True,
            position_embeddings=rotation,
        )  # fmt: skip
        x_BSD = functional_call(layer, self._named(), (x_BSD,), arguments)
        return x_BSD, *cache.tensors

    def _named(self) -> dict[str, Tensor]:
        """Our weights under their names there, where the experts' gate and up projections are one tensor."""
        weights = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        gate, up = (weights.pop(f"mlp.experts.{name}_proj", None) for name in ("gate", "up"))
        if gate is not None and up is not None:
            weights["mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        return weights


class TransformersLayers:
    """Builds the layers of one model as transformers writes them."""

    def __init__(self, config: ModelConfig) -> None:
        if config.attention != "mla" or isinstance(config.kv_lora_rank, tuple):
            raise TransformersError("transformers has no such model: one latent rank for all layers is what it knows")
        self.config = config

    def __call__(self, spec: LayerSpec, dtype: torch.dtype) -> TransformersLayer:
        index = self.config.layers().index(spec)
        model = self._model(index + 1)
        rotary = model.model.rotary_emb
        table = rotary(torch.empty(1, 1, spec.hidden), torch.zeros(1, 1, dtype=torch.int64))
        layer = model.model.layers[index].eval()
        return TransformersLayer(spec, dtype, layer, isinstance(table, Tensor) and table.is_complex())

    def _model(self, layers: int) -> Any:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise TransformersError("needs transformers: pip install 'dsv3-compile[hf]'") from error
        document = {**self.config.to_dict(), "num_hidden_layers": layers, "quantization_config": None}
        kind = {"kimi_k2": "deepseek_v3"}.get(document.pop("model_type"), self.config.model_type)
        try:
            config = AutoConfig.for_model(kind, **document, attn_implementation="sdpa")
            return AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError) as error:
            raise TransformersError(f"transformers refuses this config: {str(error).splitlines()[0]}") from error
