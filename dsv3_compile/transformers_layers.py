"""transformers' own layers as blocks: their code is captured, on the checkpoint tensors that our definition names.

    dsv3c compile FOLDER --from transformers

What is compiled is what transformers computes, cache update and attention interface included; embedding and output
head, which have nothing to find, are ours. So is the order of the layers: where `moe_layer_freq` leaves experts out,
which transformers passes over, its dense layer stands.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model_def.attention import write
from model_def.config import ModelConfig
from model_def.decoder import Layer
from model_def.specs import LayerSpec, MoeSpec


class TransformersError(ValueError):
    """A model that transformers does not have or cannot run, or transformers itself missing. One line: why."""


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
        # No weights of ours: without shared experts, theirs are an MLP of width zero.
        self._empty = {name: weight.shape for name, weight in layer.named_parameters() if not weight.numel()}

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
        empty = {name: x_BSD.new_empty(shape) for name, shape in self._empty.items()}
        try:
            x_BSD = functional_call(layer, self._named() | empty, (x_BSD,), arguments)
        except RuntimeError as error:
            first = next(iter(str(error).strip().splitlines()), "")
            raise TransformersError(f"transformers' own {type(layer).__name__} does not run: {first}") from error
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
        model = self._model(isinstance(spec.ffn, MoeSpec))
        rotary = model.model.rotary_emb
        table = rotary(torch.empty(1, 1, spec.hidden), torch.zeros(1, 1, dtype=torch.int64))
        (layer,) = model.model.layers
        return TransformersLayer(spec, dtype, layer.eval(), isinstance(table, Tensor) and table.is_complex())

    def _model(self, moe: bool) -> Any:
        """A model of one layer, with or without experts: transformers knows dense layers in front only, and nothing
        else in a layer depends on where it stands."""
        try:
            from huggingface_hub.errors import StrictDataclassError
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise TransformersError("needs transformers: pip install 'dsv3-compile[hf]'") from error
        document = self.config.to_dict() | {"quantization_config": None}
        kind = {"kimi_k2": "deepseek_v3"}.get(document.pop("model_type"), self.config.model_type)
        if not moe:
            document.pop("n_routed_experts", None)  # null in a model without experts, which transformers does not take
        kinds = {"first_k_dense_replace": 0 if moe else 1, "mlp_layer_types": ["sparse" if moe else "dense"]}
        document |= {name: value for name, value in kinds.items() if name in document}
        document |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        try:
            config = AutoConfig.for_model(kind, **document, attn_implementation="sdpa")
            # Only now: some kinds insist that heads divide the hidden size, which in MLA they need not.
            config.num_attention_heads = config.num_key_value_heads = self.config.num_attention_heads
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")
                return AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError, StrictDataclassError) as error:
            raise TransformersError(f"transformers refuses this config: {' '.join(str(error).split())}") from error
