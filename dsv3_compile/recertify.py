"""The certificates of an artifact, once more: its config and options go through the compiler again."""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsv3_compile.artifact import Artifact, ArtifactError
from dsv3_compile.driver import Progress, build
from dsv3_compile.inspection import inspect, inspect_graphs
from dsv3_compile.options import Options, options_from
from model_def.config import ModelConfig


@dataclass(frozen=True)
class Repeated:
    """Certificates that were repeated; the graphs that came out otherwise than stored, as "block phase"."""

    certificates: int
    largest: float  # relative error
    changed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def recertify(artifact: Artifact, progress: Progress) -> Repeated:
    """Run every pass on every block before and after, as the compile did, and compare the graphs with the stored ones.

    Raises CertificateError where a pass changes what a block computes.
    """
    report, graphs = inspect(artifact.folder), inspect_graphs(artifact.folder)
    config = ModelConfig.from_dict(dict(artifact.manifest.config))
    program = build(config, replace(read_options(report["options"]), verify=True, no_weights=True), progress)
    found = [r.certificate for records in program.records.values() for r in records if r.certificate is not None]
    changed = [
        f"{block} {phase}"
        for (block, phase), history in program.graphs.items()
        if last_text(history) != last_text(graphs[f"{block} {phase}"])
    ]
    return Repeated(len(found), max(one.max_rel_error for one in found), tuple(changed))


def last_text(history: dict[str, Any]) -> str:
    return history["snapshots"][history["states"][-1]]["text"]


def read_options(text: str) -> Options:
    """Options from their repr. ArtifactError for any other text: nothing of a report is executed."""
    try:
        (call,) = [node for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Call)]
        return options_from({str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, ValueError) as error:
        raise ArtifactError(f"the report's options are not readable: {text[:80]!r}") from error
