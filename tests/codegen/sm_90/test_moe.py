"""The Hopper expert layer: its plain parts in the interpreter, its Gluon parts as machine code for a GPU not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.build import build
from codegen.emit import compile_kernel, write_kernel
from codegen.kernels.sm_90 import routed_swiglu, skinny_linear
from codegen.record import TensorSpec, record_launches
from codegen.targets import target
from codegen.tuning import choose

SM_90 = target("sm_90")


def test_plain_parts_agree_with_the_references():
    checks = [str(Path(__file__).parent / f"check_{part}.py") for part in ("moe", "decode_step")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *checks],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def experts(dtype=torch.bfloat16, hidden=256, width=192, tokens="N"):
    return (
        TensorSpec((tokens, hidden), dtype),
        TensorSpec((tokens, 2), torch.int64),
        TensorSpec((tokens, 2), torch.float32),
        TensorSpec((8, 2 * width, hidden), dtype),
        TensorSpec((8, hidden, width), dtype),
    )


@pytest.mark.parametrize("tokens", ["N", 250])  # free sizes are tried at one row, few and many
def test_kernels_fit_the_chip_without_spilling(tokens):
    kernel = compile_kernel(write_kernel("routed_swiglu", experts(tokens=tokens), SM_90), SM_90)
    for binary in kernel.metadata["binaries"]:
        assert binary["stack_bytes"] == 0, binary["kernel"]
        assert binary["shared_bytes"] <= SM_90.shared_memory, binary["kernel"]


def test_float32_experts_get_the_plain_form():
    assert choose("routed_swiglu", experts(torch.float32), SM_90).parent.name == "kernels"


def test_rows_that_tensor_copies_cannot_address_get_the_plain_form():
    assert choose("routed_swiglu", experts(width=20), SM_90).parent.name == "kernels"
    assert choose("routed_swiglu", experts(), SM_90).parent.name == "sm_90"


def test_each_number_of_pairs_has_a_tiling_that_holds_a_typical_expert():
    means = [mean for mean, _, _ in routed_swiglu.TILINGS]
    assert means == sorted(means) and means[-1] == float("inf")
    for mean, wide, narrow in routed_swiglu.TILINGS[:-1]:
        assert mean <= wide.rows + wide.more_rows == narrow.rows + narrow.more_rows


def test_a_skinny_product_wants_few_rows_that_can_be_cut():
    def refusal(rows, depth):
        return skinny_linear.why_not_skinny(torch.empty(rows, depth).bfloat16(), torch.empty(64, depth).bfloat16())

    assert refusal(4, 256) is None
    assert "rows" in refusal(65, 256)
    assert "16 bytes" in refusal(4, 72)


@pytest.mark.parametrize(
    "rows, width, eps, added", [(1, 2048, None, True), (16, 3648, 1e-6, False), (64, 264, 1e-6, True)]
)
def test_skinny_products_fit_twice_on_a_multiprocessor(rows, width, eps, added):
    bf16 = torch.bfloat16
    residual = TensorSpec((rows, width), bf16) if added else None
    call = (TensorSpec((rows, 512), bf16), TensorSpec((width, 512), bf16), eps, residual)
    (launch,) = record_launches(skinny_linear.skinny_linear, call, SM_90)
    ((_, facts),) = build(skinny_linear, [launch], SM_90)
    assert facts["stack_bytes"] == 0
    assert 2 * facts["shared_bytes"] <= SM_90.shared_memory
