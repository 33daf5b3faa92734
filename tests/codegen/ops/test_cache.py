"""write_cache and write_cache_: what is written, where, and that nothing else moves."""

import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3

dsv3 = torch.ops.dsv3


def draw(positions, context=9, rank=6, rope=4):
    batch, queries = positions.shape
    angle = torch.randn(batch, queries, rope // 2)
    return (
        torch.randn(batch, queries, rank + rope),
        torch.randn(rank),
        angle.cos(),
        angle.sin(),
        positions,
        torch.randn(batch, context, rank),
        torch.randn(batch, context, rope),
        1e-6,
        True,
    )


def test_rows_at_positions_hold_the_normalised_latent_and_the_rotated_key():
    positions = torch.tensor([[4, 5], [0, 8]])
    kv, weight, cos, sin, _, latent, rope_key, eps, _ = arguments = draw(positions)
    new_latent, new_rope = dsv3.write_cache(*arguments)
    for b in range(2):
        for s, t in enumerate(positions[b].tolist()):
            row = kv[b, s, :6]
            torch.testing.assert_close(new_latent[b, t], weight * row / (row.square().mean() + eps).sqrt())
            pair = torch.complex(kv[b, s, 6::2], kv[b, s, 7::2]) * torch.complex(cos[b, s], sin[b, s])
            torch.testing.assert_close(new_rope[b, t], torch.view_as_real(pair).flatten())
    untouched = torch.ones(2, 9, dtype=torch.bool).scatter(1, positions, False)
    assert torch.equal(new_latent[untouched], latent[untouched])
    assert torch.equal(new_rope[untouched], rope_key[untouched])


def test_in_place_form_writes_the_same_and_returns_nothing():
    arguments = draw(torch.tensor([[7], [2]]))
    expected = dsv3.write_cache(*arguments)
    assert dsv3.write_cache_(*arguments) is None
    torch.testing.assert_close(arguments[5:7], expected)
