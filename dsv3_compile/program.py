"""A compiled program: the distinct blocks as graphs, and the schedule that binds weights to them.

    Program
      blocks    ("moe", "decode") → BlockGraph       one per distinct block and phase
      schedule  Occurrence("moe", layer 5, sources)  one per layer, plus embed and head

A block's graph takes its weights as inputs. What such an input holds is told by its placeholder: with
`meta["bind"]` (a recipe: a graph with one output whose placeholders are original weight names) it is what the
recipe computes, without it is the checkpoint tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from codegen.targets import Target
from passes.base import Role, Workload, placeholders
from passes.pipeline import PassRecord
from passes.verify import Certificate

PHASES = ("prefill", "decode")

Source = tuple[str, ...]
"""Checkpoint names behind a weight; where the weight has one more axis, they are stacked along it (experts)."""

Reader = Callable[[str], Tensor]
"""Reads one checkpoint tensor by name, dequantised if it was stored in FP8."""


@dataclass
class BlockGraph:
    """One block in one phase: placeholders carry `meta["role"]`, every node carries `meta["val"]`."""

    name: str
    phase: str
    module: fx.GraphModule

    def inputs(self, role: Role | None = None) -> list[fx.Node]:
        """Placeholders in calling order, of one role or all."""
        return placeholders(self.module.graph, role)

    def outputs(self) -> tuple[fx.Node, ...]:
        (results,) = self.module.graph.output_node().args
        return cast(tuple[fx.Node, ...], results)


@dataclass(frozen=True)
class Occurrence:
    """One step of the schedule: which block runs, as which layer, on which checkpoint tensors."""

    block: str
    layer: int | None  # None for embed and head
    sources: Mapping[str, Source]  # original weight placeholder → checkpoint names

    @property
    def prefix(self) -> str:
        return self.block if self.layer is None else f"layers.{self.layer}"

    @property
    def path(self) -> str:
        """Of its module in the model."""
        return "model" if self.layer is None else f"model.{self.prefix}"

    def key(self, weight: str) -> str:
        """Name of a bound tensor in the artifact: `layers.5.gate_up`."""
        return f"{self.prefix}.{weight}"


@dataclass
class Program:
    """Everything that is needed to write an artifact, except the weights."""

    config: Any
    dtype: torch.dtype
    target: Target
    blocks: dict[tuple[str, str], BlockGraph]
    schedule: tuple[Occurrence, ...]
    workloads: dict[str, Workload]  # by phase: sizes at which costs were compared
    records: dict[tuple[str, str], list[PassRecord]] = field(default_factory=dict)
    certificates: dict[tuple[str, str], Certificate] = field(default_factory=dict)  # of all passes together
    graphs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # report.history, for the report
    origin: str = "definition"  # whose layers were captured
    plans: list[dict[str, Any]] = field(default_factory=list)  # report.phase_plan, for the report

    def phases(self, block: str) -> list[BlockGraph]:
        """The graphs of one block, one per phase, in the order of PHASES."""
        return [self.blocks[block, phase] for phase in PHASES if (block, phase) in self.blocks]

    def weights(self, block: str) -> dict[str, fx.Node]:
        """Weight placeholders of a block over all its phases, each name once."""
        return {node.name: node for graph in self.phases(block) for node in graph.inputs(Role.WEIGHT)}


def recipe_of(weight: fx.Node) -> fx.GraphModule | None:
    """The recipe that computes a weight input, or None when it is the checkpoint tensor of its name."""
    return weight.meta.get("bind")


def weight_inputs(weight: fx.Node) -> list[str]:
    """Original weight placeholders that a weight input is made from."""
    recipe = recipe_of(weight)
    return [weight.name] if recipe is None else [str(node.target) for node in placeholders_of(recipe)]


def placeholders_of(recipe: fx.GraphModule) -> list[fx.Node]:
    return [node for node in recipe.graph.nodes if node.op == "placeholder"]


def content_key(weight: fx.Node) -> str:
    """Equal for two weight inputs exactly when their recipes are the same text up to local names."""
    recipe = recipe_of(weight)
    if recipe is None:
        return weight.name
    numbers: dict[fx.Node, str] = {}
    lines = []
    for index, node in enumerate(recipe.graph.nodes):
        if node.op == "placeholder":
            numbers[node] = str(node.target)
            continue
        numbers[node] = f"%{index}"
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(numbers[n]))
        lines.append(f"{numbers[node]} = {node.op} {node.target} {args} {kwargs}")
    return "\n".join(lines)


class _Name(str):
    """A string that prints without quotes, so that a reference cannot be confused with a literal."""

    __repr__ = str.__str__


def share_weights(graphs: list[BlockGraph]) -> None:
    """Give weight inputs of equal content one name over the phases, unequal ones different names.

    The runtime then holds each bound tensor once, whichever phases read it.
    """
    names: dict[str, str] = {}  # content → name
    for graph in graphs:
        weights = graph.inputs(Role.WEIGHT)
        for weight in weights:
            content = content_key(weight)
            if content not in names:
                taken = weight.name in names.values()
                names[content] = f"{weight.name}_{graph.phase}" if taken else weight.name
        _rename(graph, {weight: names[content_key(weight)] for weight in weights})


def _rename(graph: BlockGraph, names: dict[fx.Node, str]) -> None:
    wanted = set(names.values())
    for node in graph.module.graph.nodes:
        if node not in names and node.name in wanted:
            node._rename(f"{node.name}_local")
    for node, name in names.items():
        node.name = node.target = name
    graph.module.recompile()


def bind(program: Program, read: Reader) -> Iterator[tuple[str, Tensor]]:
    """Yield every bound tensor as (key, tensor), one at a time, in schedule order.

    `read` is asked for checkpoint tensors by name; a tensor is read again for every recipe that needs it, so
    memory stays at the largest recipe. Raises ValueError naming the checkpoint tensor whose shape differs
    from what the block was captured with.
    """
    weights = {step.block: program.weights(step.block) for step in program.schedule}
    originals = {block: _original_shapes(nodes) for block, nodes in weights.items()}
    for step in program.schedule:
        for name, node in weights[step.block].items():
            yield step.key(name), bind_one(node, partial(_load, step, originals[step.block], read))


def bind_one(weight: fx.Node, load: Callable[[str], Tensor]) -> Tensor:
    """The value of one weight input, given a function that loads original weights by placeholder name."""
    value = weight.meta["val"]
    recipe = recipe_of(weight)
    arguments = [load(name) for name in weight_inputs(weight)]
    with torch.no_grad():
        tensor = arguments[0] if recipe is None else recipe(*arguments)
    if isinstance(tensor, (tuple, list)):
        (tensor,) = tensor
    return tensor.to(value.dtype).contiguous()


def _original_shapes(weights: dict[str, fx.Node]) -> dict[str, Any]:
    """Fake values of the original weights behind the weight inputs of a block, by placeholder name."""
    shapes = {}
    for name, node in weights.items():
        recipe = recipe_of(node)
        for original in [node] if recipe is None else placeholders_of(recipe):
            shapes[name if recipe is None else str(original.target)] = original.meta["val"]
    return shapes


def _load(step: Occurrence, originals: dict[str, Any], read: Reader, original: str) -> Tensor:
    names = step.sources[original]
    value = originals[original]
    shape = tuple(value.shape)
    first = read(names[0])
    if len(names) == 1 and first.ndim == len(shape):
        return _checked(first, names[0], shape).to(value.dtype)
    # Filled slice by slice: a list of all experts beside their stack would double the memory.
    stacked = torch.empty((len(names), *shape[1:]), dtype=value.dtype)
    for index, name in enumerate(names):
        stacked[index] = _checked(first if index == 0 else read(name), name, shape[1:])
    return stacked


def _checked(tensor: Tensor, name: str, expected: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != expected:
        found = list(tensor.shape)
        raise ValueError(f"checkpoint tensor {name} has shape {found}; expected {list(expected)}")
    return tensor
