"""Steps of the wall clock in the middle of a sentence: durations, order and latencies know nothing of them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

import pytest
from listening import BUDGET, ByLevel, Collector, Fed

from edge_asr.answers import Gates, Labels
from edge_asr.pipeline import Listener, Pace
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.speech.segmenter import Rules, Segmenter
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Chunk, Recognition, Samples, Token, Transcript

HOUR_S = 3600.0
PATTERN = "...xxxxxx...........xxxxxxxxxx...........xxxx........"
IN_THE_SECOND = 24
"""A chunk of the pattern, in the middle of its second sentence."""
SLACK_S = 60.0
"""Far more than a test takes, far less than the clock is stepped by."""


class Lengths:
    """A recogniser that answers with the number of chunks it was given."""

    def recognize(self, samples: Samples) -> Recognition:
        text = str(len(samples) // CHUNK_SAMPLES)
        return Recognition(text, (Token(text, 0, 100, 1.0),), 1.0)

    def close(self) -> None:
        pass


class Stepped(Fed):
    """A source that comes in now, and in the middle of which something happens."""

    def __init__(self, pattern: str, happens: Callable[[], None]) -> None:
        super().__init__(pattern)
        self._happens = happens
        self._began_at = time.monotonic() - len(pattern) * CHUNK_SAMPLES / SAMPLE_RATE

    async def chunks(self) -> AsyncIterator[Chunk]:
        number = 0
        async for chunk in super().chunks():
            if number == IN_THE_SECOND:
                self._happens()
            number += 1
            yield Chunk(chunk.samples, chunk.index, self._began_at + chunk.captured_at)


async def heard(happens: Callable[[], None]) -> list[Transcript]:
    """Return the transcripts of the pattern, settled as the publisher does."""
    scheduler, sink = Scheduler(Lengths), Collector()
    await scheduler.start()
    rules = Rules(endpoint=5, pre_roll=2, min_speech=2)
    labels = Labels("test", "fed", "lengths")
    source = Stepped(PATTERN, happens)
    listener = Listener(source, ByLevel(), Segmenter(rules), scheduler, [sink], labels, Gates(), Pace(), BUDGET)
    await listener.run()
    await scheduler.close()
    return [BUDGET.settle(transcript, time.monotonic()) for transcript in sink.transcripts]


@pytest.mark.parametrize("step_s", [5 * HOUR_S, -5 * HOUR_S])
async def test_a_step_of_the_wall_clock_changes_starts_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    wall = time.time

    def step() -> None:
        monkeypatch.setattr(time, "time", lambda: wall() + step_s)

    before = await heard(lambda: None)
    stepped_at = wall()
    after = await heard(step)
    assert len(before) == 3
    for plain, stepped in zip(before, after, strict=True):
        assert stepped.text == plain.text
        assert (stepped.offset_s, stepped.duration_s) == (plain.offset_s, plain.duration_s)
        assert 0 <= stepped.latency_ms["endpoint"] <= stepped.latency_ms["total"] < SLACK_S * 1e3
        assert 0 <= stepped.latency_ms["response"] < SLACK_S * 1e3
    starts = [transcript.started_at for transcript in after]
    assert starts == pytest.approx([stepped_at, stepped_at + step_s, stepped_at + step_s], abs=SLACK_S)
