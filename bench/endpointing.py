"""Early cuts against latency, offline: sentences with pauses inside, heard as the appliance does, without a clock.

The detector, the segmenter, the decode at the pause and the content of its text are the appliance's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.paused import Tape
from edge_asr.speech.completeness import Completeness, ContentEndpoint, completeness
from edge_asr.speech.segmenter import Ended, Paused, Resumed, Rules, Segmenter, Split, Started
from edge_asr.speech.vad import SpeechDetector
from edge_asr.types import CHUNK_SAMPLES, Chunk, Recognition, Samples

CHUNK_MS = 32.0
PUBLISH_MS = 2.0
"""From a finished decode to the publish call."""
NEVER = 40
"""Chunks that no pause inside a sentence lasts, and the silence after it does."""
RESUMED_CHUNKS = 4
"""So long after a pause an end still comes from it: the detector needs a moment to hear that speech goes on."""


class Recognizer(Protocol):
    """Whatever decodes a segment."""

    def recognize(self, samples: Samples) -> Recognition:
        """Return what is said in `[n]` samples."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A sentence and how it ended."""

    tape: Tape
    cut: tuple[bool, ...]
    """Which of its pauses ended a segment."""
    elsewhere: int
    """Segments that ended early outside of those pauses."""
    endpoint_ms: float | None
    """From the end of the sentence to that of its segment; None: its end was lost."""
    total_ms: float | None
    """The same until it is published."""
    at_pause: bool
    """The decode at the pause is the final one."""
    segment: tuple[int, int]
    """The last one, in chunks; empty where it was lost."""
    text: str
    """Of that segment."""


@dataclass(frozen=True, slots=True)
class _End:
    """A segment that has ended."""

    after: int
    """Chunks heard by then."""
    wait_ms: float
    """For its decode."""
    at_pause: bool
    segment: tuple[int, int]
    text: str


class Listening:
    """A tape with what the detector says of it, and its decodes, kept: any number of rules are tried on them."""

    def __init__(self, tape: Tape, detector: SpeechDetector, recognizer: Recognizer) -> None:
        self.tape = tape
        self._recognizer = recognizer
        self._decodes: dict[tuple[int, int], tuple[Recognition, float]] = {}
        detector.reset()
        self._chunks = len(tape.samples) // CHUNK_SAMPLES
        self.probabilities = [detector(Chunk(self._sound(k, k + 1), k, 0.0)) for k in range(self._chunks)]

    def _sound(self, start: int, end: int) -> Samples:
        return self.tape.samples[start * CHUNK_SAMPLES : end * CHUNK_SAMPLES]

    def decode(self, start: int, end: int) -> tuple[Recognition, float]:
        """Return what is recognised in chunks `start` to `end`, and the milliseconds it took."""
        if (start, end) not in self._decodes:
            began = time.perf_counter()
            recognition = self._recognizer.recognize(self._sound(start, end))
            self._decodes[start, end] = recognition, (time.perf_counter() - began) * 1e3
        return self._decodes[start, end]

    def hear(self, rules: Rules, content: ContentEndpoint | None) -> Heard:
        """Cut the tape into segments as `pipeline.Listener` does: a decode counts from the chunk after its end."""
        segmenter = Segmenter(rules)
        ends: list[_End] = []
        early: tuple[int, int] | None = None
        ready = 0.0
        for number, probability in enumerate(self.probabilities):
            now = (number + 1) * CHUNK_MS
            if content is not None and early is not None and ready <= now:
                heard, _ = self.decode(*early)
                least = min((token.confidence for token in heard.tokens), default=1.0)
                segmenter.endpoint_after(content.chunks(heard.text, least))
            for event in segmenter.step(probability):
                match event:
                    case Paused(start, end):
                        early = (start, end)
                        ready = now + self.decode(start, end)[1]
                    case Resumed() | Started():
                        early = None
                    case Ended(start, end) | Split(start, end):
                        at_pause = early == (start, end)
                        heard, cost = self.decode(start, end)
                        wait_ms = max(0.0, ready - now) if at_pause else cost
                        ends.append(_End(number + 1, wait_ms, at_pause, (start, end), heard.text))
                        early = None
        return self._judge(ends)

    def _judge(self, ends: Sequence[_End]) -> Heard:
        cut = [False] * len(self.tape.pauses)
        elsewhere = 0
        for ended in ends:
            sample = ended.after * CHUNK_SAMPLES
            if sample >= self.tape.end:
                endpoint_ms = (sample - self.tape.end) / 16
                total_ms = endpoint_ms + ended.wait_ms + PUBLISH_MS
                whole = (endpoint_ms, total_ms, ended.at_pause, ended.segment, ended.text)
                return Heard(self.tape, tuple(cut), elsewhere, *whole)
            late = RESUMED_CHUNKS * CHUNK_SAMPLES
            inside = [n for n, pause in enumerate(self.tape.pauses) if pause.start < sample <= pause.end + late]
            if inside:
                cut[inside[-1]] = True
            else:
                elsewhere += 1
        return Heard(self.tape, tuple(cut), elsewhere, None, None, False, (0, 0), "")

    def judgements(self, content: ContentEndpoint) -> Iterator[tuple[bool, Completeness]]:
        """Yield for each pause that was put in, and for the end (true), what its decode says."""
        segmenter = Segmenter(Rules(endpoint=NEVER))
        last: tuple[int, int] | None = None
        for number, probability in enumerate(self.probabilities):
            for event in segmenter.step(probability):
                if not isinstance(event, Paused):
                    continue
                last = (event.start, event.end)
                sample = (number + 1) * CHUNK_SAMPLES
                if any(pause.start < sample <= pause.end + CHUNK_SAMPLES for pause in self.tape.pauses):
                    yield False, completeness(self.decode(*last)[0].text, content.phrases)
        if last is not None:
            yield True, completeness(self.decode(*last)[0].text, content.phrases)

    def fresh(self, heard: Heard) -> bool:
        """Tell whether a decode of the last segment, for itself, has the same text."""
        return self._recognizer.recognize(self._sound(*heard.segment)).text == heard.text
