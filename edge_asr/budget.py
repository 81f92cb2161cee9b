"""The latency budget: pure decisions from times."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edge_asr.types import Transcript


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
