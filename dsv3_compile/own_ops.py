"""What the graphs of an artifact may call: torch's own ops and the vocabulary."""

from __future__ import annotations

import torch

from dsv3_compile.program import BlockGraph
from dsv3_compile.tracing import CaptureError
from passes.base import source_line

OWN = ("aten", "prim", "prims", "dsv3")  # namespaces that are there wherever an artifact is loaded


def check_ops(block: BlockGraph) -> None:
    """Raises CaptureError for an op that another library brings: without that library the artifact would not run."""
    for node in block.module.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace not in OWN:
            where = source_line(node)
            raise CaptureError(
                f"{block.name} {block.phase} still calls {target.namespace}::{target._opname} "
                f"{f'({where}) ' if where else ''}after the passes, an op of {target.namespace}, without which an "
                "artifact has to run; run all passes, or write the module in torch's own ops"
            )
