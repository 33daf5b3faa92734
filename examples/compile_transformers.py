"""One line for a model that nobody here wrote: transformers' DeepSeek-V3 under torch.compile(backend="dsv3").

    python examples/compile_transformers.py                 # the checkpoint that ships with the project
    python examples/compile_transformers.py path/to/folder  # any DeepSeek-V2 or V3 folder

Generates with the model as it is and compiled, compares the tokens, and prints what the passes found in its graphs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

import dsv3_compile
import model_def

TOY = Path(model_def.__file__).parent / "toy"
PROMPTS = ("347+586=", "12+999=")


def load(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return model.eval(), tokenizer


def answers(model, tokenizer, tokens: int) -> list[str]:
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=TOY, help="Hugging Face folder; default: the toy")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens per prompt")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model, tokenizer = load(options.folder)
    with torch.no_grad():
        plain = answers(model, tokenizer, options.tokens)
        model.forward = torch.compile(model.forward, backend="dsv3")
        compiled = answers(model, tokenizer, options.tokens)
    for report in dsv3_compile.reports():
        print(report)
    for prompt, before, after in zip(PROMPTS, plain, compiled, strict=True):
        print(f"{prompt}  as it is: {before!r}  compiled: {after!r}")
    print("the same tokens" if plain == compiled else "DIFFERENT TOKENS")
    if plain != compiled:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
