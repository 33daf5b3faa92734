"""MLIR of both phases: it verifies, says what its arguments are, and IREE computes the definition with it."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import dsv3_compile.driver as driver
from codegen.mlir import MlirError, to_mlir
from dsv3_compile.export_mlir import export_mlir, whole_program, write_mlir
from dsv3_compile.program import Program, bind
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


def test_iree_decodes_ragged_rows_as_the_definition_does(folder: Path) -> None:
    compiler = pytest.importorskip("iree.compiler")
    runtime = pytest.importorskip("iree.runtime")
    text = (folder / "decode.mlir").read_text()
    code = compiler.compile_str(text, target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"])
    context = runtime.SystemContext(config=runtime.Config("local-sync"))
    context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, code))
    decode = context.modules.module["decode"]

    rows, steps, slots = 3, 9, 14
    ids = torch.randint(0, TINY.vocab_size, (rows, steps))
    positions = torch.arange(steps).expand(rows, steps)
    truth = definition()(ids, positions, definition().empty_caches(rows, steps))[0].numpy()
    arguments = json.loads((folder / "signature.json").read_text())["functions"]["decode"]["arguments"]
    stored = load_file(folder / "weights.safetensors")
    given = [stored[one["name"]] for one in arguments if one["name"] in stored]
    # Poisoned: rows that nothing has written must not be read.
    caches: list[Any] = [
        np.full((rows, slots, one["shape"][2]), 1e3, np.float32) for one in arguments if "slots" in one["shape"]
    ]
    assert len(arguments) == 2 + len(caches) + len(given)
    worst = 0.0
    for step in range(steps + 2):
        at = np.clip(step - np.arange(rows), 0, steps - 1)[:, None]  # every row at its own position
        logits, *caches = (
            np.asarray(one) for one in decode(np.take_along_axis(ids.numpy(), at, 1), at, *caches, *given)
        )
        worst = max(worst, np.abs(logits[:, 0] - truth[np.arange(rows), at[:, 0]]).max())
    assert worst <= 1e-4


def test_the_torch_dialect_verifies() -> None:
    text = to_mlir(whole_program(program(), "prefill", {}), "torch", "prefill")
    assert "func.func @prefill" in text and "torch.operator" not in text


def test_inline_weights_are_no_arguments() -> None:
    text = to_mlir(whole_program(program(), "decode", weights()), "torch", "decode")
    (head,) = [line for line in text.splitlines() if "func.func @decode" in line]
    assert head.count("%arg") == 2 + 2 * TWO_LAYERS.num_hidden_layers
    assert "dense_resource" in text and "torch.operator" not in text


def test_an_unknown_dialect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MlirError, match="dialect 'llvm'; accepted: torch, linalg, stablehlo, tosa"):
        export_mlir("toy", tmp_path / "model", dialect="llvm")
