"""The latency budget: pure decisions from times."""

from __future__ import annotations

import dataclasses
import math
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from edge_asr.types import Transcript

RECENT = 1000
PERCENTILES = (50, 95, 99)
BUCKETS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Up to so many seconds of audio cost alike: per second, what is short costs more."""
OBSERVED = 50
"""Runs of a bucket that its cost is taken from: clocks, power modes and heat change it."""
CALM = 10
"""So many runs in a row that all cost less: what made the others slow is over."""
JUDGED = 20
"""Transcripts that the share of late ones is taken from."""
FEW = 5
"""With fewer transcripts nothing is degraded; as many in a row that are on time end it."""
SEVERAL = 2
"""One late transcript degrades nothing."""
MEMORY_S = 60.0
"""What is longer ago says nothing of how things are: in a quiet room no transcript would."""


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """Return p50, p95, p99: the least value that so many per cent do not exceed; null where there is none."""
    ordered = sorted(values)
    return {f"p{share}": _at(ordered, share) for share in PERCENTILES}


def _at(ordered: list[float], share: int) -> float | None:
    return round(ordered[math.ceil(share * len(ordered) / 100) - 1], 2) if ordered else None


class RecentResponses:
    """The last 1,000 responses; one thread adds, another may ask."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, milliseconds: float) -> None:
        """Take the next one."""
        self._recent.append(milliseconds)

    def percentiles(self) -> dict[str, float | None]:
        """Return p50, p95, p99 in milliseconds; null before any."""
        return percentiles(self._recent.copy())  # copied in one step, whatever is added meanwhile


class CostModel:
    """What a recognition costs here, by length: p95 of the last runs, but no more than the dearest of the very last.

    One thread observes, others ask.
    """

    def __init__(self) -> None:
        self._runs = tuple(deque[float](maxlen=OBSERVED) for _ in BUCKETS_S)
        self._rates: tuple[float | None, ...] = (None,) * len(BUCKETS_S)

    def observe(self, seconds: float, milliseconds: float) -> None:
        """Take a run over so much audio."""
        bucket = _bucket(seconds)
        runs = self._runs[bucket]
        runs.append(milliseconds / max(seconds, BUCKETS_S[0] / 2))
        rate = _at(sorted(runs), 95)
        if rate is not None and len(runs) > CALM:
            rate = min(rate, round(max(list(runs)[-CALM:]), 2))
        self._rates = (*self._rates[:bucket], rate, *self._rates[bucket + 1 :])  # in one step: others read it

    def estimate_ms(self, seconds: float) -> float:
        """Return how long a run over so much audio takes, not less; 0 before any was observed."""
        rate = self._rate(_bucket(seconds))
        return 0.0 if rate is None else rate * max(seconds, BUCKETS_S[0] / 2)

    def longest_s(self, budget_ms: float, shortest: float = 8.0, longest: float = 30.0) -> float:
        """Return how much audio can be recognised in so many milliseconds, at least and at most what is given."""
        seconds = longest
        while seconds > shortest and self.estimate_ms(seconds) > budget_ms:
            seconds -= 0.5
        return max(seconds, shortest)

    def _rate(self, bucket: int) -> float | None:
        """Return milliseconds per second of audio: of the bucket, else the nearest shorter one, else a longer one.

        A shorter one costs more per second, which errs on the safe side.
        """
        rates = self._rates
        if rates[bucket] is not None:
            return rates[bucket]
        known = [rate for rate in (*reversed(rates[:bucket]), *rates[bucket + 1 :]) if rate is not None]
        return known[0] if known else None


def _bucket(seconds: float) -> int:
    return min(bisect_left(BUCKETS_S, seconds), len(BUCKETS_S) - 1)


class LateWatch:
    """Whether too many of the last transcripts were late. One thread adds, others may ask."""

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`share`: how many may be, 0 to 1."""
        self._share = share
        self._clock = clock
        self._recent: deque[tuple[float, str]] = deque(maxlen=JUDGED)
        """When each came (monotonic seconds), and the stage to blame; empty where it was in time."""
        self._told = False

    @property
    def why(self) -> str:
        """How many are late, and the stage that is to blame; empty while that is well, or long ago."""
        recent = self._remembered()
        blamed = [stage for stage in recent if stage]
        if not (self._told and blamed):
            return ""
        stage, _ = Counter(blamed).most_common(1)[0]
        return f"{len(blamed)} of the last {len(recent)} transcripts were late, most because of: {stage}"

    def add(self, latency_ms: Mapping[str, float], late: bool) -> bool:
        """Take the next transcript's trace. True: `why` was or became empty, or the other way round."""
        before = bool(self.why)
        self._recent.append((self._clock(), _slowest(latency_ms) if late else ""))
        recent = self._remembered()
        blamed = sum(map(bool, recent))
        enough = len(recent) >= FEW and blamed >= SEVERAL and blamed > self._share * len(recent)
        self._told = any(recent[-FEW:]) and (before or enough)
        if before and not self._told:
            self._recent.clear()  # what is over is not held against the next late one
        return before != bool(self.why)

    def _remembered(self) -> list[str]:
        since = self._clock() - MEMORY_S
        return [stage for at, stage in self._recent.copy() if at >= since]  # copied in one step


def _slowest(latency_ms: Mapping[str, float]) -> str:
    """Return the stage that took longest, of those that the response is made of."""
    stages = {name: value for name, value in latency_ms.items() if name not in ("endpoint", "response", "total")}
    return max(stages, key=lambda name: stages[name], default="response")


@dataclass(frozen=True, slots=True)
class LatencyBudget:
    """What a transcript may cost, and whether it kept to it."""

    response_ms: float
    """From the end of the segment to the publish call."""

    def settle(self, transcript: Transcript, now: float) -> Transcript:
        """Return the transcript with endpoint, response and total in its trace, as of `now` (monotonic seconds).

        What was split has neither endpoint nor total: who said it speaks on, and nobody waits for its end.
        """
        marks = transcript.marks
        if marks is None:
            return transcript
        response = (now - marks.segment_ended_at) * 1e3
        ends = "split" not in transcript.enforced
        trace = {
            **({"endpoint": (marks.segment_ended_at - marks.speech_ended_at) * 1e3} if ends else {}),
            "capture": 0.0 if marks.heard_at is None else (marks.heard_at - marks.segment_ended_at) * 1e3,
            **transcript.latency_ms,
            "response": response,
            **({"total": (now - marks.speech_ended_at) * 1e3} if ends else {}),
        }
        return dataclasses.replace(transcript, latency_ms=trace, within_budget=response <= self.response_ms)

    def longest_s(self, costs: CostModel) -> float:
        """Return the longest segment that may be: what can be decoded in time, 8 to 30 s."""
        return costs.longest_s(self.response_ms)

    def allows_partial(self, cost_ms: float, since_last_ms: float, interval_ms: float) -> bool:
        """Tell whether it is time for a partial: they take half of the engine's time at most."""
        return since_last_ms >= max(interval_ms, 2 * cost_ms)

    def allows_early(self, backlog_ms: float) -> bool:
        """Tell whether a pause is worth decoding at once: it may be for nothing, so not while others wait too long."""
        return backlog_ms <= self.response_ms
