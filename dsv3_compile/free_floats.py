"""Python floats that Dynamo hands over as inputs: all of them with dynamic=True, else those that have changed.

No pass can read a scale or an epsilon that is an input. Those of a module are constants of its graph.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch.utils._sympy.symbol import SymT, symbol_is_type

from dsv3_compile.functional import from_module


def fix_floats_of_modules(traced: fx.GraphModule) -> None:
    """Let Dynamo trace a graph again, with those floats of modules that it left free as constants under a guard.

    Raises the exception that makes Dynamo do so, if there are any.
    """
    symbols = [str(symbol) for node, symbol in free_floats(traced).items() if from_module(node)]
    new = [symbol for symbol in symbols if not TensorifyState.should_specialize(symbol)]
    for symbol in new:
        TensorifyState.specialize(symbol)
    if new:
        raise TensorifyScalarRestartAnalysis


def free_floats(traced: fx.GraphModule) -> dict[fx.Node, sympy.Symbol]:
    """Inputs that stand for a float, tensors without dims, and the symbol that Dynamo gave its value."""
    found: dict[fx.Node, sympy.Symbol] = {}
    for node in traced.graph.find_nodes(op="placeholder"):
        number: Any = getattr(node.meta["example_value"], "item_memo", None)
        symbol = None if number is None else number.node._expr  # .expr is its value where something asked for that
        if isinstance(symbol, sympy.Symbol) and symbol_is_type(symbol, SymT.FLOAT):
            found[node] = symbol
    return found
