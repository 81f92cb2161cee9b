"""The latency budget: pure decisions from times."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from dataclasses import dataclass

from edge_asr.types import Transcript

RECENT = 1000
PERCENTILES = (50, 95, 99)


class RecentResponses:
    """The last 1,000 responses; one thread adds, another may ask."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, milliseconds: float) -> None:
        """Take the next one."""
        self._recent.append(milliseconds)

    def percentiles(self) -> dict[str, float | None]:
        """Return p50, p95, p99 in milliseconds: the least that so many per cent do not exceed; null before any."""
        ordered = sorted(self._recent.copy())  # copied in one step, whatever is added meanwhile
        count = len(ordered)
        return {
            f"p{share}": round(ordered[math.ceil(share * count / 100) - 1], 2) if ordered else None
            for share in PERCENTILES
        }


@dataclass(frozen=True, slots=True)
class LatencyBudget:
    """What a transcript may cost, and whether it kept to it."""

    response_ms: float
    """From the end of the segment to the publish call."""

    def settle(self, transcript: Transcript, now: float) -> Transcript:
        """Return the transcript with endpoint, response and total in its trace, as of `now` (monotonic seconds)."""
        marks = transcript.marks
        if marks is None:
            return transcript
        response = (now - marks.segment_ended_at) * 1e3
        trace = {
            "endpoint": (marks.segment_ended_at - marks.speech_ended_at) * 1e3,
            **transcript.latency_ms,
            "response": response,
            "total": (now - marks.speech_ended_at) * 1e3,
        }
        return dataclasses.replace(transcript, latency_ms=trace, within_budget=response <= self.response_ms)
