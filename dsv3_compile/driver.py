"""From a model to an artifact: the whole compile, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codegen.targets import target
from dsv3_compile.capture import block_names, capture
from dsv3_compile.options import OptionError, Options, options_from
from dsv3_compile.phases import decode_of
from dsv3_compile.program import BlockGraph, Occurrence, Program, share_weights
from dsv3_compile.proxy import needs_proxy, proxy
from model_def.checkpoint import Checkpoint
from model_def.config import ModelConfig
from model_def.names import blocks, sources
from model_def.presets import PRESETS
from passes.base import Context, Workload
from passes.pipeline import Pipeline, check_required
from passes.verify import Specimen


@dataclass(frozen=True)
class Event:
    """Progress: `stage` ("capture", "passes", …) works on `detail`, step `done` of `total`."""

    stage: str
    detail: str
    done: int
    total: int


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The progress callback that shows nothing."""


@dataclass(frozen=True)
class Model:
    """What is compiled: a config and, unless weights are to come later, the checkpoint."""

    config: ModelConfig
    checkpoint: Checkpoint | None


def compile(model: str | Path, output: str | Path, progress: Progress = silent, **settings: Any) -> Any:
    """Compile a preset or a Hugging Face folder into an artifact folder, and open it.

    `settings` are the fields of Options. Raises ConfigError, CheckpointError, OptionError, PassError or
    ArtifactError when the input is at fault, CertificateError or RequirementError when a pass failed; then
    nothing is written.
    """
    from dsv3_compile.artifact import write

    options = options_from(settings)
    found = open_model(model, options)
    program = build(found.config, options, progress)
    return write(program, output, options, found.checkpoint, progress)


def open_model(model: str | Path, options: Options) -> Model:
    """A preset by name, or a folder. Opens the checkpoint and compares it with what the config asks for."""
    if str(model) in PRESETS and not Path(model).exists():
        if not options.no_weights:
            raise OptionError(f"{model} is a preset, which has no weights; name a folder, or set no_weights")
        return Model(PRESETS[str(model)], None)
    if not Path(model).exists():
        raise OptionError(f"{model}: no such folder; accepted: a folder, or {', '.join(PRESETS)}")
    if options.no_weights:
        return Model(ModelConfig.from_file(model), None)
    checkpoint = Checkpoint.open(model)
    checkpoint.validate()
    return Model(checkpoint.config, checkpoint)


def build(config: ModelConfig, options: Options, progress: Progress = silent) -> Program:
    """Capture every distinct block, send it through the passes of each phase, and lay out the schedule."""
    dtype = options.dtype_for(config.dtype)
    pipeline = Pipeline().configured(options.set, options.disable)
    blocks = captured(config, dtype, progress)
    large = {block.name for block in blocks if needs_proxy(block)} if options.verify else set()
    twins = {(b.name, b.phase): b for b in captured(proxy(config), dtype, progress)} if large else {}
    program = Program(config, dtype, target(options.target), {}, schedule(config))
    for block in blocks:
        key = block.name, block.phase
        specimen = None
        if options.verify:
            specimen = Specimen.of(twins[key].module if large else block.module, proxy=bool(large))
        context = Context(block.phase, program.target, workload(config, options, block.phase))
        step = _steps(progress, "passes", " ".join(key), len(pipeline.passes))
        program.records[key] = pipeline.run(block.module, context, " ".join(key), specimen, step)
        program.blocks[key] = block
    check_required([record for records in program.records.values() for record in records], options.require)
    for name in dict.fromkeys(block.name for block in blocks):
        share_weights(program.phases(name))
    return program


def schedule(config: ModelConfig) -> tuple[Occurrence, ...]:
    """Which block runs at every step, on which checkpoint tensors."""
    names = block_names(config)
    steps = []
    for block in blocks(config):
        weights = {name.replace(".", "_"): found for name, found in sources(config, block).items()}
        if isinstance(block, int):
            steps.append(Occurrence(names[block], block, weights))
        else:
            steps.append(Occurrence(block, None, weights))
    return tuple(steps)


def workload(config: ModelConfig, options: Options, phase: str) -> Workload:
    """Sizes at which costs are compared: one whole prompt, or a full batch at full length."""
    length = options.length_for(config.max_position_embeddings)
    return Workload(1, length, length) if phase == "prefill" else Workload(options.max_batch, 1, length)


def captured(config: ModelConfig, dtype: torch.dtype, progress: Progress) -> list[BlockGraph]:
    """Every distinct block in every phase."""
    progress(Event("capture", config.model_type, 0, 1))
    prefill = capture(config, dtype, "prefill")
    return [block for first in prefill.values() for block in (first, decode_of(first))]


def _steps(progress: Progress, stage: str, detail: str, total: int) -> Callable[[str, int], None]:
    return lambda name, done: progress(Event(stage, f"{detail}: {name}", done, total))
