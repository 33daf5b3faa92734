"""A kernel for one call of an op on one target: readable source for its constants, and machine code."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import triton

from codegen.build import EXTENSIONS, Built, build, imported
from codegen.bundle import bundle
from codegen.record import Launch, Operand, TensorSpec, record_launches
from codegen.specialise import agreed, specialise
from codegen.targets import Target
from codegen.tuning import KERNELS, choose, tiles, tried_sizes


@dataclass(frozen=True)
class KernelSource:
    """`source` is a module that imports only torch and triton; its function `op` is the launcher."""

    name: str
    op: str
    source: str
    constants: dict[str, dict[str, Any]]  # by kernel: what all its launches agree on
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class EmittedKernel:
    """A kernel file with its machine code; `metadata` is plain data, one entry per binary under "binaries"."""

    name: str
    op: str
    source: str
    constants: dict[str, dict[str, Any]]
    binaries: dict[str, bytes]  # by file name
    metadata: dict[str, Any]


def write_kernel(op: str, operands: Sequence[Operand], target: Target) -> KernelSource:
    """Source for a call of `op` with these operands, in the order of its signature.

    Numbers among the operands, and numbers among the sizes, are compiled in; sizes that are text stay free.
    ValueError for an unknown op.
    """
    path = choose(op, operands, target)
    text = bundle(path, op, tiles(path, target))
    with imported(text) as module:
        launches = record_launches(getattr(module, op), operands, target, tried_sizes(path, target))
    kernels = dict.fromkeys(launch.kernel for launch in launches)
    constants = {kernel: agreed([one for one in launches if one.kernel == kernel]) for kernel in kernels}
    origin = path.relative_to(KERNELS.parent.parent).as_posix()
    dtypes = [str(o.dtype).removeprefix("torch.") for o in operands if isinstance(o, TensorSpec)]
    heading = f'"""{op} for {target.name}, cut from {origin}.\n\nInputs: {", ".join(dtypes)}.\n"""\n\n'
    source = heading + specialise(text, op, launches)
    return KernelSource(_name(op, dtypes[0], constants, source), op, source, constants, tuple(launches))


def compile_kernels(kernels: Iterable[KernelSource], target: Target) -> list[EmittedKernel]:
    """Machine code for every launch of written kernels, as many at a time as there are processors.

    kernels may be an iterator that writes one when it is asked: others are compiled meanwhile. ValueError for a kernel
    that does not fit the target.
    """
    with _uncollected(), ExitStack() as modules, ThreadPoolExecutor(os.cpu_count()) as pool:
        started: list[tuple[KernelSource, list[Future[Built]]]] = []
        try:
            for kernel in kernels:
                module = modules.enter_context(imported(kernel.source))
                started.append((kernel, [pool.submit(build, module, launch, target) for launch in kernel.launches]))
            return [_emitted(kernel, target, [one.result() for one in builds]) for kernel, builds in started]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the others would be waited for
            raise


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected meanwhile.

    CPython 3.11 counts the depth of syntax trees for all threads in one place. Collecting garbage while one thread
    reads a kernel's source can run code that lets another do so, and then both counts are off: a SystemError.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _emitted(kernel: KernelSource, target: Target, built: Sequence[Built]) -> EmittedKernel:
    binaries: dict[str, bytes] = {}
    entries = []
    for number, (code, described, facts) in enumerate(built):
        file = f"{kernel.name}.{number}.{EXTENSIONS[target.backend]}"
        binaries |= {file: code, f"{kernel.name}.{number}.meta.json": described}
        entries.append({"file": file, **facts})
    metadata = {"op": kernel.op, "target": target.name, "triton": triton.__version__, "binaries": entries}
    return EmittedKernel(kernel.name, kernel.op, kernel.source, kernel.constants, binaries, metadata)


def _name(op: str, dtype: str, constants: dict[str, dict[str, Any]], source: str) -> str:
    """`<op>__<dtype>_<sizes>_<digest>`: sizes for people, the digest of the source for certainty."""
    sizes: dict[str, int] = {}
    for values in constants.values():
        for name, value in values.items():
            if type(value) is int and len(name) <= 2:  # the letters of the legend, not tiles or launch options
                sizes.setdefault(name, value)
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return f"{op}__{'_'.join([dtype, *(f'{name}{value}' for name, value in sizes.items()), digest])}"
