"""What the inference thread is at: how many requests share a run, and when it must give way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edge_asr.budget import CostModel
from edge_asr.recognizer.requests import Priority, Request
from edge_asr.types import SAMPLE_RATE

MOST = {Priority.MICROPHONE: 8, Priority.NETWORK: 32, Priority.PARTIAL: 1}
"""Requests that share a run, at most."""
NETWORK_MS = 100.0
"""What several of NETWORK may take together: a microphone can wait so long, and a GPU is not interrupted."""
SAFETY = 1.5
"""What is estimated may take so much longer."""
MARGIN_S = 0.05
"""From the answer to its publication, and for what else the processor has to do."""


MAY_LAST_S = 15.0
"""A step of the inference thread that lasts longer is stuck, unless it is known to be a long one."""
SLOWER = 10.0
"""What is estimated may take so much longer on a machine that is too hot, or too busy, before it counts as stuck."""
SLOWEST = 3.0
"""Seconds for a second of audio: no engine that works at all is slower, whatever was estimated of another one."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the inference thread is at: one run, or the change to another recogniser."""

    number: int
    may_last_s: float = MAY_LAST_S
    """After so many seconds it is stuck."""


@dataclass(slots=True)
class Run:
    """One run of the recogniser."""

    requests: list[Request]
    estimate_ms: float
    started_at: float
    interrupted: bool = False

    @property
    def priority(self) -> Priority:
        """That of its requests, which is one."""
        return self.requests[0].priority

    @property
    def seconds(self) -> float:
        """Seconds of audio in it, filled up to the longest."""
        return filled_s(self.requests)

    @property
    def is_of_use(self) -> bool:
        """False when nobody wants any of it any more."""
        return not all(request.answer.cancelled() for request in self.requests)

    @property
    def may_last_s(self) -> float:
        """Seconds after which it is stuck rather than slow."""
        return max(MAY_LAST_S, SLOWER * self.estimate_ms / 1e3, SLOWEST * self.seconds)

    def left_ms(self, now: float) -> float:
        """Return how long it will take from now on, as far as can be told."""
        return max(0.0, self.estimate_ms - (now - self.started_at) * 1e3)

    def interrupt_at(self, waiting: Iterable[Request], costs: CostModel, now: float) -> float:
        """Return when (monotonic seconds, `-inf`: now) it must give way to those that wait, in order; inf: never.

        That is as soon as one of a microphone would be late if it waited for the end of this, or was begun any later.
        """
        if self.interrupted or self.priority == Priority.MICROPHONE:
            return math.inf
        if not self.is_of_use:
            return -math.inf
        if not all(request.piece.can_wait for request in self.requests):
            return math.inf
        latest = latest_start(waiting, costs)
        return -math.inf if now + self.left_ms(now) / 1e3 > latest else latest


def latest_start(waiting: Iterable[Request], costs: CostModel) -> float:
    """Return when the first of the microphones' requests must begin, so that all of them are done in time."""
    latest, cost_ms = math.inf, MARGIN_S * 1e3
    for request in waiting:
        if request.priority != Priority.MICROPHONE:
            break
        cost_ms += costs.estimate_ms(request.seconds) * SAFETY
        latest = min(latest, request.deadline - cost_ms / 1e3)
    return latest


def may_share(batch: Sequence[Request], costs: CostModel, now: float, most: int) -> bool:
    """Tell whether requests can share a run, which takes `most`, and the earliest deadline, the first's, is met."""
    first = batch[0]
    cost_ms = costs.estimate_ms(filled_s(batch)) * SAFETY
    if len(batch) > min(most, MOST[first.priority]) or now + cost_ms / 1e3 > first.deadline:
        return False
    return first.priority != Priority.NETWORK or cost_ms <= NETWORK_MS


def filled_s(batch: Sequence[Request]) -> float:
    """Return the seconds of audio that a run computes, for all are filled up to the longest."""
    return len(batch) * max(len(request.piece.samples) for request in batch) / SAMPLE_RATE
