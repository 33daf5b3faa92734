"""Every way to write an equation of einsum has one explicit form, with the same meaning."""

from __future__ import annotations

import pytest
import torch

from codegen.equations import explicit


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bsd,ed->bse", [(3, 2, 4), (5, 4)]),
        (" ij , jk ", [(2, 3), (3, 4)]),
        ("ba,aB", [(3, 2), (2, 5)]),
        ("i,i", [(3,), (3,)]),
        ("ij->", [(2, 3)]),
        ("ii,ij->j", [(3, 3), (3, 4)]),
        ("...d,hd->...h", [(2, 3, 4), (5, 4)]),
        ("...d,hd", [(2, 3, 4), (5, 4)]),
        ("a...b,...bc->a...c", [(7, 3, 4), (2, 1, 4, 5)]),
        ("...d,...d->d", [(2, 3, 4), (3, 4)]),
        ("z...,...->...z", [(3, 2), ()]),
    ],
)
def test_explicit_equations_mean_the_same(equation, shapes):
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    letters, out = explicit(equation, [len(shape) for shape in shapes])
    assert [len(own) for own in letters] == [len(shape) for shape in shapes]
    spelled = torch.einsum(f"{','.join(letters)}->{out}", *operands)
    torch.testing.assert_close(spelled, torch.einsum(equation, *operands), rtol=1e-12, atol=1e-12)
