"""A call without a row, as of an empty batch, gives empty results and asks nothing of the GPU that it refuses."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from codegen import record
from codegen.dispatch import launcher
from codegen.ops.registry import COMPOSITE, OPAQUE
from codegen.record import TensorSpec, record_launches
from codegen.targets import target
from codegen.tuning import available
from tests.codegen.calls import OPS, WRITTEN, operands, real_operands

NO_ROWS = ({"B": (0,), "S": (2,)}, {"B": (2,), "S": (0,)})
OTHERS = {"N": (0,), "M": (0,), "T": (5,)}


def tensor(*shape, dtype=torch.bfloat16):
    return TensorSpec(shape, dtype)


HALF, POSITIONS = tensor("B", "S", 32, dtype=torch.float32), tensor("B", "S", dtype=torch.int64)
HOPPERS = {
    "linear": (tensor("N", 256), tensor(512, 256), 1e-6, tensor("N", 512)),
    "linear_pair": (tensor("N", 256), tensor(512, 256), tensor(64, 256)),
    "head_linear": (tensor("B", "S", 16, 128), tensor(16, 512, 128)),
    "norm_router": (tensor("N", 256), tensor(256), 1e-6, tensor(64, 256)),
    "attention_inputs_": (
        *(tensor("B", "S", 16 * 192), tensor("B", "S", 576), tensor(16, 128, 512), tensor(512)),
        *(HALF, HALF, POSITIONS, tensor("B", "T", 512), tensor("B", "T", 64), 1e-6, True),
    ),
}
CALLS = [
    *(("sm_80", op, operands(op)) for op in OPS),
    *(("sm_90", op, operands(op)) for op in OPS),
    *(("sm_90", op, real_operands(op)) for op in ("mla_attention", "attention", "routed_swiglu", "route", "swiglu")),
    *(("sm_90", op, given) for op, given in HOPPERS.items()),
]


def test_every_op_with_a_kernel_is_called():
    kernels = {(name, op) for name in ("sm_80", "sm_90") for op in (*OPAQUE, *COMPOSITE) if available(op, target(name))}
    assert kernels == {(name, op) for name, op, _ in CALLS}


@pytest.mark.parametrize("sizes", NO_ROWS, ids=["no request", "no query"])
@pytest.mark.parametrize(("name", "op", "given"), CALLS, ids=lambda value: value if isinstance(value, str) else "")
def test_no_rows(name, op, given, sizes, monkeypatch):
    def launched(kernel, arguments, options):
        assert not any(hasattr(one, "block_shape") and 0 in tuple(one.shape) for one in arguments), kernel.__name__
        return noted(kernel, arguments, options)

    def run(*arguments):
        found = launcher(op, target(name))(*arguments)
        if op not in WRITTEN:
            here = [torch.empty_like(x, device="cpu") if isinstance(x, torch.Tensor) else x for x in arguments]
            expected = getattr(torch.ops.dsv3, op)(*here)
            assert [(x.shape, x.dtype) for x in tree_leaves(found)] == [
                (x.shape, x.dtype) for x in tree_leaves(expected)
            ]
        ran.append(op)

    ran, noted = [], record._launch
    monkeypatch.setattr(record, "_launch", launched)
    record_launches(run, given, target(name), sizes | OTHERS)
    assert ran == [op]
