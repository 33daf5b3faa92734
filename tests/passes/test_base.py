"""What all passes share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.base import fake_einsum, fake_result, is_sum_of_products

aten = torch.ops.aten

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


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 5, 6),
        torch.randn(3, 5, 9)[..., 1:7],
        torch.randn(5, 3, 6).mT.mT,
        torch.randn(5, 3, 6).transpose(0, 1),
        torch.randn(3, 5, 6, dtype=torch.float16),
    ],
)
@pytest.mark.parametrize("vector", [torch.float32, torch.float16, None])
def test_a_fake_norm_and_a_fake_layer_have_the_layout_of_the_real_ones(x: Tensor, vector: torch.dtype | None) -> None:
    weight = None if vector is None else torch.randn(6, dtype=vector)
    matrix, bias = torch.randn(4, 6, dtype=x.dtype), None if weight is None else torch.randn(4, dtype=x.dtype)
    for target, arguments in (
        (aten.rms_norm.default, (x, [6], weight, 1e-6)),
        (aten.rms_norm.default, (x, [6])),
        (aten.linear.default, (x, matrix, bias)),
        (aten.linear.default, (x[0], matrix)),
    ):
        real, fake = target(*arguments), fake_result(target, arguments, {})
        assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())


@pytest.mark.parametrize("equation", ["bc,bc->bc", "b,c->cb"])
def test_what_sums_nothing_is_left_to_torch(equation: str) -> None:
    assert not is_sum_of_products(equation, (torch.ones(2), torch.ones(2)))
    assert is_sum_of_products("bc,bc->b", (torch.ones(2), torch.ones(2)))
