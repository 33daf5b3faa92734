"""The phase plan: what each form of attention costs over queries and context, and where one overtakes another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import fx

from codegen.targets import Target
from dsv3_compile.capture import block_names
from dsv3_compile.program import BlockGraph
from model_def.config import ModelConfig
from passes.base import Context, Workload
from passes.canonicalise import Canonicalise
from passes.crossover import FormCost, changes, even_queries, even_queries_far, fastest, overtakes, price_forms
from passes.pipeline import apply
from passes.verify import clone

QUERIES = tuple(sorted({round(2 ** (k / 2)) for k in range(27)}))  # 1 to 8192
CONTEXTS = (1024, 8192, 65536)
LARGEST_BATCH = 1024  # rows of a decode step


def phase_plans(
    config: ModelConfig, blocks: Mapping[tuple[str, str], BlockGraph], context: Context, max_batch: int, longest: int
) -> list[dict[str, Any]]:
    """One plan per distinct attention of a captured model, with the names of the `blocks` that share it.

    `context` is that of prefill; costs in seconds are for one row and for `max_batch`, up to `longest` positions.
    """
    sharing: dict[Any, list[str]] = {}
    for name, spec in zip(block_names(config), config.layers(), strict=True):
        found = sharing.setdefault(spec.attention, [])
        found += [] if name in found else [name]
    plans = []
    for names in sharing.values():
        plan = phase_plan(blocks[names[0], "prefill"].module, context, sorted({1, max_batch}), longest)
        if plan is not None:
            plans.append({"blocks": names, **plan})
    return plans


def phase_plan(module: fx.GraphModule, context: Context, batches: Sequence[int], longest: int) -> dict[str, Any] | None:
    """The forms of a captured prefill graph, priced; None when its attention has no form to choose.

    forms: by name, FLOPs and bytes as expressions in B, S and T, and the block's weight bytes. crossovers: per
    pair of forms the FLOPs break even at `queries` (expression in T) and `far` (for a long context). In seconds on
    the target: `times` per batch and context; `decode`, per pair of forms the faster for one query per row. curves:
    FLOPs and seconds over QUERIES, one row per batch.
    """
    canonical = clone(module)
    apply(Canonicalise(), canonical, context)
    prices = price_forms(canonical, context)
    if not {"absorbed", "expanded"} <= {price.form for price in prices}:
        return None
    contexts = [length for length in CONTEXTS if length <= longest] or [longest]
    by_name = {price.form: price for price in prices}
    absorbed, expanded = by_name["absorbed"], by_name["expanded"]
    return {
        "forms": [
            {"form": p.form, "flops": str(p.flops), "bytes": str(p.bytes), "weight_bytes": p.weight_bytes}
            for p in prices
        ],
        "crossovers": [_crossover(low, high) for low, high in combinations(prices, 2)],
        "decode": [_decode(low, high, context, longest) for low, high in combinations(prices, 2)],
        "times": [
            {
                "batch": batch,
                "context": length,
                "queries": overtakes(absorbed, expanded, context.target, batch, length),
            }
            for batch in batches
            for length in contexts
        ],
        "queries": list(QUERIES),
        "curves": [_curve(p, Workload(1, 0, length), context.target) for length in contexts for p in prices],
    }


def _crossover(low: FormCost, high: FormCost) -> dict[str, Any]:
    even, far = even_queries(low, high), even_queries_far(low, high)
    finite = far is not None and math.isfinite(far) and far > 0
    return {
        "forms": [low.form, high.form],
        "queries": str(even) if finite else None,
        "far": far if finite else None,
    }


def _decode(low: FormCost, high: FormCost, context: Context, longest: int) -> dict[str, Any]:
    """Which form is the faster at one row over the longest context, and from which `context` on; up to LARGEST_BATCH
    rows of the workload's context, where that changes. None where it never does."""
    target, length = context.target, context.workload.context
    return {
        "forms": [low.form, high.form],
        "faster": fastest([low, high], target, Workload(1, 1, longest)).form,
        "longest": longest,
        "context": changes(low, high, target, lambda positions: Workload(1, 1, positions), longest),
        "batch": changes(low, high, target, lambda rows: Workload(rows, 1, length), LARGEST_BATCH),
    }


def _curve(price: FormCost, at: Workload, target: Target) -> dict[str, Any]:
    sizes = [Workload(at.batch, queries, at.context) for queries in QUERIES if queries <= at.context]
    return {
        "form": price.form,
        "batch": at.batch,
        "context": at.context,
        "flops": [price.flops_at(size) for size in sizes],
        "seconds": [price.seconds(target, size) for size in sizes],
    }
