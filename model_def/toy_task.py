"""What the toy model is asked: sums of two numbers, with one exact answer each.

    prompt "347+586="   answer "339>933"

The answer first gives the sum from its last digit to its first, the order in which carries run, and then
as it is written. Exact match on held-out questions is the yardstick for every pass, target and format.

A token is a byte; 256, 257 and 258 are begin, end and padding.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

BOS, EOS, PAD = 256, 257, 258
MAX_DIGITS = 4
MAX_TOKENS = 1 + (2 * MAX_DIGITS + 2) + (2 * (MAX_DIGITS + 1) + 2)  # begin, prompt, answer with end
HELD_OUT_SHARE = 16  # one question of this many is kept from training


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Told by the prompt alone, so that training and measuring agree without a list."""
        return hashlib.blake2b(self.prompt.encode()).digest()[0] % HELD_OUT_SHARE == 0


def addition(left: int, right: int) -> Question:
    total = str(left + right)
    return Question(f"{left}+{right}=", f"{total[::-1]}>{total}")


def stream(seed: int, held_out: bool) -> Iterator[Question]:
    """Endless questions, held out or not; every number of digits is equally likely."""
    generator = random.Random(seed)

    def number() -> int:
        digits = generator.randint(1, MAX_DIGITS)
        return generator.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)

    while True:
        question = addition(number(), number())
        if question.held_out == held_out:
            yield question


def questions(count: int, seed: int = 0, held_out: bool = True) -> list[Question]:
    """`count` different questions."""
    found: dict[Question, None] = {}
    for question in stream(seed, held_out):
        if len(found) == count:
            break
        found[question] = None
    return list(found)


def exact_match(generate: Callable[[Sequence[str]], Sequence[str]], count: int = 200, seed: int = 0) -> float:
    """Share of held-out questions whose generated continuation is the answer, to the letter.

    `generate` takes prompts and gives, for each, the text that follows it up to the end token.
    """
    asked = questions(count, seed)
    given = generate([question.prompt for question in asked])
    if len(given) != len(asked):
        raise ValueError(f"generate gave {len(given)} texts for {len(asked)} prompts")
    return sum(q.answer == text for q, text in zip(asked, given, strict=True)) / len(asked)


def encode(text: str) -> list[int]:
    """Begin token and bytes."""
    return [BOS, *text.encode()]


def decode(ids: Iterable[int]) -> str:
    """Text up to the first special token."""
    plain = []
    for token in ids:
        if token >= BOS:
            break
        plain.append(int(token))
    return bytes(plain).decode(errors="replace")


def tokenizer_json() -> dict[str, Any]:
    """The byte tokenizer as a tokenizer.json, as the `tokenizers` library and transformers read it."""
    special = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
    added = [
        {
            "id": token,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, token in special.items()
    ]
    begin = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
