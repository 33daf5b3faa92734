"""Equations of einsum in their explicit form."""

from __future__ import annotations

import string
from collections.abc import Sequence

DOTS = "..."


def explicit(equation: str, ranks: Sequence[int]) -> tuple[tuple[str, ...], str]:
    """(letters of every operand, letters of the result), one letter per dim, of any equation that torch takes.

    ranks: of the operands. Dims behind an ellipsis get letters of their own, aligned on the right; without "->" the
    result has these, and then, in order, the letters that stand once. As everywhere in einsum, a dim of size one is
    broadcast against a wider one of the same letter.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    hidden = [rank - len(term.replace(DOTS, "")) for term, rank in zip(terms, ranks, strict=True)]
    free = [letter for letter in string.ascii_letters if letter not in equation][: max(hidden)]
    if not arrow:
        once = sorted(letter for letter in set(inputs) - {",", "."} if inputs.count(letter) == 1)
        out = DOTS + "".join(once)
    spelled = (term.replace(DOTS, "".join(free[len(free) - n :])) for term, n in zip(terms, hidden, strict=True))
    return tuple(spelled), out.replace(DOTS, "".join(free))
