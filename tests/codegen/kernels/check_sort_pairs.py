import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels import sort_pairs as module
from codegen.kernels.sort_pairs import sort_pairs


@pytest.mark.parametrize("tokens, top_k, experts", [(1, 1, 1), (1, 3, 7), (13, 2, 5), (40, 6, 3)])
def test_agrees(tokens, top_k, experts, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_M_FEW", 8)
    monkeypatch.setattr(module, "BLOCK_M_MANY", 16)  # so that small inputs take several steps
    indices = torch.randint(experts, (tokens, top_k))
    expected = torch.ops.dsv3.sort_pairs(indices, experts)
    torch.testing.assert_close(sort_pairs(indices, experts), expected)


def test_everything_goes_to_one_expert():
    indices = torch.full((9, 2), 3)
    torch.testing.assert_close(sort_pairs(indices, 6), torch.ops.dsv3.sort_pairs(indices, 6))
