"""READ FIRST. The path of a sentence: chunks -> probabilities -> segment -> recognition -> transcript -> sinks.

A `Listener` follows one source. It decodes a segment as soon as it pauses; if the pause lasts, that is the answer, and
if speech goes on, it is a partial, like the decodes of what grows meanwhile. `Answers` takes over where segments end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from edge_asr import metrics
from edge_asr.answers import Answers, Gates, Labels, Pending, TranscriptSink
from edge_asr.attention import PHRASE, Attention
from edge_asr.audio.source import AudioSource
from edge_asr.budget import LatencyBudget
from edge_asr.errors import EdgeAsrError
from edge_asr.recognizer.hypotheses import Hypotheses
from edge_asr.recognizer.scheduler import Priority, Scheduler
from edge_asr.recording import Recording
from edge_asr.speech.completeness import COMPLETE_ENDPOINT, ContentEndpoint
from edge_asr.speech.segmenter import POST_ROLL, Ended, Event, Paused, Resumed, Segmenter, Split, Started
from edge_asr.speech.vad import SpeechDetector
from edge_asr.steadiness import Doubted
from edge_asr.types import CHUNK_S, SAMPLE_RATE, Chunk, Partial, Recognition, Samples, SegmentId, new_segment_id

log = logging.getLogger(__name__)

DRIFT = 0.01
"""So much of the time that passes is forgiven a source that is ahead of it."""

FILE_AHEAD_S = 5.0
"""A pipe with so much more sound than time has passed is no microphone's."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a listener keeps up with its source."""

    live: bool = True
    """Chunks come at the pace of time: a pause is worth decoding at once, and moments are known."""
    backlog_s: float | None = None
    """Audio that may wait for its recognition before the oldest is given up; None: the source can wait instead."""
    partial_interval_ms: int = 0
    """How often what is being said is decoded; 0: never."""
    of_network: bool = False
    """Microphones of this machine are answered before it."""


@dataclass(slots=True)
class _Open:
    """The segment that is being spoken."""

    start: int
    began_at: float
    """Monotonic seconds of its first sample."""
    since: float
    """The same of what was split off before it, if anything: whoever was heard then is heard to the end."""
    continues: bool = False
    """It is the rest of a segment that was split."""
    id: SegmentId = field(default_factory=new_segment_id)
    revision: int = 0
    hypotheses: Hypotheses = field(default_factory=Hypotheses)
    decode: Future[Recognition] | None = None
    """Of all that was said so far: a partial, once it is done."""
    decoded_at: int = 0
    """Chunk at which the last decode was begun."""
    early: tuple[int, int, Future[Recognition]] | None = None
    """Of the segment as it is if the present pause lasts."""
    judged: bool = True
    """The text before the present pause has set its length, or there is none to do so."""
    skipped: bool = False
    """The present pause was not decoded at once: there was too much to do."""
    shown: tuple[str, str] = ("", "")
    """Text and stable beginning as published last."""


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
        pace: Pace,
        budget: LatencyBudget,
        attention: Attention | None = None,
        content_endpoint: ContentEndpoint | None = None,
        strained: Callable[[], object] = lambda: False,
    ) -> None:
        """`content_endpoint`: how long a pause may last once its text is known; None: as long as the preset says.

        `strained` tells whether the device is to be spared what nobody has to wait for: partials.
        """
        self._source = source
        self._detector = detector
        self._segmenter = segmenter
        self._scheduler = scheduler
        self._sinks = sinks
        self._labels = labels
        self._pace = pace
        self._budget = budget
        self._attention = attention or Attention()
        self._content_endpoint = content_endpoint
        self._strained = strained
        self._answers = Answers(sinks, labels, gates, self._attention, pace.backlog_s)
        self._recording = Recording()
        self._open: _Open | None = None
        self._stopping = self._muted = False
        self._position: float | None = None
        self._heard_at = 0.0
        self._peak = 0.0
        self._ahead_s = 0.0
        """Seconds of sound that have come beyond the time that has passed."""

    @property
    def failed(self) -> int:
        """Segments that the engine failed on."""
        return self._answers.failed

    @property
    def lost(self) -> int:
        """Segments given up because too many waited."""
        return self._answers.lost

    def take_peak(self) -> float:
        """Return the loudest sample (0 to 1) since it was asked last; for any thread."""
        peak, self._peak = self._peak, 0.0
        return peak

    async def run(self) -> None:
        """Listen until the source ends, and until its last transcript is offered. Raises AudioError."""
        answering = asyncio.create_task(self._answers.run(), name=f"answer {self._source.name}")
        failure: EdgeAsrError | None = None
        try:
            try:
                await self._listen()
            except EdgeAsrError as error:  # what has been said before is answered all the same
                failure = error
            await self._answers.end()
            await answering
            if failure is not None:
                raise failure
        finally:
            self._source.close()
            if self._open is not None:  # cancelled in the middle
                self._close(self._open)
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)  # it offers what is lost

    def stop(self) -> None:
        """End the source; `run` then completes what has been said and returns. What is still being said is dropped."""
        self._stopping = True
        self._source.close()

    def mute(self, muted: bool) -> None:
        """Hear nothing, or everything again. What is being said is dropped; closing the device is the source's part."""
        if muted and not self._muted:
            self._forget("muted")
            self._scheduler.forget()
        self._muted = muted

    def use(self, endpoint: int, content_endpoint: ContentEndpoint | None) -> None:
        """Let other pauses end a segment: another preset."""
        self._segmenter.use_endpoint(endpoint)
        self._content_endpoint = content_endpoint

    def follow(self, model: str, gates: Gates) -> None:
        """Take the thresholds of another model, which answers from now on."""
        self._answers.use(model, gates)

    async def _listen(self) -> None:
        async for chunk in self._source.chunks():
            if chunk.lost:
                await self._interrupt()
            elif not self._muted:
                await self._hear(chunk)
        await self._finish()

    async def _hear(self, chunk: Chunk) -> None:
        self._recording.append(chunk)
        self._peak = max(self._peak, float(chunk.samples.max()), -float(chunk.samples.min()))
        self._follow(chunk)
        self._look_at_decodes()
        for event in self._segmenter.step(self._detector(chunk)):
            await self._handle(event)
        self._decode_what_grows()
        self._recording.forget(self._segmenter.earliest_needed)

    def _follow(self, chunk: Chunk) -> None:
        """Tell a file that is piped in, which runs away from the time, from a clock that drifts."""
        position = chunk.captured_at - chunk.index / SAMPLE_RATE
        passed_s = max(0.0, chunk.captured_at - self._heard_at)
        self._heard_at = chunk.captured_at
        ahead_s = self._ahead_s + (self._position - position if self._position is not None else 0.0)
        self._position = position
        self._ahead_s = max(0.0, ahead_s - DRIFT * passed_s)

    async def _interrupt(self) -> None:
        """Sound is missing from here on. Half a command must not be acted on."""
        if self._whole():
            for event in self._segmenter.finish():
                await self._handle(event)
        elif self._open is not None:
            metrics.CUT_SHORT.inc()
            log.warning("%s: sound is missing in the middle of a segment, which is dropped", self._labels.source)
        self._forget("sound is missing")

    def _whole(self) -> bool:
        """Tell whether what is being said has paused for as long as a whole command does.

        Words are further apart than the post-roll: 调到二十 … may become 二十六. A text that ends open is not whole.
        """
        preset, silence = self._segmenter.endpoint, self._segmenter.silence
        least = min(preset, COMPLETE_ENDPOINT)
        return self._segmenter.paused and silence >= least and self._segmenter.pause_endpoint <= preset

    def _forget(self, why: str) -> None:
        """Drop what is being said, and begin anew with the next chunk."""
        if self._open is not None:
            log.debug("%s: %s, what was being said is dropped", self._labels.source, why)
            self._drop(self._open)
        self._segmenter.cut()
        self._detector.reset()
        self._recording.forget(self._segmenter.earliest_needed)

    async def _finish(self) -> None:
        """End the segment that is open. Who stops in the middle may have said half a command only."""
        if self._stopping and self._open is not None and not self._whole():
            log.info("%s: stopped in the middle of a segment, which is dropped", self._labels.source)
            self._drop(self._open)
            return
        for event in self._segmenter.finish():
            await self._handle(event)

    async def _handle(self, event: Event) -> None:
        match event:
            case Started(start):
                self._begin(start)
            case Paused(start, end):
                self._pause(self._still_open(), start, end)
            case Resumed():
                self._resume(self._still_open())
            case Ended(start, end, speech):
                await self._put(self._complete(self._still_open(), start, end, speech))
            case Split(start, end, speech):
                before = self._still_open()
                whole = self._complete(before, start, end, speech, ("split",))
                self._begin(end, before)  # before the source is held up: whoever mutes it meanwhile drops this one
                await self._put(whole)

    def _still_open(self) -> _Open:
        assert self._open is not None  # the segmenter started it
        return self._open

    def _begin(self, start: int, before: _Open | None = None) -> None:
        began_at = self._recording.captured_at(start)
        since = began_at if before is None else before.since
        self._open = _Open(start, began_at, since, before is not None, decoded_at=self._segmenter.count)
        if self._pace.live:
            longest_s = self._budget.longest_s(self._scheduler.costs)
            self._segmenter.limit(round(longest_s / CHUNK_S))
            self._scheduler.warm()

    def _pause(self, current: _Open, start: int, end: int) -> None:
        """Decode at once: if the pause lasts, that is the answer. Not where it would hold others up."""
        if not self._pace.live or not self._attention.hears(current.since):
            return
        if current.decode is not None:  # of less than what is decoded now
            current.decode.cancel()
            current.decode = None
        current.skipped = not self._budget.allows_early(self._scheduler.backlog_ms())
        if current.skipped:
            metrics.ENFORCED.labels("not_at_pause").inc()
            return
        left_s = max(0, min(self._segmenter.endpoint, COMPLETE_ENDPOINT) - POST_ROLL) * CHUNK_S
        decode = self._ask(self._recording.samples(start, end), left_s)
        current.early = (start, end, decode)
        current.judged = self._content_endpoint is None

    def _resume(self, current: _Open) -> None:
        """Speech goes on: what was decoded at the pause is a partial now."""
        current.revision += 1
        current.judged, current.skipped = True, False
        if current.early is None:
            return
        (*_, decode), current.early = current.early, None
        if not decode.cancel() and self._pace.partial_interval_ms:
            current.decode, current.decoded_at = decode, self._segmenter.count

    async def _put(self, pending: Pending | None) -> None:
        if pending is not None:
            await self._answers.put(pending)

    def _complete(
        self, current: _Open, start: int, end: int, speech: int, enforced: tuple[str, ...] = ()
    ) -> Pending | None:
        """Return the segment with its recognition: the one begun at the pause if it is of the same audio.

        None: it is not for us.
        """
        metrics.SEGMENTS.inc()
        if not self._attention.hears(current.since):
            metrics.UNADDRESSED.labels(self._attention.mode).inc()
            self._drop(current)
            return None
        for step in enforced:
            metrics.ENFORCED.labels(step).inc()
        segment = dataclasses.replace(
            self._recording.cut(current.id, start, end, speech, self._pace.live),
            revision=current.revision,
            enforced=(*enforced, *(("not_at_pause",) if current.skipped else ())),
        )
        at_pause = current.early is not None and current.early[:2] == (start, end)
        if at_pause and current.early is not None:
            (*_, recognition), current.early = current.early, None
        else:
            recognition = self._ask(segment.samples)
        shown = current.shown != ("", "")
        self._close(current)
        return Pending(segment, recognition, at_pause, current.since, shown, current.continues)

    def _drop(self, current: _Open) -> None:
        """Let what is being said come to nothing."""
        self._close(current)
        if current.shown != ("", ""):
            self._show(Partial(current.id, self._labels.source, "", "", None, end=True))

    def _close(self, current: _Open) -> None:
        for decode in (current.decode, current.early and current.early[2]):
            if decode is not None:
                decode.cancel()
        self._open = None

    def _ask(self, samples: Samples, in_s: float = 0.0) -> Future[Recognition]:
        """Ask for the recognition of a segment that ends after `in_s` seconds; a short text may be doubted."""
        priority = self._priority()
        if not self._answers.gates.min_steadiness:
            return self._submit(samples, priority, in_s)
        return Doubted(
            samples,
            lambda sound: self._submit(sound, priority, in_s),
            lambda: self._budget.allows_early(self._scheduler.backlog_ms()),
        )

    def _submit(self, samples: Samples, priority: Priority, in_s: float = 0.0) -> Future[Recognition]:
        """Ask for a recognition of what ends after `in_s` seconds, to be published within the budget then."""
        deadline = time.monotonic() + in_s + self._budget.response_ms / 1e3
        return self._scheduler.submit(samples, priority, deadline)

    def _priority(self) -> Priority:
        """Return that of a microphone, unless it turns out to be a file that is piped in faster than time passes."""
        can_wait = self._pace.backlog_s is None
        if self._pace.of_network or not self._pace.live or (can_wait and self._ahead_s > FILE_AHEAD_S):
            return Priority.NETWORK
        return Priority.MICROPHONE

    def _look_at_decodes(self) -> None:
        """Take what has been decoded since the last chunk: let it set the length of the pause, or show it."""
        current = self._open
        if current is None:
            return
        if current.early is not None and not current.judged and current.early[2].done():
            current.judged = True
            self._judge(current, current.early[2])
        if current.decode is not None and current.decode.done():
            decode, current.decode = current.decode, None
            if (recognition := _result(decode)) is not None:
                self._offer_partial(current, recognition)

    def _judge(self, current: _Open, decode: Future[Recognition]) -> None:
        """Let the text before the pause, without a wake phrase, decide how long the pause may last.

        A failed decode, and what is not for us, leave it to the preset.
        """
        recognition = _result(decode)
        said = None if recognition is None else self._preview(current, recognition)
        if self._content_endpoint is not None and said is not None:
            least = min((token.confidence for token in said.tokens), default=0.0)
            self._segmenter.endpoint_after(self._content_endpoint.chunks(said.text, least))

    def _decode_what_grows(self) -> None:
        """Decode what has been said so far, now and then, if nobody has to wait for that."""
        current, interval_ms = self._open, self._pace.partial_interval_ms
        if current is None or not interval_ms or current.decode is not None:
            return
        if self._segmenter.silence:  # it may be about to pause, and that decode must not wait
            return
        end = self._segmenter.count
        cost_ms = self._scheduler.costs.estimate_ms((end - current.start) * CHUNK_S)
        if not self._budget.allows_partial(cost_ms, (end - current.decoded_at) * CHUNK_S * 1e3, interval_ms):
            return
        if not self._attention.hears(current.since):
            return
        current.decoded_at = end
        if self._scheduler.idle and not self._strained():
            current.decode = self._submit(self._recording.samples(current.start, end), Priority.PARTIAL)
        else:
            metrics.ENFORCED.labels("partial_skipped").inc()

    def _preview(self, current: _Open, recognition: Recognition) -> Recognition | None:
        """Return what may be shown; of the rest of what was split nothing is known until its beginning is."""
        if current.continues and self._attention.mode == PHRASE:
            return None
        return self._attention.preview(recognition, current.since)

    def _offer_partial(self, current: _Open, recognition: Recognition) -> None:
        seen = self._preview(current, recognition)
        shown = current.hypotheses.add([token.text for token in seen.tokens]) if seen is not None else ("", "")
        if shown in (("", ""), current.shown):
            return
        current.shown = shown
        metrics.PARTIALS.inc()
        started_at = time.time() - (time.monotonic() - current.began_at)
        self._show(Partial(current.id, self._labels.source, *shown, started_at))

    def _show(self, partial: Partial) -> None:
        for sink in self._sinks:
            sink.offer_partial(partial)


def _result(decode: Future[Recognition]) -> Recognition | None:
    """Return what has been decoded; None where nothing came of it."""
    return None if decode.cancelled() or decode.exception() is not None else decode.result()
