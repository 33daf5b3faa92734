"""`dsv3c inspect`: the report of an artifact in a terminal, as JSON, or as a page."""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from dsv3_compile.artifact import Artifact
from dsv3_compile.inspection import Report, inspect, inspect_graphs, short
from dsv3_compile.options import OptionError
from dsv3_compile.report.answers import crossover_words, decode_words
from dsv3_compile.report.kernels import kernels
from dsv3_compile.report.page import write_page
from dsv3_compile.report.side_by_side import side_by_side

NARROWEST = 100  # columns of a diff; less shows nothing


def show(options: Namespace) -> int:
    """Print what was asked for. Raises OptionError for a pass, block or phase that is not in the artifact."""
    if options.html:
        size = write_page(options.artifact, options.html)
        print(f"{options.html}: {short(size)}B", file=sys.stderr if options.json else sys.stdout)
        if not options.json:
            return 0
    report = chosen(inspect(options.artifact), options)
    if options.kernels:
        report["kernels"] = kernels(Artifact.open(options.artifact))
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    if options.kernels:
        lines = kernel_lines(report)
    elif options.only is None and not options.diff:
        lines = overview(report)
    else:
        graphs = inspect_graphs(options.artifact) if options.diff else {}
        lines = details(report, graphs)
    for line in lines:
        print(line)
    return 0


def chosen(report: Report, options: Namespace) -> Report:
    """The report with only the blocks, phases and passes that were asked for."""
    names = [row["name"] for row in report["blocks"][0]["passes"]]
    for flag, wanted, known in (
        ("pass", options.only, names),
        ("block", options.block, list(dict.fromkeys(block["name"] for block in report["blocks"]))),
        ("phase", options.phase, list(dict.fromkeys(block["phase"] for block in report["blocks"]))),
    ):
        if wanted is not None and wanted not in known:
            raise OptionError(f"--{flag} {wanted}: not in this artifact; accepted: {', '.join(known)}")
    blocks = [
        {**block, "passes": [row for row in block["passes"] if options.only in (None, row["name"])]}
        for block in report["blocks"]
        if options.block in (None, block["name"]) and options.phase in (None, block["phase"])
    ]
    return Report(report, blocks=blocks)


def overview(report: Report) -> Iterator[str]:
    """The table, what was left alone, and where one form of attention overtakes another."""
    yield str(report)
    for plan in report["phase_plans"]:
        yield f"{', '.join(plan['blocks'])}: {crossover_words(plan)} {decode_words(plan, report['target'])}"
        for row in plan["times"]:
            when = "never" if row["queries"] is None else f"from {row['queries']} queries"
            yield f"  B={row['batch']} T={row['context']}: expanding is faster on {report['target']} {when}"


def details(report: dict[str, Any], graphs: dict[str, Any]) -> Iterator[str]:
    """What each chosen pass did to each chosen block, with its diff where `graphs` are given."""
    width = max(NARROWEST, shutil.get_terminal_size((160, 50)).columns)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for block in report["blocks"]:
        for row in block["passes"]:
            if not (row["matches"] or row["refusals"]):
                yield f"{row['name']} on {block['name']}, {block['phase']}: nothing looks like it"
                continue
            yield from _did(block, row)
            if graphs:
                before, after = _texts(graphs[f"{block['name']} {block['phase']}"], row["number"])
                yield from (f"  {line}" for line in side_by_side(before, after, width - 2, colour))
            yield ""


def _texts(history: dict[str, Any], number: int) -> tuple[str, str]:
    before, after = (history["snapshots"][history["states"][n]]["text"] for n in (number, number + 1))
    return before, after


def _did(block: dict[str, Any], row: dict[str, Any]) -> Iterator[str]:
    before, after = row["cost_before"], row["cost_after"]
    size = block["workload"]
    yield f"{row['spec']} on {block['name']}, {block['phase']}"
    for match in row["matches"]:
        yield f"  matched  {match}"
    for refusal in row["refusals"]:
        place = f"{refusal['node']} ({refusal['source']})" if refusal["source"] else refusal["node"]
        yield f"  left     {place}: {refusal['reason']}"
    yield f"  at B={size['batch']} S={size['queries']} T={size['context']}:"
    for name, unit in (("flops", "FLOP"), ("bytes", "B")):
        numbers = f"{short(before['at'][name])}{unit} → {short(after['at'][name])}{unit}"
        yield f"    {name:<8} {numbers:<28} {_short_expression(before[name])} → {_short_expression(after[name])}"
    for name in ("launches", "weight_bytes", "cache_bytes_per_token"):
        if before[name] != after[name]:
            yield f"    {name.replace('_', ' ')}: {before[name]:,} → {after[name]:,}"
    certificate = row["certificate"]
    if certificate is not None:
        where = " ".join(f"{k}={v}" for k, v in certificate["sizes"].items())
        twin = ", a twin at small sizes" if certificate["proxy"] else ""
        yield f"    certified to {certificate['max_rel_error']:.0e} in {certificate['dtype']} at {where}{twin}"


def _short_expression(text: str, longest: int = 90) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def kernel_lines(report: dict[str, Any]) -> Iterator[str]:
    """Every emitted kernel with its machine code, and the node and model line behind it."""
    if not report["kernels"]:
        yield f"no kernels: on {report['target']} the ops run as their torch references"
    for kernel in report["kernels"]:
        yield kernel["name"]
        for use in kernel["uses"]:
            source = f"  {use['source']}" if use["source"] else ""
            yield f"    {use['block']}, {use['phase']}: {use['node']}{source}"
        for binary in kernel["binaries"]:
            facts = [
                f"{binary[key]} {text}"
                for key, text in (
                    ("registers", "registers"),
                    ("shared_bytes", "bytes shared"),
                    ("stack_bytes", "bytes of stack (spills)"),
                    ("num_warps", "warps"),
                )
                if binary.get(key) is not None
            ]
            constants = " ".join(f"{key}={value}" for key, value in binary.get("constants", {}).items())
            yield f"    {binary['kernel']}: {', '.join(facts)}; {constants}"
        yield ""
