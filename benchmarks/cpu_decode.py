"""Decode on the CPU: artifact and torch.compile backend beside transformers, eager and under Inductor, in one run.

    python benchmarks/cpu_decode.py            # 8 layers, hidden 512, 16 experts, context 2048, batch 1

All of them start from the same random checkpoint and the same prompt, decode the same tokens, and are timed in
turns, so that a busy machine slows them alike. A peer is run with each of its expert implementations; its
fastest counts. The table says median milliseconds per token and how often ours fits into it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import Cache, DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, StaticCache

import dsv3_compile as dsv3

CONFIG = DeepseekV3Config(
    vocab_size=4096,
    hidden_size=512,
    num_hidden_layers=8,
    first_k_dense_replace=1,
    intermediate_size=1408,
    moe_intermediate_size=256,
    num_attention_heads=8,
    num_key_value_heads=8,
    q_lora_rank=384,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    max_position_embeddings=163840,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
)
OURS, EAGER, COMPILED = "dsv3-compile", "transformers eager", "transformers + torch.compile"
BACKEND = 'transformers + torch.compile(backend="dsv3")'
EXPERTS = {
    EAGER: ("eager", "batched_mm", "grouped_mm"),
    COMPILED: ("batched_mm", "grouped_mm"),  # the eager loop over experts is no single graph
    BACKEND: ("batched_mm", "grouped_mm"),
}
PREPARE = {
    EAGER: lambda *given: eager(*given),
    COMPILED: lambda *given: compiled("inductor", *given),
    BACKEND: lambda *given: compiled("dsv3", *given),
}
WARM_UP = 3  # steps; the first ones of a compiled peer are its compilation

Step = Callable[[Tensor], Tensor]  # int64 [1, 1] → logits [1, 1, V]


def random_model(seed: int = 0) -> DeepseekV3ForCausalLM:
    """Matrices of deviation fan_in^-1/2, so that routing and attention are neither flat nor saturated."""
    model = DeepseekV3ForCausalLM._from_config(CONFIG, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def ours(prompt: Tensor, steps: int, scratch: Path) -> Step:
    random_model().save_pretrained(scratch / "checkpoint")
    dsv3.compile(
        scratch / "checkpoint",
        output=scratch / "artifact",
        target="cpu",
        aot=True,
        max_batch=1,
        max_length=prompt.shape[1] + steps,
    )
    model = dsv3.load(scratch / "artifact")
    _, cache = model.prefill(prompt)
    return lambda token: model.decode(token, cache)[0]


def peer(prompt: Tensor, cache: Cache, experts: str) -> DeepseekV3ForCausalLM:
    """A model that has read the prompt, and decodes with the given expert implementation."""
    model = random_model()
    model.set_experts_implementation("eager")  # batched_mm copies the experts of every token of a prompt
    model(prompt, past_key_values=cache, logits_to_keep=1)
    model.set_experts_implementation(experts)
    return model


def eager(prompt: Tensor, steps: int, experts: str) -> Step:
    """A cache that grows takes any number of steps."""
    cache = DynamicCache(config=CONFIG)
    model = peer(prompt, cache, experts)
    return lambda token: model(token, past_key_values=cache).logits


def compiled(backend: str, prompt: Tensor, steps: int, experts: str) -> Step:
    """The whole decode step as one compiled graph over a static cache."""
    length = prompt.shape[1]
    cache = StaticCache(config=CONFIG, max_cache_len=length + steps)
    model = peer(prompt, cache, experts)
    forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    position = torch.tensor([[length]])

    def step(token: Tensor) -> Tensor:
        logits = forward(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        position.add_(1)
        return logits

    return step


def measure(step_functions: dict[str, Step], tokens: Tensor) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Milliseconds of every step after the warm-up, and the logits of the last one."""
    times: dict[str, list[float]] = {name: [] for name in step_functions}
    logits = {}
    for number, token in enumerate(tokens):
        for name, step in step_functions.items():
            start = time.perf_counter()
            logits[name] = step(token.view(1, 1))
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times, logits


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(context: int, steps: int) -> dict:
    """Everything the benchmark finds, as a JSON document."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(CONFIG.vocab_size, (1, context), generator=generator)
    tokens = torch.randint(CONFIG.vocab_size, (WARM_UP + steps,), generator=generator)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        say(f"{OURS}: compiling and reading the prompt")
        functions = {OURS: ours(prompt, len(tokens), Path(scratch))}
        for kind, prepare in PREPARE.items():
            for experts in EXPERTS[kind]:
                name = f"{kind}, {experts} experts"
                say(f"{name}: reading the prompt")
                functions[name] = prepare(prompt, len(tokens), experts)
        say("decoding")
        times, logits = measure(functions, tokens)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {
        peer: min((name for name in medians if name.startswith(f"{peer}, ")), key=medians.__getitem__)
        for peer in PREPARE
    }
    return {
        "benchmark": "cpu_decode",
        "context": context,
        "steps": steps,
        "milliseconds_per_token": medians,
        "times_faster_than": {peer: medians[name] / medians[OURS] for peer, name in fastest.items()},
        "backend_times_faster_than_inductor": medians[fastest[COMPILED]] / medians[fastest[BACKEND]],
        "fastest": fastest,
        "largest_difference": {
            peer: (logits[OURS] - logits[name]).abs().max().item() for peer, name in fastest.items()
        },
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def table(result: dict) -> str:
    medians = result["milliseconds_per_token"]
    lines = [f"{'median ms per token, context ' + str(result['context']):<52}  {'ms':>8}  {'ours is':>10}"]
    for name, value in medians.items():
        ratio = "" if name == OURS else f"{value / medians[OURS]:.2f}×"
        lines.append(f"{name:<52}  {value:8.2f}  {ratio:>10}")
    lines.append(
        f"the backend decodes {result['backend_times_faster_than_inductor']:.2f} times as fast as Inductor alone"
    )
    for peer, difference in result["largest_difference"].items():
        lines.append(f"largest difference of a logit, ours and {peer}: {difference:.1e}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache before the first step")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=Path("cpu_decode.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = run(options.context, options.steps)
    print(table(result))
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
