"""The main job, start to end: compile the toy checkpoint, see what each pass did, load the artifact, ask it sums.

python examples/compile_and_generate.py                       what `make demo` runs
python examples/compile_and_generate.py --keep artifact/      keep the artifact, for `dsv3c inspect artifact/`
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import dsv3_compile as dsv3
from dsv3_compile.driver import EMBEDDED
from dsv3_compile.inspection import refusals, table
from dsv3_compile.native import has_compiler
from dsv3_compile.progress import Display
from dsv3_compile.runtime import Model
from dsv3_compile.verification import reference
from model_def.checkpoint import Checkpoint
from model_def.decoder import Decoder
from model_def.toy_task import EOS, MAX_TOKENS, PAD, decode, encode, exact_match

PROMPTS = ("347+586=", "9999+1=", "12+3456=", "8080+808=")
BATCH = 64


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Returns the exact-match accuracy of the definition and of the artifact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", metavar="DIR", type=Path, help="where to leave the artifact")
    parser.add_argument("--questions", metavar="N", type=int, default=200, help="held-out sums to ask")
    parser.add_argument("--no-aot", action="store_true", help="run the graphs as Python source, without native code")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        return run(chosen.keep or Path(scratch) / "artifact", chosen.questions, not chosen.no_aot and has_compiler())


def run(folder: Path, questions: int, aot: bool) -> tuple[float, float]:
    start = time.perf_counter()
    with Display() as display:
        dsv3.compile("toy", folder, progress=display, max_batch=BATCH, aot=aot)
    compiled = time.perf_counter()
    report = dsv3.inspect(folder)
    print(table(report))
    print("What the passes left alone, and why")
    for line in refusals(report):
        print(f"  {line}")

    model = dsv3.load(folder)
    code = "native code" if aot else "Python source: no C++ compiler, or --no-aot"
    print(f"\nCompiled in {compiled - start:.1f} s, loaded in {time.perf_counter() - compiled:.2f} s ({code})\n")
    for prompt, answer in zip(PROMPTS, answers(artifact_generate(model), PROMPTS), strict=True):
        print(f"  {prompt}{answer}")

    definition = reference(Checkpoint.open(EMBEDDED / "toy"))
    before = exact_match(lambda prompts: answers(definition_generate(definition), prompts), questions)
    after = exact_match(lambda prompts: answers(artifact_generate(model), prompts), questions)
    print(f"\nExact match on {questions} held-out sums: definition {before:.1%}, artifact {after:.1%}")
    print(f"{time.perf_counter() - start:.1f} s in all")
    return before, after


Generate = Callable[[Tensor, Tensor], Tensor]
"""Padded prompts [B, S] and their lengths [B] → new tokens [B, n]."""


def answers(generate: Generate, prompts: Sequence[str]) -> list[str]:
    """What follows each prompt, up to the end token."""
    texts: list[str] = []
    for first in range(0, len(prompts), BATCH):
        rows = [encode(prompt) for prompt in prompts[first : first + BATCH]]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        texts += map(decode, generate(input_ids, torch.tensor([len(row) for row in rows])).tolist())
    return texts


def artifact_generate(model: Model) -> Generate:
    return lambda input_ids, lengths: model.generate(input_ids, MAX_TOKENS, lengths=lengths, eos=EOS)


def definition_generate(decoder: Decoder) -> Generate:
    """Greedy, from the equations as they are written: the whole text is read again for every token."""

    def generate(input_ids: Tensor, lengths: Tensor) -> Tensor:
        batch, longest = input_ids.shape
        text = torch.cat([input_ids, torch.full((batch, MAX_TOKENS), PAD)], dim=1)
        rows, ends = torch.arange(batch), lengths.clone()
        for _ in range(MAX_TOKENS):
            read = text[:, : int(ends.max())]
            positions = torch.arange(read.shape[1]).expand_as(read)
            logits, _ = decoder(read, positions, decoder.empty_caches(*read.shape))
            text[rows, ends] = logits[rows, ends - 1].argmax(-1)
            ends = ends + 1
            if (text == EOS).any(1).all():
                break
        return torch.nn.utils.rnn.pad_sequence(
            [row[first:last] for row, first, last in zip(text, lengths, ends, strict=True)], True, EOS
        )

    return generate


if __name__ == "__main__":
    main()
