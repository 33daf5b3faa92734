"""How an op of the vocabulary is defined: a schema, a torch reference and, where it is opaque, a fake and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "dsv3"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

Implementation = TypeVar("Implementation", bound=Callable[..., Any])

COMPOSITE: dict[str, tuple[str, Callable[..., Any]]] = {}  # ops that compilers trace through: schema and reference
LAYOUTS: dict[Any, Callable[..., Any]] = {}  # of composite ops: what they give, without computing it
OPAQUE: list[str] = []  # ops that compilers call


def composite(schema: str, layout: Callable[..., Any]) -> Callable[[Implementation], Implementation]:
    """Define an op whose reference is traced through, by Inductor and by autograd.

    `layout` makes empty outputs of the reference's shapes, strides and dtypes: on symbolic sizes, where every step of
    the reference would take milliseconds.
    """

    def register(reference: Implementation) -> Implementation:
        name = _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
        short = schema.split("(")[0]
        COMPOSITE[short] = schema, reference
        LAYOUTS[getattr(getattr(torch.ops, NAMESPACE), short).default] = layout
        return reference

    return register


def opaque(
    schema: str, fake: Callable[..., Any], flops: Callable[..., Any] | None = None
) -> Callable[[Implementation], Implementation]:
    """Define an op that stays one call. `fake` makes empty outputs of the right shape and dtype; `flops` takes the
    arguments of a call with shapes in place of tensors, and `out_shape`, as torch.utils.flop_counter does, which
    cannot see inside the op. The shapes may hold symbols.

    The reference serves every device until a kernel for that device is registered over it.
    """

    def register(reference: Implementation) -> Implementation:
        # Not torch.library.custom_op: it costs tens of microseconds a call, which is
        # as much as one expert of a small model takes.
        name = _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        short = schema.split("(")[0]
        torch.library.register_fake(f"{NAMESPACE}::{short}", fake, lib=_LIBRARY)
        OPAQUE.append(short)
        if flops is not None:
            register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), short))(flops)
        return reference

    return register


def one_call(op: str) -> Any:
    """The twin of a composite op that stays one call, for graphs in which a kernel stands behind it."""
    schema, reference = COMPOSITE[op]
    name = f"{op}_call"
    if name not in _TWINS:
        _TWINS.add(name)
        _LIBRARY.define(schema.replace(op, name, 1), tags=_TAGS)
        layout = LAYOUTS[getattr(getattr(torch.ops, NAMESPACE), op).default]
        _LIBRARY.impl(name, _packed(reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _packed(layout), lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same with contiguous results, as kernels write them."""

    def run(*arguments: Any, **named: Any) -> Any:
        return tree_map(torch.Tensor.contiguous, function(*arguments, **named))

    return run


_TWINS: set[str] = set()
_SERVED: set[tuple[str, str]] = set()  # (op, dispatch key): torch refuses to be told twice


def serve(op: str, key: str, implementation: Callable[..., Any]) -> None:
    """Let an op run `implementation` in place of its reference on tensors of a dispatch key, such as "CUDA"."""
    if (op, key) not in _SERVED:
        _LIBRARY.impl(op, implementation, key)
        _SERVED.add((op, key))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an op computes: float32 for everything narrower, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
