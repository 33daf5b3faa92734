"""`dsv3c inspect --html`: one page that needs no network, from the report, graphs and kernels of an artifact."""

from __future__ import annotations

import html
import inspect as introspection
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx

from dsv3_compile.artifact import Artifact, write_whole
from dsv3_compile.inspection import inspect, inspect_graphs
from dsv3_compile.report.answers import answers, crossover_words, decode_words
from dsv3_compile.report.kernels import kernels
from dsv3_compile.report.layout import draw, drawn_graph
from passes.pipeline import DEFAULT_PIPELINE

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("diff.js", "charts.js", "graph.js", "views.js", "page.js")


def write_page(artifact: str | Path, file: str | Path) -> int:
    """Write the page; returns its size in bytes. Raises ArtifactError for a folder that is not intact."""
    text = page(page_data(Artifact.open(artifact)))
    write_whole(file, text)
    return len(text.encode())


def page_data(artifact: Artifact) -> dict[str, Any]:
    """Everything the page shows, as one document."""
    report = inspect(artifact.folder)
    for block in report["blocks"]:
        for row in block["passes"]:
            del row["diff"]  # the page makes its own, from the whole text
    return {
        "title": artifact.folder.resolve().name,
        "versions": dict(artifact.manifest.versions),
        "report": report,
        "graphs": {name: _with_drawings(found) for name, found in inspect_graphs(artifact.folder).items()},
        "kernels": kernels(artifact),
        "answers": answers(report),
        "plan_words": [
            f"{crossover_words(plan)} {decode_words(plan, report['target'])}" for plan in report["phase_plans"]
        ],
        "pictures": {type(one).name(): picture(type(one)) for one in DEFAULT_PIPELINE},
    }


def _with_drawings(found: dict[str, Any]) -> dict[str, Any]:
    snapshots = [_with_drawing(snapshot) for snapshot in found["snapshots"]]
    near = [_near(snapshots[left], snapshots[right]) for left, right in pairwise(found["states"])]
    return {"states": found["states"], "snapshots": snapshots, "near": near}


def _with_drawing(snapshot: dict[str, Any]) -> dict[str, Any]:
    drawing = draw(drawn_graph(snapshot["nodes"]))
    return {
        "text": snapshot["text"],
        "nodes": snapshot["nodes"],
        "at": drawing.positions,
        "edges": drawing.edges,
    }


def _near(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Drawings of what is close to the nodes that a pass removed and added; None where it drew nothing new."""
    known = [{(node["name"], node["op"]) for node in snapshot["nodes"]} for snapshot in (before, after)]
    drawings = []
    for snapshot, other in ((before, known[1]), (after, known[0])):
        graph = drawn_graph(snapshot["nodes"])
        changed = {n["name"] for n in snapshot["nodes"] if (n["name"], n["op"]) not in other} & set(graph)
        close = changed.union(*(nx.all_neighbors(graph, name) for name in changed))
        drawing = draw(graph.subgraph(close).copy())
        drawings.append({"at": drawing.positions, "edges": drawing.edges})
    return drawings if all(drawing["at"] for drawing in drawings) else None


def picture(one: type) -> str:
    """A pass's docstring with the lines of its picture under each other."""
    text = one.__doc__ or ""
    start = re.match(r"    ( +)", text.partition("\n")[2])
    # The picture starts behind the quotes, its next lines are indented by as much.
    first = "    " + (start[1] if start else "")
    return introspection.cleandoc("\n" + first + text)


def page(data: dict[str, Any]) -> str:
    """The page as text, with its style, its scripts and `data` inside."""
    # "</" would end the script element that holds the data.
    embedded = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    parts = {
        "TITLE": html.escape(data["title"]),
        "STYLE": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "DATA": embedded,
        "SCRIPT": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match[1]], template)
