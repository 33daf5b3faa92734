"""What all passes share."""

from __future__ import annotations

import pytest
import torch

from passes.base import fake_einsum, is_sum_of_products

SIZES = {"b": 3, "h": 5, "s": 1, "t": 7, "c": 4, "p": 6, "d": 8}
EQUATIONS = (
    "bshp,hpc->bshc", "bshc,btc->bhst", "bhst,btc->bshc", "bshc,hvc->bshv".replace("v", "d"), "btc,hpc->bthp",
    "bhst,bthp->bshp", "bshp,dhp->bsd", "hpc,dc->hpd", "bshp,bthp->bhst", "hc,bhc->b",
)  # fmt: skip


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_fake_product_has_the_layout_of_the_real_one(equation: str, queries: int) -> None:
    sizes = SIZES | {"s": queries}
    operands = [torch.randn([sizes[c] for c in letters]) for letters in equation.split("->")[0].split(",")]
    real, fake = torch.einsum(equation, *operands), fake_einsum(equation, operands)
    assert fake.shape == real.shape
    wide = [(n, stride) for n, stride in zip(real.shape, real.stride(), strict=True) if n != 1]
    assert [(n, s) for n, s in zip(fake.shape, fake.stride(), strict=True) if n != 1] == wide


@pytest.mark.parametrize("equation", ["bc,bc->bc", "b,c->cb"])
def test_what_sums_nothing_is_left_to_torch(equation: str) -> None:
    assert not is_sum_of_products(equation, (torch.ones(2), torch.ones(2)))
    assert is_sum_of_products("bc,bc->b", (torch.ones(2), torch.ones(2)))
