"""A listener on a source that the test feeds: when it decodes, and what stopping does with a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
from bundled import chunks_of

from edge_asr.errors import EngineError
from edge_asr.pipeline import Gates, Labels, Listener
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.speech.segmenter import POST_ROLL, Rules, Segmenter
from edge_asr.types import CHUNK_SAMPLES, Chunk, Recognition, Samples, Token, Transcript

SPEECH, SILENCE = "x", "."


class Fed:
    """A source whose chunks come when the test says so; a chunk's samples tell whether it is speech."""

    name = "fed"

    def __init__(self, pattern: str, then_wait: bool = False) -> None:
        samples = np.repeat([1.0 if mark == SPEECH else 0.0 for mark in pattern], CHUNK_SAMPLES)
        self._chunks = list(chunks_of(samples.astype(np.float32)))
        self._then_wait = then_wait
        self.taken = asyncio.Event()
        self._closed = asyncio.Event()

    async def chunks(self) -> AsyncIterator[Chunk]:
        for chunk in self._chunks:
            yield chunk
        self.taken.set()
        if self._then_wait:
            await self._closed.wait()

    def close(self) -> None:
        self._closed.set()


class Counting:
    """A recogniser that answers with the number of chunks it was given, and fails where it is told to."""

    def __init__(self, failing: Iterator[bool]) -> None:
        self._failing = failing

    def recognize(self, samples: Samples) -> Recognition:
        if next(self._failing, False):
            raise EngineError("the engine failed on purpose")
        text = str(len(samples) // CHUNK_SAMPLES)
        return Recognition(text, (Token(text, None, None, 1.0),), 1.0)

    def close(self) -> None:
        pass


class CountingScheduler(Scheduler):
    """The real scheduler, which also notes what it was asked for."""

    def __init__(self, failing: Sequence[bool] = ()) -> None:
        super().__init__(lambda: Counting(iter(failing)))
        self.asked: list[int] = []

    def submit(self, samples: Samples) -> Future[Recognition]:
        self.asked.append(len(samples) // CHUNK_SAMPLES)
        return super().submit(samples)


class Collector:
    def __init__(self) -> None:
        self.transcripts: list[Transcript] = []

    def offer(self, transcript: Transcript) -> None:
        self.transcripts.append(transcript)


async def hear(source: Fed, scheduler: CountingScheduler, live: bool = True, stop: bool = False) -> list[Transcript]:
    """Return what a listener offers of a source, which is stopped once its chunks are taken."""
    sink = Collector()
    rules = Rules(endpoint=5, pre_roll=2, min_speech=2)
    await scheduler.start()
    labels = Labels("test", "fed", "counting")
    listener = Listener(
        source, lambda chunk: float(chunk.samples[0]), Segmenter(rules), scheduler, [sink], labels, Gates(), live
    )
    running = asyncio.create_task(listener.run())
    if stop:
        await source.taken.wait()
        listener.stop()
    await running
    await scheduler.close()
    return sink.transcripts


async def test_a_live_segment_is_decoded_once_at_its_pause() -> None:
    scheduler = CountingScheduler()
    (transcript,) = await hear(Fed("...xxxxxx......"), scheduler)
    assert scheduler.asked == [2 + 6 + POST_ROLL]
    assert transcript.text == str(2 + 6 + POST_ROLL)
    assert transcript.decoded_at_pause


async def test_speech_that_resumes_is_decoded_again_with_all_of_it() -> None:
    scheduler = CountingScheduler()
    (transcript,) = await hear(Fed("...xxxxxx...xxxx......"), scheduler)
    assert scheduler.asked == [11, 2 + 13 + POST_ROLL]
    assert transcript.text == "18"


async def test_a_file_as_fast_as_it_goes_is_decoded_only_at_the_end_of_a_segment() -> None:
    scheduler = CountingScheduler()
    (transcript,) = await hear(Fed("...xxxxxx...xxxx......"), scheduler, live=False)
    assert scheduler.asked == [18]
    assert not transcript.decoded_at_pause
    assert transcript.started_at is None
    assert transcript.marks is None, "no latency: nobody waited for it"


async def test_stopping_in_the_middle_of_a_sentence_publishes_no_half_of_it() -> None:
    sentences = "...xxxxxx......" + "...xxxxxx"
    heard = await hear(Fed(sentences, then_wait=True), CountingScheduler(), stop=True)
    assert [transcript.text for transcript in heard] == ["11"]


async def test_stopping_in_the_pause_after_a_sentence_publishes_it() -> None:
    heard = await hear(Fed("...xxxxxx...", then_wait=True), CountingScheduler(), stop=True)
    assert [transcript.text for transcript in heard] == ["11"]


async def test_the_end_of_a_source_ends_its_sentence() -> None:
    heard = await hear(Fed("...xxxxxx"), CountingScheduler())
    assert [transcript.text for transcript in heard] == ["8"]


async def test_a_sentence_that_the_engine_fails_on_does_not_end_the_listening() -> None:
    heard = await hear(Fed("...xxxx......xxxxx......"), CountingScheduler(failing=[True, False]))
    assert [transcript.text for transcript in heard] == [str(2 + 5 + POST_ROLL)]
