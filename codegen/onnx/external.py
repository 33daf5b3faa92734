"""The weights of an ONNX model, in one file that several models read: written tensor by tensor, never held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto
from torch import Tensor

from codegen.onnx.builder import ONNX_TYPES, ExportError

ALIGNMENT = 4096  # bytes: readers map files page by page
SLICE = 64 << 20  # bytes that are converted at a time


@dataclass
class WeightFile:
    """Tensors one behind the other; `entries` holds what ONNX needs to find each."""

    path: Path
    entries: dict[str, TensorProto] = field(default_factory=dict)

    def write(self, stream: BinaryIO, name: str, tensor: Tensor, layout: str) -> None:
        """Append a tensor in a layout of `layout_of`. ExportError when it holds NaN or infinity."""
        stream.seek(-(-stream.tell() // ALIGNMENT) * ALIGNMENT)
        offset = stream.tell()
        for part in _parts(tensor):
            if layout == "transposed":
                part = part.transpose(-1, -2)
            if layout == "interleaved":
                part = part.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            if part.is_floating_point() and part.numel() and not all(e.isfinite() for e in part.aminmax()):
                raise ExportError(f"{name} does not fit {part.dtype}: it holds NaN or infinity; accepted: float32")
            stream.write(part.contiguous().numpy().tobytes())
        sizes = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]) if layout == "transposed" else tensor.shape
        kind = ONNX_TYPES[tensor.dtype]
        entry = TensorProto(name=name, data_type=kind, data_location=TensorProto.EXTERNAL, dims=sizes)
        length = stream.tell() - offset
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            entry.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
        self.entries[name] = entry


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """A stack of matrices in runs of limited size, so that converting needs little memory."""
    if tensor.dim() < 3:
        return iter((tensor,))
    step = max(1, SLICE // max(1, tensor[0].nbytes))
    return iter(tensor.split(step))
