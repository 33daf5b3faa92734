"""Prefill on one GPU, and how long it takes to have a model there: compile, load, first token; beside transformers.

    python benchmarks/gpu_prefill.py --peer                                  # DeepSeek-V2-Lite, 2048 and 8192 tokens
    python benchmarks/gpu_prefill.py --model glm-4.7-flash --layers 4 --peer
    python benchmarks/gpu_prefill.py --model toy --target cpu --lengths 32   # the same path without a GPU

The model is compiled without weights, which are then drawn at random on the device. Prefill fills the caches of one
prompt and gives the logits of its last position, as `generate` does it: every layer over the prompt, of the last one
only what its caches and that position need. It is timed as a CUDA graph: one replay after the other, which brings a
card to its power limit and lowers its clock, and `rested`, each after a pause, as a single prompt finds the card; and
`called`, kernel by kernel. `cold compile` is everything from the config to an artifact, with empty caches; `load to
first token` is a process of its own with empty caches that opens the artifact, loads its graphs, and runs one prefill
and one decode step on weights that are there already. Floor: the larger of the FLOPs of the active weights and of
causal attention over those of a large product, and the bytes of the weights, of experts those that were chosen, over
the bandwidth of reading, both measured in the same run. The peer is transformers under torch.compile; with
--peer inductor dsv3 also under our backend.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from random_models import BACKENDS, bytes_read, compiled, drawn, peer_model, tell_fallback
from routes import watched
from timing import breakdown, graphed, milliseconds, product_speed, read_speed
from torch import Tensor

from dsv3_compile.artifact import FILL, Artifact
from dsv3_compile.loading import load_graph
from model_def.accounting import flops_per_token
from model_def.config import ModelConfig
from model_def.presets import PRESETS
from model_def.specs import GqaSpec, MlaSpec

REST = 0.05  # seconds of pause before a rested replay
ROOM = 64  # positions of the caches until the first decoded token


class Prefill:
    """The graphs of an artifact with random weights, over one prompt."""

    def __init__(self, artifact: Artifact, device: str) -> None:
        manifest, self.device = artifact.manifest, device
        self.artifact, self.functions = artifact, {}
        self.entries = [(step.block, manifest.graphs[step.block]) for step in manifest.schedule]
        self.weights: list[dict[str, Tensor]] = []
        for _, phases in self.entries:
            ports = {port.name: port for entry in phases.values() for port in entry.inputs if port.role == "weight"}
            self.weights.append({name: drawn(port, device) for name, port in ports.items()})

    def load(self) -> None:
        """Make every graph callable."""
        for block, phases in dict(self.entries).items():
            for phase, entry in phases.items():
                self.functions[block, phase] = load_graph(self.artifact.path(entry.source))

    def caches(self, slots: int) -> list[dict[str, Tensor]]:
        """By name, the caches of every block for one row of so many positions."""
        sizes = {"B": 1, "T": slots}
        return [
            {
                port.name: torch.zeros(
                    [sizes.get(size, size) if isinstance(size, str) else size for size in port.shape],
                    dtype=getattr(torch, port.dtype),
                    device=self.device,
                )
                for port in phases["decode"].inputs
                if port.role == "cache"
            }
            for _, phases in self.entries
        ]

    def run(self, ids: Tensor, positions: Tensor, caches: list[dict[str, Tensor]]) -> Tensor:
        """Logits [1, 1, V] behind a prompt, or behind one more token; the caches are written in place."""
        values = {"input_ids_BS": ids, "positions_BS": positions}
        phase, last = "prefill" if ids.shape[1] > 1 else "decode", len(self.entries) - 2
        for number, (weights, cache) in enumerate(zip(self.weights, caches, strict=True)):
            known = {**weights, **cache}
            if number == last and phase == "prefill":
                self.call(number, FILL, {**known, **values})
                # Copied: the kernels' stored code is for tensors that begin where an allocation does.
                values, phase = {name: value[:, -1:].clone() for name, value in values.items()}, "decode"
            names = ("x_BSD", "cos_BSF", "sin_BSF") if number == 0 else ("x_BSD",)
            values.update(zip(names, self.call(number, phase, {**known, **values}), strict=False))
        return values["x_BSD"]

    def weights_read(self, ids: Tensor, positions: Tensor, caches: list[dict[str, Tensor]]) -> float:
        """Bytes of weights that the same must read."""
        with watched(self.functions.values()) as routes:
            self.run(ids, positions, caches)
        chosen = [indices.unique().numel() for indices, _ in routes]
        return bytes_read([block for block, _ in self.entries], self.weights, chosen)

    def call(self, number: int, phase: str, known: dict[str, Tensor]) -> tuple[Tensor, ...]:
        block, phases = self.entries[number]
        return self.functions[block, phase](*[known[port.name] for port in phases[phase].inputs])


def prompt(length: int, vocabulary: int, device: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, vocabulary, (1, length), device=device)
    return ids, torch.arange(length, device=device).unsqueeze(0)


def first_token(folder: Path, device: str) -> dict[str, float]:
    """Seconds to open an artifact, to load its graphs, and to the first decoded token."""
    begin = time.perf_counter()
    artifact = Artifact.open(folder)
    opened = time.perf_counter()
    model = Prefill(artifact, device)
    if device == "cuda":
        torch.cuda.synchronize()
    ready = time.perf_counter()
    model.load()
    loaded = time.perf_counter()
    ids, positions = prompt(32, artifact.manifest.config["vocab_size"], device)
    caches = model.caches(ROOM)
    token = model.run(ids, positions, caches).argmax(-1)
    model.run(token, positions[:, -1:] + 1, caches).argmax(-1).tolist()
    done = time.perf_counter()
    return {"open_s": opened - begin, "load_s": loaded - ready, "first_token_s": done - loaded}


def first_token_of_a_new_process(folder: Path, device: str) -> dict[str, float]:
    """The same in a process whose caches are empty."""
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TRITON_CACHE_DIR": caches}
        command = [sys.executable, __file__, "--first-token", str(folder), "--device", device]
        said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(said.strip().splitlines()[-1]))


def prefill_flops(config: ModelConfig, length: int) -> float:
    """Active weights for every token, and causal attention over keys and values of every head; of the last layer only
    what is cached of every token, and the rest, as the head, for one."""
    *layers, last = config.layers()
    trunk = flops_per_token(dataclasses.replace(config, num_hidden_layers=len(layers))).weights
    head = 2 * config.vocab_size * config.hidden_size
    cached = 2 * config.hidden_size * sum(map(prod, last.attention.cache_widths().values()))
    widths = [spec.attention.heads * sum(head_widths(spec.attention)) for spec in layers]
    one = flops_per_token(config).weights - trunk + head
    return (trunk - head + cached) * length + one + sum(widths) * float(length) ** 2


def head_widths(attention: MlaSpec | GqaSpec) -> tuple[int, int]:
    """Numbers in a key and in a value of one head."""
    if isinstance(attention, GqaSpec):
        return attention.head_dim, attention.head_dim
    return attention.qk_nope_head_dim + attention.qk_rope_head_dim, attention.v_head_dim


def peer_milliseconds(
    config: ModelConfig, length: int, backends: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """transformers over the same prompt, by the backend that compiled it: replayed as a CUDA graph where it can be one,
    and called."""
    model, hf = peer_model(config)
    ids, _ = prompt(length, hf.vocab_size, "cuda")
    model.set_experts_implementation("grouped_mm")
    for backend in backends:
        torch.compiler.reset()
        run = torch.compile(model.forward, backend=BACKENDS[backend])

        def step(run: Callable[..., Any] = run) -> Any:
            with torch.no_grad():
                return run(input_ids=ids, use_cache=True, logits_to_keep=1).logits

        found = {"called": milliseconds(step, 5)}
        tell_fallback(backend)
        try:
            replay = graphed(step)
            found |= {"replayed": milliseconds(replay, 5), "rested": milliseconds(replay, 10, REST)}
        except RuntimeError as error:
            print(f"transformers, {length} tokens, {backend}: no CUDA graph: {str(error).splitlines()[0][:100]}")
        yield backend, found


def timed(
    artifact: Artifact, device: str, lengths: list[int], floor: Callable[[int, float], float]
) -> Iterator[dict[str, Any]]:
    """Milliseconds of a prefill of one prompt of every length. floor: of a length and bytes of weights."""
    model = Prefill(artifact, device)
    model.load()
    for length in lengths:
        ids, positions = prompt(length, artifact.manifest.config["vocab_size"], device)
        arguments = ids, positions, model.caches(length)
        run = partial(model.run, *arguments)
        row: dict[str, Any] = {"length": length, "called_ms": milliseconds(run, 5)}
        row["weight_bytes"] = model.weights_read(*arguments)
        row["floor_ms"] = floor(length, row["weight_bytes"])
        run = graphed(run)
        row |= {"ms": milliseconds(run, 5), "rested_ms": milliseconds(run, 10, REST)}
        if device == "cuda":
            row["kernels"] = list(breakdown(run))
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-v2-lite", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, help="keep this many layers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--target", default="sm_90")
    parser.add_argument(
        "--peer", nargs="*", choices=BACKENDS, help="run transformers beside it, compiled by these backends"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_prefill.json"))
    parser.add_argument("--first-token", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.first_token:
        with torch.no_grad():
            print(json.dumps(first_token(args.first_token, args.device)))
        return
    device = "cpu" if args.target == "cpu" else "cuda"
    config = dataclasses.replace(PRESETS[args.model], num_nextn_predict_layers=0, quantization=None)
    if args.layers:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    report: dict[str, Any] = {"model": args.model, "layers": config.num_hidden_layers, "target": args.target}
    report |= {"torch": torch.__version__, "rows": []}
    report |= {"TFLOPs": product_speed(device) / 1e12, "read_TBps": read_speed(device) / 1e12}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "artifact"
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        artifact, report["compile_s"] = compiled(config, args.target, 1, max(args.lengths), path)
        report |= first_token_of_a_new_process(path, device)
        head = "{model}, {layers} layers: cold compile {compile_s:.1f} s; {TFLOPs:.1f} TFLOP/s, {read_TBps:.2f} TB/s"
        print(head.format(**report), flush=True)
        parts = "open {open_s:.2f} s, graphs {load_s:.2f} s, first token {first_token_s:.2f} s"
        print(f"load to first token, weights excluded: {parts.format(**report)}", flush=True)

        def floor(length: int, weight_bytes: float) -> float:
            computing = prefill_flops(config, length) / report["TFLOPs"] / 1e9
            return max(computing, weight_bytes / report["read_TBps"] / 1e9)

        for row in timed(artifact, device, args.lengths, floor):
            report["rows"].append(row)
            tell(row)
    if args.peer is not None:
        for row in report["rows"]:
            row["peers"] = {}
            try:
                for backend, found in peer_milliseconds(config, row["length"], args.peer or ["inductor"]):
                    row["peers"][backend] = found
                    said = ", ".join(f"{how} {ms:.2f} ms" for how, ms in found.items())
                    print(f"transformers, {backend}, 1 x {row['length']}: {said}", flush=True)
            except (ImportError, RuntimeError) as error:
                row["peer"] = str(error).splitlines()[0][:80]
                print(f"transformers, 1 x {row['length']}: {row['peer']}", flush=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")


def tell(row: dict[str, Any]) -> None:
    line = f"1 x {row['length']:5d}  {row['ms']:9.2f} ms, rested {row['rested_ms']:.2f}, called {row['called_ms']:.2f}"
    print(f"{line}  floor {row['floor_ms']:9.2f} ms", flush=True)
    for kernel in row.get("kernels", [])[:12]:
        print(f"    {kernel['us']:9.1f} us  x{kernel['launches']:5.1f}  {kernel['kernel'][:70]}", flush=True)


if __name__ == "__main__":
    main()
