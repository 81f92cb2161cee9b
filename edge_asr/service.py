"""What the dialects of the network ask for: a whole recording's transcripts, or a stream's. Microphones go first."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from edge_asr import metrics
from edge_asr.answers import Gates, Labels, TranscriptSink
from edge_asr.audio.pushed import PushedSource
from edge_asr.budget import LatencyBudget
from edge_asr.errors import EngineError, NotReadyError, StreamEndedError, TooManyStreamsError
from edge_asr.pipeline import Listener, Pace
from edge_asr.recognizer.scheduler import Priority, Scheduler
from edge_asr.speech.completeness import ContentEndpoint
from edge_asr.speech.segmenter import Rules, Segmenter
from edge_asr.speech.vad import SpeechDetector, SteadyDetector
from edge_asr.transcribe import SILENCE, is_spoken, nothing, segments, transcript_at
from edge_asr.types import CHUNK_SAMPLES, Partial, Recognition, Samples, Transcript

_T = TypeVar("_T")

AT_ONCE = 4
"""Segments of one recording that may wait for the engine: one that is long holds nobody else up."""
CUTTERS = 2
"""Threads that look for the speech in recordings."""
SPARE = 8
"""Detectors kept for those who come next: to make one takes longer than to use it on a sentence."""
RETRY_S = 5.0
"""When it may be worth asking again for a stream."""


class Model(Protocol):
    """The model that answers at present."""

    @property
    def name(self) -> str:
        """Its bundle's name."""

    @property
    def engine(self) -> str | None:
        """The engine that it runs on; None: it does not yet."""

    @property
    def gates(self) -> Gates:
        """What is too doubtful to be a transcript of a stream."""


@dataclass(frozen=True, slots=True)
class Pauses:
    """What ends a segment of a stream: chunks, or by its text."""

    endpoint: int
    content: ContentEndpoint | None = None


@dataclass(frozen=True, slots=True)
class Hearing:
    """How recordings and streams are listened to."""

    rules: Rules
    presets: Mapping[str, Pauses]
    preset: Callable[[], str]
    """The one that holds where nobody asks for another."""
    partial_interval_ms: int
    make_detector: Callable[[], SpeechDetector]
    strained: Callable[[], object] = lambda: False
    """Whether partials are to be left out."""


class SpeechService:
    """Recognises for the network, behind the microphones; for the thread of the server's event loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        model: Model,
        hearing: Hearing,
        budget: LatencyBudget,
        device: str,
        *,
        streams: int = 32,
        wait_s: float = 10.0,
    ) -> None:
        """`streams`: how many are listened to at a time; `wait_s`: how long a recording may wait for its turn."""
        self.scheduler = scheduler
        self._model = model
        self._hearing = hearing
        self._budget = budget
        self._device = device
        self._most_streams = streams
        self._wait_s = wait_s
        self._streams: set[SpeechStream] = set()
        self._detectors: deque[SpeechDetector] = deque(maxlen=SPARE)
        self._cutters = ThreadPoolExecutor(CUTTERS, thread_name_prefix="cut")

    @property
    def model(self) -> str:
        """The name of the model that answers."""
        return self._model.name

    @property
    def engine(self) -> str | None:
        """The engine that it runs on; None: it does not yet."""
        return self._model.engine

    @property
    def ready(self) -> bool:
        """True while it can answer."""
        return self.engine is not None

    @property
    def presets(self) -> tuple[str, ...]:
        """The names of the presets."""
        return tuple(self._hearing.presets)

    @property
    def streams(self) -> int:
        """How many streams are listened to."""
        return len(self._streams)

    def backlog_s(self) -> float:
        """Return how many seconds of work wait for the engine, the microphones' included, as far as can be told."""
        return self.scheduler.backlog_ms(Priority.NETWORK) / 1e3

    async def transcribe(self, samples: Samples, source: str) -> AsyncGenerator[Transcript, None]:
        """Yield the transcripts of a whole recording (`[n]` float32, 16 kHz) in order, as they come, at least one.

        As `edge_asr.transcribe.transcribe` does: what is no longer than the segment cap and has speech in it is one.
        Closing the generator cancels what is under way. Raises NotReadyError, EngineError.
        """
        self._check_ready()
        labels = Labels(self._device, source, self.model)
        waiting: deque[tuple[int, Samples, Future[Recognition]]] = deque()
        found = False
        try:
            async for index, piece in self._pieces(samples):
                found = True
                waiting.append((index, piece, self._submit(piece)))
                while len(waiting) >= AT_ONCE:
                    yield await _answer(waiting, labels)
            while waiting:
                yield await _answer(waiting, labels)
        finally:
            for *_, recognition in waiting:
                recognition.cancel()
        if not found:
            whole = samples if self._is_short(samples) else SILENCE
            yield transcript_at(0, whole, nothing(self.engine or ""), labels)

    def stream(
        self, sink: TranscriptSink, source: str, *, partials: bool = True, preset: str | None = None
    ) -> SpeechStream:
        """Listen to a stream whose transcripts, and partials, the sink gets; it is called on this thread.

        `preset`: what ends a segment, None: what ends one of a microphone. Raises NotReadyError, TooManyStreamsError,
        ValueError for an unknown preset.
        """
        self._check_ready()
        pauses = self._hearing.presets.get(preset or self._hearing.preset())
        if pauses is None:
            raise ValueError(f"unknown preset {preset}; known here: {', '.join(self.presets)}")
        if len(self._streams) >= self._most_streams:
            raise TooManyStreamsError(
                f"{self._most_streams} streams are listened to already; try again later, or raise http.limits.streams",
                RETRY_S,
            )
        settled = _Settled(sink, self._budget, source.partition(" ")[0])

        def listener(heard: PushedSource, detector: SpeechDetector) -> Listener:
            interval_ms = self._hearing.partial_interval_ms if partials else 0
            made = Listener(
                heard,
                SteadyDetector(detector, self._hearing.rules.threshold),
                Segmenter(self._hearing.rules),
                self.scheduler,
                [settled],
                Labels(self._device, source, self.model),
                self._model.gates,
                Pace(live=True, partial_interval_ms=interval_ms, of_network=True),
                self._budget,
                strained=self._hearing.strained,
            )
            made.use(pauses.endpoint, pauses.content)
            return made

        stream = SpeechStream(source, listener, settled, self._lend)
        self._streams.add(stream)
        stream.when_over(lambda: self._streams.discard(stream))
        metrics.STREAMS.set_function(lambda: self.streams)
        return stream

    async def close(self) -> None:
        """End all streams, and the threads."""
        for stream in tuple(self._streams):
            stream.cancel()
        self._cutters.shutdown(wait=False, cancel_futures=True)

    def _check_ready(self) -> None:
        if not self.ready:
            raise NotReadyError("the model is being loaded; try again when /readyz says ready")

    def _is_short(self, samples: Samples) -> bool:
        return len(samples) <= self._hearing.rules.max_length * CHUNK_SAMPLES

    def _submit(self, samples: Samples) -> Future[Recognition]:
        return self.scheduler.submit(samples, Priority.NETWORK, time.monotonic() + self._wait_s)

    async def _pieces(self, samples: Samples) -> AsyncGenerator[tuple[int, Samples], None]:
        """Yield what is to be recognised, with the index of its first sample."""
        rules = self._hearing.rules
        with self._lend() as detector:
            if self._is_short(samples):
                if await self._apart(lambda: is_spoken(samples, detector, rules)):
                    yield 0, samples
                return
            cut = segments(iter([samples]), detector, rules)
            while (piece := await self._apart(lambda: next(cut, None))) is not None:
                yield piece

    async def _apart(self, work: Callable[[], _T]) -> _T:
        """Do what takes the processor's time on another thread."""
        return await asyncio.wrap_future(self._cutters.submit(work))

    @contextlib.contextmanager
    def _lend(self) -> Iterator[SpeechDetector]:
        """Lend a detector that has heard nothing yet. Who fails may still be using it: it does not come back then."""
        detector = self._detectors.popleft() if self._detectors else self._hearing.make_detector()
        detector.reset()
        yield detector
        self._detectors.append(detector)


class SpeechStream:
    """What one client sends as it is spoken. For the thread of the server's event loop."""

    def __init__(
        self,
        name: str,
        make: Callable[[PushedSource, SpeechDetector], Listener],
        sink: _Settled,
        lend: Callable[[], contextlib.AbstractContextManager[SpeechDetector]],
    ) -> None:
        self._name = name
        self._make = make
        self._sink = sink
        self._lent = contextlib.ExitStack()
        self._detector = self._lent.enter_context(lend())
        self._goes_on = False
        self._over: list[Callable[[], None]] = []
        self._begin(0)

    def when_over(self, call: Callable[[], None]) -> None:
        """Have it called when nothing more comes."""
        self._over.append(call)

    async def push(self, samples: Samples) -> None:
        """Take `[n]` float32 samples, 16 kHz; waits while more than 5 s wait to be heard. Raises StreamEndedError."""
        await self._source.push(samples)

    def end(self) -> None:
        """Say that no more sound comes: what is being said is finished."""
        self._source.end()

    async def flush(self) -> None:
        """Wait for the last transcript, after `end`. Raises EngineError where the engine failed on any."""
        await asyncio.wait([self._listening])
        self._tell()

    async def finish_segment(self) -> None:
        """End what is being said as if the pause had lasted, and wait for its transcript; the stream goes on.

        Raises EngineError where the engine failed on any, and StreamEndedError after `end` or `cancel`.
        """
        if self._listening.done():
            raise StreamEndedError("the stream has ended; open another one")
        self._goes_on = True
        try:
            self._source.end()
            await asyncio.wait([self._listening])
        finally:
            self._goes_on = False
        if self._listening.cancelled() or self._listening.exception() is not None:
            self._finish()
            self._tell()
        before = self._listener
        self._detector.reset()
        self._begin(self._source.next_index)
        _check(before)

    def cancel(self) -> None:
        """Forget everything: whoever spoke has gone. May be called more than once."""
        self._sink.close()
        self._goes_on = False
        self._listening.cancel()
        if self._listening.done():
            self._finish()

    def _begin(self, first: int) -> None:
        self._source = PushedSource(self._name, first)
        self._listener = self._make(self._source, self._detector)
        self._listening = asyncio.create_task(self._listener.run(), name=f"stream {self._name}")
        self._listening.add_done_callback(self._done)

    def _done(self, listening: asyncio.Task[None]) -> None:
        if not listening.cancelled():
            listening.exception()  # `flush` tells; asyncio need not complain where nobody waits
        if not self._goes_on:
            self._finish()

    def _finish(self) -> None:
        self._lent.close()
        while self._over:
            self._over.pop()()

    def _tell(self) -> None:
        if self._listening.cancelled():
            raise StreamEndedError("the stream was cancelled")
        self._listening.result()
        _check(self._listener)


class _Settled:
    """Completes the latency trace of what a sink gets, until it is closed; see TranscriptSink."""

    def __init__(self, sink: TranscriptSink, budget: LatencyBudget, surface: str) -> None:
        self._sink: TranscriptSink | None = sink
        self._budget = budget
        self._surface = surface

    def offer(self, transcript: Transcript) -> None:
        """Pass it on."""
        if self._sink is not None:
            settled = self._budget.settle(transcript, time.monotonic())
            metrics.observe_stages(self._surface, settled.latency_ms)
            self._sink.offer(settled)

    def offer_partial(self, partial: Partial) -> None:
        """Pass it on."""
        if self._sink is not None:
            self._sink.offer_partial(partial)

    def close(self) -> None:
        """Let nothing through any more."""
        self._sink = None


def _check(listener: Listener) -> None:
    """Raise EngineError where something said has come to nothing."""
    if listener.failed:
        raise EngineError(f"the engine failed on {listener.failed} segments; see the log of edge-asr")


async def _answer(waiting: deque[tuple[int, Samples, Future[Recognition]]], labels: Labels) -> Transcript:
    """Wait for the first of them, and take it out."""
    index, samples, recognition = waiting[0]
    answer = asyncio.wrap_future(recognition)
    await asyncio.wait([answer])  # not awaited itself: where everything stops it is cancelled, and nobody here was
    waiting.popleft()
    if answer.cancelled():
        raise NotReadyError("the server stops; ask again")
    transcript = transcript_at(index, samples, answer.result(), labels)
    metrics.observe_stages(labels.source, transcript.latency_ms)
    return transcript
