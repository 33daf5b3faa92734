"""The usual hooks: `DSV3_DUMP=dir` writes every state of every block, `TORCH_LOGS="+passes"` tells what each pass did,
and `TORCH_TRACE=dir` adds both to torch's structured trace, where tlparse shows them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch._logging import trace_structured

from passes.pipeline import PassRecord

VARIABLE = "DSV3_DUMP"
log = logging.getLogger("passes")


def dump(block: str, phase: str, records: Sequence[PassRecord], history: dict[str, Any]) -> None:
    """Write, log and trace what the passes did to one block, as far as the environment asks for it."""
    states = [history["snapshots"][state] for state in history["states"]]
    names = ["captured", *(record.name for record in records)]
    for record in records:
        for line in _story(record):
            log.debug("%s %s: %s", block, phase, line)
    for number, (name, state) in enumerate(zip(names, states, strict=True)):
        _trace(f"dsv3_{block}_{phase}_{number:02d}_{name}", state["text"])
    _trace(f"dsv3_{block}_{phase}_passes", "\n".join(line for record in records for line in _story(record)))
    if folder := os.environ.get(VARIABLE):
        _write(Path(folder) / f"{block}_{phase}", names, states)


def _story(record: PassRecord) -> Iterator[str]:
    certificate = record.certificate
    proof = f", certified to {certificate.max_rel_error:.0e}" if certificate is not None else ""
    nodes = f"{record.nodes_before} → {record.nodes_after} nodes"
    yield f"{record.spec}: {nodes}, {record.seconds * 1e3:.0f} ms{proof}"
    for match in record.matches:
        yield f"{record.name} matched {match}"
    for refusal in record.refusals:
        where = f" ({refusal.source})" if refusal.source else ""
        yield f"{record.name} refused {refusal.node}{where}: {refusal.reason}"


def _trace(name: str, text: str) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: text,
        expect_trace_id=False,
    )


def _write(folder: Path, names: list[str], states: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, state) in enumerate(zip(names, states, strict=True)):
        stem = f"{number:02d}_{name}"
        (folder / f"{stem}.py").write_text(state["text"], encoding="utf-8")
        (folder / f"{stem}.json").write_text(json.dumps(state["nodes"], indent=1) + "\n", encoding="utf-8")
        (folder / f"{stem}.dot").write_text(dot(state["nodes"]), encoding="utf-8")


def dot(nodes: Sequence[dict[str, Any]]) -> str:
    """The graph for Graphviz: one box per node, with its op and its value."""
    lines = ["digraph block {", "  node [shape=box, fontname=monospace, fontsize=10];"]
    for node in nodes:
        label = r"\n".join(part for part in (node["name"], node["op"], node["value"]) if part)
        style = ' style="rounded,dashed"' if node["role"] else ""
        lines.append(f'  "{node["name"]}" [label="{label}"{style}];')
    lines += [f'  "{source}" -> "{node["name"]}";' for node in nodes for source in node["inputs"]]
    return "\n".join([*lines, "}"]) + "\n"
