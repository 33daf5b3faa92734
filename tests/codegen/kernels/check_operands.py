"""Every launcher reads its operands where they lie, or says that it cannot, and in whatever dtype they may be."""

import importlib

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from tests.codegen.calls import LOOSE, OPS, WRITTEN, arguments, copies, outcomes
from tests.codegen.strides import elsewhere, repeated

SIZES = {"B": 2, "S": 3, "T": 7, "N": 5, "M": 11}


def results(op, operands):
    return outcomes(op, getattr(importlib.import_module(f"codegen.kernels.{op}"), op), operands)


@pytest.mark.parametrize("op", OPS)
def test_operands_may_lie_anywhere(op):
    given = arguments(op, SIZES)
    expected = results(op, copies(given))
    for place, operand in enumerate(given):
        for how, moved in elsewhere(operand) if isinstance(operand, torch.Tensor) else ():
            operands = copies(given)
            operands[place] = moved
            if place in WRITTEN.get(op, ()) and moved.stride(-1) != 1:
                with pytest.raises(ValueError, match="must be contiguous"):
                    results(op, operands)
                continue
            for one, other in zip(results(op, operands), expected, strict=True):
                torch.testing.assert_close(one, other, msg=f"operand {place}, {how}")


@pytest.mark.parametrize("op", sorted({*OPS} - {"grouped_linear"}))  # rows behind its last offset are nobody's
def test_operands_may_repeat_what_is_stored_once(op):
    given = arguments(op, SIZES)
    for place, operand in enumerate(given):
        if isinstance(operand, torch.Tensor) and place not in WRITTEN.get(op, ()):
            once, many = copies(given), copies(given)
            once[place], many[place] = repeated(operand), repeated(operand).contiguous()
            for one, other in zip(results(op, once), results(op, many), strict=True):
                torch.testing.assert_close(one, other, msg=f"operand {place}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op, place", [(op, place) for op in OPS for place in LOOSE.get(op, ())])
def test_operands_may_have_dtypes_of_their_own(op, place, dtype):
    operands = arguments(op, SIZES, dtype)
    pairs = ((torch.float32, torch.float16), (torch.int64, torch.int32))
    other_dtype = {**dict(pairs), **{two: one for one, two in pairs}}
    operands[place] = operands[place].to(other_dtype[operands[place].dtype])
    expected = outcomes(op, getattr(torch.ops.dsv3, op), copies(operands))
    for one, other in zip(results(op, operands), expected, strict=True):
        assert one.dtype == other.dtype
        assert (one.double() - other.double()).norm() <= 3e-3 * other.double().norm()
