"""Small models with nothing left at its initial value: norms of 1 and biases of 0 hide mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model_def import Decoder, ModelConfig, RopeScaling, sources
from model_def.checkpoint import Checkpoint
from model_def.names import Block

SMALL = ModelConfig(
    hidden_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    q_lora_rank=14,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    intermediate_size=18,
    moe_intermediate_size=7,
    n_routed_experts=12,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    vocab_size=31,
    max_position_embeddings=640,
    rope_scaling=RopeScaling(40.0, 16, mscale=1.0, mscale_all_dim=0.7),
    torch_dtype="float32",
)
GQA = replace(SMALL, attention="gqa", num_attention_heads=6, num_key_value_heads=2, head_dim=8)
MHA = replace(GQA, num_key_value_heads=6)
RANKS = replace(SMALL, kv_lora_rank=(10, 4, 7), q_lora_rank=None)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.3 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise * (1 if "embed_tokens" in name else tensor.shape[-1] ** -0.5))
    return module.eval().requires_grad_(False)


def decoder(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Decoder:
    model = randomise(Decoder(config, dtype), seed)
    assert isinstance(model, Decoder)
    return model


def token_ids(config: ModelConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def all_logits(model: Decoder, ids_BS: Tensor, first_position: int = 0, capacity: int | None = None) -> Tensor:
    """One pass over whole sequences, into caches whose old contents are poison."""
    batch, length = ids_BS.shape
    positions_BS = first_position + torch.arange(length).expand_as(ids_BS)
    dtype = model.head.norm.weight.dtype
    caches = model.empty_caches(batch, capacity or first_position + length, dtype)
    logits, _ = model(ids_BS, positions_BS, [(first + 1e3, second - 1e3) for first, second in caches])
    return logits


def fill(module: nn.Module, checkpoint: Checkpoint, block: Block) -> nn.Module:
    """Load a block's tensors."""
    state = {}
    for name, targets in sources(checkpoint.config, block).items():
        tensors = [checkpoint.tensor(target) for target in targets]
        state[name] = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def from_folder(folder: Path) -> Decoder:
    checkpoint = Checkpoint.open(folder)
    model = Decoder(checkpoint.config)
    fill(model.embed, checkpoint, "embed")
    fill(model.head, checkpoint, "head")
    for index, layer in enumerate(model.layers):
        fill(layer, checkpoint, index)
    return model.eval()
