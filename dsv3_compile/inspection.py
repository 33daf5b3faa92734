"""What a compile did, as one document and as text: the passes, their costs, their refusals, their certificates."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx

from codegen.targets import Target
from dsv3_compile.artifact import Artifact, ArtifactError
from dsv3_compile.options import Options
from dsv3_compile.program import Program
from dsv3_compile.source import FUNCTION, graph_source
from passes.base import Workload
from passes.cost import Cost
from passes.pipeline import PassRecord
from passes.verify import Certificate

SCHEMA = 2  # of the document; report/schema.json describes it
REPORT = "report/passes.json"
GRAPHS = "report/graphs.json"
TRACED = Workload(0, 0, 0)  # of graphs whose sizes are known otherwise


class Report(dict[str, Any]):
    """What passes did, as plain numbers, strings, lists and dicts: see `document`. As text, a table, what was left
    alone and why, and of a graph of torch.compile also why it had no passes, or what was too large to be certified."""

    def __str__(self) -> str:
        if self.get("fallback"):
            return f"{self['blocks'][0]['name']}: goes to Inductor as it came, because {self['fallback']}\n"
        lines = list(refusals(self))
        lines += [f"{one['pass']} was not certified everywhere: {one['reason']}" for one in self.get("uncertified", ())]
        return "\n".join([table(self), *lines])


def inspect(artifact: str | Path) -> Report:
    """The document of an artifact: see `document`. Raises ArtifactError for a folder that is not intact, or whose
    report another version wrote in another form."""
    report = _read(Artifact.open(artifact), REPORT)
    if report.get("schema") != SCHEMA:
        found = report.get("schema")
        raise ArtifactError(f"{artifact}: the report has schema {found}; this version reads {SCHEMA}: compile again")
    return Report(report)


def inspect_graphs(artifact: str | Path) -> dict[str, Any]:
    """Its graphs around every pass: see `graphs`. Raises ArtifactError for a folder that is not intact."""
    return _read(Artifact.open(artifact), GRAPHS)


def _read(artifact: Artifact, name: str) -> dict[str, Any]:
    path = artifact.path(name)
    if not path.is_file():
        raise ArtifactError(f"{path}: the artifact was written without a report")
    return json.loads(path.read_text(encoding="utf-8"))


def documents(program: Program, options: Options) -> dict[str, dict[str, Any]]:
    """Everything under report/ of an artifact, by file name."""
    return {Path(REPORT).name: document(program, options), Path(GRAPHS).name: graphs(program)}


def graphs(program: Program) -> dict[str, Any]:
    """Per block and phase ("moe decode") the distinct `snapshots` of its graph, and which `states` they were.

    A snapshot is `text` and `nodes`; states[n] is the number of the snapshot that pass n started from, the last
    entry that of the finished graph.
    """
    return {f"{name} {phase}": found for (name, phase), found in program.graphs.items()}


def document(program: Program, options: Options) -> dict[str, Any]:
    """Plain numbers, strings, lists and dicts.

    blocks: per block and phase `name`, `phase`, `layers`, `workload`, `certificate` (of all passes together, null
    without) and `passes`; a pass holds number, name,
    spec, matches, refusals (node, source, reason), seconds, nodes_before and nodes_after, cost_before and cost_after
    (expressions in B, S, T; `at` the block's workload numbers, and the seconds that the target needs at least),
    its certificate (null without), and its diff: the lines of the printed graph that changed.
    phase_plans: see report.phase_plan. The schema is report/schema.json.
    """
    layers: dict[str, list[int]] = {}
    for step in program.schedule:
        layers.setdefault(step.block, []).extend([] if step.layer is None else [step.layer])
    return {
        **header(program.config.model_type, program.target, program.dtype, repr(options)),
        "blocks": [
            block_document(
                name,
                phase,
                layers[name],
                records,
                program.workloads[phase],
                program.target,
                program.certificates.get((name, phase)),
            )  # fmt: skip
            for (name, phase), records in program.records.items()
        ],
        "phase_plans": program.plans,
    }


def header(model_type: str, target: Target, dtype: torch.dtype, options: str) -> dict[str, Any]:
    """What was compiled, for which machine, and how."""
    return {
        "schema": SCHEMA,
        "model_type": model_type,
        "target": target.name,
        "machine": {
            "bytes_per_second": target.bandwidth,
            "flops_per_second": target.flops,
            "launch_seconds": target.launch_seconds,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "options": options,
    }


def block_document(
    name: str,
    phase: str,
    layers: list[int],
    records: Sequence[PassRecord],
    workload: Workload | None,
    target: Target,
    certificate: Certificate | None = None,
) -> dict[str, Any]:
    """One block in one phase. workload: None where the costs are numbers already, at the sizes of a traced graph.

    certificate: of all passes together.
    """
    return {
        "name": name,
        "phase": phase,
        "layers": layers,
        "workload": None if workload is None else asdict(workload),
        "certificate": _certificate(certificate),
        "passes": [
            {"number": number, **_record(record, workload or TRACED, target)} for number, record in enumerate(records)
        ],
    }


def _record(record: PassRecord, workload: Workload, target: Target) -> dict[str, Any]:
    return {
        "name": record.name,
        "spec": record.spec,
        "matches": list(record.matches),
        "refusals": [{"node": r.node, "reason": r.reason, "source": r.source} for r in record.refusals],
        "seconds": record.seconds,
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "cost_before": _cost(record.cost_before, workload, target),
        "cost_after": _cost(record.cost_after, workload, target),
        "certificate": _certificate(record.certificate),
        "diff": list(changes(record.text_before, record.text_after)),
    }


def _certificate(certificate: Certificate | None) -> dict[str, Any] | None:
    return None if certificate is None else {**asdict(certificate), "skipped": list(certificate.skipped)}


def _cost(cost: Cost, workload: Workload, target: Target) -> dict[str, Any]:
    here = cost.at(workload)
    seconds = max(here.flops / target.flops, here.bytes / target.bandwidth) + cost.launches * target.launch_seconds
    return {
        "flops": str(cost.flops),
        "bytes": str(cost.bytes),
        "launches": cost.launches,
        "weight_bytes": cost.weight_bytes,
        "cache_bytes_per_token": cost.cache_bytes_per_token,
        "at": {"flops": here.flops, "bytes": here.bytes, "seconds": seconds},
    }


HEADER = ("pass", "matches", "refused", "nodes", "FLOPs", "bytes", "kernels", "certificate")


def table(report: dict[str, Any]) -> str:
    """One section per block and phase, one row per pass that matched or refused something; the others are left out."""
    sections = []
    for block in report["blocks"]:
        busy = [row for row in block["passes"] if row["matches"] or row["refusals"]]
        size = block["workload"]
        layers = f" × {len(block['layers'])}" if block["layers"] else ""
        at = f"  (B={size['batch']} S={size['queries']} T={size['context']})" if size else ""
        whole = block["certificate"]
        together = "" if whole is None else f"  all passes together: {whole['max_rel_error']:.0e}"
        title = f"{block['name']}{layers}, {block['phase']}{at}{together}"
        rows = [HEADER, *(tuple(_cells(row)) for row in busy)]
        sections.append("\n".join([title, *(_aligned(rows) if busy else ["  every pass found nothing"])]))
    return "\n\n".join(sections) + "\n"


def _cells(row: dict[str, Any]) -> Iterator[str]:
    before, after = row["cost_before"], row["cost_after"]
    yield row["name"]
    yield str(len(row["matches"]))
    yield str(len(row["refusals"]))
    yield _change(str(row["nodes_before"]), str(row["nodes_after"]))
    yield _change(short(before["at"]["flops"]), short(after["at"]["flops"]))
    yield _change(short(before["at"]["bytes"]), short(after["at"]["bytes"]))
    yield _change(str(before["launches"]), str(after["launches"]))
    certificate = row["certificate"]
    if certificate is None:
        yield "off"
    else:
        yield f"{certificate['max_rel_error']:.0e}{' at small sizes' if certificate['proxy'] else ''}"


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def short(number: float) -> str:
    """Three digits and a decimal prefix: 1.23 M."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or prefix == "P":
            return f"{number:.3g} {prefix}".rstrip()
        number /= 1000
    raise AssertionError


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [f"  {line}".rstrip() for line in lines]


def refusals(report: dict[str, Any]) -> Iterator[str]:
    """What was left alone, where, and why: one line for the refusals of a pass that differ in nodes' numbers only, as
    those of many layers do."""
    for block in report["blocks"]:
        for row in block["passes"]:
            alike: dict[tuple[str, str], list[dict[str, str]]] = {}
            for refusal in row["refusals"]:
                key = refusal["source"], re.sub(r"_\d+\b", "", refusal["reason"])
                alike.setdefault(key, []).append(refusal)
            for (source, _), (refusal, *others) in alike.items():
                place = f"{refusal['node']} ({source})" if source else refusal["node"]
                more = f" and {len(others)} like it" if others else ""
                yield f"{block['name']} {block['phase']}: {row['name']} refused {place}{more}: {refusal['reason']}"


def print_graph(module: fx.GraphModule) -> str:
    """The graph as a Python function: one line per node, its dtype and shape behind it, the model's line above."""
    text = graph_source(module, "")
    return text[text.index(f"def {FUNCTION}(") :]


def changes(before: str, after: str) -> Iterator[str]:
    """Lines of two printed graphs that differ, each with the line around it, as in a unified diff."""
    old, new = (_without_frees(text) for text in (before, after))
    for line in list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]:
        yield "    ..." if line.startswith("@@") else line


def _without_frees(text: str) -> list[str]:
    """`del` lines move with every change and say nothing new."""
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("del ")]
