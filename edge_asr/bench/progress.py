"""How far a bench is that takes as long as the sound it plays: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 2.0
"""How often it is worth telling: drawing takes time from what is measured."""
EVERY_PERCENT = 10
"""How often a plain line says how far it is."""

Tick = Callable[[float], None]
"""Takes the seconds that have passed."""


@contextmanager
def shown(what: str, seconds: float) -> Iterator[Tick]:
    """Yield what is to be told how much of so many seconds has passed; it shows that on standard error."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _Lines(what, seconds)
        return
    # Imported where it is used: it takes as long as half of the program's start.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(what, total=seconds)
        yield lambda done: bar.update(task, completed=min(done, seconds), refresh=True)


class _Lines:
    """Progress as lines, for logs and pipes."""

    def __init__(self, what: str, seconds: float) -> None:
        self._what = what
        self._seconds = seconds
        self._next = 0

    def __call__(self, done: float) -> None:
        percent = int(100 * min(1.0, done / self._seconds))
        if percent < self._next:
            return
        self._next = percent // EVERY_PERCENT * EVERY_PERCENT + EVERY_PERCENT
        if sys.stderr is not None:
            sys.stderr.write(f"{self._what}: {percent} % of {self._seconds:.0f} s\n")
            sys.stderr.flush()
