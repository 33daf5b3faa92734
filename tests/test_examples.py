"""Every example's main() runs, with small settings."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from model_def.checkpoint import Checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """By path: another distribution may have installed a package called `examples`."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_example_has_its_test() -> None:
    assert {f"test_{path.stem}" for path in EXAMPLES.glob("*.py")} <= globals().keys()


def test_train_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = load("train_toy").main(
        ["--steps", "2", "--batch", "4", "--questions", "3", "--output", str(tmp_path / "toy")]
    )
    assert 0.0 <= accuracy <= 1.0
    assert "held-out questions" in capsys.readouterr().out
    Checkpoint.open(tmp_path / "toy", mtp=True).validate()


def test_inspect_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # a diff is cut to the terminal's width
    records = load("inspect_passes").main(["--keep", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(record.spec in printed for record in records)
    assert "--require order-contractions: required pass order-contractions did not fire: nearest miss " in printed
    for shown in ("TORCH_LOGS", "DSV3_DUMP", "TORCH_TRACE, for tlparse"):
        assert f"\n{shown}: " in printed and f"\n{shown}: 0 lines" not in printed
    assert "- linear_3 = aten.linear.default(index_put, " in printed  # absorbed away
    assert {path.name for path in tmp_path.iterdir()} == {"artifact", "dump", "trace", "report.html"}


def test_compile_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "artifact"
    before, after = load("compile_and_generate").main(["--questions", "24", "--no-aot", "--keep", str(folder)])
    assert before == after >= 0.9
    printed = capsys.readouterr().out
    assert "12+3456=8643>3468" in printed
    assert "order-contractions" in printed
    assert (folder / "manifest.json").is_file()


def test_inspect_passes_of_a_model_too_large_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    records = load("inspect_passes").main(["deepseek-v3", "--target", "sm_90", "--only", "order-contractions"])
    printed = capsys.readouterr().out
    assert [r.name for r in records if r.spec in printed.splitlines()] == ["order-contractions"]
    assert "  matched  " in printed


def test_export_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "onnx"
    assert load("export_onnx").main(["--keep", str(folder)]) == (200, 200)
    printed = capsys.readouterr().out
    assert "bfloat16 weights were converted to float32" in printed
    assert "expanded keys and values 6,912 bytes (5.4 x)" in printed
    assert {path.name for path in folder.iterdir()} >= {"prefill.onnx", "decode.onnx", "weights.bin", "tokenizer.json"}


def test_compile_transformers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_compile.backend.inductor", lambda module, *_: module.forward)  # its C++ takes long
    load("compile_transformers").main(["--tokens", "5"])
    printed = capsys.readouterr().out
    assert "the same tokens" in printed
    assert "order-contractions" in printed and "fuse-experts" in printed
