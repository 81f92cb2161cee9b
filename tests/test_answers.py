"""Segments that have ended: each gets its transcript in order, or is published as lost; none goes without a word."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager

import numpy as np
import pytest
from listening import Collector, Exactly
from prometheus_client import REGISTRY

from edge_asr.answers import PENDING_LIMIT, Answers, Gates, Labels, Pending
from edge_asr.attention import PHRASE, Attention
from edge_asr.errors import EngineError
from edge_asr.types import SAMPLE_RATE, Marks, Recognition, Segment, Token, Transcript, new_segment_id

PATIENCE_S = 20


def pending(seconds: float = 1.0, shown: bool = False) -> Pending:
    """Return a segment that waits for its recognition."""
    samples = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
    segment = Segment(new_segment_id(), 0, samples, 0, 1.0, 1_000.0, Marks(1.0, 2.0))
    return Pending(segment, Future(), False, 0.0, shown)


def recognize(waiting: Pending, text: str) -> None:
    """Let the engine answer."""
    assert waiting.recognition.set_running_or_notify_cancel()
    waiting.recognition.set_result(Recognition(text, (Token(text, None, None, 1.0),), 1.0))


def lost() -> float:
    return REGISTRY.get_sample_value("edge_asr_enforced_total", {"step": "lost"}) or 0.0


@asynccontextmanager
async def answering(backlog_s: float | None = 10.0) -> AsyncIterator[tuple[Answers, Collector]]:
    """Give a running queue and what it offers; when the block ends, everything has been answered."""
    sink = Collector()
    answers = Answers([sink], Labels("test", "fed", "none"), Gates(), Attention(), backlog_s)
    running = asyncio.create_task(answers.run())
    try:
        yield answers, sink
        await answers.end()
        await asyncio.wait_for(running, PATIENCE_S)
    finally:
        running.cancel()


async def test_transcripts_come_in_the_order_of_their_segments_whatever_is_recognised_first() -> None:
    segments = [pending() for _ in range(3)]
    async with answering() as (answers, sink):
        for segment in segments:
            await answers.put(segment)
        for segment, text in reversed(list(zip(segments, "甲乙丙", strict=True))):
            recognize(segment, text)
    assert [transcript.text for transcript in sink.transcripts] == ["甲", "乙", "丙"]
    assert [transcript.id for transcript in sink.transcripts] == [segment.segment.id for segment in segments]


async def test_what_fails_when_nobody_waits_for_it_any_more_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    sink, waiting = Collector(), pending()
    answers = Answers([sink], Labels("test", "fed", "none"), Gates(), Attention(), 10.0)
    running = asyncio.create_task(answers.run())
    await answers.put(waiting)
    assert waiting.recognition.set_running_or_notify_cancel()
    for _ in range(5):  # until it waits for the engine
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    waiting.recognition.set_exception(EngineError("on purpose"))
    for _ in range(3):
        await asyncio.sleep(0)
    del waiting, running  # asyncio complains when it is gone
    gc.collect()
    assert [transcript.lost for transcript in sink.transcripts] == [True]
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def test_another_model_s_thresholds_hold_and_each_transcript_names_the_model_that_heard_it() -> None:
    segments = [pending() for _ in range(3)]
    async with answering() as (answers, sink):
        for segment in segments:
            await answers.put(segment)
        for segment, model, confidence in zip(segments, ("old", "new", ""), (0.9, 0.4, 0.9), strict=True):
            token = Token("好", None, None, confidence)
            segment.recognition.set_running_or_notify_cancel()
            segment.recognition.set_result(Recognition("好", (token,), confidence, model=model))
        answers.use("new", Gates(min_confidence=0.5))
    assert [transcript.model for transcript in sink.transcripts] == ["old", "new"]
    assert [transcript.id for transcript in sink.transcripts] == [segments[0].segment.id, segments[2].segment.id]


async def test_too_much_that_waits_loses_the_oldest_and_says_so_in_its_place() -> None:
    before, segments = lost(), [pending(4.0) for _ in range(4)]
    async with answering(backlog_s=10.0) as (answers, sink):
        for segment in segments:
            await answers.put(segment)
        assert [segment.recognition.cancelled() for segment in segments] == [True, True, False, False]
        for segment in segments[2:]:
            recognize(segment, "好")
    found = sink.transcripts
    assert [transcript.lost for transcript in found] == [True, True, False, False]
    assert [transcript.text for transcript in found] == ["", "", "好", "好"]
    assert found[0].enforced == ("lost",)
    assert found[0].to_json()["lost"] is True
    assert "lost" not in found[2].to_json()
    assert found[0].duration_s == 4.0
    assert [transcript.id for transcript in found] == [segment.segment.id for segment in segments]
    assert answers.lost == lost() - before == 2


async def test_what_the_engine_is_at_work_on_is_not_given_up() -> None:
    segments = [pending(4.0) for _ in range(4)]
    assert segments[0].recognition.set_running_or_notify_cancel()
    async with answering(backlog_s=10.0) as (answers, sink):
        for segment in segments:
            await answers.put(segment)
        assert [segment.recognition.cancelled() for segment in segments] == [False, True, True, False]
        segments[0].recognition.set_result(Recognition("早", (Token("早", None, None, 1.0),), 1.0))
        recognize(segments[3], "晚")
    assert [transcript.text for transcript in sink.transcripts] == ["早", "", "", "晚"]


async def test_what_is_done_but_has_not_been_published_yet_does_not_count_as_waiting() -> None:
    segments = [pending(4.0) for _ in range(5)]
    async with answering(backlog_s=10.0) as (answers, sink):
        for segment in segments[:4]:
            await answers.put(segment)
            if segment is not segments[0]:
                recognize(segment, "好")
        await answers.put(segments[4])
        recognize(segments[0], "早")
        recognize(segments[4], "晚")
    assert answers.lost == 0
    assert [transcript.text for transcript in sink.transcripts] == ["早", "好", "好", "好", "晚"]


async def test_a_source_that_can_wait_is_made_to_and_loses_nothing() -> None:
    segments = [pending(100.0) for _ in range(PENDING_LIMIT + 1)]
    async with answering(backlog_s=None) as (answers, sink):
        for segment in segments[:-1]:
            await answers.put(segment)
        last = asyncio.create_task(answers.put(segments[-1]))
        await asyncio.sleep(0)
        assert not last.done()
        recognize(segments[0], "一")
        await asyncio.wait_for(last, PATIENCE_S)
        for segment in segments[1:]:
            recognize(segment, "二")
    assert [transcript.text for transcript in sink.transcripts] == ["一"] + ["二"] * PENDING_LIMIT
    assert answers.lost == 0


@pytest.mark.parametrize("error", [EngineError("on purpose"), ValueError("a bug")], ids=["engine", "bug"])
async def test_an_engine_that_fails_on_one_costs_no_other(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    first, second = pending(shown=True), pending()
    async with answering() as (answers, sink):
        await answers.put(first)
        await answers.put(second)
        first.recognition.set_exception(error)
        recognize(second, "好")
    assert [transcript.text for transcript in sink.transcripts] == ["好"]
    assert answers.failed == 1
    assert [(partial.id, partial.end) for partial in sink.partials] == [(first.segment.id, True)]
    assert ("ValueError" in caplog.text) == isinstance(error, ValueError), "a bug shows where it is"


async def test_a_sink_that_fails_on_one_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Collector):
        def offer(self, transcript: Transcript) -> None:
            if transcript.text == "坏":
                raise ValueError("a bug")
            super().offer(transcript)

    sink = Failing()
    answers = Answers([sink], Labels("test", "fed", "none"), Gates(), Attention(), 10.0)
    running = asyncio.create_task(answers.run())
    for text in ("好", "坏", "又"):
        segment = pending()
        recognize(segment, text)
        await answers.put(segment)
    await answers.end()
    await asyncio.wait_for(running, PATIENCE_S)
    assert [transcript.text for transcript in sink.transcripts] == ["好", "又"]
    assert answers.failed == 1
    assert "a bug" in caplog.text


async def test_what_was_shown_and_is_lost_is_taken_back() -> None:
    async with answering(backlog_s=10.0) as (answers, sink):
        shown = pending(8.0, shown=True)
        await answers.put(shown)
        last = pending(8.0)
        await answers.put(last)
        recognize(last, "好")
    assert [transcript.lost for transcript in sink.transcripts] == [True, False]
    assert [(partial.id, partial.end) for partial in sink.partials] == [(shown.segment.id, True)]


async def test_what_may_not_have_been_for_us_is_counted_but_not_published_when_it_is_lost() -> None:
    before, sink = lost(), Collector()
    answers = Answers([sink], Labels("test", "fed", "none"), Gates(), Attention(PHRASE, Exactly("小爱")), 10.0)
    running = asyncio.create_task(answers.run())
    for _ in range(2):
        await answers.put(segment := pending(8.0))
    recognize(segment, "好")
    await answers.end()
    await asyncio.wait_for(running, PATIENCE_S)
    assert sink.transcripts == []
    assert answers.lost == lost() - before == 1


async def test_a_second_loss_is_not_a_second_warning(caplog: pytest.LogCaptureFixture) -> None:
    async with answering(backlog_s=10.0) as (answers, _):
        for _ in range(4):
            await answers.put(pending(20.0))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_recognitions_of_another_thread_are_awaited(run_on_thread: Callable[[Callable[[], None]], None]) -> None:
    waiting = pending()
    async with answering() as (answers, sink):
        await answers.put(waiting)
        run_on_thread(lambda: recognize(waiting, "好"))
    assert [transcript.text for transcript in sink.transcripts] == ["好"]


@pytest.fixture
def run_on_thread() -> Callable[[Callable[[], None]], None]:
    return lambda work: threading.Thread(target=work).start()
