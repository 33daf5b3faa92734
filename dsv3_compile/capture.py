"""From equations to graphs: torch.export of every distinct block, with weights and caches as inputs.

Axis letters B, S, T name the free sizes: batch, query positions, cached positions.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dsv3_compile.phases import decode_of
from dsv3_compile.program import BlockGraph
from model_def.config import ModelConfig
from model_def.decoder import Embed, Head, Layer
from model_def.specs import DenseSpec, LayerSpec
from passes.base import Role, sweep

LARGEST = {"B": 1 << 16, "S": 1 << 24, "T": 1 << 24}
EXAMPLE = {"B": 3, "S": 5, "T": 11}  # different, and none is 0 or 1: export specialises to those

CACHE_LETTERS = {"latent": "BTC", "rope_key": "BTR", "keys": "BTGA", "values": "BTGV"}

_LEFTOVERS = {torch.ops.aten._assert_tensor_metadata.default}
_TORCH_HOME = torch.__path__[0]


class CaptureError(ValueError):
    """A module that cannot become a block."""


@dataclass(frozen=True)
class Input:
    """An activation or cache of a block. Letters in `shape` are free sizes; integers lie in [0, upper)."""

    name: str
    role: Role
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    upper: int | str | None = None


def block_names(config: ModelConfig) -> list[str]:
    """The block of each layer: "dense" or "moe", numbered when a model has several of a kind."""
    specs = config.layers()
    kinds = {spec: _kind(spec) for spec in specs}
    members: dict[str, list[LayerSpec]] = {}
    for spec, kind in kinds.items():
        members.setdefault(kind, []).append(spec)
    several = {kind for kind, found in members.items() if len(found) > 1}
    return [
        f"{kinds[spec]}_{members[kinds[spec]].index(spec)}" if kinds[spec] in several else kinds[spec] for spec in specs
    ]


def _kind(spec: LayerSpec) -> str:
    return "dense" if isinstance(spec.ffn, DenseSpec) else "moe"


def capture(
    config: ModelConfig,
    dtype: torch.dtype,
    step: Callable[[str, int, int], None] = lambda name, done, total: None,
    layer: Callable[[LayerSpec, torch.dtype], nn.Module] = Layer,
) -> dict[tuple[str, str], BlockGraph]:
    """Every distinct block of a model in every phase, by (name, phase). `layer` builds the module of a layer.

    Weights are fake: nothing of the model's size is allocated. `step` is told the name of each block before it
    is captured, how many are done, and how many there are.
    """
    specs = dict(zip(block_names(config), config.layers(), strict=True))
    layers = {
        name: (functools.partial(layer, spec, dtype), layer_inputs(config, spec, dtype)) for name, spec in specs.items()
    }
    parts: dict[str, tuple[Callable[[], nn.Module], list[Input]]] = {
        "embed": (functools.partial(Embed, config, dtype), embed_inputs(config)),
        **layers,
        "head": (functools.partial(Head, config, dtype), head_inputs(config, dtype)),
    }
    blocks = {}
    for done, (name, (build, inputs)) in enumerate(parts.items()):
        step(name, done, len(parts))
        prefill = BlockGraph(name, "prefill", capture_fake(build, inputs))
        blocks[name, "prefill"], blocks[name, "decode"] = prefill, decode_of(prefill)
    return blocks


def capture_fake(build: Callable[[], nn.Module], inputs: Sequence[Input]) -> fx.GraphModule:
    """The module that `build` makes, as a block graph, with fake weights: nothing of its size is allocated."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    with mode:
        module = build()
    return capture_module(module, inputs, mode)


def embed_inputs(config: ModelConfig) -> list[Input]:
    return [
        Input("input_ids_BS", Role.ACTIVATION, ("B", "S"), torch.int64, config.vocab_size),
        Input("positions_BS", Role.ACTIVATION, ("B", "S"), torch.int64, config.max_position_embeddings),
    ]


def layer_inputs(config: ModelConfig, spec: LayerSpec, dtype: torch.dtype) -> list[Input]:
    """What a layer takes besides its weights, in calling order; caches last."""
    table = ("B", "S", config.rotary_dim // 2)
    caches = [
        Input(f"{name}_{CACHE_LETTERS[name]}", Role.CACHE, ("B", "T", *width), dtype)
        for name, width in spec.attention.cache_widths().items()
    ]
    return [
        Input("x_BSD", Role.ACTIVATION, ("B", "S", spec.hidden), dtype),
        Input("cos_BSF", Role.ACTIVATION, table, torch.float32),
        Input("sin_BSF", Role.ACTIVATION, table, torch.float32),
        Input("positions_BS", Role.ACTIVATION, ("B", "S"), torch.int64, "T"),
        *caches,
    ]


def head_inputs(config: ModelConfig, dtype: torch.dtype) -> list[Input]:
    return [Input("x_BSD", Role.ACTIVATION, ("B", "S", config.hidden_size), dtype)]


def capture_module(
    module: nn.Module, inputs: Sequence[Input], fake_mode: FakeTensorMode | None = None
) -> fx.GraphModule:
    """Any module as a block graph: weights first, then `inputs`, each a placeholder with its role.

    `fake_mode` is the mode the module was built under, if it was. The graph is functional; `meta["dims"]` of
    the result holds the symbols of the free sizes by letter. Raises CaptureError for tensor constants, which
    have no place in a checkpoint: make them buffers.
    """
    dims = {letter: Dim(letter, min=1, max=LARGEST[letter]) for one in inputs for letter in _letters(one)}
    dynamic = tuple({axis: dims[size] for axis, size in enumerate(one.shape) if size in dims} for one in inputs)
    with fake_mode or contextlib.nullcontext():
        examples = tuple(_example(one) for one in inputs)
    # Where opt_einsum is installed, torch.einsum would ask it for an order, and it fixes the free sizes.
    with warnings.catch_warnings(), torch.backends.opt_einsum.flags(enabled=False):
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own pytrees
        exported = torch.export.export(module.eval(), examples, dynamic_shapes=dynamic).run_decompositions({})
    return _block_graph(exported, inputs)


def _letters(one: Input) -> list[str]:
    return [size for size in one.shape if isinstance(size, str)]


def _example(one: Input) -> torch.Tensor:
    return torch.zeros([EXAMPLE[s] if isinstance(s, str) else s for s in one.shape], dtype=one.dtype)


def _block_graph(exported: ExportedProgram, inputs: Sequence[Input]) -> fx.GraphModule:
    block = fx.GraphModule(nn.Module(), fx.Graph())
    graph = block.graph
    copies: dict[fx.Node, fx.Node] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    remaining = iter(inputs)
    given: dict[fx.Node, Input] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            one = next(remaining) if specs[node.name].kind is InputKind.USER_INPUT else None
            copies[node] = new = _placeholder(graph, specs[node.name], one)
            new.meta["val"] = node.meta["val"]
            if one is not None:
                given[new] = one
        elif node.op == "call_function" and node.target not in _LEFTOVERS:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = tidy(node.meta)
    (result,) = exported.graph.output_node().args
    graph.output(fx.node.map_arg(result, copies.__getitem__))

    pairs = [pair for node, one in given.items() for pair in zip(one.shape, node.meta["val"].shape, strict=True)]
    sizes = {letter: size for letter, size in pairs if isinstance(letter, str)}
    for node, one in given.items():
        if one.upper is not None:
            node.meta["upper"] = sizes[one.upper] if isinstance(one.upper, str) else one.upper
    block.meta["dims"] = {letter: size.node.expr for letter, size in sizes.items()}
    _name_sizes(block)
    sweep(block)
    return block


def _name_sizes(block: fx.GraphModule) -> None:
    """Let the node that reads a free size bear its letter."""
    letters = {symbol: letter for letter, symbol in block.meta["dims"].items()}
    for node in block.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        letter = letters.pop(node.meta["val"].node.expr, None)
        if letter is not None:
            node.name = letter


def _placeholder(graph: fx.Graph, spec: InputSpec, given: Input | None) -> fx.Node:
    if given is not None:
        name, role = given.name, given.role
    elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        name, role = str(spec.target).replace(".", "_"), Role.WEIGHT
    else:
        raise CaptureError(f"tensor constant {spec.target} in the module; register it as a buffer")
    # With an explicit name the shape letters keep their case.
    node = graph.create_node("placeholder", name, name=name)
    node.meta["role"] = role
    return node


def tidy(meta: dict[str, Any]) -> dict[str, Any]:
    """What the passes need of a node's record; of its stack, the frames of the model."""
    kept: dict[str, Any] = {key: meta[key] for key in ("val", "nn_module_stack") if key in meta}
    frames = re.findall(r'File "[^"]+", line \d+.*\n(?:    .*\n?)?', meta.get("stack_trace") or "")
    kept["stack_trace"] = "  " + "  ".join(frame for frame in frames if _TORCH_HOME not in frame)
    return kept
