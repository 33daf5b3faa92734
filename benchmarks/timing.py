"""Timing on one device: CUDA-graph replays between events, the device's ceilings, and where a replay's time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

Run = Callable[[], Any]

REPEATS = 20
SLEEP_CYCLES = 150_000
SIDES = {"cuda": 8192, "cpu": 512}  # of the matrices of `product_speed`
READ_BYTES = {"cuda": 8 << 30, "cpu": 1 << 26}


def graphed(run: Run, calls: int = 1) -> Run:
    """`calls` runs as one CUDA graph; returns its replay, which gives the last run's result. On the CPU, run itself."""
    if not torch.cuda.is_available():
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            out = run()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def milliseconds(run: Run, repeats: int = REPEATS, rest: float = 0.0) -> float:
    """Median between device events, or of a clock on the CPU; rest: seconds that the device is idle before each run."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        time.sleep(rest)
        times.append(_once(run))
    return statistics.median(times)


def microseconds(run: Run, repeats: int = REPEATS) -> float:
    """The same in microseconds."""
    return milliseconds(run, repeats) * 1e3


def queued_microseconds(run: Run, repeats: int = REPEATS) -> float:
    """A replay's time without the host's share: the GPU sleeps until all of it has been submitted."""
    return statistics.median(_once(run, SLEEP_CYCLES) for _ in range(repeats)) * 1e3


def compared_microseconds(runs: Sequence[Run], turns: int = 10, repeats: int = 10) -> list[float]:
    """Medians between device events of runs that take turns, so that each has its share of what the host is doing.

    What launching costs changes by microseconds from one second to the next; within a turn it hardly does.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(turns):
        for run, taken in zip(runs, times, strict=True):
            for _ in range(3):
                run()
            taken += [_once(run) for _ in range(repeats)]
    return [statistics.median(taken) * 1e3 for taken in times]


def _once(run: Run, sleep: int = 0) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if sleep:
        torch.cuda._sleep(sleep)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@triton.jit
def _read(x, out, tiles, TILE: tl.constexpr):
    largest = tl.zeros((TILE,), tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=4):
        largest = tl.maximum(largest, tl.load(x + tile.to(tl.int64) * TILE + tl.arange(0, TILE)))
    tl.store(out + tl.program_id(0), tl.max(largest, 0))


def read_speed(device: str = "cuda") -> float:
    """Bytes per second of going through memory once for its largest number; the fastest way to do it that was found."""
    x = torch.rand(READ_BYTES[device] // 4, device=device)
    if device == "cpu":
        return 4 * x.numel() / milliseconds(x.amax) * 1e3
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs, device=device)
    run = graphed(lambda: _read[(programs,)](x, out, x.numel() // 8192, 8192, num_warps=8))
    return 4 * x.numel() / milliseconds(run) * 1e3


def product_speed(device: str = "cuda") -> float:
    """FLOP per second of a large matrix product, bfloat16 on a GPU."""
    side, dtype = SIDES[device], torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / milliseconds(lambda: a @ b) * 1e3


@triton.jit
def _nothing():
    pass


def empty_launch() -> Run:
    """The replay of a kernel that does nothing."""
    return graphed(lambda: _nothing[(1,)]())


def breakdown(run: Run, trace: Path | None = None, replays: int = 5) -> Iterator[dict[str, Any]]:
    """Kernels of a replay by the time they are resident; kernels that overlap count twice."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            run()
        torch.cuda.synchronize()
    if trace:
        profiler.export_chrome_trace(str(trace))
    found = [event for event in profiler.key_averages() if event.device_time_total > 0]
    for event in sorted(found, key=lambda event: -event.device_time_total):
        yield {"kernel": event.key, "launches": event.count / replays, "us": event.device_time_total / replays}
