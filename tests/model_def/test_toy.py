"""The shipped toy: its questions, its tokenizer, and that it answers."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import model_def
from model_def import PRESETS, ModelConfig, MultiTokenPrediction
from model_def import toy_task as task
from model_def.checkpoint import Checkpoint
from tests.model_def.builders import all_logits, fill, from_folder

FOLDER = Path(model_def.__file__).parent / "toy"


def test_questions_are_different_repeatable_and_held_out() -> None:
    asked = task.questions(300)
    assert asked == task.questions(300) and len(set(asked)) == 300
    assert asked != task.questions(300, seed=1)
    assert all(q.held_out for q in asked)
    assert not any(q.held_out for q in task.questions(300, held_out=False))


def test_answers_are_the_sums_backwards_and_forwards() -> None:
    for question in task.questions(50):
        left, right = question.prompt.removesuffix("=").split("+")
        backwards, forwards = question.answer.split(">")
        assert int(forwards) == int(left) + int(right) and forwards == backwards[::-1]


def test_questions_fit_the_token_limit_and_reach_it() -> None:
    lengths = [len(task.encode(q.prompt + q.answer)) + 1 for q in task.questions(500)]
    assert max(lengths) == task.MAX_TOKENS


def test_exact_match_counts_letters() -> None:
    def right(prompts: Sequence[str]) -> list[str]:
        return [task.addition(*map(int, prompt[:-1].split("+"))).answer for prompt in prompts]

    assert task.exact_match(right, 20) == 1.0
    assert task.exact_match(lambda prompts: [right(prompts)[0], *[" " for _ in prompts[1:]]], 20) == 0.05


def test_exact_match_wants_an_answer_per_prompt() -> None:
    with pytest.raises(ValueError, match="generate gave 0 texts for 5 prompts"):
        task.exact_match(lambda prompts: [], 5)


def test_decoding_stops_at_the_first_special_token() -> None:
    assert task.decode([*b"33>33", task.EOS, *b"7"]) == "33>33"


def test_tokenizer_file_is_the_byte_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    for text in ("347+586=", "é ~\n\0", "".join(map(chr, range(32, 512)))):
        assert tokenizer.encode(text).ids == task.encode(text)
        assert tokenizer.decode(task.encode(text)) == text
    assert tokenizer.decode([65, task.EOS]) == "A"


def test_folder_is_what_the_code_says() -> None:
    assert ModelConfig.from_file(FOLDER) == PRESETS["toy"]
    assert json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8")) == task.tokenizer_json()
    Checkpoint.open(FOLDER, mtp=True).validate()
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8e6


def test_it_adds_numbers_it_has_never_seen() -> None:
    model = from_folder(FOLDER).requires_grad_(False)

    def generate(prompts: Sequence[str]) -> list[str]:
        """Plain greedy decoding that recomputes everything at each step."""
        rows = [task.encode(prompt) for prompt in prompts]
        for _ in range(12):
            width = max(map(len, rows))
            logits = all_logits(model, torch.tensor([row + [task.PAD] * (width - len(row)) for row in rows]))
            for row, found in zip(rows, logits, strict=True):
                row.append(int(found[len(row) - 1].argmax()))
        return [task.decode(row[len(task.encode(p)) :]) for row, p in zip(rows, prompts, strict=True)]

    assert task.exact_match(generate, 40) >= 0.95


def test_its_drafting_layer_knows_the_token_after_next() -> None:
    checkpoint = Checkpoint.open(FOLDER, mtp=True)
    model = from_folder(FOLDER).requires_grad_(False)
    mtp = fill(MultiTokenPrediction(checkpoint.config), checkpoint, "mtp")
    hits = total = 0
    for question in task.questions(40, seed=7):
        ids = torch.tensor([[*task.encode(question.prompt + question.answer), task.EOS]])
        positions = torch.arange(ids.shape[1])[None]
        x, caches = model.trunk(ids, positions, model.empty_caches(*ids.shape))
        drafts, _, _ = mtp(ids[:, 1:-1], x[:, :-2], positions[:, :-2], *(torch.zeros_like(c) for c in caches[-1]))
        first = len(task.encode(question.prompt)) - 2  # its draft is the answer's first letter
        hits += int((drafts[0, first:].argmax(-1) == ids[0, first + 2 :]).sum())
        total += ids.shape[1] - first - 2
    assert hits / total >= 0.95
