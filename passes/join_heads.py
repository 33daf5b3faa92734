"""The two parts of every head side by side, the second rotated on the way, as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from codegen.targets import Target
from passes.base import call, is_call, same_size, shape_of, source_line
from passes.fuse_rotary import last_axis_of_result
from passes.launches import FuseLaunches
from passes.nodes import dtype_of, erase_dead, readers, settled

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class JoinHeads(FuseLaunches):
    """cat([x, rotary(y, cos, sin)], -1)    →    join_heads(x, y, cos, sin)
       cat([x, y], -1)                      →    join_heads(x, y)

    Over [B, S, H, P] and [B, S, H, R], read where they are. Somebody else's rotation stays, and its result is joined.
    Not on the CPU, where a code generator fuses both steps.
    """  # fmt: skip

    op: ClassVar[str] = "join_heads"

    def lacks(self, target: Target) -> str | None:
        return "on the CPU a code generator fuses the steps" if target.backend == "cpu" else None

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, aten.cat) or len(shape_of(node)) != 4:
            return ""
        return why_not(node)

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        first, second = node.args[0]
        rotation = rotation_of(node)
        arguments = (first, second) if isinstance(rotation, str) else (first, *rotation.args)
        with graph.inserting_before(node):
            new = call(graph, dsv3.join_heads.default, *arguments, like=node)
        node.replace_all_uses_with(new)
        erase_dead(graph, node)
        where = source_line(new)
        told = f"{node.name} → {new.name}" + (f" ({where})" if where else "")
        return f"{told}; {rotation}" if isinstance(rotation, str) and rotation else told


def why_not(joined: fx.Node) -> str | None:
    """Why a concatenation of tensors with four axes does not put two parts of every head side by side, or None."""
    if not last_axis_of_result(joined):
        return f"{joined.name} is not over the last axis"
    parts = joined.args[0]
    if len(parts) != 2:
        return f"{joined.name} has {len(parts)} parts"
    if len({dtype_of(part) for part in parts}) > 1:
        return f"{parts[0].name} and {parts[1].name} differ in dtype"
    if not dtype_of(joined).is_floating_point:
        return f"{joined.name} holds no floats"
    if not all(isinstance(size, int) for part in parts for size in shape_of(part)[2:]):
        return f"the heads of {joined.name} and their widths are not known numbers"
    return None


def rotation_of(joined: fx.Node) -> fx.Node | str:
    """The rotation of the second part, or why it stays a step of its own ('': there is none)."""
    first, second = joined.args[0]
    rotation = settled(second)
    if not is_call(rotation, dsv3.rotary):
        return ""
    others = [reader.name for reader in readers(rotation) if reader is not joined]
    if others or settled(first) is rotation:
        return f"{rotation.name} stays: it is read by {others[0] if others else 'both parts'} as well"
    x, *angles = rotation.args[:3]
    wanted = (*shape_of(x)[:2], shape_of(x)[3] // 2)
    for one in angles:
        if len(shape_of(one)) != 3 or not all(map(same_size, shape_of(one), wanted)):
            return f"{rotation.name} stays: {one.name} is not one angle per row, position and pair"
    return rotation
