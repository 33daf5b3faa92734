"""The expert layer and routing on one Hopper GPU: the emitted kernels beside torch's, in one run, and the floor.

    python benchmarks/gpu_moe.py                        # DeepSeek-V3's shape, 22 GB of weights
    python benchmarks/gpu_moe.py --experts 64 --hidden 2048 --width 1408 --top-k 6 --tokens 1 32
    python benchmarks/gpu_moe.py --dry-run              # writes the kernels and names their launches, without a GPU

Times are medians of CUDA-graph replays between two events; replaying an empty kernel so takes `launch` microseconds,
which every figure contains. Routing is also timed as a chain of 20 in one graph, per launch. The peer is
torch._grouped_mm (sort, gather, two grouped products, weighted un-sort), eager and compiled; the faster one counts.
Floor: the larger of the bytes of the active experts over the bandwidth of reading and the FLOPs over those of a large
product per second, both measured in this run. The error is against float32 products of the same rounded weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from emitted import emitted, operands_of, print_table, relative_error
from timing import empty_launch, graphed, microseconds, product_speed, read_speed
from torch import Tensor

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.emit import write_kernel
from codegen.targets import Target, target

Kernel = Callable[..., Any]

CHAIN = 20
ROUTE = {"scoring": "sigmoid", "group_score": "top2", "masked": -math.inf, "normalise": True, "epsilon": 1e-20}


def fastest(forms: dict[str, Kernel]) -> tuple[float, str]:
    """Microseconds and name of the fastest form that runs."""
    times = {}
    for name, run in forms.items():
        try:
            times[name] = microseconds(graphed(run))
        except RuntimeError as error:
            print(f"  {name} does not run: {str(error).splitlines()[0][:100]}")
    name = min(times, key=times.__getitem__)
    return times[name], name


def grouped_mm(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The layer with torch's grouped product."""
    experts, top_k = gate_up.shape[0], indices.shape[1]
    expert, order = torch.sort(indices.reshape(-1))
    ends = torch.cumsum(torch.histc(expert.int(), bins=experts, min=0, max=experts - 1), 0, dtype=torch.int32)
    gate, up = torch._grouped_mm(x[order // top_k], gate_up.transpose(1, 2), ends).chunk(2, -1)
    y = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), ends) * weights.reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return y[back].view(-1, top_k, x.shape[1]).sum(1).to(x.dtype)


def exact(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The layer in float32."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in indices.unique().tolist():
        token, place = (indices == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ gate_up[expert].float().T).chunk(2, -1)
        y = (F.silu(gate) * up) @ down[expert].float().T
        out.index_add_(0, token, y * weights[token, place].float().unsqueeze(1))
    return out


def time_experts(args: argparse.Namespace, machine: Target, bandwidth: float, flops: float) -> list[dict[str, Any]]:
    experts, hidden, width, top_k = args.experts, args.hidden, args.width, args.top_k
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    gate_up = torch.empty(experts, 2 * width, hidden, **options).normal_(0, 0.02)
    down = torch.empty(experts, hidden, width, **options).normal_(0, 0.02)
    rows = []
    for tokens in args.tokens:
        x = torch.randn(tokens, hidden, **options)
        indices = torch.rand(tokens, experts, device="cuda").topk(top_k, -1).indices
        weights = torch.rand(tokens, top_k, device="cuda")
        call = [x, indices, weights, gate_up, down]
        active = indices.unique().numel()
        weight_bytes, work = active * 3 * width * hidden * 2, 6 * tokens * top_k * width * hidden
        forms: dict[str, Kernel] = {"eager": partial(grouped_mm, *call)}
        if not args.eager_only:
            forms["compiled"] = partial(torch.compile(grouped_mm, dynamic=False), *call)
        peer, form = fastest(forms)
        with ExitStack() as stack:
            ours = emitted(stack, "routed_swiglu", call, ["N"] * 3, machine)
            time = microseconds(graphed(partial(ours, *call)))
            error = relative_error(ours(*call), exact(*call))
        floor = max(weight_bytes / bandwidth, work / flops) * 1e6
        rows.append(
            {"tokens": tokens, "active": active, "floor_us": floor, "peer_us": peer, "peer": form, "ours_us": time,
             "TBps": weight_bytes / time / 1e6, "TFLOPs": work / time / 1e6, "peer_TFLOPs": work / peer / 1e6,
             "error": error}
        )  # fmt: skip
        torch.compiler.reset()
    return rows


def time_routing(args: argparse.Namespace, machine: Target) -> list[dict[str, Any]]:
    rows = []
    for tokens in args.route_tokens:
        logits = torch.randn(tokens, args.experts, device="cuda")
        bias = torch.randn(args.experts, device="cuda") / 10
        settings = (args.top_k, args.groups, args.top_groups)
        call = [logits, bias, ROUTE["scoring"], *settings, *list(ROUTE.values())[1:], 2.5, 0]
        forms: dict[str, Kernel] = {"eager": partial(torch.ops.dsv3.route, *call)}
        if not args.eager_only:
            forms["compiled"] = partial(torch.compile(torch.ops.dsv3.route, dynamic=False), *call)
        peer, form = fastest(forms)
        with ExitStack() as stack:
            ours = emitted(stack, "route", call, ["N"], machine)
            once = microseconds(graphed(partial(ours, *call)))
            chained = microseconds(graphed(partial(ours, *call), CHAIN)) / CHAIN
            (indices, weights), (expected, expected_weights) = ours(*call), torch.ops.dsv3.route(*call)
        rows.append(
            {"tokens": tokens, "peer_us": peer, "peer": form, "ours_us": once, "ours_chained_us": chained,
             "same_experts": torch.equal(indices, expected), "error": relative_error(weights, expected_weights)}
        )  # fmt: skip
        torch.compiler.reset()
    return rows


def dry_run(args: argparse.Namespace, machine: Target) -> None:
    """Print what a layer of these sizes would launch."""
    with torch.device("meta"):
        x, gate_up = torch.empty(1, args.hidden), torch.empty(args.experts, 2 * args.width, args.hidden)
        down, logits = torch.empty(args.experts, args.hidden, args.width), torch.empty(1, args.experts)
        indices, weights = torch.empty(1, args.top_k, dtype=torch.int64), torch.empty(1, args.top_k)
        bias = torch.empty(args.experts)
    experts = [one.bfloat16() for one in (x, gate_up, down)]
    settings = (ROUTE["scoring"], args.top_k, args.groups, args.top_groups, *list(ROUTE.values())[1:], 2.5, 0)
    for op, free, call in (
        ("routed_swiglu", ["N"] * 3, [experts[0], indices, weights, *experts[1:]]),
        ("route", ["N"], [logits, bias, *settings]),
    ):
        kernel = write_kernel(op, operands_of(call, free), machine)
        print(f"{kernel.name}: {', '.join(launch.kernel for launch in kernel.launches)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--width", type=int, default=2048, help="of one expert")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--top-groups", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 512, 2048, 4096])
    parser.add_argument("--route-tokens", type=int, nargs="+", default=[1, 64, 4096])
    parser.add_argument("--eager-only", action="store_true", help="do not compile the peer")
    parser.add_argument("--dry-run", action="store_true", help="write the kernels and name their launches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("gpu_moe.json"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    machine = target("sm_90")
    if args.dry_run:
        dry_run(args, machine)
        return
    bandwidth, flops = read_speed(), product_speed()
    launch = microseconds(empty_launch())
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "read_TBps": bandwidth / 1e12,
        "bf16_TFLOPs": flops / 1e12,
        "launch_us": launch,
        "experts": time_experts(args, machine, bandwidth, flops),
        "routing": time_routing(args, machine),
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{report['gpu']}: reading {bandwidth / 1e12:.2f} TB/s, bf16 {flops / 1e12:.0f} TFLOP/s, launch {launch:.1f} us"
    )
    print_table(f"{args.experts} experts of {args.hidden} x {args.width}, top-{args.top_k}", report["experts"])
    print_table("routing", report["routing"])


if __name__ == "__main__":
    main()
