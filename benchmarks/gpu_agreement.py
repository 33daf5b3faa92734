"""Whether what runs on a GPU is right: layers beside transformers in bfloat16, tokens beside the artifact for the CPU.

    python benchmarks/gpu_agreement.py layers tokens                                   # one Hopper GPU
    python benchmarks/gpu_agreement.py layers tokens --target cpu --model toy --questions 32  # the same without a GPU

`layers`: transformers' model at full width with few layers and random weights, and its layers compiled from the
definition, bound to the same tensors. Every layer is handed what transformers' own bfloat16 layers before it gave, in
a prefill and in a decode step on the caches which that left; the rows of the step stand at different positions, as
after a ragged prompt. Routing is forced: the router of transformers' layer is given the indices and weights that ours
chose. The error is that of the layer's contribution, output minus input, of the worst token, relative to
transformers' layer in float32; beside it that of transformers in bfloat16. How often the router left alone takes the
same experts in float32 (`same experts`), and how far our weights are from its there, is checked as well, because
forcing would hide a wrong choice.

`tokens`: what the embedded trained model answers to held-out questions, greedily, in ragged batches through the
runtime: the artifact for the target, in bfloat16 as the checkpoint is stored, and the artifact for the CPU in float32.

Exits with 1 when an error exceeds TOLERANCE, when fewer than SAME of a model's tokens get the same experts, or when a
token differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from routes import Routes, watched
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, DynamicCache

import dsv3_compile as dsv3
from dsv3_compile.driver import build
from dsv3_compile.loading import load_graph
from dsv3_compile.options import Options
from dsv3_compile.packaging import write_artifact
from dsv3_compile.program import PHASES, Occurrence, Program, bind_one
from dsv3_compile.runtime import SMALLEST_CAPACITY, Graph, Model
from model_def.config import ModelConfig
from model_def.presets import PRESETS
from model_def.toy_task import EOS, MAX_TOKENS, PAD, Question, decode, encode, questions

TOLERANCE = 2e-2  # a layer's contribution in bfloat16 against float32
SAME = 0.75  # share of tokens: rounding decides between experts whose scores are close
LAYERS = {"deepseek-v3": 2}  # of which one is dense; otherwise three
PROMPT = 37  # tokens
BATCHES = (1, 3)
ASKED_AT_ONCE = 32
LINE = "{layer} {block:<5}  {phase:<7}  batch {batch}  error {error:.1e}  transformers {transformers:.1e}"
ROUTED = "  same experts {same} of {tokens}, weights {weights:.0e}"
ANSWERED = "{questions} questions: {right[target]:.1%} right, on the CPU {right[cpu]:.1%}; {differ} differ"

Graphs = Mapping[tuple[str, str], Graph]


def compiled(config: ModelConfig, target: str, folder: Path) -> tuple[Program, Graphs]:
    """The program, for binding, and its graphs by block and phase; no weights."""
    options = Options(target=target, dtype="bfloat16", no_weights=True, verify=False)
    program, length = build(config, options), options.length_for(config.max_position_embeddings)
    artifact = write_artifact(program, folder, passes=(), max_batch=options.max_batch, max_length=length)
    blocks = artifact.manifest.graphs.items()
    found = {(block, phase): entry for block, phases in blocks for phase, entry in phases.items()}
    return program, {key: Graph(entry, load_graph(artifact.path(entry.source))) for key, entry in found.items()}


def random_peer(config: ModelConfig, device: str) -> Any:
    """transformers' model without its head, in bfloat16: matrices of deviation fan_in^-1/2, norms around 1."""
    document = config.to_dict()
    hf = AutoConfig.for_model(document.pop("model_type"), **document)
    forms = dict(attn_implementation="sdpa", experts_implementation="eager")
    with torch.device("meta"):
        model = AutoModel.from_config(hf, dtype=torch.bfloat16, **forms)
    model.to_empty(device=device).eval()
    model.rotary_emb = type(model.rotary_emb)(hf).to(device)  # whose buffers are computed from the config
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0, 0.2)
        else:
            parameter.normal_(0.0, 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = 0.05 * torch.randn(len(module.e_score_correction_bias), device=device)
    return model


def bound(program: Program, step: Occurrence, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a block, made on the device from the tensors of transformers, which stacks experts itself."""

    def load(original: str) -> Tensor:
        name = step.sources[original][0].removeprefix("model.")
        stacked = re.fullmatch(r"(.*\.experts)\.0\.(gate|up|down)_proj\.weight", name)
        if stacked is None:
            return state[name]
        if stacked[2] == "down":
            return state[f"{stacked[1]}.down_proj"]
        return state[f"{stacked[1]}.gate_up_proj"].chunk(2, 1)[stacked[2] == "up"]

    return {name: bind_one(node, load) for name, node in program.weights(step.block).items()}


@contextmanager
def forced(layer: Any, routes: Routes) -> Iterator[list[tuple[Tensor, ...]]]:
    """Gives the layer these experts; collects what its router says: logits [N, E], weights and indices [N, K]."""
    own: list[tuple[Tensor, ...]] = []

    def hook(gate: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own.append(outputs)
        indices, weights = (chosen[:, : outputs[2].shape[1]] for chosen in routes[0])  # without the shared experts
        return outputs[0], weights, indices

    with layer.mlp.gate.register_forward_hook(hook) if routes else nullcontext():
        yield own


class Widened(TorchFunctionMode):
    """Products of float32 with bfloat16 weights in float32, of which there is never more than one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            args = [x.float() if isinstance(x, Tensor) else x for x in args]
        return function(*args, **(kwargs or {}))


class Batch:
    """One batch on its way through the layers: per phase its positions, and what the next layer is handed [B, S, D]."""

    def __init__(self, size: int, model: Any, graphs: Graphs, weights: dict[str, Tensor]) -> None:
        device, self.size, self.x, self.values = model.device, size, {}, {}
        ends = PROMPT - torch.arange(size, device=device)[:, None]  # the step overwrites what stands behind an end
        positions = {"prefill": torch.arange(PROMPT, device=device).expand(size, PROMPT).contiguous(), "decode": ends}
        slots = torch.arange(PROMPT + 1, device=device)  # of transformers' cache, which appends instead
        self.masks = {"prefill": None, "decode": ((slots < ends) | (slots == PROMPT))[:, None, None]}
        for phase in PHASES:
            ids = torch.randint(model.config.vocab_size, positions[phase].shape, device=device)
            _, cos, sin = graphs["embed", phase]({**weights, "input_ids_BS": ids, "positions_BS": positions[phase]})
            self.x[phase] = model.embed_tokens(ids)
            self.values[phase] = {"cos_BSF": cos, "sin_BSF": sin, "positions_BS": positions[phase]}

    def theirs(self, phase: str, model: Any, layer: nn.Module, x: Tensor, cache: Any) -> Tensor:
        """What transformers' layer makes of x, [B, S, D] in its dtype."""
        positions = self.values[phase]["positions_BS"]
        known = dict(attention_mask=self.masks[phase], position_ids=positions, past_key_values=cache, use_cache=True)
        return layer(x, position_embeddings=model.rotary_emb(x, positions), **known)


def layers(config: ModelConfig, target: str, device: str) -> Iterator[dict[str, Any]]:
    """A row of figures per layer, batch and phase."""
    with tempfile.TemporaryDirectory() as folder:
        program, graphs = compiled(config, target, Path(folder) / "artifact")
        model = random_peer(config, device)
        state = model.state_dict()
        weights = bound(program, program.schedule[0], state)
        batches = [Batch(size, model, graphs, weights) for size in BATCHES]
        for step, batch in itertools.product(program.schedule[1:-1], batches):
            layer = model.layers[step.layer]
            if batch is batches[0]:
                weights.clear()  # no more than one layer is held twice
                weights = bound(program, step, state)
            shapes = [(batch.size, PROMPT, *port.shape[2:]) for port in graphs[step.block, "prefill"].caches()]
            caches = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
            wide, narrow = DynamicCache(), DynamicCache()
            for phase in PHASES:
                x, graph = batch.x[phase], graphs[step.block, phase]
                known = {port.name: cache for port, cache in zip(graph.caches(), caches, strict=True)}
                with watched([graph.function]) as routes:
                    found, *caches = graph({**weights, **batch.values[phase], **known, "x_BSD": x})
                # What lies behind a prompt is undefined: nothing may read it.
                caches = [F.pad(cache, (0, 0, 0, SMALLEST_CAPACITY - cache.shape[1]), value=1e3) for cache in caches]
                with forced(layer, routes) as own:
                    with Widened(), sdpa_kernel(SDPBackend.MATH):
                        expected = batch.theirs(phase, model, layer, x.float(), wide)
                    peer = batch.x[phase] = batch.theirs(phase, model, layer, x, narrow)
                row: dict[str, Any] = {"layer": step.layer, "block": step.block, "phase": phase, "batch": batch.size}
                row |= {"error": worst(found, expected, x), "transformers": worst(peer, expected, x)}
                yield row | (routing(routes[0], own[0]) if routes else {})


def worst(found: Tensor, expected: Tensor, x: Tensor) -> float:
    """[B, S, D] each: the largest relative error of a token's contribution, output minus input."""
    error = (found.double() - expected.double()).norm(dim=-1) / (expected.double() - x.double()).norm(dim=-1)
    return float(error.nan_to_num(torch.inf).max())


def routing(ours: tuple[Tensor, Tensor], own: tuple[Tensor, ...]) -> dict[str, Any]:
    """How many tokens get the same experts from both routers, and the error of their weights."""
    logits, weights, indices = own
    expected = torch.zeros_like(logits).scatter(1, indices, weights)
    found = torch.zeros_like(logits).scatter(1, *(chosen[:, : indices.shape[1]] for chosen in ours))
    same = ((found > 0) == (expected > 0)).all(1)
    error = (found - expected)[same].norm() / expected[same].norm().clamp(min=1e-9)
    return {"tokens": len(same), "same": int(same.sum()), "weights": float(error)}


def generated(model: Model, asked: list[Question]) -> Tensor:
    """The tokens of every answer, int64 [N, MAX_TOKENS], filled up with end tokens."""
    answers = []
    for first in range(0, len(asked), ASKED_AT_ONCE):
        rows = [encode(question.prompt) for question in asked[first : first + ASKED_AT_ONCE]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        given = model.generate(ids, MAX_TOKENS, lengths=[len(row) for row in rows], eos=EOS).cpu()
        answers.append(F.pad(given, (0, MAX_TOKENS - given.shape[1]), value=EOS))
    return torch.cat(answers)


def tokens(target: str, count: int) -> dict[str, Any]:
    """Accuracy of the artifacts for the target and for the CPU, and how many answers differ in a token."""
    asked, found = questions(count), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in {"target": dict(target=target, dtype="bfloat16"), "cpu": dict(target="cpu")}.items():
            dsv3.compile("toy", Path(folder) / name, max_batch=ASKED_AT_ONCE, verify=False, **settings)
            found[name] = generated(dsv3.load(Path(folder) / name), asked)
    answers = [question.answer for question in asked]
    right = {name: sum(map(str.__eq__, map(decode, rows.tolist()), answers)) / count for name, rows in found.items()}
    return {"questions": count, "right": right, "differ": int((found["target"] != found["cpu"]).any(1).sum())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("layers", "tokens"))
    parser.add_argument("--model", nargs="+", default=["deepseek-v2-lite", "deepseek-v3"], choices=sorted(PRESETS))
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--json", type=Path, default=Path("gpu_agreement.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cpu" if args.target == "cpu" else "cuda"
    report: dict[str, Any] = {"target": args.target, "torch": torch.__version__, "layers": {}, "wrong": []}
    wrong = report["wrong"]
    for name in args.model if "layers" in args.parts else []:
        sizes: dict[str, Any] = dict(num_hidden_layers=LAYERS.get(name, 3), first_k_dense_replace=1)
        config = dataclasses.replace(PRESETS[name], num_nextn_predict_layers=0, quantization=None, **sizes)
        rows = report["layers"][name] = []
        with torch.no_grad():
            for row in layers(config, args.target, device):
                rows.append(row)
                line = f"{name}  " + LINE.format(**row) + (ROUTED.format(**row) if "same" in row else "")
                print(line, flush=True)
                if max(row["error"], row.get("weights", 0.0)) > TOLERANCE:
                    wrong.append(line)
        total, same = (sum(row.get(key, 0) for row in rows) for key in ("tokens", "same"))
        if same < SAME * total:
            wrong.append(f"{name}  same experts {same} of {total}")
    if "tokens" in args.parts:
        found = report["tokens"] = tokens(args.target, args.questions)
        print(line := ANSWERED.format(**found))
        if found["differ"]:
            wrong.append(line)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(*(["wrong:", *wrong] if wrong else ["all agree"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
