"""A microphone as a source that never gives up: watched, opened again after every loss, muted by closing it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from edge_asr.audio import portaudio
from edge_asr.audio.devices import DEFAULT
from edge_asr.audio.messages import Report, Sound
from edge_asr.audio.recorder import Recorder
from edge_asr.audio.timeline import Timeline, lost_chunk
from edge_asr.errors import AudioError
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE, Chunk

log = logging.getLogger(__name__)

TICK_S = 0.25
STALL_S = 1.0
"""An open stream that gives nothing for so long has stalled."""
FIRST_SOUND_S = 4.0
"""The same before its first sound, which some sound servers take two seconds for."""
ANSWER_S = 8.0
"""After so long without a word the process that looks for the device hangs."""
PACE_S = 5.0
MIN_PACE = 0.8
"""A stream that gives less than this share of its rate over PACE_S has stalled."""
STEADY_S = 10.0
"""After so long of sound a loss is news again, and the first new attempt comes at once."""
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 1.5
"""A recorder that was lost is replaced after at most so long, and at least half of it; doubled from time to time."""
BACKLOG_S = 60.0
"""Sound kept for a listener that is held up: 4 MB. Beyond it the oldest is dropped and counted."""
OPENING = "it is being opened"
ENDED = "the process that records has ended"


@dataclass(frozen=True, slots=True)
class MicrophoneHealth:
    """How a microphone is, and what has happened to it since the start."""

    state: str
    """capturing; waiting (for the device); muted; stalled (open, but gives nothing); failed (for good)."""
    why: str
    """In one line; empty where all is well."""
    ticked_at: float
    """Monotonic seconds when the supervisor was last at work, whatever the state."""
    device: str
    """PortAudio's name of the device; empty while none is open."""
    rate: int
    """Samples per second it is recorded at; 0 while none is open."""
    gaps: int
    lost_s: float
    """Seconds missing in the gaps that have ended."""
    overruns: int
    """Times that the device lost sound because it was not read in time."""
    dropped_chunks: int
    """Chunks dropped because the listener did not take them in time."""
    clipped_share: float
    """Share of samples at full scale in the last 10 s."""
    silent_s: float
    """Seconds of digital silence until now."""
    drift_ppm: float | None
    """How much slow its clock is, in millionths; None until it has been followed for minutes."""


class MicrophoneSource:
    """Records one device; see AudioSource. A child process records, this object watches it.

    `mute`, `unmute`, `close` and `health` are for the event loop's thread.
    """

    def __init__(
        self,
        device: str = DEFAULT,
        channel: int | None = None,
        rate: int | None = None,
        name: str | None = None,
        on_change: Callable[[], None] = lambda: None,
        backlog_s: float = BACKLOG_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`device`: as `devices.choose` takes it. `channel` counts from 0; None: the mean of all.

        `rate`: what to open the device at; None: 16 kHz, or the native one where it refuses. `on_change` is called
        when state or why of the health have changed.
        """
        self.name = name or f"microphone:{device}"
        self._command = portaudio.command("record", device=device, channel=channel, rate=rate)
        self._timeline = Timeline(channel)
        self._clock = clock
        self._on_change = on_change
        self._limit = round(backlog_s / CHUNK_S)
        self._queue: deque[Chunk] = deque()
        self._dropped = 0
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._recorder: Recorder | None = None
        self._open: Report | None = None
        self._state, self._why = "waiting", OPENING
        self._health_told = (self._state, self._why)
        self._failure: AudioError | None = None
        self._muted = self._closed = False
        self._heard_at = self._ticked_at = clock()
        self._sounding_since: float | None = None
        self._retry_at, self._retry_s = 0.0, FIRST_RETRY_S
        self._told_lost = self._told_back = False

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Yield the sound until closed. Raises AudioError where recording can never work: a library is missing."""
        self._loop = asyncio.get_running_loop()
        expected, lost = 0, False
        try:
            if not self._closed:
                self._tick()
            while not self._closed:
                while self._queue and not self._closed:
                    chunk = self._queue.popleft()
                    if chunk.index > expected and not lost:  # dropped here
                        yield lost_chunk(expected, chunk.captured_at - (chunk.index - expected) / SAMPLE_RATE)
                    expected, lost = chunk.index + CHUNK_SAMPLES, chunk.lost
                    yield chunk
                    await asyncio.sleep(0)  # a minute of sound may wait here, and others are to have their turn
                if self._failure is not None:
                    raise self._failure
                self._news.clear()
                if not self._closed:
                    await self._news.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Close the device and end the iteration."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._end_recorder()
        self._news.set()

    @property
    def health(self) -> MicrophoneHealth:
        """How the microphone is now."""
        levels, stream = self._timeline.levels, self._open
        why = self._why or (levels.complaint if self._state == "capturing" else "")
        return MicrophoneHealth(
            self._state, why, self._ticked_at, stream.device if stream else "", stream.rate if stream else 0,
            self._timeline.gaps, self._timeline.lost_s, self._timeline.overruns, self._dropped,
            levels.clipped_share, levels.silent_s, self._timeline.drift_ppm,
        )  # fmt: skip

    def mute(self) -> None:
        """Close the device; it stays closed until `unmute`."""
        if not self._muted:
            self._muted = True
            self._end_recorder()
            self._queue.clear()  # what was heard before is not to be heard after it
            self._interrupt(counted=False)
            self._change("muted", "")

    def unmute(self) -> None:
        """Open the device again."""
        if self._muted:
            self._muted = False
            self._retry_at = 0.0
            self._change("waiting", OPENING)
            if self._loop is not None and not self._closed:
                self._start_recorder(self._clock())

    def _tick(self) -> None:
        """Look after the recorder, four times a second."""
        assert self._loop is not None
        now = self._clock()
        self._ticked_at = now
        self._timer = self._loop.call_later(TICK_S, self._tick)
        if self._muted or self._failure is not None:
            return
        if self._recorder is None:
            if now >= self._retry_at:
                self._start_recorder(now)
        elif why := self._stalled(now):
            self._lose("stalled", why)
        elif self._sounding_since is not None and now - self._sounding_since >= STEADY_S:
            self._told_lost = self._told_back = False
            self._retry_s = FIRST_RETRY_S

    def _stalled(self, now: float) -> str:
        """Return why the recorder has to be replaced; empty where it works."""
        silent_s = now - self._heard_at
        if self._open is None:
            return "PortAudio hangs while it looks for the device" if silent_s > ANSWER_S else ""
        if silent_s > (FIRST_SOUND_S if self._sounding_since is None else STALL_S):
            return f"no sound for {silent_s:.1f} s"
        return self._pace.complaint

    def _start_recorder(self, now: float) -> None:
        self._heard_at = now
        try:
            self._recorder = Recorder(self._command, self._receive)
        except OSError as error:
            self._lose("waiting", f"the process that records cannot be started ({error.strerror})")

    def _end_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = self._open = self._sounding_since = None

    def _receive(self, message: Sound | Report | None) -> None:
        """Take what the recorder tells; None: it has ended."""
        self._heard_at = self._clock()
        if isinstance(message, Sound):
            self._take(message)
        elif message is None:
            self._lose("waiting", self._why if self._why not in ("", OPENING) else ENDED)
        elif message.state == "open":
            self._open = message
            self._pace = Pace(message.rate)
            self._timeline.begin(message.rate, message.channels)
        elif message.state == "failed":
            self._failure = AudioError(f"{self.name}: {message.why}")
            self._end_recorder()
            self._change("failed", message.why)
            self._news.set()
        else:  # it looks for the device itself
            self._open = self._sounding_since = None
            self._interrupt()
            self._complain(message.why)
            self._change("waiting", message.why)

    def _take(self, sound: Sound) -> None:
        assert self._open is not None
        if self._sounding_since is None:
            self._sounding_since = self._heard_at
            stream = self._open
            self._tell_back("%s: recording %r at %d Hz", self.name, stream.device, stream.rate)
        frames = len(sound.data) // (self._open.channels * portaudio.BYTES_PER_SAMPLE)
        self._pace.add(frames * (1 + sound.dropped), sound.captured_at)
        complained = self._timeline.levels.complaint
        for chunk in self._timeline.push(sound):
            self._put(chunk)
        complaint = self._timeline.levels.complaint
        if complaint and complaint != complained and not complained:
            log.warning("%s: %s", self.name, complaint)
        if self._state != "capturing" or complaint != complained:
            self._change("capturing", "")

    def _lose(self, state: str, why: str) -> None:
        """Give up the recorder, and start another one soon."""
        self._end_recorder()
        self._interrupt()
        self._retry_at = self._clock() + self._retry_s * random.uniform(0.5, 1)
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
        self._complain(why)
        self._change(state, why)

    def _interrupt(self, counted: bool = True) -> None:
        for chunk in self._timeline.interrupt(counted):
            self._put(chunk)

    def _put(self, chunk: Chunk) -> None:
        if len(self._queue) >= self._limit:
            self._queue.popleft()
            if not self._dropped:
                log.warning("%s: sound is dropped, for it is not taken in time", self.name)
            self._dropped += 1
        self._queue.append(chunk)
        self._news.set()

    def _complain(self, why: str) -> None:
        log.log(logging.DEBUG if self._told_lost else logging.WARNING, "%s: no sound: %s", self.name, why)
        self._told_lost = True

    def _tell_back(self, message: str, *arguments: object) -> None:
        log.log(logging.DEBUG if self._told_back else logging.INFO, message, *arguments)
        self._told_back = True

    def _change(self, state: str, why: str) -> None:
        before = self._health_told
        self._state, self._why = state, why
        self._health_told = (state, self.health.why)
        if self._health_told != before:
            self._on_change()


class Pace:
    """Watches whether a stream gives as much sound as its rate promises, by its own times."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._since: float | None = None
        self._frames = 0
        self.complaint = ""
        """What is wrong; empty where nothing is."""

    def add(self, frames: int, captured_at: float) -> None:
        """Take note of a block that was captured from `captured_at` on."""
        if self._since is None:
            self._since = captured_at
        passed = captured_at - self._since
        if passed >= PACE_S:
            share = self._frames / (passed * self._rate)
            self.complaint = f"only {share:.0%} of its {self._rate} samples per second" if share < MIN_PACE else ""
            self._since, self._frames = captured_at, 0
        self._frames += frames
