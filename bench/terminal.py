"""What the commands of the bench share: how far they are on standard error, and numbers among their options."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

Tick = Callable[[str], None]


@contextlib.contextmanager
def progress(count: int) -> Iterator[Tick]:
    """Yield what is told before each turn: a bar in a terminal, a line for each case elsewhere.

    The bar is drawn between turns only: a thread that draws would take time from whoever works.
    """
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("", total=count)

        def tick(what: str) -> None:
            bar.update(task, advance=1, description=what, refresh=True)

        yield tick


class _Lines:
    """A line whenever something begins that is not a turn of what is under way."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, what: str) -> None:
        begun = what.partition(", round")[0]
        if begun != self._last:
            say(begun)
        self._last = begun


def say(line: str) -> None:
    """Show a line on standard error."""
    print(line, file=sys.stderr, flush=True)


Number = TypeVar("Number", int, float)


def positive(kind: Callable[[str], Number]) -> Callable[[str], Number]:
    """Return a parser of a number above 0."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    parse.__name__ = "number above 0"  # argparse says it where it is none
    return parse


def list_of(kind: Callable[[str], Number]) -> Callable[[str], list[Number]]:
    """Return a parser of values with commas between; ascending, so that memory grows with the length."""

    def parse(text: str) -> list[Number]:
        return sorted({positive(kind)(part) for part in text.split(",")})

    parse.__name__ = "list of numbers"
    return parse
