"""From a compiled program to an artifact folder: graphs as source, bound weights in shards, native code, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, fx

from codegen.targets import Target
from dsv3_compile.artifact import (
    FILL,
    Artifact,
    ArtifactError,
    GraphEntry,
    Manifest,
    Port,
    Progress,
    Step,
    seal,
    writing,
)
from dsv3_compile.kernels import bind_kernels, write_kernels
from dsv3_compile.native import compile_native, cpu_identity
from dsv3_compile.phases import fill_of
from dsv3_compile.program import BlockGraph, Occurrence, Program, Reader, bind
from dsv3_compile.source import KernelCall, axes_of, axis_letters, graph_source
from passes.base import Role

SHARD_BYTES = 1 << 30  # how much of the weights is held in memory while writing
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def write_artifact(
    program: Program,
    output: str | Path,
    *,
    passes: Sequence[str],
    max_batch: int,
    max_length: int,
    read: Reader | None = None,
    report: Mapping[str, Mapping[str, Any]] | None = None,  # by file name
    checkpoint: Path | None = None,
    native: bool = False,
    progress: Progress = lambda line: None,
) -> Artifact:
    """Write everything into a new folder, wholly or not at all.

    read: reads checkpoint tensors; None leaves the weights out. checkpoint: its folder, for the
    tokenizer files and for `dsv3c verify`.
    native: compile the graphs for this machine's CPU as well, so that loading needs no compiler.
    """
    last = program.schedule[-2].block
    program = replace(program, blocks={**program.blocks, (last, FILL): fill_of(program.blocks[last, "prefill"])})
    with writing(output) as folder:
        bindings = bind_kernels(program, progress)
        if bindings.kernels:
            write_kernels(bindings, folder / "kernels")
        graphs: dict[str, dict[str, GraphEntry]] = {}
        for (block, phase), graph in program.blocks.items():
            entry = _write_graph(graph, folder, program.target, bindings.calls[block, phase])
            graphs.setdefault(block, {})[phase] = entry
        if native:
            graphs = compile_native(folder, graphs, progress)
        if read is not None:
            _write_weights(_announced(bind(program, read), progress), folder / "weights")
        if checkpoint is not None:
            _copy_tokenizer(checkpoint, folder / "tokenizer")
        for name, document in (report or {}).items():
            _write_json(document, folder / "report" / name)
        manifest = Manifest(
            versions={name: _version(name) for name in ("dsv3-compile", "torch", "triton")},
            target=program.target.name,
            dtype=str(program.dtype).removeprefix("torch."),
            config=program.config.to_dict(),
            max_batch=max_batch,
            max_length=max_length,
            passes=tuple(passes),
            graphs=graphs,
            schedule=tuple(_step(program, step) for step in program.schedule),
            weights="none" if read is None else "bound",
            checkpoint="" if checkpoint is None else str(checkpoint.resolve()),
            origin=program.origin,
            native_cpu=cpu_identity() if native else "",
        )
        manifest = seal(folder, manifest)
    return Artifact(Path(output), manifest)


def _write_graph(graph: BlockGraph, folder: Path, target: Target, kernels: Mapping[str, KernelCall]) -> GraphEntry:
    name = f"graphs/{graph.name}_{graph.phase}.py"
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    title = f"Block {graph.name}, {graph.phase}, for {target.name}."
    path.write_text(graph_source(graph.module, title, kernels))
    letters = axis_letters(graph.module)
    inputs = tuple(_port(node.name, node, letters) for node in graph.inputs())
    caches = graph.inputs(Role.CACHE)
    outputs = graph.outputs()
    # A block gives back its activations, then its caches in the order it took them.
    activations = len(outputs) - len(caches)
    ports = [_port(node.name, node, letters) for node in outputs[:activations]]
    for cache, node in zip(caches, outputs[activations:], strict=True):
        ports.append(_port(cache.name, node, letters, Role.CACHE))
    return GraphEntry(name, inputs, tuple(ports))


def _port(name: str, node: fx.Node, letters: dict[str, str], role: Role | None = None) -> Port:
    value = node.meta["val"]
    role = role or node.meta.get("role", Role.ACTIVATION)
    dtype = str(value.dtype).removeprefix("torch.")
    return Port(name, dtype, tuple(axes_of(value, letters)), role.value)


def _step(program: Program, step: Occurrence) -> Step:
    weights = {name: step.key(name) for name in program.weights(step.block)}
    return Step(step.block, step.layer, weights)


def _announced(tensors: Iterator[tuple[str, Tensor]], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        progress(f"weights: {name}")
        yield name, tensor


def _write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Shards of at most SHARD_BYTES (or one tensor), the first named model-00000.safetensors."""
    folder.mkdir()
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            save_tensors(shard, folder / f"model-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
        # Two bound tensors may be parts of one, which the file format refuses; cloning all would double the memory.
        shared = any(_storage(tensor) == _storage(other) for other in shard.values())
        shard[name] = tensor.clone() if shared else tensor
        size += tensor.nbytes
    save_tensors(shard, folder / f"model-{number:05d}.safetensors")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises ArtifactError where there is no room for it."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # also of what the operating system refused
        raise ArtifactError(f"{path.name}: cannot be written ({error})") from error


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _write_json(document: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
