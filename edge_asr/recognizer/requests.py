"""What waits for the inference thread, and in which order it is answered."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import math
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from edge_asr.errors import EngineError
from edge_asr.recognizer.pieces import joined, quietest
from edge_asr.types import SAMPLE_RATE, Recognition, Samples

PATIENCE = 2
"""After so many interruptions a sound is cut in two, for it may never be done otherwise."""
SHORTEST = 2 * SAMPLE_RATE
"""Samples: what is no longer than twice that is not cut; nor interrupted more often than that."""

_arrivals = itertools.count()


class Priority(enum.IntEnum):
    """Who is answered first."""

    MICROPHONE = 0
    """Segments and pauses of live sources."""
    NETWORK = 1
    """Requests, and files as fast as they go."""
    PARTIAL = 2
    """What is still being said; of use only while nobody waits for the engine."""


@dataclass(slots=True)
class Piece:
    """A part of a request that is recognised in one run; as a rule all of it."""

    start: int
    """Its first sample, counted from that of the request."""
    samples: Samples
    interruptions: int = 0

    @property
    def can_wait(self) -> bool:
        """Whether it may be interrupted."""
        return self.interruptions < PATIENCE or len(self.samples) > 2 * SHORTEST

    def halves(self) -> list[Piece]:
        """Return it in two, cut where it is quiet."""
        middle = quietest(self.samples)
        return [Piece(self.start, self.samples[:middle]), Piece(self.start + middle, self.samples[middle:])]


@dataclass(slots=True, eq=False)
class Request:
    """Samples that wait for their turn, or are being recognised."""

    samples: Samples
    priority: Priority = Priority.MICROPHONE
    deadline: float = math.inf
    """Monotonic seconds at which it is to be done."""
    counts: bool = True
    """What it costs says something of the next ones."""
    alone: bool = False
    """It shares no run: it was begun already, or one that it shared failed."""
    enforced: tuple[str, ...] = ()
    answer: Future[Recognition] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.monotonic)
    arrival: int = field(default_factory=lambda: next(_arrivals))
    pieces: deque[Piece] = field(init=False)
    """What is still to be recognised."""
    found: list[tuple[int, Recognition]] = field(default_factory=list)
    """What has been, with the sample that each begins at."""
    spent_ms: float = 0.0
    """How long that took."""

    def __post_init__(self) -> None:
        self.pieces = deque([Piece(0, self.samples)])

    @property
    def order(self) -> tuple[int, float, int]:
        """The smaller, the earlier it is answered. What was begun is ended first, among its own kind."""
        return self.priority, -math.inf if self.alone else self.deadline, self.arrival

    @property
    def piece(self) -> Piece:
        """What is recognised next."""
        return self.pieces[0]

    @property
    def seconds(self) -> float:
        """Seconds of audio in that."""
        return len(self.piece.samples) / SAMPLE_RATE

    def begin(self) -> bool:
        """Tell whether it is still wanted; from here on a request of a microphone cannot be cancelled."""
        if self.answer.running():
            return True
        if self.priority == Priority.MICROPHONE or self.answer.cancelled():
            return self.answer.set_running_or_notify_cancel()
        return True

    def enforce(self, step: str) -> None:
        """Note what is done to it to keep to the budget."""
        self.enforced = tuple(dict.fromkeys((*self.enforced, step)))

    def interrupted(self) -> list[str]:
        """Note that its run was interrupted, and cut it where that was once too often. Return what was done to it."""
        self.alone = True
        self.piece.interruptions += 1
        steps = ["interrupted"]
        if self.piece.interruptions >= PATIENCE and self.piece.can_wait:
            self.pieces.extendleft(reversed(self.pieces.popleft().halves()))
            steps.append("cut")
        for step in steps:
            self.enforce(step)
        return steps

    def take(self, recognition: Recognition, milliseconds: float) -> Recognition | None:
        """Take what was found in the piece, in so much time; return the whole when that was the last."""
        self.found.append((self.pieces.popleft().start, recognition))
        self.spent_ms += milliseconds
        if self.pieces:
            return None
        whole = joined(self.found)
        waited = max(0.0, (time.monotonic() - self.submitted_at) * 1e3 - self.spent_ms)
        return dataclasses.replace(whole, stages_ms={"queue": waited, **whole.stages_ms}, enforced=self.enforced)

    def settle(self, recognition: Recognition) -> None:
        """Answer it, if the answer is still wanted."""
        if self.answer.running() or self.answer.set_running_or_notify_cancel():
            self.answer.set_result(recognition)

    def fail(self, error: BaseException) -> None:
        """Let whoever asked know that there will be no answer."""
        if self.answer.running() or self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)

    def give_up(self) -> None:
        """Cancel it."""
        if self.answer.cancel():
            self.answer.set_running_or_notify_cancel()
        else:  # it was begun, and is to be begun again
            self.answer.set_exception(EngineError("everything stops"))


class Waiting:
    """Requests in the order in which they are answered: by priority, then deadline, then arrival."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def first(self) -> Request | None:
        """The one that is answered next, if it is still wanted."""
        return self._requests[0] if self._requests else None

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

    def pop_companions(self, first: Request, fits: Callable[[list[Request]], bool]) -> list[Request]:
        """Return `first` with those of its priority that can share its run, in order, as long as that `fits`."""
        batch = [first]
        for request in [] if first.alone else list(self._requests):
            if request.priority != first.priority or not fits([*batch, request]):
                break
            if not request.alone:
                self._requests.remove(request)
                if request.begin():
                    batch.append(request)
        return batch

    def discard(self, request: Request) -> None:
        """Forget a request, if it waits."""
        with contextlib.suppress(ValueError):
            self._requests.remove(request)

    def clear(self) -> list[Request]:
        """Forget all of them, and return them."""
        requests, self._requests = self._requests, []
        return requests
