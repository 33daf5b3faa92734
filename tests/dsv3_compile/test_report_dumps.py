"""Dumps, logs and traces of the passes, as the environment asks for them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

from dsv3_compile.report.dumps import dot, dump
from tests.dsv3_compile import tiny

KEY = ("dense", "decode")


@pytest.fixture
def dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSV3_DUMP", str(tmp_path))
    program = tiny.program()
    dump(*KEY, program.records[KEY], program.graphs[KEY])
    return tmp_path / "dense_decode"


def test_every_state_is_written_in_order(dumped):
    names = [record.name for record in tiny.program().records[KEY]]
    expected = [f"{number:02d}_{name}" for number, name in enumerate(["captured", *names])]
    for suffix in (".py", ".json", ".dot"):
        assert sorted(path.stem for path in dumped.glob(f"*{suffix}")) == expected


def test_what_is_written_is_python_and_json(dumped):
    for path in dumped.glob("*.py"):
        compile(path.read_text(), str(path), "exec")
    for path in dumped.glob("*.json"):
        assert {"name", "op", "inputs", "flops"} <= json.loads(path.read_text())[0].keys()


def test_a_drawing_has_every_node_and_edge():
    nodes = tiny.program().graphs[KEY]["snapshots"][-1]["nodes"]
    text = dot(nodes)
    assert text.count(" -> ") == sum(len(node["inputs"]) for node in nodes)
    assert all(f'"{node["name"]}" [label=' in text for node in nodes)
    graph = nx.DiGraph((source, node["name"]) for node in nodes for source in node["inputs"])
    assert nx.is_directed_acyclic_graph(graph)


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv("DSV3_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    dump(*KEY, tiny.program().records[KEY], tiny.program().graphs[KEY])
    assert list(tmp_path.iterdir()) == []


def test_the_log_tells_matches_and_certificates(caplog):
    with caplog.at_level(logging.DEBUG, "passes"):
        dump(*KEY, tiny.program().records[KEY], tiny.program().graphs[KEY])
    assert "dense decode: order-contractions matched " in caplog.text
    assert ", certified to " in caplog.text


TRACED = """
import logging
from dsv3_compile.report.dumps import dump
from passes.cost import Cost
from passes.pipeline import PassRecord
cost = Cost(0, 0, 0, 0, 0)
record = PassRecord("fuse-norm", "FuseNorm()", ("a",), (), 0.1, 2, 1, cost, cost, None, {}, "", "")
states = [{"text": f"def run(): return {n}", "nodes": []} for n in range(2)]
dump("moe", "decode", [record], {"snapshots": states, "states": [0, 1]})
"""


def test_torch_shows_the_passes_in_its_log_and_its_trace(tmp_path):
    environment = {**os.environ, "TORCH_LOGS": "+passes", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TRACED], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "moe decode: fuse-norm matched a" in done.stderr
    (trace,) = tmp_path.glob("*.log")
    text = trace.read_text()
    assert '"name": "dsv3_moe_decode_01_fuse-norm"' in text
    assert "def run(): return 1" in text
