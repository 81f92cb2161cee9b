"""A listener on a source that the test feeds: when it decodes, and what stopping does with a sentence."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import pairwise

import numpy as np
import pytest
from listening import BUDGET, GAP, ByLevel, Collector, Exactly, Fed
from prometheus_client import REGISTRY

from edge_asr.answers import PENDING_LIMIT, Gates, Labels
from edge_asr.attention import PHRASE, Attention
from edge_asr.audio.microphone import MicrophoneSource
from edge_asr.errors import EngineError
from edge_asr.pipeline import Listener, Pace
from edge_asr.recognizer.scheduler import Priority, Scheduler
from edge_asr.speech.completeness import ContentEndpoint
from edge_asr.speech.segmenter import POST_ROLL, Ended, Event, Rules, Segmenter
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, Recognition, Samples, Token, Transcript


class Counting:
    """A recogniser that answers with the number of chunks it was given, and fails where it is told to."""

    failing: Iterator[bool] = iter(())

    def recognize(self, samples: Samples) -> Recognition:
        if next(self.failing, False):
            raise EngineError("the engine failed on purpose")
        text = str(len(samples) // CHUNK_SAMPLES)
        return Recognition(text, (Token(text, None, None, 1.0),), 1.0)

    def close(self) -> None:
        pass


class CountingScheduler(Scheduler):
    """The real scheduler, which also notes what it was asked for."""

    def __init__(self, failing: Sequence[bool] = ()) -> None:
        self._recognizer = Counting()
        super().__init__(lambda: self._recognizer)
        self._failing = failing
        self.asked: list[int] = []

    async def start(self) -> None:
        await super().start()
        self._recognizer.failing = iter(self._failing)  # not when the engine is tried

    def submit(
        self, samples: Samples, priority: Priority = Priority.MICROPHONE, deadline: float = math.inf
    ) -> Future[Recognition]:
        self.asked.append(len(samples) // CHUNK_SAMPLES)
        return super().submit(samples, priority, deadline)


async def hear(
    source: Fed,
    scheduler: CountingScheduler,
    live: bool = True,
    stop: bool = False,
    detector: ByLevel | None = None,
    endpoint: int = 5,
) -> list[Transcript]:
    """Return what a listener offers of a source, which is stopped once its chunks are taken."""
    sink = Collector()
    rules = Rules(endpoint=endpoint, pre_roll=2, min_speech=2)
    await scheduler.start()
    labels = Labels("test", "fed", "counting")
    pace = Pace(live)
    listener = Listener(
        source, detector or ByLevel(), Segmenter(rules), scheduler, [sink], labels, Gates(), pace, BUDGET
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
    heard = await hear(Fed("...xxxxxx........", then_wait=True), CountingScheduler(), stop=True, endpoint=12)
    assert [transcript.text for transcript in heard] == ["11"]


async def test_stopping_in_a_pause_that_may_be_one_between_words_publishes_nothing() -> None:
    assert await hear(Fed("...xxxxxx.......", then_wait=True), CountingScheduler(), stop=True, endpoint=12) == []


async def test_the_end_of_a_source_ends_its_sentence() -> None:
    heard = await hear(Fed("...xxxxxx"), CountingScheduler())
    assert [transcript.text for transcript in heard] == ["8"]


async def test_a_sentence_that_the_engine_fails_on_does_not_end_the_listening() -> None:
    heard = await hear(Fed("...xxxx......xxxxx......"), CountingScheduler(failing=[True, False]))
    assert [transcript.text for transcript in heard] == [str(2 + 5 + POST_ROLL)]


def cut_short() -> float:
    return REGISTRY.get_sample_value("edge_asr_cut_short_total") or 0.0


async def test_a_sentence_that_has_paused_before_a_gap_is_whole_and_was_decoded_at_its_pause() -> None:
    scheduler, before = CountingScheduler(), cut_short()
    (transcript,) = await hear(Fed("...xxxxxx........!..."), scheduler, endpoint=12)
    assert (transcript.text, transcript.decoded_at_pause) == ("11", True)
    assert scheduler.asked == [11]
    assert cut_short() == before


@pytest.mark.parametrize("silence", ["", ".", "..", "...", "......."])
async def test_a_sentence_that_a_gap_cuts_off_is_dropped_and_counted(silence: str) -> None:
    scheduler, before = CountingScheduler(), cut_short()
    assert await hear(Fed(f"...xxxxxx{silence}!........"), scheduler, endpoint=12) == []
    assert cut_short() == before + 1


async def test_a_sentence_that_goes_on_after_a_pause_is_dropped_where_a_gap_cuts_it_off() -> None:
    assert await hear(Fed("...xxxxxx...xx!......"), CountingScheduler()) == []


async def test_what_is_said_after_a_gap_is_heard_without_what_was_before() -> None:
    detector = ByLevel()
    heard = await hear(Fed("...xxxx!xxxxxx......xx!....xxxx......"), CountingScheduler(), detector=detector)
    assert [transcript.text for transcript in heard] == [str(6 + POST_ROLL), str(2 + 4 + POST_ROLL)]
    assert detector.resets == [7, 7 + 12 + 2]


async def test_a_gap_in_silence_changes_nothing_but_the_times() -> None:
    before = cut_short()
    heard = await hear(Fed("...xxxxxx......" + "!" + "...xxxxxx......"), CountingScheduler())
    assert [transcript.text for transcript in heard] == ["11", "11"]
    starts = [1, 15 + GAP + 1]  # the pre-roll is two chunks
    assert [transcript.offset_s for transcript in heard] == [pytest.approx(start * CHUNK_S) for start in starts]
    marks = [transcript.marks for transcript in heard]
    ends = [(start + 2 + 6) * CHUNK_S for start in starts]
    assert [mark.speech_ended_at for mark in marks if mark] == [pytest.approx(end, abs=0.011) for end in ends]
    began = [transcript.started_at or 0.0 for transcript in heard]
    assert began[1] - began[0] == pytest.approx((15 + GAP) * CHUNK_S, abs=0.05)
    assert cut_short() == before


async def test_stopping_after_a_gap_publishes_what_had_paused_before() -> None:
    heard = await hear(Fed("...xxxxxx........!..xxx", then_wait=True), CountingScheduler(), stop=True, endpoint=12)
    assert [transcript.text for transcript in heard] == ["11"]


async def test_mute_lets_the_scheduler_forget_what_was_said() -> None:
    scheduler = CountingScheduler()
    await scheduler.start()
    labels = Labels("test", "fed", "counting")
    listener = Listener(
        Fed(""), ByLevel(), Segmenter(Rules()), scheduler, [], labels, Gates(), Pace(), BUDGET
    )  # fmt: skip
    await asyncio.wrap_future(scheduler.submit(np.zeros(CHUNK_SAMPLES, np.float32)))
    listener.mute(True)
    assert scheduler._recent is None
    await scheduler.close()


KNOWN, OPEN_END, OTHER = "打开客厅灯。", "把空调调到", "好的"
KNOWN_PHRASES = frozenset({"打 开 客 厅 灯"})


class Told(Scheduler):
    """A scheduler that answers with one given text after another (None: it fails), each after some more chunks."""

    def __init__(self, texts: Sequence[str | None], late: int = 0) -> None:
        super().__init__(Counting)
        self._texts = iter(texts)
        self._late = late
        self._told: list[tuple[Future[Recognition], str | None, int]] = []
        self.asked: list[int] = []

    def submit(
        self, samples: Samples, priority: Priority = Priority.MICROPHONE, deadline: float = math.inf
    ) -> Future[Recognition]:
        self.asked.append(len(samples) // CHUNK_SAMPLES)
        future: Future[Recognition] = Future()
        self._told.append((future, next(self._texts), self._late))
        self.tick(0)
        return future

    def tick(self, chunks: int = 1) -> None:
        """So much time has passed."""
        waiting, self._told = self._told, []
        for future, text, late in waiting:
            if late > chunks:
                self._told.append((future, text, late - chunks))
            elif not future.set_running_or_notify_cancel():
                continue
            elif text is None:
                future.set_exception(EngineError("the engine failed on purpose"))
            else:
                future.set_result(Recognition(text, tuple(Token(one, None, None, 1.0) for one in text), 1.0))


class Timing(Segmenter):
    """The real segmenter, which also notes after how many chunks of silence a segment ended."""

    def __init__(self, endpoint: int, scheduler: Told) -> None:
        super().__init__(Rules(endpoint=endpoint, pre_roll=2, min_speech=2))
        self._scheduler = scheduler
        self._silence = 0
        self.ended: list[int] = []

    def step(self, probability: float) -> Iterator[Event]:
        self._silence = 0 if probability else self._silence + 1
        self._scheduler.tick()
        for event in super().step(probability):
            if isinstance(event, Ended):
                self.ended.append(self._silence)
            yield event


async def endings(
    pattern: str,
    texts: Sequence[str | None],
    preset: int = 12,
    late: int = 0,
    live: bool = True,
    phrases: frozenset[str] | None = KNOWN_PHRASES,
    attention: Attention | None = None,
) -> tuple[list[int], list[Transcript], list[int]]:
    """Return the silence that ended each segment, the transcripts, and what was decoded; phrases None: switched off."""
    scheduler, sink = Told(texts, late), Collector()
    segmenter = Timing(preset, scheduler)
    endpoint = None if phrases is None else ContentEndpoint(preset, phrases)
    labels = Labels("test", "fed", "told")
    detector = ByLevel()
    await Listener(
        Fed(pattern), detector, segmenter, scheduler, [sink], labels, Gates(), Pace(live), BUDGET,
        attention, endpoint,
    ).run()  # fmt: skip
    return segmenter.ended, sink.transcripts, scheduler.asked


SENTENCE, SILENT = "...xxxxxx", "." * 40


@pytest.mark.parametrize(("preset", "chunks"), [(5, 5), (12, 8), (25, 8)])
async def test_a_known_phrase_ends_after_five_to_eight_chunks(preset: int, chunks: int) -> None:
    ended, (transcript,), asked = await endings(SENTENCE + SILENT, [KNOWN], preset)
    assert ended == [chunks]
    assert asked == [2 + 6 + POST_ROLL]
    assert transcript.text == KNOWN
    assert transcript.decoded_at_pause
    assert transcript.duration_s == pytest.approx(11 * CHUNK_S)


@pytest.mark.parametrize("preset", [5, 12, 25])
async def test_what_ends_open_is_waited_for_a_second_and_is_then_what_was_decoded_at_the_pause(preset: int) -> None:
    ended, (transcript,), asked = await endings(SENTENCE + SILENT, [OPEN_END], preset)
    assert ended == [31]
    assert asked == [2 + 6 + POST_ROLL]
    assert transcript.text == OPEN_END
    assert transcript.decoded_at_pause
    assert transcript.duration_s == pytest.approx(11 * CHUNK_S)


@pytest.mark.parametrize("pause", [5, 12, 30])
async def test_what_ends_open_is_joined_with_the_rest(pause: int) -> None:
    texts = [OPEN_END, f"{OPEN_END}二十六度"]
    ended, (transcript,), asked = await endings(SENTENCE + "." * pause + "xxxx" + SILENT, texts, preset=5)
    assert transcript.text == texts[1]
    assert ended == [5], "the preset again"
    assert asked == [11, 2 + 6 + pause + 4 + POST_ROLL]


@pytest.mark.parametrize("text", [OTHER, "", None], ids=["other", "nothing", "failed"])
@pytest.mark.parametrize("preset", [5, 12, 25])
async def test_a_text_that_tells_nothing_leaves_the_pause_to_the_preset(preset: int, text: str | None) -> None:
    ended, _, _ = await endings(SENTENCE + SILENT, [text], preset)
    assert ended == [preset]


@pytest.mark.parametrize(("said", "ends_after"), [(KNOWN, 8), (OPEN_END, 31), ("", 12)])
async def test_a_pause_goes_by_what_is_said_behind_the_wake_phrase(said: str, ends_after: int) -> None:
    attention = Attention(PHRASE, Exactly("小爱"))
    ended, _, _ = await endings(SENTENCE + SILENT, [f"小爱{said}"], attention=attention)
    assert ended == [ends_after]


async def test_a_pause_of_what_is_for_somebody_else_is_left_to_the_preset() -> None:
    ended, transcripts, _ = await endings(SENTENCE + SILENT, [KNOWN], attention=Attention(PHRASE, Exactly("小爱")))
    assert (ended, transcripts) == ([12], [])


async def test_each_segment_goes_by_its_own_text() -> None:
    ended, transcripts, _ = await endings((SENTENCE + SILENT) * 4, [OPEN_END, OTHER, KNOWN, OTHER])
    assert ended == [31, 12, 8, 12]
    assert [transcript.text for transcript in transcripts] == [OPEN_END, OTHER, KNOWN, OTHER]


@pytest.mark.parametrize("text", [KNOWN, OPEN_END, OTHER])
async def test_switched_off_nothing_but_the_preset_counts(text: str) -> None:
    ended, (transcript,), _ = await endings(SENTENCE + SILENT, [text], phrases=None)
    assert ended == [12]
    assert transcript.text == text


@pytest.mark.parametrize(("late", "chunks"), [(1, 8), (4, 8), (6, 10), (7, 11), (20, 12)])
async def test_a_known_phrase_that_is_decoded_late_ends_with_the_next_chunk_but_never_after_the_preset(
    late: int, chunks: int
) -> None:
    ended, (transcript,), asked = await endings(SENTENCE + SILENT, [KNOWN], late=late)
    assert ended == [chunks]
    assert asked == [11]
    assert transcript.text == KNOWN


async def test_what_is_decoded_after_the_preset_changes_neither_this_segment_nor_the_next() -> None:
    ended, transcripts, _ = await endings(SENTENCE + "." * 14 + SENTENCE + SILENT, [OPEN_END, OTHER], late=15)
    assert ended == [12, 12]
    assert len(transcripts) == 2


@pytest.mark.parametrize(("text", "published"), [(OPEN_END, []), ("音量调到百分之三十", []), (OTHER, [OTHER])])
async def test_before_a_gap_what_ends_open_is_not_published_however_long_its_pause(
    text: str, published: list[str]
) -> None:
    _, transcripts, _ = await endings(SENTENCE + "." * 11 + "!" + SILENT, [text])
    assert [transcript.text for transcript in transcripts] == published


async def test_a_decode_that_is_overtaken_by_speech_sets_no_later_pause() -> None:
    ended, _, _ = await endings(SENTENCE + "...." + "xxxx" + SILENT, [KNOWN, OTHER], late=3)
    assert ended == [12]


async def test_the_text_sets_no_pause_of_a_file_as_fast_as_it_goes() -> None:
    ended, _, _ = await endings(SENTENCE + SILENT, [OPEN_END], live=False)
    assert ended == [12]


class Held:
    """A recogniser that waits until it is let go."""

    engine = "held"

    def __init__(self, go: threading.Event) -> None:
        self._go = go

    def recognize(self, samples: Samples) -> Recognition:
        self._go.wait()
        return Recognition("x", (Token("x", None, None, 1.0),), 1.0)

    def close(self) -> None:
        pass


async def test_a_microphone_whose_listener_waits_for_the_engine_drops_the_oldest_and_says_so(
    plug: Callable[..., None],
) -> None:
    plug({"name": "USB", "max_input_channels": 1, "default_samplerate": 16_000.0}, value=16_384)
    source, sink, go, counted = MicrophoneSource("usb", backlog_s=0.5), Collector(), threading.Event(), cut_short()
    scheduler = Scheduler(lambda: Held(go))
    await scheduler.start()
    rules = Rules(pre_roll=0, min_speech=1, max_length=8)
    detector, labels = ByLevel(), Labels("test", "usb", "held")
    listener = Listener(source, detector, Segmenter(rules), scheduler, [sink], labels, Gates(), Pace(), BUDGET)
    running = asyncio.create_task(listener.run())
    try:
        await happens(lambda: source.health.dropped_chunks > 20)
        assert sink.transcripts == []
        go.set()
        await happens(lambda: bool(detector.resets))
        heard = len(sink.transcripts)
        await happens(lambda: len(sink.transcripts) > heard + PENDING_LIMIT + 1)
    finally:
        go.set()
        listener.stop()
        await running
        await scheduler.close()
    offsets = [round((transcript.offset_s or 0.0) / CHUNK_S) for transcript in sink.transcripts]
    steps = [after - before for before, after in pairwise(offsets)]
    assert min(steps) > 0, "in order"
    assert max(steps) > 20 > 8 >= min(steps), "the times tell what is missing"
    assert sum(step > 8 for step in steps) == len(detector.resets) == cut_short() - counted
    assert source.health.gaps == 0, "the device is not to blame"


async def happens(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds."""

    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(look(), 60)
