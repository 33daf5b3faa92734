"""Values that numbers keep within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.base import is_call
from passes.nodes import settled
from passes.rewrite import Found, Pattern

aten = torch.ops.aten
DEFAULTS: dict[Any, tuple[float | None, float | None]] = {  # of ops with both bounds, where they are not given
    aten.clamp: (None, None),
    aten.clip: (None, None),
    aten.hardtanh: (-1.0, 1.0),
}


@dataclass(frozen=True)
class Limited(Pattern):
    """The pattern kept up to a number, or within ± it if `both`; or the pattern as it is.

    The number is bound to "limit", None where there is none: all of one search have the same.
    """

    inside: Pattern
    both: bool = False

    def search(self, value: Any, found: Found) -> Iterator[Found]:
        source, low, high, between = clamped(value)
        if high is not None and high >= 0 and low == (-high if self.both else None):
            if found.bound.get("limit", high) == high:
                for node in between:
                    found = found.cover(node)
                yield from self.inside.search(source, found.bind("limit", high))
        if found.bound.get("limit") is None:
            yield from self.inside.search(value, found.bind("limit", None))


def clamped(value: Any) -> tuple[Any, float | None, float | None, list[fx.Node]]:
    """(what is clamped, lower bound, upper bound, the clamps): of one by numbers, or of one for each bound."""
    low = high = None
    node, between = settled(value), list[fx.Node]()
    while (bounds := _bounds(node)) is not None:
        more_low, more_high = bounds
        if not (low is None or more_low is None) or not (high is None or more_high is None):
            break
        low, high = (more_low if low is None else low), (more_high if high is None else high)
        between.append(node)
        node = settled(node.args[0])
    return node, low, high, between


def _bounds(node: Any) -> tuple[float | None, float | None] | None:
    """The bounds of a clamp by numbers."""
    default = next((known for target, known in DEFAULTS.items() if is_call(node, target)), None)
    if default is not None:
        low, high = (node.args[at] if len(node.args) > at else default[at - 1] for at in (1, 2))
    elif is_call(node, aten.clamp_min):
        low, high = node.args[1], None
    elif is_call(node, aten.clamp_max):
        low, high = None, node.args[1]
    else:
        return None
    return None if isinstance(low, fx.Node) or isinstance(high, fx.Node) else (low, high)
