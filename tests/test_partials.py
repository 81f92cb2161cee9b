"""What is published of a sentence while it is spoken, and what is done to keep to the budget, chunk by chunk."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NoReturn

import numpy as np
import pytest
from listening import BUDGET, ByLevel, Clock, Collector, Exactly, Fed
from prometheus_client import REGISTRY

from edge_asr.answers import PENDING_LIMIT, Gates, Labels
from edge_asr.attention import PHRASE, PUSH_TO_TALK, Attention
from edge_asr.errors import EngineError
from edge_asr.pipeline import Listener, Pace
from edge_asr.recognizer.hypotheses import UNSETTLED
from edge_asr.recognizer.scheduler import Priority, Scheduler
from edge_asr.speech.segmenter import POST_ROLL, Rules, Segmenter
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, Chunk, Partial, Recognition, Samples, Token, Transcript

RULES = Rules(endpoint=5, pre_roll=2, min_speech=2)
SPOKEN = "打开客厅的灯然后把空调调到二十六度再把窗帘拉上谢谢"
CHUNKS_A_CHARACTER = 4


def heard_of(samples: Samples) -> Recognition:
    """Return a character for every four chunks."""
    text = SPOKEN[: len(samples) // CHUNK_SAMPLES // CHUNKS_A_CHARACTER]
    return Recognition(text, tuple(Token(character, None, None, 1.0) for character in text), 1.0 if text else None)


def never_loaded() -> NoReturn:
    raise AssertionError


class Prompt(Scheduler):
    """A scheduler that answers at once, or never, and notes what it was asked for."""

    def __init__(
        self,
        hear: Callable[[Samples], Recognition] = heard_of,
        cost_ms_a_second: float = 0.0,
        busy: bool = False,
        backlog_ms: float = 0.0,
        never: Sequence[Priority] = (),
    ) -> None:
        super().__init__(never_loaded)
        self._hear, self._busy, self._backlog_ms, self._never = hear, busy, backlog_ms, never
        if cost_ms_a_second:
            self.costs.observe(1.0, cost_ms_a_second)
        self.asked: list[tuple[Priority, int]] = []
        self.futures: list[Future[Recognition]] = []
        self.warmed = 0

    @property
    def idle(self) -> bool:
        return not self._busy

    def backlog_ms(self, least: Priority = Priority.MICROPHONE) -> float:
        return self._backlog_ms

    def warm(self) -> None:
        self.warmed += 1

    def submit(
        self, samples: Samples, priority: Priority = Priority.MICROPHONE, deadline: float = math.inf
    ) -> Future[Recognition]:
        self.asked.append((priority, len(samples) // CHUNK_SAMPLES))
        future: Future[Recognition] = Future()
        self.futures.append(future)
        if priority in self._never:
            return future
        future.set_running_or_notify_cancel()
        try:
            future.set_result(self._hear(samples))
        except EngineError as error:
            future.set_exception(error)
        return future

    def lengths(self, priority: Priority) -> list[int]:
        """Return how many chunks each request of a kind had."""
        return [chunks for kind, chunks in self.asked if kind == priority]


async def hear(
    pattern: str,
    scheduler: Prompt,
    interval_ms: int = 300,
    attention: Attention | None = None,
    gates: Gates | None = None,
    live: bool = True,
    rules: Rules = RULES,
    strained: Callable[[], object] = lambda: False,
) -> tuple[list[Partial], list[Transcript]]:
    sink = Collector()
    labels = Labels("test", "fed", "prompt")
    pace = Pace(live, 120.0, interval_ms if live else 0)
    listener = Listener(
        Fed(pattern), ByLevel(), Segmenter(rules), scheduler, [sink], labels, gates or Gates(), pace,
        BUDGET, attention, strained=strained,
    )  # fmt: skip
    await listener.run()
    return sink.partials, sink.transcripts


def enforced(step: str) -> float:
    return REGISTRY.get_sample_value("edge_asr_enforced_total", {"step": step}) or 0.0


async def test_a_sentence_grows_every_300_ms_and_its_beginning_becomes_stable() -> None:
    scheduler = Prompt()
    partials, (final,) = await hear("..." + "x" * 40 + "." * 10, scheduler)
    lengths = scheduler.lengths(Priority.PARTIAL)
    assert [after - before for before, after in itertools.pairwise(lengths)] == [10] * (len(lengths) - 1)
    assert len(lengths) == 3
    assert [partial.text for partial in partials] == [SPOKEN[: length // CHUNKS_A_CHARACTER] for length in lengths]
    assert [partial.stable for partial in partials] == [
        "",
        partials[0].text[:-UNSETTLED],
        partials[1].text[:-UNSETTLED],
    ]
    assert {partial.id for partial in partials} == {final.id}
    assert not any(partial.end for partial in partials)
    assert {partial.source for partial in partials} == {"fed"}
    assert final.text.startswith(partials[-1].stable)


async def test_a_strained_device_is_spared_partials_and_nothing_else() -> None:
    scheduler = Prompt()
    strains = iter(["hot", "hot"])
    before = enforced("partial_skipped")
    partials, (final,) = await hear("..." + "x" * 40 + "." * 10, scheduler, strained=lambda: next(strains, ""))
    assert enforced("partial_skipped") - before == 2
    assert len(scheduler.lengths(Priority.PARTIAL)) == len(partials) == 1
    assert final.text == SPOKEN[: scheduler.lengths(Priority.MICROPHONE)[-1] // CHUNKS_A_CHARACTER]


async def test_a_decode_at_a_pause_is_a_partial_when_speech_goes_on() -> None:
    scheduler = Prompt()
    partials, (final,) = await hear("..." + "x" * 8 + "..." + "x" * 4 + "." * 10, scheduler)
    at_pause = 2 + 8 + POST_ROLL
    assert scheduler.asked[0] == (Priority.MICROPHONE, at_pause)
    assert [partial.text for partial in partials] == [SPOKEN[: at_pause // CHUNKS_A_CHARACTER]]
    assert len(final.text) > len(partials[0].text)


async def test_a_pause_that_lasts_shows_its_text_once_as_the_transcript() -> None:
    partials, (final,) = await hear("..." + "x" * 8 + "." * 10, Prompt())
    assert partials == []
    assert final.decoded_at_pause


@pytest.mark.parametrize(
    ("seconds", "priority"), [(4, Priority.MICROPHONE), (40, Priority.NETWORK)], ids=["as a microphone", "a file"]
)
async def test_a_file_that_is_piped_in_does_not_go_before_microphones(seconds: int, priority: Priority) -> None:
    scheduler = Prompt()
    pattern = "." * round(seconds / CHUNK_S) + "x" * 8 + "." * 10
    listener = Listener(
        Fed(pattern, pace=0.0), ByLevel(), Segmenter(RULES), scheduler, [Collector()], Labels("test", "fed", "prompt"),
        Gates(), Pace(True, None), BUDGET,
    )  # fmt: skip
    await listener.run()
    assert scheduler.asked == [(priority, 2 + 8 + POST_ROLL)]


async def test_nothing_is_shown_twice() -> None:
    same = Recognition("打开灯", tuple(Token(character, None, None, 1.0) for character in "打开灯"), 1.0)
    partials, _ = await hear("..." + "x" * 60 + "." * 10, Prompt(lambda samples: same))
    assert [(partial.text, partial.stable) for partial in partials] == [("打开灯", ""), ("打开灯", "打")]


@pytest.mark.parametrize(("interval_ms", "live"), [(0, True), (300, False)], ids=["switched off", "no live source"])
async def test_there_are_no_partials(interval_ms: int, live: bool) -> None:
    scheduler = Prompt()
    partials, (final,) = await hear("..." + "x" * 60 + "." * 10, scheduler, interval_ms, live=live)
    assert partials == []
    assert scheduler.lengths(Priority.PARTIAL) == []
    assert scheduler.asked[-1][0] == (Priority.MICROPHONE if live else Priority.NETWORK)
    assert final.text


async def test_an_engine_that_is_busy_is_asked_for_no_partial_and_that_is_counted() -> None:
    before = enforced("partial_skipped")
    scheduler = Prompt(busy=True)
    partials, (final,) = await hear("..." + "x" * 40 + "." * 10, scheduler)
    assert (partials, scheduler.lengths(Priority.PARTIAL)) == ([], [])
    assert enforced("partial_skipped") == before + 3
    assert final.decoded_at_pause


async def test_partials_take_half_of_the_engines_time_at_most() -> None:
    scheduler = Prompt(cost_ms_a_second=200)
    await hear("..." + "x" * 100 + "." * 10, scheduler)
    lengths = scheduler.lengths(Priority.PARTIAL)
    assert len(lengths) >= 2
    for before, after in itertools.pairwise(lengths):
        assert (after - before) * CHUNK_S * 1e3 >= 2 * scheduler.costs.estimate_ms(after * CHUNK_S) - 1e-6


async def test_a_partial_that_is_not_done_is_given_up_at_the_pause() -> None:
    scheduler = Prompt(never=[Priority.PARTIAL])
    partials, (final,) = await hear("..." + "x" * 20 + "." * 10, scheduler)
    assert partials == []
    assert final.text
    assert scheduler.lengths(Priority.PARTIAL) == [14], "one at a time"
    assert [future.cancelled() for future in scheduler.futures] == [True, False]


@pytest.mark.parametrize(
    ("pattern", "gates"),
    [
        ("..." + "x" * 40 + "." * 10, Gates(min_confidence=2.0)),
        ("..." + "x" * 40 + "!" + "." * 10, Gates()),
    ],
    ids=["a gate drops it", "a gap cuts it off"],
)
async def test_what_was_shown_and_comes_to_nothing_is_taken_back(pattern: str, gates: Gates) -> None:
    partials, finals = await hear(pattern, Prompt(), gates=gates)
    assert finals == []
    assert [partial.end for partial in partials] == [False] * (len(partials) - 1) + [True]
    assert len(partials) > 1
    assert len({partial.id for partial in partials}) == 1
    assert partials[-1].to_json() == {"id": partials[0].id, "source": "fed", "text": "", "end": True}


async def test_what_was_shown_is_taken_back_where_the_engine_fails_on_the_whole() -> None:
    def fail_on_the_last(samples: Samples) -> Recognition:
        if len(samples) // CHUNK_SAMPLES == 2 + 40 + POST_ROLL:
            raise EngineError("on purpose")
        return heard_of(samples)

    partials, finals = await hear("..." + "x" * 40 + "." * 10, Prompt(fail_on_the_last))
    assert finals == []
    assert partials[-1].end


async def test_what_was_not_shown_is_not_taken_back() -> None:
    partials, finals = await hear("..." + "x" * 8 + "." * 10, Prompt(), gates=Gates(min_confidence=2.0))
    assert (partials, finals) == ([], [])


async def test_a_pause_is_not_decoded_at_once_while_others_wait_too_long() -> None:
    before = enforced("not_at_pause")
    scheduler = Prompt(backlog_ms=301)
    _, (final,) = await hear("..." + "x" * 8 + "." * 10, scheduler, interval_ms=0)
    assert scheduler.asked == [(Priority.MICROPHONE, 2 + 8 + POST_ROLL)], "the same sound, but once it is sure"
    assert not final.decoded_at_pause
    assert final.enforced == ("not_at_pause",)
    assert enforced("not_at_pause") == before + 1


async def test_a_pause_is_decoded_at_once_while_that_holds_nobody_up() -> None:
    _, (final,) = await hear("..." + "x" * 8 + "." * 10, Prompt(backlog_ms=299))
    assert (final.decoded_at_pause, final.enforced) == (True, ())


async def test_a_segment_grows_no_longer_than_what_can_be_decoded_in_time() -> None:
    before = enforced("split")
    slow = Prompt(cost_ms_a_second=30)  # 10 s in 300 ms
    _, finals = await hear("..." + "x" * 700 + "." * 10, slow, interval_ms=0)
    assert [final.enforced for final in finals] == [("split",), ("split",), ()]
    assert all(final.duration_s <= 10 + CHUNK_S for final in finals)
    assert sum(final.duration_s for final in finals) == pytest.approx((2 + 700 + POST_ROLL) * CHUNK_S), "no word lost"
    assert enforced("split") == before + 2
    fast = Prompt(cost_ms_a_second=1)
    _, finals = await hear("..." + "x" * 700 + "." * 10, fast, interval_ms=0)
    assert [final.enforced for final in finals] == [()]


async def test_the_engine_is_warmed_when_somebody_begins_to_speak() -> None:
    scheduler = Prompt()
    await hear("..." + "x" * 8 + "." * 10 + "x" * 8 + "." * 10 + "x", scheduler)
    assert scheduler.warmed == 2


async def test_push_to_talk_decodes_nothing_of_what_nobody_asked_for() -> None:
    clock = Clock()
    clock.now = 0.0
    attention = Attention(PUSH_TO_TALK, None, 2.0, clock)
    sentence = "." * 10 + "x" * 40 + "." * 20
    scheduler = Prompt()
    assert await hear(sentence, scheduler, attention=attention) == ([], [])
    assert scheduler.asked == []
    attention.listen()
    partials, (final,) = await hear(sentence * 2, scheduler, attention=attention)
    assert partials
    assert final.offset_s is not None
    assert final.offset_s < 2, "and after the time is over the next sentence is not for us"


@pytest.mark.parametrize("mode", [PHRASE, PUSH_TO_TALK])
async def test_the_rest_of_what_was_split_is_for_us_if_its_beginning_was(mode: str) -> None:
    clock = Clock()
    clock.now = 0.0
    attention = Attention(mode, Exactly(SPOKEN[:2]), 3.0, clock)
    if mode == PUSH_TO_TALK:
        attention.listen(3.0)
    texts = iter([SPOKEN[:8], "丁戊己", "不相干"])

    def say(samples: Samples) -> Recognition:
        text = next(texts)
        return Recognition(text, tuple(Token(character, None, None, 1.0) for character in text), 1.0)

    other = "." * 20 + "x" * 40 + "." * 10
    pattern = "..." + "x" * 300 + "." * 10 + other
    rules = Rules(endpoint=5, pre_roll=2, min_speech=2, max_length=250)
    _, finals = await hear(pattern, Prompt(say), interval_ms=0, attention=attention, rules=rules)
    first = SPOKEN[2:8] if mode == PHRASE else SPOKEN[:8]
    assert [final.text for final in finals] == [first, "丁戊己"]


@pytest.mark.parametrize("hours", [14, 30])
async def test_a_pipe_from_a_clock_that_runs_fast_stays_a_microphone(hours: int) -> None:
    scheduler = Prompt()
    listener = Listener(
        Fed(""), ByLevel(), Segmenter(RULES), scheduler, [Collector()], Labels("test", "fed", "prompt"), Gates(),
        Pace(True, None), BUDGET,
    )  # fmt: skip
    silence = np.zeros(CHUNK_SAMPLES, np.float32)
    for second in range(0, hours * 3600, 60):
        listener._follow(Chunk(silence, round(second * 16_000 * 1.0001), float(second)))
    assert listener._priority() == Priority.MICROPHONE


async def test_a_wake_phrase_lets_its_sentence_through_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    addressed = Attention(PHRASE, Exactly(SPOKEN[:4]))
    partials, (final,) = await hear("..." + "x" * 60 + "." * 10, Prompt(), attention=addressed)
    assert final.text == SPOKEN[4 : len(final.text_raw)]
    assert final.text_raw.startswith(SPOKEN[:4])
    assert partials
    assert all(SPOKEN[4:].startswith(partial.text) for partial in partials)
    caplog.clear()
    others = Attention(PHRASE, Exactly("小爱"))
    assert await hear("..." + "x" * 60 + "." * 10, Prompt(), attention=others) == ([], [])
    assert "打开" not in caplog.text


async def test_mute_while_the_source_is_held_up_at_a_split_drops_what_is_being_said() -> None:
    scheduler, sink = Prompt(never=[Priority.NETWORK]), Collector()
    rules = Rules(endpoint=5, pre_roll=2, min_speech=2, max_length=20)
    listener = Listener(
        Fed("..." + "x" * 200 + "." * 10), ByLevel(), Segmenter(rules), scheduler, [sink],
        Labels("test", "fed", "prompt"), Gates(), Pace(live=False), BUDGET,
    )  # fmt: skip
    running = asyncio.create_task(listener.run())
    while len(scheduler.futures) <= PENDING_LIMIT:
        await asyncio.sleep(0)
    listener.mute(True)
    for future in scheduler.futures:
        future.set_result(heard_of(np.zeros(20 * CHUNK_SAMPLES, np.float32)))
    await asyncio.wait_for(running, 30)
    assert len(sink.transcripts) == PENDING_LIMIT + 1, "what had ended before; and nothing after"
