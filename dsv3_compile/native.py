"""Graphs compiled ahead of time for this machine's CPU (AOTInductor): loaded in milliseconds, no compiler needed.

What is compiled is the graph source inside the artifact. Only layers are worth it: embed and head are a lookup
and one large product. One worker process per processor serves the graphs; a worker talks in lines of JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import queue
import shutil
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
from dsv3_compile.loading import load_graph

Graphs = Mapping[str, Mapping[str, GraphEntry]]

# Two or more: torch.export takes 0 and 1 for constants. All different, so that no two sizes are taken for one.
EXAMPLE_SIZES = {"B": 2, "S": 5, "T": 11}

INDUCTOR = {
    # The number of threads is that of the machine that runs, not that of the one that compiles.
    "cpp.dynamic_threads": True,
    # Two precompiled headers take longer to make than a handful of graphs saves by them.
    "aot_inductor.precompile_headers": False,
    "cpp_cache_precompile_headers": False,
}


class NativeError(Exception):
    """There is no C++ compiler, or it or AOTInductor failed."""


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


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def compile_native(folder: Path, graphs: Graphs, progress: Progress) -> dict[str, dict[str, GraphEntry]]:
    """Compile the layers of an unfinished artifact into native/, and return all entries, theirs with the path.

    Raises NativeError naming the graph and the last line that the compiler said.
    """
    if not has_compiler():
        raise NativeError("native code needs a C++ compiler (g++, or the one that CXX names); none was found")
    (folder / "native").mkdir()
    compiled = {block: dict(phases) for block, phases in graphs.items()}
    jobs = [(block, phase) for block in graphs for phase, entry in graphs[block].items() if _has_cache(entry)]
    workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    count = min(os.cpu_count() or 1, len(jobs))

    def one(job: tuple[str, str]) -> None:
        block, phase = job
        entry = graphs[block][phase]
        name = f"native/{block}_{phase}.pt2"
        progress(f"native code of {block}, {phase}")
        worker = workers.get()
        try:
            worker.compile(folder / entry.source, entry.inputs, folder / name, f"{block}, {phase}")
        finally:
            workers.put(worker)
        compiled[block][phase] = dataclasses.replace(entry, native=name)

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max_workers=max(1, count)) as pool:
        started = [_Worker(scratch) for _ in range(count)]
        try:
            for worker in started:
                workers.put(worker)
            list(pool.map(one, jobs))
        finally:
            for worker in started:
                worker.stop()
    return compiled


def load_native(path: Path) -> Callable[..., Any]:
    """A compiled graph: takes contiguous tensors in the order of the graph's inputs."""
    # Not torch._inductor.aoti_load_package: that one would unpickle a program or weights if a package held them.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    return lambda *inputs: loader.boxed_run(list(inputs))


def _has_cache(entry: GraphEntry) -> bool:
    return any(port.role == "cache" for port in entry.inputs)


class _Worker:
    """A process that compiles one graph at a time: this module, run as a program."""

    def __init__(self, scratch: str) -> None:
        self.messages = tempfile.TemporaryFile("w+")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": scratch,  # of no use to anybody once the graph is packaged
            # Believe /proc/cpuinfo instead of compiling a test program for every instruction set.
            "TORCHINDUCTOR_VEC_ISA_OK": "1",
        }
        command = [sys.executable, "-m", "dsv3_compile.native"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.messages, text=True, env=environment
        )

    def compile(self, source: Path, inputs: tuple[Port, ...], output: Path, what: str) -> None:
        job = {"source": str(source), "inputs": list(map(dataclasses.asdict, inputs)), "output": str(output)}
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer.strip() != "done":
            raise NativeError(f"native code of {what}: {answer.strip() or self._last_message()}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.messages.close()

    def _last_message(self) -> str:
        self.messages.seek(0)
        lines = [line.strip() for line in self.messages if line.strip()]
        return lines[-1] if lines else "the worker process ended"


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
        torch._inductor.aoti_compile_and_package(exported, package_path=str(output), inductor_configs=dict(INDUCTOR))


def main() -> None:
    """Read jobs, one a line; answer each with "done" or with what went wrong."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print is not an answer
    for line in sys.stdin:
        job = json.loads(line)
        ports = [Port(**{**port, "shape": tuple(port["shape"])}) for port in job["inputs"]]
        try:
            compile_graph(Path(job["source"]), ports, Path(job["output"]))
            answer = "done"
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            answer = f"{type(error).__name__}: {first[0]}"
        answers.write(answer + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
