"""A loaded artifact against the definition: ragged batches, growing caches, generation, refusals."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import dsv3_compile.runtime as runtime
from dsv3_compile.artifact import DIGEST, MANIFEST, Artifact, ArtifactError, read_manifest, seal
from dsv3_compile.loading import load_graph
from dsv3_compile.packaging import write_artifact
from dsv3_compile.runtime import Model, load
from model_def.decoder import Decoder
from tests.dsv3_compile import tiny

VOCABULARY, LONGEST = tiny.TINY.vocab_size, tiny.TINY.max_position_embeddings


@pytest.fixture(scope="module")
def model(artifact_folder: Path) -> Model:
    return load(artifact_folder)


def last_logits(definition: Decoder, tokens: list[int]) -> Tensor:
    row = torch.tensor([tokens])
    return definition(row, torch.arange(len(tokens))[None], definition.empty_caches(1, len(tokens)))[0][0, -1]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_a_ragged_batch_gives_every_row_its_own_logits(model: Model, definition: Decoder) -> None:
    tokens = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    texts = [tokens[row, :length].tolist() for row, length in enumerate((9, 1, 4))]
    logits, cache = model.prefill(tokens, [9, 1, 4])
    assert logits.dtype == torch.float32 and logits.shape == (3, 9, VOCABULARY)
    for row, text in enumerate(texts):
        assert_close(logits[row, len(text) - 1], last_logits(definition, text))
    for step in range(4):
        following = (tokens[:, step : step + 1] + 7) % VOCABULARY
        logits, cache = model.decode(following, cache)
        for row, text in enumerate(texts):
            text.append(int(following[row]))
            assert_close(logits[row, 0], last_logits(definition, text))


def test_the_cache_grows_by_doubling_and_keeps_what_it_holds(
    model: Model, definition: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "SMALLEST_CAPACITY", 4)
    text = [5, 6, 7]
    _, cache = model.prefill(torch.tensor([text]))
    capacities = [cache.capacity]
    for token in range(10, 17):
        logits, cache = model.decode(torch.tensor([[token]]), cache)
        capacities.append(cache.capacity)
        text.append(token)
    assert capacities == [4, 4, 8, 8, 8, 8, 16, 16]
    assert_close(logits[0, 0], last_logits(definition, text))


def test_decode_writes_the_cache_in_place(model: Model) -> None:
    _, cache = model.prefill(torch.tensor([[1, 2, 3]]))
    before = [tensor.data_ptr() for layer in cache.layers for tensor in layer]
    _, cache = model.decode(torch.tensor([[4]]), cache)
    assert before == [tensor.data_ptr() for layer in cache.layers for tensor in layer]


def test_rows_behind_the_position_are_not_read(model: Model) -> None:
    prompt, token = torch.tensor([[1, 2, 3]]), torch.tensor([[4]])
    expected, _ = model.decode(token, model.prefill(prompt)[1])
    _, cache = model.prefill(prompt)
    for layer in cache.layers:
        for tensor in layer:
            tensor[:, 4:] = 1e4
    assert torch.equal(model.decode(token, cache)[0], expected)


def test_a_full_context_is_refused(model: Model) -> None:
    _, cache = model.prefill(torch.zeros(1, LONGEST, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"context is full.*{LONGEST} positions"):
        model.decode(torch.tensor([[1]]), cache)


def test_generation_ends_when_the_context_is_full(model: Model) -> None:
    prompts = torch.ones(2, LONGEST - 2, dtype=torch.int64)
    assert model.generate(prompts, 10, lengths=[3, LONGEST - 2], eos=[]).shape == (2, 3)


def test_of_a_prompt_to_continue_the_last_layer_computes_the_last_position_only(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, int]] = []
    step = runtime.Graph.__call__

    def counted(graph: runtime.Graph, values: Any) -> tuple[Tensor, ...]:
        called.append((Path(graph.entry.source).stem, values["x_BSD"].shape[1] if "x_BSD" in values else 0))
        return step(graph, values)

    monkeypatch.setattr(runtime.Graph, "__call__", counted)
    prompts, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), [4, 2]
    model.generate(prompts, 1, lengths=lengths)
    blocks = [step.block for step in model.artifact.manifest.schedule]
    expected = [(f"{block}_prefill", 0 if block == "embed" else 4) for block in blocks[:-2]]
    assert called == [*expected, (f"{blocks[-2]}_fill", 4), (f"{blocks[-2]}_decode", 1), ("head_decode", 1)]


def test_generation_of_nothing_is_refused(model: Model) -> None:
    for number in (0, 2.5, "3", True):
        with pytest.raises(ValueError, match=f"max_new_tokens is {number!r}; expected a whole number"):
            model.generate(torch.tensor([[1]]), number)  # type: ignore[arg-type]


def test_a_stream_checks_its_arguments_before_its_first_token_is_asked_for(model: Model) -> None:
    ids = torch.tensor([[1, 2]])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": "a"}, "temperature is 'a'"),
        ({"eos": VOCABULARY}, f"eos is {VOCABULARY}"),
        ({"input_ids": ids + VOCABULARY}, "not in the vocabulary"),
        ({"lengths": [3]}, r"lengths is \[3\]"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.stream(**{"input_ids": ids, "max_new_tokens": 2, **arguments})


@pytest.mark.parametrize("eos", ["a", "", 2.5, [1, "2"], True, [False], VOCABULARY, [1, -1], 1 << 70])
def test_end_tokens_are_whole_numbers(model: Model, eos: Any) -> None:
    with pytest.raises(ValueError, match=f"eos is .*; expected a token id or several, below {VOCABULARY}"):
        model.generate(torch.tensor([[1]]), 2, eos=eos)


def test_generation_is_greedy_decoding(model: Model, definition: Decoder) -> None:
    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    found = model.generate(prompts, 5, lengths=[4, 2])
    for row, text in enumerate(([3, 4, 5, 6], [7, 8])):
        for token in found[row].tolist():
            assert token == int(last_logits(definition, text).argmax())
            text.append(token)


def test_a_row_stops_at_an_end_token_and_is_filled_with_it(model: Model) -> None:
    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    free = model.generate(prompts, 6, eos=[])
    end = int(free[0, 1])
    assert end not in free[1].tolist(), "the rows must differ for this test to mean anything"
    found = model.generate(prompts, 6, eos=end)
    first = free[0].tolist().index(end)
    assert found[0].tolist() == free[0, : first + 1].tolist() + [end] * (5 - first)
    assert torch.equal(found[1], free[1])


def test_generation_ends_when_every_row_has_ended(model: Model) -> None:
    free = model.generate(torch.tensor([[3, 4, 5, 6]]), 6, eos=[])
    assert model.generate(torch.tensor([[3, 4, 5, 6]]), 6, eos=int(free[0, 0])).shape == (1, 1)


def test_streaming_yields_what_generate_gives(model: Model) -> None:
    prompts = torch.tensor([[3, 4, 5, 6]])
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    steps = list(model.stream(prompts, 5, **options))
    assert torch.equal(torch.stack(steps, 1), model.generate(prompts, 5, **options))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 3), "int64"),
        (torch.zeros(3, dtype=torch.int64), "int64"),
        (torch.zeros(1, 0, dtype=torch.int64), "int64"),
        (torch.tensor([[0, VOCABULARY]]), f"token id {VOCABULARY}"),
        (torch.tensor([[0, -1]]), "token id -1"),
        (torch.zeros(tiny.OPTIONS.max_batch + 1, 2, dtype=torch.int64), "batch"),
        (torch.zeros(1, LONGEST + 1, dtype=torch.int64), "positions"),
    ],
)
def test_impossible_prompts_are_refused(model: Model, ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.prefill(ids)


def test_prompts_that_are_no_tensor_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"token ids are a list; expected a tensor int64 \[batch, tokens\]"):
        model.prefill([[1, 2]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [0, 3],
        [3, 4],
        [[1, 2]],
        [1.5, 3.0],
        [True, True],
        [True, 2],
        "ab",
        "3",
        ["1", "2"],
        [[1], [2, 3]],
        [1, None],
        2,
        [1j, 2],
    ],
)
def test_impossible_lengths_are_refused(model: Model, lengths: Any) -> None:
    with pytest.raises(
        ValueError, match=f"lengths is {re.escape(repr(lengths))}; expected 2 whole numbers from 1 to 3"
    ):
        model.prefill(torch.zeros(2, 3, dtype=torch.int64), lengths)


def test_decode_takes_one_token_per_row(model: Model) -> None:
    _, cache = model.prefill(torch.zeros(2, 3, dtype=torch.int64))
    for shape in ((1, 1), (2, 2)):
        with pytest.raises(ValueError, match=r"expected \[2, 1\]"):
            model.decode(torch.zeros(shape, dtype=torch.int64), cache)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(model: Model) -> None:
    with pytest.raises(ArtifactError, match="device is cuda; this machine has no GPU"):
        Model(model.artifact, device="cuda")


@pytest.mark.parametrize("device", ["mars", "meta", "cuda:first", 1.5])
def test_a_device_that_is_none_is_refused(model: Model, device: Any) -> None:
    with pytest.raises(ArtifactError, match=f"device is {device}; expected cpu, cuda or cuda:N"):
        Model(model.artifact, device=device)


def sealed(folder: Path, **changes: Any) -> Artifact:
    """The artifact of a folder whose files were changed."""
    manifest = replace(read_manifest(folder), **changes)
    for name in (MANIFEST, DIGEST):
        (folder / name).unlink()
    return Artifact(folder, seal(folder, manifest))


def test_a_device_that_an_artifact_was_not_made_for_is_refused(
    artifact_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(artifact_folder, tmp_path / "artifact"))
    with pytest.raises(ArtifactError, match=r"device is cuda; its native code is for the CPU \(native=False"):
        Model(sealed(folder, native_cpu="some processor"), device="cuda")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "kernel.py").touch()
    artifact = sealed(folder, native_cpu="", target="sm_90")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ArtifactError, match="device is cpu; its kernels are for sm_90"):
        Model(artifact, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for device, message in (("cuda:1", "made for sm_90; this GPU is sm_80"), ("cuda:2", "cuda:2; .* has GPUs 0 to 1")):
        with pytest.raises(ArtifactError, match=message):
            Model(artifact, device=device)


def test_an_artifact_that_took_the_place_of_another_runs_its_own_kernels(artifact_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact_folder, tmp_path / "artifact"))
    (folder / "kernels").mkdir()
    (folder / "graphs" / "graph.py").write_text("from ..kernels.kernel import kernel as run\n")
    found = []
    for number in (1, 2):
        (folder / "kernels" / "kernel.py").write_text(f"def kernel():\n    return {number}\n")
        found.append(load_graph(sealed(folder).path("graphs/graph.py")))
    assert [run() for run in found] == [1, 2]


def test_an_artifact_without_weights_is_refused(tmp_path: Path) -> None:
    write_artifact(tiny.program(), tmp_path / "out", passes=[], max_batch=3, max_length=32)
    with pytest.raises(ArtifactError, match="no weights"):
        load(tmp_path / "out")


def test_weights_are_written_in_shards_of_bounded_size(tmp_path: Path, artifact_folder: Path, definition) -> None:
    with patch("dsv3_compile.packaging.SHARD_BYTES", 20_000):
        read = tiny.checkpoint_of(definition).__getitem__
        write_artifact(tiny.program(), tmp_path / "out", passes=[], max_batch=3, max_length=32, read=read)
    shards = sorted((tmp_path / "out" / "weights").iterdir())
    assert len(shards) > 2
    prompt = torch.tensor([[1, 2, 3]])
    assert torch.equal(load(tmp_path / "out").prefill(prompt)[0], load(artifact_folder).prefill(prompt)[0])


def test_bound_tensors_that_share_memory_are_written_apart(tmp_path: Path, definition: Decoder) -> None:
    tensors = tiny.checkpoint_of(definition)
    # Norms of equal width read from one piece of memory, as a tied embedding and head are.
    shared = torch.randn(tiny.TINY.hidden_size)
    tensors |= {name: shared for name in tensors if name.endswith("input_layernorm.weight")}
    write_artifact(tiny.program(), tmp_path / "out", passes=[], max_batch=3, max_length=32, read=tensors.__getitem__)
    assert torch.equal(load(tmp_path / "out").weights[2]["input_layernorm_weight"], shared)


def test_loading_and_running_needs_no_definition_of_the_model(artifact_folder: Path) -> None:
    program = (
        "import sys, torch, dsv3_compile\n"
        f"dsv3_compile.load({str(artifact_folder)!r}).generate(torch.tensor([[1, 2]]), 2)\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'model_def'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
