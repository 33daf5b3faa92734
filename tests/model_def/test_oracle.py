"""The definition against transformers, on random small checkpoints that transformers wrote."""

from pathlib import Path

import pytest
import torch

from model_def import Decoder
from tests.model_def.builders import all_logits, from_folder

pytest.importorskip("transformers")
from tests import oracle  # noqa: E402  (imports transformers)

TOLERANCE = 2e-5  # absolute, on logits of root mean square 1, in float32


@pytest.fixture(scope="module", params=oracle.CASES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Decoder]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return oracle.save(request.param, folder), from_folder(folder)


def test_logits(models: tuple[torch.nn.Module, Decoder]) -> None:
    reference, ours = models
    ids = torch.randint(oracle.VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(3))
    expected = torch.stack([oracle.logits(reference, row) for row in ids])
    assert 0.8 < expected.square().mean().sqrt() < 1.25
    assert (all_logits(ours, ids) - expected).abs().max() <= TOLERANCE


def test_token_by_token(models: tuple[torch.nn.Module, Decoder]) -> None:
    reference, ours = models
    ids = torch.randint(oracle.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(4))
    expected = oracle.logits(reference, ids[0])
    caches = ours.empty_caches(1, 20)
    with torch.no_grad():
        for at in range(12):
            logits, caches = ours(ids[:, at : at + 1], torch.full((1, 1), at), caches)
            assert (logits[0, 0] - expected[at]).abs().max() <= TOLERANCE
