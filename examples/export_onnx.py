"""Export the toy model to ONNX, then write text with onnxruntime, numpy and the tokenizer alone.

python examples/export_onnx.py                     200 sums, beside the artifact that dsv3-compile runs itself
python examples/export_onnx.py --keep onnx/        keep prefill.onnx, decode.onnx and weights.bin
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

MAX_NEW_TOKENS = 24
BATCH = 40
ONNX, OURS = "onnxruntime", "our artifact, graphs as Python source"


class OnnxModel:
    """What an exported folder needs at run time: two sessions and a loop."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.prefill = onnxruntime.InferenceSession(str(folder / "prefill.onnx"), options)
        self.decode = onnxruntime.InferenceSession(str(folder / "decode.onnx"), options)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.config = json.loads(self.decode.get_modelmeta().custom_metadata_map["dsv3.config"])

    def __call__(
        self,
        session: onnxruntime.InferenceSession,
        ids: np.ndarray,
        positions: np.ndarray,
        past: dict[str, np.ndarray],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        logits, *present = session.run(None, {"input_ids": ids, "position_ids": positions, **past})
        names = [one.name.replace("present", "past_key_values") for one in session.get_outputs()[1:]]
        return logits, dict(zip(names, present, strict=True))

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        """A past of length 0."""
        caches = self.prefill.get_inputs()[2:]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {one.name: np.zeros((rows, 0, *one.shape[2:]), kinds[one.type]) for one in caches}

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        """The most likely continuation of every prompt, up to the model's end token."""
        encoded = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        lengths = np.array([len(ids) for ids in encoded])
        rows = np.arange(len(prompts))
        # Rows are padded on the right; what padding leaves in the cache is overwritten before anything reads it.
        ids = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = tokens
        positions = np.tile(np.arange(lengths.max()), (len(prompts), 1))
        logits, past = self(self.prefill, ids, positions, self.empty(len(prompts)))
        token = logits[rows, lengths - 1].argmax(-1)
        out = [token]
        for _ in range(max_new_tokens - 1):
            if all((np.stack(out) == self.config["eos_token_id"]).any(0)):
                break
            logits, past = self(self.decode, token[:, None], lengths[:, None], past)
            token = logits[:, 0].argmax(-1)
            lengths = lengths + 1
            out.append(token)
        return [self.until_end(tokens) for tokens in np.stack(out, 1).tolist()]

    def until_end(self, tokens: list[int]) -> list[int]:
        end = self.config["eos_token_id"]
        return tokens[: tokens.index(end)] if end in tokens else tokens

    def cache_bytes(self) -> tuple[int, int]:
        """Per position: of the latent cache, and of the keys and values of all heads that others keep."""
        caches = self.decode.get_inputs()[2:]
        size = {"tensor(float)": 4, "tensor(float16)": 2}[caches[0].type]
        c = self.config
        head = c["qk_nope_head_dim"] + c["qk_rope_head_dim"] + c["v_head_dim"]
        expanded = c["num_hidden_layers"] * c["num_attention_heads"] * head * size
        return sum(int(np.prod(one.shape[2:])) * size for one in caches), expanded


def main(arguments: Sequence[str] | None = None) -> tuple[int, int]:
    """Returns how many prompts were continued like the artifact does, and how many there were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", metavar="DIR", type=Path, help="where to leave the ONNX models")
    parser.add_argument("--prompts", metavar="N", type=int, default=200, help="sums to ask")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        return run(chosen.keep or Path(scratch) / "onnx", Path(scratch) / "artifact", chosen.prompts)


def run(folder: Path, artifact: Path, count: int) -> tuple[int, int]:
    import torch

    import dsv3_compile as dsv3
    from model_def.toy_task import questions

    done = dsv3.export_onnx("toy", folder, verify=False)
    dsv3.compile("toy", artifact, max_batch=BATCH, verify=False)
    torch.set_num_threads(1)
    ours, onnx = dsv3.load(artifact), OnnxModel(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path.name:<24}{path.stat().st_size:>12,} bytes")
    print(done.converted, end="\n\n")

    prompts = [question.prompt for question in questions(count)]
    for prompt, tokens in zip(prompts[:4], onnx.generate(prompts[:4], MAX_NEW_TOKENS), strict=True):
        print(f"  {prompt}{onnx.tokenizer.decode(tokens)}")

    taken = {ONNX: 0.0, OURS: 0.0}
    equal = tokens_written = 0
    for first in range(0, count, BATCH):
        batch = prompts[first : first + BATCH]
        start = time.perf_counter()
        found = onnx.generate(batch, MAX_NEW_TOKENS)
        middle = time.perf_counter()
        encoded = [onnx.tokenizer.encode(prompt).ids for prompt in batch]
        longest = max(map(len, encoded))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in encoded])
        wanted = ours.generate(ids, MAX_NEW_TOKENS, lengths=[len(row) for row in encoded]).tolist()
        taken[ONNX] += middle - start
        taken[OURS] += time.perf_counter() - middle
        equal += sum(one == onnx.until_end(other) for one, other in zip(found, wanted, strict=True))
        tokens_written += sum(len(tokens) + 1 for tokens in found)
    print(f"\n{equal} of {count} continuations are the artifact's, token by token")
    for name, seconds in taken.items():
        print(f"{name:<38}{tokens_written / seconds:10,.0f} tokens/s in batches of {BATCH}, one thread")
    latent, expanded = onnx.cache_bytes()
    print(
        f"cache per position {latent:,} bytes; expanded keys and values {expanded:,} bytes ({expanded / latent:.1f} x)"
    )
    return equal, count


if __name__ == "__main__":
    main()
