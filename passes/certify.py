"""Certificates for graphs of any size: every changed region is run before and after, each kind of region once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from passes.base import is_call, placeholders
from passes.bisection import relative_error
from passes.changes import Changes, Pair, Region, Same, number
from passes.cost import node_costs, stored_dims, traced_sizes
from passes.inputs import draw_one, kind_of, number_of
from passes.nodes import viewed
from passes.verify import EXACT, Certificate, CertificateError, NodeError, run_float64

aten = torch.ops.aten

MOST_NUMBERS = 1 << 26  # in one region; half a gigabyte in float64
MOST_FLOPS = 1e11
FEW_NUMBERS = 1 << 20  # whose products take less than MOST_FLOPS in any case
DEPTHS = (0, 6, 24, None)  # how much of a region's surroundings is run with it, until the two sides agree
NEAR = DEPTHS[:2]  # of claims, and from them on
COPYING = (aten.reshape, aten.flatten, aten.contiguous, aten.to)  # if strides or dtype want it
SMALL = (3, 5, 11, 13, 7, 17, 19)  # free sizes of regions that would be too large as they were traced

Sizes = Mapping[sympy.Symbol, int]


class TooLarge(Exception):
    """A region that is not run. One line: why."""


class Differs(Exception):
    """A region whose sides do not agree. One line: by how much, or why one cannot be run."""


@dataclass
class RegionalSpecimen:
    """A graph on its way through the passes, certified by what changes.

    Floating-point values around a region are drawn at random. Integers are those that were handed in when the graph
    was traced, since positions and indices have a meaning: `given` holds them by placeholder name. A region that is
    too large to run is not certified, and the certificate says so.
    """

    module: fx.GraphModule
    given: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    known: dict[str, float | str] = field(default_factory=dict)  # by the text of a region: error, or why it stopped
    digests: dict[str, str] = field(default_factory=dict)  # of what was given

    def snapshot(self) -> fx.Graph:
        """The graph as it is now, to be compared with what a pass makes of it."""
        number(self.module.graph)
        before = fx.Graph()
        before.output(before.graph_copy(self.module.graph, {}))
        return before

    def certify(self, before: fx.Graph, label: str) -> Certificate:
        """Compare `module`, just rewritten, with its snapshot. CertificateError names pass, value and error."""
        changes, traced = Changes(before, self.module.graph), traced_sizes(before)
        errors, skipped, claimed = [0.0], [], changes.same
        if changes.roots:
            claimed = changes.follow(lambda claim, same: self._holds(changes, claim, same, traced))
        for root in changes.roots:
            try:
                errors.append(self._certify(changes, root, claimed, traced, label))
            except TooLarge as reason:
                skipped.append(f"{root[0].name}: {reason}")
        sizes = {str(symbol): value for symbol, value in traced.items()}
        return Certificate(max(errors), sizes=sizes, skipped=tuple(skipped))

    def _holds(self, changes: Changes, claim: Pair, same: Same, traced: Sizes) -> bool:
        try:
            self._error(changes, claim, same, NEAR, traced)
        except (TooLarge, Differs):
            return False
        return True

    def _certify(self, changes: Changes, root: Pair, claimed: Same, traced: Sizes, label: str) -> float:
        """The error of a root. CertificateError names it; TooLarge."""
        try:
            return self._error(changes, root, claimed, NEAR, traced)
        except (TooLarge, Differs):  # what is claimed may be related by more than lies near
            pass
        try:
            return self._error(changes, root, changes.same, DEPTHS, traced)
        except Differs as reason:
            raise CertificateError(f"{label}: {reason}") from reason

    def _error(self, changes: Changes, pair: Pair, same: Same, depths: Sequence[int | None], traced: Sizes) -> float:
        """How far apart the two nodes of a pair are, in the smallest region in which they agree. Raises Differs where
        they agree in none that can be run; TooLarge where none can be run."""
        differs = ""
        for depth in depths:
            region = changes.region(pair, depth, same)
            text = region.text(self._kind)
            if text not in self.known:
                try:
                    self.known[text] = compare(self.module, region, self._inputs(region, traced))
                except TooLarge:
                    if differs:  # in a smaller region, and nothing affordable shows that they agree after all
                        break
                    raise
                except NodeError as stopped:
                    self.known[text] = f"the graph no longer runs: {stopped}"
            error = self.known[text]
            if isinstance(error, float) and error <= EXACT:
                return error
            differs = error if isinstance(error, str) else f"{region.root} differs by {error:.3g} (bound {EXACT:g})"
            if region.whole:
                break
        raise Differs(differs)

    def _inputs(self, region: Region, traced: Sizes) -> dict[str, Any]:
        sizes = affordable_sizes(region, traced)
        generator = torch.Generator().manual_seed(self.seed)
        return {n.name: self._draw(n, sizes, generator) for n in placeholders(region.before)}

    def _kind(self, node: fx.Node) -> str:
        """Of an input: equal where the same is drawn, or was given. Layers have counters of their own, all alike."""
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return str(value)
        drawn = f"{node.meta['role']} {value.dtype} {tuple(value.shape)} {value.stride()}"
        given = self.given.get(node.name)
        if value.is_floating_point() or given is None:
            return drawn
        if node.name not in self.digests:
            self.digests[node.name] = hashlib.sha256(given.contiguous().numpy().tobytes()).hexdigest()
        return f"{drawn} {self.digests[node.name]}"

    def _draw(self, node: fx.Node, sizes: Sizes, generator: torch.Generator) -> Any:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return number_of(value, sizes)
        shape = tuple(number_of(size, sizes) for size in value.shape)
        if value.is_floating_point():
            strides = tuple(number_of(stride, sizes) for stride in value.stride())
            return laid_out(draw_one(kind_of(node), shape, 0, generator), strides)
        given = self.given.get(node.name)
        if given is None:
            upper = 2 if value.dtype is torch.bool else min((*shape, *sizes.values()), default=2)
            return torch.randint(0, upper, shape, generator=generator).to(value.dtype)
        return given[tuple(slice(size) for size in shape)]


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x with these strides, on which depends what can be viewed; as it is where they leave gaps or overlap."""
    together = 1
    for stride, size in sorted(zip(strides, x.shape, strict=True)):
        if size > 1:
            if stride != together:
                return x
            together *= size
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def compare(module: fx.GraphModule, region: Region, inputs: Mapping[str, Any]) -> float:
    """The largest relative difference between the two graphs of a region on the same inputs."""
    sides = region.before, region.after
    expected, found = (tree_leaves(run_float64(module, inputs, graph=side)[0]) for side in sides)
    if len(expected) != len(found):
        return float("inf")
    return max((relative_error(two, one) for one, two in zip(expected, found, strict=True)), default=0.0)


def affordable_sizes(region: Region, traced: Sizes) -> Sizes:
    """Values of the free sizes with which a region can be run: as traced, or small ones. Raises TooLarge."""
    small = {symbol: min(value, SMALL[k % len(SMALL)]) for k, (symbol, value) in enumerate(traced.items())}
    sides = region.before, region.after
    for sizes in (traced, small):
        numbers = max(_numbers(side, sizes) for side in sides)
        flops = max(_flops(side, sizes) for side in sides) if numbers > FEW_NUMBERS else 0.0
        if numbers <= MOST_NUMBERS and flops <= MOST_FLOPS:
            return sizes
    raise TooLarge(f"not certified, running it in float64 takes {8 * numbers / 1e9:.1f} GB and {flops / 1e9:.0f} GFLOP")


def _numbers(graph: fx.Graph, sizes: Sizes) -> int:
    """How many numbers the values of a graph hold together, each memory counted once."""
    values = [n.meta.get("val") for n in graph.nodes if not _shares_memory(n)]
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(prod(number_of(size, sizes) for size in stored_dims(leaf)) for leaf in leaves)


def _shares_memory(node: fx.Node) -> bool:
    """Is this certainly a view? A reshape may have to copy."""
    return viewed(node) is not None and not is_call(node, *COPYING)


def _flops(graph: fx.Graph, sizes: Sizes) -> float:
    return sum(float(c.flops) for c in node_costs(graph, lambda size: number_of(size, sizes)).values())
