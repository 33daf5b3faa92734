"""The report of a compile, as a document and as text."""

from __future__ import annotations

import json

import pytest

from dsv3_compile import inspection
from dsv3_compile.artifact import ArtifactError
from dsv3_compile.inspection import changes, document, print_graph, refusals, short, table
from tests.dsv3_compile import tiny


@pytest.fixture(scope="module")
def report():
    return document(tiny.program(), tiny.OPTIONS)


def test_it_is_json(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_report_of_another_form_is_refused_in_one_line(artifact_folder, monkeypatch):
    monkeypatch.setattr(inspection, "SCHEMA", inspection.SCHEMA + 1)
    with pytest.raises(ArtifactError, match="the report has schema 2; this version reads 3: compile again"):
        inspection.inspect(artifact_folder)


def test_it_covers_every_block_and_phase(report):
    found = [(block["name"], block["phase"], block["layers"]) for block in report["blocks"]]
    layers = {"embed": [], "dense": [0], "moe": [1, 2, 3], "head": []}
    assert found == [(name, phase, layers[name]) for name in layers for phase in ("prefill", "decode")]


def test_a_pass_tells_what_it_did(report):
    (moe,) = [b for b in report["blocks"] if (b["name"], b["phase"]) == ("moe", "decode")]
    (row,) = [row for row in moe["passes"] if row["name"] == "order-contractions"]
    assert set(row) == {
        "number",
        "name",
        "spec",
        "matches",
        "refusals",
        "seconds",
        "nodes_before",
        "nodes_after",
        "cost_before",
        "cost_after",
        "certificate",
        "diff",
    }
    assert row["cost_after"]["at"]["flops"] < row["cost_before"]["at"]["flops"]
    assert "T" in row["cost_before"]["flops"]
    assert set(row["certificate"]) >= {"max_rel_error", "dtype", "sizes"}
    assert row["certificate"]["sizes"] == {"B": 13, "T": 5}


def test_every_block_is_certified_as_a_whole(report):
    for block in report["blocks"]:
        assert block["certificate"]["max_rel_error"] <= 1e-14 and block["certificate"]["dtype"] == "float64"
    assert "  all passes together: " in table(report)


def test_refusals_carry_node_source_and_reason(report):
    (prefill,) = [b for b in report["blocks"] if (b["name"], b["phase"]) == ("dense", "prefill")]
    (row,) = [row for row in prefill["passes"] if row["name"] == "order-contractions"]
    assert row["refusals"] and set(row["refusals"][0]) == {"node", "source", "reason"}
    assert any(line.startswith("dense prefill: order-contractions refused ") for line in refusals(report))


def test_the_table_has_a_row_for_every_pass_that_did_something(report):
    text = table(report)
    assert "moe × 3, decode  (B=3 S=1 T=32)" in text
    for block in report["blocks"]:
        for row in block["passes"]:
            if row["matches"]:
                assert f"  {row['name']} " in text
    assert all(len(line) <= 120 and line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23 k"), (999_600, "1 M"), (5.2e12, "5.2 T"), (2e18, "2e+03 P")],
)
def test_numbers_keep_three_digits(number, text):
    assert short(number) == text


def test_a_printed_graph_is_the_same_every_time():
    module = tiny.blocks()["dense", "decode"].module
    text = print_graph(module)
    assert text == print_graph(module)
    assert text.startswith("def run(\n    input_layernorm_weight,")
    assert "# cache float32 [B, T, 22]" in text


def test_the_difference_of_two_graphs_leaves_out_what_stayed():
    before = "def run(\n    x,\n):\n    a = f(x)\n    b = g(a)\n    del a\n    c = h(b)\n    return (c,)\n"
    after = "def run(\n    x,\n):\n    a = f(x)\n    k = gh(a)\n    del a\n    return (k,)\n"
    assert list(changes(before, after)) == [
        "    ...",
        "     a = f(x)",
        "-    b = g(a)",
        "-    c = h(b)",
        "-    return (c,)",
        "+    k = gh(a)",
        "+    return (k,)",
    ]
    assert list(changes(before, before)) == []


def test_a_pass_shows_what_it_changed(report):
    (moe,) = [b for b in report["blocks"] if (b["name"], b["phase"]) == ("moe", "decode")]
    rows = {row["name"]: row for row in moe["passes"]}
    assert any(line.startswith("+") and "dsv3.routed_swiglu" in line for line in rows["fuse-experts"]["diff"])
    assert all(bool(row["diff"]) >= bool(row["matches"]) for row in rows.values())


def test_refusals_of_many_layers_are_one_line() -> None:
    reasons = [f"linear_{n} and linear_{n + 1} are not parts of one product" for n in (4, 11, 19)]
    found = [{"node": f"mul_{n}", "source": "mlp.py:78", "reason": reason} for n, reason in enumerate(reasons)]
    found += [{"node": "mul_9", "source": "mlp.py:78", "reason": "another"}, {**found[0], "source": "mlp.py:80"}]
    report = {"blocks": [{"name": "moe", "phase": "decode", "passes": [{"name": "fuse", "refusals": found}]}]}
    assert list(refusals(report)) == [
        f"moe decode: fuse refused mul_0 (mlp.py:78) and 2 like it: {reasons[0]}",
        "moe decode: fuse refused mul_9 (mlp.py:78): another",
        f"moe decode: fuse refused mul_0 (mlp.py:80): {reasons[0]}",
    ]
