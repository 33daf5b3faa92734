"""Random inputs of a graph: scaled as in a trained model, repeatable from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from passes.base import Role, expression_of, placeholders

Recipe = tuple[str, str, tuple[int, ...], int]
"""Name, kind ("normal", "matrix", "vector" or an integer dtype), shape, and the bound below which integers lie."""


def size_values(module: fx.GraphModule) -> dict[sympy.Symbol, int]:
    """Small, all-different values for the free sizes of a graph, in order of first appearance.

    A block's inputs show batch, queries, context in that order, so a row's queries fit into its context, and even a
    decode step has tokens enough to tell two ways of choosing experts apart.
    """
    symbols: dict[sympy.Symbol, None] = {}
    for node in placeholders(module.graph):
        for size in node.meta["val"].shape:
            symbols |= dict.fromkeys(getattr(expression_of(size), "free_symbols", ()))
    return dict(zip(symbols, (13, 5, 11, 17, 19), strict=False))


def recipes(module: fx.GraphModule, sizes: Mapping[sympy.Symbol, int]) -> list[Recipe]:
    """How each input of a captured graph is drawn. Integers lie below the placeholder's `meta["upper"]` (vocabulary, or
    the context T)."""
    return [_recipe(node, sizes) for node in placeholders(module.graph)]


def _recipe(node: fx.Node, sizes: Mapping[sympy.Symbol, int]) -> Recipe:
    fake = node.meta["val"]
    shape = tuple(number_of(size, sizes) for size in fake.shape)
    if not fake.is_floating_point():
        dtype = str(fake.dtype).removeprefix("torch.")
        return str(node.target), dtype, shape, number_of(node.meta["upper"], sizes)
    return str(node.target), kind_of(node), shape, 0


def kind_of(node: fx.Node) -> str:
    """How an input of floating-point numbers is drawn."""
    if node.meta["role"] is not Role.WEIGHT:
        return "normal"
    return "matrix" if len(node.meta["val"].shape) > 1 else "vector"


# The functions below import nothing of ours: repro scripts carry their source.


def draw(recipes: Sequence[tuple[str, str, tuple[int, ...], int]], seed: int) -> dict[str, Tensor]:
    """Values by name, floating point in float64.

    Matrices are N(0, 1/fan-in). Vectors are −(1 + 0.2 N): norm weights do not mind the sign, and selection biases
    that are all negative, and spread as far as the scores, let every token choose its own groups and experts. A
    large positive bias would choose them for all tokens, and hide a mask of 0 for −∞ or another score of groups.
    Integers are drawn per row, distinct and ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: draw_one(kind, shape, upper, generator) for name, kind, shape, upper in recipes}


def draw_one(kind: str, shape: tuple[int, ...], upper: int, generator: torch.Generator) -> Tensor:
    if kind not in ("normal", "matrix", "vector"):
        return ascending(shape, upper, generator).to(getattr(torch, kind))
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "normal":
        return normal
    if kind == "matrix":
        return normal / math.sqrt(shape[-1])
    return -(1 + 0.2 * normal)


def ascending(shape: tuple[int, ...], upper: int, generator: torch.Generator) -> Tensor:
    *rows, width = shape
    if width > upper:
        return torch.randint(0, upper, shape, generator=generator)
    order = torch.rand([*rows, upper], generator=generator, dtype=torch.float32)
    return order.argsort(-1)[..., :width].sort(-1).values


def number_of(size: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    """A size as a number, for given values of the free ones."""
    expression = expression_of(size)
    return int(expression.subs(sizes)) if isinstance(expression, sympy.Expr) else int(expression)
