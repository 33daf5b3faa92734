"""Attention on one Hopper GPU: the emitted kernels beside the peers that are installed, in one run, and the floor.

    python benchmarks/gpu_attention.py                   # everything
    python benchmarks/gpu_attention.py --only decode     # or ragged, paged, odd, prefill; several may be named

Each shape is first checked against float32 on fresh random inputs, with every output poisoned; a shape that is off is
not timed. Decode peers: FlashInfer's fa3 kernel (`pip install flashinfer-python`). Prefill peer: torch's SDPA on
cuDNN or flash attention, whichever is faster.
Times are medians over CUDA-graph replays. `us` lies between two events around a replay on an idle GPU, as peers are
usually timed; ours and the peer's take turns, since the host's share of it changes. Replaying an empty kernel so takes
`launch` microseconds. `queued` is the same behind a sleeping kernel, which hides the host, and `chained` a call's share
of a graph of many, as a decode step has them. Floor: the larger of the bytes (each cached row once, queries, outputs)
over the bandwidth of reading and the FLOPs over those of a large product per second, both measured in this run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from emitted import emitted, print_table, relative_error
from timing import (
    compared_microseconds,
    empty_launch,
    graphed,
    microseconds,
    product_speed,
    queued_microseconds,
    read_speed,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.build import imported
from codegen.bundle import bundle
from codegen.targets import Target, target
from codegen.tuning import KERNELS

Kernel = Callable[..., Any]

PAGE = 64
SCALE = 192**-0.5
TOLERANCE = 4e-3
CHECKED_REQUESTS = 3
CHAINED_CALLS = 16
PREFILLS = ((16, 192, 128), (128, 192, 128), (20, 256, 256))  # heads, widths of keys and of values


@dataclass(frozen=True)
class Shape:
    """One decode call. `context` is the length of every request, or the longest where the batch is ragged."""

    heads: int
    batch: int
    context: int
    queries: int = 1
    rank: int = 512
    rope: int = 64
    ragged: bool = False
    paged: bool = False


def shapes(part: str) -> list[Shape]:
    both = (16, 128)
    sizes = ((1, 4096), (1, 32768), (16, 4096), (64, 4096), (128, 4096), (128, 8192))
    plain = [Shape(heads, batch, context) for heads in both for batch, context in sizes]
    ragged = [Shape(heads, 128, 8192, ragged=True) for heads in both]
    odd = [Shape(16, 64, 4096), Shape(64, 64, 4096), Shape(128, 64, 4096)]
    odd += [Shape(heads, 64, 4096) for heads in (6, 8, 20, 32)]
    odd += [Shape(heads, 64, 4096, rank=rank) for heads in both for rank in (256, 384)]
    odd += [Shape(heads, 64, 4096, rope=32) for heads in both]
    odd += [Shape(heads, 64, 4096, queries=queries) for heads in both for queries in (2, 3, 4)]
    return {
        "decode": [*plain, Shape(128, 64, 4096, queries=2)],
        "ragged": ragged,
        "paged": [replace(shape, paged=True) for shape in (*plain, *ragged)],
        "odd": odd,
    }[part]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call: latent [B, T, C] and rope_key [B, T, R], and the same rows in pages behind a table."""

    q_latent: Tensor
    q_rope: Tensor
    latent: Tensor
    rope_key: Tensor
    positions: Tensor
    table: Tensor

    def lengths(self) -> Tensor:
        return self.positions[:, -1] + 1

    def pages(self) -> tuple[Tensor, Tensor]:
        return self.latent.view(-1, PAGE, self.latent.shape[2]), self.rope_key.view(-1, PAGE, self.rope_key.shape[2])


def draw(shape: Shape) -> Inputs:
    """Random inputs; page numbers are a random permutation, so a paged call sees the rows in another order."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    tokens = (shape.batch, shape.queries, shape.heads)
    ends = torch.full((shape.batch,), shape.context, device="cuda")
    if shape.ragged:
        ends = torch.randint(shape.queries, shape.context + 1, (shape.batch,), device="cuda")
        ends[0] = shape.context
    return Inputs(
        torch.randn(*tokens, shape.rank, **options) * 0.3,
        torch.randn(*tokens, shape.rope, **options) * 0.3,
        torch.randn(shape.batch, shape.context, shape.rank, **options),
        torch.randn(shape.batch, shape.context, shape.rope, **options),
        ends[:, None] - shape.queries + torch.arange(shape.queries, device="cuda"),
        torch.randperm(shape.batch * shape.context // PAGE, device="cuda").view(shape.batch, -1).to(torch.int32),
    )


def exact(inputs: Inputs, request: int, paged: bool) -> Tensor:
    """One request in float32."""
    length = int(inputs.lengths()[request])
    latent, rope_key = inputs.latent[request], inputs.rope_key[request]
    if paged:
        latent, rope_key = (pages[inputs.table[request].long()].flatten(0, 1) for pages in inputs.pages())
    latent, rope_key = latent[:length].float(), rope_key[:length].float()
    scores = inputs.q_latent[request].float() @ latent.T + inputs.q_rope[request].float() @ rope_key.T
    hidden = torch.arange(length, device="cuda") > inputs.positions[request][:, None, None]
    return (scores * SCALE).masked_fill(hidden, -torch.inf).softmax(-1) @ latent


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def worst_error(run: Kernel, inputs: Inputs, paged: bool) -> float:
    """Relative to float32, the largest over a few requests; infinite if anything is not finite."""
    with poisoned():
        found = run()
    if not found.isfinite().all():
        return float("inf")
    requests = torch.linspace(0, found.shape[0] - 1, min(CHECKED_REQUESTS, found.shape[0])).long().tolist()
    return max(relative_error(found[request], exact(inputs, request, paged)) for request in requests)


def our_decode(stack: ExitStack, inputs: Inputs, paged: bool, machine: Target) -> Kernel:
    """What the compiler emits for the op; the paged launcher is cut from the same file."""
    queries = (inputs.q_latent, inputs.q_rope)
    if paged:
        text = bundle(KERNELS / machine.name / "mla_attention.py", "paged_mla_attention", {})
        launcher = stack.enter_context(imported(text)).paged_mla_attention
        return partial(launcher, *queries, *inputs.pages(), inputs.table, inputs.positions, SCALE)
    arguments = [*queries, inputs.latent, inputs.rope_key, inputs.positions, SCALE]
    return partial(emitted(stack, "mla_attention", arguments, ["B", "B", "BT", "BT", "B"], machine), *arguments)


def flashinfer_decode(shape: Shape, inputs: Inputs) -> Kernel | None:
    """FlashInfer's paged kernel, its plan made ahead; None where it is not installed or rejects the shape."""
    if (shape.rank, shape.rope) != (512, 64):
        return None
    try:
        import flashinfer
    except ImportError:
        return None
    index: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
        torch.empty(256 << 20, dtype=torch.int8, device="cuda"), backend="fa3"
    )
    lengths, pages = inputs.lengths().to(torch.int32), shape.context // PAGE
    steps = torch.arange(shape.batch + 1, **index)
    wrapper.plan(
        steps * shape.queries, steps * pages, inputs.table.flatten(), lengths, shape.heads, shape.rank, shape.rope,
        PAGE, shape.queries > 1, SCALE, torch.bfloat16, torch.bfloat16,
    )  # fmt: skip
    q_latent, q_rope = inputs.q_latent.flatten(0, 1), inputs.q_rope.flatten(0, 1)
    return partial(wrapper.run, q_latent, q_rope, *inputs.pages(), return_lse=False)


def timed(runs: Sequence[Kernel | None]) -> list[tuple[float, float, float]]:
    """(event to event, queued, chained) of each in microseconds; NaN for what is not there or does not run."""
    times = [(float("nan"),) * 3] * len(runs)
    graphs = {}
    for number, run in enumerate(runs):
        try:
            if run is not None:
                graphs[number] = graphed(run), graphed(run, CHAINED_CALLS)
        except RuntimeError as error:
            print(f"  does not run: {str(error).splitlines()[0][:100]}")
    between = compared_microseconds([replay for replay, _ in graphs.values()])
    for (number, (replay, chain)), once in zip(graphs.items(), between, strict=True):
        times[number] = once, queued_microseconds(replay), queued_microseconds(chain) / CHAINED_CALLS
    return times


def time_decode(shape: Shape, machine: Target, bandwidth: float, flops: float) -> dict[str, Any]:
    inputs = draw(shape)
    rows, cached = shape.queries * shape.heads, int(inputs.lengths().sum())
    moved = 2 * (cached * (shape.rank + shape.rope) + shape.batch * rows * (2 * shape.rank + shape.rope))
    work = 2 * cached * rows * (2 * shape.rank + shape.rope)
    with ExitStack() as stack:
        ours = our_decode(stack, inputs, shape.paged, machine)
        error = worst_error(ours, inputs, shape.paged)
        ours_times, peer_times = timed([ours if error <= TOLERANCE else None, flashinfer_decode(shape, inputs)])
    ours_us, ours_queued, ours_chained = ours_times
    peer_us, peer_queued, peer_chained = peer_times
    return asdict(shape) | {
        "floor_us": max(moved / bandwidth, work / flops) * 1e6,
        "peer_us": peer_us,
        "ours_us": ours_us,
        "ratio": ours_us / peer_us,
        "peer_queued": peer_queued,
        "ours_queued": ours_queued,
        "queued_ratio": ours_queued / peer_queued,
        "peer_chained": peer_chained,
        "ours_chained": ours_chained,
        "chained_ratio": ours_chained / peer_chained,
        "TBps": moved / ours_queued / 1e6,
        "TFLOPs": work / ours_queued / 1e6,
        "error": error,
    }


def libraries(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Kernel]:
    """torch's own kernels that take these widths, [1, H, S, width] each."""

    def attend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)

    found = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with suppress(RuntimeError):
            attend(backend)
            found[name] = partial(attend, backend)
    return found


def time_prefill(heads: int, width: int, values: int, length: int, machine: Target, flops: float) -> dict[str, Any]:
    """Causal prefill of one prompt, keys so wide and values; beside the faster of torch's kernels."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    q, k = (torch.randn(1, length, heads, width, **options) for _ in range(2))
    v = torch.randn(1, length, heads, values, **options)
    call = [q, k, v, torch.arange(length, device="cuda")[None], SCALE]
    q_h, k_h, v_h = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    work = heads * length * length * (width + values)
    with ExitStack() as stack:
        ours = partial(emitted(stack, "attention", call, ["BS", "BT", "BT", "BS"], machine), *call)
        with poisoned():
            found = ours()[0, :, :4].transpose(0, 1).float()
        expected = F.scaled_dot_product_attention(
            *(x[0, :4].float() for x in (q_h, k_h, v_h)), is_causal=True, scale=SCALE
        )
        error = relative_error(found, expected)
        peers = libraries(q_h, k_h, v_h)
        runs = [graphed(run) for run in (*peers.values(), ours)]
        *peer_times, ours_us = compared_microseconds(runs, turns=3, repeats=5)
    peer_us, peer = min(zip(peer_times, peers, strict=True))
    return {
        "heads": heads, "widths": f"{width} / {values}", "length": length, "floor_us": work / flops * 1e6, "peer": peer,
        "peer_us": peer_us, "ours_us": ours_us, "ratio": ours_us / peer_us, "peer_TFLOPs": work / peer_us / 1e6,
        "TFLOPs": work / ours_us / 1e6, "error": error,
    }  # fmt: skip


def main() -> None:
    parts = ("decode", "ragged", "paged", "odd", "prefill")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("gpu_attention.json"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    machine = target("sm_90")
    bandwidth, flops = read_speed(), product_speed()
    empty = empty_launch()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "read_TBps": bandwidth / 1e12,
        "bf16_TFLOPs": flops / 1e12,
        "launch_us": microseconds(empty),
        "launch_queued_us": queued_microseconds(empty),
    }
    print({name: round(value, 2) if isinstance(value, float) else value for name, value in report.items()})
    for part in args.only:
        if part == "prefill":
            rows = [time_prefill(*widths, length, machine, flops) for widths in PREFILLS for length in (2048, 8192)]
        else:
            rows = [time_decode(shape, machine, bandwidth, flops) for shape in shapes(part)]
        report[part] = rows
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        print_table(part, rows)


if __name__ == "__main__":
    main()
