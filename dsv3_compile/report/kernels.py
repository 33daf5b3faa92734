"""The kernels of an artifact: constants, registers, shared memory, and the graph node and model line behind each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from dsv3_compile.artifact import FILL, Artifact
from dsv3_compile.inspection import inspect_graphs

IMPORT = re.compile(r"^from \.\.kernels\.(\w+) import \w+ as (\w+)$", re.M)
CALL = re.compile(r"^    (?:(\w+) = )?(\w+)\(", re.M)


def kernels(artifact: Artifact) -> list[dict[str, Any]]:
    """Per kernel file its name, op, source text, binaries (as compiled) and uses; empty for a CPU artifact."""
    found = []
    uses = kernel_uses(artifact)
    for path in artifact.listed("kernels"):
        if path.suffix != ".py":
            continue
        described = path.with_suffix(".json")
        metadata = json.loads(described.read_text()) if described.is_file() else {}
        found.append(
            {
                "name": path.stem,
                "op": metadata.get("op", path.stem),
                "source": path.read_text(encoding="utf-8"),
                "binaries": metadata.get("binaries", []),
                "uses": uses.get(path.stem, []),
            }
        )
    return found


def kernel_uses(artifact: Artifact) -> dict[str, list[dict[str, str]]]:
    """Which node of which block and phase runs a kernel, and the model line the node came from."""
    graphs = inspect_graphs(artifact.folder)
    uses: dict[str, list[dict[str, str]]] = {}
    for block, phases in artifact.manifest.graphs.items():
        for phase, entry in phases.items():
            # What fills the caches is a part of prefill, under the same names.
            history = graphs[f"{block} {'prefill' if phase == FILL else phase}"]
            lines = {node["name"]: node["source"] for node in history["snapshots"][-1]["nodes"]}
            for kernel, node in _calls(artifact.path(entry.source).read_text(encoding="utf-8")):
                use = {"block": block, "phase": phase, "node": node, "source": lines.get(node, "")}
                uses.setdefault(kernel, []).append(use)
    return uses


def _calls(source: str) -> Iterator[tuple[str, str]]:
    aliases = {alias: kernel for kernel, alias in IMPORT.findall(source)}
    for node, callee in CALL.findall(source):
        if callee in aliases:
            yield aliases[callee], node or callee
