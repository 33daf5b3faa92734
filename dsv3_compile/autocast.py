"""Autocast spelled out: the casts that dispatch would make unseen as calls of the graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.amp import autocast_mode
from torch.utils._pytree import tree_leaves

from passes.base import fake_mode_of

aten = torch.ops.aten

DEVICES = ("cpu", "cuda")
VIEWS_THEN_MULTIPLIES = aten.einsum.default, aten.tensordot.default  # whose products cast what they were given


class Unspoken(Exception):
    """A call that casts where no graph can say so. One line: which."""


def surrounding() -> list[torch.autocast]:
    """What autocast does here, for each kind of device for which it is on."""
    return [
        torch.autocast(device, torch.get_autocast_dtype(device))
        for device in DEVICES
        if torch.is_autocast_enabled(device)
    ]


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Without autocast, whatever is on outside."""
    with contextlib.ExitStack() as stack:
        for setting in surrounding():
            stack.enter_context(torch.autocast(setting.device, enabled=False))
        yield


@contextlib.contextmanager
def switching(traced: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The same graph, to be traced in this context, with autocast switched where it says so: torch would note the
    switches only, and leave out casts of results that it takes to be of the dtype already.
    """
    if not any(node.target is autocast_mode._enter_autocast for node in traced.graph.nodes):
        yield traced
        return
    entered: list[torch.autocast] = []

    def enter(*setting: Any) -> None:
        entered.append(_setting(*setting))
        entered[-1].__enter__()

    def leave(_: None) -> None:
        entered.pop().__exit__(None, None, None)

    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    acting = {autocast_mode._enter_autocast: enter, autocast_mode._exit_autocast: leave}
    for node in graph.nodes:
        node.target = acting.get(node.target, node.target)
    try:
        yield fx.GraphModule(traced, graph)
    finally:
        while entered:  # where tracing stopped half-way
            leave(None)


def spell_out_casts(graph: fx.Graph, around: Sequence[torch.autocast]) -> None:
    """Let every call under autocast take arguments that are cast already, so that the graph means the same without.

    graph: traced before dispatch, its switches in it and acting. around: what is on where it begins. Raises Unspoken.
    """
    if not around and not graph.find_nodes(op="call_function", target=autocast_mode._enter_autocast):
        return
    on, casts = [*around], _Casts(graph)
    with switched_off(), fake_mode_of(graph):
        for node in list(graph.nodes):
            if node.target is autocast_mode._enter_autocast:
                on.append(_setting(*node.args))
            elif node.target is autocast_mode._exit_autocast:
                on.pop()
            elif isinstance(node.target, torch._ops.OpOverload) and _may_cast(node.target):
                device = next((value.device.type for value in _tensors(node)), "")
                innermost = next((setting for setting in reversed(on) if setting.device == device), None)
                if innermost is not None and innermost._enabled:
                    casts.cast_arguments(node, innermost)


class _Casts:
    """Inserts what is cast, each once, into a graph whose calls are visited in order."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.policies: dict[Any, tuple[torch.dtype | None, ...]] = {}
        self.made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def cast_arguments(self, node: fx.Node, setting: torch.autocast) -> None:
        kinds = ((value.dtype, value.ndim) for value in _tensors(node))
        key = node.target, setting.device, setting.fast_dtype, *kinds
        if key not in self.policies:
            try:
                self.policies[key] = _policy(node, setting)
            except (RuntimeError, TypeError, ValueError) as error:  # whatever the op makes of what it is tried with
                raise Unspoken(f"{node.name} under autocast: {str(error).strip().splitlines()[0]}") from error
        wanted = iter(self.policies[key])

        def cast(source: fx.Node) -> fx.Node:
            dtype = next(wanted) if isinstance(source.meta.get("val"), Tensor) else None
            if dtype is None or dtype == source.meta["val"].dtype:
                return source
            if (source, dtype) not in self.made:
                with self.graph.inserting_before(node):
                    made = self.graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
                made.meta = {**source.meta, "val": source.meta["val"].to(dtype)}
                self.made[source, dtype] = made
            return self.made[source, dtype]

        node.args, node.kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), cast)


def _setting(device: str, dtype: torch.dtype | None, enabled: bool, cached: bool | None) -> torch.autocast:
    """The context of these settings; off, in silence, for a type that the device does not cast to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.autocast(device, dtype, enabled, cached)


def _may_cast(target: torch._ops.OpOverload) -> bool:
    """Is it one that autocast knows, or made of others?"""
    return any(map(partial(_has_kernel, target), ("AutocastCPU", "AutocastCUDA", "CompositeImplicitAutograd")))


def _has_kernel(target: torch._ops.OpOverload, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key)


def _tensors(node: fx.Node) -> list[Tensor]:
    values = fx.node.map_arg((node.args, dict(node.kwargs)), lambda one: one.meta.get("val"))
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _policy(node: fx.Node, setting: torch.autocast) -> tuple[torch.dtype | None, ...]:
    """To what the call casts each of its tensors, None for what it leaves. Raises Unspoken.

    What autocast does for whom is written nowhere but in torch's dispatcher. It casts all floats alike, so the dtype of
    the result tells.
    """
    tensors = _tensors(node)
    with torch.no_grad(), setting:
        result = _made(node, tensors)
    floats = [value.is_floating_point() and value.dtype != torch.float64 for value in tensors]
    alike = len({value.dtype for value, among in zip(tensors, floats, strict=True) if among}) < 2
    if _has_kernel(node.target, f"Autocast{setting.device.upper()}"):
        ways = [None] * alike + [setting.fast_dtype, torch.float32]
    else:
        ways = [setting.fast_dtype if node.target in VIEWS_THEN_MULTIPLIES else None]
    for way in ways:
        dtypes = tuple(way if among else None for among in floats)
        cast = [value if dtype is None else value.to(dtype) for value, dtype in zip(tensors, dtypes, strict=True)]
        if _dtypes(result) == _dtypes(_made(node, cast)):
            return dtypes
    raise Unspoken(f"{node.name} casts inside under autocast, which the graph cannot say")


def _dtypes(value: Any) -> list[torch.dtype | None]:
    return [one.dtype if isinstance(one, Tensor) else None for one in tree_leaves(value)]


def _made(node: fx.Node, tensors: list[Tensor]) -> Any:
    """The call's fake result for these tensors in place of its own."""
    left = iter(tensors)

    def value(one: fx.Node) -> Any:
        return next(left) if isinstance(one.meta.get("val"), Tensor) else one.meta.get("val")

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
    return node.target(*args, **kwargs)
