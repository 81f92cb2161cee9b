"""What systemd is told: that we are ready, how it goes, that we are alive. Without systemd it is told nothing."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Protocol

LOOK_EVERY_S = 5.0
"""So often, at least, it is looked whether all goes on."""
EXTENDED_BY_S = 120.0
"""What has been built is loaded within this, even from a slow card."""


class Notifier:
    """Sends the notifications of sd_notify(3). Never blocks and never raises; for any thread."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Take the socket, and how often to say that we are alive, from systemd's variables."""
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._status = ""
        self._stopping = False
        self.watchdog_s = _watchdog_s(environ)
        """Seconds between two signs of life: half of what systemd waits; inf where it does not wait for any."""

    def ready(self) -> None:
        """Say that we can answer: after the start, and after a reload."""
        if not self._stopping:
            self._send("READY=1")

    def stopping(self) -> None:
        """Say that the stop has begun; from here on nothing is ready any more."""
        self._stopping = True
        self._send("STOPPING=1\nSTATUS=stopping")

    def extend(self, seconds: float) -> None:
        """Say that the start, or a reload, goes on for so long at least: systemd 236 and later waits for it then."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def reloading(self) -> None:
        """Say that the configuration or the model is being read anew; `ready` ends that."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def status(self, text: str) -> None:
        """Show one line in `systemctl status`; the same one again is not sent."""
        line = " ".join(text.split())
        if line != self._status and not self._stopping:
            self._status = line
            self._send(f"STATUS={line}")

    def alive(self) -> None:
        """Give a sign of life."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as unix:
                unix.setblocking(False)
                unix.sendto(message.encode(), self._address)
        except (OSError, ValueError):
            pass  # nobody listens, or not fast enough: that must not hinder the work


class Step(Protocol):
    """One thing that a thread is at."""

    @property
    def number(self) -> int:
        """Which one; the next has another number."""

    @property
    def may_last_s(self) -> float:
        """Seconds after which it is stuck rather than slow."""


class Progress:
    """Tells whether a thread gets on, from what it is at whenever somebody looks; that gives it nothing to do."""

    def __init__(self, step: Callable[[], Step | None], clock: Callable[[], float] = time.monotonic) -> None:
        """`step` returns what it is at, None where it waits or may take as long as it likes."""
        self._step, self._clock = step, clock
        self._number: int | None = None
        self._since = 0.0

    def __call__(self) -> bool:
        """Return whether it is at a step no longer than that may last. To be called every few seconds."""
        step = self._step()
        if step is None:
            self._number = None
            return True
        if step.number != self._number:
            self._number, self._since = step.number, self._clock()
        return self._clock() - self._since <= step.may_last_s


async def feed_watchdog(notifier: Notifier, alive: Callable[[], bool]) -> None:
    """Give signs of life while `alive()` says so, until cancelled; a loop that stands still starves it."""
    if notifier.watchdog_s == math.inf:
        return
    while True:
        if alive():
            notifier.alive()
        await asyncio.sleep(min(notifier.watchdog_s, LOOK_EVERY_S))


async def extend_timeout(notifier: Notifier, building: Callable[[], bool], every_s: float = 1.0) -> None:
    """Keep systemd waiting for a start or a reload while `building()` says so, until cancelled."""
    while True:
        if building():
            notifier.extend(EXTENDED_BY_S)
        await asyncio.sleep(every_s)


def _watchdog_s(environ: Mapping[str, str]) -> float:
    wanted, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not wanted.isdecimal() or not int(wanted) or (pid and pid != str(os.getpid())):
        return math.inf
    return int(wanted) / 2e6
