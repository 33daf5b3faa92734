"""Checkpoints as Hugging Face folders: read one tensor at a time from memory-mapped files, written, checked.

config.json   model.safetensors   or   model.safetensors.index.json and its shards
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model_def import fp8, names
from model_def.config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
FP8 = "F8_E4M3"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    FP8: torch.float8_e4m3fn,
}
# Kimi-K2 stores the rotary frequencies of every layer; they follow from the config.
DERIVED = ".rotary_emb.inv_freq"
# Stored once more with the multi-token-prediction layer, equal to the main model's.
COPIES = (".embed_tokens.weight", ".shared_head.head.weight")


class CheckpointError(ValueError):
    """A folder that cannot be used: one line naming file or tensor and what would be accepted."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder. Nothing but headers is read until a tensor is asked for."""

    folder: Path
    config: ModelConfig
    mtp: bool = False  # the multi-token-prediction layers, stored behind the last layer, count as well
    _files: Mapping[str, str] = field(default_factory=dict, repr=False)  # tensor → file name
    _handles: Mapping[str, Any] = field(default_factory=dict, repr=False)  # file name → mapped file

    @classmethod
    def open(cls, folder: str | Path, mtp: bool = False) -> Checkpoint:
        """Raises CheckpointError, or ConfigError for what is wrong inside config.json."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder; expected one with config.json and {SINGLE}")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: config.json is missing")
        config = ModelConfig.from_file(folder)
        if mtp and not config.num_nextn_predict_layers:
            raise CheckpointError(f"{folder / 'config.json'}: the model has no multi-token-prediction layer")
        files = _read_index(folder)
        handles = {name: _map(folder, name) for name in sorted(set(files.values()))}
        if not files:
            handles = {SINGLE: _map(folder, SINGLE)}
            files = {tensor: SINGLE for tensor in handles[SINGLE].keys()}
        contents = {file: set(handle.keys()) for file, handle in handles.items()}
        for tensor, file in files.items():
            if tensor not in contents[file]:
                raise CheckpointError(f"{folder / file}: tensor {tensor} is missing, but {INDEX} says it is here")
        return cls(folder, config, mtp, files, handles)

    def names(self) -> tuple[str, ...]:
        """Weights in the order of the files; scales, derived tensors and unwanted layers left out."""
        return tuple(name for name in self._files if not self._passed_over(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """As stored; FP8 weights are float32 once read."""
        stored = self._header(name).get_dtype()
        if stored not in DTYPES:
            raise CheckpointError(f"{self._where(name)} has dtype {stored}; accepted: {', '.join(DTYPES)}")
        return DTYPES[stored]

    def tensor(self, name: str) -> Tensor:
        """One weight, a view of its mapped file; FP8 comes back as float32, multiplied by its scales.

        Raises CheckpointError when it holds NaN or infinity.
        """
        dtype = self.dtype(name)
        weight = self._handles[self._files[name]].get_tensor(name)
        if dtype == torch.float8_e4m3fn:
            self._check_scale(name)
            scales = self._handles[self._files[name + SCALE]].get_tensor(name + SCALE)
            weight = fp8.dequantise(weight, scales, self._block())
        # The extremes are NaN or infinite if any element is; isfinite() would allocate a mask as large.
        if weight.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(weight)):
            raise CheckpointError(f"{self._where(name)} holds NaN or infinity; expected finite numbers")
        return weight

    def validate(self) -> None:
        """Compare names, shapes, dtypes and scales with what the config asks for, from the headers alone.

        Raises CheckpointError for the first difference.
        """
        self._check_unlisted()
        expected = expected_shapes(self.config, self.mtp)
        found = set(self.names())
        for name, shape in expected.items():
            if name not in found:
                raise CheckpointError(f"{self.folder}: tensor {name} {list(shape)} is missing")
            self._check_shape(name, shape)
            if self.dtype(name) == torch.float8_e4m3fn:
                self._check_scale(name)
            elif name + SCALE in self._files:
                raise CheckpointError(f"{self._where(name + SCALE)}: {name} is not {FP8} and takes no scale")
        for name in self.names():
            if name not in expected:
                raise CheckpointError(f"{self._where(name)} is not part of this model; remove it")

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        if self.shape(name) != expected:
            found = list(self.shape(name))
            raise CheckpointError(f"{self._where(name)} has shape {found}; expected {list(expected)}")

    def _check_scale(self, name: str) -> None:
        scale = name + SCALE
        if scale not in self._files:
            raise CheckpointError(f"{self._where(name)} is {FP8}, but {scale} is missing")
        shape = self.shape(name)
        if len(shape) != 2:
            raise CheckpointError(f"{self._where(name)} is {FP8} with shape {list(shape)}; expected a matrix")
        expected = fp8.scale_shape((shape[0], shape[1]), self._block())
        self._check_shape(scale, expected)
        if self.dtype(scale) != torch.float32:
            raise CheckpointError(f"{self._where(scale)} has dtype {self.dtype(scale)}; expected F32")

    def _check_unlisted(self) -> None:
        for file, handle in self._handles.items():
            for name in handle.keys():
                if self._files.get(name) != file:
                    raise CheckpointError(f"{self.folder / file}: tensor {name} is not listed for it in {INDEX}")

    def _block(self) -> tuple[int, int]:
        return self.config.quantization.block if self.config.quantization else fp8.BLOCK

    def _passed_over(self, name: str) -> bool:
        if name.endswith(SCALE) and name.removesuffix(SCALE) in self._files:
            return True
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        first = self.config.num_hidden_layers
        predicts = layer is not None and 0 <= int(layer[1]) - first < self.config.num_nextn_predict_layers
        return name.endswith(DERIVED) or (predicts and (not self.mtp or name.endswith(COPIES)))

    def _header(self, name: str) -> Any:
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self._handles[self._files[name]].get_slice(name)

    def _where(self, name: str) -> str:
        return f"{self.folder / self._files[name]}: tensor {name}"


def expected_shapes(config: ModelConfig, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, by name, with `mtp` those of the prediction layer as well."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in (*names.blocks(config), *(["mtp"] if mtp else [])):
        state = names.build(config, block, device="meta").state_dict()
        for parameter, tensors in names.sources(config, block).items():
            shape = tuple(state[parameter].shape)
            # Stored tensors are vectors and matrices; a third axis is the stack of the experts.
            shapes |= dict.fromkeys(tensors, shape[-2:])
    return shapes


def write(
    folder: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that does not exist yet: wholly, or not at all.

    Tensors are taken one at a time and no more than `shard_bytes` of them are held (one, if it is larger).
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already; expected a new folder or an empty one")
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        text = json.dumps(config.to_dict(), indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        _write_shards(partial, tensors, shard_bytes)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    contents: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, folder / f"{len(contents)}.part", metadata={"format": "pt"})
        contents.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(contents) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    # How many shards there are is known only now.
    weight_map: dict[str, str] = {}
    for number, tensors_here in enumerate(contents):
        file = f"model-{number + 1:05d}-of-{len(contents):06d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(tensors_here, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    seen: set[str] = set()
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"tensor {name} is given twice")
        seen.add(name)
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
        # Cloned: the file format has no views, and the caller may reuse the buffer.
        shard[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if not seen:
        raise CheckpointError("no tensors to write")
    yield shard


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor → file; empty when the checkpoint is one file without an index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f'{path}: not an index; expected {{"weight_map": {{tensor: file}}}}') from error
    if not files:
        raise CheckpointError(f"{path}: weight_map is empty")
    for tensor, file in files.items():
        if Path(file).name != file:
            raise CheckpointError(f"{path}: {tensor} points to {file!r}; expected a file of this folder")
    return files


def _map(folder: Path, file: str) -> Any:
    path = folder / file
    if not path.is_file():
        listed = f", but {INDEX} lists it" if (folder / INDEX).exists() else f"; expected it or {INDEX}"
        raise CheckpointError(f"{path}: file is missing{listed}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
