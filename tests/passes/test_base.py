"""What all passes share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.base import fake_result, is_sum_of_products

aten = torch.ops.aten

SIZES = {"b": 3, "h": 5, "s": 1, "t": 7, "c": 4, "p": 6, "d": 8}
EQUATIONS = (
    "bshp,hpc->bshc", "bshc,btc->bhst", "bhst,btc->bshc", "bshc,hvc->bshv".replace("v", "d"), "btc,hpc->bthp",
    "bhst,bthp->bshp", "bshp,dhp->bsd", "hpc,dc->hpd", "bshp,bthp->bhst", "hc,bhc->b",
    "thp,bpc", "tb,bs", "hp,hp", "thp,bpc->bcht", "htp,hpc->cth", "bd,tdc->tbc",
)  # fmt: skip


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_fake_product_has_the_layout_of_the_real_one(equation: str, queries: int) -> None:
    sizes = SIZES | {"s": queries}
    operands = [torch.randn([sizes[c] for c in letters]) for letters in equation.split("->")[0].split(",")]
    assert_same_layout(equation, operands)


DOTTED = {
    "...d,hd->...h": [(3, 5, 4), (7, 4)],
    "...st,...tv->...sv": [(1, 5, 2, 4), (3, 1, 4, 6)],
    "...st, tv...": [(5, 2, 4), (4, 6, 3, 5)],
    "b...d,d->b": [(3, 5, 2, 4), (4,)],
}


@pytest.mark.parametrize("equation", DOTTED)
def test_a_fake_product_with_an_ellipsis_has_the_layout_of_the_real_one(equation: str) -> None:
    assert_same_layout(equation, [torch.randn(shape) for shape in DOTTED[equation]])


def assert_same_layout(equation: str, operands: list[Tensor]) -> None:
    real = torch.einsum(equation, *operands)
    fake = fake_result(aten.einsum.default, (equation, operands), {})
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
        (aten.linear.default, (x, matrix[0])),
    ):
        real, fake = target(*arguments), fake_result(target, arguments, {})
        assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())


@pytest.mark.parametrize(("letters", "out"), [(("bc", "bc"), "bc"), (("b", "c"), "cb")])
def test_what_sums_nothing_is_left_to_torch(letters: tuple[str, str], out: str) -> None:
    assert not is_sum_of_products(letters, out)
    assert is_sum_of_products(("bc", "bc"), "b")
