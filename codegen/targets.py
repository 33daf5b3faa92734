"""What a target is: how to compile for it, and how fast it moves bytes and multiplies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A machine to compile for. `bandwidth` in bytes/s, `flops` in FLOP/s (bf16, dense); measured where we could."""

    name: str
    backend: str  # "cpu", "cuda" or "hip"
    arch: str | int  # what triton's GPUTarget takes; "" on the CPU
    warp_size: int
    processors: int  # that run programs side by side: streaming multiprocessors, compute units
    shared_memory: int  # bytes a program can have
    bandwidth: float
    flops: float
    launch_seconds: float  # cost of one more kernel inside a replayed graph


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "cpu", "", 1, 1, 0, 2.0e10, 1.0e11, 5.0e-6),
        Target("sm_80", "cuda", 80, 32, 108, 163 * 1024, 1.9e12, 2.5e14, 1.5e-6),
        Target("sm_90", "cuda", 90, 32, 132, 227 * 1024, 4.27e12, 7.36e14, 1.3e-6),
        Target("sm_100", "cuda", 100, 32, 148, 227 * 1024, 7.0e12, 1.6e15, 1.3e-6),
        Target("gfx942", "hip", "gfx942", 64, 304, 64 * 1024, 4.3e12, 6.0e14, 2.0e-6),
    )
}


def target(name: str) -> Target:
    """Look a target up by name; ValueError names the accepted ones."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; accepted: {', '.join(TARGETS)}")
    return TARGETS[name]
