"""Taking a compiled program to MLIR: one function per phase, caches and weights as arguments.

    prefill.mlir, decode.mlir   functions `prefill` and `decode`
    signature.json              names, shapes and dtypes of their arguments and results, in order
    weights.safetensors         the weights among the arguments, by name; not written when they are inline

Arguments are input_ids and position_ids, int64 [batch, tokens], then per layer its caches [batch, slots, width], then
the weights. Results are the logits and the caches with the new tokens in slots position_ids. A token attends to slots
0 … its own; a cache holds as many slots as the caller gives it, or as `sizes` fixes.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from codegen.mlir import (
    DIALECTS,
    FIXED_SIZES,
    MlirError,
    PortableBlock,
    applied,
    decomposed,
    require_torch_mlir,
    to_mlir,
)
from codegen.onnx.translate import model_line, module_path
from dsv3_compile.artifact import writing
from dsv3_compile.driver import Event, Progress, silent
from dsv3_compile.exporting import Exported, conversion, functional
from dsv3_compile.packaging import save_tensors
from dsv3_compile.program import PHASES, Occurrence, Program, bind
from passes.base import Role

LARGEST_SIZE = 1 << 16


@dataclass(frozen=True)
class Sizes:
    """Rows, tokens per row of a prefill, and slots of a cache, where they are not left free."""

    batch: int
    tokens: int
    slots: int

    def __post_init__(self) -> None:
        if min(self.batch, self.tokens) < 1 or self.slots < self.tokens:
            given = f"{self.batch},{self.tokens},{self.slots}"
            raise MlirError(f"sizes {given}; expected batch, tokens, slots from 1, and no more tokens than slots")


EXAMPLE = Sizes(2, 3, 7)  # free sizes while they are traced
FIXED = Sizes(1, 32, 256)  # where a dialect wants numbers and none are given


@dataclass(frozen=True)
class Argument:
    name: str
    dtype: str
    shape: tuple[int | str, ...]


class WholeModel(nn.Module):
    """Every block of a phase, one behind the other, as a function of tokens, caches and weights."""

    def __init__(self, program: Program, phase: str, inline: dict[str, Tensor]) -> None:
        super().__init__()
        self.program, self.phase = program, phase
        self.weight_names = used_weights(program, phase)
        self.inline = bool(inline)
        for index, name in enumerate(self.weight_names if inline else ()):
            self.register_buffer(f"weight_{index}", inline[name])

    def forward(self, input_ids: Tensor, position_ids: Tensor, caches: list[Tensor], weights: list[Tensor]) -> Any:
        if self.inline:
            weights = [getattr(self, f"weight_{index}") for index in range(len(self.weight_names))]
        named = dict(zip(self.weight_names, weights, strict=True))
        values = {"input_ids_BS": input_ids, "positions_BS": position_ids}
        rest: list[Tensor] = list(caches)
        written: list[Tensor] = []
        for step in self.program.schedule:
            graph = self.program.blocks[step.block, self.phase]
            given = []
            for node in graph.inputs():
                if node.meta["role"] is Role.WEIGHT:
                    given.append(named[step.key(node.name)])
                else:
                    given.append(rest.pop(0) if node.meta["role"] is Role.CACHE else values[node.name])
            results = PortableBlock(graph.module).run(*given)
            values["x_BSD"] = results[0]
            if step.block == "embed":
                values["cos_BSF"], values["sin_BSF"] = results[1:]
            written += results[1:] if step.layer is not None else ()
        return values["x_BSD"], *written


def export_mlir(
    model: str | Path,
    output: str | Path,
    *,
    dialect: str = "linalg",
    inline: bool = False,
    dtype: str = "float32",
    sizes: Sizes | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Exported:
    """Compile a preset, a Hugging Face folder or an artifact's checkpoint, and write it as MLIR.

    dialect: torch, linalg (on tensors), stablehlo or tosa. inline: weights as constants instead of arguments.
    sizes: batch, tokens and slots as numbers; None leaves them free, but TOSA, which has no free sizes, gets FIXED.
    Raises MlirError for what the dialect cannot express, and what `compile` raises.
    """
    if dialect not in DIALECTS:
        raise MlirError(f"dialect {dialect!r}; accepted: {', '.join(DIALECTS)}")
    require_torch_mlir()
    program, checkpoint = functional(model, output, dtype, progress, settings, MlirError, sizes.slots if sizes else 0)
    weights = {name: tensor.clone() for name, tensor in bind(program, checkpoint.tensor)}
    write_mlir(program, output, weights, dialect, inline, sizes, progress)
    return Exported(Path(output), dtype, conversion(program.config, dtype))


def write_mlir(
    program: Program,
    output: str | Path,
    weights: dict[str, Tensor],
    dialect: str = "linalg",
    inline: bool = False,
    sizes: Sizes | None = None,
    progress: Progress = silent,
) -> None:
    """Write a program, compiled without `lower`, as a new folder. weights: bound tensors by key."""
    if dialect in FIXED_SIZES:
        sizes = sizes or FIXED
    signature = {}
    with writing(output) as folder:
        for done, phase in enumerate(PHASES):
            progress(Event("mlir", phase, done, len(PHASES)))
            exported = whole_program(program, phase, weights if inline else {}, sizes)
            try:
                (folder / f"{phase}.mlir").write_text(to_mlir(exported, dialect, phase))
            except MlirError as error:
                raise MlirError(f"{error}{origin(program, phase, error.operator)}", error.operator) from error
            signature[phase] = _signature(program, phase, inline, sizes)
        document = {"dialect": dialect, "config": program.config.to_dict(), "functions": signature}
        (folder / "signature.json").write_text(json.dumps(document, indent=1) + "\n")
        if not inline:
            save_tensors(weights, folder / "weights.safetensors")


def whole_program(
    program: Program, phase: str, inline: dict[str, Tensor], sizes: Sizes | None = None
) -> ExportedProgram:
    """One phase in plain ATen; without `sizes`, batch, tokens (of prefill) and slots are free."""
    example = sizes or EXAMPLE
    queries = 1 if phase == "decode" else example.tokens
    caches = [node.meta["val"] for _, node in _caches(program, phase)]
    nodes = _weight_nodes(program, phase)
    held = [] if inline else [torch.empty(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in nodes.values()]
    ids = torch.zeros(example.batch, queries, dtype=torch.int64)
    given = [torch.zeros(example.batch, example.slots, *map(int, c.shape[2:]), dtype=c.dtype) for c in caches]
    module = WholeModel(program, phase, inline).eval()
    shapes = None if sizes else _free(phase, len(given), len(held))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own pytrees
        exported = torch.export.export(module, (ids, ids.clone(), given, held), dynamic_shapes=shapes)
    return decomposed(exported)


def _free(phase: str, caches: int, weights: int) -> Any:
    batch, slots = Dim("B", min=1, max=LARGEST_SIZE), Dim("T", min=2, max=LARGEST_SIZE)
    tokens: dict[int, Any] = {0: batch}
    if phase == "prefill":
        tokens[1] = Dim("S", min=2, max=LARGEST_SIZE)
    return tokens, tokens, [{0: batch, 1: slots}] * caches, [{}] * weights


def origin(program: Program, phase: str, operator: str) -> str:
    """The first node that comes down to an ATen operator, with its model line; "" if none does."""
    for step in program.schedule:
        for node in program.blocks[step.block, phase].module.graph.nodes:
            if node.op == "call_function" and operator in applied(node):
                line = model_line(node)
                return f": node {node.name} of {module_path(step.path, node)}" + (f" ({line})" if line else "")
    return ""


def used_weights(program: Program, phase: str) -> list[str]:
    """Keys of the weights that a phase reads, in the order of its arguments."""
    return list(_weight_nodes(program, phase))


def _weight_nodes(program: Program, phase: str) -> dict[str, Any]:
    steps = [(step, program.blocks[step.block, phase]) for step in program.schedule]
    return {step.key(node.name): node for step, graph in steps for node in graph.inputs(Role.WEIGHT)}


def _caches(program: Program, phase: str) -> list[tuple[Occurrence, Any]]:
    steps = [(step, program.blocks[step.block, phase]) for step in program.schedule]
    return [(step, node) for step, graph in steps for node in graph.inputs(Role.CACHE)]


def _signature(program: Program, phase: str, inline: bool, sizes: Sizes | None) -> dict[str, list[Any]]:
    batch, several, slots = (sizes.batch, sizes.tokens, sizes.slots) if sizes else ("batch", "tokens", "slots")
    tokens = (batch, 1 if phase == "decode" else several)
    caches = []
    for step, node in _caches(program, phase):
        name = f"{step.prefix}.{node.name.rsplit('_', 1)[0]}"
        fake = node.meta["val"]
        caches.append(Argument(name, _dtype(fake), (batch, slots, *map(int, fake.shape[2:]))))
    arguments = [Argument(name, "int64", tokens) for name in ("input_ids", "position_ids")] + caches
    if not inline:
        for key, node in _weight_nodes(program, phase).items():
            arguments.append(Argument(key, _dtype(node.meta["val"]), tuple(map(int, node.meta["val"].shape))))
    logits = Argument("logits", "float32", (*tokens, program.config.vocab_size))
    return {"arguments": [vars(one) for one in arguments], "results": [vars(one) for one in (logits, *caches)]}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
