"""Who is let in: beyond what the machine can do in time, a request is refused at once instead of made to wait."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_asr import metrics
from edge_asr.errors import BusyError

REQUESTS = 64
"""Requests in progress, at most: each holds an upload in memory."""
WEIGHT = 0.1
"""What one request counts in the mean of the last ones."""
LONGER = 1.5
"""Retry-After is up to so many times as long, so that who was refused does not come back all at once."""


class Admission:
    """Knows how fast requests are done here, whatever takes the time, and how many there are.

    For the thread of the server's event loop.
    """

    def __init__(
        self,
        wait_s: float,
        backlog_s: Callable[[], float],
        *,
        requests: int = REQUESTS,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`wait_s`: how long a request may have to wait. `backlog_s`: what waits for the engine, by its cost."""
        self._wait_s = wait_s
        self._backlog_s = backlog_s
        self._requests = requests
        self._clock = clock
        self._chance = chance
        self._in_progress = 0
        self._interval_s = 0.0
        self._busy_since = 0.0

    @property
    def in_progress(self) -> int:
        """Requests that were let in and are not done."""
        return self._in_progress

    def expected_wait_s(self) -> float:
        """Return how long a request would wait: those in progress, at the pace that the last ones were done at."""
        return max(self._in_progress * self._interval_s, self._backlog_s())

    def check(self) -> None:
        """Raise BusyError where nobody should be let in."""
        if self._in_progress >= self._requests:
            self._refuse("requests", f"{self._requests} requests are in progress")
        if self.expected_wait_s() > self._wait_s:
            self._refuse("wait", f"a request would wait for more than {self._wait_s:g} s")

    @contextmanager
    def request(self) -> Iterator[None]:
        """Let a request in until the block ends. Raises BusyError."""
        self.check()
        began_at = self._clock()
        if not self._in_progress:
            self._busy_since = began_at
        self._in_progress += 1
        metrics.REQUESTS.set(self._in_progress)
        try:
            yield
        finally:
            self._in_progress -= 1
            metrics.REQUESTS.set(self._in_progress)
            metrics.REQUEST.observe(self._clock() - began_at)
            self._observe()

    def _observe(self) -> None:
        """One is done: that took as long as something was in progress since the one before."""
        now = self._clock()
        took_s, self._busy_since = now - self._busy_since, now
        self._interval_s += WEIGHT * (took_s - self._interval_s) if self._interval_s else took_s

    def _refuse(self, reason: str, why: str) -> None:
        metrics.REFUSED.labels(reason).inc()
        half_s = max(1.0, self.expected_wait_s() / 2)
        raise BusyError(f"{why}; ask again later", half_s * (1 + (LONGER - 1) * self._chance()))
