"""The segments of a source that have ended, until each has its transcript: in order, and none without a word.

What the engine cannot keep up with waits, up to a limit; beyond it the oldest is published as lost.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from edge_asr import metrics
from edge_asr.attention import PHRASE, Attention
from edge_asr.errors import EngineError
from edge_asr.types import SAMPLE_RATE, Partial, Recognition, Segment, Transcript

log = logging.getLogger(__name__)

PENDING_LIMIT = 4
"""Segments of a source that can wait which wait for their recognition; then the source does."""
LOST = "lost"


class TranscriptSink(Protocol):
    """Whoever takes transcripts."""

    def offer(self, transcript: Transcript) -> None:
        """Take a transcript; never blocks."""

    def offer_partial(self, partial: Partial) -> None:
        """Take what is known of a segment so far; never blocks. None comes after the transcript of its id."""


@dataclass(frozen=True, slots=True)
class Gates:
    """Thresholds below which a segment is not published; 0 is off."""

    min_confidence: float = 0.0
    min_speech_ratio: float = 0.0
    max_tokens_per_s: float = 0.0
    min_steadiness: float = 0.0

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
        if recognition.steadiness is not None and recognition.steadiness < self.min_steadiness:
            return "steadiness"
        return None


@dataclass(frozen=True, slots=True)
class Labels:
    """What every transcript of a listener says of its origin."""

    device: str
    source: str
    model: str
    """Where the recognition does not say which it was."""


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A segment that has ended, and the recognition it waits for."""

    segment: Segment
    recognition: Future[Recognition]
    early: bool
    """Decoding began at the pause."""
    began_at: float
    """Monotonic seconds of the first sample of what was said, which it may be the rest of."""
    shown: bool
    """A partial of it has been published."""
    continues: bool = False
    """It is the rest of what was split, and for us if that was."""


class Answers:
    """Turns recognitions into transcripts, in the order of the segments, and offers them to the sinks."""

    def __init__(
        self,
        sinks: Sequence[TranscriptSink],
        labels: Labels,
        gates: Gates,
        attention: Attention,
        backlog_s: float | None,
    ) -> None:
        """`backlog_s`: audio that may wait before the oldest is given up; None: the source can wait instead."""
        self._sinks = sinks
        self._labels = labels
        self.gates = gates
        self._attention = attention
        self._backlog_s = backlog_s
        self._pending: deque[Pending] = deque()
        self._changed = asyncio.Condition()
        self._ended = False
        self._admitted = False
        """What was answered last was for us."""
        self.failed = 0
        """Segments that the engine failed on."""
        self.lost = 0
        """Segments given up because too many waited."""

    def use(self, model: str, gates: Gates) -> None:
        """Let another model's thresholds hold from now on."""
        self._labels = dataclasses.replace(self._labels, model=model)
        self.gates = gates

    async def put(self, pending: Pending) -> None:
        """Take the next segment; waits where the source can."""
        async with self._changed:
            if self._backlog_s is None:
                await self._changed.wait_for(lambda: len(self._pending) < PENDING_LIMIT)
            self._pending.append(pending)
            if self._backlog_s is not None:
                self._give_up(self._backlog_s)
            self._changed.notify_all()

    async def end(self) -> None:
        """Say that no further segment comes: `run` returns after the last one."""
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def run(self) -> None:
        """Answer one segment after another. If this is cancelled, what is not recognised yet is published as lost."""
        try:
            while (pending := await self._next()) is not None:
                recognition = asyncio.wrap_future(pending.recognition)
                # It is seen where it is answered: asyncio need not complain, also where nobody waits any more.
                recognition.add_done_callback(lambda done: done.cancelled() or done.exception())
                # Not awaited itself: one that was given up is cancelled, which would end this task.
                await asyncio.wait([recognition])
                self._try(self._pending.popleft())
                async with self._changed:
                    self._changed.notify_all()
        finally:
            while self._pending:
                self._try(self._pending.popleft())

    async def _next(self) -> Pending | None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._pending or self._ended)
            return self._pending[0] if self._pending else None

    def _give_up(self, backlog_s: float) -> None:
        """Give up the oldest ones that nobody has begun with, until no more than the limit waits."""
        waiting = sum(len(pending.segment.samples) for pending in self._pending if not pending.recognition.done())
        for pending in self._pending:
            if waiting <= backlog_s * SAMPLE_RATE:
                return
            if not pending.recognition.done() and pending.recognition.cancel():
                waiting -= len(pending.segment.samples)

    def _try(self, pending: Pending) -> None:
        try:
            self._answer(pending)
        except Exception:  # a bug met by one sentence must not end the listening
            self.failed += 1
            metrics.FAILED.inc()
            log.exception("%s: a segment of %.1f s is lost", self._labels.source, pending.segment.duration_s)

    def _answer(self, pending: Pending) -> None:
        recognition = self._result(pending.segment, pending.recognition)
        transcript = None if recognition is None else self._transcript(pending, recognition)
        if transcript is not None:
            metrics.TRANSCRIPTS.inc()
            log.debug("%s: %s", transcript.source, transcript.text)
            if transcript.decoded_at_pause:
                metrics.DECODED_AT_PAUSE.inc()
            for sink in self._sinks:
                sink.offer(transcript)
        if pending.shown and (transcript is None or transcript.lost):
            partial = Partial(pending.segment.id, self._labels.source, "", "", None, end=True)
            for sink in self._sinks:
                sink.offer_partial(partial)

    def _result(self, segment: Segment, answer: Future[Recognition]) -> Recognition | None:
        """Return the recognition, at once; None where the engine failed on it."""
        if answer.cancel() or not answer.done():
            return Recognition("", (), None, enforced=(LOST,))
        if (error := answer.exception()) is None:
            return answer.result()
        self.failed += 1
        metrics.FAILED.inc()
        # What is no EngineError is a bug; met by one sentence, it must not end the listening.
        trace = None if isinstance(error, EngineError) else error
        log.error("%s: a segment of %.1f s is lost: %s", self._labels.source, segment.duration_s, error, exc_info=trace)
        return None

    def _transcript(self, pending: Pending, recognition: Recognition) -> Transcript | None:
        """Return the transcript; None where a gate or nobody's attention lets it through."""
        segment = pending.segment
        continues, self._admitted = pending.continues and self._admitted, False
        if LOST in recognition.enforced:
            return self._given_up(segment, recognition)
        if (gate := self.gates.refuse(segment, recognition)) is not None:
            metrics.GATED.labels(gate).inc()
            log.debug("%s: a segment of %.1f s dropped: %s", self._labels.source, segment.duration_s, gate)
            return None
        said = recognition if continues else self._attention.admit(recognition, pending.began_at)
        self._admitted = said is not None
        if said is None:
            return None
        made = transcript_of(segment, said, self._labels, pending.early)
        return dataclasses.replace(made, text_raw=recognition.text)

    def _given_up(self, segment: Segment, recognition: Recognition) -> Transcript | None:
        """Return a transcript that says so; None where it may not have been for us, and is nobody's business."""
        self.lost += 1
        metrics.ENFORCED.labels(LOST).inc()
        level = logging.WARNING if self.lost == 1 else logging.DEBUG  # how often it happens is a metric
        log.log(
            level,
            "%s: a segment of %.1f s is lost: there was no time to recognise it",
            self._labels.source,
            segment.duration_s,
        )
        if self._attention.mode == PHRASE:
            return None
        return dataclasses.replace(transcript_of(segment, recognition, self._labels), lost=True)


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
        model=recognition.model or labels.model,
        engine=recognition.engine,
        enforced=(*segment.enforced, *recognition.enforced),
        marks=segment.marks,
    )
