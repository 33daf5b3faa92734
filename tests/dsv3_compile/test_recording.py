"""Prompts and decode steps recorded once and replayed, with a recorder that needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import dsv3_compile.recording as recording
import dsv3_compile.runtime as runtime
from dsv3_compile.recording import Prompts, Recording, Slot, Slots, padded_length
from dsv3_compile.runtime import Model, load
from tests.dsv3_compile import tiny

LONGEST = tiny.TINY.max_position_embeddings


class Recorder:
    """Replays by running again, into the same output; counts what it is asked for."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run) -> Recording:
        self.recorded += 1
        run()  # as a GPU's recorder warms up
        output = torch.full_like(run(), torch.nan)

        def replay() -> None:
            self.replayed += 1
            output.copy_(run())

        return Recording(replay, output)


@pytest.fixture
def model(artifact_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(runtime, "SMALLEST_CAPACITY", 4)
    loaded = load(artifact_folder)
    loaded.record = Recorder()
    return loaded


@pytest.fixture(scope="module")
def plain(artifact_folder: Path) -> Model:
    return load(artifact_folder)


def steps(model: Model, prompts: Tensor, lengths: list[int], count: int) -> list[Tensor]:
    _, cache = model.prefill(prompts, lengths)
    found = []
    for step in range(count):
        logits, cache = model.decode((prompts[:, :1] + step) % tiny.TINY.vocab_size, cache)
        found.append(logits)
    return found


def test_replayed_steps_give_the_same_logits_while_the_cache_grows(model: Model, plain: Model) -> None:
    prompts, lengths = torch.tensor([[3, 4, 5], [7, 8, 0]]), [3, 2]
    found, expected = (steps(one, prompts, lengths, 9) for one in (model, plain))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert (model.record.recorded, model.record.replayed) == (3, 9)  # capacities 4, 8 and 16


def test_generation_never_moves_the_cache(model: Model, plain: Model) -> None:
    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    found = model.generate(prompts, 11, lengths=[4, 2], eos=[])
    assert torch.equal(found, plain.generate(prompts, 11, lengths=[4, 2], eos=[]))
    assert (model.record.recorded, model.record.replayed) == (1, 10)


def test_the_next_prompt_of_the_same_size_replays_what_was_recorded(model: Model, plain: Model) -> None:
    for seed in range(3):
        prompts = torch.randint(tiny.TINY.vocab_size, (2, 3), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(model.generate(prompts, 5, eos=[]), plain.generate(prompts, 5, eos=[]))
    assert (model.record.recorded, model.record.replayed) == (
        2,
        2 + 3 * 4,
    )  # the prompt, from the second on, and the step
    model.generate(prompts[:1], 5, eos=[])
    assert model.record.recorded == 3


@pytest.mark.parametrize("length", [1, 3, 4, 6, 9])
def test_prompts_that_are_padded_and_replayed_give_the_same(model: Model, plain: Model, length: int) -> None:
    for seed in range(3):
        drawn = torch.Generator().manual_seed(seed)
        prompts = torch.randint(tiny.TINY.vocab_size, (2, length), generator=drawn)
        found, cache = model.prefill(prompts)
        expected, other = plain.prefill(prompts)
        torch.testing.assert_close(found, expected)
        assert found.shape == expected.shape and torch.equal(cache.lengths, other.lengths)
        for here, there in zip(cache.layers, other.layers, strict=True):
            for one, rows in zip(here, there, strict=True):
                torch.testing.assert_close(one[:, :length], rows[:, :length])
    assert model.record.replayed == 2  # the first one only told the size


@pytest.mark.parametrize("length", [1, 4, 6])
def test_prompts_of_which_the_last_positions_are_asked_for_are_replayed(
    model: Model, plain: Model, length: int
) -> None:
    for seed in range(3):
        drawn = torch.Generator().manual_seed(seed)
        prompts = torch.randint(tiny.TINY.vocab_size, (2, length), generator=drawn)
        lengths = [length, 1 + seed % length]
        found = next(model.stream(prompts, 1, lengths=lengths))
        logits, _ = plain.prefill(prompts, lengths)
        assert torch.equal(found, logits[torch.arange(2), torch.tensor(lengths) - 1].argmax(-1))
    assert model.record.replayed == 2  # the first one only told the size
    model.prefill(prompts)
    assert model.record.replayed == 2  # all positions are another recording


def test_prompts_of_all_sizes_share_the_rows_that_they_write(model: Model) -> None:
    for length in (3, 3, 9, 9):
        model.prefill(torch.ones(2, length, dtype=torch.int64))
    first, second = model.prompts.seen.values()
    assert first.ids.shape != second.ids.shape
    assert [x.data_ptr() for layer in first.layers for x in layer] == [
        x.data_ptr() for layer in second.layers for x in layer
    ]


def test_long_prompts_are_neither_padded_nor_recorded(model: Model, plain: Model, monkeypatch) -> None:
    monkeypatch.setattr(runtime, "MOST_RECORDED_TOKENS", 5)
    prompts = torch.tensor([[3, 4, 5], [6, 7, 8]])
    for _ in range(3):
        torch.testing.assert_close(model.prefill(prompts)[0], plain.prefill(prompts)[0])
    assert model.record.recorded == 0


def test_the_memory_of_prompts_is_bounded() -> None:
    prompts, made = Prompts(), []

    def make() -> object:
        made.append(object())
        return made[-1]

    for length in range(1, recording.MOST_PROMPTS + 3):
        assert prompts.again((1, length, True), make) is None
        assert prompts.again((1, length, True), make) is prompts.again((1, length, True), make) is made[-1]
    assert len(made) == recording.MOST_PROMPTS + 2
    assert sum(one is not None for one in prompts.seen.values()) == recording.MOST_PROMPTS
    assert prompts.again((1, 1, True), make) is made[-1]  # its memory was given up, its size is known
    assert len(made) == recording.MOST_PROMPTS + 3
    for length in range(100, 101 + recording.MOST_SEEN):
        prompts.again((1, length, True), make)
    assert len(prompts.seen) == recording.MOST_SEEN and prompts.again((1, 1, True), make) is None


@pytest.mark.parametrize("length", [1, 16, 17, 250, 256, 257, 2049, 4096])
def test_padding_costs_an_eighth_at_most(length: int) -> None:
    padded = padded_length(length)
    assert 0 <= padded - length <= max(15, length // 8)
    assert padded_length(padded) == padded


def test_two_caches_at_a_time_do_not_share_memory(model: Model, plain: Model) -> None:
    first, second = torch.tensor([[3, 4, 5]]), torch.tensor([[9, 8, 7]])
    token = torch.tensor([[1]])
    caches = [model.prefill(one)[1] for one in (first, second)]
    found = [model.decode(token, cache)[0] for cache in caches for _ in range(2)]
    others = [plain.prefill(one)[1] for one in (first, second)]
    expected = [plain.decode(token, cache)[0] for cache in others for _ in range(2)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert model.record.recorded == 5  # steps of each at capacities 4 and 8, and the second prompt


def test_logits_that_were_handed_out_stay(model: Model) -> None:
    _, cache = model.prefill(torch.tensor([[3, 4, 5]]))
    first, cache = model.decode(torch.tensor([[1]]), cache)
    kept = first.clone()
    model.decode(torch.tensor([[2]]), cache)
    assert torch.equal(first, kept)


def test_a_full_context_is_filled_to_the_last_position(model: Model) -> None:
    prompts = torch.ones(1, LONGEST - 2, dtype=torch.int64)
    assert model.generate(prompts, 10, eos=[]).shape == (1, 3)


def test_idle_memory_is_bounded() -> None:
    slots, made = Slots(), []
    for batch in range(1, recording.MOST_IDLE + 3):
        made.append(Slot([(torch.zeros(batch, 8, 2),)], torch.zeros(batch), torch.zeros(batch, 1)))
        slots.give_back(made[-1])
    assert len(slots.idle) == recording.MOST_IDLE
    assert slots.take(1, 8) is None
    assert slots.take(len(made), 4) is None
    assert slots.take(len(made), 8) is made[-1]
    assert slots.take(len(made), 8) is None


def test_a_cache_that_is_gone_leaves_its_memory_to_the_next(model: Model) -> None:
    _, cache = model.prefill(torch.tensor([[3, 4, 5]]))
    pointer = cache.layers[0][0].data_ptr()
    assert model.slots.idle == []
    del cache
    assert model.prefill(torch.tensor([[6, 7, 8]]))[1].layers[0][0].data_ptr() == pointer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_replay() -> None:
    record = recording.CudaRecorder()
    value = torch.ones(3, device="cuda")
    one, other = record(lambda: value * 2), record(lambda: value + 5)
    value.fill_(4)
    one.replay()
    other.replay()
    assert one.output.tolist() == [8.0] * 3 and other.output.tolist() == [9.0] * 3
