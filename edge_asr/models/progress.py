"""What a user sees of a pull: a bar in a terminal, plain lines elsewhere, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import TaskID

EVERY_PERCENT = 10
"""How often a plain line says how far a file is."""


class Progress(Protocol):
    """Told by a pull how it gets on."""

    def begin(self, name: str, done: int, total: int | None) -> None:
        """Note that a file goes on at `done` of `total` bytes; None: nobody knows."""

    def advance(self, count: int) -> None:
        """Note that `count` bytes more are here."""

    def say(self, line: str) -> None:
        """Show a line."""


@contextmanager
def shown() -> Iterator[Progress]:
    """Yield the progress that fits standard error."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield Lines()
        return
    with Bar() as bar:
        yield bar


class Lines:
    """Progress as lines, for logs and pipes."""

    def __init__(self) -> None:
        self._name = ""
        self._done = 0
        self._total: int | None = None
        self._next = 0.0

    def begin(self, name: str, done: int, total: int | None) -> None:
        """See Progress."""
        self._name, self._done, self._total = name, done, total
        self._set_next()
        self.say(f"{name}: {'going on at ' + megabytes(done) if done else 'begin'}, {_of(total)}")

    def advance(self, count: int) -> None:
        """See Progress."""
        self._done += count
        if self._total and self._done >= self._next:
            self.say(f"{self._name}: {100 * self._done // self._total} %, {megabytes(self._done)}")
            self._set_next()

    def say(self, line: str) -> None:
        """See Progress."""
        if sys.stderr is not None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def _set_next(self) -> None:
        step = (self._total or 0) * EVERY_PERCENT / 100
        self._next = min(float(self._total or 0), (self._done // step + 1) * step) if step else 0.0


class Bar:
    """Progress as a bar with bytes, rate and time left."""

    def __init__(self) -> None:
        # Imported where it is used: it takes as long as half of the program's start.
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._name = ""
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str, done: int, total: int | None) -> None:
        """See Progress."""
        if self._task is not None and name == self._name:  # another try
            self._progress.remove_task(self._task)
        self._name, self._task = name, self._progress.add_task(name, completed=done, total=total)

    def advance(self, count: int) -> None:
        """See Progress."""
        if self._task is not None:
            self._progress.advance(self._task, count)

    def say(self, line: str) -> None:
        """See Progress."""
        self._progress.console.print(line, markup=False, highlight=False)


def megabytes(count: int) -> str:
    """Return a number of bytes as people read it: `81.8 MB`."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _of(total: int | None) -> str:
    return "size unknown" if total is None else f"{megabytes(total)} in all"
