"""A whole decode step on one GPU: the compiled graphs with random weights in one CUDA graph, and where the time goes.

    python benchmarks/gpu_decode.py                                          # DeepSeek-V2-Lite, context 2048
    python benchmarks/gpu_decode.py --model deepseek-v3 --layers 4 --dense 1 --context 4096 --batch 1 32 128
    python benchmarks/gpu_decode.py --model toy --target cpu --context 64    # the same path without a GPU

The model is compiled without weights; every bound tensor is then drawn at random on the device, so routing is close
to uniform. A step is embedding, every layer, head and the most likely token. Times are medians of CUDA-graph replays
(of plain calls on the CPU). Floor: the weights a step must read (of the experts, as many as uniform routing chooses on
average) and the cached context, over the bandwidth of a copy measured in the same run. With --peer, transformers with
a StaticCache under torch.compile in a CUDA graph runs beside it, with the faster of its grouped expert forms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_compile.artifact import Artifact, Port
from dsv3_compile.driver import build
from dsv3_compile.loading import load_graph
from dsv3_compile.options import Options
from dsv3_compile.packaging import write_artifact
from model_def.config import ModelConfig
from model_def.presets import PRESETS

Step = Callable[[], Tensor]

REPEATS = 20
HEAD_ROOM = 64  # cache rows behind the context


def compiled(config: ModelConfig, target: str, batch: int, length: int, folder: Path) -> tuple[Artifact, float]:
    """An artifact without weights, and the seconds it took."""
    begin = time.perf_counter()
    options = Options(target=target, max_batch=batch, max_length=length, no_weights=True, verify=False)
    program = build(config, options)
    passes = [record.spec for record in program.records["embed", "prefill"]]
    artifact = write_artifact(program, folder, passes=passes, max_batch=batch, max_length=length)
    return artifact, time.perf_counter() - begin


def drawn(port: Port, device: str) -> Tensor:
    """A weight: matrices of deviation fan_in^-1/2, so that nothing saturates; norms around 1, biases around 0."""
    out = torch.empty(tuple(int(size) for size in port.shape), dtype=getattr(torch, port.dtype), device=device)
    if out.dim() > 1:
        return out.normal_(0, out.shape[-1] ** -0.5)
    return out.normal_(0, 0.05).add_(1.0 if "norm" in port.name else 0.0)


class Decoder:
    """The decode graphs of an artifact, with random weights."""

    def __init__(self, artifact: Artifact, device: str) -> None:
        manifest, self.device = artifact.manifest, device
        self.steps = [(step.block, manifest.graphs[step.block]["decode"]) for step in manifest.schedule]
        self.functions = {block: load_graph(artifact.path(entry.source)) for block, entry in self.steps}
        self.weights = [
            {port.name: drawn(port, device) for port in entry.inputs if port.role == "weight"}
            for _, entry in self.steps
        ]

    def start(self, batch: int, context: int, vocabulary: int) -> None:
        """A batch of random tokens behind random contexts, all of one length."""
        self.values = {
            "input_ids_BS": torch.randint(0, vocabulary, (batch, 1), device=self.device),
            "positions_BS": torch.full((batch, 1), context, device=self.device),
        }
        sizes = {"B": batch, "T": context + HEAD_ROOM}
        self.caches = [
            {
                port.name: torch.randn(
                    [sizes[size] if isinstance(size, str) else size for size in port.shape],
                    dtype=getattr(torch, port.dtype),
                    device=self.device,
                )
                for port in entry.inputs
                if port.role == "cache"
            }
            for _, entry in self.steps
        ]

    def step(self) -> Tensor:
        """The next token of every row, int64 [B]."""
        values = dict(self.values)
        for (block, entry), weights, cache in zip(self.steps, self.weights, self.caches, strict=True):
            known = {**weights, **cache, **values}
            outputs = self.functions[block](*[known[port.name] for port in entry.inputs])
            names = ("x_BSD", "cos_BSF", "sin_BSF") if block == "embed" else ("x_BSD",)
            values.update(zip(names, outputs, strict=False))  # the caches are written in place
        return values["x_BSD"].argmax(-1).flatten()

    def bytes_read(self, config: ModelConfig, batch: int, context: int) -> float:
        """What a step must read: active weights once, and the cached context of every row."""
        experts, top_k = config.n_routed_experts or 1, config.num_experts_per_tok or 1
        active = 1 - (1 - top_k / experts) ** batch
        total = 0.0
        for (block, _), weights in zip(self.steps, self.weights, strict=True):
            for tensor in weights.values():
                share = active if tensor.dim() == 3 and tensor.shape[0] == config.n_routed_experts else 1.0
                total += 0.0 if block == "embed" else share * tensor.numel() * tensor.element_size()
        rows = sum(cache[name][0, 0].numel() * cache[name].element_size() for cache in self.caches for name in cache)
        return total + float(rows) * batch * context


def graphed(step: Step) -> Step:
    """The step as a CUDA graph's replay; on the CPU the step itself."""
    if not torch.cuda.is_available():
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def milliseconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median between device events, or of a clock on the CPU."""
    for _ in range(3):
        run()
    return statistics.median(_once(run) for _ in range(repeats))


def _once(run: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    events[0].record()
    run()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1])


def bandwidth(device: str) -> float:
    """Bytes per second of a copy, reads and writes counted."""
    source = torch.ones((2 << 30) if device == "cuda" else (1 << 26), dtype=torch.int8, device=device)
    copy = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: copy.copy_(source)) * 1e3


def breakdown(run: Step, replays: int = 5) -> Iterator[dict[str, Any]]:
    """Kernels of a step by the time they are resident; kernels that overlap count twice."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            run()
        torch.cuda.synchronize()
    found = [event for event in profiler.key_averages() if event.device_time_total > 0]
    for event in sorted(found, key=lambda event: -event.device_time_total):
        yield {"kernel": event.key, "launches": event.count / replays, "us": event.device_time_total / replays}


def peer_milliseconds(config: ModelConfig, batch: int, context: int) -> float:
    """transformers with a StaticCache, compiled, in a CUDA graph."""
    import transformers
    from transformers import StaticCache

    family = "DeepseekV2" if config.model_type == "deepseek_v2" else "DeepseekV3"
    fields = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    for name in ("model_type", "attention", "rope_theta", "rope_scaling", "quantization", "torch_dtype"):
        fields.pop(name, None)
    hf = getattr(transformers, f"{family}Config")(**fields, attn_implementation="sdpa")
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(hf).to(torch.bfloat16)
    model.to_empty(device="cuda").eval()
    for tensor in model.parameters():
        tensor.data.normal_(0, 0.02)
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(hf)
            module.inv_freq = module.original_inv_freq = fresh.inv_freq.to("cuda")
    ids = torch.randint(0, hf.vocab_size, (batch, 1), device="cuda")
    positions = torch.full((batch, 1), context, device="cuda")
    times = []
    for experts in ("batched_mm", "grouped_mm") if batch == 1 else ("grouped_mm",):
        torch.compiler.reset()
        model.set_experts_implementation(experts)
        cache = StaticCache(config=hf, max_cache_len=context + HEAD_ROOM)

        def step(run: Callable[..., Any], cache: Any = cache) -> Tensor:
            with torch.no_grad():
                return run(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits

        step(model)  # allocates the cache outside of any graph
        run = torch.compile(model.forward, fullgraph=True)
        times.append(milliseconds(graphed(lambda run=run, step=step: step(run))))  # type: ignore[misc]
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-v2-lite", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, help="keep this many layers")
    parser.add_argument("--dense", type=int, help="of which dense")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--peer", action="store_true", help="run transformers beside it")
    parser.add_argument("--json", type=Path, default=Path("gpu_decode.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[args.model], num_nextn_predict_layers=0, quantization=None)
    if args.layers:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    if args.dense is not None:
        config = dataclasses.replace(config, first_k_dense_replace=args.dense)
    device = "cpu" if args.target == "cpu" else "cuda"
    report: dict[str, Any] = {"model": args.model, "layers": config.num_hidden_layers, "target": args.target}
    report |= {"torch": torch.__version__, "copy_TBps": bandwidth(device) / 1e12, "rows": []}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        length = args.context + HEAD_ROOM
        path = Path(folder) / "artifact"
        artifact, report["compile_s"] = compiled(config, args.target, max(args.batch), length, path)
        decoder = Decoder(artifact, device)
        for batch in args.batch:
            decoder.start(batch, args.context, config.vocab_size)
            run = graphed(decoder.step)
            took = milliseconds(run)
            floor = decoder.bytes_read(config, batch, args.context) / report["copy_TBps"] / 1e9
            row = {"batch": batch, "context": args.context, "ms": took, "floor_ms": floor}
            row["tokens_per_s"] = batch * 1e3 / took
            if device == "cuda":
                row["memory_GB"] = torch.cuda.max_memory_allocated() / 1e9
                row["kernels"] = list(breakdown(run))
            report["rows"].append(row)
        del decoder
    if args.peer:
        for row in report["rows"]:
            row["peer_ms"] = peer_milliseconds(config, row["batch"], args.context)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    head = f"{args.model}, {config.num_hidden_layers} layers; compiled in {report['compile_s']:.1f} s"
    print(f"{head}; copy {report['copy_TBps']:.2f} TB/s")
    for row in report["rows"]:
        line = (
            f"batch {row['batch']:4d}  context {row['context']}  {row['ms']:8.3f} ms  floor {row['floor_ms']:7.3f} ms"
        )
        peer = f"  peer {row['peer_ms']:.3f} ms" if args.peer else ""
        print(f"{line}  {row['tokens_per_s']:8.0f} tok/s{peer}")
        for kernel in row.get("kernels", [])[:12]:
            print(f"    {kernel['us']:9.1f} us  x{kernel['launches']:5.1f}  {kernel['kernel'][:70]}")


if __name__ == "__main__":
    main()
