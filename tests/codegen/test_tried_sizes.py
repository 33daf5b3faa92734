"""Stored code serves every size: what a launcher launches at sizes nobody tried is among what it launches at those that
were, so that a compiled model compiles nothing when a prompt or a batch of a new size comes."""

import importlib
from dataclasses import replace

import pytest
import torch

from codegen.record import TensorSpec, record_launches
from codegen.targets import target
from codegen.tuning import KERNELS, available, choose, tried_sizes
from tests.codegen.calls import real_operands

FEW = (1, 2, 3, 4, 5, 6, 8, 11, 12, 16, 17, 24, 32, 33, 48, 64, 65, 100, 128)
MANY = (192, 256, 300, 384, 512, 640, 768, 1000, 1024, 1280, 1536, 2000, 2048, 3000, 4096, 8192, 16384)
BF16 = torch.bfloat16


def heads(number):
    """Decode attention of so many heads."""
    *wide, latent, rope_key, positions, scale = real_operands("mla_attention")
    wide = [replace(one, shape=(*one.shape[:2], number, one.shape[3])) for one in wide]
    return *wide, latent, rope_key, positions, scale


CALLS = {
    **{f"mla_attention of {number} heads": ("mla_attention", heads(number)) for number in (8, 16, 20, 64, 128)},
    **{op: (op, real_operands(op)) for op in ("attention", "route", "routed_swiglu", "swiglu", "add_rms_norm")},
    "linear": ("linear", (TensorSpec(("B", 2048), BF16), TensorSpec((3648, 2048), BF16), 1e-6, None)),
    "head_linear": ("head_linear", (TensorSpec(("B", 16, 512), BF16), TensorSpec((16, 128, 512), BF16))),
}


@pytest.mark.parametrize(
    "name, call",
    [(name, call) for name in ("sm_80", "sm_90") for call in CALLS if available(CALLS[call][0], target(name))],
)
def test_no_size_launches_what_was_not_found(name, call):
    (op, operands), gpu = CALLS[call], target(name)
    path = choose(op, operands, gpu)
    place = "codegen.kernels" if path.parent == KERNELS else f"codegen.kernels.{name}"
    launcher = getattr(importlib.import_module(f"{place}.{path.stem}"), op)
    found = {launch.same_code() for launch in record_launches(launcher, operands, gpu, tried_sizes(path, gpu))}
    letters = set().union(*(one.free_sizes() for one in operands if isinstance(one, TensorSpec)))
    sizes = {"B": FEW, "T": (*FEW, *MANY)} if letters == {"B", "T"} else {"B": (*FEW, *MANY)}
    if "S" in letters:
        sizes = {"B": (1, 3, 32), "S": (1, 16, 100, 1024, 3000), "T": (1, 64, 300, 3000, 16384)}
    for launch in record_launches(launcher, operands, gpu, sizes):
        assert launch.same_code() in found, f"{launch.kernel} {dict(launch.constants)} {dict(launch.options)}"
