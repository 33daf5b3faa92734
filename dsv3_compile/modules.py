"""`dsv3_compile.compile(module, example_inputs)`: any module, exported as one graph, through the passes to Inductor.

Unlike torch.compile there are no recompiles and no Python left: what torch.export cannot capture whole is an error
here, and so are arguments that the module was not compiled for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils._pytree import tree_flatten, tree_unflatten

from dsv3_compile import backend
from dsv3_compile.arguments import ModuleError, Signature
from dsv3_compile.functional import Functional, callable_again, short_name
from dsv3_compile.inspection import Report
from dsv3_compile.owners import owners
from dsv3_compile.tracing import tidy
from passes.base import Role, module_of, placeholders


class CompiledModule(nn.Module):
    """A compiled module: called like the original, whose parameters and buffers it shares.

    It has none of its own: `state_dict()` is empty, and values are loaded into the original, in place. Its code is for
    one dtype and device, in eval mode: to move it is a ModuleError, and `train()` changes nothing.
    Calling it raises ModuleError for arguments of another structure, dtype, device, size or stride than compiled for.
    `report` is the document of `dsv3_compile.last_report`; printed, a table.
    """

    def __init__(
        self, function: Callable[..., Any], state: Sequence[Tensor], signature: Signature, report: Report
    ) -> None:
        super().__init__()
        self.report = report
        self._function, self._state, self._signature = function, list(state), signature
        self.eval()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat, structure = tree_flatten((args, kwargs))
        if structure != self._signature.arguments:
            raise ModuleError("the arguments have another structure than the example inputs had")
        given = self._signature.checked(flat)
        return tree_unflatten(list(self._function(*self._state, *given)), self._signature.results)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ModuleError, always."""
        raise ModuleError("a compiled module has no state of its own; load into the module it was compiled from")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModule:
        """What `to`, `half`, `cuda` and their like call. Raises ModuleError where they would change anything."""
        for dtype, device in {(tensor.dtype, tensor.device): None for tensor in self._state}:
            moved = fn(torch.empty(0, dtype=dtype, device=device))
            if (moved.dtype, moved.device) != (dtype, device):
                found, wanted = f"{dtype} on {device}", f"{moved.dtype} on {moved.device}"
                raise ModuleError(f"compiled for {found}, not {wanted}; move the original and compile it again")
        return self


@torch.no_grad()  # or Inductor would trace a backward pass that nobody may call
def compile_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    dynamic_shapes: Any = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledModule:
    """Compile any module for inference: what it computes in eval mode. The module itself is left in the mode it is in.

    example_inputs: positional arguments, as torch.export takes them. dynamic_shapes: which of their sizes are free,
    in torch.export's own terms; none where omitted. mode, options: as of `torch.compile(backend="dsv3")`.
    Raises ModuleError for a module that torch.export cannot capture as one graph, and what the backend raises.
    """
    if not isinstance(module, nn.Module):
        raise ModuleError(f"cannot compile a {type(module).__name__} by example inputs; expected an nn.Module")
    if not isinstance(example_inputs, (tuple, list)):
        raise ModuleError(f"example_inputs is a {type(example_inputs).__name__}; expected a tuple of arguments")
    settings, others = backend.split_options(options)
    flat = tree_flatten((tuple(example_inputs), {}))[0]
    backend.configured(settings, backend.target_of(flat))  # what is wrong with the options needs no export
    try:
        with _evaluating(module):
            exported = torch.export.export(module, tuple(example_inputs), dynamic_shapes=dynamic_shapes)
        exported = exported.run_decompositions({})
    except Exception as error:  # whatever tracing somebody's code raises
        raise ModuleError(f"torch.export cannot capture {type(module).__name__}: {_reason(error)}") from error
    found, state = functional_of(exported)
    inputs = placeholders(found.module.graph)
    signature = Signature.of(exported, inputs[len(state) :], example_inputs)
    real = [*state, *signature.checked(flat)]
    integers = {n.name: t.cpu() for n, t in zip(inputs, real, strict=True) if not t.is_floating_point()}
    fakes = [node.meta["val"] for node in inputs]
    changed, report = backend.improve(found, fakes, settings, lambda: integers)
    if not changed:  # not worth it, or stopped half-way
        found, _ = functional_of(exported)
    return CompiledModule(backend.inductor(callable_again(found), fakes, mode, others), state, signature, report)


def _reason(error: Exception) -> str:
    """One line of an error: its first, or the first item of a list below it, which says more than the heading."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return next((line.removeprefix("- ") for line in lines if line.startswith("- ")), lines[0])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A module as it is for inference; behind the block, however it ends, all of it is as it was before."""
    before = [(one, one.training) for one in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for one, training in before:
            one.training = training


def functional_of(exported: ExportedProgram) -> tuple[Functional, list[Tensor]]:
    """An exported program as a graph for the passes, and the parameters, buffers and constants it takes first.

    Raises ModuleError for an argument that is a number and free.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    signature, state = exported.graph_signature, list[Tensor]()
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    written = [spec for spec in signature.output_specs if spec.kind in WRITTEN]
    overwritten = {spec.target for spec in written}
    order: list[Any] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if isinstance(spec.arg, ConstantArgument):
                continue
            if not isinstance(spec.arg, TensorArgument):
                raise ModuleError(f"argument {node.name} is neither a tensor nor a constant; only sizes can be free")
            own = spec.kind is not InputKind.USER_INPUT
            target = spec.target if own else node.name
            if own:
                state.append(_state_of(exported, str(target)))
            order.append(target)
            copies[node] = graph.placeholder(short_name(str(target).replace(".", "_")))
            copies[node].target = copies[node].name  # which is told apart where two short names are the same
            role = Role.WEIGHT if own and target not in overwritten else Role.INPUT
            copies[node].meta = {"val": node.meta["val"], "role": role, "stays": own}
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
    return Functional(module_of(exported.graph_module, graph), positions, (None,) * len(positions) + of_results), state


WRITTEN = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def _state_of(exported: ExportedProgram, name: str) -> Tensor:
    if name in exported.state_dict:
        return exported.state_dict[name].detach()
    return exported.constants[name]
