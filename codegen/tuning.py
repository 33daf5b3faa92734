"""Which form of a kernel a target gets, and with which tiles."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from codegen.record import TRIED_SIZES, Operand, fitting
from codegen.targets import Target

KERNELS = Path(__file__).parent / "kernels"

# Numbers at the top of kernel files, where a target wants others than the file's own.
TILES: dict[tuple[str, str], dict[str, int]] = {
    # 64 KiB of local memory hold one tile of a latent of 512, not two.
    ("mla_attention", "gfx942"): {"BLOCK_T": 16, "NUM_STAGES": 1, "PROGRAMS": 608},
    ("mla_attention", "sm_80"): {"PROGRAMS": 216},
    ("mla_attention", "sm_100"): {"PROGRAMS": 296},
    ("attention", "gfx942"): {"NUM_STAGES": 1},
    ("grouped_linear", "gfx942"): {"MAX_STAGES": 2},
    ("routed_swiglu", "gfx942"): {"MAX_STAGES": 2},
}


def own_form(op: str, target: Target) -> ModuleType | None:
    """The target's own kernel of an op, as a module; None where it has none.

    A file of the op's name may also be a helper of other kernels: then it defines no launcher.
    """
    if not (KERNELS / target.name / f"{op}.py").is_file():
        return None
    module = importlib.import_module(f"codegen.kernels.{target.name}.{op}")
    return module if hasattr(module, op) else None


def available(op: str, target: Target) -> bool:
    """Is there a kernel for the op on a target?"""
    return (KERNELS / f"{op}.py").is_file() or own_form(op, target) is not None


def choose(op: str, operands: Sequence[Operand], target: Target) -> Path:
    """The kernel file that serves a call on a target: the target's own form where it exists and does, else the plain.

    A target's form serves unless it defines `serves` and that returns a reason. ValueError if there is no kernel.
    """
    if not available(op, target):
        have = sorted(path.stem for path in KERNELS.glob("*.py") if path.stem not in ("__init__", "layout"))
        raise ValueError(f"no kernel for op {op!r}; there are: {', '.join(have)}")
    own = own_form(op, target)
    if own is not None and fitting(getattr(own, "serves", None), operands, target):
        return KERNELS / target.name / f"{op}.py"
    return KERNELS / f"{op}.py"


def tried_sizes(path: Path, target: Target) -> Mapping[str, Sequence[int]] | Sequence[int]:
    """Free sizes at which the launches of a kernel file are found: the usual ones, or its own TRIED_SIZES, which may
    be by the size's name."""
    place = "codegen.kernels" if path.parent == KERNELS else f"codegen.kernels.{target.name}"
    return getattr(importlib.import_module(f"{place}.{path.stem}"), "TRIED_SIZES", TRIED_SIZES)


def tiles(path: Path, target: Target) -> dict[str, int]:
    """Numbers that replace a kernel file's own on this target."""
    return TILES.get((path.stem, target.name), {}) if path.parent == KERNELS else {}
