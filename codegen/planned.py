"""Ops whose launches are known beforehand: for arguments of a kind that has been seen, memory and launches only.

What a launcher allocates, copies and launches depends on its arguments' kinds, never on their numbers. Finding it out
takes the host several times as long as doing it, and that is what a step of few tokens waits for where no CUDA graph is
replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.driver import driver

from codegen.direct import Launched, note_launches, watched
from codegen.kernels.layout import cdiv

MOST_KINDS = 256  # of one op; where sizes go on changing, no plan is of use for long
MOST_ADDRESSES = 256  # of one descriptor: weights of many layers, and what a caching allocator gives again
ROUNDED_TO = 256  # bytes: where memory of its own begins, for any copy engine

aten = torch.ops.aten
ALLOCATIONS = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default}


class Planned:
    """What runs in a launcher's place. The second call of a kind is watched, and later ones repeat what it did. All
    kernels that it launches must be launched directly (`codegen.direct`): nobody hears of others.

    Arguments are of a kind if they agree in all but the addresses and contents of tensors, and in these addresses up to
    multiples of 16 bytes. A launcher that asks torch for anything but memory, views, and contiguous copies of arguments
    in front of its launches is always run itself.
    """

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self.launcher = launcher
        self.plans: dict[Any, Plan | None] = {}  # by kind; None where the launcher must run
        self.met: set[Any] = set()

    def __call__(self, *arguments: Any) -> Any:
        device = driver.active.get_current_device()
        kind: list[Any] = [device]
        addresses = []
        for value in arguments:
            if isinstance(value, Tensor):
                address = value.data_ptr()
                kind.append((value.dtype, value.shape, value.stride(), address % 16, value.get_device()))
                addresses.append(address)
            else:
                kind.append(value)
                addresses.append(0)
        key = tuple(kind)
        plan = self.plans.get(key)
        if plan is not None and not watched():
            return plan(arguments, addresses, driver.active.get_current_stream(device))
        if key not in self.plans:
            if key in self.met and _all_different(arguments):
                result, plan = planned(self.launcher, arguments)
                self._bound(self.plans)
                self.plans[key] = plan
                return result
            self._bound(self.met)
            self.met.add(key)
        return self.launcher(*arguments)

    @staticmethod
    def _bound(known: Any) -> None:
        if len(known) >= MOST_KINDS:
            known.clear()


@dataclass(frozen=True)
class Repeated:
    """One launch. given: picks what its code is run with behind blocks and stream from all that a plan knows."""

    run: Callable[..., Any]
    blocks: tuple[int, int, int]
    given: Callable[[Sequence[Any]], tuple[Any, ...]]


class Box:
    """A tensor descriptor, whatever address it is at."""

    def __init__(self, pointer: int, box: Any) -> None:
        self.pointer = pointer  # in what a plan knows
        self.type = type(box)
        self.rest = {name: value for name, value in vars(box).items() if name != "base"}
        self.known: dict[int, Any] = {}  # the descriptor by its address

    def at(self, address: int) -> Any:
        made = self.known.get(address)
        if made is None:
            made = object.__new__(self.type)
            made.__dict__.update(self.rest, base=_Address(address))
            if len(self.known) >= MOST_ADDRESSES:
                self.known.clear()
            self.known[address] = made
        return made


@dataclass(frozen=True)
class Result:
    """A tensor that is returned, in memory of its own."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def allocated(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Copied:
    """A view of an argument, to be copied into contiguous memory. offset: in elements, from the argument's start."""

    argument: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, argument: Tensor) -> Tensor:
        view = argument.as_strided(self.shape, self.strides, argument.storage_offset() + self.offset)
        return view.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Plan:
    """What is known at a call, in this order: addresses of arguments, results, copies and one more allocation, which
    ends with the call as copies do; all that is no address; addresses in these memories; descriptors.

    inner: which of the memories, and how many bytes from its start.
    """

    device: torch.device
    launches: tuple[Repeated, ...]
    results: tuple[Result, ...]
    copies: tuple[Copied, ...]
    room: int  # bytes of the allocation
    fixed: tuple[Any, ...]
    inner: tuple[tuple[int, int], ...]
    boxes: tuple[Box, ...]
    many: bool  # returned as a tuple

    def __call__(self, arguments: Sequence[Any], known: list[Any], stream: Any) -> Any:
        results = [one.allocated(self.device) for one in self.results]
        known += [one.data_ptr() for one in results]
        copies = [one.of(arguments[one.argument]) for one in self.copies]
        known += [one.data_ptr() for one in copies]
        room = torch.empty(self.room, dtype=torch.uint8, device=self.device) if self.room else None
        known.append(0 if room is None else room.data_ptr())
        known += self.fixed
        known += [known[memory] + offset for memory, offset in self.inner]
        known += [box.at(known[box.pointer]) for box in self.boxes]
        for launch in self.launches:
            launch.run(*launch.blocks, stream, *launch.given(known))
        return tuple(results) if self.many else results[0] if results else None


class _Address:
    """What a tensor descriptor wants of a tensor."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def planned(launcher: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Plan | None]:
    """What the launcher returns, and how to do the same for other arguments of the kind; None where that is not known.

    No two of the arguments may be one tensor: which of them a launch was given would be anyone's guess.
    """
    with note_launches() as launches, _Watch(arguments, launches) as watch:
        result = launcher(*arguments)
    return result, watch.plan(result)


def _all_different(arguments: Sequence[Any]) -> bool:
    tensors = [id(value) for value in arguments if isinstance(value, Tensor)]
    return len(set(tensors)) == len(tensors)


def _same_memory(view: Tensor, other: Tensor) -> bool:
    """Not so where a view, such as reshape, had to copy."""
    return view.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class _Watch(TorchDispatchMode):
    """Follows memory: which argument's, or which new one's, every tensor lies in."""

    def __init__(self, arguments: Sequence[Any], launches: Sequence[Launched | None]) -> None:
        super().__init__()
        self.launches = launches
        self.memory: list[Any] = list(arguments)
        self.given = len(self.memory)
        self.lies_in = {id(value): place for place, value in enumerate(arguments) if isinstance(value, Tensor)}
        self.copies: dict[int, Copied] = {}  # by their place in memory
        self.kept: list[Any] = []  # so that no other tensor gets the identity of one
        self.repeatable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        if func in ALLOCATIONS:
            self._add(out)
        elif func.is_view and all(_same_memory(one, args[0]) for one in tree_leaves(out)):
            if id(args[0]) in self.lies_in:
                self.lies_in.update(dict.fromkeys(map(id, tree_leaves(out)), self.lies_in[id(args[0])]))
        elif (func.is_view or func is aten.clone.default) and self._copies(args[0], out):
            source, home = args[0], self.lies_in[id(args[0])]
            offset = (source.data_ptr() - self.memory[home].data_ptr()) // source.element_size()
            self.copies[len(self.memory)] = Copied(home, tuple(source.shape), source.stride(), offset)
            self._add(out)
        else:
            self.repeatable = False
        return out

    def _add(self, memory: Tensor) -> None:
        self.lies_in[id(memory)] = len(self.memory)
        self.memory.append(memory)

    def _copies(self, source: Tensor, out: Any) -> bool:
        """Has a part of an argument been copied, row after row, before anything was launched that may write there?"""
        if self.launches or self.lies_in.get(id(source), self.given) >= self.given:
            return False
        same = isinstance(out, Tensor) and out.dtype == source.dtype and out.numel() == source.numel()
        return same and out.is_contiguous()

    def plan(self, result: Any) -> Plan | None:
        many = isinstance(result, (tuple, list))
        returned = tuple(result) if many else () if result is None else (result,)
        homes = [self.lies_in.get(id(value), -1) for value in returned]
        if not self.launches or not self.repeatable or len(set(homes)) < len(homes):
            return None
        if any(home < self.given or home in self.copies for home in homes):
            return None
        if not all(map(self._fills, returned, homes)):
            return None
        launches = [launch for launch in self.launches if launch is not None]
        given = [_given(launch) for launch in launches]
        every = {id(value): value for values in given for value in values}
        fixed = [value for value in every.values() if _tensor_of(value) is None]
        boxes = [value for value in every.values() if hasattr(value, "block_shape")]
        tensors = {id(one): one for value in every.values() if (one := _tensor_of(value)) is not None}
        if len(launches) < len(self.launches) or not tensors.keys() <= self.lies_in.keys():
            return None
        memories, room = self._layout(homes)
        before = self.given + len(homes) + len(self.copies) + 1
        places = {id(value): place for place, value in enumerate((*fixed, *tensors.values(), *boxes), before)}
        return Plan(
            device=next(value.device for value in self.memory if isinstance(value, Tensor)),
            launches=tuple(
                Repeated(launch.code.run, launch.blocks, itemgetter(*(places[id(value)] for value in values)))
                for launch, values in zip(launches, given, strict=True)
            ),
            results=tuple(Result(tuple(one.shape), one.stride(), one.dtype) for one in returned),
            copies=tuple(self.copies.values()),
            room=room,
            fixed=tuple(fixed),
            inner=tuple(self._place(tensor, memories) for tensor in tensors.values()),
            boxes=tuple(Box(places[id(box.base)], box) for box in boxes),
            many=many,
        )

    def _layout(self, homes: Sequence[int]) -> tuple[dict[int, tuple[int, int]], int]:
        """Which of a plan's memories each one here is or lies in, and how many bytes from its start; and the bytes of
        the last, which holds all that are neither arguments, results nor copies."""
        first = [*range(self.given), *homes, *self.copies]
        found, room = {place: (number, 0) for number, place in enumerate(first)}, 0
        for place, memory in enumerate(self.memory):
            if place not in found:
                found[place] = len(first), room
                room += cdiv(memory.untyped_storage().nbytes(), ROUNDED_TO) * ROUNDED_TO
        return found, room

    def _place(self, tensor: Tensor, memories: dict[int, tuple[int, int]]) -> tuple[int, int]:
        home = self.lies_in[id(tensor)]
        memory, begin = memories[home]
        return memory, begin + tensor.data_ptr() - self.memory[home].data_ptr()

    def _fills(self, value: Tensor, home: int) -> bool:
        """Could this have been allocated in place of the memory that it lies in?"""
        memory = self.memory[home]
        extent = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
        whole = extent * value.element_size() == memory.untyped_storage().nbytes()
        return value.numel() > 0 and whole and value.data_ptr() == memory.data_ptr()


def _given(launch: Launched) -> tuple[Any, ...]:
    """What the code of a launch is run with, behind blocks and stream."""
    code = launch.code
    return code.function, code.packed_metadata, None, None, None, *launch.arguments, *launch.constants


def _tensor_of(value: Any) -> Tensor | None:
    """The tensor that an argument of a launch points to or describes."""
    tensor = value.base if hasattr(value, "block_shape") else value
    return tensor if isinstance(tensor, Tensor) else None
