"""A call of a kind that has been seen repeats what the launcher did, on its own arguments and memory."""

import ctypes
import gc
import threading
import weakref
from types import SimpleNamespace

import numpy
import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from codegen import direct, planned
from codegen.direct import DirectLaunches
from codegen.kernels.sm_90.boxes import in_boxes
from codegen.planned import Planned


@triton.jit
def kernel(x, y, out, rows, depth, SCALE: tl.constexpr):
    pass


def address_of(value):
    if hasattr(value, "block_shape"):
        return address_of(value.base)
    return value if isinstance(value, int) else value.data_ptr()


def array(value, *shape):
    """What lies at an address, as float32."""
    numbers = ctypes.POINTER(ctypes.c_float)
    return numpy.ctypeslib.as_array(ctypes.cast(address_of(value), numbers), shape)


def axpy(*given):
    """out = SCALE · x + y over [rows, depth]; what the code of `kernel` does."""
    *blocks, stream, function, packed, _, _, _, x, y, out, rows, depth, scale = given
    assert (function, packed) == ("function", "packed")
    ran.append((tuple(blocks), stream))
    array(out, rows, depth)[:] = scale * array(x, rows, depth) + array(y, rows, depth)


ran: list = []


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    ran.clear()
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: f"stream {device}")
    for module in (direct, planned):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))

    def through_triton(*arguments, grid, warmup, **options):
        code = SimpleNamespace(function="function", packed_metadata="packed", run=axpy)
        axpy(*(*grid, 1, 1)[:3], "stream 0", "function", "packed", None, None, None, *arguments, options["SCALE"])
        return code

    launches = DirectLaunches(kernel)
    launches.through_triton = through_triton
    monkeypatch.setattr(kernel, "run", launches)
    with torch._C._AutoDispatchBelowAutograd():  # as torch calls an op: there even reshape is seen as a single step
        yield active


class Launcher:
    """Counts how often it runs `body`."""

    def __init__(self, body):
        self.body, self.calls = body, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.body(*arguments)


def launch(x, y, out, scale=0.5):
    kernel[(3, 2)](x, y, out, *x.shape, SCALE=scale)
    return out


def new(x):
    """Poisoned, so that what nobody writes is seen."""
    return torch.empty_like(x)


def chain(x, y):
    """x + 2.5 y in two launches: the inner sum in a box, the second argument from its second half."""
    inner, out = new(x), torch.empty((2, x.shape[0] // 2, x.shape[1]), dtype=x.dtype)
    half = y.chunk(2)[1]
    launch(in_boxes(x, *x.shape), half, inner, 1.0)
    return launch(half, inner, out.view(x.shape), 1.5).view(-1, x.shape[1])


def arguments(rows=6, depth=5):
    return torch.randn(rows, depth), torch.randn(2 * rows, depth)


def expected(x, y):
    return x + 2.5 * y[x.shape[0] :]


def test_later_calls_repeat_on_their_own_arguments():
    body = Launcher(chain)
    op = Planned(body)
    kept = []
    for call in range(6):
        given = arguments()
        kept.append((op(*given), expected(*given)))
        assert body.calls == min(call + 1, 2)
    for found, right in kept:
        torch.testing.assert_close(found, right)
    assert ran == [((3, 2, 1), "stream 0")] * 12


def test_every_kind_has_its_own_plan():
    body = Launcher(chain)
    op = Planned(body)
    for shape in ((6, 5), (8, 5), (6, 3)):
        for _ in range(4):
            given = arguments(*shape)
            torch.testing.assert_close(op(*given), expected(*given))
    assert body.calls == 6 and len(op.plans) == 3


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (x, y.double()),
        lambda x, y: (x, y.t().contiguous().t()),
        lambda x, y: (torch.randn(31)[1:].view(6, 5), y),
    ],
    ids=["dtype", "strides", "address"],
)
def test_another_kind_runs_the_launcher(other):
    body = Launcher(lambda x, y: launch(x, x.view(x.shape), new(x)))
    op = Planned(body)
    for _ in range(3):
        op(*arguments())
    assert body.calls == 2
    op(*other(*arguments()))
    assert body.calls == 3


def test_numbers_and_missing_tensors_are_part_of_the_kind():
    body = Launcher(lambda x, y, scale: launch(x, x.view(x.shape) if y is None else y, new(x), scale))
    op = Planned(body)
    for _ in range(3):
        for scale in (0.5, 2.0):
            for given in (torch.randn(4, 3), None):
                x = torch.randn(4, 3)
                torch.testing.assert_close(op(x, given, scale), scale * x + (x if given is None else given))
    assert body.calls == 8


def test_one_tensor_given_twice_is_not_planned_but_may_follow_a_plan():
    body = Launcher(lambda x, y: launch(x, y, new(x)))
    op = Planned(body)
    for calls in (1, 2, 3):
        x = torch.randn(4, 3)
        torch.testing.assert_close(op(x, x), 1.5 * x)
        assert body.calls == calls
    for _ in range(3):
        x, y = torch.randn(2, 4, 3)
        torch.testing.assert_close(op(x, y), 0.5 * x + y)
    assert body.calls == 4
    torch.testing.assert_close(op(x, x), 1.5 * x)
    assert body.calls == 4


def test_arguments_are_written_in_place_and_nothing_need_be_returned():
    def body(cache, x):
        rows = cache[2:6]
        launch(x, x.view(x.shape), rows)

    op = Planned(body)
    for _ in range(4):
        cache, x = torch.zeros(9, 3), torch.randn(4, 3)
        assert op(cache, x) is None
        torch.testing.assert_close(cache[2:6], 1.5 * x)
        assert cache[:2].eq(0).all() and cache[6:].eq(0).all()
    assert op.plans.popitem()[1] is not None


@pytest.mark.parametrize(
    "copy",
    [
        lambda y: y[1:].t().contiguous(),
        lambda y: y[1:].t().reshape(4, 3).view(3, 4),
        lambda y: y[1:].t().clone(memory_format=torch.contiguous_format),
        lambda y: y[1][:, None].expand(3, 4).contiguous(),
    ],
    ids=["contiguous", "reshape", "clone", "expanded"],
)
def test_copies_of_arguments_are_made_anew(copy):
    op = Planned(lambda x, y: launch(x, copy(y), new(x)))
    for _ in range(5):
        x, y = torch.randn(3, 4), torch.randn(2, 5, 7)[1, :, 2:5]
        torch.testing.assert_close(op(x, y), 0.5 * x + copy(y))
    assert op.plans.popitem()[1] is not None


def test_several_results_lie_in_memory_of_their_own():
    op = Planned(lambda x, y: (launch(x, y, new(x)), launch(y, x, new(x), 2.0)))
    kept = []
    for _ in range(4):
        x, y = torch.randn(2, 4, 3)
        kept.append((op(x, y), (0.5 * x + y, 2 * y + x)))
    for found, right in kept:
        assert isinstance(found, tuple)
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    "body",
    [
        lambda x, y: launch(x, y + 1, new(x)),
        lambda x, y: launch(x, launch(x, x.view(4, 3), y).t().reshape(4, 3), new(x)),
        lambda x, y: launch(x, y.t().clone(), new(x)),
        lambda x, y: launch(x, new(x).t().reshape(4, 3), new(x)),
        lambda x, y: launch(x, x.view(4, 3), new(x)) is None or y.t().contiguous(),
        lambda x, y: launch(x, torch.cat([x, y])[4:], new(x)),
        lambda x, y: launch(x, y, x),
        lambda x, y: launch(x, y, new(x))[:2],
        lambda x, y: (lambda out: (out, out))(launch(x, y, new(x))),
        lambda x, y: launch(x, torch.ones(4, 3) if y is None else CONSTANT, new(x)),
        lambda x, y: kernel[(1,)](x, y, x, 4, depth=3, SCALE=0.5) or new(x),
    ],
    ids=[
        "sum",
        "late copy",
        "copy in another order",
        "copy of own memory",
        "copy returned",
        "parts together",
        "argument",
        "part",
        "twice",
        "constant",
        "by name",
    ],
)
def test_what_cannot_be_repeated_always_runs_the_launcher(body, gpu, monkeypatch):
    nothing = SimpleNamespace(function="function", packed_metadata="packed", run=lambda *_: None)
    monkeypatch.setattr(kernel.run, "through_triton", lambda *_, **__: nothing)
    counted = Launcher(body)
    op = Planned(counted)
    for calls in range(1, 5):
        op(*torch.randn(2, 4, 3))
        assert counted.calls == calls
    assert list(op.plans.values()) == [None]


CONSTANT = torch.randn(4, 3)


def test_no_tensor_of_the_watched_call_is_kept():
    op = Planned(chain)
    op(*arguments())
    given = arguments()
    found = op(*given)
    alive = [weakref.ref(one) for one in (*given, found)]
    del given, found
    gc.collect()
    assert [one() for one in alive] == [None] * 3 and op.plans.popitem()[1] is not None


def test_a_profiler_that_watches_launches_sees_the_launcher_run():
    body = Launcher(chain)
    op = Planned(body)
    for _ in range(3):
        op(*arguments())

    def hook(metadata):
        pass

    knobs.runtime.launch_exit_hook.add(hook)
    try:
        op(*arguments())
    finally:
        knobs.runtime.launch_exit_hook.remove(hook)
    assert body.calls == 3


def test_another_device_has_plans_of_its_own(gpu):
    body = Launcher(chain)
    op = Planned(body)
    for _ in range(3):
        op(*arguments())
    gpu.get_current_device = lambda: 1
    op(*arguments())
    assert body.calls == 3


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(planned, "MOST_KINDS", 3)
    op = Planned(chain)
    for rows in range(2, 30, 2):
        for _ in range(3):
            given = arguments(rows)
            torch.testing.assert_close(op(*given), expected(*given))
        assert len(op.plans) <= 3 and len(op.met) <= 3


def test_descriptors_are_kept_by_address_and_bounded(monkeypatch):
    monkeypatch.setattr(planned, "MOST_ADDRESSES", 2)
    op = Planned(chain)
    given = [arguments() for _ in range(5)]  # all alive, so at addresses of their own
    for x, y in given * 3:
        torch.testing.assert_close(op(x, y), expected(x, y))
    (plan,) = op.plans.values()
    (box,) = plan.boxes
    assert 0 < len(box.known) <= 2
    made = box.at(next(iter(box.known)))
    assert box.at(made.base.data_ptr()) is made


def test_threads_share_plans():
    op, wrong = Planned(chain), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x, y = torch.randn(6, 5, generator=generator), torch.randn(12, 5, generator=generator)
            if not torch.allclose(op(x, y), expected(x, y), atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
