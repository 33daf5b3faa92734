"""Text to token ids and back, with the tokenizer.json that came with the checkpoint.

The `tokenizers` library reads any of them. A plain byte vocabulary, such as the toy model's, is read without it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "tokenizer.json"


class TokenizerError(ValueError):
    """No tokenizer, or one that cannot be read."""


class LibraryMissing(TokenizerError):
    """A tokenizer that only the `tokenizers` library reads, which is not installed."""


@dataclass(frozen=True)
class Tokenizer:
    """`encode` adds what the model expects in front of a text; `decode` leaves special tokens out."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def check_tokenizer(folder: Path) -> None:
    """Raises TokenizerError for a tokenizer that is there and broken, as far as it can be read here."""
    if (folder / FILE).exists():
        with contextlib.suppress(LibraryMissing):
            open_tokenizer(folder)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint or of an artifact's tokenizer/ folder. Raises TokenizerError."""
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}); text needs a tokenizer") from error
    except ValueError as error:
        raise TokenizerError(f"{path}: is not JSON ({error})") from error
    if _is_plain_bytes(document):
        try:
            return _byte_tokenizer(document)
        except (KeyError, TypeError) as error:
            raise TokenizerError(f"{path}: not a whole tokenizer ({type(error).__name__}: {error})") from error
    try:
        import tokenizers
    except ImportError as error:
        raise LibraryMissing(f"{path}: needs the tokenizers package (pip install tokenizers)") from error
    try:
        general = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise TokenizerError(f"{path}: {error}") from error
    return Tokenizer(lambda text: general.encode(text).ids, lambda ids: general.decode(list(ids)))


def _is_plain_bytes(document: Any) -> bool:
    """One token per byte, no merges, nothing done to the text before."""
    match document:
        case {
            "model": {"type": "BPE", "merges": [], "vocab": dict(vocabulary)},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "normalizer": None,
        }:
            return len(vocabulary) == 256 and set(map(len, vocabulary)) == {1}
    return False


def _byte_tokenizer(document: dict[str, Any]) -> Tokenizer:
    vocabulary: dict[str, int] = document["model"]["vocab"]
    token_of = {byte: vocabulary[character] for byte, character in _byte_characters().items()}
    byte_of = {token: byte for byte, token in token_of.items()}
    begin = list(_begin_tokens(document.get("post_processor")))

    def encode(text: str) -> list[int]:
        return begin + [token_of[byte] for byte in text.encode()]

    def decode(ids: Sequence[int]) -> str:
        return bytes(byte_of[token] for token in ids if token in byte_of).decode(errors="replace")

    return Tokenizer(encode, decode)


def _begin_tokens(processor: Any) -> Iterable[int]:
    """Special tokens that a template puts in front of a single text."""
    match processor:
        case {"type": "TemplateProcessing", "single": list(parts), "special_tokens": dict(special)}:
            for part in parts:
                if "Sequence" in part:
                    return
                yield from special[part["SpecialToken"]["id"]]["ids"]


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    spare = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(spare)) for byte in range(256)}
