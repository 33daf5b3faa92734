"""`dsv3c inspect` in a terminal and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_compile import report
from dsv3_compile.cli import main
from dsv3_compile.report.side_by_side import side_by_side

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema checks the schema of the report")
SCHEMA = json.loads((Path(report.__file__).parent / "schema.json").read_text())


def said(capsys, *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("more", [[], ["--kernels"], ["--pass", "fuse-norm", "--phase", "decode"]])
def test_json_follows_the_schema(artifact_folder, capsys, more):
    jsonschema.validate(json.loads(said(capsys, artifact_folder, "--json", *more)), SCHEMA)


def test_the_schema_refuses_what_it_does_not_know(artifact_folder, capsys):
    document = json.loads(said(capsys, artifact_folder, "--json"))
    document["blocks"][0]["passes"][0]["novelty"] = 1
    with pytest.raises(jsonschema.ValidationError, match="novelty"):
        jsonschema.validate(document, SCHEMA)


def test_the_overview_ends_with_the_phase_plan(artifact_folder, capsys):
    text = said(capsys, artifact_folder)
    assert "dense, moe: Absorbing takes fewer operations below " in text
    assert "In decode on cpu, absorbed is faster than expanded at " in text
    assert "order-contractions refused " in text


def test_one_pass_of_one_block_is_told_in_full(artifact_folder, capsys):
    text = said(
        capsys, artifact_folder, "--pass", "order-contractions", "--block", "moe", "--phase", "decode", "--diff"
    )
    assert text.startswith("OrderContractions(")
    assert "B*T" in text and "certified to " in text
    removed = [line for line in text.splitlines() if line.startswith("  - ")]
    added = [line for line in text.splitlines() if "  + " in line or " + " in line]
    assert removed and added
    assert "moe, prefill" not in text


def test_a_pass_that_found_nothing_says_so(artifact_folder, capsys):
    text = said(capsys, artifact_folder, "--pass", "fuse-routing", "--block", "dense", "--phase", "decode")
    assert text == "fuse-routing on dense, decode: nothing looks like it\n"


def test_kernels_of_a_cpu_artifact_are_none(artifact_folder, capsys):
    assert said(capsys, artifact_folder, "--kernels").startswith("no kernels: on cpu ")


@pytest.mark.parametrize(
    ("flag", "value"), [("--pass", "fuse-everything"), ("--block", "sparse"), ("--phase", "training")]
)
def test_what_is_not_there_is_an_error_that_names_what_is(artifact_folder, capsys, flag, value):
    assert main(["inspect", str(artifact_folder), flag, value]) == 2
    error = capsys.readouterr().err
    assert f"{flag} {value}: not in this artifact; accepted: " in error


def test_side_by_side_shows_changes_with_their_neighbours():
    before = "a = 1\nb = 2\nc = 3\nd = 4\ne = 5\nf = 6\n    del a"
    after = "a = 1\nb = 2\nc = 30\nd = 4\ne = 5\nf = 6"
    lines = list(side_by_side(before, after, 45))
    assert [line.split() for line in lines if line.startswith("-")] == [["-", "c", "=", "3", "+", "c", "=", "30"]]
    assert len(lines) == 5
    assert all(len(line) <= 45 for line in lines)


def test_side_by_side_of_equal_graphs_is_empty():
    assert list(side_by_side("a = 1", "a = 1", 60)) == []


def test_side_by_side_cuts_arguments_before_shapes():
    (line,) = side_by_side("", "x = aten.einsum.default(a, b, c, d, e, f)  # float32 [B, T]", 80)
    assert line.endswith("…  # float32 [B, T]") and len(line) <= 80
