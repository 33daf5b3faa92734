"""What the exports to ONNX and to MLIR share: the program they start from, and what they say of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_compile.artifact import is_artifact, new_folder, read_manifest
from dsv3_compile.driver import Progress, build, open_model
from dsv3_compile.options import options_from
from dsv3_compile.program import Program
from model_def.checkpoint import Checkpoint
from model_def.config import ModelConfig

DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `converted` says how stored weights were changed, "" if they were not."""

    folder: Path
    dtype: str
    converted: str

    def model(self, phase: str) -> Path:
        """The ONNX model of a phase."""
        return self.folder / f"{phase}.onnx"


def functional(
    model: str | Path,
    output: str | Path,
    dtype: str,
    progress: Progress,
    settings: dict[str, Any],
    refusal: type[ValueError],
    slots: int = 0,
) -> tuple[Program, Checkpoint]:
    """A preset, a Hugging Face folder or an artifact's checkpoint compiled to pure functions, and its weights.

    Says at once, by raising `refusal` or ArtifactError, what would otherwise be found out after the passes: a dtype
    that is not in DTYPES, an output that exists, weights that are missing, caches of more slots than the model has
    positions.
    """
    if dtype not in DTYPES:
        raise refusal(f"dtype {dtype!r}; accepted: {', '.join(DTYPES)}")
    new_folder(output)
    pure = (*settings.get("disable", ()), "lower")
    options = options_from({**settings, "target": "cpu", "dtype": dtype, "disable": pure})
    found = open_model(_checkpoint_of(model, refusal), options)
    if found.checkpoint is None:
        raise refusal(f"{model}: an export needs weights; name a folder with a checkpoint")
    if is_artifact(model) and found.config.to_dict() != dict(read_manifest(Path(model)).config):
        raise refusal(f"{found.checkpoint.folder}: its config is no longer the one that {model} was compiled from")
    longest = found.config.max_position_embeddings
    if slots > longest:
        raise refusal(f"sizes ask for {slots} slots; the model has {longest} positions")
    return build(found.config, options, progress), found.checkpoint


def conversion(config: ModelConfig, dtype: str) -> str:
    """How weights as they are stored become `dtype`, in words; "" if they are not changed."""
    stored = "float8_e4m3fn" if config.quantization else config.torch_dtype
    return "" if stored == dtype else f"{stored} weights were converted to {dtype}"


def _checkpoint_of(model: str | Path, refusal: type[ValueError]) -> str | Path:
    """Where the weights of MODEL are: an artifact's checkpoint, or what was named."""
    if not is_artifact(model):
        return model
    checkpoint = read_manifest(Path(model)).checkpoint
    if not checkpoint or not Path(checkpoint).is_dir():
        raise refusal(f"{model}: its checkpoint {checkpoint or ''} is not there; name the checkpoint's folder")
    return checkpoint
