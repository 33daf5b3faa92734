"""Models with random weights: an artifact of ours compiled without any, and transformers' of the same config."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_compile.artifact import Artifact, Port
from dsv3_compile.backend import dsv3, last_report
from dsv3_compile.driver import build
from dsv3_compile.options import OptionError, Options
from dsv3_compile.packaging import write_artifact
from model_def.config import ModelConfig

# Of torch.compile. Ours as itself, since the project need not be installed where this runs.
BACKENDS: dict[str, Any] = {"inductor": "inductor", "dsv3": dsv3}

# Fields that transformers writes otherwise, or that change no time.
OTHERWISE_THERE = ("model_type", "rope_theta", "rope_scaling", "quantization_config", "torch_dtype", "eos_token_id")


def compiled(config: ModelConfig, target: str, batch: int, length: int, folder: Path) -> tuple[Artifact, float]:
    """An artifact without weights, and the seconds it took. Ends the program where the model is too small for it."""
    begin = time.perf_counter()
    options = Options(target=target, max_batch=batch, max_length=length, no_weights=True, verify=False)
    try:
        program = build(config, options)
    except OptionError as error:
        raise SystemExit(str(error)) from None
    passes = [record.spec for record in program.records["embed", "prefill"]]
    artifact = write_artifact(program, folder, passes=passes, max_batch=batch, max_length=length)
    return artifact, time.perf_counter() - begin


def tell_fallback(backend: str) -> None:
    """Print why the graph that was compiled last by one of the BACKENDS went to Inductor without passes, if it did."""
    if BACKENDS[backend] is dsv3 and last_report()["fallback"]:
        print(f"{backend} left a graph to Inductor: {last_report()['fallback']}")


def drawn(port: Port, device: str) -> Tensor:
    """A weight: matrices of deviation fan_in^-1/2, so that nothing saturates; norms around 1, biases around 0."""
    out = torch.empty(tuple(int(size) for size in port.shape), dtype=getattr(torch, port.dtype), device=device)
    if out.dim() > 1:
        return out.normal_(0, out.shape[-1] ** -0.5)
    return out.normal_(0, 0.05).add_(1.0 if "norm" in port.name else 0.0)


def bytes_read(blocks: Sequence[str], weights: Sequence[Mapping[str, Tensor]], chosen: Iterable[int]) -> float:
    """What must be read of the weights of these blocks: each once, but few rows of the embedding; of stacked experts
    those that were chosen, a number for every layer that routes."""
    total, chosen = 0.0, iter(chosen)
    for block, tensors in zip(blocks, weights, strict=True):
        stacks = {name for name, tensor in tensors.items() if tensor.dim() == 3}
        needed = next(chosen, None) if stacks else None
        for name, tensor in tensors.items():
            share = needed / len(tensor) if needed and name in stacks else 1.0
            total += 0.0 if block == "embed" else share * tensor.nbytes
    return total


def peer_model(config: ModelConfig) -> tuple[Any, Any]:
    """The model of transformers with random weights on the GPU, and its config."""
    import transformers

    fields = config.to_dict()
    for name in OTHERWISE_THERE:
        fields.pop(name, None)
    (architecture,) = fields.pop("architectures")
    theirs = getattr(transformers, architecture)
    hf = theirs.config_class(**fields, attn_implementation="sdpa")
    with torch.device("meta"):
        model = theirs(hf).to(torch.bfloat16)
    model.to_empty(device="cuda").eval()
    for tensor in model.parameters():
        tensor.data.normal_(0.0 if tensor.dim() > 1 else 1.0, 0.02)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.02)
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(hf)
            module.inv_freq = module.original_inv_freq = fresh.inv_freq.to("cuda")
    return model, hf
