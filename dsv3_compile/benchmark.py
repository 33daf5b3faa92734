"""`dsv3c bench`: how long prefill and decode take, and how long this machine needs at the very least.

The floor of a step is the larger of two times: its bytes at the measured memory bandwidth, its operations at the
measured speed of matrix products. Bytes and operations are those of the compiled graphs (the report's costs).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor

from dsv3_compile.artifact import ArtifactError
from dsv3_compile.inspection import REPORT
from dsv3_compile.runtime import Model

PROMPTS = (16, 128, 512)
CONTEXTS = (16, 128, 512)
COPY_BYTES = 256 << 20  # several times the last-level cache
PRODUCT = {"cpu": 1024, "cuda": 8192}  # side of the matrices, large enough to keep the machine busy
REPEATS = 5


def measure(model: Model) -> dict[str, Any]:
    """Prefill of one prompt and decode of one row and of max_batch rows, at several lengths.

    Raises ArtifactError when the artifact has no report to take the floor from.
    """
    machine = {
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "bytes_per_second": bandwidth(model.device),
        "flops_per_second": product_speed(model.device, getattr(torch, model.artifact.manifest.dtype)),
    }
    costs, vocabulary = _costs(model), model.config["vocab_size"]
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        """Random tokens, so that rows choose experts of their own, as the floor has it."""
        return torch.randint(vocabulary, shape, generator=generator)

    runs = []
    for length in PROMPTS:
        if length <= model.max_length:
            seconds = _median(partial(model.prefill, drawn(1, length)))
            runs.append(_row("prefill", 1, length, length, seconds, costs, machine))
    for batch in sorted({1, model.max_batch}):
        for length in CONTEXTS:
            if length + REPEATS + 1 <= model.max_length:
                _, cache = model.prefill(drawn(batch, length))
                seconds = _median(partial(model.decode, drawn(batch, 1), cache))
                runs.append(_row("decode", batch, 1, length, seconds, costs, machine))
    return {"machine": machine, "runs": runs}


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median(lambda: target.copy_(source))


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    side = PRODUCT[device.type]
    matrix = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _median(lambda: matrix @ matrix)


def _costs(model: Model) -> dict[str, tuple[sympy.Expr, sympy.Expr]]:
    """(FLOPs, bytes) of one step through the whole schedule, in B, S and T, per phase."""
    path = model.artifact.path(REPORT)
    if not path.is_file():
        raise ArtifactError(f"{path}: the artifact was written without a report")
    totals: dict[str, tuple[sympy.Expr, sympy.Expr]] = {}
    for block in json.loads(path.read_text())["blocks"]:
        if not block["passes"]:
            continue
        cost, times = block["passes"][-1]["cost_after"], max(1, len(block["layers"]))
        flops, size = totals.get(block["phase"], (sympy.Integer(0), sympy.Integer(0)))
        letters = {letter: sympy.Symbol(letter) for letter in "BST"}
        more = [sympy.sympify(cost[key], locals=letters) for key in ("flops", "bytes")]
        totals[block["phase"]] = flops + times * more[0], size + times * more[1]
    return totals


def _row(
    phase: str, batch: int, queries: int, context: int, seconds: float, costs: Any, machine: dict[str, Any]
) -> dict[str, Any]:
    sizes = {"B": batch, "S": queries, "T": context}
    flops, size = (float(expression.subs(sizes)) for expression in costs[phase])
    floor = max(flops / machine["flops_per_second"], size / machine["bytes_per_second"])
    return {
        "phase": phase,
        "batch": batch,
        "queries": queries,
        "context": context,
        "seconds": seconds,
        "tokens_per_second": batch * queries / seconds,
        "flops": flops,
        "bytes": size,
        "floor_seconds": floor,
    }


def _median(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first call pays for what later ones find ready
