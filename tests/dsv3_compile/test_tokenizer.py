"""Byte vocabularies without a library, everything else with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dsv3_compile.tokenizer import TokenizerError, check_tokenizer, open_tokenizer
from model_def.toy_task import BOS, EOS, tokenizer_json

TEXTS = ["", "12+34=", "naïve ☃\n", "\x00\x7f"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_survive_the_round_trip(folder: Path, text: str) -> None:
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode([*ids, EOS]) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_library_agrees(folder: Path, text: str) -> None:
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = open_tokenizer(folder)
    assert ours.encode(text) == library.encode(text).ids
    assert ours.decode(ours.encode(text)) == library.decode(ours.encode(text))


def test_a_vocabulary_with_merges_is_left_to_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    trained = library.ByteLevelBPETokenizer()
    trained.train_from_iterator(["aaa bbb aaa bbb"] * 4, vocab_size=262, min_frequency=2)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path)
    ids = tokenizer.encode("aaa bbb")
    assert len(ids) < 7 and tokenizer.decode(ids).strip() == "aaa bbb"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("{}", "tokenizer.json")]
)
def test_an_unreadable_tokenizer_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=message):
        open_tokenizer(tmp_path)


def test_a_tokenizer_is_only_checked_as_far_as_it_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    check_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="needs the tokenizers package"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="is not JSON"):
        check_tokenizer(tmp_path)
