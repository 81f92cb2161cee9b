"""What a process and its children take of the machine, as Linux counts it, and how that goes on over time."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
WANDERS = 0.95
"""From this correlation of neighbours on, values are taken to wander: each is the one before it and a step."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A process and its children at a moment."""

    at: float
    """Monotonic seconds."""
    cpu_s: float
    """User and system time so far."""
    switches: Mapping[int, int]
    """How often each thread has waited for something so far: as often it was woken up."""
    rss_bytes: int


def read_process(pid: int) -> Reading:
    """Read what is known of a process. Raises OSError where it has ended."""
    cpu, rss, switches = _cpu_s(pid, ended_children=True), _rss_bytes(pid), dict(_switches(pid))
    for child in _descendants(pid):
        with contextlib.suppress(OSError):  # it has just ended, and counts as such from now on
            used, size, switched = _cpu_s(child), _rss_bytes(child), dict(_switches(child))
            cpu, rss, switches = cpu + used, rss + size, {**switches, **switched}
    return Reading(time.monotonic(), cpu, switches, rss)


def cpu_share(readings: Sequence[Reading]) -> float:
    """Return how much of one core was taken between the first and the last reading."""
    first, last = readings[0], readings[-1]
    return (last.cpu_s - first.cpu_s) / (last.at - first.at)


def wakeups_per_s(readings: Sequence[Reading]) -> float:
    """Return how often a thread was woken up; what one did after its last reading is lost with it."""
    count = sum(
        now - before.switches.get(thread, 0)
        for before, after in pairwise(readings)
        for thread, now in after.switches.items()
    )
    return count / (readings[-1].at - readings[0].at)


def trend(times: Sequence[float], values: Sequence[float]) -> tuple[float, float] | None:
    """Return the slope of a line through `values` by least squares, and its standard error; None for fewer than 3.

    Memory moves in steps, so a value says little more than the one before it: the error grows by how alike neighbours
    are, and where they wander it is that of a random walk. A single step is then no trend; many small ones are.
    """
    if len(times) < 3:
        return None
    x, y = np.asarray(times) - np.mean(times), np.asarray(values) - np.mean(values)
    slope = float(x @ y / (x @ x))
    residuals = y - slope * x
    square = float(residuals @ residuals)
    alike = float(residuals[1:] @ residuals[:-1]) / square if square else 0.0
    if alike >= WANDERS:
        return slope, float(np.std(np.diff(y))) * math.sqrt(1.2 / len(x)) * (len(x) - 1) / float(x[-1] - x[0])
    inflation = (1 + alike) / (1 - alike) if alike > 0 else 1.0
    return slope, math.sqrt(square / (len(x) - 2) / float(x @ x) * inflation)


def _cpu_s(pid: int, ended_children: bool = False) -> float:
    fields = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    user_and_system = fields[11:15] if ended_children else fields[11:13]
    return sum(map(int, user_and_system)) / TICKS


def _rss_bytes(pid: int) -> int:
    return int((PROC / str(pid) / "statm").read_text(encoding="ascii").split()[1]) * PAGE


def _switches(pid: int) -> Iterator[tuple[int, int]]:
    for task in (PROC / str(pid) / "task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            status = (task / "status").read_text(encoding="utf-8", errors="replace")
            yield int(task.name), int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def _descendants(pid: int) -> Iterator[int]:
    """Yield the children, and theirs; none where the kernel does not list them."""
    for task in (PROC / str(pid) / "task").iterdir():
        with contextlib.suppress(OSError):
            for child in map(int, (task / "children").read_text(encoding="ascii").split()):
                yield child
                yield from _descendants(child)
