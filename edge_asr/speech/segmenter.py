"""Where segments start and end: a pure state machine over speech probabilities, without audio, clock or model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

POST_ROLL = 3
"""Chunks kept after the last speech chunk; a segment pauses once they have passed."""
ENDPOINTS = {"aggressive": 5, "default": 12, "relaxed": 25}
"""Chunks after the last speech chunk that end a segment, by preset: 160, 384, 800 ms."""
HYSTERESIS = 0.15
"""Speech goes on while the probability stays above the threshold less this."""
SPLIT_WINDOW = 94
"""Chunks (3 s) at the end of a segment that has grown too long, among which the quietest is sought."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the segmenter goes by; all counts are chunks of 32 ms."""

    threshold: float = 0.5
    endpoint: int = ENDPOINTS["default"]
    pre_roll: int = 9
    min_speech: int = 3
    max_length: int = 938


@dataclass(frozen=True, slots=True)
class Started:
    """Speech has started; the segment begins at chunk `start`, pre-roll included."""

    start: int


@dataclass(frozen=True, slots=True)
class Paused:
    """The post-roll has passed without speech: if the pause lasts, the segment will be `start` to `end`."""

    start: int
    end: int
    speech: int
    """Speech chunks in the segment."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """Speech goes on after `Paused`."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The segment is complete: chunks `start` to `end` (exclusive), as in the last `Paused` if there was one."""

    start: int
    end: int
    speech: int


@dataclass(frozen=True, slots=True)
class Split:
    """The segment grew too long and was cut at its quietest chunk; the rest goes on as a new segment from `end`.

    One that has paused when it is too long has ended instead: what would go on holds no speech.
    """

    start: int
    end: int
    speech: int


Event = Started | Paused | Resumed | Ended | Split


class Segmenter:
    """Turns one probability after another into events. Chunks are counted from 0."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._preset, self._limit = rules.endpoint, rules.max_length
        self._count = 0
        self._start: int | None = None
        self._last_speech = -1
        self._paused = False
        self._endpoint = rules.endpoint
        self._floor = 0
        self._run = 0
        self._history: deque[tuple[float, bool]] = deque(maxlen=rules.max_length + 1)

    @property
    def earliest_needed(self) -> int:
        """The first chunk that a later event can still name; what lies before may be forgotten."""
        if self._start is not None:
            return self._start
        return max(self._floor, self._count - self._run - self._rules.pre_roll)

    @property
    def count(self) -> int:
        """Chunks heard so far."""
        return self._count

    @property
    def silence(self) -> int:
        """Chunks since the last one that was speech, while a segment is open."""
        return self._count - 1 - self._last_speech

    @property
    def endpoint(self) -> int:
        """Chunks after the last speech chunk that end a segment, unless its text says otherwise."""
        return self._preset

    @property
    def pause_endpoint(self) -> int:
        """The same of the present pause, by its text where that is known."""
        return self._endpoint

    @property
    def paused(self) -> bool:
        """True while the open segment is silent: between `Paused` and `Resumed` or `Ended`."""
        return self._paused

    def step(self, probability: float) -> Iterator[Event]:
        """Take the next chunk's probability and yield what follows from it."""
        chunk = self._count
        self._count += 1
        level = self._rules.threshold - (HYSTERESIS if self._start is not None or self._run else 0.0)
        speech = probability >= level
        if self._start is None:
            yield from self._wait(chunk, probability, speech)
        else:
            self._history.append((probability, speech))
            yield from self._follow(chunk, speech)

    def endpoint_after(self, chunks: int) -> None:
        """End the segment once its present pause has lasted `chunks`; with the next chunk where it has already.

        Ignored while nothing has paused. The next pause goes by the rules again.
        """
        if self._paused:
            self._endpoint = chunks

    def use_endpoint(self, chunks: int) -> None:
        """Let other pauses end a segment from the next one on: another preset."""
        self._preset = chunks
        if not self._paused:
            self._endpoint = chunks

    def limit(self, chunks: int) -> None:
        """Split segments that grow longer than this, though not above the rules' `max_length`."""
        self._limit = min(chunks, self._rules.max_length)

    def finish(self) -> Iterator[Event]:
        """The source has ended: end the segment that is open, if any."""
        if self._start is not None:
            yield self._end(min(self._last_speech + 1 + POST_ROLL, self._count))

    def cut(self) -> None:
        """Sound is missing before the next chunk: forget the segment that is open, and reach back no further."""
        self._floor = self._count
        self._start, self._run = None, 0
        self._leave_pause()
        self._history.clear()

    def _wait(self, chunk: int, probability: float, speech: bool) -> Iterator[Event]:
        """Start once enough chunks in a row are speech."""
        self._run = self._run + 1 if speech else 0
        if speech:
            self._history.append((probability, True))
        else:
            self._history.clear()
        if self._run >= max(1, self._rules.min_speech):
            first = chunk + 1 - self._run
            self._start = max(self._floor, first - self._rules.pre_roll)
            self._last_speech = chunk
            # The history covers the segment from its start: the pre-roll is no speech.
            self._history.extendleft([(0.0, False)] * (first - self._start))
            yield Started(self._start)

    def _follow(self, chunk: int, speech: bool) -> Iterator[Event]:
        assert self._start is not None
        post_roll = min(POST_ROLL, self._preset)
        if speech:
            self._last_speech = chunk
            if self._paused:
                self._leave_pause()
                yield Resumed()
        else:
            silence = chunk - self._last_speech
            if silence == post_roll:
                self._paused = True
                yield Paused(self._start, chunk + 1, self._speech())
            if silence >= self._endpoint:
                yield self._end(self._last_speech + 1 + post_roll)
                return
        if chunk + 1 - self._start >= self._limit:
            yield self._end(self._last_speech + 1 + post_roll) if self._paused else self._split()

    def _speech(self) -> int:
        return sum(speech for _, speech in self._history)

    def _end(self, end: int) -> Ended:
        assert self._start is not None
        ended = Ended(self._start, end, self._speech())
        self._floor = end
        self._start, self._run = None, 0
        self._leave_pause()
        self._history.clear()
        return ended

    def _leave_pause(self) -> None:
        self._paused, self._endpoint = False, self._preset

    def _split(self) -> Split:
        """Cut after the quietest of the last chunks before the last speech: the one least likely to be speech."""
        assert self._start is not None
        window = min(SPLIT_WINDOW, len(self._history) // 2)
        recent = list(self._history)[-window:]
        silence = self._count - 1 - self._last_speech
        quietest = min(range(window - silence - 1), key=lambda k: recent[k][0])
        kept = recent[quietest + 1 :]
        end = self._count - len(kept)
        split = Split(self._start, end, self._speech() - sum(speech for _, speech in kept))
        self._start = self._floor = end
        self._history.clear()
        self._history.extend(kept)
        return split
