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


def test_inspect_passes(capsys: pytest.CaptureFixture[str]) -> None:
    records = load("inspect_passes").main(["toy", "--block", "moe", "--phase", "decode"])
    printed = capsys.readouterr().out
    assert all(record.spec in printed for record in records)
    assert "-    linear_3 = aten.linear.default(index_put, self_attn_kv_b_proj_weight)" in printed  # absorbed away
