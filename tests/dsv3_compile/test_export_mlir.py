"""MLIR of both phases: it verifies, says what its arguments are, and IREE computes the definition with it."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import dsv3_compile.driver as driver
from codegen.mlir import MlirError, to_mlir
from dsv3_compile.export_mlir import Sizes, export_mlir, origin, whole_program, write_mlir
from dsv3_compile.options import Options
from dsv3_compile.program import PHASES, Program, bind
from dsv3_compile.verification import reference
from model_def.checkpoint import Checkpoint
from passes.base import Role
from tests.dsv3_compile.test_export import compiled
from tests.dsv3_compile.tiny import TINY, checkpoint_of, trained_looking

pytest.importorskip("torch_mlir", reason="torch-mlir has no wheel for this Python")
TWO_LAYERS = replace(TINY, num_hidden_layers=2)  # one of each kind


@functools.cache
def program() -> Program:
    return replace(compiled(TINY), config=TWO_LAYERS, schedule=driver.schedule(TWO_LAYERS))


@functools.cache
def definition() -> Any:
    return trained_looking(TWO_LAYERS).requires_grad_(False)


def weights() -> dict[str, torch.Tensor]:
    return dict(bind(program(), checkpoint_of(definition()).__getitem__))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlir") / "model"
    write_mlir(program(), path, weights())
    return path


class Compiled:
    """A written folder through IREE, with poisoned caches: rows that nothing has written must not be read."""

    def __init__(self, folder: Path, phase: str) -> None:
        compiler = pytest.importorskip("iree.compiler")
        runtime = pytest.importorskip("iree.runtime")
        code = compiler.compile_str(
            (folder / f"{phase}.mlir").read_text(),
            target_backends=["llvm-cpu"],
            input_type="auto",
            extra_args=["--iree-llvmcpu-target-cpu=host"],
        )
        context = runtime.SystemContext(config=runtime.Config("local-sync"))
        context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, code))
        self.function = context.modules.module[phase]
        arguments = json.loads((folder / "signature.json").read_text())["functions"][phase]["arguments"]
        stored = load_file(folder / "weights.safetensors")
        self.weights = [stored[one["name"]] for one in arguments if one["name"] in stored]
        self.widths = [one["shape"][2] for one in arguments if ".latent" in one["name"] or ".rope_key" in one["name"]]
        assert len(arguments) == 2 + len(self.widths) + len(self.weights)

    def empty(self, rows: int, slots: int) -> list[Any]:
        return [np.full((rows, slots, width), 1e3, np.float32) for width in self.widths]

    def __call__(self, ids: np.ndarray, positions: np.ndarray, caches: list[Any]) -> tuple[np.ndarray, list[Any]]:
        logits, *caches = (np.asarray(one) for one in self.function(ids, positions, *caches, *self.weights))
        return logits, caches


def decode_error(decode: Compiled, definition: Any, rows: int, steps: int, slots: int) -> float:
    """The largest difference from the definition over ragged decode steps, every row at a position of its own."""
    ids = torch.randint(0, definition.config.vocab_size, (rows, steps))
    positions = torch.arange(steps).expand(rows, steps)
    truth = definition(ids, positions, definition.empty_caches(rows, steps))[0].numpy()
    caches = decode.empty(rows, slots)
    worst = 0.0
    for step in range(steps + rows - 1):
        at = np.clip(step - np.arange(rows), 0, steps - 1)[:, None]
        logits, caches = decode(np.take_along_axis(ids.numpy(), at, 1), at, caches)
        worst = max(worst, np.abs(logits[:, 0] - truth[np.arange(rows), at[:, 0]]).max())
    return worst


def test_iree_decodes_ragged_rows_as_the_definition_does(folder: Path) -> None:
    assert decode_error(Compiled(folder, "decode"), definition(), rows=3, steps=9, slots=14) <= 1e-4


def prefill_error(prefill: Compiled, definition: Any, rows: int, parts: tuple[int, ...], slots: int) -> float:
    """The largest difference from the definition when rows are read in several parts, one behind the other."""
    ids = torch.randint(0, definition.config.vocab_size, (rows, sum(parts)))
    positions = torch.arange(sum(parts)).expand(rows, -1)
    truth = definition(ids, positions, definition.empty_caches(rows, sum(parts)))[0]
    caches, worst = prefill.empty(rows, slots), 0.0
    for part, at, expected in zip(ids.split(parts, 1), positions.split(parts, 1), truth.split(parts, 1), strict=True):
        logits, caches = prefill(part.numpy(), at.numpy(), caches)
        worst = max(worst, np.abs(logits - expected.numpy()).max())
    return worst


def test_iree_prefills_rows_of_any_length(folder: Path) -> None:
    prefill = Compiled(folder, "prefill")
    assert prefill_error(prefill, definition(), rows=2, parts=(5, 3), slots=11) <= 1e-4
    assert prefill_error(prefill, definition(), rows=1, parts=(4, 7, 2), slots=13) <= 1e-4


@pytest.mark.slow
def test_iree_takes_the_torch_dialect(tmp_path: Path) -> None:
    write_mlir(program(), tmp_path / "model", weights(), "torch")
    prefill, decode = (Compiled(tmp_path / "model", phase) for phase in PHASES)
    assert prefill_error(prefill, definition(), rows=2, parts=(5, 3), slots=11) <= 1e-4
    assert decode_error(decode, definition(), rows=3, steps=9, slots=14) <= 1e-4


@pytest.mark.slow
def test_iree_takes_stablehlo_of_fixed_sizes(tmp_path: Path) -> None:
    write_mlir(program(), tmp_path / "model", weights(), "stablehlo", sizes=Sizes(2, 5, 11))
    prefill, decode = (Compiled(tmp_path / "model", phase) for phase in PHASES)
    assert prefill_error(prefill, definition(), rows=2, parts=(5, 5), slots=11) <= 1e-4
    assert decode_error(decode, definition(), rows=2, steps=9, slots=11) <= 1e-4


@pytest.mark.slow
def test_tosa_has_fixed_sizes(tmp_path: Path) -> None:
    write_mlir(program(), tmp_path / "tosa", weights(), "tosa", sizes=Sizes(2, 5, 9))
    signature = json.loads((tmp_path / "tosa" / "signature.json").read_text())["functions"]
    assert [one["shape"] for one in signature["prefill"]["arguments"][:2]] == [[2, 5], [2, 5]]
    assert signature["decode"]["results"][1]["shape"] == [2, 9, TINY.kv_lora_rank]
    for phase in PHASES:
        text = (tmp_path / "tosa" / f"{phase}.mlir").read_text()
        assert f"func.func @{phase}" in text and "tosa.scatter" in text and "torch.aten" not in text


@pytest.mark.slow
def test_the_embedded_model_in_both_phases(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(driver.EMBEDDED / "toy")
    options = Options(dtype="float32", disable=("lower",), verify=False)
    toy = driver.build(checkpoint.config, options)
    write_mlir(toy, tmp_path / "toy", dict(bind(toy, checkpoint.tensor)))
    for phase in PHASES:
        assert f"func.func @{phase}" in to_mlir(whole_program(toy, phase, {}), "torch", phase)
    assert decode_error(Compiled(tmp_path / "toy", "decode"), reference(checkpoint), rows=2, steps=12, slots=16) <= 1e-4


@pytest.mark.slow
def test_inline_weights_are_no_arguments() -> None:
    text = to_mlir(whole_program(program(), "decode", weights()), "torch", "decode")
    (head,) = [line for line in text.splitlines() if "func.func @decode" in line]
    assert head.count("%arg") == 2 + 2 * TWO_LAYERS.num_hidden_layers
    assert "dense_resource" in text and "torch.operator" not in text


def test_an_unknown_dialect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MlirError, match="dialect 'llvm'; accepted: torch, linalg, stablehlo, tosa"):
        export_mlir("toy", tmp_path / "model", dialect="llvm")


def test_an_operator_that_a_dialect_lacks_is_refused_with_node_and_model_line(tmp_path: Path) -> None:
    refusal = MlirError("torch-mlir has no linalg form of aten.softmax", "aten._softmax")
    module = "dsv3_compile.export_mlir"
    with patch(f"{module}.whole_program"), patch(f"{module}.to_mlir", side_effect=refusal):
        with pytest.raises(
            MlirError, match=r"aten\.softmax: node (mla_)?attention\S* of model\.layers\.0\.self_attn \(attention"
        ):
            write_mlir(program(), tmp_path / "model", {})
    assert not (tmp_path / "model").exists()


def test_looking_for_an_operator_leaves_the_sizes_free() -> None:
    """Graphs share their symbols with all others that were captured with them."""
    graph = program().blocks["moe", "prefill"]
    assert origin(program(), "prefill", "aten.linalg_det") == ""
    for node in graph.inputs(Role.CACHE):
        batch, slots, _ = node.meta["val"].shape
        assert [batch.node.expr, slots.node.expr] == [graph.module.meta["dims"][letter] for letter in "BT"]


@pytest.mark.parametrize("sizes", [(0, 1, 4), (1, 0, 4), (1, 5, 4)])
def test_sizes_that_hold_nothing_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(MlirError, match="expected batch, tokens, slots from 1"):
        Sizes(*sizes)
