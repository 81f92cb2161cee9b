"""What travels through the appliance: Chunk, Segment, Token, Partial, Transcript (all frozen), and their JSON form."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NewType

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 16_000
"""Samples per second of all audio inside the appliance (mono float32, full scale +-1)."""
CHUNK_SAMPLES = 512
"""Samples in a chunk: 32 ms, the step of the voice activity detector."""
CHUNK_S = CHUNK_SAMPLES / SAMPLE_RATE
TRANSCRIPT_SCHEMA = "edge_asr.transcript/1"

Samples = npt.NDArray[np.float32]
SegmentId = NewType("SegmentId", str)


def new_segment_id() -> SegmentId:
    """Return a UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then random bits, so that ids sort by time."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | int.from_bytes(os.urandom(10), "big")
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    return SegmentId(str(uuid.UUID(int=value)))


@dataclass(frozen=True, slots=True)
class Chunk:
    """512 consecutive samples of one source."""

    samples: Samples
    """`[512]` float32, 16 kHz mono, full scale +-1."""
    index: int
    """Position of the first sample, counted from the start of the source."""
    captured_at: float
    """Monotonic seconds at which the first sample was captured."""
    lost: bool = False
    """From here to the next chunk the sound is missing; the samples are zeros. What was being said is cut short."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Moments of a segment, in monotonic seconds, that its latency is counted from."""

    speech_ended_at: float
    """The acoustic end of speech: the last 10 ms above the noise floor."""
    segment_ended_at: float
    """When the sound that ended the segment was all there."""
    heard_at: float | None = None
    """When that sound was looked at; None: at once."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The speech between two pauses of one source, with pre-roll and post-roll."""

    id: SegmentId
    revision: int
    """Grows whenever speech resumes after a pause."""
    samples: Samples
    """`[n]` float32, 16 kHz mono."""
    index: int
    """Position of the first sample in the source."""
    speech_ratio: float
    """Share of speech among its chunks."""
    started_at: float | None
    """Unix seconds (wall clock) of the first sample; null where the source is no live one."""
    marks: Marks | None
    """Null where the segment did not come in live."""
    enforced: tuple[str, ...] = ()
    """What keeping to the budget has done to it: `split`, `not_at_pause`."""

    @property
    def duration_s(self) -> float:
        """Seconds of audio in the segment."""
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Token:
    """One unit of the model's vocabulary: a Chinese character or a piece of an English word."""

    text: str
    start_ms: int | None
    """From the start of the segment; null where the engine cannot tell."""
    end_ms: int | None
    confidence: float
    """Probability of the token, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Recognition:
    """What the recogniser makes of some samples: the part of a transcript that depends on nothing else."""

    text: str
    """Tokens joined to readable text; empty where nothing was recognised."""
    tokens: tuple[Token, ...]
    confidence: float | None
    """exp of the mean token log-probability; null for empty text."""
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds spent in each stage: queue, features, then encoder, cif, decoder (or `model` for a whole graph)."""
    engine: str = ""
    """The engine that heard it, `onnx-int8` for example: another may answer the next time."""
    enforced: tuple[str, ...] = ()
    """What keeping to the budget has done to it: `batched`, `interrupted` (and begun again), `cut` (into parts)."""
    model: str = ""
    """The model that heard it: it may be changed while others wait."""
    steadiness: float | None = None
    """How sure a short text is in disturbed sound as well, 0 to 1; null where nobody looked."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A recognised segment with its place in time and its latency trace. Null is: cannot be known."""

    id: SegmentId
    device: str
    source: str
    text: str
    text_raw: str
    """The text before any processing."""
    confidence: float | None
    started_at: float | None
    """Unix seconds (wall clock) of the first sample."""
    offset_s: float | None
    """Seconds from the start of the source (files, subtitles)."""
    duration_s: float
    tokens: tuple[Token, ...]
    latency_ms: Mapping[str, float]
    within_budget: bool | None
    decoded_at_pause: bool
    model: str
    engine: str
    language: str | None = None
    time_synced: bool | None = None
    text_itn: str | None = None
    """The text with numbers in digits; null while no inverse text normalisation ran."""
    marks: Marks | None = None
    """Not part of the JSON: this machine's clock says nothing elsewhere."""
    enforced: tuple[str, ...] = ()
    """What keeping to the budget has done to segment and recognition."""
    lost: bool = False
    """Nobody has recognised it: there was more to do than could be done. Its text is empty."""
    seq: int | None = None
    """Row of the outbox."""
    replayed: bool = False
    age_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the transcript as the JSON object `edge_asr.transcript/1`."""
        end = None if self.started_at is None else self.started_at + self.duration_s
        return {
            "schema": TRANSCRIPT_SCHEMA,
            "id": self.id,
            "seq": self.seq,
            "device": self.device,
            "source": self.source,
            "text": self.text,
            "text_itn": self.text_itn,
            "text_raw": self.text_raw,
            "language": self.language,
            "confidence": None if self.confidence is None else round(self.confidence, 4),
            "start": None if self.started_at is None else iso_time(self.started_at),
            "end": None if end is None else iso_time(end),
            "offset_s": None if self.offset_s is None else round(self.offset_s, 3),
            "time_synced": self.time_synced,
            "duration_s": round(self.duration_s, 3),
            "tokens": [
                {
                    "text": token.text,
                    "start_ms": token.start_ms,
                    "end_ms": token.end_ms,
                    "confidence": round(token.confidence, 4),
                }
                for token in self.tokens
            ],
            "latency_ms": {stage: round(value, 2) for stage, value in self.latency_ms.items()},
            "within_budget": self.within_budget,
            "decoded_at_pause": self.decoded_at_pause,
            "enforced": list(self.enforced),
            **({"lost": True} if self.lost else {}),
            "model": self.model,
            "engine": self.engine,
            "replayed": self.replayed,
            "age_s": round(self.age_s, 3),
        }


@dataclass(frozen=True, slots=True)
class Partial:
    """What has been recognised of a segment that is still being spoken."""

    id: SegmentId
    """That of the transcript to come."""
    source: str
    text: str
    """All that was understood; it may change."""
    stable: str
    """The beginning that two decodes in a row agree on; it only grows."""
    started_at: float | None
    """Unix seconds (wall clock) of the first sample."""
    end: bool = False
    """No transcript will come: what was shown is to be taken back."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the topic `partial`."""
        if self.end:
            return {"id": self.id, "source": self.source, "text": "", "end": True}
        start = None if self.started_at is None else iso_time(self.started_at)
        return {"id": self.id, "source": self.source, "text": self.text, "stable": self.stable, "start": start}


def iso_time(unix_seconds: float) -> str:
    """Return ISO 8601 in UTC with milliseconds: `2026-11-22T06:12:03.412Z`."""
    moment = datetime.fromtimestamp(unix_seconds, tz=timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
