"""ONNX Runtime decode on the CPU: our export beside torch.onnx.export of the transformers model, in one run.

    python benchmarks/onnx_decode.py           # 8 layers, hidden 512, 16 experts, context 2048, batch 1

Both come from the same random checkpoint, start at the same prompt, decode the same tokens and are timed in
turns. transformers is exported with each implementation of its experts that torch.onnx.export takes; the fastest
counts. The table says median milliseconds per token and how often ours fits into it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from cpu_decode import CONFIG, random_model
from torch import Tensor, nn
from transformers import DynamicCache

import dsv3_compile as dsv3

OURS, CONTRIB, PEER = "dsv3-compile", "dsv3-compile --contrib", "transformers, torch.onnx.export"
EXPERTS = ("grouped_mm", "batched_mm", "eager")
WARM_UP = 3  # steps

Step = Callable[[int, int], np.ndarray]  # token, position → logits [1, 1, V]


class DecodeStep(nn.Module):
    """transformers' model with its cache as plain tensors: per layer latent and rope key."""

    def __init__(self, experts: str) -> None:
        super().__init__()
        self.model = random_model()
        self.model.set_experts_implementation(experts)

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = DynamicCache(ddp_cache_data=list(zip(past[::2], past[1::2], strict=True)), config=CONFIG)
        logits = self.model(input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True).logits
        return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def stepper(running: onnxruntime.InferenceSession, past: list[np.ndarray]) -> Step:
    names = [one.name for one in running.get_inputs()]

    def step(token: int, position: int) -> np.ndarray:
        nonlocal past
        given = [np.array([[token]]), np.array([[position]]), *past]
        logits, *past = running.run(None, dict(zip(names, given, strict=True)))
        return logits

    return step


def ours(prompt: np.ndarray, folder: Path, threads: int, contrib: bool) -> Step:
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        random_model().save_pretrained(checkpoint)
    exported = dsv3.export_onnx(
        checkpoint, folder / f"onnx_{contrib}", contrib=contrib, max_length=2 * prompt.shape[1], verify=False
    )
    prefill = session(exported.model("prefill"), threads)
    feeds = {"input_ids": prompt, "position_ids": np.arange(prompt.shape[1])[None]}
    for one in prefill.get_inputs()[2:]:
        feeds[one.name] = np.zeros((1, 0, one.shape[2]), np.float32)
    return stepper(session(exported.model("decode"), threads), prefill.run(None, feeds)[1:])


def peer(prompt: np.ndarray, folder: Path, threads: int, experts: str) -> Step:
    module = DecodeStep(experts).eval()
    token, position = torch.tensor([[1]]), torch.tensor([[7]])
    example = [torch.randn(1, 1, 7, w) for _ in range(CONFIG.num_hidden_layers) for w in (512, 64)]
    length = torch.export.Dim("past", min=1, max=1 << 20)
    path = folder / f"{experts}.onnx"
    with contextlib.redirect_stdout(io.StringIO()):  # progress
        torch.onnx.export(
            module,
            (token, position, example),
            path,
            dynamo=True,
            opset_version=23,
            external_data=True,
            dynamic_shapes=({}, {}, [{2: length} for _ in example]),
        )
    cache = DynamicCache(config=CONFIG)
    with torch.no_grad():
        module.model(torch.from_numpy(prompt), past_key_values=cache, logits_to_keep=1)
    past = [tensor.numpy() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return stepper(session(path, threads), past)


def peers(prompt: np.ndarray, folder: Path, threads: int) -> dict[str, Step]:
    """By name, those whose export succeeds."""
    found = {}
    for experts in EXPERTS:
        say(f"exporting transformers with {experts} experts")
        try:
            found[f"{PEER} ({experts})"] = peer(prompt, folder, threads, experts)
        except Exception as error:  # the exporter and the runtime raise errors of many kinds
            say(f"  failed: {str(error).splitlines()[0][:150]}")
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048, help="tokens before the first timed step")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there")
    chosen = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, chosen.context + WARM_UP + chosen.steps)
    prompt = tokens[None, : chosen.context]
    with tempfile.TemporaryDirectory() as scratch:
        say("exporting ours")
        given = prompt, Path(scratch), chosen.threads
        steps = {OURS: ours(*given, contrib=False), CONTRIB: ours(*given, contrib=True), **peers(*given)}
        times: dict[str, list[float]] = {name: [] for name in steps}
        logits: dict[str, np.ndarray] = {}
        for position in range(chosen.context, len(tokens)):
            for name, step in steps.items():
                start = time.perf_counter()
                logits[name] = step(int(tokens[position]), position)
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(taken[WARM_UP:]) for name, taken in times.items()}
    rows = {
        name: {
            "milliseconds_per_token": median,
            "tokens_per_second": 1e3 / median,
            "ours_is_faster_by": median / medians[OURS],
            "logit_error": float(np.abs(logits[name] - logits[OURS]).max() / np.abs(logits[OURS]).max()),
        }
        for name, median in medians.items()
    }
    print(f"context {chosen.context}, batch 1, {chosen.threads} threads, onnxruntime {onnxruntime.__version__}")
    for name, row in rows.items():
        print(
            f"{name:<46}{row['milliseconds_per_token']:9.2f} ms/token  {row['ours_is_faster_by']:6.1f} x"
            f"   difference {row['logit_error']:.0e}"
        )
    document: dict[str, object] = {"context": chosen.context, "threads": chosen.threads, "runs": rows}
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")
    return document


if __name__ == "__main__":
    main()
