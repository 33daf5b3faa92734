"""Compiled checkpoints against transformers: the same logits, in prefill and decode, for every row of a batch."""

import functools
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import dsv3_compile as dsv3
import dsv3_compile.driver as driver
from tests import oracle

TOLERANCE = 5e-5  # absolute, on logits of root mean square 1, in float32
LENGTHS = (19, 1, 12)  # ragged prompts, padded on the right to the longest
STEPS = 6


built_once = functools.cache(driver.build)  # V3's cases have one config and differ in what weights they compile


class Compiled:
    """One case: the oracle, the compiled model, a ragged batch, and what the oracle says about each row."""

    def __init__(self, name: str, folder: Path):
        reference = oracle.save(name, folder / "checkpoint")
        with patch.object(driver, "build", lambda config, options, progress: built_once(config, options)):
            dsv3.compile(folder / "checkpoint", target="cpu", output=folder / "artifact", max_length=64)
        self.model = dsv3.load(folder / "artifact")
        generator = torch.Generator().manual_seed(1)
        total = max(LENGTHS) + STEPS
        self.ids = torch.randint(oracle.VOCABULARY, (len(LENGTHS), total), generator=generator)
        self.expected = [
            oracle.logits(reference, row[: length + STEPS]) for row, length in zip(self.ids, LENGTHS, strict=True)
        ]


@pytest.fixture(scope="module", params=oracle.CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(request.param, tmp_path_factory.mktemp(request.param))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == torch.float32
    return (found - expected).abs().max().item()


def test_logits_of_the_oracle_have_the_scale_the_tolerance_is_for(case: Compiled) -> None:
    assert 0.8 < torch.cat(case.expected).square().mean().sqrt() < 1.25


def test_prefill_of_equal_lengths(case: Compiled) -> None:
    logits, _ = case.model.prefill(case.ids[:1, : LENGTHS[0]])
    assert error(logits[0], case.expected[0][: LENGTHS[0]]) <= TOLERANCE


def test_ragged_prefill_and_decode_token_by_token(case: Compiled) -> None:
    lengths = torch.tensor(LENGTHS)
    prompts = case.ids[:, : max(LENGTHS)].clone()
    for row, length in zip(prompts, LENGTHS, strict=True):
        row[length:] = 7  # padding that would be seen if it were attended to
    logits, cache = case.model.prefill(prompts, lengths=lengths)
    for row, length in enumerate(LENGTHS):
        assert error(logits[row, :length], case.expected[row][:length]) <= TOLERANCE
    for step in range(STEPS):
        following = torch.stack([case.ids[row, length + step] for row, length in enumerate(LENGTHS)])
        logits, cache = case.model.decode(following[:, None], cache)
        for row, length in enumerate(LENGTHS):
            assert error(logits[row, 0], case.expected[row][length + step]) <= TOLERANCE


def test_negative_biases_tell_apart_the_masks_of_dropped_groups(tmp_path: Path) -> None:
    reference = oracle.build("v3-negative-biases")
    routed: list[Tensor] = []
    gate = reference.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, inputs, outputs: routed.append(inputs[0] @ module.weight.t()))
    oracle.logits(reference, torch.arange(40))
    biased = routed[0].flatten(0, -2).sigmoid() + gate.e_score_correction_bias
    groups = biased.view(-1, 4, 4).topk(2).values.sum(-1).topk(2).indices
    kept = torch.zeros(len(biased), 4).scatter_(1, groups, 1.0).repeat_interleave(4, 1).bool()
    by_zero = biased.masked_fill(~kept, 0.0).topk(4).indices
    assert (~kept.gather(1, by_zero)).any(1).float().mean() > 0.5
