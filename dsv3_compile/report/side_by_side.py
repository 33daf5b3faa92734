"""Two printed graphs beside each other, for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher

CONTEXT = 2  # unchanged lines shown around a change
RED, GREEN, DIM, PLAIN = "\x1b[31m", "\x1b[32m", "\x1b[2m", "\x1b[0m"


def printed(text: str) -> list[str]:
    """Lines that say something: no blank ones, no `del` (they move with every change), shapes two blanks behind."""
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("del "))
    return [re.sub(r"(?<=\S) {2,}# ", "  # ", line) for line in lines]


def side_by_side(before: str, after: str, width: int, colour: bool = False) -> Iterator[str]:
    """Lines of at most `width` columns: what was on the left, what is on the right, `-` and `+` for what changed."""
    old, new = printed(before), printed(after)
    half = (width - 5) // 2
    groups = SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(CONTEXT)
    for number, group in enumerate(groups):
        if number:
            yield _painted(" " * (half - 1) + "⋯", DIM, colour)
        for kind, i1, i2, j1, j2 in group:
            for k in range(max(i2 - i1, j2 - j1)):
                left = old[i1 + k] if i1 + k < i2 else ""
                right = new[j1 + k] if j1 + k < j2 else ""
                yield _line(left, right, kind != "equal", half, colour)


def _line(left: str, right: str, changed: bool, half: int, colour: bool) -> str:
    one, other = _fitted(left, half), _fitted(right, half)
    minus, plus = ("-" if changed and left else " "), ("+" if changed and right else " ")
    if changed:
        one, other = _painted(one, RED, colour and bool(left)), _painted(other, GREEN, colour and bool(right))
    return f"{minus} {one} {plus} {other}".rstrip()


def _fitted(line: str, width: int) -> str:
    line = re.sub(r"^ {4}", "", line)
    if len(line) <= width:
        return line.ljust(width)
    # The shape at the end says more than the last arguments.
    said, mark, shape = line.rpartition("  # ")
    shape = mark + shape if said.strip() and len(shape) < width // 2 else ""
    kept = width - 1 - len(shape)
    return f"{line[:kept]}…{shape}"


def _painted(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{PLAIN}" if colour else text
