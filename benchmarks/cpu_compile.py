"""Compile time of the backend beside Inductor alone, each in a fresh process.

    python benchmarks/cpu_compile.py             # two models in which the passes find nothing, and DeepSeek-V2

CPU seconds of the first call, caches off, in turns; the table says medians and how much longer the backend takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

MODELS = ("gqa transformer", "convolutional net", "deepseek-v2")
BACKENDS = ("inductor", "dsv3")
WORKER = "DSV3_COMPILE_TIME"  # names the model and the backend that a worker process times


def model(name: str):
    """(module, its inputs)."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "gqa transformer":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=2, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval(), (torch.randint(512, (2, 33)),)
    if name == "deepseek-v2":
        from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

        config = DeepseekV2Config(
            vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=8, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32,
            qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
            first_k_dense_replace=1, use_cache=False,
        )  # fmt: skip
        return DeepseekV2ForCausalLM(config).eval(), (torch.randint(512, (2, 33)),)
    stages = [(3, 16), (16, 32), (32, 32), (32, 64)]
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in stages]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval(), (
        torch.randn(2, 3, 32, 32),
    )


def work(name: str, backend: str) -> None:
    """Print the CPU seconds, of this process and its compilers, that the first call takes."""
    import torch

    def cpu_seconds() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    module, inputs = model(name)
    warm = torch.compile(lambda x: x * 2 + 1, backend="inductor")
    with torch.no_grad():
        warm(torch.ones(3))  # imports and the compiler's own start
        if backend == "dsv3":
            import dsv3_compile.backend  # noqa: F401
        start = cpu_seconds()
        torch.compile(module, backend=backend)(*inputs)
        print(json.dumps(cpu_seconds() - start))


def measure(name: str, backend: str) -> float:
    settings = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = {**os.environ, **settings, WORKER: json.dumps([name, backend])}
    ran = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    return float(ran.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("cpu_compile.json"))
    options = parser.parse_args(arguments)
    rows = {}
    for name in MODELS:
        times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for _ in range(options.repeats):
            for backend in BACKENDS:
                times[backend].append(measure(name, backend))
        rows[name] = {backend: statistics.median(values) for backend, values in times.items()}
        ratio = rows[name]["dsv3"] / rows[name]["inductor"]
        print(
            f"{name:<20}  " + "  ".join(f"{b} {rows[name][b]:6.2f} s" for b in BACKENDS) + f"  {ratio:.3f}×", flush=True
        )
    options.json.write_text(json.dumps({"benchmark": "cpu_compile", "cpu_seconds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if WORKER in os.environ:
        work(*json.loads(os.environ[WORKER]))
    else:
        main()
