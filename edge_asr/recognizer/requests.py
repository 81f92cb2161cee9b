"""What waits for the inference thread, and in which order it is answered."""

from __future__ import annotations

import enum
import itertools
import math
import time
from bisect import insort
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from edge_asr.types import SAMPLE_RATE, Recognition, Samples

_arrivals = itertools.count()


class Priority(enum.IntEnum):
    """Who is answered first."""

    MICROPHONE = 0
    """Segments and pauses of live sources."""
    NETWORK = 1
    """Requests, and files as fast as they go."""
    PARTIAL = 2
    """What is still being said; of use only while nobody waits for the engine."""


@dataclass(slots=True, eq=False)
class Request:
    """Samples that wait for their turn, or are being recognised."""

    samples: Samples
    priority: Priority = Priority.MICROPHONE
    deadline: float = math.inf
    """Monotonic seconds at which it is to be done."""
    counts: bool = True
    """What it costs says something of the next ones."""
    answer: Future[Recognition] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.monotonic)
    arrival: int = field(default_factory=lambda: next(_arrivals))

    @property
    def order(self) -> tuple[int, float, int]:
        """The smaller, the earlier it is answered."""
        return self.priority, self.deadline, self.arrival

    @property
    def seconds(self) -> float:
        """Seconds of audio."""
        return len(self.samples) / SAMPLE_RATE

    def begin(self) -> bool:
        """Tell whether it is still wanted; from here on a request of a microphone cannot be cancelled."""
        if self.priority == Priority.MICROPHONE and not self.answer.running():
            return self.answer.set_running_or_notify_cancel()
        return not self.answer.cancelled()

    def settle(self, recognition: Recognition) -> None:
        """Answer it, if the answer is still wanted."""
        if self.answer.running() or self.answer.set_running_or_notify_cancel():
            self.answer.set_result(recognition)

    def fail(self, error: BaseException) -> None:
        """Let whoever asked know that there will be no answer."""
        if self.answer.running() or self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


class Waiting:
    """Requests in the order in which they are answered: by priority, then deadline, then arrival."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def push(self, request: Request) -> None:
        """Let a request wait."""
        insort(self._requests, request, key=lambda one: one.order)

    def pop(self) -> Request | None:
        """Return the first that is still wanted, None where there is none."""
        while self._requests:
            request = self._requests.pop(0)
            if request.begin():
                return request
        return None

    def clear(self) -> list[Request]:
        """Forget all of them, and return them."""
        requests, self._requests = self._requests, []
        return requests
