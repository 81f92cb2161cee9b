"""READ FIRST. The path of a sentence: chunks -> probabilities -> segment -> recognition -> transcript -> sinks.

A `Listener` follows one source. It decodes a segment as soon as it pauses; if the pause lasts, that is the answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_asr import metrics
from edge_asr.audio.source import AudioSource
from edge_asr.errors import EngineError
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.speech.completeness import ContentEndpoint
from edge_asr.speech.energy import end_of_sound
from edge_asr.speech.segmenter import Ended, Event, Paused, Resumed, Segmenter, Split, Started
from edge_asr.speech.vad import SpeechDetector
from edge_asr.types import (
    CHUNK_SAMPLES,
    SAMPLE_RATE,
    Chunk,
    Marks,
    Recognition,
    Segment,
    SegmentId,
    Transcript,
    new_segment_id,
)

log = logging.getLogger(__name__)

PENDING_LIMIT = 4
"""Ended segments of one source that wait for their recognition; then the source waits.

A file or a pipe can. A microphone keeps 60 s meanwhile, then drops the oldest and yields a chunk that is `lost`.
"""


class TranscriptSink(Protocol):
    """Whoever takes transcripts."""

    def offer(self, transcript: Transcript) -> None:
        """Take a transcript; never blocks."""


@dataclass(frozen=True, slots=True)
class Gates:
    """Thresholds below which a segment is not published; 0 is off."""

    min_confidence: float = 0.0
    min_speech_ratio: float = 0.0
    max_tokens_per_s: float = 0.0

    def refuse(self, segment: Segment, recognition: Recognition) -> str | None:
        """Return the gate that drops the segment, or None."""
        speech_s = segment.speech_ratio * segment.duration_s
        if not recognition.text:
            return "empty"
        if (recognition.confidence or 0.0) < self.min_confidence:
            return "confidence"
        if segment.speech_ratio < self.min_speech_ratio:
            return "speech_ratio"
        if self.max_tokens_per_s and len(recognition.tokens) > self.max_tokens_per_s * max(speech_s, 0.1):
            return "rate"
        return None


@dataclass(frozen=True, slots=True)
class Labels:
    """What every transcript of a listener says of its origin."""

    device: str
    source: str
    model: str


class Recording:
    """The chunks of a source that a segment may still need."""

    def __init__(self) -> None:
        self._chunks: deque[Chunk] = deque()
        self._first = 0

    def append(self, chunk: Chunk) -> None:
        """Take the next chunk."""
        self._chunks.append(chunk)

    def forget(self, before: int) -> None:
        """Drop the chunks before chunk `before`."""
        while self._chunks and self._first < before:
            self._chunks.popleft()
            self._first += 1

    def between(self, start: int, end: int) -> list[Chunk]:
        """Return chunks `start` to `end` (exclusive)."""
        return [self._chunks[k - self._first] for k in range(start, end)]


class Listener:
    """Follows one source and offers its transcripts to the sinks, in order."""

    def __init__(
        self,
        source: AudioSource,
        detector: SpeechDetector,
        segmenter: Segmenter,
        scheduler: Scheduler,
        sinks: Sequence[TranscriptSink],
        labels: Labels,
        gates: Gates,
        live: bool,
        content_endpoint: ContentEndpoint | None = None,
    ) -> None:
        """`live`: chunks come at the pace of time, so a pause is worth decoding at once and wall-clock times exist.

        `content_endpoint`: how long a pause may last once its text is known; None: as long as the preset says.
        """
        self._source = source
        self._detector = detector
        self._segmenter = segmenter
        self._scheduler = scheduler
        self._sinks = sinks
        self._labels = labels
        self._gates = gates
        self._live = live
        self._content_endpoint = content_endpoint
        self._recording = Recording()
        self._pending: asyncio.Queue[tuple[Segment, Future[Recognition], bool] | None] = asyncio.Queue(PENDING_LIMIT)
        self._id: SegmentId | None = None
        self._revision = 0
        self._stopping = False
        self.lost = 0
        """Segments that the engine failed on."""
        self._early: tuple[int, int, Future[Recognition]] | None = None
        self._unjudged: Future[Recognition] | None = None
        """The decode at the present pause, until its text has set the endpoint."""

    async def run(self) -> None:
        """Listen until the source ends, and until its last transcript is offered. Raises AudioError."""
        answering = asyncio.create_task(self._answer(), name=f"answer {self._source.name}")
        try:
            async for chunk in self._source.chunks():
                if chunk.lost:
                    await self._interrupt()
                    continue
                self._recording.append(chunk)
                if self._unjudged is not None and self._unjudged.done():
                    self._judge(self._unjudged)
                for event in self._segmenter.step(self._detector(chunk)):
                    await self._handle(event)
                self._recording.forget(self._segmenter.earliest_needed)
            await self._finish()
            await self._pending.put(None)
            await answering
        finally:
            self._source.close()
            answering.cancel()

    def stop(self) -> None:
        """End the source; `run` then completes what has been said and returns. What is still being said is dropped."""
        self._stopping = True
        self._source.close()

    async def _interrupt(self) -> None:
        """Sound is missing from here on. What has paused is whole; half a command must not be acted on."""
        if self._segmenter.paused:
            for event in self._segmenter.finish():
                await self._handle(event)
        elif self._id is not None:
            metrics.CUT_SHORT.inc()
            log.warning("%s: sound is missing in the middle of a segment, which is dropped", self._labels.source)
            self._id = None
        self._segmenter.cut()
        self._detector.reset()
        self._recording.forget(self._segmenter.earliest_needed)

    async def _finish(self) -> None:
        """End the segment that is open. Half a command must not be acted on: 调到二十 may have become 二十六."""
        if self._stopping and self._id is not None and not self._segmenter.paused:
            log.info("%s: stopped in the middle of a segment, which is dropped", self._labels.source)
            return
        for event in self._segmenter.finish():
            await self._handle(event)

    async def _handle(self, event: Event) -> None:
        match event:
            case Started():
                self._id, self._revision = new_segment_id(), 0
            case Paused(start, end):
                if self._live:
                    future = self._decode(start, end)
                    self._early = (start, end, future)
                    self._unjudged = None if self._content_endpoint is None else future
            case Resumed():
                self._revision += 1
                self._drop_early()
            case Ended(start, end, speech):
                await self._complete(start, end, speech)
                self._id = None
            case Split(start, end, speech):
                await self._complete(start, end, speech)
                self._id, self._revision = new_segment_id(), 0

    async def _complete(self, start: int, end: int, speech: int) -> None:
        """Queue the segment with its recognition: the one begun at the pause if it is of the same audio."""
        segment = self._cut(start, end, speech)
        metrics.SEGMENTS.inc()
        self._unjudged = None
        if self._early is not None and self._early[:2] == (start, end):
            (*_, future), self._early = self._early, None
            await self._pending.put((segment, future, True))
        else:
            self._drop_early()
            await self._pending.put((segment, self._scheduler.submit(segment.samples), False))

    def _decode(self, start: int, end: int) -> Future[Recognition]:
        chunks = self._recording.between(start, end)
        return self._scheduler.submit(np.concatenate([chunk.samples for chunk in chunks]))

    def _judge(self, decode: Future[Recognition]) -> None:
        """Let the text before the pause decide how long the pause may last. A failed decode leaves it to the preset."""
        self._unjudged = None
        if self._content_endpoint is not None and not decode.cancelled() and decode.exception() is None:
            self._segmenter.endpoint_after(self._content_endpoint.chunks(decode.result().text))

    def _drop_early(self) -> None:
        self._unjudged = None
        if self._early is not None:
            self._early[2].cancel()
            self._early = None

    def _cut(self, start: int, end: int, speech: int) -> Segment:
        now, now_wall = time.monotonic(), time.time()
        chunks = self._recording.between(start, end)
        samples = np.concatenate([chunk.samples for chunk in chunks])
        sound_end = end_of_sound(samples)
        last = chunks[(sound_end - 1) // CHUNK_SAMPLES]
        within = sound_end - (last.index - chunks[0].index)
        return Segment(
            id=self._id or new_segment_id(),
            revision=self._revision,
            samples=samples,
            index=chunks[0].index,
            speech_ratio=speech / len(chunks),
            started_at=now_wall - (now - chunks[0].captured_at) if self._live else None,
            marks=Marks(last.captured_at + within / SAMPLE_RATE, now) if self._live else None,
        )

    async def _answer(self) -> None:
        """Turn recognitions into transcripts, in the order of the segments."""
        while (item := await self._pending.get()) is not None:
            segment, future, early = item
            try:
                recognition = await asyncio.wrap_future(future)
            except EngineError as error:
                self.lost += 1
                metrics.FAILED.inc()
                log.error("%s: a segment of %.1f s is lost: %s", self._labels.source, segment.duration_s, error)
                continue
            except Exception:  # a bug met by one sentence must not end the listening
                self.lost += 1
                metrics.FAILED.inc()
                log.exception("%s: a segment of %.1f s is lost", self._labels.source, segment.duration_s)
                continue
            gate = self._gates.refuse(segment, recognition)
            if gate is not None:
                metrics.GATED.labels(gate).inc()
                log.debug("%s: a segment of %.1f s dropped: %s", self._labels.source, segment.duration_s, gate)
                continue
            self._offer(transcript_of(segment, recognition, self._labels, early))

    def _offer(self, transcript: Transcript) -> None:
        metrics.TRANSCRIPTS.inc()
        log.debug("%s: %s", transcript.source, transcript.text)
        if transcript.decoded_at_pause:
            metrics.DECODED_AT_PAUSE.inc()
        for sink in self._sinks:
            sink.offer(transcript)


def transcript_of(segment: Segment, recognition: Recognition, labels: Labels, early: bool = False) -> Transcript:
    """Join what was said with where and when; `early`: decoding began at the pause."""
    return Transcript(
        id=segment.id,
        device=labels.device,
        source=labels.source,
        text=recognition.text,
        text_raw=recognition.text,
        confidence=recognition.confidence,
        started_at=segment.started_at,
        offset_s=segment.index / SAMPLE_RATE,
        duration_s=segment.duration_s,
        tokens=recognition.tokens,
        latency_ms=recognition.stages_ms,
        within_budget=None,
        decoded_at_pause=early,
        model=labels.model,
        engine=recognition.engine,
        marks=segment.marks,
    )
