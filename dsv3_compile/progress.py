"""Progress on stderr: one line that is rewritten in place, and nothing at all when stderr is not a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from dsv3_compile.driver import Event

BAR = 24  # columns


class Display:
    """A progress callback for `dsv3_compile.compile`; as a context manager it clears its line at the end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.start = time.monotonic()
        self.shown = self.stream.isatty()

    def __call__(self, event: Event) -> None:
        if not self.shown:
            return
        filled = BAR * event.done // max(event.total, 1)
        bar = "█" * filled + "·" * (BAR - filled)
        seconds = time.monotonic() - self.start
        line = f"{seconds:5.1f} s  {event.stage:<9} {bar}  {event.detail}"
        self._write(line[: shutil.get_terminal_size().columns - 1])

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._write("")

    def _write(self, line: str) -> None:
        self.stream.write(f"\r\x1b[K{line}")
        self.stream.flush()
