"""One line on a terminal, nothing anywhere else."""

from __future__ import annotations

import io

from dsv3_compile.driver import Event
from dsv3_compile.progress import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_line_that_is_cleared_at_the_end() -> None:
    stream = Terminal()
    with Display(stream) as display:
        display(Event("passes", "moe decode: lower", 3, 4))
    shown = stream.getvalue()
    assert "passes" in shown and "moe decode: lower" in shown
    assert shown.count("█") == 3 * shown.count("·"), "the bar is three quarters full"
    assert "\n" not in shown and shown.endswith("\r\x1b[K")


def test_no_other_stream_sees_anything() -> None:
    stream = io.StringIO()
    with Display(stream) as display:
        display(Event("passes", "moe decode: lower", 3, 4))
    assert stream.getvalue() == ""
