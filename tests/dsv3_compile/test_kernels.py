"""A GPU artifact: every call of the vocabulary has its kernel, and the graphs that call them give the right numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import dsv3_compile.driver as driver
import dsv3_compile.kernels as kernels
import dsv3_compile.packaging as packaging
from codegen.emit import EmittedKernel, KernelSource
from codegen.targets import Target
from dsv3_compile.artifact import Artifact, ArtifactError
from dsv3_compile.kernels import Bindings, bind_kernels
from dsv3_compile.options import Options
from dsv3_compile.packaging import write_artifact
from dsv3_compile.program import Program
from dsv3_compile.runtime import load
from model_def.decoder import Decoder
from tests.dsv3_compile import tiny

OPTIONS = Options(target="sm_80", dtype="float32", max_batch=3, max_length=32, no_weights=True, verify=False)


RAGGED = """
import sys, torch, dsv3_compile
model = dsv3_compile.load(sys.argv[1], device="cpu")
tokens, lengths, rows = torch.load("tokens.pt"), torch.tensor(list(map(int, sys.argv[2:]))), torch.arange(2)
prompt, cache = model.prefill(tokens[:, :-1], lengths - 1)
last, _ = model.decode(tokens[rows, lengths - 1].unsqueeze(1), cache)
torch.save(torch.stack([prompt[rows, lengths - 2], last[:, 0]]), "logits.pt")
"""


def without_machine_code(kernels: Iterable[KernelSource], target: Target) -> list[EmittedKernel]:
    """Compiling kernels for a GPU has its own tests; here they run in the interpreter."""
    made = [
        EmittedKernel(one.name, one.op, one.source, {}, {f"{one.name}.0.cubin": b"none"}, {"op": one.op})
        for one in kernels
    ]
    assert len({kernel.name for kernel in made}) == len(made)  # none is compiled twice
    return made


@pytest.fixture(scope="module")
def program() -> Program:
    with patch.object(driver, "capture", tiny.captured_before):
        return driver.build(tiny.TINY, OPTIONS)


@pytest.fixture(scope="module")
def folder(program: Program, definition: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gpu") / "artifact"
    with patch.object(kernels, "compile_kernels", without_machine_code):
        read = tiny.checkpoint_of(definition).__getitem__
        write_artifact(program, output, passes=[], max_batch=3, max_length=32, read=read)
    return output


def test_every_kernel_is_a_source_file_with_metadata_and_code(folder: Path) -> None:
    files = Artifact.open(folder).listed("kernels")
    names = {path.name.split(".")[0] for path in files}
    assert {name.split("__")[0] for name in names} >= {"mla_attention", "attention", "route", "routed_swiglu"}
    for name in names:
        assert {f"{name}.py", f"{name}.json", f"{name}.0.cubin"} <= {path.name for path in files}
        assert name.startswith(json.loads((folder / "kernels" / f"{name}.json").read_text())["op"])


def test_graphs_call_kernels_and_no_op_that_has_one(folder: Path) -> None:
    text = (folder / "graphs" / "moe_decode.py").read_text()
    assert "mla_attention_kernel(" in text and "dsv3.mla_attention" not in text
    assert "device='cpu'" not in text


def test_calls_of_equal_constants_share_a_kernel(program: Program) -> None:
    with patch.object(kernels, "compile_kernels", without_machine_code):
        bindings = bind_kernels(program, lambda line: None)
    bound = [call.kernel for calls in bindings.calls.values() for call in calls.values()]
    assert set(bound) == set(bindings.kernels)
    assert len(bound) > 2 * len(bindings.kernels)


def test_nothing_is_emitted_for_the_cpu() -> None:
    assert bind_kernels(tiny.program(), lambda line: None).kernels == {}


def test_the_kernels_compute_what_the_definition_says(folder: Path, definition: Decoder, tmp_path: Path) -> None:
    tokens = torch.randint(tiny.TINY.vocab_size, (2, 6), generator=torch.Generator().manual_seed(2))
    lengths = [6, 2]  # of which the last token goes through decode
    assert_rows(ragged(folder, tokens, lengths, tmp_path), definition, tokens, lengths, 5e-5)


def ragged(folder: Path, tokens: Tensor, lengths: list[int], scratch: Path) -> Tensor:
    """Logits of every row's last two positions, computed by an artifact whose kernels run in the interpreter."""
    torch.save(tokens, scratch / "tokens.pt")
    # A process of its own: triton chooses between compiler and interpreter when it is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", RAGGED, str(folder), *map(str, lengths)]
    subprocess.run(command, cwd=scratch, env=environment, check=True)
    return torch.load(scratch / "logits.pt")


def assert_rows(found: Tensor, definition: Decoder, tokens: Tensor, lengths: list[int], tolerance: float) -> None:
    for row, length in enumerate(lengths):
        positions = torch.arange(length)[None]
        expected, _ = definition(tokens[row : row + 1, :length], positions, definition.empty_caches(1, length))
        torch.testing.assert_close(found[:, row], expected[0, length - 2 : length], atol=tolerance, rtol=0)


def test_the_fused_graphs_of_hopper_compute_what_the_definition_says(definition: Decoder, tmp_path: Path) -> None:
    """With the references of the vocabulary: the kernels, cut for a GPU, are checked one by one elsewhere."""
    program = driver.build(tiny.TINY, replace(OPTIONS, target="sm_90", dtype="float16"))
    with patch.object(
        packaging, "bind_kernels", lambda program, progress: Bindings({}, dict.fromkeys(program.blocks, {}))
    ):
        read = tiny.checkpoint_of(definition).__getitem__
        write_artifact(program, tmp_path / "artifact", passes=[], max_batch=3, max_length=32, read=read)
    text = (tmp_path / "artifact" / "graphs" / "moe_decode.py").read_text()
    for op in ("linear", "norm_router", "head_linear", "attention_inputs_", "route", "routed_swiglu", "mla_attention"):
        assert f"dsv3.{op}.default(" in text
    assert "aten.add" not in text and "aten.linear" not in text and "aten.einsum" not in text
    model = load(tmp_path / "artifact", device="cpu")
    tokens = torch.randint(tiny.TINY.vocab_size, (2, 6), generator=torch.Generator().manual_seed(2))
    lengths, rows = torch.tensor([6, 2]), torch.arange(2)
    prompt, cache = model.prefill(tokens[:, :-1], lengths - 1)
    last, _ = model.decode(tokens[rows, lengths - 1].unsqueeze(1), cache)
    found = torch.stack([prompt[rows, lengths - 2], last[:, 0]])
    assert_rows(found, definition, tokens, lengths.tolist(), 2e-2)


def test_hopper_takes_float32() -> None:
    """There the router's product is joined with others, so that its logits are columns of a wider matrix."""
    program = driver.build(tiny.TINY, replace(OPTIONS, target="sm_90"))
    with patch.object(kernels, "compile_kernels", without_machine_code):
        calls = bind_kernels(program, lambda line: None).calls
    assert {call.op for call in calls["moe", "decode"].values()} >= {"route", "routed_swiglu", "mla_attention"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="made for sm_80; this machine has no GPU"):
        load(folder)
