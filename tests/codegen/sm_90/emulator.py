"""Gluon on the CPU, for tests: each program runs as Python threads, one per warp-specialised partition.

Kernels run unchanged through their launchers. Shared memory, barriers with their phases and transaction counts, bulk
copies and matrix products behave as on the machine, except that copies and products finish at once: a missing barrier
between threads of one partition does not show, a wrong phase, slot, byte count or lost release does, as a wrong number
or as a barrier that nobody completes.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import types
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from triton import language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITCallable, JITFunction

PATIENCE = 20.0  # seconds until a barrier that nobody completes fails the test
_PROGRAM = threading.local()
_ATOMIC = threading.Lock()


class Number(int):
    """A scalar: unlike a tensor of no axes, `+=` on one of its names leaves the others alone."""

    def to(self, dtype):
        return self


def _scalar(x):
    if x.ndim:
        return x
    return x.item() if x.is_floating_point() or x.dtype == torch.bool else Number(x.item())


class Pointer:
    """A tensor's storage and offsets into it, which may be a tensor."""

    def __init__(self, tensor, offset=0):
        self.flat, self.offset = tensor.view(-1), offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset):
        moved = Pointer(self.flat)
        moved.offset = self.offset + offset
        return moved


class Shared:
    """A view of shared memory, poisoned when it is allocated."""

    def __init__(self, tensor):
        self.tensor = tensor

    def index(self, i):
        return Shared(self.tensor[int(i)])

    def permute(self, order):
        return Shared(self.tensor.permute(*order))

    def slice(self, start, length, dim=0):
        return Shared(self.tensor.narrow(dim, start, length))

    def _reinterpret(self, dtype, shape, layout):
        return Shared(self.tensor.view(dtype).view(shape))

    @property
    def dtype(self):
        return self.tensor.dtype

    def load(self, layout):
        return self.tensor.clone()

    def store(self, value):
        assert value.shape == self.tensor.shape and value.dtype == self.tensor.dtype, (value, self.tensor)
        self.tensor.copy_(value)


class Barrier:
    """An mbarrier: a phase completes when its arrivals and the bytes it expects have come."""

    def __init__(self):
        self.changed = threading.Condition()
        self.phases, self.bytes = 0, 0

    def begin(self, count):
        self.count = self.left = count

    def settle(self, arrivals=0, expected=0):
        with self.changed:
            self.left -= arrivals
            self.bytes += expected
            assert self.left >= 0, "more arrivals than a phase takes"
            if self.left == 0 and self.bytes == 0:
                self.phases, self.left = self.phases + 1, self.count
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            done = self.changed.wait_for(lambda: self.phases % 2 != int(parity), PATIENCE)
            assert done, "a barrier that nobody completes"


class Barriers:
    def __init__(self, count):
        self.each = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.each[int(i)]


class BarrierLayout:
    pass


class Descriptor:
    """What a kernel sees of a host-side tensor descriptor."""

    def __init__(self, descriptor):
        self.base, self.layout, self.dtype = descriptor.base, None, descriptor.base.dtype
        shape = list(descriptor.block_shape)
        self.block_type = SimpleNamespace(shape=shape, nbytes=math.prod(shape) * self.dtype.itemsize)

    def box(self, *where):
        """A box of the tensor, with zeros behind its edges."""
        box = torch.zeros(self.block_type.shape, dtype=self.dtype)
        part = self.base[tuple(slice(int(at), int(at) + size) for at, size in zip(where, box.shape, strict=True))]
        box[tuple(map(slice, part.shape))] = part
        return box


def _copy(descriptor, where, barrier, shared, pred=True):
    if pred:
        shared.store(descriptor.box(*where))
        barrier.settle(expected=-descriptor.block_type.nbytes)


def _wait(barrier, parity, pred=True):
    if pred:
        barrier.wait(parity)


def _arrive(barrier, pred=True):
    if pred:
        barrier.settle(arrivals=1)


def _expect(barrier, nbytes, pred=True):
    if pred:
        barrier.settle(arrivals=1, expected=nbytes)


def _multiply(a, b, acc, use_acc=True, is_async=False):
    a, b = (x.tensor if isinstance(x, Shared) else x for x in (a, b))
    product = a.float() @ b.float()
    assert product.shape == acc.shape, (product.shape, acc.shape)
    return acc + product if use_acc else product


def _finished(pending, deps):
    return deps[0] if len(deps) == 1 else tuple(deps)


def _specialise(partitions, warps, registers):
    errors, number, grid = [], _PROGRAM.number, _PROGRAM.grid

    def run(function, arguments):
        _PROGRAM.number, _PROGRAM.grid = number, grid
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


def _allocate(dtype, shape, layout):
    if isinstance(layout, BarrierLayout):
        return Barriers(shape[0])
    return Shared(torch.full(shape, torch.nan if dtype.is_floating_point else -(1 << 30), dtype=dtype))


def _load(pointer, mask=None, other=None):
    offset = torch.as_tensor(pointer.offset)
    if mask is None:
        return _scalar(pointer.flat[offset])
    offset, mask = torch.broadcast_tensors(offset, torch.as_tensor(mask))
    found = torch.full(offset.shape, other, dtype=pointer.flat.dtype)
    found[mask] = pointer.flat[offset[mask]]
    return found


def _store(pointer, value, mask=True, eviction_policy=None):
    offset, mask, value = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(mask), value)
    pointer.flat[offset[mask]] = value[mask]


def _atomic_add(pointer, value, sem=None, scope=None):
    with _ATOMIC:
        old = Number(pointer.flat[pointer.offset])
        pointer.flat[pointer.offset] += value
    return old


def _await_signals(pointer, wanted):
    begin = time.monotonic()
    while pointer.flat[pointer.offset] < wanted:
        assert time.monotonic() < begin + PATIENCE, "signals that nobody gives"
        time.sleep(1e-4)


def _where(condition, one, other):
    if isinstance(one, Pointer):
        return one if condition else other
    return _scalar(torch.where(torch.as_tensor(condition), torch.as_tensor(one), torch.as_tensor(other)))


def _pair(function):
    return lambda one, other: _scalar(function(torch.as_tensor(one), torch.as_tensor(other)))


def _scan(x, axis, combine):
    parts = [x[0]]
    for value in x[1:]:
        parts.append(combine(parts[-1], value))
    return torch.stack(parts)


def _anything(*arguments, **options):
    return None


gl = SimpleNamespace(
    bfloat16=torch.bfloat16,
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    constexpr=None,
    arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    to_tensor=lambda x: Number(x) if isinstance(x, int) else x,
    where=_where,
    maximum=_pair(torch.maximum),
    minimum=_pair(torch.minimum),
    exp=torch.exp,
    exp2=lambda x: _scalar(torch.exp2(torch.as_tensor(x, dtype=torch.float32))),
    min=lambda x, axis: _scalar(x.amin(axis)),
    sum=lambda x, axis: _scalar(x.sum(axis)),
    max=lambda x, axis: _scalar(x.amax(axis)),
    associative_scan=_scan,
    static_range=range,
    reshape=lambda x, shape: x.reshape(shape),
    permute=lambda x, order: x.permute(order),
    split=lambda x: x.unbind(-1),
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
    convert_layout=lambda x, layout, assert_trivial=False: x,
    num_warps=lambda: 4,
    program_id=lambda axis: _PROGRAM.number[axis],
    num_programs=lambda axis: _PROGRAM.grid[axis],
    allocate_shared_memory=_allocate,
    warp_specialize=_specialise,
    BlockedLayout=_anything,
    DistributedLinearLayout=_anything,
    SliceLayout=_anything,
    DotOperandLayout=_anything,
    SwizzledSharedLayout=_anything,
    NVMMADistributedLayout=_anything,
    NVMMASharedLayout=SimpleNamespace(get_default_for=_anything),
)
STAND_INS = {
    "gl": gl,
    "tl": SimpleNamespace(
        debug_barrier=_anything,
        minimum=lambda a, b, propagate_nan: gl.minimum(a, b),  # torch's propagate it
        maximum=lambda a, b, propagate_nan: gl.maximum(a, b),
        PropagateNan=tl.PropagateNan,
    ),
    "mbarrier": SimpleNamespace(
        MBarrierLayout=BarrierLayout,
        init=lambda barrier, count: barrier.begin(count),
        wait=_wait,
        arrive=_arrive,
        expect=_expect,
    ),
    "tma": SimpleNamespace(async_copy_global_to_shared=_copy),
    "warpgroup_mma": _multiply,
    "warpgroup_mma_wait": _finished,
    "fence_async_shared": _anything,
    "order_for_copies": _anything,
    "_swiglu": lambda gate, up: torch.nn.functional.silu(gate) * up,
    "await_signals": _await_signals,
    "gdc_wait": _anything,
    "gdc_launch_dependents": _anything,
}


def _plain(function, made):
    """The Python function behind a jitted one, with stand-ins for everything of the GPU's that it uses."""
    if function not in made:
        scope = dict(function.fn.__globals__)
        made[function] = types.FunctionType(function.fn.__code__, scope, function.fn.__name__, function.fn.__defaults__)
        for name, value in scope.items():
            if name in STAND_INS:
                scope[name] = STAND_INS[name]
            elif isinstance(value, tl.constexpr):
                scope[name] = value.value
            elif isinstance(value, JITCallable):
                scope[name] = _plain(value, made)
    return made[function]


def _argument(value):
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    return Pointer(value) if isinstance(value, torch.Tensor) else value


def _run(kernel, grid, *arguments, **options):
    names = [parameter.name for parameter in kernel.params]
    named = {name: value for name, value in options.items() if name in names}
    function, given = _plain(kernel, {}), [_argument(value) for value in arguments]
    grid = (*grid, 1, 1)[:3]
    for number in itertools.product(*(range(size) for size in grid)):
        _PROGRAM.number, _PROGRAM.grid = number, grid
        function(*given, **named)


@contextmanager
def emulated(processors):
    """Gluon kernels that are launched on CPU tensors run here, on a device of so many multiprocessors."""
    device = SimpleNamespace(multi_processor_count=processors)
    with (
        # Not its `run`: kernels behind torch.compile's ops have one of their own (codegen.dispatch).
        mock.patch.object(JITFunction, "__getitem__", lambda kernel, grid: partial(_run, kernel, grid)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _: device),
    ):
        yield
