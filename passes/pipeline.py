"""The order of the passes, and what happens around each: sweep, statistics, certificate."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from passes.adopt_grouped_products import AdoptGroupedProducts
from passes.base import Context, Outcome, Pass, Refusal, placeholders, state, sweep
from passes.canonicalise import Canonicalise
from passes.certify import RegionalSpecimen
from passes.close_attention import CloseAttention
from passes.concatenate_slices import ConcatenateSlices
from passes.cost import Cost, concrete_sizes, cost
from passes.fold_norm_weights import FoldNormWeights
from passes.fuse_attention import FuseAttention
from passes.fuse_attention_inputs import FuseAttentionInputs
from passes.fuse_cache_write import FuseCacheWrite
from passes.fuse_experts import FuseExperts
from passes.fuse_head_products import FuseHeadProducts
from passes.fuse_norm import FuseNorm
from passes.fuse_residual import FuseResidual
from passes.fuse_rotary import FuseRotary
from passes.fuse_router import FuseRouter
from passes.fuse_routing import FuseRouting
from passes.fuse_swiglu import FuseSwiglu
from passes.group_experts import GroupExperts
from passes.hoist_weights import HoistWeights
from passes.lower import Lower
from passes.merge_projections import MergeProjections
from passes.merge_shared_experts import MergeSharedExperts
from passes.open_attention import OpenAttention
from passes.order_contractions import OrderContractions
from passes.real_arithmetic import RealArithmetic
from passes.scatter_one_hots import ScatterOneHots
from passes.settings import PassError, set_option, split_setting
from passes.slice_early import SliceEarly
from passes.sparsify_experts import SparsifyExperts
from passes.split_heads import SplitHeads
from passes.stream_attention_inputs import StreamAttentionInputs
from passes.stream_norms import StreamNorms
from passes.stream_products import StreamProducts
from passes.verify import Certificate, CertificateError, Specimen

DEFAULT_PIPELINE: tuple[Pass, ...] = (
    Canonicalise(),
    OrderContractions(),
    SparsifyExperts(),
    FuseRouting(),
    FuseAttention(),
    MergeProjections(),
    FuseSwiglu(),
    FuseRotary(),
    FuseCacheWrite(),
    FuseNorm(),
    FuseExperts(),
    MergeSharedExperts(),
    FuseResidual(),
    FuseRouter(),
    FoldNormWeights(),
    HoistWeights(),
    SplitHeads(),
    Lower(),
    FuseAttentionInputs(),
    FuseHeadProducts(),
)

FOREIGN_PIPELINE: tuple[Pass, ...] = (
    Canonicalise(),
    ConcatenateSlices(),
    OpenAttention(),
    OrderContractions(),
    ScatterOneHots(),
    SparsifyExperts(),
    GroupExperts(),
    FuseRouting(),
    FuseAttention(expanded=False),
    CloseAttention(),
    FuseSwiglu(),
    FuseExperts(joined=False),
    SliceEarly(),
)
"""For graphs whose weights belong to somebody else: nothing that would store a new weight, or own a cache.

Norms and rotations stay as they are: Inductor fuses them itself.
"""

FOREIGN_GPU_PIPELINE: tuple[Pass, ...] = (
    *FOREIGN_PIPELINE,
    RealArithmetic(),
    FuseRotary(),
    SplitHeads(),
    StreamAttentionInputs(),
    FuseResidual(many=False),
    FuseHeadProducts(),
    StreamProducts(),
    StreamNorms(),
    FuseRouter(),
    FuseSwiglu(),
    Canonicalise(),
)
"""On a GPU, where a step of decode is as long as its launches: Inductor fuses nothing that is complex, and leaves the
products of a single row to a library. SwiGLU comes again: gate and up are parts of one product once they share a
launch. At the end, what every layer computes alike is computed once: it would be a launch between kernels."""

IMPORTED_PIPELINE: tuple[Pass, ...] = (
    Canonicalise(),
    ConcatenateSlices(),
    OpenAttention(),
    OrderContractions(),
    ScatterOneHots(),
    SparsifyExperts(),
    GroupExperts(),
    AdoptGroupedProducts(),
    FuseRouting(),
    FuseAttention(),
    *DEFAULT_PIPELINE[DEFAULT_PIPELINE.index(MergeProjections()) :],
)
"""For layers that somebody else wrote, on weights and caches that are ours."""


class RequirementError(Exception):
    """A required pass did not fire."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one block in one phase."""

    name: str
    spec: str
    matches: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    seconds: float  # of the rewrite; neither cost nor certificate
    nodes_before: int
    nodes_after: int
    cost_before: Cost
    cost_after: Cost
    certificate: Certificate | None  # None when certificates are off
    decision: Mapping[str, Any]  # options that would repeat the choices made here
    text_before: str  # the graph as text; empty without a printer
    text_after: str


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run."""

    passes: tuple[Pass, ...] = DEFAULT_PIPELINE

    def run(
        self,
        module: fx.GraphModule,
        context: Context,
        label: str = "block",
        specimen: Specimen | RegionalSpecimen | None = None,
        step: Callable[[str, int], None] = lambda name, number: None,
        printer: Callable[[fx.GraphModule], str] = lambda module: "",
    ) -> list[PassRecord]:
        """Rewrite `module` in place, pass by pass.

        `specimen` is what the certificates run on: `module` itself, or the same block at small sizes, which
        then goes through the same passes with the decisions taken for `module`. None: no certificates.
        `step` is told each pass's name and number before it runs; `printer` writes the graphs of the records.
        Raises CertificateError naming pass and `label`; also, without certificates, where a pass took a free size for
        its example value, so that the graph would hold for that value alone.
        """
        records: list[PassRecord] = []
        sizes = _free_sizes(module)
        before = Snapshot.of(module, context, printer)
        for number, one in enumerate(self.passes):
            step(one.name(), number)
            outcome, seconds, certificate = _run_one(one, module, context, f"{one.name()} on {label}", specimen)
            for size, expression in sizes:
                if size.node.expr != expression:
                    raise CertificateError(f"{one.name()} on {label}: the size {expression} became {size.node.expr}")
            after = Snapshot.of(module, context, printer, before)
            records.append(_record(one, outcome, seconds, certificate, before, after))
            before = after
        return records

    def find(self, name: str) -> Pass:
        """The pass of that name; PassError names the accepted ones."""
        for one in self.passes:
            if one.name() == name:
                return one
        names = dict.fromkeys(one.name() for one in self.passes)  # one may stand there more than once
        raise PassError(f"unknown pass {name!r}; accepted: {', '.join(names)}")

    def configured(
        self,
        settings: Iterable[str] = (),
        disable: Iterable[str] = (),
        until: str | None = None,
        repeat: Iterable[str] = (),
    ) -> Pipeline:
        """The pipeline with options set by 'pass.field=value'; with passes left out, ended after one, or run twice.

        A pass that stands in it more than once is set, left out or repeated wherever it stands, and ended after last.
        Raises PassError for an unknown pass, an unknown field or a value that the field does not take.
        """
        passes = self.passes
        for setting in settings:
            name, option, text = split_setting(setting)
            self.find(name)
            passes = tuple(set_option(one, option, text) if one.name() == name else one for one in passes)
        left_out = {self.find(name).name() for name in disable}
        end = passes[-1].name() if until is None else self.find(until).name()
        last = max(number for number, one in enumerate(passes, 1) if one.name() == end)
        twice = {self.find(name).name() for name in repeat}
        kept = [one for one in passes[:last] if one.name() not in left_out]
        return Pipeline(tuple(copy for one in kept for copy in [one] * (2 if one.name() in twice else 1)))


@dataclass(frozen=True)
class Snapshot:
    """A graph between two passes."""

    state: list[Any]
    cost: Cost
    text: str

    @classmethod
    def of(
        cls,
        module: fx.GraphModule,
        context: Context,
        printer: Callable[[fx.GraphModule], str],
        before: Snapshot | None = None,
    ) -> Snapshot:
        """The graph as it is now. What it costs is taken from the snapshot before where nothing changed."""
        now = state(module.graph)
        if before is not None and before.state == now:
            return cls(now, before.cost, printer(module))
        # A foreign graph can be a whole model: numbers are enough there, and expressions would take minutes.
        size = concrete_sizes(module.graph, context.workload) if context.phase == "any" else None
        return cls(now, cost(module.graph, size), printer(module))


def _free_sizes(module: fx.GraphModule) -> list[tuple[torch.SymInt, Any]]:
    """The sizes among a graph's inputs that are no numbers, and the expressions they stand for now."""
    values = [node.meta.get("val") for node in placeholders(module.graph)]
    sizes = [size for value in values for size in getattr(value, "shape", (value,))]
    return [(size, size.node.expr) for size in sizes if isinstance(size, torch.SymInt)]


def _run_one(
    one: Pass, module: fx.GraphModule, context: Context, label: str, specimen: Specimen | RegionalSpecimen | None
) -> tuple[Outcome, float, Certificate | None]:
    before = specimen.snapshot() if specimen is not None and specimen.module is module else None
    started = time.perf_counter()
    outcome = apply(one, module, context)
    seconds = time.perf_counter() - started
    if specimen is None:
        return outcome, seconds, None
    before = before or _follow(one, outcome, context, label, specimen)
    return outcome, seconds, specimen.certify(before, label)


def apply(one: Pass, module: fx.GraphModule, context: Context) -> Outcome:
    """Run one pass, in place, without record or certificate."""
    before = state(module.graph)
    # Without the Python dispatcher some fake kernels would take a symbolic size for its example value.
    with enable_python_dispatcher():
        outcome = one.run(module, context)
    if state(module.graph) != before:
        sweep(module)
    return outcome


def _record(
    one: Pass,
    outcome: Outcome,
    seconds: float,
    certificate: Certificate | None,
    before: Snapshot,
    after: Snapshot,
) -> PassRecord:
    return PassRecord(
        name=one.name(),
        spec=repr(one),
        matches=tuple(outcome.matches),
        refusals=tuple(outcome.refusals),
        seconds=seconds,
        nodes_before=len(before.state),
        nodes_after=len(after.state),
        cost_before=before.cost,
        cost_after=after.cost,
        certificate=certificate,
        decision=outcome.decision,
        text_before=before.text,
        text_after=after.text,
    )


def _follow(
    one: Pass, outcome: Outcome, context: Context, label: str, specimen: Specimen | RegionalSpecimen
) -> fx.GraphModule:
    """Send the small block through the pass as the real one went; returns what it was before."""
    before = specimen.snapshot()
    # Sizes decide what is cheapest, and the small block has others.
    small = apply(one.decided(outcome), specimen.module, context)
    if len(small.matches) != len(outcome.matches):
        found = "; ".join(f"{r.node}: {r.reason}" for r in small.refusals) or "no refusals"
        raise CertificateError(
            f"{label}: {len(outcome.matches)} matches, but {len(small.matches)} on the small block ({found})"
        )
    return before


def check_required(records: Sequence[PassRecord], required: Iterable[str]) -> None:
    """Raises RequirementError for a required pass without a match in any block, naming its nearest miss: the candidate
    of which it had recognised most before it refused."""
    for name in required:
        mine = [record for record in records if record.name == name]
        if any(record.matches for record in mine):
            continue
        misses = [refusal for record in mine for refusal in record.refusals]
        raise RequirementError(f"required pass {name} did not fire: {_nearest(misses)}")


def check_forms(passes: Iterable[Pass], records: Sequence[PassRecord]) -> None:
    """Raises PassError for a list of forms that is as long as the chains of no block."""
    for one, phase in itertools.product(passes, ("prefill", "decode")):
        if isinstance(one, OrderContractions):
            asked = len(one.forms(phase))
            found = {_chains(record.decision[phase]) for record in records if phase in record.decision}
            if asked > 1 and asked not in found:
                numbers = " or ".join(map(str, sorted(found)))
                raise PassError(f"{one.name()}.{phase} names {asked} forms; the blocks have {numbers} chains")


def _chains(decision: str) -> int:
    return 0 if decision == "auto" else len(decision.split("+"))


def _nearest(misses: Sequence[Refusal]) -> str:
    if not misses:
        return "nothing in the model looks like it"
    miss = max(misses, key=lambda refusal: refusal.reached)
    return f"nearest miss {miss.node}{f' ({miss.source})' if miss.source else ''}: {miss.reason}"
