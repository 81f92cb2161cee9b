"""More to do than can be done, through real listeners and the real scheduler: all is answered for, in order."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listening import BUDGET, Collector
from prometheus_client import REGISTRY

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench is not part of the package

from bench.overload import RULES, ByNumber, Metered, Observed, Phase, Setting, observe
from bench.overload_report import figures, is_late, most_waiting_of_one_s
from edge_asr.answers import PENDING_LIMIT, Answers, Gates, Labels, Pending
from edge_asr.attention import Attention
from edge_asr.audio.stdin import StdinSource
from edge_asr.pipeline import Listener, Pace
from edge_asr.recognizer.scheduler import Priority, Scheduler
from edge_asr.speech.segmenter import Segmenter
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Marks, Recognition, Samples, Segment, Token, new_segment_id

PATIENCE_S = 300

PHASES = (Phase(0.4, 6), Phase(3, 16), Phase(0, 50), Phase(0.3, 30))
"""It is quiet after the overload for longer than what waits then takes."""
ROOMY = Setting(PHASES, streams=11, cost=0.4, max_backlog_s=120, response_ms=300, speed=20, together=True)
NARROW = Setting(PHASES, streams=11, cost=0.4, max_backlog_s=6, response_ms=300, speed=20, together=True)


@pytest.fixture(scope="module")
def roomy() -> Observed:
    """More than can be done, and room for all of it to wait."""
    return asyncio.run(asyncio.wait_for(observe(ROOMY), PATIENCE_S))


@pytest.fixture(scope="module")
def narrow() -> Observed:
    """More than can be done, and too little room for it to wait."""
    return asyncio.run(asyncio.wait_for(observe(NARROW), PATIENCE_S))


@pytest.fixture(params=["roomy", "narrow"])
def overloaded(request: pytest.FixtureRequest) -> Observed:
    observed: Observed = request.getfixturevalue(request.param)
    return observed


def test_every_sentence_is_answered_for_once_and_in_order(overloaded: Observed) -> None:
    found = figures(overloaded)
    assert found["sentences"] == found["segments"] == found["transcripts"] + found["lost"] == len(overloaded.arrivals)
    assert (found["silent"], found["doubled"], found["wrong_text"], found["out_of_order"]) == (0, 0, 0, 0)


def test_what_is_late_says_so(overloaded: Observed) -> None:
    for arrival in (one for one in overloaded.arrivals if not one.transcript.lost):
        late = arrival.transcript.latency_ms["response"] > overloaded.setting.response_ms
        assert is_late(arrival) is late
    assert any(map(is_late, overloaded.arrivals))


def test_what_can_wait_is_not_lost(roomy: Observed) -> None:
    found = figures(roomy)
    assert found["lost"] == found["counted_lost"] == roomy.enforced["lost"] == 0


def test_what_cannot_wait_is_lost_in_its_place_and_counted(narrow: Observed) -> None:
    lost = [arrival.transcript for arrival in narrow.arrivals if arrival.transcript.lost]
    assert len(lost) == narrow.counted_lost == narrow.enforced["lost"] > 0
    assert {(transcript.text, transcript.enforced[-1]) for transcript in lost} == {("", "lost")}
    assert len(lost) < len(narrow.arrivals)


def test_no_more_waits_than_may(narrow: Observed) -> None:
    longest = max(sentence.segment_s for voice in narrow.plan for sentence in voice)
    running = longest  # what runs is not given up
    assert most_waiting_of_one_s(narrow.arrivals) <= narrow.setting.max_backlog_s + longest + running


def test_the_state_names_the_queue_and_is_well_again(overloaded: Observed) -> None:
    told = [arrival.why for arrival in overloaded.arrivals]
    assert {why.split(": ")[-1] for why in told if why} == {"queue"}
    assert told[0] == told[-1] == ""


def test_what_can_be_done_without_is_not_done_while_others_wait(overloaded: Observed) -> None:
    """Else the waste would be on top of what is too much already."""
    assert overloaded.enforced["not_at_pause"] > 0
    assert overloaded.enforced["partial_skipped"] > 0
    skipped = [one.transcript for one in overloaded.arrivals if "not_at_pause" in one.transcript.enforced]
    assert skipped
    assert not any(transcript.decoded_at_pause for transcript in skipped)


def test_no_partial_comes_after_its_transcript(overloaded: Observed) -> None:
    assert overloaded.partials > 0
    assert overloaded.partials_too_late == 0


class Held:
    """A recogniser whose runs end when the test says so; it notes the level of each."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.go = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def recognize(self, samples: Samples) -> Recognition:
        self.begun.append(round(float(samples[0])))
        self.entered.release()
        self.go.acquire()
        return Recognition(str(self.begun[-1]), (Token("x", None, None, 1.0),), 1.0)

    def close(self) -> None:
        pass


@asynccontextmanager
async def held() -> AsyncIterator[tuple[Held, Scheduler]]:
    recognizer = Held()
    scheduler = Scheduler(lambda: recognizer)
    await scheduler.start()
    try:
        yield recognizer, scheduler
    finally:
        recognizer.go.release(1_000)
        await scheduler.close()


def sound(level: float, seconds: float = 1.0) -> Samples:
    return np.full(int(seconds * SAMPLE_RATE), level, np.float32)


async def test_what_was_asked_first_is_not_overtaken_by_what_comes_later() -> None:
    async with held() as (recognizer, scheduler):
        answers = [scheduler.submit(sound(0), deadline=0.0)]
        await asyncio.to_thread(recognizer.entered.acquire)
        for k in range(1, 8):
            answers.append(scheduler.submit(sound(k), Priority.MICROPHONE, deadline=100.0 + k / 10))
        recognizer.go.release(1_000)
        await asyncio.gather(*map(asyncio.wrap_future, answers))
    assert recognizer.begun == list(range(8))


async def test_what_is_given_up_while_it_is_the_next_to_run_is_lost_or_recognised_but_never_both() -> None:
    """Giving up races with the inference thread."""
    sink, before = Collector(), REGISTRY.get_sample_value("edge_asr_enforced_total", {"step": "lost"}) or 0.0
    async with held() as (recognizer, scheduler):
        recognizer.go.release(1_000)
        answers = Answers([sink], Labels("test", "fed", "none"), Gates(), Attention(), backlog_s=1.5)
        running = asyncio.create_task(answers.run())
        for k in range(300):
            await answers.put(pending(scheduler.submit(sound(k)), k))
            if k % 7 == 0:
                await asyncio.sleep(0)
        await answers.end()
        await asyncio.wait_for(running, PATIENCE_S)
    assert [transcript.offset_s for transcript in sink.transcripts] == list(range(300))
    lost = [round(transcript.offset_s or 0) for transcript in sink.transcripts if transcript.lost]
    assert sorted(lost + recognizer.begun) == list(range(300))
    assert len(lost) == answers.lost
    assert answers.lost == (REGISTRY.get_sample_value("edge_asr_enforced_total", {"step": "lost"}) or 0.0) - before


def pending(recognition: Future[Recognition], second: int = 0) -> Pending:
    """Return a segment of one second that waits for its recognition."""
    segment = Segment(new_segment_id(), 0, sound(0), second * SAMPLE_RATE, 1.0, 1_000.0, Marks(1.0, 2.0))
    return Pending(segment, recognition, False, 0.0, False)


async def test_what_still_waits_when_everything_stops_is_published_as_lost_in_its_place() -> None:
    sink = Collector()
    async with held() as (recognizer, scheduler):
        answers = Answers([sink], Labels("test", "fed", "none"), Gates(), Attention(), backlog_s=120)
        running = asyncio.create_task(answers.run())
        waiting = [scheduler.submit(sound(k)) for k in range(5)]
        for k, recognition in enumerate(waiting):
            await answers.put(pending(recognition, k))
        recognizer.go.release()  # of the first, the second runs
        while not sink.transcripts:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert [recognition.cancelled() for recognition in waiting[2:]] == [True] * 3
    assert [(transcript.offset_s, transcript.lost) for transcript in sink.transcripts] == [
        (0, False), (1, True), (2, True), (3, True), (4, True),
    ]  # fmt: skip
    assert answers.lost == 4


async def test_a_pipe_that_is_faster_than_the_engine_waits_and_loses_nothing() -> None:
    sentences = 40
    reading, writing = os.pipe()
    sink, recognizer = Waits(segments()), Metered(0.01)
    scheduler = Scheduler(lambda: recognizer)
    await scheduler.start()
    writer = threading.Thread(target=write, args=(writing, spoken(sentences)), daemon=True)
    writer.start()
    with os.fdopen(reading, "rb", buffering=0) as stream:
        listener = Listener(
            StdinSource(stream), ByNumber(), Segmenter(RULES), scheduler, [sink], Labels("test", "stdin", "metered"),
            Gates(), Pace(True, None, 300), BUDGET,
        )  # fmt: skip
        await asyncio.wait_for(listener.run(), PATIENCE_S)
    await scheduler.close()
    writer.join(PATIENCE_S)
    assert len(sink.transcripts) == sentences
    assert not any(transcript.lost for transcript in sink.transcripts)
    places = [transcript.offset_s or 0.0 for transcript in sink.transcripts]
    assert places == sorted(places)
    assert max(sink.waiting) <= PENDING_LIMIT + 1


class Waits(Collector):
    """A sink that notes how many segments wait whenever one is answered."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self._before = before
        self.waiting: list[int] = []

    def offer(self, transcript: Any) -> None:
        super().offer(transcript)
        self.waiting.append(segments() - self._before - len(self.transcripts) + 1)


def segments() -> int:
    return round(REGISTRY.get_sample_value("edge_asr_segments_total") or 0)


def spoken(sentences: int) -> bytes:
    """Return so many sentences as 16-bit PCM, each 0.6 s and then 0.5 s of silence."""
    loud, quiet = np.full(CHUNK_SAMPLES, 3_000, "<i2"), np.zeros(CHUNK_SAMPLES, "<i2")
    return np.concatenate([loud] * 20 + [quiet] * 16).tobytes() * sentences


def write(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(data)
