"""`dsv3_compile.compile(module, example_inputs)`: any module, exported as one graph, through the passes to Inductor.

Unlike torch.compile there are no guards, no recompiles and no Python left: what torch.export cannot capture whole is
an error here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils._pytree import tree_flatten, tree_unflatten

from dsv3_compile import backend
from dsv3_compile.functional import Functional, callable_again, short_name
from dsv3_compile.owners import owners
from dsv3_compile.tracing import tidy
from passes.base import Role, placeholders
from passes.inputs import expression_of


class ModuleError(ValueError):
    """A module, or inputs, that cannot be compiled this way. One line: why."""


@dataclass(frozen=True)
class Signature:
    """How a module is called: the structure of its arguments and results, and the arguments that are no tensors."""

    arguments: Any
    results: Any
    constants: Mapping[int, Any]  # by position among the flattened arguments
    tensors: tuple[Tensor, ...]  # fake, with the free sizes as symbols


class CompiledModule(nn.Module):
    """A compiled module: called like the original, whose parameters and buffers it shares.

    `report` is the document of `dsv3_compile.last_report`.
    """

    def __init__(
        self, function: Callable[..., Any], state: Sequence[Tensor], signature: Signature, report: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.report = report
        self._function, self._state, self._signature = function, list(state), signature

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat, structure = tree_flatten((args, kwargs))
        if structure != self._signature.arguments:
            raise ModuleError("the arguments have another structure than the example inputs had")
        given = checked(flat, self._signature)
        return tree_unflatten(list(self._function(*self._state, *given)), self._signature.results)


@torch.no_grad()  # or Inductor would trace a backward pass that nobody may call
def compile_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    dynamic_shapes: Any = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledModule:
    """Compile any module for inference.

    example_inputs: positional arguments, as torch.export takes them. dynamic_shapes: which of their sizes are free,
    in torch.export's own terms; none where omitted. mode, options: as of `torch.compile(backend="dsv3")`.
    Raises ModuleError for a module that torch.export cannot capture as one graph, and what the backend raises.
    """
    if not isinstance(module, nn.Module):
        raise ModuleError(f"cannot compile a {type(module).__name__} by example inputs; expected an nn.Module")
    if not isinstance(example_inputs, (tuple, list)):
        raise ModuleError(f"example_inputs is a {type(example_inputs).__name__}; expected a tuple of arguments")
    settings, others = backend.split_options(options)
    try:
        exported = torch.export.export(module.eval(), tuple(example_inputs), dynamic_shapes=dynamic_shapes)
        exported = exported.run_decompositions({})
    except Exception as error:  # whatever tracing somebody's code raises
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModuleError(f"torch.export cannot capture {type(module).__name__}: {first[0]}") from error
    found, state = functional_of(exported)
    inputs = placeholders(found.module.graph)
    signature = signature_of(exported, inputs[len(state) :], example_inputs)
    real = [*state, *checked(tree_flatten((tuple(example_inputs), {}))[0], signature)]
    integers = {n.name: t.cpu() for n, t in zip(inputs, real, strict=True) if not t.is_floating_point()}
    fakes = [node.meta["val"] for node in inputs]
    _, report = backend.improve(found, fakes, settings, integers)
    return CompiledModule(backend.inductor(callable_again(found), fakes, mode, others), state, signature, report)


def functional_of(exported: ExportedProgram) -> tuple[Functional, list[Tensor]]:
    """An exported program as a graph for the passes, and the parameters, buffers and constants it takes first."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    signature, state = exported.graph_signature, list[Tensor]()
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    written = [spec for spec in signature.output_specs if spec.kind in WRITTEN]
    overwritten = {spec.target for spec in written}
    order: list[Any] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if not isinstance(spec.arg, TensorArgument):
                continue
            own = spec.kind is not InputKind.USER_INPUT
            target = spec.target if own else node.name
            if own:
                state.append(_state_of(exported, str(target)))
            order.append(target)
            copies[node] = graph.placeholder(short_name(str(target).replace(".", "_")))
            role = Role.WEIGHT if own and target not in overwritten else Role.INPUT
            copies[node].meta = {"val": node.meta["val"], "role": role}
        elif node.op == "output":
            results = node.args[0]
            graph.output(tuple(fx.node.map_arg(results, copies.__getitem__)))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = tidy(node.meta)
    positions = tuple(order.index(spec.target) for spec in written)
    # torch.export no longer knows whether a result was the buffer or what went into it; like its own module, neither is
    # the buffer here.
    of_results = owners(graph)[len(positions) :]
    return Functional(fx.GraphModule(nn.Module(), graph), positions, (None,) * len(positions) + of_results), state


WRITTEN = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def _state_of(exported: ExportedProgram, name: str) -> Tensor:
    if name in exported.state_dict:
        return exported.state_dict[name].detach()
    return exported.constants[name]


def signature_of(exported: ExportedProgram, tensors: Sequence[fx.Node], example_inputs: Sequence[Any]) -> Signature:
    flat = tree_flatten((tuple(example_inputs), {}))[0]
    constants = {position: value for position, value in enumerate(flat) if not isinstance(value, Tensor)}
    arguments, results = exported.call_spec.in_spec, exported.call_spec.out_spec
    return Signature(arguments, results, constants, tuple(node.meta["val"] for node in tensors))


def checked(flat: Sequence[Any], signature: Signature) -> list[Tensor]:
    """The tensors among flattened arguments. Raises ModuleError for another number, dtype or size than exported."""
    for position, value in signature.constants.items():
        if flat[position] != value:
            raise ModuleError(f"argument {position} is {flat[position]!r}; the module was compiled for {value!r}")
    tensors = [value for position, value in enumerate(flat) if position not in signature.constants]
    sizes: dict[Any, int] = {}
    for number, (given, fake) in enumerate(zip(tensors, signature.tensors, strict=True)):
        if not isinstance(given, Tensor) or given.dtype != fake.dtype or given.ndim != fake.ndim:
            raise ModuleError(f"tensor {number} is not {fake.dtype} with {fake.ndim} dims, as the module was compiled")
        for size, wanted in zip(given.shape, fake.shape, strict=True):
            expected = wanted if isinstance(wanted, int) else sizes.setdefault(expression_of(wanted), size)
            if size != expected:
                raise ModuleError(f"tensor {number} has shape {list(given.shape)}; compiled for {list(fake.shape)}")
    return tensors
