"""`dsv3c verify`: an artifact against the plain equations, block by block, on the real weights.

Every block gets the input that the equations give its predecessor's, so that an error is seen where it arises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_compile.artifact import ArtifactError
from dsv3_compile.driver import Event, Progress, silent
from dsv3_compile.recertify import recertify
from dsv3_compile.runtime import Graph, Model, load
from model_def import names
from model_def.checkpoint import Checkpoint
from model_def.decoder import Decoder, Layer

PROMPT, BATCH = 12, 3  # positions and rows of the prompt; one decode step follows
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest accepted error of one block, in units of the RMS of what it computes. In 16 bits single tokens may
choose another expert."""


@dataclass(frozen=True)
class Comparison:
    """One block in one phase: what it gave against what the equations give."""

    block: str
    layer: int | None
    phase: str
    cosine: float
    relative_error: float  # RMS of the difference over RMS of the reference


def verify(
    folder: str | Path,
    checkpoint: str | Path | None = None,
    progress: Progress = silent,
    certificates: bool = True,
) -> dict[str, Any]:
    """Check every hash, then every block in prefill and decode, then every pass.

    checkpoint: where the checkpoint lies, if not where it was when the artifact was written.
    certificates: repeat those of the passes, which takes as long as compiling.
    Raises ArtifactError when the folder is not intact or the checkpoint is not to be found, and CheckpointError or
    ConfigError for what is wrong with it.
    """
    model = load(folder)
    manifest = model.artifact.manifest
    source = Path(checkpoint or manifest.checkpoint)
    if not checkpoint and not source.is_dir():
        raise ArtifactError(f"{source}: the checkpoint is not there; name its folder with --checkpoint")
    opened = Checkpoint.open(source)
    if opened.config.to_dict() != dict(manifest.config):
        raise ArtifactError(f"{source}: its config differs from the artifact's; expected the compiled checkpoint")
    rows = []
    for row in compare(model, opened):
        rows.append(row)
        progress(Event("verify", f"{row.block} {row.phase}", len(rows), 2 * len(manifest.schedule)))
    bound = BOUNDS[manifest.dtype]
    largest = max(row.relative_error for row in rows)
    return {
        "files": len(manifest.files),
        "blocks": [asdict(row) for row in rows],
        "largest": largest,
        "bound": bound,
        "certificates": recertify(model.artifact, progress).to_dict() if certificates else None,
        "passed": all(row.relative_error <= bound for row in rows),
    }


def compare(model: Model, checkpoint: Checkpoint) -> Iterator[Comparison]:
    """Both phases of every block, one block's reference weights in memory at a time."""
    config, steps = checkpoint.config, model.artifact.manifest.schedule
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (BATCH, PROMPT + 1), generator=generator)
    positions = torch.arange(PROMPT + 1).expand(BATCH, -1)
    # In the first phase the prompt, in the second the one token behind it.
    parts = {"prefill": slice(0, PROMPT), "decode": slice(PROMPT, PROMPT + 1)}
    inputs = {
        phase: {"input_ids_BS": ids[:, part], "positions_BS": positions[:, part]} for phase, part in parts.items()
    }
    for step, block, weights in zip(steps, names.blocks(config), model.weights, strict=True):
        module = reference_block(checkpoint, block)
        caches = ours = _empty_caches(module)
        for phase, part in parts.items():
            graph, values = model.graphs[step.block, phase], inputs[phase]
            if block == "embed":
                expected = module(values["input_ids_BS"], values["positions_BS"])
                found = _run(graph, weights, values, model)
                values |= dict(zip(("x_BSD", "cos_BSF", "sin_BSF"), expected, strict=True))
            elif block == "head":
                expected = (module(values["x_BSD"]),)
                found = _run(graph, weights, values, model)
            else:
                activations = [values[name] for name in ("x_BSD", "cos_BSF", "sin_BSF", "positions_BS")]
                expected = module(*activations, *(cache[:, : part.stop] for cache in caches))
                handed = {port.name: cache[:, : part.stop] for port, cache in zip(graph.caches(), ours, strict=True)}
                found = _run(graph, weights, {**values, **handed}, model)
                caches, ours = ([_extended(cache) for cache in outputs[1:]] for outputs in (expected, found))
                values["x_BSD"] = expected[0]
            if model.artifact.manifest.origin != "definition":
                found, expected = (_any_order(outputs) for outputs in (found, expected))
            yield _comparison(step.block, step.layer, phase, found, expected)


def _any_order(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Caches with every row sorted: other code may keep the columns of its rotary keys in another order."""
    return outputs[0], *(cache.sort(-1).values for cache in outputs[1:])


def _run(graph: Graph, weights: Mapping[str, Tensor], values: Mapping[str, Tensor], model: Model) -> tuple[Tensor, ...]:
    """A compiled graph on copies of its inputs, in its own dtypes and on its own device; the outputs on the CPU."""
    arguments = dict(weights)
    for port in graph.entry.inputs:
        if port.role != "weight":
            value = values[port.name].contiguous()
            arguments[port.name] = value.to(model.device, getattr(torch, port.dtype), copy=True)
    return tuple(output.cpu() for output in graph(arguments))


def reference(checkpoint: Checkpoint) -> Decoder:
    """The definition of the whole model, in float32, with its weights."""
    decoder = Decoder(checkpoint.config, torch.float32)
    for block in names.blocks(checkpoint.config):
        module = decoder.layers[block] if isinstance(block, int) else getattr(decoder, block)
        _read_into(module, checkpoint, block)
    return decoder.eval().requires_grad_(False)


def reference_block(checkpoint: Checkpoint, block: names.Block) -> nn.Module:
    """One block of the definition, in float32, with its weights."""
    module = names.build(checkpoint.config, block, torch.float32)
    _read_into(module, checkpoint, block)
    return module.eval().requires_grad_(False)


def _read_into(module: nn.Module, checkpoint: Checkpoint, block: names.Block) -> None:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, sources in names.sources(checkpoint.config, block).items():
            loaded = [checkpoint.tensor(source) for source in sources]
            stacked = tensors[name].dim() > loaded[0].dim()
            tensors[name].copy_(torch.stack(loaded) if stacked else loaded[0])


def _empty_caches(block: nn.Module) -> list[Tensor]:
    if not isinstance(block, Layer):
        return []
    widths = block.spec.attention.cache_widths().values()
    return [torch.zeros(BATCH, PROMPT + 1, *width) for width in widths]


def _extended(cache: Tensor) -> Tensor:
    full = cache.new_zeros(BATCH, PROMPT + 1, *cache.shape[2:])
    full[:, : cache.shape[1]] = cache
    return full


def _comparison(
    block: str, layer: int | None, phase: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]
) -> Comparison:
    left = torch.cat([t.flatten().double() for t in found[: len(expected)]])
    right = torch.cat([t.flatten().double() for t in expected])
    cosine = torch.dot(left, right) / (left.norm() * right.norm())
    return Comparison(block, layer, phase, float(cosine), float((left - right).norm() / right.norm()))
