"""The import of an exported program by torch-mlir, and its lowering to a dialect."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

DIALECTS = {"torch": "torch", "linalg": "linalg-on-tensors", "stablehlo": "stablehlo", "tosa": "tosa"}
FIXED_SIZES = ("tosa",)  # dialects in which no size is free


class MlirError(ValueError):
    """A program that a dialect cannot express, or torch-mlir missing. `operator` names what stood in the way."""

    def __init__(self, message: str, operator: str = "") -> None:
        super().__init__(message)
        self.operator = operator  # "aten.sort", or "" where it is not known


def require_torch_mlir() -> None:
    """MlirError unless torch-mlir is installed."""
    try:
        import torch_mlir.fx  # noqa: F401
    except ImportError as error:
        raise MlirError("torch-mlir is not installed: pip install 'dsv3-compile[mlir]'") from error


def decomposed(exported: ExportedProgram) -> ExportedProgram:
    """A program in the operators that torch-mlir takes apart itself; MlirError names an op that has no such form."""
    require_torch_mlir()
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    for node in exported.graph.nodes:
        if getattr(node.target, "namespace", "") == "dsv3":
            raise MlirError(f"{node.target} has no MLIR form: node {node.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own pytrees
        program = exported.run_decompositions(get_decomposition_table())
    _merge_free_axes(program.graph_module)
    return program


def _merge_free_axes(module: fx.GraphModule) -> None:
    """Views that merge axes of free size go through one flat axis.

    Of [?, ?, 8] → [?, 8] torch-mlir takes the first free size of either side for the same, so the second for 1.
    """
    view = torch.ops.aten.view.default
    for node in module.graph.find_nodes(op="call_function", target=view):
        (source, shape), value = node.args, node.args[0].meta["val"]
        if _free(value) > _free(node.meta["val"]) > 0:
            with module.graph.inserting_before(node):
                flat = module.graph.call_function(view, (source, [-1]))
                flat.meta["val"] = value.reshape(-1)
            node.args = (flat, shape)
    module.recompile()


def _free(value: torch.Tensor) -> int:
    return sum(isinstance(size, torch.SymInt) for size in value.shape)


def to_mlir(program: ExportedProgram, dialect: str, name: str) -> str:
    """A program, `decomposed`, as verified MLIR text with one function `name`.

    Raises MlirError for an unknown dialect, or an operator that the dialect does not take.
    """
    if dialect not in DIALECTS:
        raise MlirError(f"dialect {dialect!r}; accepted: {', '.join(DIALECTS)}")
    require_torch_mlir()
    from torch_mlir import fx as torch_mlir_fx
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.extras.fx_importer import FxImporter

    context, said = ir.Context(), []
    torch_dialect.register_dialect(context)

    def hear(diagnostic: Any) -> bool:
        said.append(diagnostic.message)
        return True

    handler = context.attach_diagnostic_handler(hear)
    try:
        importer = FxImporter(context=context)
        module = torch_mlir_fx.export_and_import(
            program, fx_importer=importer, decomposition_table={}, output_type=DIALECTS[dialect], func_name=name
        )
    except Exception as error:  # torch-mlir raises nothing more specific
        raise _refusal(dialect, [*said, str(error)]) from error
    finally:
        handler.detach()
    if not module.operation.verify():
        raise MlirError(f"torch-mlir wrote {dialect} that does not verify")
    return str(module)


def _refusal(dialect: str, reports: list[str]) -> MlirError:
    """The first report that names an operator of torch, or else the first line of all."""
    for text in reports:
        found = re.search(r"\b(?:torch\.)?(aten\.\w+)", text)
        if found:
            return MlirError(f"torch-mlir has no {dialect} form of {found[1]}", found[1])
    return MlirError(f"torch-mlir cannot write {dialect}: {reports[0].strip().splitlines()[0]}")
