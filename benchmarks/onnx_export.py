"""ONNX export at the full shape of a preset: seconds, peak memory and file sizes, then loading in ONNX Runtime.

    python benchmarks/onnx_export.py                                 # DeepSeek-V2-Lite in float16: 31.4 GB on the disk
    python benchmarks/onnx_export.py --layers 3 --default            # fewer layers, loaded with default options as well

Weights are random and made as they are asked for, so no checkpoint is needed; everything is written to a temporary
folder (TMPDIR) and removed. Loading is measured in a process of its own: with the runtime's optimisations off it maps
the file; with its default options it copies what it rewrites, and in float16 widens weights, as its CPU kernels for
products are float32. So `--default` needs memory for the weights in float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from dsv3_compile.driver import build
from dsv3_compile.export import write_onnx
from dsv3_compile.exporting import DTYPES
from dsv3_compile.options import Options
from model_def.checkpoint import expected_shapes
from model_def.config import ModelConfig
from model_def.presets import PRESETS

MIB = 1 << 20
PROMPT = 5  # tokens


class RandomWeights:
    """Reads tensors of a checkpoint that does not exist: the same numbers whenever a name is asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = expected_shapes(config)

    def __call__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if len(shape) < 2:
            return torch.ones(shape)
        return torch.empty(shape).uniform_(-1, 1, generator=generator).mul_(shape[-1] ** -0.5)


def peak() -> int:
    """Of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def load_and_step(folder: Path, level: str, threads: int) -> dict[str, float]:
    """Seconds to open both models and to run a prompt and one step with them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    start = time.perf_counter()
    sessions = [onnxruntime.InferenceSession(str(folder / f"{phase}.onnx"), options) for phase in ("prefill", "decode")]
    opened = time.perf_counter()
    past = {
        one.name: np.zeros((1, 0, one.shape[2]), np.float16 if "float16" in one.type else np.float32)
        for one in sessions[0].get_inputs()[2:]
    }
    for session, ids, positions in zip(sessions, ([*range(PROMPT)], [7]), ([*range(PROMPT)], [PROMPT]), strict=True):
        logits, *present = session.run(None, {"input_ids": [ids], "position_ids": [positions], **past})
        past = dict(zip(past, present, strict=True))
        assert np.isfinite(logits).all()
    return {"load_seconds": opened - start, "run_seconds": time.perf_counter() - opened, "peak_MiB": peak()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="deepseek-v2-lite", choices=PRESETS)
    parser.add_argument("--dtype", default="float16", choices=DTYPES)
    parser.add_argument("--layers", type=int, help="keep so many")
    parser.add_argument("--default", action="store_true", help="load with the runtime's default options as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there")
    parser.add_argument("--load", nargs=2, metavar=("DIR", "LEVEL"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.load:
        print(json.dumps(load_and_step(Path(chosen.load[0]), chosen.load[1], chosen.threads)))
        return
    torch.set_num_threads(chosen.threads)
    config = PRESETS[chosen.preset]
    config = replace(config, num_hidden_layers=chosen.layers or config.num_hidden_layers)
    options = Options(dtype=chosen.dtype, disable=("lower",), verify=False, no_weights=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "onnx"
        start = time.perf_counter()
        write_onnx(build(config, options), folder, RandomWeights(config))
        size = (folder / "weights.bin").stat().st_size
        rows: dict[str, dict[str, float]] = {
            "export": {"seconds": time.perf_counter() - start, "peak_MiB": peak(), "weights_bytes": size}
        }
        for level in ("ORT_DISABLE_ALL", *(["ORT_ENABLE_ALL"] if chosen.default else [])):
            command = [sys.executable, __file__, "--threads", str(chosen.threads), "--load", str(folder), level]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"loading with {level} failed ({done.returncode}): {done.stderr[-2000:]}")
            rows[level] = json.loads(done.stdout)
    layer = largest_layer(config) * torch.empty((), dtype=options.dtype_for(config.dtype)).element_size()
    print(f"{chosen.preset}, {config.num_hidden_layers} layers, {chosen.dtype}; largest layer {layer / MIB:,.0f} MiB")
    for name, row in rows.items():
        print(f"{name:<16}", "  ".join(f"{key} {value:,.1f}" for key, value in row.items()))
    if chosen.json:
        document = {"preset": chosen.preset, "layers": config.num_hidden_layers, "dtype": chosen.dtype, "runs": rows}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")


def largest_layer(config: ModelConfig) -> int:
    """Parameters of the layer that has most."""
    sizes: dict[str, int] = {}
    for name, shape in expected_shapes(config).items():
        layer = ".".join(name.split(".")[:3])
        sizes[layer] = sizes.get(layer, 0) + int(np.prod(shape))
    return max(count for layer, count in sizes.items() if ".layers." in layer)


if __name__ == "__main__":
    main()
