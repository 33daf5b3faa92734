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
from dsv3_compile.program import PHASES, BlockGraph, Occurrence, Program, share_weights
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
    """Capture every distinct block, send it through the passes, and lay out the schedule."""
    dtype = options.dtype_for(config.dtype)
    pipeline = Pipeline().configured(options.set, options.disable)
    program = Program(config, dtype, target(options.target), {}, schedule(config))
    for phase in PHASES:
        graphs = captured(config, dtype, phase, progress)
        context = Context(phase, program.target, workload(config, options, phase))
        specimens = specimens_of(graphs, config, dtype, phase, progress) if options.verify else {}
        for name, graph in graphs.items():
            step = _steps(progress, "passes", f"{name} {phase}", len(pipeline.passes))
            records = pipeline.run(graph.module, context, f"{name} {phase}", specimens.get(name), step)
            program.blocks[name, phase] = graph
            program.records[name, phase] = records
    check_required([record for records in program.records.values() for record in records], options.require)
    for name in {step.block for step in program.schedule}:
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


def captured(
    config: ModelConfig, dtype: torch.dtype, phase: str, progress: Progress
) -> dict[str, BlockGraph]:
    total = len(set(block_names(config))) + 2
    progress(Event("capture", phase, 0, total))
    graphs = capture(config, dtype, phase)
    progress(Event("capture", phase, total, total))
    return graphs


def specimens_of(
    graphs: dict[str, BlockGraph], config: ModelConfig, dtype: torch.dtype, phase: str, progress: Progress
) -> dict[str, Specimen]:
    """What each block's certificates run on: the block itself, or its small twin when it is too large."""
    large = {name for name, graph in graphs.items() if needs_proxy(graph)}
    small = captured(proxy(config), dtype, phase, progress) if large else {}
    return {
        name: Specimen.of((small if name in large else graphs)[name].module, proxy=name in large)
        for name in graphs
    }


def _steps(progress: Progress, stage: str, detail: str, total: int) -> Callable[[str, int], None]:
    return lambda name, done: progress(Event(stage, f"{detail}: {name}", done, total))
