"""Train the toy model: a small DeepSeek-V3 that adds numbers, from nothing to a Hugging Face folder.

    python examples/train_toy.py --output toy/                                       nine minutes on two cores
    python examples/train_toy.py --steps 2500 --device cuda --output model_def/toy   the one that ships

As in the V3 report: the bias of an expert goes up when it is used too little and down when too much, a small
sequence-wise loss keeps single sequences balanced, and a multi-token-prediction layer is trained along.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model_def import PRESETS, Decoder, ModelConfig, MultiTokenPrediction, sources
from model_def.moe import Router
from model_def.toy_task import (
    EOS,
    MAX_TOKENS,
    PAD,
    decode,
    encode,
    exact_match,
    stream,
    tokenizer_json,
)

BIAS_SPEED = 1e-3  # γ of the balancing rule
BALANCE_LOSS = 1e-4  # α of the sequence-wise loss
MTP_LOSS = 0.3  # λ of the drafting loss


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: linear warm-up, then a cosine down to nothing."""

    steps: int = 1500
    batch: int = 128
    peak: float = 1.5e-3
    warm_up: int = 100

    def rate(self, step: int) -> float:
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.peak * min((step + 1) / self.warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress)))


class Toy(nn.Module):
    """Main model and drafting layer, which share the embedding, the final norm and the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.decoder = Decoder(config)
        self.mtp = MultiTokenPrediction(config)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.5 * weight.shape[-1] ** -0.5)
        self.mtp.embed_tokens.weight = self.decoder.embed.embed_tokens.weight
        self.mtp.norm = self.decoder.head.norm
        self.mtp.shared_head.head.weight = self.decoder.head.lm_head.weight

    def forward(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next token at every position, and of the one after it at all but the last."""
        positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        caches = self.decoder.empty_caches(*ids_BS.shape)
        x_BSD, _ = self.decoder.trunk(ids_BS, positions_BS, caches)
        drafts, _, _ = self.mtp(ids_BS[:, 1:], x_BSD[:, :-1], positions_BS[:, :-1], *(c[:, :-1] for c in caches[-1]))
        return self.decoder.head(x_BSD), drafts


class Balance:
    """Watches every router: the load of its experts, and the sequence-wise balance loss."""

    def __init__(self, model: nn.Module):
        self.routers = [m for m in model.modules() if isinstance(m, Router)]
        self.seen: dict[Router, tuple[Tensor, Tensor]] = {}
        for router in self.routers:
            router.register_forward_hook(self.watch)

    def watch(self, router: nn.Module, inputs: tuple[Tensor, ...], g_NE: Tensor) -> None:
        assert isinstance(router, Router)
        self.seen[router] = F.linear(inputs[0], router.weight).sigmoid(), g_NE.detach() > 0

    def loss(self, batch: int) -> Tensor:
        """Σ_i f_i·P_i per sequence (report, equation 17), averaged over sequences and routers."""
        losses = []
        for router, (scores_NE, used_NE) in self.seen.items():
            shares = (scores_NE / scores_NE.sum(-1, keepdim=True)).unflatten(0, (batch, -1)).mean(1)
            often = used_NE.float().unflatten(0, (batch, -1)).mean(1)
            losses.append((often * shares).sum(-1).mean() * router.spec.experts / router.spec.top_k)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def update(self) -> float:
        """b_i ← b_i + γ·sign(mean load − load_i). Gives the largest load as a multiple of the mean."""
        worst = 0.0
        for router, (_, used_NE) in self.seen.items():
            load_E = used_NE.float().mean(0)
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias += BIAS_SPEED * (load_E.mean() - load_E).sign()
            worst = max(worst, float(load_E.max() / load_E.mean()))
        return worst


def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids [B, S], and which of them belong to an answer."""
    source = stream(seed, held_out=False)
    while True:
        ids = torch.full((size, MAX_TOKENS), PAD, device="cpu")
        is_answer = torch.zeros(size, MAX_TOKENS, dtype=torch.bool, device="cpu")
        for row, question in enumerate(itertools.islice(source, size)):
            prompt = encode(question.prompt)
            tokens = [*prompt, *question.answer.encode(), EOS]
            ids[row, : len(tokens)] = torch.tensor(tokens, device="cpu")
            is_answer[row, len(prompt) : len(tokens)] = True
        yield ids, is_answer


def train(config: ModelConfig, schedule: Schedule, seed: int) -> Toy:
    torch.manual_seed(seed)
    model = Toy(config).train()
    balance = Balance(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    started = time.perf_counter()
    device = torch.get_default_device()
    for step, batch in enumerate(itertools.islice(batches(schedule.batch, seed), schedule.steps)):
        ids, is_answer = (tensor.to(device) for tensor in batch)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        logits, drafts = model(ids)
        main = F.cross_entropy(logits[:, :-1][is_answer[:, 1:]], ids[:, 1:][is_answer[:, 1:]])
        draft = F.cross_entropy(drafts[:, :-1][is_answer[:, 2:]], ids[:, 2:][is_answer[:, 2:]])
        loss = main + MTP_LOSS * draft + BALANCE_LOSS * balance.loss(schedule.batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        worst = balance.update()
        if step % 100 == 0 or step == schedule.steps - 1:
            seconds = time.perf_counter() - started
            print(
                f"step {step:5d}  {seconds:4.0f} s  loss {main.item():.4f}  draft {draft.item():.4f}"
                f"  busiest expert {worst:.2f}× the mean",
                file=sys.stderr,
                flush=True,
            )
    return model.eval()


@torch.no_grad()
def generate(decoder: Decoder, prompts: Sequence[str]) -> list[str]:
    """Greedy continuations up to the end token, all prompts in one ragged batch."""
    rows = [encode(prompt) for prompt in prompts]
    lengths_B = torch.tensor([len(row) for row in rows])
    width = int(lengths_B.max())
    ids_BS = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    positions_BS = torch.arange(width).expand_as(ids_BS)
    caches = decoder.empty_caches(len(rows), MAX_TOKENS + width)
    logits_BSV, caches = decoder(ids_BS, positions_BS, caches)
    next_B = logits_BSV[torch.arange(len(rows)), lengths_B - 1].argmax(-1)
    written = [next_B]
    for step in range(MAX_TOKENS - 1):
        logits_BSV, caches = decoder(next_B[:, None], (lengths_B + step)[:, None], caches)
        next_B = logits_BSV[:, 0].argmax(-1)
        written.append(next_B)
    return [decode(row.tolist()) for row in torch.stack(written, 1)]


def checkpoint(model: Toy, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors under their published names, experts one by one, in the stored dtype."""
    found: dict[str, Tensor] = {}
    decoder = model.decoder
    modules: dict[str | int, nn.Module] = dict(enumerate(decoder.layers))
    modules |= {"embed": decoder.embed, "head": decoder.head, "mtp": model.mtp}
    for block, module in modules.items():
        state = module.state_dict()
        for name, targets in sources(config, block).items():
            parts = state[name] if len(targets) > 1 else [state[name]]
            for target, part in zip(targets, parts, strict=True):
                dtype = torch.float32 if target.endswith("e_score_correction_bias") else config.dtype
                found[target] = part.detach().to(dtype).contiguous()
    mtp = f"model.layers.{config.num_hidden_layers}."
    found[f"{mtp}embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
    found[f"{mtp}shared_head.head.weight"] = found["lm_head.weight"].clone()
    return found


def save(model: Toy, config: ModelConfig, folder: Path) -> None:
    """A Hugging Face folder: config, weights, tokenizer, generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": EOS, "pad_token_id": PAD}
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    documents = {
        "config.json": config.to_dict(),
        "generation_config.json": {**tokens, "do_sample": False, "max_new_tokens": 16},
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **names,
        },
    }
    for name, document in documents.items():
        text = json.dumps(document, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    save_file(checkpoint(model, config), folder / "model.safetensors", metadata={"format": "pt"})


def as_stored(model: Toy, config: ModelConfig) -> Toy:
    """The model with every weight rounded as the checkpoint stores it."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(config.dtype))
    return model


def main(arguments: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--batch", type=int, default=Schedule.batch, help="questions per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=500, help="held-out questions to measure with")
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)

    config = PRESETS["toy"]
    with torch.device(options.device):
        accuracy = train_and_save(config, options)
    print(f"exact match on {options.questions} held-out questions: {accuracy:.1%}")
    return accuracy


def train_and_save(config: ModelConfig, options: argparse.Namespace) -> float:
    """Exact match, on held-out questions, of the weights as they were stored."""
    model = train(config, Schedule(options.steps, options.batch), options.seed)
    save(model, config, options.output)
    decoder = as_stored(model, config).decoder
    return exact_match(lambda prompts: generate(decoder, prompts), options.questions)


if __name__ == "__main__":
    main()
