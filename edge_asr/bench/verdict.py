"""What a replay comes to: what was said where, what came late or not at all, and how long everything took. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY

from edge_asr.bench.tape import Played, Tape
from edge_asr.budget import percentiles
from edge_asr.recognizer.tokens import join
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE

NEAR_END = SAMPLE_RATE * 3 // 10
"""A segment that ends no earlier than this before its recording holds the recording's acoustic end."""
SPANS = ("endpoint", "response", "total")

Event = Mapping[str, Any]
"""A message of the topic `transcript`."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the metrics have counted."""

    segments: float
    empty: float
    """Segments in which nothing was recognised."""
    cut_short: float

    @staticmethod
    def now() -> Counts:
        """Return what has been counted since the process began."""
        return Counts(
            _sample("edge_asr_segments_total"),
            _sample("edge_asr_gated_total", gate="empty"),
            _sample("edge_asr_cut_short_total"),
        )

    def since(self, before: Counts) -> Counts:
        """Return what was counted after `before`."""
        return Counts(self.segments - before.segments, self.empty - before.empty, self.cut_short - before.cut_short)


def _sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@dataclass(frozen=True, slots=True)
class Heard:
    """A transcript, and where on which tape it belongs."""

    event: Event
    stream: str
    played: Played
    start: int
    """First sample of the segment on the tape."""
    end_error_ms: float | None
    """How much later than the recording's acoustic end the daemon found it; None: that end is not in the segment."""

    def span(self, name: str) -> float | None:
        """Return how long a part of the way took, in milliseconds, counted from the recording's own end.

        None: it has none, because it was split.
        """
        value: float | None = self.event["latency_ms"].get(name)
        return value if name == "response" or value is None else value + (self.end_error_ms or 0.0)


def place(events: Iterable[Event], tapes: Mapping[str, Tape]) -> list[Heard]:
    """Return each transcript once, with its place; the broker may deliver one twice."""
    once = {event["id"]: event for event in events}
    return [_placed(event, tapes[event["source"]]) for event in once.values()]


def _placed(event: Event, tape: Tape) -> Heard:
    start, length = _samples(event["offset_s"]), _samples(event["duration_s"])
    played = tape.at(start + length / 2)
    error_ms = None
    if start <= played.end <= start + length + NEAR_END:
        error_ms = (tape.sound_ended(start, length) - played.end) / SAMPLE_RATE * 1e3
    return Heard(event, event["source"], played, start, error_ms)


def _samples(seconds: float) -> int:
    """Return the whole chunks that a time rounded to a millisecond stands for, in samples."""
    return round(seconds * SAMPLE_RATE / CHUNK_SAMPLES) * CHUNK_SAMPLES


def judge(heard: Sequence[Heard], tapes: Mapping[str, Tape], counts: Counts) -> dict[str, Any]:
    """Return the figures of a replay; the keys are those of the JSON."""
    said = [one for one in heard if not one.event.get("lost")]
    parts: defaultdict[tuple[str, str], list[Heard]] = defaultdict(list)
    for one in sorted(said, key=lambda one: one.start):
        parts[one.stream, one.played.path].append(one)
    texts = {key: join([part.event["text"] for part in found]) for key, found in parts.items()}
    silent = sum(len(tape.played) for tape in tapes.values()) - len({(one.stream, one.played.path) for one in heard})
    # A recording without a word has had no segment at all, unless it is one of those that came to nothing.
    unheard = max(0.0, silent - (counts.segments - len(heard)))
    return {
        "count": len(said),
        "late": sum(one.event["within_budget"] is False for one in said),
        "lost": round(counts.segments - counts.empty - len(said) + counts.cut_short + unheard),
        "empty": round(counts.empty),
        "cut": sum(len(found) > 1 for found in parts.values()),
        "texts": _first(texts, tapes),
        "differing": _differing(texts),
        **{f"{name}_ms": _spread(span for one in said if (span := one.span(name)) is not None) for name in SPANS},
        "end_error_ms": _spread(one.end_error_ms for one in said if one.end_error_ms is not None),
        "stages": {stage: _spread(values) for stage, values in _stages(said).items()},
        "decoded_at_pause": round(sum(one.event["decoded_at_pause"] for one in said) / max(1, len(said)), 4),
        "enforced": dict(Counter(step for one in said for step in one.event.get("enforced", ()))),
    }


def _first(texts: Mapping[tuple[str, str], str], tapes: Mapping[str, Tape]) -> dict[str, str]:
    """Return each recording's text, as the first stream that heard one has it; empty where none did."""
    paths = [played.path for played in next(iter(tapes.values())).played]  # of stream 0: in the order given
    return {path: next((texts[stream, path] for stream in tapes if (stream, path) in texts), "") for path in paths}


def _differing(texts: Mapping[tuple[str, str], str]) -> list[str]:
    """Return the recordings that were not understood alike on all streams."""
    readings: defaultdict[str, set[str]] = defaultdict(set)
    for (_, path), text in texts.items():
        readings[path].add(text)
    return sorted(path for path, found in readings.items() if len(found) > 1)


def _stages(said: Iterable[Heard]) -> dict[str, list[float]]:
    stages: defaultdict[str, list[float]] = defaultdict(list)
    for one in said:
        for stage, value in one.event["latency_ms"].items():
            if stage not in SPANS:
                stages[stage].append(value)
    return stages


def _spread(values: Iterable[float]) -> dict[str, float | None]:
    """Return p50, p95, p99 and the largest; null where there are none."""
    known = list(values)
    return {**percentiles(known), "max": round(max(known), 2) if known else None}
