"""Kernels that only move memory do so in pieces of 16 bytes, as machine code shows."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
import triton

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.record import TensorSpec
from codegen.targets import target
from tests.codegen.calls import compiled

BF16 = torch.bfloat16
ANGLE = TensorSpec(("B", "S", 32), torch.float32)
# The last columns of 16 heads of 128 + 64, in a projection of 3648 columns.
ROPE = TensorSpec(("B", "S", 16, 64), BF16, ("S*3648", 3648, 192, 1))


def widths(op, operands, tmp_path, on):
    """How many bits each access to global memory moves."""
    found = set()
    for number, code in enumerate(compiled(op, operands, target(on)).binaries.values()):
        if code.startswith(b"\x7fELF"):
            (tmp_path / f"{number}.cubin").write_bytes(code)
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", str(tmp_path / f"{number}.cubin")]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for modifiers in re.findall(r"\b(?:LDG|STG)\.E((?:\.\w+)*)", text):
                found.add(next((int(one) for one in modifiers.split(".") if one in ("64", "128")), 32))
                assert not re.search(r"\b[US](8|16)\b", modifiers)
    return found


@pytest.mark.parametrize("on", ["sm_80", "sm_90", "sm_100"])
def test_neighbours_move_together(tmp_path, on):
    assert widths("rotary", (ROPE, ANGLE, ANGLE, True), tmp_path, on) == {128}


def test_halves_are_wide_as_well(tmp_path):
    assert min(widths("rotary", (ROPE, ANGLE, ANGLE, False), tmp_path, "sm_90")) >= 64
