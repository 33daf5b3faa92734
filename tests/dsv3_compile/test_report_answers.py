"""The answers of a report are its numbers: each is worked out again here from the document."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import pytest

from dsv3_compile.inspection import document, short
from dsv3_compile.report.answers import answers, duration, equality, removed, silent
from tests.dsv3_compile import tiny


@functools.cache
def _compiled() -> dict[str, Any]:
    return document(tiny.program(), tiny.OPTIONS)


@pytest.fixture
def report() -> dict[str, Any]:
    return deepcopy(_compiled())


def rows(report: dict[str, Any], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(block, row) for block in report["blocks"] for row in block["passes"] if row["name"] == name]


def test_the_gain_is_the_ratio_of_the_least_times(report: dict[str, Any]) -> None:
    (answer,) = [a for a in answers(report) if a["question"] == "What do the passes buy?"]
    for phase, line in zip(("prefill", "decode"), answer["lines"], strict=True):
        times = [0.0, 0.0]
        for block in report["blocks"]:
            if block["phase"] == phase:
                ends = block["passes"][0]["cost_before"], block["passes"][-1]["cost_after"]
                layers = max(1, len(block["layers"]))
                times = [t + end["at"]["seconds"] * layers for t, end in zip(times, ends, strict=True)]
        before, after = times
        assert line.startswith(f"{phase}: {duration(before)} → {duration(after)}, {before / after:.1f} times less (B=")
    assert f"falls {before / after:.1f} times in decode" in answer["answer"]


def test_absorption_is_told_where_it_removed_most(report: dict[str, Any]) -> None:
    found = removed(report)
    assert found is not None and found.place is not None
    saved = {
        (block["name"], block["phase"]): row["cost_before"]["at"]["flops"] - row["cost_after"]["at"]["flops"]
        for block, row in rows(report, "order-contractions")
        if row["matches"]
    }
    assert saved[found.place[:2]] == max(saved.values()) > 0
    (row,) = [r for b, r in rows(report, "order-contractions") if (b["name"], b["phase"]) == found.place[:2]]
    before = row["cost_before"]["at"]["flops"]
    assert f": {short(max(saved.values()))}FLOP of {short(before)}FLOP in each {found.place[0]} layer" in found.answer
    for _, row in rows(report, "order-contractions"):
        row["matches"] = []
    assert removed(report) is None


def test_the_largest_error_is_the_one_that_is_told(report: dict[str, Any]) -> None:
    block, row = rows(report, "fuse-routing")[-1]
    row["certificate"]["max_rel_error"] = 3e-11
    found = equality(report)
    assert "3e\N{NON-BREAKING HYPHEN}11" in found.answer and found.place == (block["name"], block["phase"], row["name"])
    for block in report["blocks"]:
        for row in block["passes"]:
            row["certificate"] = None
    assert equality(report).tone == "bad"


def test_silent_passes_are_those_without_a_match_anywhere(report: dict[str, Any]) -> None:
    names = {row["name"] for block in report["blocks"] for row in block["passes"]}
    quiet = {name for name in names if not any(row["matches"] for _, row in rows(report, name))}
    first, _, rest = silent(report).answer.partition(" never fired. ")
    assert quiet and set(first.split(", ")) == quiet
    left = sum(len(row["refusals"]) for block in report["blocks"] for row in block["passes"])
    assert rest.startswith(f"{left} candidate")
