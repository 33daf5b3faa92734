"""A failed certificate stops the compile and leaves a script that shows the failure again."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx

import dsv3_compile.driver as driver
from dsv3_compile.cli import main
from dsv3_compile.repro import explain, repro
from passes.base import Context, Outcome, calls
from passes.fuse_attention import FuseAttention
from passes.pipeline import DEFAULT_PIPELINE, Pipeline
from passes.verify import CertificateError, Failure, Specimen, clone
from tests.dsv3_compile import tiny

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class WrongScale(FuseAttention):
    """Attention with scores divided by √(C + R) instead of √(P + R)."""

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome = super().run(graph_module, context)
        for node in calls(graph_module.graph, torch.ops.dsv3.mla_attention):
            node.update_arg(5, (22 + 8) ** -0.5)
        return outcome

    @classmethod
    def name(cls) -> str:
        return FuseAttention.name()


@pytest.fixture
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def planted(_: object) -> Pipeline:
    return Pipeline(tuple(WrongScale() if isinstance(one, FuseAttention) else one for one in DEFAULT_PIPELINE))


def test_a_planted_pass_stops_the_command_and_the_script_shows_why(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "capture", tiny.captured_before)
    monkeypatch.setattr(driver, "_pipeline", planted)
    assert main(["compile", str(checkpoint_folder), "-o", str(tmp_path / "output")]) == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == "" and re.match(
        r"dsv3c: error: fuse-attention on dense decode: output 0 differs by \S+ \(bound 1e-10\); "
        r"first at mla_attention\w*, in place of \w+ \(attention\.py:\d+\), off by \S+; to see it again: python ",
        line,
    )
    script = tmp_path / "output.repro.py"
    assert line.endswith(f"python {script}") and list(tmp_path.iterdir()) == [script]
    shown = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 1, shown.stderr
    differing, *others = shown.stdout.splitlines()
    assert differing.startswith("output 0: relative error 0.") and differing.endswith("differs")
    assert others == [f"output {number}: relative error 0" for number in (1, 2)]
    error = differing.split()[4]
    assert f"differs by {error} " in line


def test_the_script_computes_bound_weights_and_writes_caches_in_place(tmp_path: Path, default_dtype: None) -> None:
    before = clone(tiny.blocks()["moe", "decode"].module)
    specimen = Specimen.of(clone(before))
    Pipeline().run(specimen.module, Context("decode", tiny.OPTIONS.machine, driver.Workload(3, 1, 32)))
    text = repro("nothing is wrong", Failure(before, specimen.module, specimen.recipes, specimen.seed, None))
    assert "write_cache_" in text and "def bind_" in text and "import passes" not in text
    (tmp_path / "script.py").write_text(text)
    assert runpy.run_path(str(tmp_path / "script.py"))["main"]() == 0


def test_a_graph_that_cannot_be_written_still_gives_the_error(tmp_path: Path) -> None:
    module = clone(tiny.blocks()["head", "decode"].module)
    next(node for node in module.graph.nodes if node.op == "call_function").target = len
    failure = Failure(module, module, [], 0, None)
    error = explain(CertificateError("it differs", failure), tmp_path / "output")
    assert str(error).startswith("it differs; no script shows it: ") and not any(tmp_path.iterdir())


def test_an_error_without_graphs_stays_as_it_is(tmp_path: Path) -> None:
    error = CertificateError("1 matches, but 0 on the small block")
    assert explain(error, tmp_path / "output") is error and not any(tmp_path.iterdir())
