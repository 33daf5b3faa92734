"""One small artifact, written once, for all tests that load one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_compile.inspection import documents
from dsv3_compile.packaging import write_artifact
from model_def.checkpoint import write
from model_def.decoder import Decoder
from model_def.toy_task import tokenizer_json
from tests.dsv3_compile import tiny


@pytest.fixture(scope="session")
def definition() -> Decoder:
    return tiny.trained_looking(tiny.TINY).requires_grad_(False)


@pytest.fixture(scope="session")
def checkpoint_folder(definition: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write(folder, tiny.TINY, tiny.checkpoint_of(definition).items())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return folder


@pytest.fixture(scope="session")
def artifact_folder(definition: Decoder, checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loaded by tests; whoever wants to damage it copies it first."""
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    program = tiny.program()
    write_artifact(
        program,
        folder,
        passes=[record.spec for record in program.records["embed", "prefill"]],
        max_batch=tiny.OPTIONS.max_batch,
        max_length=tiny.TINY.max_position_embeddings,
        read=tiny.checkpoint_of(definition).__getitem__,
        report=documents(program, tiny.OPTIONS),
        checkpoint=checkpoint_folder,
    )
    return folder
