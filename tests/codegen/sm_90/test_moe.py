"""The Hopper expert layer: its plain parts in the interpreter, its Gluon parts as machine code for a GPU not here."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.build import build
from codegen.emit import write_kernel
from codegen.kernels.grouped_linear import TILINGS
from codegen.kernels.sm_90 import routed_swiglu, skinny_linear
from codegen.kernels.sm_90.plan_experts import ExpertPlan
from codegen.kernels.sm_90.prefill_products import TILE_ROWS, prefill_products
from codegen.record import TensorSpec, record_launches
from codegen.targets import target
from codegen.tuning import available, choose
from tests.codegen.calls import compiled
from tests.codegen.sm_90.emulator import emulated

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


def experts(dtype=torch.bfloat16, hidden=256, width=192, tokens="N", apart=False, strides=None, weights=torch.float32):
    stack = TensorSpec((8, width if apart else 2 * width, hidden), dtype, strides)
    return (
        TensorSpec((tokens, hidden), dtype),
        TensorSpec((tokens, 2), torch.int64),
        TensorSpec((tokens, 2), weights),
        stack,
        TensorSpec((8, hidden, width), dtype),
        *((None, 0, stack) if apart else ()),
    )


# Free sizes are tried at one row, few and many.
@pytest.mark.parametrize("tokens, weights", [("N", torch.float32), (250, torch.bfloat16)])
def test_kernels_fit_the_chip_without_spilling(tokens, weights):
    kernel = compiled("routed_swiglu", experts(tokens=tokens, weights=weights), SM_90)
    for binary in kernel.metadata["binaries"]:
        assert binary["stack_bytes"] == 0, binary["kernel"]
        assert binary["shared_bytes"] <= SM_90.shared_memory, binary["kernel"]


# A whole tile, two tiles of an expert, groups without tokens, a single row, experts that nobody chose; sizes that are
# no multiple of a step or a tile; more multiprocessors than items, and fewer; the last experts shared.
@pytest.mark.parametrize(
    "counts, shared, hidden, width, processors, dtype, stored, limit",
    [
        ([0, 1, 192, 0, 65, 193], 0, 264, 136, 3, torch.bfloat16, "together", None),
        ([64, 129], 0, 72, 8, 7, torch.float16, "apart", 0.7),
        ([3, 400, 63], 0, 512, 200, 2, torch.bfloat16, "together", None),
        ([130, 0, 20, 200, 200], 2, 72, 264, 3, torch.bfloat16, "apart", None),
        ([200, 30], 0, 72, 72, 3, torch.bfloat16, "in turns", None),
    ],
)
def test_products_of_many_tokens_agree(counts, shared, hidden, width, processors, dtype, stored, limit, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    pairs, top_k = sum(counts), 2
    order = torch.randperm(pairs).int()
    tiles, begin = [], 0
    for expert, count in enumerate(counts):
        size = 128 if TILE_ROWS < count <= 256 else TILE_ROWS
        tiles += [(expert, begin + at, begin + min(at + size, count)) for at in range(0, count, size)]
        begin += count
    first = len(counts) - shared
    tiles.sort(key=lambda tile: tile[0] < first)
    table = torch.full((5, len(tiles) + 2), 1 << 30, dtype=torch.int32)  # the plan knows only a bound of their number
    table[:3, : len(tiles)] = torch.tensor(tiles).T
    table[3, :2] = torch.tensor([len(tiles), 0])
    table[4, : len(tiles)] = 0
    tokens = torch.randn(counts[-1], hidden).to(dtype)
    gathered = torch.randn(pairs - shared * counts[-1], hidden).to(dtype)
    # Kernels are told where gates and where ups are.
    stacks = (torch.randn(2, len(counts), width, hidden) * hidden**-0.5).to(dtype)
    if stored == "together":
        stacks = stacks.transpose(0, 1).contiguous().transpose(0, 1)
    elif stored == "in turns":
        stacks = stacks.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    gate, up = stacks
    down = (torch.randn(len(counts), hidden, width) * width**-0.5).to(dtype)
    weights = torch.rand(pairs // top_k + 1, top_k)
    plan = ExpertPlan(order, table, gathered, tokens, sum(tile[0] >= first for tile in tiles))
    with emulated(processors):
        y = prefill_products(plan, gate, up, down, weights, limit)
    gated, linear = (by_expert(torch.cat([gathered, *[tokens] * shared]), stack, counts) for stack in (gate, up))
    if limit is not None:
        gated, linear = gated.clamp(max=limit), linear.clamp(-limit, limit)
    hidden = (torch.nn.functional.silu(gated) * linear).to(dtype)
    assert error(y[order.long()], by_expert(hidden, down, counts) * weights.flatten()[order.long(), None]) < 4e-3


def by_expert(x, weight, counts):
    runs = x.double().split(counts)
    return torch.cat([run @ rows.double().T for run, rows in zip(runs, weight, strict=True)])


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def test_float32_experts_get_the_plain_form():
    assert choose("routed_swiglu", experts(torch.float32), SM_90).parent.name == "kernels"


def test_rows_that_tensor_copies_cannot_address_get_the_plain_form():
    assert choose("routed_swiglu", experts(width=20), SM_90).parent.name == "kernels"
    assert choose("routed_swiglu", experts(), SM_90).parent.name == "sm_90"


def test_stacks_that_are_no_matrix_of_rows_get_the_plain_form():
    def form(strides):
        return choose("routed_swiglu", experts(apart=True, strides=strides), SM_90).parent.name

    assert form(None) == "sm_90"
    assert form((2 * 192 * 256, 256, 1)) == "sm_90"  # a part of something higher
    assert form((192 * 256, 1, 192)) == "kernels"  # kept as inputs times outputs
    assert form((192 * 256 + 8, 256, 1)) == "kernels"
    assert form((192 * 264, 264, 1)) == "sm_90"  # a part of something wider
    assert form((2 * 192 * 256, 2 * 256, 1)) == "sm_90"  # gates and ups in turns
    assert form((192 * 260, 260, 1)) == form((256, 0, 1)) == form((192 * 512, 512, 2)) == "kernels"


@pytest.mark.parametrize("experts, top_k", [(64, 6), (66, 8), (257, 9), (385, 9)])
def test_the_sizes_that_are_tried_take_every_path(experts, top_k):
    limits = [tiling.mean * experts for tiling in TILINGS if tiling.mean < routed_swiglu.FEW_PAIRS]
    limits.append(routed_swiglu.FEW_PAIRS * experts)
    pairs = [size * top_k for size in routed_swiglu.TRIED_SIZES]
    assert min(routed_swiglu.TRIED_SIZES) == 1 < routed_swiglu.FEW_TOKENS in routed_swiglu.TRIED_SIZES
    for low, high in zip([top_k, *limits], [*limits, math.inf], strict=True):
        assert any(low < number <= high for number in pairs)


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
    _, _, facts = build(skinny_linear, launch, SM_90)
    assert facts["stack_bytes"] == 0
    assert 2 * facts["shared_bytes"] <= SM_90.shared_memory


def test_fused_steps_are_written_and_fit_whatever_the_batch():
    bf16, float32, int64 = torch.bfloat16, torch.float32, torch.int64

    def tensor(*shape, dtype=bf16):
        return TensorSpec(shape, dtype)

    angle, positions = tensor("B", 1, 32, dtype=float32), tensor("B", 1, dtype=int64)
    rows = TensorSpec(("B", 1, 3072), bf16, (3648, 3648, 1)), TensorSpec(("B", 1, 576), bf16, (3648, 3648, 1))
    up = TensorSpec((16, 128, 512), bf16, (256 * 512, 512, 1))
    caches = tensor("B", "T", 512), tensor("B", "T", 64)
    calls = {
        "linear": (tensor("B", 1, 2048), tensor(2048, 2048), None, tensor("B", 1, 2048)),
        "linear_pair": (tensor("B", 1, 2048), tensor(2816, 2048), tensor(2816, 2048)),
        "rms_norm": (tensor("B", 1, 2048), tensor(2048), 1e-6),
        "add_rms_norm": (tensor("B", 1, 2048), tensor("B", 1, 2048), tensor(2048), 1e-6),
        "swiglu": (tensor("B", 1, 5632),),
        "norm_router": (tensor("B", 2048), tensor(2048), 1e-6, tensor(64, 2048, dtype=float32)),
        "head_linear": (tensor("B", 1, 16, 512), up),
        "attention_inputs_": (*rows, up, tensor(512), angle, angle, positions, *caches, 1e-6, True),
    }
    for op, operands in calls.items():
        kernel = compiled(op, operands, SM_90)
        assert kernel.name.startswith(f"{op}__bfloat16")
        for binary in kernel.metadata["binaries"]:
            assert binary["stack_bytes"] <= 64, (op, binary["kernel"])  # a few registers at most
    # A single row and several take other tiles: neither must have been cut away.
    linear = write_kernel("linear", calls["linear"], SM_90)
    assert {launch.constants["ROWS"] for launch in linear.launches if launch.kernel == "skinny_linear_kernel"} == {
        8,
        16,
    }


def test_ops_that_only_hopper_has_are_nobody_elses():
    for op in ("linear", "linear_pair", "norm_router", "head_linear", "attention_inputs_"):
        assert available(op, SM_90) and not available(op, target("sm_80")) and not available(op, target("cpu"))
