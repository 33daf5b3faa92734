"""Machine code of an emitted kernel in place of compiling it: triton's own launcher runs it, so that tensor
descriptors and dependent launches work as after a compilation."""

from __future__ import annotations

import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from codegen.build import EXTENSIONS
from codegen.direct import DirectLaunches, not_direct
from codegen.planned import Planned
from codegen.record import ALIGNMENT

LOGGER = logging.getLogger(__name__)

Compile = Callable[..., Any]


def use_stored(module: ModuleType, metadata: Mapping[str, Any], folder: Path) -> None:
    """Let the kernels of an emitted file find their machine code in `folder` where it fits a launch. NVIDIA's are
    launched directly, and calls of a kind that has been seen are planned.

    metadata: what was written beside the file. Code of another triton than this one is not touched: the kernels are
    then compiled from their source, as they are for launches that no stored code fits.
    """
    if metadata.get("triton") != triton.__version__:
        LOGGER.info("%s: machine code of triton %s is left alone", module.__name__, metadata.get("triton"))
        return
    entries = _entries(module, metadata)
    for name, own in entries.items():
        kernel = getattr(module, name)
        kernel.device_caches = defaultdict(_binder(kernel, own, folder))
    if entries and all(entry["file"].endswith(".cubin") for entry in metadata["binaries"]):
        for kernel in not_direct(module):
            kernel.run = DirectLaunches(kernel)
        setattr(module, metadata["op"], Planned(getattr(module, metadata["op"])))


def _entries(module: ModuleType, metadata: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """What is stored for each kernel; nothing for the interpreter's kernels, or of another triton than this one."""
    entries: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in metadata["binaries"] if metadata.get("triton") == triton.__version__ else ():
        if isinstance(getattr(module, entry["kernel"]), JITFunction):
            entries[entry["kernel"]].append(entry)
    return entries


def _binder(kernel: JITFunction, entries: Sequence[Mapping[str, Any]], folder: Path) -> Callable[[], Any]:
    """What makes a kernel ready for a device: triton's own way, and then our way to compile."""

    def make() -> Any:
        made = kernel.create_binder()
        kernel.compile = stored_first(kernel, entries, folder, kernel.compile)
        return made

    return make


def stored_first(kernel: JITFunction, entries: Sequence[Mapping[str, Any]], folder: Path, compile: Compile) -> Compile:
    """A compile that takes stored code which fits, and compiles otherwise."""

    def find(src: Any, target: Any = None, options: Mapping[str, Any] | None = None, **more: Any) -> Any:
        for entry in entries:
            if fits(kernel, entry, src, options or {}):
                return _loaded(kernel, entry, folder)
        LOGGER.info("%s is compiled: no stored code fits this launch", kernel.__name__)
        return compile(src, target=target, options=options, **more)

    return find


def fits(kernel: JITFunction, entry: Mapping[str, Any], src: Any, options: Mapping[str, Any]) -> bool:
    """Does code that was compiled for `entry` serve a launch? It may assume less than the launch offers, not more."""
    if any(options.get(name) != value for name, value in entry["options"].items()):
        return False
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        found, constant = src.signature[name], src.constants.get((index,))
        if name in entry["constants"]:
            if found != "constexpr" or repr(constant) != entry["constants"][name]:
                return False
            continue
        wanted = entry["arguments"][name]
        # Triton makes a constant of a size of 1; code for any number serves it.
        if found != wanted and not (found == "constexpr" and constant == 1 and wanted in ("i32", "i64")):
            return False
        aligned = ["tt.divisibility", ALIGNMENT] in (src.attrs.get((index,)) or [])
        if name in entry["multiples_of_16"] and not wanted.startswith("tensordesc") and not aligned:
            return False
    return True


def make_launchers(stored: Iterable[tuple[ModuleType, Mapping[str, Any], Path]]) -> None:
    """Let triton make what launches the kernels of emitted files, all at once instead of each at its first launch.

    stored: what `use_stored` was given. Triton before 3.7 compiles a C file for every signature.
    """
    driver = triton.runtime.driver.active
    suffix = "." + EXTENSIONS[driver.get_current_target().backend]
    kernels: dict[str, CompiledKernel] = {}
    for module, metadata, folder in stored:
        for entry in itertools.chain(*_entries(module, metadata).values()):
            if entry["file"].endswith(suffix):
                kind = json.dumps([entry["arguments"], sorted(entry["constants"])])
                kernels.setdefault(kind, _loaded(getattr(module, entry["kernel"]), entry, folder))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: driver.launcher_cls(kernel.src, kernel.metadata), kernels.values()))


def _loaded(kernel: JITFunction, entry: Mapping[str, Any], folder: Path) -> CompiledKernel:
    names = {parameter.name: index for index, parameter in enumerate(kernel.params)}
    signature = {name: entry["arguments"].get(name, "constexpr") for name in names}
    constants = {(names[p.name],): None for p in kernel.params if p.name in entry["constants"]}
    attributes = {(names[name],): [["tt.divisibility", ALIGNMENT]] for name in entry["multiples_of_16"]}
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    code = folder / entry["file"]
    described = code.with_suffix(".meta.json")
    return CompiledKernel(
        make(kernel, signature, constants, attributes),
        {described.name: str(described), code.name: str(code)},
        code.stem,
    )
