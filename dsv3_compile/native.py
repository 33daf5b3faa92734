"""Graphs compiled ahead of time for this machine's CPU (AOTInductor): loaded in milliseconds, no compiler needed.

What is compiled is the graph source inside the artifact, each graph in a process of its own, as many at a time
as there are processors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from dsv3_compile.artifact import GraphEntry, Port, Progress
from dsv3_compile.source import load_graph

Graphs = Mapping[str, Mapping[str, GraphEntry]]

# Two or more: torch.export takes 0 and 1 for constants. All different, so that no two sizes are taken for one.
EXAMPLE_SIZES = {"B": 2, "S": 5, "T": 11}


class NativeError(Exception):
    """AOTInductor or the C++ compiler failed."""


def cpu_identity() -> str:
    """What native code depends on: the instruction set of this processor."""
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {digest}"


def compile_native(folder: Path, graphs: Graphs, progress: Progress) -> dict[str, dict[str, GraphEntry]]:
    """Compile every graph of an unfinished artifact into native/, and return the entries with their paths.

    Raises NativeError naming the graph and the last line that the compiler said.
    """
    (folder / "native").mkdir()
    jobs = [(block, phase, entry) for block, phases in graphs.items() for phase, entry in phases.items()]

    def one(job: tuple[str, str, GraphEntry]) -> tuple[str, str, GraphEntry]:
        block, phase, entry = job
        name = f"native/{block}_{phase}.pt2"
        progress(f"native code: {block}, {phase}")
        _in_own_process(folder, entry, folder / name, f"{block}, {phase}")
        return block, phase, dataclasses.replace(entry, native=name)

    compiled: dict[str, dict[str, GraphEntry]] = {block: {} for block in graphs}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for block, phase, entry in pool.map(one, jobs):
            compiled[block][phase] = entry
    return compiled


def load_native(path: Path) -> Callable[..., Any]:
    """A compiled graph: takes contiguous tensors in the order of the graph's inputs."""
    return torch._inductor.aoti_load_package(str(path))


def _in_own_process(folder: Path, entry: GraphEntry, output: Path, what: str) -> None:
    job = {
        "source": str(folder / entry.source),
        "inputs": [dataclasses.asdict(port) for port in entry.inputs],
        "output": str(output),
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "dsv3_compile.native"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment, check=False)
    if done.returncode or not output.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise NativeError(f"native code of {what}: {lines[-1].strip()}")


class _Graph(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


def compile_graph(source: Path, inputs: list[Port], output: Path) -> None:
    """Export one graph's source with its free sizes and compile it into `output` (.pt2)."""
    letters = {size for port in inputs for size in port.shape if isinstance(size, str)}
    dims = {letter: Dim(letter, min=1, max=1 << 24) for letter in letters}
    examples, dynamic = [], []
    for port in inputs:
        shape = [EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in port.shape]
        examples.append(torch.zeros(shape, dtype=getattr(torch, port.dtype)))
        dynamic.append({axis: dims[size] for axis, size in enumerate(port.shape) if isinstance(size, str)})
    with torch.no_grad():
        exported = torch.export.export(_Graph(load_graph(source)), tuple(examples), dynamic_shapes=(tuple(dynamic),))
        # A cache is temporary: the compiler's intermediate files are of no use to anybody afterwards.
        torch._inductor.aoti_compile_and_package(exported, package_path=str(output))


def main() -> None:
    job = json.load(sys.stdin)
    ports = [Port(**{**port, "shape": tuple(port["shape"])}) for port in job["inputs"]]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        compile_graph(Path(job["source"]), ports, Path(job["output"]))


if __name__ == "__main__":
    main()
