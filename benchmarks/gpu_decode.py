"""A whole decode step on one GPU: the compiled graphs with random weights in one CUDA graph, and where the time goes.

    python benchmarks/gpu_decode.py --peer                                   # DeepSeek-V2-Lite, context 2048
    python benchmarks/gpu_decode.py --model deepseek-v3 --layers 4 --dense 1 --context 4096 --batch 1 32 128
    python benchmarks/gpu_decode.py --model toy --target cpu --context 64    # the same path without a GPU
    python benchmarks/gpu_decode.py --dry-run                                # what sm_90 would launch, without a GPU

The model is compiled without weights; every bound tensor is then drawn at random on the device, and some experts are
chosen far more often than others. A step is embedding, every layer, head and the most likely token. Times are medians
of CUDA-graph replays (of plain calls on the CPU). Floor: the weights a step must read (of the experts, those that this
step's tokens chose) and the cached context, over the bandwidth of reading, measured in the same run. With --peer,
transformers with a StaticCache under torch.compile runs beside it, with the faster of its grouped expert forms: in
a CUDA graph, and `called`, kernel by kernel; compiling it takes half a minute a batch. `memory` is the most that was
allocated, beside weights and cached context. `error`: every distinct block's kernels against the references of the
vocabulary on the same inputs and with the same experts, the largest relative error; `rerouted`: tokens that the
references' own routers would have sent to other experts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_models import BACKENDS, bytes_read, compiled, drawn, peer_model, tell_fallback
from routes import forced, rerouted, watched
from timing import breakdown, graphed, milliseconds, read_speed
from torch import Tensor

from dsv3_compile.artifact import Artifact
from dsv3_compile.loading import load_graph
from model_def.config import ModelConfig
from model_def.presets import PRESETS

Step = Callable[[], Tensor]

HEAD_ROOM = 64  # cache rows behind the context


class Decoder:
    """The decode graphs of an artifact, with random weights."""

    def __init__(self, artifact: Artifact, device: str) -> None:
        self.artifact, manifest, self.device = artifact, artifact.manifest, device
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

    def chosen_experts(self) -> list[int]:
        """How many experts every layer that routes needs for this batch, shared ones included."""
        with watched(self.functions.values()) as routes:
            self.step()
        return [indices.unique().numel() for indices, _ in routes]

    def bytes_read(self, batch: int, context: int) -> float:
        """What a step must read: the weights that its tokens need once, and the cached context of every row."""
        weights = bytes_read([block for block, _ in self.steps], self.weights, self.chosen_experts())
        return weights + self.context_bytes(batch, context)

    def context_bytes(self, batch: int, context: int) -> float:
        rows = sum(tensor[0, 0].nbytes for cache in self.caches for tensor in cache.values())
        return float(rows) * batch * context

    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for weights in self.weights for tensor in weights.values())

    def errors(self) -> tuple[dict[str, float], int]:
        """Per block, how far its kernels are from the references in the same graph, on the same random inputs; and how
        many tokens the references would have sent to other experts: they are given the kernels' choice, since rounding
        decides between experts whose scores are close."""
        found, others = {}, 0
        for (block, entry), weights, cache in zip(self.steps, self.weights, self.caches, strict=True):
            if block in found:
                continue
            known = {**weights, **self.values}
            for port in entry.inputs:
                if port.name not in known:
                    size = [len(self.values["input_ids_BS"]) if s == "B" else s for s in port.shape]
                    known[port.name] = (
                        cache[port.name]
                        if port.role == "cache"
                        else torch.randn(size, dtype=getattr(torch, port.dtype), device=self.device)
                    )

            def outputs(run: Callable[..., Any], known: dict[str, Tensor] = known, entry: Any = entry) -> Any:
                return run(*[known[p.name].clone() if p.role == "cache" else known[p.name] for p in entry.inputs])

            kernels, expected = self.functions[block], references(self.artifact.path(entry.source))
            with watched([kernels]) as routes:
                ours = outputs(kernels)
            with forced([expected], routes) as own:
                theirs = outputs(expected)
            others += rerouted(routes, own)
            pairs = [(one.double(), other.double()) for one, other in zip(ours, theirs, strict=True)]
            found[block] = max(float((one - other).norm() / other.norm()) for one, other in pairs)
        return found, others


def references(path: Path) -> Callable[..., Any]:
    """The function of a graph file with the vocabulary's references in place of the kernels."""
    text = re.sub(r"from \.\.kernels\.\S+ import (\w+) as (\w+)", r"\2 = torch.ops.dsv3.\1", path.read_text())
    names: dict[str, Any] = {}
    exec(compile(text, str(path), "exec"), names)
    return names["run"]  # type: ignore[no-any-return]


def peer_milliseconds(
    config: ModelConfig, batch: int, context: int, backends: Sequence[str], forms: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """transformers with a StaticCache, compiled, by backend: in a CUDA graph and called, with the fastest of the expert
    forms of each, and the logits' largest distance from the eager model's, relative."""
    from transformers import StaticCache

    model, hf = peer_model(config)
    ids = torch.randint(0, hf.vocab_size, (batch, 1), device="cuda")
    positions = torch.full((batch, 1), context, device="cuda")
    for backend in backends:
        replayed, called, errors = [], [], []
        for experts in forms if batch == 1 else ("grouped_mm",):
            torch.compiler.reset()
            model.set_experts_implementation(experts)
            cache = StaticCache(config=hf, max_cache_len=context + HEAD_ROOM)

            def step(run: Callable[..., Any], cache: Any = cache) -> Tensor:
                with torch.no_grad():
                    return run(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits

            expected = step(model).double()  # allocates the cache outside of any graph
            run = torch.compile(model.forward, fullgraph=True, backend=BACKENDS[backend])
            cache.reset()
            errors.append(float((step(run).double() - expected).norm() / expected.norm()))
            tell_fallback(backend)
            once = partial(step, run)
            called.append(milliseconds(once))
            cache.reset()
            replayed.append(milliseconds(graphed(once)))
        yield backend, {"ms": min(replayed), "called_ms": min(called), "error": max(errors)}


def launches(artifact: Artifact) -> Iterator[str]:
    """Per block: what its decode graph calls, in order, views left out."""
    for block, phases in artifact.manifest.graphs.items():
        text = artifact.path(phases["decode"].source).read_text()
        called = re.findall(r"= (\w+_kernel(?:_\d+)?|(?:aten|dsv3)\.\w+)", text.split("def run(")[1])
        views = ("reshape", "flatten", "unflatten", "slice", "split_with_sizes", "sym_size", "permute", "unsqueeze")
        yield f"{block}: {', '.join(one for one in called if one.removeprefix('aten.') not in views)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-v2-lite", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, help="keep this many layers")
    parser.add_argument("--dense", type=int, help="of which dense")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--target", default="sm_90")
    parser.add_argument(
        "--peer", nargs="*", choices=BACKENDS, help="run transformers beside it, compiled by these backends"
    )
    forms = ("batched_mm", "grouped_mm")
    parser.add_argument("--experts", nargs="+", choices=forms, default=forms, help="forms of transformers' experts")
    parser.add_argument("--dry-run", action="store_true", help="compile, and print what a step would launch")
    parser.add_argument("--trace", type=Path, help="where the kernels of every batch go as a Chrome trace, by batch")
    parser.add_argument("--json", type=Path, default=Path("gpu_decode.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[args.model], num_nextn_predict_layers=0, quantization=None)
    if args.layers:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    if args.dense is not None:
        config = dataclasses.replace(config, first_k_dense_replace=args.dense)
    length = args.context + HEAD_ROOM
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            artifact, seconds = compiled(config, args.target, max(args.batch), length, Path(folder) / "artifact")
            print(f"{args.model} for {args.target}: compiled in {seconds:.1f} s", *launches(artifact), sep="\n")
        return
    device = "cpu" if args.target == "cpu" else "cuda"
    report: dict[str, Any] = {"model": args.model, "layers": config.num_hidden_layers, "target": args.target}
    report |= {"torch": torch.__version__, "read_TBps": read_speed(device) / 1e12, "rows": []}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "artifact"
        artifact, report["compile_s"] = compiled(config, args.target, max(args.batch), length, path)
        head = f"{args.model}, {config.num_hidden_layers} layers; compiled in {report['compile_s']:.1f} s"
        print(f"{head}; reading {report['read_TBps']:.2f} TB/s", flush=True)
        decoder = Decoder(artifact, device)
        for batch in args.batch:
            decoder.start(batch, args.context, config.vocab_size)
            errors, others = decoder.errors()
            floor = decoder.bytes_read(batch, args.context) / report["read_TBps"] / 1e9
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            run = graphed(decoder.step)
            took = milliseconds(run)
            row = {"batch": batch, "context": args.context, "ms": took, "floor_ms": floor}
            row |= {"errors": errors, "rerouted": others}
            row["tokens_per_s"] = batch * 1e3 / took
            if device == "cuda":
                row["memory_GB"] = torch.cuda.max_memory_allocated() / 1e9
                must = decoder.weight_bytes() + decoder.context_bytes(batch, length)
                row["must_memory_GB"] = (must + (2 << 30)) / 1e9
                row["kernels"] = list(breakdown(run, args.trace and args.trace.with_stem(f"{args.trace.stem}_{batch}")))
            report["rows"].append(row)
            tell(row)
        del decoder
    if args.peer is not None:
        for row in report["rows"]:
            row["peers"] = {}
            try:
                for backend, found in peer_milliseconds(
                    config, row["batch"], args.context, args.peer or ["inductor"], args.experts
                ):
                    row["peers"][backend] = found
                    said = "{ms:.3f} ms, called {called_ms:.3f}, error {error:.1e}".format(**found)
                    print(f"transformers, {backend}, batch {row['batch']}: {said}", flush=True)
            except (ImportError, RuntimeError) as error:  # not installed; or out of memory, as at large batches
                row["peer"] = str(error).splitlines()[0][:80]
                print(f"transformers, batch {row['batch']}: {row['peer']}", flush=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")


def tell(row: dict[str, Any]) -> None:
    line = f"batch {row['batch']:4d}  context {row['context']}  {row['ms']:8.3f} ms  floor {row['floor_ms']:7.3f} ms"
    if "memory_GB" in row:
        line += f"  memory {row['memory_GB']:.1f} of {row['must_memory_GB']:.1f} GB"
    worst = max(row["errors"], key=row["errors"].__getitem__)
    line += f"  {row['tokens_per_s']:8.0f} tok/s  error {row['errors'][worst]:.1e} ({worst})"
    print(f"{line}  rerouted {row['rerouted']}", flush=True)
    for kernel in row.get("kernels", [])[:12]:
        print(f"    {kernel['us']:9.1f} us  x{kernel['launches']:5.1f}  {kernel['kernel'][:70]}", flush=True)


if __name__ == "__main__":
    main()
