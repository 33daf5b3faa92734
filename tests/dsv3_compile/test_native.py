"""Native code of a graph: the same numbers, caches written in place, no compiler needed to load it."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import torch

import dsv3_compile.native as native
from dsv3_compile.artifact import Artifact, GraphEntry, Port, seal
from dsv3_compile.loading import load_graph
from dsv3_compile.native import NativeError, compile_native, cpu_identity, has_compiler, load_native
from dsv3_compile.runtime import load

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture(scope="module")
def compiled(artifact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraphEntry]:
    """One graph of an artifact: compiling takes seconds, and the others go the same way."""
    folder = Path(shutil.copytree(artifact_folder, tmp_path_factory.mktemp("native") / "artifact"))
    manifest = Artifact.open(folder).manifest
    one = {"dense": {"decode": manifest.graphs["dense"]["decode"]}, "head": manifest.graphs["head"]}
    graphs = compile_native(folder, one, lambda line: None)
    assert graphs["head"]["decode"].native is None, "a head has no cache and stays Python"
    everything = {**manifest.graphs, "dense": {**manifest.graphs["dense"], **graphs["dense"]}}
    for name in ("manifest.json", "manifest.sha256"):
        (folder / name).unlink()
    seal(folder, dataclasses.replace(manifest, graphs=everything, native_cpu=cpu_identity()))
    return folder, graphs["dense"]["decode"]


def arguments(entry: GraphEntry, sizes: dict[str, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = []
    for port in entry.inputs:
        shape = [sizes.get(size, size) for size in port.shape]
        if port.dtype == "int64":
            values.append(torch.randint(sizes["T"], shape, generator=generator))
        else:
            noise = torch.randn(shape, generator=generator)
            # Weights of sensible sizes: outputs stay near 1, and so do the tolerances.
            values.append(noise * shape[-1] ** -0.5 if port.role == "weight" and len(shape) > 1 else noise)
    return values


@needs_compiler
@pytest.mark.parametrize("sizes", [{"B": 1, "T": 1}, {"B": 3, "T": 7}, {"B": 5, "T": 64}], ids=str)
def test_native_code_gives_the_numbers_of_the_source(compiled: tuple[Path, GraphEntry], sizes: dict[str, int]) -> None:
    folder, entry = compiled
    left, right = arguments(entry, sizes), arguments(entry, sizes)
    expected = load_graph(folder / entry.source)(*left)
    found = load_native(folder / entry.native)(*right)
    for one, other in zip([*expected, *left], [*found, *right], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@needs_compiler
def test_native_code_writes_the_caches_it_is_given(compiled: tuple[Path, GraphEntry]) -> None:
    folder, entry = compiled
    values = arguments(entry, {"B": 2, "T": 9})
    places = [index for index, port in enumerate(entry.inputs) if port.role == "cache"]
    before = [values[index].clone() for index in places]
    load_native(folder / entry.native)(*values)
    assert all(not torch.equal(values[index], old) for index, old in zip(places, before, strict=True))


@needs_compiler
def test_a_model_with_native_code_generates_the_same(compiled: tuple[Path, GraphEntry]) -> None:
    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    texts = [load(compiled[0], native=native).generate(prompts, 8, lengths=[4, 2]) for native in (True, False)]
    assert torch.equal(*texts)


@needs_compiler
def test_another_processor_runs_the_source(
    compiled: tuple[Path, GraphEntry], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dsv3_compile.runtime.cpu_identity", lambda: "another")
    monkeypatch.setattr("dsv3_compile.runtime.load_native", None)
    with caplog.at_level(logging.WARNING):
        assert not load(compiled[0]).native
    assert "another processor" in caplog.text


@needs_compiler
def test_a_graph_that_cannot_be_compiled_is_named(tmp_path: Path) -> None:
    (tmp_path / "graph.py").write_text("def run(latent_BTC):\n    return (latent_BTC.no_such_thing(),)\n")
    cache = Port("latent_BTC", "float32", ("B", "T", 4), "cache")
    graphs = {"odd": {"decode": GraphEntry("graph.py", (cache,), ())}}
    with pytest.raises(NativeError, match="native code of odd, decode: .*no_such_thing"):
        compile_native(tmp_path, graphs, lambda line: None)


def test_no_compiler_is_said_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(NativeError, match="needs a C\\+\\+ compiler"):
        compile_native(tmp_path, {}, lambda line: None)
    assert not list(tmp_path.iterdir())
