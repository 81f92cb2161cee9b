"""More speech than the recogniser can keep up with, through the real listeners and scheduler: what becomes of it.

Voices speak sentences at the pace of speech. The recogniser takes exactly so long for a second of sound, hence the
load is known: what has to be decoded at least once, of what it can decode. What comes on top of that, decodes at pauses
that are none and partials, is for the budget to shed.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import dataclasses
import gc
import json
import logging
import math
import os
import random
import statistics
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from prometheus_client import Counter

from bench.overload_report import METERED, figures
from edge_asr import metrics
from edge_asr.answers import Gates, Labels
from edge_asr.budget import LatencyBudget, LateWatch
from edge_asr.config import EngineConfig
from edge_asr.errors import InterruptedRunError
from edge_asr.ladder import load_ladder
from edge_asr.pipeline import Listener, Pace
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.recognizer.scheduler import Recognizer, Scheduler
from edge_asr.speech.segmenter import POST_ROLL, Rules, Segmenter
from edge_asr.types import (
    CHUNK_S,
    CHUNK_SAMPLES,
    SAMPLE_RATE,
    Chunk,
    Marks,
    Partial,
    Recognition,
    Samples,
    Token,
    Transcript,
)

RULES = Rules()
AROUND = RULES.pre_roll + POST_ROLL
"""Chunks of a segment that are none of its sentence."""
LENGTHS = (25, 85)
"""Chunks of a sentence: 0.8 to 2.7 s."""
PAUSES = (POST_ROLL + 2, RULES.endpoint - 2)
"""Chunks of silence in the middle of every other sentence: long enough to be decoded at, too short to end it."""
SPOKEN = 0.75
"""Share of the time that a voice can speak at most."""
SCALE = 2.0**-20
"""A sentence's number times this is in the first sample of its chunks."""
PARTIAL_INTERVAL_MS = 300
ONE_THREAD = EngineConfig(target="onnx-int8", threads=1)
SAMPLED_S = 0.25
POLL_S = 0.002
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Phase:
    """So much load for so long."""

    load: float
    """Seconds of work for each second that passes."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Sentence:
    """What a voice says, and when; all counts are chunks."""

    number: int
    start: int
    length: int
    pause: int
    """Of silence in its middle."""

    @property
    def segment_s(self) -> float:
        """Seconds of the segment that it is to become."""
        return (self.length + AROUND) * CHUNK_S

    def sounds_at(self, chunk: int) -> bool:
        """Tell whether that chunk is speech."""
        within, middle = chunk - self.start, self.length // 2
        return 0 <= within < self.length and not middle <= within < middle + self.pause


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is made of."""

    phases: tuple[Phase, ...]
    streams: int
    cost: float
    """Seconds that the recogniser takes for a second of sound."""
    max_backlog_s: float
    response_ms: float = 300.0
    speed: float = 1.0
    """So much faster than time everything goes, but for the budget."""
    seed: int = 0
    together: bool = False
    """The recogniser is held back where the voices are, so that a busy machine makes all slower and no load less."""

    def starts_at(self, phase: int) -> float:
        """Return the second of the run at which a phase starts, or the last one ends."""
        return sum(one.seconds for one in self.phases[:phase]) / self.speed


@dataclass(frozen=True, slots=True)
class Arrival:
    """A transcript, settled as it is on its way to the broker."""

    at: float
    """Monotonic seconds."""
    transcript: Transcript
    why: str
    """What `state` says of late ones from now on."""


@dataclass(frozen=True, slots=True)
class Sample:
    """How things are at a moment."""

    at: float
    rss_bytes: int
    backlog_ms: float
    """What the scheduler takes for its backlog."""


@dataclass(slots=True)
class Observed:
    """What has come of a run."""

    setting: Setting
    plan: list[list[Sentence]]
    began_at: float = 0.0
    """Monotonic seconds."""
    arrivals: list[Arrival] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    partials: int = 0
    partials_too_late: int = 0
    """Those that came after the transcript of their id."""
    enforced: dict[str, int] = field(default_factory=dict)
    segments: int = 0
    gated: int = 0
    """Those that nothing was recognised in."""
    counted_lost: int = 0
    """What the listeners say that they have lost."""
    runs: list[tuple[float, float]] = field(default_factory=list)
    """Of each run of the recogniser the moment of its end (monotonic seconds), and the seconds that it took."""


def plan(setting: Setting) -> list[list[Sentence]]:
    """Return what each voice says: it saves up the time that is its share, and speaks once it has enough.

    Raises ValueError where the voices would have to speak without a pause.
    """
    if max(phase.load for phase in setting.phases) > SPOKEN * setting.streams * setting.cost:
        raise ValueError(f"{setting.streams} streams cannot make so much load; take more, or a slower recogniser")
    return [_speech_of(setting, random.Random(setting.seed + stream)) for stream in range(setting.streams)]


def _speech_of(setting: Setting, chance: random.Random) -> list[Sentence]:
    sentences: list[Sentence] = []
    chunk, following = 0, _sentence(1, chance)
    saved_s, free_at = chance.random() * following.segment_s, AROUND
    for phase in setting.phases:
        for _ in range(round(phase.seconds / CHUNK_S)):
            saved_s += phase.load / (setting.streams * setting.cost) * CHUNK_S
            if saved_s >= following.segment_s and chunk >= free_at:
                sentences.append(Sentence(following.number, chunk, following.length, following.pause))
                saved_s -= following.segment_s
                free_at = chunk + following.length + RULES.endpoint + AROUND
                following = _sentence(following.number + 1, chance)
            chunk += 1
    return sentences


def _sentence(number: int, chance: random.Random) -> Sentence:
    return Sentence(number, 0, chance.randint(*LENGTHS), chance.randint(*PAUSES) if chance.random() < 0.5 else 0)


class Beat:
    """How far the voices are, and when they were there."""

    def __init__(self, chunk_s: float) -> None:
        """`chunk_s`: seconds that a chunk takes here."""
        self._chunk_s = chunk_s
        self._reached: list[float] = []
        self._voices = 0

    def enter(self) -> None:
        """A voice begins."""
        self._voices += 1

    def leave(self) -> None:
        """A voice has come to its end."""
        self._voices -= 1

    def reach(self, chunk: int) -> None:
        """A voice is at that chunk."""
        if chunk == len(self._reached):
            self._reached.append(time.monotonic())

    @property
    def seconds(self) -> float:
        """How long the voices have spoken; for ever once they have ended."""
        return len(self._reached) * self._chunk_s if self._voices else math.inf

    def at(self, moment: float) -> float:
        """Return where the voices were at a moment, in seconds as if they had kept pace."""
        return bisect_right(self._reached, moment) * self._chunk_s


class Voice:
    """A source that speaks its sentences at the pace of time."""

    def __init__(self, name: str, sentences: Sequence[Sentence], setting: Setting, began_at: float, beat: Beat) -> None:
        self.name = name
        self._beat = beat
        self._sentences = sentences
        said = max((sentence.start + sentence.length for sentence in sentences), default=0)
        self._chunks = max(said + RULES.endpoint + 1, round(sum(phase.seconds for phase in setting.phases) / CHUNK_S))
        self._chunk_s = CHUNK_S / setting.speed
        self._began_at = began_at
        self._noise = np.random.default_rng(0).normal(0, 1, CHUNK_SAMPLES).astype(np.float32)

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yield what is said, then silence in which the last sentence ends."""
        self._beat.enter()
        coming = iter(self._sentences)
        current = next(coming, None)
        for k in range(self._chunks):
            if current is not None and k >= current.start + current.length:
                current = next(coming, None)
            captured_at = self._began_at + k * self._chunk_s
            await asyncio.sleep(max(0.0, captured_at + self._chunk_s - time.monotonic()))
            self._beat.reach(k)
            sounds = current is not None and current.sounds_at(k)
            samples = self._noise * np.float32(0.1 if sounds else 1e-4)
            samples[0] = current.number * SCALE if sounds and current is not None else 0.0
            yield Chunk(samples, k * CHUNK_SAMPLES, captured_at)
        self._beat.leave()

    def close(self) -> None:
        """Nothing is to be released."""


class ByNumber:
    """A detector that takes for speech what has a number."""

    def __call__(self, chunk: Chunk) -> float:
        """Return 1 for speech, else 0."""
        return float(chunk.samples[0] > 0)

    def reset(self) -> None:
        """It remembers nothing."""


class Metered:
    """A recogniser that takes exactly so long for a second of sound, and answers with the number of the sentence."""

    def __init__(self, cost: float, beat: Beat | None = None) -> None:
        """`cost`: seconds for each second of sound, at least, of the clock's and of the voices' time."""
        self._cost = cost
        self._beat = beat
        self._interrupted = threading.Event()
        self._owed_s = self._ahead_s = 0.0  # what the last run took too long, by the clock and by the voices
        self.runs: list[tuple[float, float]] = []
        """Of each run the moment of its end (monotonic seconds), and the seconds that it took."""

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` samples, from the first of a chunk on. Raises InterruptedRunError."""
        began_at, cost_s = time.monotonic(), len(samples) / SAMPLE_RATE * self._cost
        beat_due = (0.0 if self._beat is None else self._beat.seconds) + max(0.0, cost_s - self._ahead_s)
        due_at = began_at + max(0.0, cost_s - self._owed_s)
        interrupted = self._interrupted.wait(max(0.0, due_at - time.monotonic())) or self._hold_back(beat_due)
        ended_at = time.monotonic()
        self._owed_s = max(0.0, ended_at - due_at)  # a sleep takes longer than it should, and more so on a busy machine
        self.runs.append((ended_at, ended_at - began_at))
        if interrupted:
            raise InterruptedRunError("it gives way")
        text = str(round(float(samples[::CHUNK_SAMPLES].max()) / SCALE))
        return Recognition(text, (Token(text, None, None, 1.0),), 1.0, engine=METERED)

    def _hold_back(self, due: float) -> bool:
        """Wait for the voices to be where they would be by now; True: it was interrupted."""
        while self._beat is not None and 0 < self._beat.seconds < due:
            if self._interrupted.wait(POLL_S):
                return True
        spoken = 0.0 if self._beat is None else self._beat.seconds
        self._ahead_s = spoken - due if due < spoken < math.inf else 0.0
        return False

    def interrupt(self) -> None:
        """End what runs."""
        self._interrupted.set()

    def resume(self) -> None:
        """Let runs be completed again."""
        self._interrupted.clear()

    def close(self) -> None:
        """Nothing is to be released."""


class Inbox:
    """A sink that settles transcripts and watches over late ones, as the daemon does."""

    def __init__(self, observed: Observed, beat: Beat) -> None:
        self._observed = observed
        self._beat = beat
        self._budget = LatencyBudget(observed.setting.response_ms)
        self._watch = LateWatch(0.1)
        self._done: set[str] = set()

    def offer(self, transcript: Transcript) -> None:
        """Take a transcript."""
        now = time.monotonic()
        settled = self._settle(transcript, now)
        if not settled.lost:
            self._watch.add(settled.latency_ms, settled.within_budget is False)
        self._done.add(settled.id)
        self._observed.arrivals.append(Arrival(now, settled, self._watch.why))

    def _settle(self, transcript: Transcript, now: float) -> Transcript:
        marks, at = transcript.marks, self._beat.at
        if not self._observed.setting.together or marks is None:
            return self._budget.settle(transcript, now)
        # By the time of the voices: a busy machine makes nothing late.
        spoken = Marks(at(marks.speech_ended_at), at(marks.segment_ended_at))
        settled = self._budget.settle(dataclasses.replace(transcript, marks=spoken), at(now))
        return dataclasses.replace(settled, marks=marks)

    def offer_partial(self, partial: Partial) -> None:
        """Count a partial."""
        self._observed.partials += 1
        self._observed.partials_too_late += partial.id in self._done


async def observe(setting: Setting, model: Recognizer | None = None) -> Observed:
    """Let the voices speak, until everything that they have said is answered for. Raises ValueError as `plan` does.

    `model`: a recogniser that takes about `cost`; None: one that takes exactly that.
    """
    observed = Observed(setting, plan(setting))
    beat = Beat(CHUNK_S / setting.speed)
    recognizer = model or Metered(setting.cost / setting.speed, beat if setting.together else None)
    async with recognising(recognizer) as scheduler:
        before, segments, gated = _enforced(), _value(metrics.SEGMENTS), _value(metrics.GATED.labels("empty"))
        gc.collect()
        observed.samples.append(_sample(scheduler))
        observed.began_at = time.monotonic()
        inbox = Inbox(observed, beat)
        listeners = [_listener(k, observed, scheduler, inbox, beat) for k in range(setting.streams)]
        sampling = asyncio.create_task(_keep_sampling(scheduler, observed))
        try:
            await asyncio.gather(*(listener.run() for listener in listeners))
        finally:
            sampling.cancel()
        gc.collect()
        _give_back()
        observed.samples.append(_sample(scheduler))
        observed.runs = recognizer.runs if isinstance(recognizer, Metered) else []
        observed.enforced = {step: count - before[step] for step, count in _enforced().items()}
        observed.segments = _value(metrics.SEGMENTS) - segments
        observed.gated = _value(metrics.GATED.labels("empty")) - gated
        observed.counted_lost = sum(listener.lost for listener in listeners)
    return observed


@asynccontextmanager
async def recognising(recognizer: Recognizer) -> AsyncIterator[Scheduler]:
    """Give the real scheduler with that recogniser."""
    scheduler = Scheduler(lambda: recognizer)
    await scheduler.start()
    try:
        yield scheduler
    finally:
        await scheduler.close()


def _listener(stream: int, observed: Observed, scheduler: Scheduler, inbox: Inbox, beat: Beat) -> Listener:
    setting, name = observed.setting, f"voice {stream}"
    return Listener(
        Voice(name, observed.plan[stream], setting, observed.began_at, beat),
        ByNumber(),
        Segmenter(RULES),
        scheduler,
        [inbox],
        Labels("bench", name, "metered"),
        Gates(),
        Pace(True, setting.max_backlog_s, PARTIAL_INTERVAL_MS),
        LatencyBudget(setting.response_ms),
    )


async def _keep_sampling(scheduler: Scheduler, observed: Observed) -> None:
    while True:
        await asyncio.sleep(SAMPLED_S / observed.setting.speed)
        observed.samples.append(_sample(scheduler))


def _sample(scheduler: Scheduler) -> Sample:
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return Sample(time.monotonic(), resident * PAGE, scheduler.backlog_ms())


def _give_back() -> None:
    """Let the C library return what it keeps for later, where it can: what is left is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _enforced() -> dict[str, int]:
    return {step: _value(metrics.ENFORCED.labels(step)) for step in metrics.STEPS}


def _value(counter: Counter) -> int:
    (family,) = counter.collect()
    return round(family.samples[0].value)


def cost_of(recognizer: Recognizer) -> float:
    """Return the seconds that a recogniser takes for a second of sound, in segments as they come here."""
    mean = np.random.default_rng(0).normal(0, 0.1, round((sum(LENGTHS) / 2 + AROUND) * CHUNK_SAMPLES))
    samples, taken = mean.astype(np.float32), []
    for _ in range(20):
        started = time.monotonic()
        recognizer.recognize(samples)
        taken.append(time.monotonic() - started)
    return statistics.median(taken) / (len(samples) / SAMPLE_RATE)


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Run it and print the figures, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=float, default=1.15, help="of what the recogniser can do (default: 1.15)")
    parser.add_argument("--seconds", type=float, default=60, help="how long that lasts (default: 60)")
    parser.add_argument("--before", type=float, default=20, help="seconds at half its load before (default: 20)")
    parser.add_argument("--after", type=float, default=30, help="seconds afterwards (default: 30)")
    parser.add_argument("--load-after", type=float, default=0.5, help="the load in those (default: 0.5)")
    parser.add_argument("--streams", type=int, help="voices (default: as many as it takes)")
    parser.add_argument("--cost", type=float, default=0.06, help="seconds for a second of sound (default: 0.06)")
    parser.add_argument("--max-backlog-s", type=float, default=120)
    parser.add_argument("--model", type=Path, help="a bundle to recognise with, int8 on one thread, instead of --cost")
    given = parser.parse_args(arguments)
    phases = (Phase(0.5, given.before), Phase(given.load, given.seconds), Phase(given.load_after, given.after))
    with tempfile.TemporaryDirectory() as folder:
        model = load_ladder(read_bundle(given.model), ONE_THREAD, Path(folder)) if given.model else None
        cost = cost_of(model) if model else given.cost
        streams = given.streams or math.ceil(max(phase.load for phase in phases) / SPOKEN / cost)
        observed = asyncio.run(observe(Setting(phases, streams, cost, given.max_backlog_s), model))
    show(json.dumps(figures(observed)))


if __name__ == "__main__":
    logging.getLogger("edge_asr").setLevel(logging.ERROR)  # what is lost is counted
    main()
