"""What the import says of operators that it does not take."""

from __future__ import annotations

import pytest
import torch

from codegen import mlir

pytest.importorskip("torch_mlir", reason="torch-mlir has no wheel for this Python")


class Pairs(torch.nn.Module):
    def forward(self, indices):
        return torch.ops.dsv3.sort_pairs(indices, 4)


class Sorted(torch.nn.Module):
    def forward(self, x):
        return torch.sort(x, stable=True).values


def test_an_op_without_a_portable_form_is_named():
    exported = torch.export.export(Pairs(), (torch.zeros(3, 2, dtype=torch.int64),))
    with pytest.raises(mlir.MlirError, match=r"dsv3\.sort_pairs\.default has no MLIR form: node sort_pairs"):
        mlir.decomposed(exported)


@pytest.mark.parametrize("dialect", mlir.DIALECTS)
def test_an_operator_that_a_dialect_does_not_take_is_named(dialect, capfd):
    program = mlir.decomposed(torch.export.export(Sorted(), (torch.eye(3),)))
    with pytest.raises(mlir.MlirError, match=f"torch-mlir has no {dialect} form of aten") as refused:
        mlir.to_mlir(program, dialect, "main")
    assert refused.value.operator == "aten.sort"
    assert capfd.readouterr().err == ""  # the one line is all that is said


class Merged(torch.nn.Module):
    def forward(self, x, weight):
        return x.flatten(0, 1) @ weight


def test_merging_axes_of_free_size_fixes_none_of_them():
    free = {0: torch.export.Dim("B"), 1: torch.export.Dim("S", min=2)}
    exported = torch.export.export(Merged(), (torch.ones(2, 3, 8), torch.ones(8, 4)), dynamic_shapes=(free, {}))
    text = mlir.to_mlir(mlir.decomposed(exported), "linalg", "main")
    assert "[[0, 1], [2]] : tensor<?x?x8xf32> into tensor<?x8xf32>" in text
    assert "tensor<?x1x8xf32>" not in text
