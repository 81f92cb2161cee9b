"""A day of requests to replicas of the server that come and go: a simulation by events, with measured times of work."""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.fleet_arrivals import HOUR_S, LENGTH_S, Array
from bench.fleet_scaling import Autoscaler, Scaling
from edge_asr.recognizer.requests import Priority
from edge_asr.recognizer.runs import MOST, NETWORK_MS, SAFETY
from edge_asr.serve.admission import LONGER, REQUESTS, WEIGHT


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes on a replica that has nothing else to do, ms."""

    request_ms: float
    """Protocol and upload, for each request."""
    run_ms: float
    """Of the engine, for each run."""
    second_ms: float
    """Of the engine, for each second of audio."""
    share: float = 1.0
    """What each further request of a run costs, of what it would cost alone; 1: nothing is gained."""
    most: int = 1
    """Requests that share a run; 1: the engine does not batch, as int8 does not."""

    def engine_ms(self, seconds: Sequence[float]) -> float:
        """Return what the engine takes for a run: all are filled up to the longest."""
        return self.run_ms + self.second_ms * max(seconds) * (1 + (len(seconds) - 1) * self.share)

    def ms(self, seconds: Sequence[float]) -> float:
        """Return what a replica takes for a run."""
        return len(seconds) * self.request_ms + self.engine_ms(seconds)

    @classmethod
    def parse(cls, given: str) -> Cost:
        """Read REQUEST:RUN:SECOND[:SHARE:MOST]."""
        parts = given.split(":")
        try:
            if len(parts) not in (3, 5):
                raise ValueError
            share, most = (float(parts[3]), int(parts[4])) if len(parts) == 5 else (1.0, 1)
            cost = cls(float(parts[0]), float(parts[1]), float(parts[2]), share, most)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{given}: give REQUEST:RUN:SECOND[:SHARE:MOST], e.g. 20:16:5.6") from None
        if min(cost.request_ms, cost.run_ms, cost.second_ms, cost.share) < 0 or cost.most < 1:
            raise argparse.ArgumentTypeError(f"{given}: negative, or a batch of none")
        return cost


COSTS = {
    # docs/benchmarks.md, two threads: 27.5 ms for 2 s, 44.4 for 5 s; docs/server-load.md: 18 a second, so 20.8 more.
    "large-int8": Cost(20.8, 16.2, 5.633),
    # docs/server-load.md: 75 a second. How much of it goes by the length was not measured: none, here.
    "bundled-int8": Cost(13.3, 0.0, 0.0),
}


@dataclass(frozen=True, slots=True)
class Stalls:
    """What else happens on the machine of a replica: from time to time it stands still."""

    every_s: float
    for_s: float
    """At the mean; up to twice as long."""


STALLS = Stalls(15.0, 0.6)
"""With them a replica is as slow at times as the machine that was measured, which had clients and other work on it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated beside arrivals."""

    cost: Cost
    scaling: Scaling | None = None
    """None: as many replicas as there are at first."""
    replicas: int = 2
    """At first."""
    servers: int = 1
    """Runs at a time on a replica; edge_asr has one inference thread."""
    batch_wait_s: float = 0.0
    wait_s: float = 10.0
    """`http.limits.wait_s`."""
    tries: int = 4
    """A client that is refused asks again when it is told to, so many times in all."""
    stalls: Stalls | None = None
    microphone: bool = False
    """Each replica hears one as well, as in docs/server-load.md."""
    fails_at: float | None = None
    """Seconds of the day at which a replica dies."""
    row_s: float = 15.0
    """Between two rows of the timeline."""
    warm_up_s: float = 0.0
    """Times of requests before that are not counted."""
    seed: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One recording on its way; `replica` has it, or nobody while the client waits to ask again."""

    first_asked: float
    seconds: float
    asked: float = 0.0
    tries: int = 0


@dataclass(slots=True, eq=False)
class Replica:
    """A server: its queue, and what it knows for admission (edge_asr/serve/admission.py)."""

    number: int
    ready: bool = False
    starting: bool = True
    dead: bool = False
    waiting: deque[Request] = field(default_factory=deque)
    urgent: deque[float] = field(default_factory=deque)
    """ms of what goes before requests: a microphone's, or a machine that stands still."""
    partial: float | None = None
    """ms of the newest partial, which goes after requests."""
    running: list[list[Request]] = field(default_factory=list)
    in_progress: int = 0
    interval_s: float = 0.0
    busy_since: float = 0.0
    busy_s: float = 0.0
    waiting_ms: float = 0.0
    listed: set[int] = field(default_factory=set)
    """Numbers of requests under which the balancer has it."""

    def expected_wait_s(self) -> float:
        """Return how long a request would wait."""
        return max(self.in_progress * self.interval_s, self.waiting_ms / 1e3)

    def admits(self, wait_s: float) -> bool:
        """Tell whether another one is let in."""
        return self.in_progress < REQUESTS and self.expected_wait_s() <= wait_s

    def begin(self, now: float) -> None:
        """Let one in."""
        if not self.in_progress:
            self.busy_since = now
        self.in_progress += 1

    def end(self, now: float) -> None:
        """One is answered: that took as long as something was in progress since the one before."""
        self.in_progress -= 1
        took_s, self.busy_since = now - self.busy_since, now
        self.interval_s += WEIGHT * (took_s - self.interval_s) if self.interval_s else took_s


def may_share(seconds: Sequence[float], cost: Cost) -> bool:
    """Tell whether requests of the network share a run, as edge_asr/recognizer/runs.py decides without a deadline."""
    fits = len(seconds) <= min(cost.most, MOST[Priority.NETWORK])
    return fits and cost.engine_ms(seconds) * SAFETY <= NETWORK_MS


@dataclass(frozen=True, slots=True)
class Row:
    """How it was at a moment."""

    at: float
    ready: int
    starting: int
    asked: int
    answered: int
    gave_up: int
    in_progress: int
    away: int
    """Clients that wait to ask again."""
    refusals: int
    busy: float
    """Share of the time since the last row, of all replicas that are ready."""
    p95_ms: float


class Simulation:
    """Events in order of time; `run` once."""

    def __init__(self, times: Array, seconds: Array, setting: Setting) -> None:
        self.setting = setting
        self._times, self._seconds = times, seconds
        self._chance = random.Random(setting.seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._balancer: list[tuple[int, float, int]] = []
        self.replicas: list[Replica] = []
        self.now = float(times[0]) if len(times) else 0.0
        self._ends_at = float(times[-1]) if len(times) else 0.0
        self.asked = self.answered = self.gave_up = self.refusals = self.broken = self.away = 0
        self.latencies_s: list[float] = []
        """Of answered requests, from the first time that they were asked."""
        self.batches: list[int] = []
        self.rows: list[Row] = []
        self._recent: deque[tuple[float, float]] = deque()
        self._busy_before = 0.0
        self._scaler = Autoscaler(setting.scaling) if setting.scaling else None
        for _ in range(setting.replicas):
            self._start(0.0)

    @property
    def ready(self) -> list[Replica]:
        """Those that get requests."""
        return [one for one in self.replicas if one.ready]

    @property
    def in_progress(self) -> int:
        """Requests that a replica has."""
        return sum(one.in_progress for one in self.replicas)

    def run(self, progress: Callable[[float], None] = lambda share: None) -> Simulation:
        """Go through the day, and on until nobody waits."""
        self._later(0.0, self._tell)
        if self.setting.fails_at is not None:
            self._at(self.setting.fails_at, self._fail)
        times, seconds, count = self._times.tolist(), self._seconds.tolist(), len(self._times)
        events = self._events
        for number in range(count):
            at = times[number]
            while events and events[0][0] <= at:
                self._step()
            self.now = at
            self.asked += 1
            self._ask(Request(at, seconds[number]))
            if not number % 10_000:
                progress(number / count)
        while events and (self.in_progress or self.away):
            self._step()
        progress(1.0)
        return self

    def _step(self) -> None:
        self.now, _, action, arguments = heapq.heappop(self._events)
        action(*arguments)

    def _at(self, at: float, action: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (at, next(self._order), action, arguments))

    def _later(self, after_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._at(self.now + after_s, action, *arguments)

    # Requests

    def _ask(self, request: Request) -> None:
        request.asked, request.tries = self.now, request.tries + 1
        replica = self._least_busy()
        if replica is None or not replica.admits(self.setting.wait_s):
            self.refusals += 1
            half_s = 1.0 if replica is None else max(1.0, replica.expected_wait_s() / 2)
            self._again(request, half_s * (1 + (LONGER - 1) * self._chance.random()))
            return
        replica.begin(self.now)
        self._list(replica)
        replica.waiting.append(request)
        replica.waiting_ms += self.setting.cost.engine_ms((request.seconds,))
        self._work(replica)

    def _again(self, request: Request, after_s: float) -> None:
        if request.tries >= self.setting.tries:
            self.gave_up += 1
            return
        self.away += 1
        self._later(after_s, self._come_back, request)

    def _come_back(self, request: Request) -> None:
        self.away -= 1
        self._ask(request)

    def _list(self, replica: Replica) -> None:
        """Let the balancer know how many requests it has."""
        if replica.ready and replica.in_progress not in replica.listed:
            replica.listed.add(replica.in_progress)
            heapq.heappush(self._balancer, (replica.in_progress, self._chance.random(), replica.number))

    def _least_busy(self) -> Replica | None:
        while self._balancer:
            requests, _, number = self._balancer[0]
            replica = self.replicas[number]
            if replica.ready and replica.in_progress == requests:
                return replica
            heapq.heappop(self._balancer)
            replica.listed.discard(requests)
        return None

    # Replicas

    def _work(self, replica: Replica) -> None:
        """Begin what is most urgent, if it can."""
        while len(replica.running) < self.setting.servers and not replica.dead:
            batch: list[Request] = []
            if replica.urgent:
                took_ms = replica.urgent.popleft()
            elif replica.waiting:
                if (company_s := self._company_s(replica)) > 0:
                    self._later(company_s, self._work, replica)
                    return
                batch = self._batch(replica)
                took_ms = self.setting.cost.ms([one.seconds for one in batch])
                self.batches.append(len(batch))
            elif replica.partial is not None:
                took_ms, replica.partial = replica.partial, None
            else:
                return
            replica.running.append(batch)
            self._later(took_ms / 1e3, self._done, replica, batch, took_ms / 1e3)

    def _company_s(self, replica: Replica) -> float:
        """Return how long the next one waits for others to share its run."""
        cost = self.setting.cost
        if not self.setting.batch_wait_s or len(replica.waiting) >= min(cost.most, MOST[Priority.NETWORK]):
            return 0.0
        # A wake-up at the very moment is not to be one too early by rounding.
        left_s = replica.waiting[0].asked + self.setting.batch_wait_s - self.now
        return left_s if left_s > 1e-9 else 0.0

    def _batch(self, replica: Replica) -> list[Request]:
        batch = [replica.waiting.popleft()]
        cost = self.setting.cost
        while replica.waiting and may_share([*(one.seconds for one in batch), replica.waiting[0].seconds], cost):
            batch.append(replica.waiting.popleft())
        for one in batch:
            replica.waiting_ms -= cost.engine_ms((one.seconds,))
        return batch

    def _done(self, replica: Replica, batch: list[Request], took_s: float) -> None:
        if replica.dead:
            return
        replica.running.remove(batch)
        replica.busy_s += took_s
        for request in batch:
            replica.end(self.now)
            self.answered += 1
            if request.first_asked >= self.setting.warm_up_s:
                self.latencies_s.append(self.now - request.first_asked)
            self._recent.append((self.now, self.now - request.asked))
        if batch:
            self._list(replica)
        self._work(replica)

    def _start(self, after_s: float) -> None:
        replica = Replica(len(self.replicas))
        self.replicas.append(replica)
        if after_s:
            self._later(after_s, self._become_ready, replica)
        else:
            self._become_ready(replica)

    def _become_ready(self, replica: Replica) -> None:
        replica.ready, replica.starting = True, False
        self._list(replica)
        if self.setting.stalls is not None:
            self._later(self._chance.expovariate(1 / self.setting.stalls.every_s), self._stall, replica)
        if self.setting.microphone:
            self._hear(replica)

    def _stop(self, replica: Replica) -> None:
        """Give it no more requests; what it has it answers."""
        replica.ready = False

    def _fail(self) -> None:
        """One dies with all that it has; another one is started in its place."""
        replica = self.ready[0]
        replica.ready, replica.dead = False, True
        lost = [*replica.waiting, *itertools.chain.from_iterable(replica.running)]
        replica.waiting.clear()
        replica.in_progress = 0
        self.broken += len(lost)
        for request in lost:
            self._again(request, 1.0)
        self._start(self.setting.scaling.start_s if self.setting.scaling else Scaling().start_s)

    def _stall(self, replica: Replica) -> None:
        if self.setting.stalls is None or not replica.ready or self.now > self._ends_at:
            return
        replica.urgent.append(self._chance.uniform(0, 2 * self.setting.stalls.for_s) * 1e3)
        self._work(replica)
        self._later(self._chance.expovariate(1 / self.setting.stalls.every_s), self._stall, replica)

    def _hear(self, replica: Replica) -> None:
        """A sentence of the microphone: a partial every 300 ms while it is spoken, and the final at the pause."""
        if not replica.ready or self.now > self._ends_at:
            return
        said_s, cost = LENGTH_S, self.setting.cost
        for number in range(1, int(said_s / 0.3)):
            self._later(0.3 * number, self._take_partial, replica, cost.engine_ms((0.3 * number,)))
        self._later(said_s, self._take_final, replica, cost.engine_ms((said_s,)))
        self._later(said_s + 1.2 + 1.2 * self._chance.random(), self._hear, replica)

    def _take_partial(self, replica: Replica, took_ms: float) -> None:
        replica.partial = took_ms
        self._work(replica)

    def _take_final(self, replica: Replica, took_ms: float) -> None:
        replica.urgent.append(took_ms)
        self._work(replica)

    # What is looked at

    def _tell(self) -> None:
        """Write a row down, and let the autoscaler decide."""
        every_s, ready = self.setting.row_s, self.ready
        over_s = self._scaler.scaling.p95_over_s if self._scaler else every_s
        while self._recent and self._recent[0][0] < self.now - over_s:
            self._recent.popleft()
        p95_s = float(np.percentile([took_s for _, took_s in self._recent], 95)) if self._recent else 0.0
        busy_s = sum(one.busy_s for one in self.replicas)
        busy = (busy_s - self._busy_before) / (every_s * self.setting.servers * max(1, len(ready)))
        self._busy_before = busy_s
        starting = sum(1 for one in self.replicas if one.starting)
        self.rows.append(
            Row(self.now, len(ready), starting, self.asked, self.answered, self.gave_up, self.in_progress, self.away,
                self.refusals, busy, p95_s * 1e3)
        )  # fmt: skip
        if self._scaler is not None:
            self._scale(self._scaler.decide(self.now, len(ready), starting, busy, p95_s), len(ready) + starting)
        if self.now <= self._ends_at or self.in_progress or self.away:
            self._later(every_s, self._tell)

    def _scale(self, wanted: int, present: int) -> None:
        scaling = self.setting.scaling
        assert scaling is not None
        for _ in range(present, wanted):
            self._start(scaling.start_s)
        for replica in self.ready[::-1][: max(0, present - wanted)]:
            self._stop(replica)


def shares(values_s: Sequence[float]) -> dict[str, float]:
    """Return mean and percentiles in ms."""
    if not len(values_s):
        return {}
    found = {f"p{share}": round(1e3 * float(np.percentile(values_s, share)), 1) for share in (50, 95, 99)}
    return {"mean": round(1e3 * float(np.mean(values_s)), 1), **found, "max": round(1e3 * float(max(values_s)), 1)}


def report(done: Simulation) -> dict[str, Any]:
    """Return the figures."""
    ready = [row.ready for row in done.rows]
    return {
        "requests": done.asked,
        "answered": done.answered,
        "gave_up": done.gave_up,
        "in_flight": done.in_progress + done.away,
        "refusals": done.refusals,
        "broken_off": done.broken,
        "refused_share": round(done.gave_up / max(1, done.asked), 6),
        "latency_ms": shares(done.latencies_s),
        "batch": round(float(np.mean(done.batches)), 3) if done.batches else 0.0,
        "replicas": {"least": min(ready), "mean": round(float(np.mean(ready)), 2), "most": max(ready)},
        "replica_hours": round(sum(ready) * done.setting.row_s / HOUR_S, 1),
        "p95_ms_at_failure": _around(done),
        "busy": {"mean": round(float(np.mean([row.busy for row in done.rows])), 3),
                 "p99": round(float(np.percentile([row.busy for row in done.rows], 99)), 3)},
    }  # fmt: skip


def _around(done: Simulation) -> dict[str, float]:
    """Return the highest p95 of two minutes in the ten before a replica died, and in the ten after."""
    at = done.setting.fails_at
    if at is None:
        return {}
    before = [row.p95_ms for row in done.rows if at - 600 <= row.at < at]
    after = [row.p95_ms for row in done.rows if at <= row.at < at + 600]
    return {"before": round(max(before, default=0.0)), "after": round(max(after, default=0.0))}
