"""A block's graph as it was before and after every pass: its text, and its nodes with what each costs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from dsv3_compile.inspection import print_graph
from dsv3_compile.source import axes_of, axis_letters
from passes.base import Workload, source_line, state
from passes.cost import NodeCost, concrete_sizes, is_view, node_costs


class History:
    """Prints a graph whenever the pipeline asks, and keeps every state of it that differs from the one before.

    `states[n]` is the snapshot that pass number n started from; the last entry is what the last pass left.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.snapshots: list[dict[str, Any]] = []
        self.states: list[int] = []
        self.printed: list[Any] | None = None

    def __call__(self, module: fx.GraphModule) -> str:
        now = state(module.graph)
        if now != self.printed:
            self.printed, text = now, print_graph(module)
            if not self.snapshots or self.snapshots[-1]["text"] != text:
                self.snapshots.append({"text": text, "nodes": nodes_of(module, self.workload)})
        self.states.append(len(self.snapshots) - 1)
        return self.snapshots[-1]["text"]

    def document(self) -> dict[str, Any]:
        return {"snapshots": self.snapshots, "states": self.states}


def nodes_of(module: fx.GraphModule, workload: Workload) -> list[dict[str, Any]]:
    """Every node but the output: name, op, inputs, value, role, model line, FLOPs, bytes and launches."""
    graph = module.graph
    letters = axis_letters(module)
    costs = node_costs(graph, concrete_sizes(graph, workload))
    outputs = set(graph.output_node().all_input_nodes)
    return [
        {
            "name": node.name,
            "op": op_name(node),
            "inputs": [source.name for source in node.all_input_nodes],
            "value": _value(node.meta.get("val"), letters),
            "role": node.meta["role"].value if "role" in node.meta else "",
            "source": source_line(node),
            "view": node.op == "call_function" and is_view(node),
            "output": node in outputs,
            **_priced(costs.get(node, NodeCost())),
        }
        for node in graph.nodes
        if node.op != "output"
    ]


def _priced(cost: NodeCost) -> dict[str, int]:
    return {"flops": int(cost.flops), "bytes": int(cost.bytes), "launches": cost.launches}


def _value(value: Any, letters: dict[str, str]) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, axes_of(value, letters)))}]"
    return ""


def op_name(node: fx.Node) -> str:
    """`linear`, `dsv3.rms_norm`: without the namespace aten and without the overload."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return getattr(node.target, "__name__", str(node.target))
    return str(packet).removeprefix("aten.")
