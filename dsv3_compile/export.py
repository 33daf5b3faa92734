"""Taking a compiled program elsewhere: ONNX models of both phases around one file of weights.

    prefill.onnx   any number of tokens per row behind any past; projects keys and values out of the latent
    decode.onnx    one token per row; attends in the latent space, computes the chosen experts only
    weights.bin    every weight once, read by both

Inputs and outputs of both, for every layer i:

    input_ids                 int64 [batch, sequence]
    position_ids              int64 [batch, sequence]
    past_key_values.{i}.NAME  [batch, past, width]              NAME: latent and rope_key (MLA)
    logits                    float32 [batch, sequence, vocabulary]
    present.{i}.NAME          [batch, past + sequence, width]

A token is stored in slot position_ids[b, s] and attends to slots 0 … position_ids[b, s] of its row. So rows of
different lengths need no mask: pad prompts on the right, number each row from 0, and go on in every row at its
own length; what padding left behind is overwritten before anything can attend to it. For rows of one length
position_ids is past … past + sequence − 1.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import fx

from codegen.onnx import Builder, ExportError, Scope, Value, WeightFile, layout_of, translate
from codegen.onnx.builder import ONNX_TYPES, bodies
from codegen.onnx.contrib import CONTRIB
from codegen.onnx.translate import Translation
from codegen.onnx.vocabulary import one_token_experts
from dsv3_compile.artifact import writing
from dsv3_compile.driver import Event, Progress, silent
from dsv3_compile.exporting import Exported, conversion, functional
from dsv3_compile.packaging import TOKENIZER_FILES
from dsv3_compile.program import PHASES, Occurrence, Program, Reader, bind, recipe_of
from passes.base import Role

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11
WEIGHTS = "weights.bin"


@dataclass(frozen=True)
class StoredWeight:
    """How a weight lies in the weight file."""

    name: str
    node: fx.Node
    layout: str  # of codegen.onnx.layout_of


def export_onnx(
    model: str | Path,
    output: str | Path,
    *,
    dtype: str = "float32",
    contrib: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Exported:
    """Compile a preset, a Hugging Face folder or an artifact's checkpoint, and write it as ONNX.

    dtype: float32 or float16; weights stored otherwise are converted. contrib: experts and DeepSeek-V3's routing as
    ONNX Runtime's own operators instead of standard ones. `settings` are the fields of Options.
    Raises ExportError for what has no ONNX form, and what `compile` raises.
    """
    program, checkpoint = functional(model, output, dtype, progress, settings, ExportError)
    converted = conversion(program.config, dtype)
    write_onnx(program, output, checkpoint.tensor, checkpoint.folder, converted, progress, contrib)
    return Exported(Path(output), dtype, converted)


def write_onnx(
    program: Program,
    output: str | Path,
    read: Reader,
    checkpoint: Path | None = None,
    converted: str = "",
    progress: Progress = silent,
    contrib: bool = False,
) -> None:
    """Write a program, compiled without `lower`, as a new folder, wholly or not at all.

    read: reads checkpoint tensors, of which one bound tensor's worth is in memory at a time. checkpoint: its
    folder, for the tokenizer.
    """
    plan = weight_plan(program, contrib)
    with writing(output) as folder:
        weights = WeightFile(folder / WEIGHTS)
        count = sum(len(program.weights(step.block)) for step in program.schedule)
        with weights.path.open("wb") as stream:
            for done, (key, tensor) in enumerate(bind(program, read)):
                progress(Event("weights", key, done, count))
                stored = plan[key]
                if stored.name not in weights.entries:
                    weights.write(stream, stored.name, tensor, stored.layout)
        for phase in PHASES:
            progress(Event("onnx", phase, PHASES.index(phase), len(PHASES)))
            model = phase_model(program, phase, plan, weights, converted, contrib)
            (folder / f"{phase}.onnx").write_bytes(model.SerializeToString())
            onnx.checker.check_model(str(folder / f"{phase}.onnx"), full_check=True)
        for name in TOKENIZER_FILES if checkpoint else ():
            if (checkpoint / name).is_file():  # type: ignore[operator]
                shutil.copyfile(checkpoint / name, folder / name)  # type: ignore[operator]


def weight_plan(program: Program, contrib: bool = False) -> dict[str, StoredWeight]:
    """How every weight of the schedule is stored, by its key: one entry for weights that are one tensor."""
    named: dict[str, tuple[str, fx.Node]] = {}
    uses: dict[str, list[tuple[fx.Node, int]]] = {}
    for step in program.schedule:
        for graph in program.phases(step.block):
            for node in graph.inputs(Role.WEIGHT):
                name = _stored_name(step, node)
                named[step.key(node.name)] = name, node
                uses.setdefault(name, []).extend(
                    (user, index) for user in node.users for index, arg in enumerate(user.args) if arg is node
                )
    return {key: StoredWeight(name, node, layout_of(uses[name], contrib)) for key, (name, node) in named.items()}


def phase_model(
    program: Program,
    phase: str,
    plan: Mapping[str, StoredWeight],
    weights: WeightFile,
    converted: str = "",
    contrib: bool = False,
) -> onnx.ModelProto:
    """The whole model in one phase: every layer's block, one behind the other."""
    b = Builder()
    queries: int | str = 1 if phase == "decode" else "sequence"
    tokens = [
        helper.make_tensor_value_info(name, ONNX_TYPES[torch.int64], ["batch", queries]) for name in TOKENS.values()
    ]
    layers = [step for step in program.schedule if step.layer is not None]
    pasts = {(step.layer, node.name): node for step in layers for node in _caches(program, step, phase)}
    inputs = tokens + [_cache_info("past_key_values", *key, node, "past_sequence") for key, node in pasts.items()]
    _name_sizes(b, phase, inputs[len(tokens)].name)
    values = {block: Value(name, (), torch.int64) for block, name in TOKENS.items()}
    special: Mapping[Any, Translation] = (
        {torch.ops.dsv3.routed_swiglu.default: one_token_experts} if phase == "decode" else {}
    )
    if contrib:
        special = CONTRIB
    outputs = []
    output_names: dict[str, str] = {}
    for step in program.schedule:
        graph = program.blocks[step.block, phase]
        caches = graph.inputs(Role.CACHE)
        given: dict[str, Value] = {}
        for node in graph.inputs():
            fake = node.meta["val"]
            if node in caches:
                name = _with_room(b, step, node)
            elif node.meta["role"] is Role.WEIGHT:
                given[node.name] = _weight_value(plan[step.key(node.name)], fake)
                continue
            else:
                name = values[node.name].name
            given[node.name] = Value(name, tuple(fake.shape), fake.dtype)
        results = translate(b, graph.module, given, step.path, special)
        names = BLOCK_RESULTS.get(step.block, ("x_BSD",))
        values.update(zip(names, results, strict=False))
        for node, result in zip(caches, results[len(names) :], strict=True):
            info = _cache_info("present", step.layer, node.name, node, "total_sequence")
            outputs.append(info)
            output_names[result.name] = info.name
    logits = values["logits_BSV"]
    vocabulary = int(logits.shape[-1])
    b.rename({**output_names, logits.name: "logits"})
    info = helper.make_tensor_value_info("logits", ONNX_TYPES[logits.dtype], ["batch", queries, vocabulary])
    used = _read_by(b.nodes)
    external = [entry for name, entry in weights.entries.items() if name in used]
    graph = helper.make_graph(
        b.nodes, f"{program.config.model_type}_{phase}", inputs, [info, *outputs], [*b.initializers.values(), *external]
    )
    opsets = [helper.make_opsetid(domain, OPSET if domain == "" else 1) for domain in sorted(b.domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dsv3-compile")
    helper.set_model_props(model, _metadata(program, phase, converted))
    return model


TOKENS = {"input_ids_BS": "input_ids", "positions_BS": "position_ids"}
BLOCK_RESULTS = {"embed": ("x_BSD", "cos_BSF", "sin_BSF"), "head": ("logits_BSV",)}


def _metadata(program: Program, phase: str, converted: str) -> dict[str, str]:
    layers = [step for step in program.schedule if step.layer is not None]
    layout = {
        f"past_key_values.{step.layer}.{_cache_name(node.name)}": ["batch", "past_sequence", *_widths(node)]
        for step in layers
        for node in _caches(program, step, phase)
    }
    return {
        "dsv3.family": program.config.model_type,
        "dsv3.phase": phase,
        "dsv3.opset": str(OPSET),
        "dsv3.dtype": str(program.dtype).removeprefix("torch."),
        "dsv3.converted": converted,
        "dsv3.config": json.dumps(program.config.to_dict()),
        "dsv3.cache_layout": json.dumps(layout),
        "dsv3.cache_rule": "slot = position_ids[b, s]; a token attends to slots 0 … its own",
    }


def _name_sizes(b: Builder, phase: str, first_past: str) -> None:
    with b.within(Scope("model", "sizes")):
        b.let("B", b.op("Shape", "input_ids", start=0, end=1))
        b.let("S", b.ints(1) if phase == "decode" else b.op("Shape", "input_ids", start=1, end=2))
        past = b.op("Shape", first_past, start=1, end=2)
        b.let("T", b.op("Add", past, b.letter("S")))


def _with_room(b: Builder, step: Occurrence, cache: fx.Node) -> str:
    """A past with empty slots for the tokens of this call."""
    fake = cache.meta["val"]
    widths = tuple(_widths(cache))

    def empty() -> str:
        with b.within(Scope("model", "empty_slots")):
            sizes = b.op("Concat", b.letter("B"), b.letter("S"), b.ints(*widths), axis=0)
            return b.op("Expand", b.scalar(0.0, fake.dtype), sizes)

    past = f"past_key_values.{step.layer}.{_cache_name(cache.name)}"
    with b.within(Scope(f"model.{step.prefix}.self_attn", cache.name)):
        return b.op("Concat", past, b.once(("empty slots", widths, fake.dtype), empty), axis=1)


def _weight_value(stored: StoredWeight, fake: torch.Tensor) -> Value:
    name, transposed = ("", stored.name) if stored.layout == "transposed" else (stored.name, "")
    return Value(name, tuple(fake.shape), fake.dtype, transposed)


def _caches(program: Program, step: Occurrence, phase: str) -> list[fx.Node]:
    return program.blocks[step.block, phase].inputs(Role.CACHE)


def _cache_name(placeholder: str) -> str:
    """latent_BTC → latent"""
    return placeholder.rsplit("_", 1)[0]


def _widths(cache: fx.Node) -> list[int]:
    return [int(size) for size in cache.meta["val"].shape[2:]]


def _cache_info(kind: str, layer: int | None, placeholder: str, node: fx.Node, length: str) -> onnx.ValueInfoProto:
    name = f"{kind}.{layer}.{_cache_name(placeholder)}"
    return helper.make_tensor_value_info(name, ONNX_TYPES[node.meta["val"].dtype], ["batch", length, *_widths(node)])


def _stored_name(step: Occurrence, weight: fx.Node) -> str:
    """The checkpoint's name of a tensor; of stacked experts, theirs without the number."""
    if recipe_of(weight) is not None:
        return f"model.{step.key(weight.name)}"
    names = step.sources[weight.name]
    return names[0] if len(names) == 1 else re.sub(r"\.0\.", ".", names[0], count=1) if len(names) > 1 else weight.name


def _read_by(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names that nodes and the bodies of loops read."""
    found: set[str] = set()
    for node in nodes:
        found |= set(node.input)
        for body in bodies(node):
            found |= _read_by(body.node)
    return found
