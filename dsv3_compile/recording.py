"""Steps that are recorded once and replayed: buffers whose addresses stay, and CUDA graphs over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

WARM_UPS = 2  # calls before the recording: kernels are compiled and libraries choose their algorithms in them
MOST_IDLE = 4  # slots kept although no cache uses them
MOST_PROMPTS = 8  # sizes of prompts whose memory and recording are kept
MOST_SEEN = 64  # sizes of prompts that are remembered
SHORTEST_UNIT = 16  # positions

Layer = tuple[Tensor, ...]


@dataclass(frozen=True)
class Recording:
    """A step that is done again by `replay`, which reads and writes the same memory; `output` is overwritten."""

    replay: Callable[[], None]
    output: Tensor


Recorder = Callable[[Callable[[], Tensor]], Recording]
"""Records a function that reads and writes fixed memory. It may call the function any number of times first."""


class CudaRecorder:
    """Records into CUDA graphs that share one pool of memory: they are never replayed at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Recording:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = run()
        return Recording(graph.replay, output)


@dataclass(eq=False)
class Slot:
    """The memory of one batch at one capacity, and the step recorded on it, once there is one.

    layers: per layer, the cached tensors [B, capacity, ...]. lengths [B] and ids [B, 1] int64.
    """

    layers: list[Layer]
    lengths: Tensor
    ids: Tensor
    recording: Recording | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Batch and capacity."""
        batch, capacity = self.layers[0][0].shape[:2]
        return batch, capacity


@dataclass
class Slots:
    """Slots that no cache uses any more, the last used last; at most MOST_IDLE, so that memory stays bounded."""

    idle: list[Slot] = field(default_factory=list)

    def take(self, batch: int, capacity: int) -> Slot | None:
        """An idle slot of these sizes, with its recording; None where there is none."""
        for slot in reversed(self.idle):
            if slot.sizes == (batch, capacity):
                self.idle.remove(slot)
                return slot
        return None

    def give_back(self, slot: Slot) -> None:
        self.idle.append(slot)
        del self.idle[:-MOST_IDLE]


@dataclass(eq=False)
class Prompt:
    """The memory of prompts of one size, and the prefill recorded on it, once there is one.

    ids and positions [B, S] int64; last [B, 1] int64: the position of each row that is asked for, all where None;
    layers: per layer, the cached tensors [B, S, ...].
    """

    ids: Tensor
    positions: Tensor
    last: Tensor | None
    layers: list[Layer]
    recording: Recording | None = None


@dataclass
class Prompts:
    """Sizes of prompts that have come, the last one last: (B, S, are all positions asked for?). Those that came again
    have memory: the last few, so that it stays bounded."""

    seen: dict[tuple[int, int, bool], Prompt | None] = field(default_factory=dict)

    def again(self, sizes: tuple[int, int, bool], make: Callable[[], Prompt]) -> Prompt | None:
        """The memory of a size, made when it comes for the second time; None when it comes for the first."""
        known = sizes in self.seen
        prompt = self.seen.pop(sizes, None)
        self.seen[sizes] = make() if known and prompt is None else prompt
        for old in list(self.seen)[:-MOST_SEEN]:
            del self.seen[old]
        for old in [one for one, memory in self.seen.items() if memory is not None][:-MOST_PROMPTS]:
            self.seen[old] = None
        return self.seen[sizes]


def padded_length(length: int) -> int:
    """The length up to which a prompt is padded, at most an eighth or 15 more, so that few sizes are to be recorded."""
    unit = max(SHORTEST_UNIT, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // unit) * unit
