"""A block's graph as ordinary Python source: what `graphs/*.py` of an artifact holds.

The text needs torch, the `torch.ops.dsv3` vocabulary and, for a GPU, the kernel files beside it.
"""

from __future__ import annotations

import math
import operator
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from passes.base import END, placeholders

aten = torch.ops.aten

FUNCTION = "run"
LARGEST_CONSTANT = 4096  # elements; larger tensors are weights and have no place in source text
WIDTH = 110
COMMENT_COLUMN = 72

OPERATORS = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
"""Arithmetic on sizes."""

METHODS = {
    aten.expand.default: "expand",
    aten.flatten.using_ints: "flatten",
    aten.permute.default: "permute",
    aten.reshape.default: "reshape",
    aten.select.int: "select",
    aten.split_with_sizes.default: "split_with_sizes",
    aten.transpose.int: "transpose",
    aten.unbind.int: "unbind",
    aten.unflatten.int: "unflatten",
    aten.unsqueeze.default: "unsqueeze",
    aten.view.default: "view",
}
"""Views that a tensor has as methods: shorter to read than the operator, and faster to call."""

UNSAID = {"pin_memory": False}
"""Keyword arguments that export writes out although they are the default."""

STACK_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)')


@dataclass(frozen=True)
class KernelCall:
    """A node that runs an emitted kernel: function `op` of `kernels/<kernel>.py` in place of the op itself."""

    op: str
    kernel: str


def graph_source(module: fx.GraphModule, title: str, kernels: Mapping[str, KernelCall] = MappingProxyType({})) -> str:
    """Python text with one function `run`, one line per node, shapes as comments, model lines above their ops.

    kernels: by node name, which nodes run an emitted kernel.
    Raises ValueError naming the node when it is not a call of a torch operator or of arithmetic on sizes.
    """
    graph = module.graph
    letters = axis_letters(module)
    constants = {node.name: _constant(module, node) for node in graph.nodes if node.op == "get_attr"}
    body = [f"def {FUNCTION}("]
    body += [_commented(f"    {n.name},", _described(n, letters)) for n in placeholders(graph)]
    aliases = _aliases(kernels)
    callees = {node: aliases[call] for node, call in kernels.items()}
    body += ["):", *_body(graph, letters, callees)]
    header = [f'"""{title}"""', ""]
    header += ["import math", ""] if any("math." in line for line in body) else []
    header += ["import torch", "", "aten = torch.ops.aten", "dsv3 = torch.ops.dsv3"]
    if aliases:
        imports = [f"from ..kernels.{call.kernel} import {call.op} as {alias}" for call, alias in aliases.items()]
        header = [*header[:-3], "", *sorted(imports), *header[-3:]]
    header += [f"{name} = {text}" for name, text in constants.items()]
    return "\n".join([*header, "", "", *body]) + "\n"


def _aliases(kernels: Mapping[str, KernelCall]) -> dict[KernelCall, str]:
    """`swiglu_kernel`, and `swiglu_kernel_2` for the second kernel of an op."""
    aliases: dict[KernelCall, str] = {}
    for call in dict.fromkeys(kernels.values()):
        number = 1 + sum(other.op == call.op for other in aliases)
        aliases[call] = f"{call.op.rstrip('_')}_kernel" + (f"_{number}" if number > 1 else "")
    return aliases


def axes_of(value: Any, letters: dict[str, str]) -> list[int | str]:
    """Sizes as numbers, or as text in the letters of the legend when they are symbolic."""
    return [size if isinstance(size, int) else _rename(str(size), letters) for size in value.shape]


def axis_letters(module: fx.GraphModule) -> dict[str, str]:
    """Letters of the legend by size symbol, as capture noted them: {"s27": "B"}."""
    return {str(symbol): letter for letter, symbol in module.meta.get("dims", {}).items()}


def _rename(expression: str, letters: dict[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda word: letters.get(word[0], word[0]), expression)


def _described(node: fx.Node, letters: dict[str, str]) -> str:
    value = node.meta.get("val")
    role = f"{node.meta['role'].value} " if "role" in node.meta else ""
    if isinstance(value, Tensor):
        return f"{role}{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, axes_of(value, letters)))}]"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _rename(str(value), letters)
    return ""


def _commented(line: str, comment: str) -> str:
    return f"{line:<{COMMENT_COLUMN}}  # {comment}" if comment else line


def _body(graph: fx.Graph, letters: dict[str, str], callees: Mapping[str, str]) -> Iterator[str]:
    dying = _last_uses(graph)
    model_line = ""
    dead: list[str] = []
    for node in graph.nodes:
        if node.op == "output":
            yield "    return " + _argument(node.args[0])
        if node.op != "call_function":
            continue
        here = _model_line(node)
        if here and here != model_line:
            # Freed per model line: intermediates of a long prompt must not live to the end of the function.
            if dead:
                yield from _deletion(dead)
                dead = []
            yield f"\n    # {here}"
            model_line = here
        yield _commented(f"    {node.name} = {_expression(node, callees)}", _described(node, letters))
        dead += [n.name for n in dying.get(node, ())]


def _deletion(names: list[str]) -> Iterator[str]:
    for line in textwrap.wrap(", ".join(names), WIDTH - len("    del ")):
        yield f"    del {line.rstrip(',')}"


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that no later node reads."""
    seen: set[fx.Node] = set()
    dying: dict[fx.Node, list[fx.Node]] = {}
    for user in reversed(graph.nodes):
        for node in user.all_input_nodes:
            tensor = isinstance(node.meta.get("val"), Tensor) and node.op == "call_function"
            if node not in seen and tensor and user.op != "output":
                dying.setdefault(user, []).append(node)
            seen.add(node)
    return dying


def _model_line(node: fx.Node) -> str:
    frames = STACK_FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}  {frames[-1][2]}" if frames else ""


def _expression(node: fx.Node, callees: Mapping[str, str]) -> str:
    target = node.target
    if target is operator.getitem:
        return f"{_argument(node.args[0])}[{_argument(node.args[1])}]"
    if target in OPERATORS and len(node.args) == 2:
        return f"{_argument(node.args[0])} {OPERATORS[target]} {_argument(node.args[1])}"
    if target is aten.sym_size.int:
        return f"{_argument(node.args[0])}.shape[{node.args[1]}]"
    if target is aten.slice.Tensor and not node.kwargs:
        return _slice(*node.args)
    arguments = [_argument(a) for a in node.args]
    if target in METHODS and not node.kwargs:
        return f"{arguments[0]}.{METHODS[target]}({', '.join(arguments[1:])})"
    arguments += [f"{k}={_keyword(k, v, node.graph)}" for k, v in node.kwargs.items() if UNSAID.get(k, ...) != v]
    return f"{callees.get(node.name) or _callee(node)}({', '.join(arguments)})"


def _slice(x: fx.Node, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> str:
    axis = dim % len(x.meta["val"].shape)
    begin = "" if start in (None, 0) else _argument(start)
    end = "" if stop is None or (isinstance(stop, int) and stop == END) else _argument(stop)
    return f"{x.name}[{':, ' * axis}{begin}:{end}{'' if step == 1 else f':{step}'}]"


def _keyword(name: str, value: Any, graph: fx.Graph) -> str:
    inputs = placeholders(graph)
    # A graph is captured on the CPU and runs wherever its inputs are.
    return f"{inputs[0].name}.device" if name == "device" and inputs else _argument(value)


def _callee(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        space = "" if target.namespace in ("aten", "dsv3") else "torch.ops."
        return f"{space}{target}"
    name = getattr(target, "__name__", str(target))
    if getattr(torch, name, None) is target:  # torch.sym_max and its like
        return f"torch.{name}"
    if getattr(math, name, None) is target:
        return f"math.{name}"
    raise ValueError(f"{node.name} calls {target}; only torch operators and arithmetic on sizes can be written")


def _argument(value: Any) -> str:
    match value:
        case fx.Node():
            return value.name
        case bool() | int() | str() | None:
            return repr(value)
        case float():
            return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
        case torch.dtype() | torch.layout() | torch.memory_format():
            return str(value)
        case torch.device():
            return f"torch.device({str(value)!r})"
        case slice():
            return f"slice({_argument(value.start)}, {_argument(value.stop)}, {_argument(value.step)})"
        case tuple():
            return f"({', '.join(map(_argument, value))}{',' if len(value) == 1 else ''})"
        case list():
            return f"[{', '.join(map(_argument, value))}]"
    raise ValueError(f"an argument of type {type(value).__name__} cannot be written as source: {value!r}")


def _constant(module: fx.GraphModule, node: fx.Node) -> str:
    tensor = operator.attrgetter(str(node.target))(module)
    if not isinstance(tensor, Tensor) or tensor.numel() > LARGEST_CONSTANT:
        raise ValueError(f"{node.name} is a constant of {getattr(tensor, 'shape', type(tensor))}; make it a weight")
    return f"torch.tensor({_argument(tensor.tolist())}, dtype={tensor.dtype}, device={str(tensor.device)!r})"
