"""From a model to an artifact: the whole compile, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import model_def
from dsv3_compile.artifact import Artifact, check_output
from dsv3_compile.capture import block_names, capture
from dsv3_compile.inspection import documents
from dsv3_compile.options import OptionError, Options, options_from
from dsv3_compile.own_ops import check_ops
from dsv3_compile.packaging import write_artifact
from dsv3_compile.program import PHASES, BlockGraph, Occurrence, Program, share_weights
from dsv3_compile.proxy import needs_proxy, proxy
from dsv3_compile.report.dumps import dump
from dsv3_compile.report.history import History
from dsv3_compile.report.phase_plan import phase_plans
from dsv3_compile.repro import explain
from dsv3_compile.tokenizer import check_tokenizer
from model_def import names
from model_def.checkpoint import Checkpoint
from model_def.config import ModelConfig
from model_def.decoder import Layer
from model_def.presets import PRESETS
from model_def.specs import LayerSpec
from passes.base import Context, Workload
from passes.pipeline import DEFAULT_PIPELINE, IMPORTED_PIPELINE, Pipeline, check_forms, check_required
from passes.settings import PassError
from passes.verify import CertificateError, Specimen

EMBEDDED = Path(model_def.__file__).parent  # presets that ship with weights lie here, by name


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


def compile(model: str | Path, output: str | Path, progress: Progress = silent, **settings: Any) -> Artifact:
    """Compile a preset or a Hugging Face folder into an artifact folder.

    `settings` are the fields of Options. Raises ConfigError, CheckpointError, TokenizerError, CaptureError,
    OptionError, PassError or ArtifactError when the input is at fault, CertificateError or RequirementError when a
    pass failed; then no artifact is written. Beside it, a failed certificate leaves a script that shows the failure
    again.
    """
    options = options_from(settings)
    check_output(output)
    found = open_model(model, options)
    _check_early(options, found.config)
    try:
        program = build(found.config, options, progress)
    except CertificateError as error:
        raise explain(error, output) from error
    return write_artifact(
        program,
        output,
        passes=[record.spec for record in program.records["embed", "prefill"]],
        max_batch=options.max_batch,
        max_length=options.length_for(found.config.max_position_embeddings),
        read=found.checkpoint.tensor if found.checkpoint else None,
        report=documents(program, options),
        checkpoint=found.checkpoint.folder if found.checkpoint else None,
        native=options.aot,
        progress=lambda line: progress(Event("artifact", line, 0, 1)),
    )


def _check_early(options: Options, config: ModelConfig) -> None:
    """What would otherwise be found out only after the capture, or after everything."""
    options.length_for(config.max_position_embeddings)
    kept = _pipeline(options).passes
    for name in options.require:
        if _all_passes(options).find(name).name() not in [one.name() for one in kept]:
            raise PassError(f"required pass {name!r} is left out, by disable or by until")


def _all_passes(options: Options) -> Pipeline:
    return Pipeline(IMPORTED_PIPELINE if options.origin == "transformers" else DEFAULT_PIPELINE)


def _pipeline(options: Options) -> Pipeline:
    return _all_passes(options).configured(options.set, options.disable, options.until, options.repeat)


def _layers(config: ModelConfig, options: Options) -> Callable[[LayerSpec, torch.dtype], nn.Module]:
    """What builds the layers that are captured."""
    if options.origin == "definition":
        return Layer
    from dsv3_compile.transformers_layers import TransformersLayers

    return TransformersLayers(config)


def open_model(model: str | Path, options: Options) -> Model:
    """A preset by name, or a folder. Opens the checkpoint, compares it with what the config asks for, and looks whether
    its tokenizer can be read."""
    if str(model) in PRESETS and not Path(model).exists():
        if options.no_weights:
            return Model(PRESETS[str(model)], None)
        model = EMBEDDED / str(model)
        if not model.exists():
            raise OptionError(
                f"{model.name} is a preset, which has no weights; name a folder: only compile --no-weights needs none"
            )
    if not Path(model).exists():
        raise OptionError(f"{model}: no such folder; accepted: a folder, or {', '.join(PRESETS)}")
    if options.no_weights:
        return Model(ModelConfig.from_file(model), None)
    checkpoint = Checkpoint.open(model)
    checkpoint.validate()
    check_tokenizer(checkpoint.folder)
    return Model(checkpoint.config, checkpoint)


def build(config: ModelConfig, options: Options, progress: Progress = silent) -> Program:
    """Capture every distinct block, send it through the passes of each phase, and lay out the schedule."""
    dtype = options.dtype_for(config.dtype)
    pipeline = _pipeline(options)
    blocks = capture(config, dtype, _capturing(progress, "capture"), _layers(config, options))
    specimens = specimens_of(blocks, config, dtype, options, progress) if options.verify else {}
    workloads = {phase: workload(config, options, phase) for phase in PHASES}
    program = Program(config, dtype, options.machine, blocks, schedule(config), workloads, origin=options.origin)
    context = Context("prefill", program.target, workloads["prefill"])
    longest = config.max_position_embeddings
    program.plans = phase_plans(config, blocks, context, options.max_batch, longest)
    for (name, phase), block in blocks.items():
        label = f"{name} {phase}"
        history = History(workloads[phase])
        context = Context(phase, program.target, workloads[phase])
        step = _steps(progress, label, len(pipeline.passes))
        specimen = specimens.get((name, phase))
        records = pipeline.run(block.module, context, label, specimen, step, history)
        check_ops(block)
        if specimen is not None:
            program.certificates[name, phase] = specimen.certify_whole(label)
        program.records[name, phase] = records
        program.graphs[name, phase] = history.document()
        dump(name, phase, records, program.graphs[name, phase])
    everything = [record for records in program.records.values() for record in records]
    check_forms(pipeline.passes, everything)
    check_required(everything, options.require)
    for name in dict.fromkeys(name for name, _ in blocks):
        share_weights(program.phases(name))
    return program


def schedule(config: ModelConfig) -> tuple[Occurrence, ...]:
    """Which block runs at every step, on which checkpoint tensors."""
    layer_blocks = block_names(config)
    steps = []
    for block in names.blocks(config):
        weights = {name.replace(".", "_"): found for name, found in names.sources(config, block).items()}
        if isinstance(block, int):
            steps.append(Occurrence(layer_blocks[block], block, weights))
        else:
            steps.append(Occurrence(block, None, weights))
    return tuple(steps)


def workload(config: ModelConfig, options: Options, phase: str) -> Workload:
    """Sizes at which costs are compared: one whole prompt, or a full batch at full length."""
    length = options.length_for(config.max_position_embeddings)
    return Workload(1, length, length) if phase == "prefill" else Workload(options.max_batch, 1, length)


def specimens_of(
    blocks: dict[tuple[str, str], BlockGraph],
    config: ModelConfig,
    dtype: torch.dtype,
    options: Options,
    progress: Progress,
) -> dict[tuple[str, str], Specimen]:
    """What the certificates of each block run on: the block itself, or its small twin when it is too large."""
    large = {key for key, block in blocks.items() if needs_proxy(block)}
    small, step = proxy(config), _capturing(progress, "capture at small sizes")
    twins = capture(small, dtype, step, _layers(small, options)) if large else {}
    return {key: Specimen.of((twins if key in large else blocks)[key].module, proxy=key in large) for key in blocks}


def _capturing(progress: Progress, stage: str) -> Callable[[str, int, int], None]:
    return lambda name, done, total: progress(Event(stage, name, done, total))


def _steps(progress: Progress, label: str, total: int) -> Callable[[str, int], None]:
    return lambda name, done: progress(Event("passes", f"{label}: {name}", done, total))
