"""Machine code for a kernel's launches, made by triton without the GPU it is for."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from codegen.record import ALIGNMENT, Launch
from codegen.targets import Target

EXTENSIONS = {"cuda": "cubin", "hip": "hsaco"}
_NUMBERS = itertools.count()

Built = tuple[bytes, bytes, dict[str, Any]]
"""Machine code, triton's description of it (JSON), and what a loader must know to launch it."""


@contextmanager
def imported(source: str) -> Iterator[ModuleType]:
    """A module made of this text, as long as the context lasts; triton wants its functions in a file."""
    name = f"_dsv3_kernel_{next(_NUMBERS)}"
    with tempfile.TemporaryDirectory(prefix="dsv3-") as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            del sys.modules[name]


def build(module: ModuleType, launch: Launch, target: Target) -> Built:
    """Compile a launch of one of a module's kernels.

    Raises ValueError naming the kernel if it needs more shared memory than the target has.
    """
    kernel = getattr(module, launch.kernel)
    compiled = _compile(kernel, launch, target)
    facts, code = compiled.metadata, compiled.asm[EXTENSIONS[target.backend]]
    if facts.shared > target.shared_memory:
        raise ValueError(
            f"{launch.kernel} needs {facts.shared} bytes of shared memory on {target.name}, which has "
            f"{target.shared_memory}; choose smaller tiles in codegen/tuning.py"
        )
    left = [parameter.name for parameter in kernel.params]
    described = next(path for name, path in compiled.metadata_group.items() if name.endswith(".json"))
    return (
        code,
        Path(described).read_bytes(),
        {
            "kernel": launch.kernel,
            "symbol": facts.name,
            "arguments": {name: kind for name, kind in launch.types.items() if name in left},
            "constants": {name: repr(value) for name, value in launch.constants.items()},
            "multiples_of_16": [name for name in launch.aligned if name in left],
            "options": dict(launch.options),
            "num_warps": facts.num_warps,
            "shared_bytes": facts.shared,
            "global_scratch_bytes": getattr(facts, "global_scratch_size", 0),  # hip has none
            **_resources(compiled, target),
        },
    )


def _compile(kernel: JITFunction, launch: Launch, target: Target) -> Any:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        signature[parameter.name] = launch.types.get(parameter.name, "constexpr")
        if parameter.name in launch.constants:
            constants[(index,)] = launch.constants[parameter.name]
        if parameter.name in launch.aligned:
            attributes[(index,)] = [["tt.divisibility", ALIGNMENT]]
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make(kernel, signature, constants, attributes)
    machine = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=machine, options=dict(launch.options))


def _resources(compiled: Any, target: Target) -> dict[str, int]:
    """Registers per thread and bytes spilled, where the tools say."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        return _found(
            text, {"registers": r"\.vgpr_count:\s+(\d+)", "spilled_registers": r"\.vgpr_spill_count:\s+(\d+)"}
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return _found(said, {"registers": r"REG:(\d+)", "stack_bytes": r"STACK:(\d+)"})


def _found(text: str, patterns: Mapping[str, str]) -> dict[str, int]:
    matches = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    return {name: int(match[1]) for name, match in matches.items() if match}
