"""Requests of the network that wait for company: who shares a run, and what does not wait."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future

import numpy as np
import pytest
from bundled import load, sound_of, transcripts
from mosquitto import PATIENCE_S, wait_for
from test_scheduler_priority import MEASURED, MICROPHONE, NETWORK, Held, done, sound

from edge_asr.budget import CostModel
from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import FP32
from edge_asr.recognizer.runs import MOST
from edge_asr.recognizer.scheduler import Priority, Scheduler
from edge_asr.types import SAMPLE_RATE, Recognition

FOR_EVER_S = 3600.0
"""A wait that nobody sees the end of: what ends it is something else."""
Start = Callable[..., Scheduler]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Return what makes a scheduler, to be started by the test; at the end none runs."""
    made: list[Scheduler] = []

    def make(engine: Held, batch_wait_s: float = FOR_EVER_S) -> Scheduler:
        made.append(Scheduler(lambda: engine, batch_wait_s))
        return made[-1]

    yield make
    for scheduler in made:
        await scheduler.close(PATIENCE_S)


async def started(scheduler: Scheduler) -> Scheduler:
    """Start it, without what it measures then."""
    await scheduler.start()
    scheduler.costs = CostModel()
    engine = scheduler._load()
    assert isinstance(engine, Held)
    for _ in MEASURED:
        engine.next_run()
    engine.runs.clear()
    return scheduler


def waits(scheduler: Scheduler, count: int = 1) -> None:
    """Return when so many wait, and the thread for them."""
    wait_for(lambda: len(scheduler._waiting) == count and scheduler.step is None, "a request that waits for company")


async def test_those_who_come_later_share_the_run_of_the_first(start: Start) -> None:
    engine = Held(batches=True)
    engine.largest_batch = 3
    scheduler = await started(start(engine))
    answers = [scheduler.submit(sound(1), NETWORK)]
    waits(scheduler)
    answers += [scheduler.submit(sound(length), NETWORK) for length in (2, 3)]  # and it is full
    assert [done(answer).text for answer in answers] == ["1", "2", "3"]
    assert engine.runs == [[1, 2, 3]]


async def test_a_microphone_is_answered_at_once_whoever_waits_for_company(start: Start) -> None:
    engine = Held(batches=True)
    scheduler = await started(start(engine))
    patient = scheduler.submit(sound(1), NETWORK)
    waits(scheduler)
    assert done(scheduler.submit(sound(2), MICROPHONE)).text == "2"
    assert engine.runs == [[2]]
    assert not patient.done()


async def test_nobody_waits_so_long_that_the_deadline_passes(start: Start) -> None:
    engine = Held(batches=True)
    scheduler = await started(start(engine))
    answer = scheduler.submit(sound(1), NETWORK, deadline=0.0)  # long ago
    assert done(answer).text == "1"


async def test_the_wait_has_an_end(start: Start) -> None:
    engine = Held(batches=True)
    scheduler = await started(start(engine, 0.05))
    assert done(scheduler.submit(sound(1), NETWORK)).text == "1"


@pytest.mark.parametrize(("batches", "priority"), [(False, NETWORK), (True, MICROPHONE), (True, Priority.PARTIAL)])
async def test_others_do_not_wait(start: Start, batches: bool, priority: Priority) -> None:
    scheduler = await started(start(Held(batches)))
    assert done(scheduler.submit(sound(1), priority)).text == "1"


async def test_nobody_waits_unless_it_is_configured(start: Start) -> None:
    scheduler = await started(start(Held(batches=True), 0.0))
    assert done(scheduler.submit(sound(1), NETWORK)).text == "1"


async def test_who_is_cancelled_while_waiting_is_not_answered_and_holds_nobody_up(start: Start) -> None:
    engine = Held(batches=True)
    engine.largest_batch = 2
    scheduler = await started(start(engine))
    first = scheduler.submit(sound(1), NETWORK)
    waits(scheduler)
    assert first.cancel()
    answers = [scheduler.submit(sound(length), NETWORK) for length in (2, 3)]
    assert [done(answer).text for answer in answers] == ["2", "3"]
    assert engine.runs == [[2, 3]]


async def test_the_end_does_not_wait(start: Start) -> None:
    engine = Held(batches=True)
    scheduler = await started(start(engine))
    waiting = scheduler.submit(sound(1), NETWORK)
    waits(scheduler)
    assert await scheduler.close(PATIENCE_S)
    assert waiting.cancelled()


async def test_an_engine_takes_no_more_at_a_time_than_it_was_built_for(start: Start) -> None:
    engine = Held(batches=True)
    engine.largest_batch = 2
    scheduler = await started(start(engine, 0.0))
    first = scheduler.submit(sound(9), NETWORK)
    engine.next_run()
    others = [scheduler.submit(sound(1), NETWORK) for _ in range(5)]
    for answer in (first, *others):
        done(answer)
    assert max(map(len, engine.runs)) <= 2
    assert MOST[NETWORK] == 32


async def test_the_backlog_of_the_network_is_not_that_of_the_microphones(start: Start) -> None:
    engine = Held(batches=True)
    scheduler = await started(start(engine, 0.0))
    engine.hold()
    costs = CostModel()
    costs.observe(1, 100)
    scheduler.costs = costs
    running = scheduler.submit(sound(SAMPLE_RATE), MICROPHONE)
    engine.next_run()
    waiting = scheduler.submit(sound(2 * SAMPLE_RATE), NETWORK)
    assert scheduler.backlog_ms() <= 100
    assert 200 <= scheduler.backlog_ms(NETWORK) <= 300
    engine.let(math.inf)
    done(running)
    done(waiting)
    assert scheduler.backlog_ms(NETWORK) == 0


async def test_nothing_is_lost_or_mixed_up_whoever_asks_and_gives_up_when(start: Start) -> None:
    """Many threads submit and cancel on the real engine; whoever is answered gets the text of its own sound."""
    scheduler = Scheduler(lambda: load(FP32), 0.005)
    await scheduler.start()
    texts = transcripts()
    sounds = {name: sound_of(name) for name in texts}
    wrong: list[str] = []
    answered = [0]

    def ask(number: int) -> None:
        chance = random.Random(number)
        asked: list[tuple[str, Future[Recognition]]] = []
        for _ in range(25):
            name = chance.choice(sorted(sounds))
            priority = chance.choice((NETWORK, NETWORK, NETWORK, MICROPHONE))
            asked.append((name, scheduler.submit(sounds[name], priority)))
            if chance.random() < 0.2:
                chance.choice(asked)[1].cancel()
        for name, answer in asked:
            if not answer.cancelled() and answer.result(PATIENCE_S).text != texts[name]:
                wrong.append(name)
            answered[0] += not answer.cancelled()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, PATIENCE_S)
    await scheduler.close(PATIENCE_S)
    assert not wrong
    assert answered[0] > 100


async def test_one_bad_sound_takes_no_other_of_its_run_with_it(start: Start) -> None:
    class Picky(Held):
        def recognize_batch(self, batch: list[np.ndarray]) -> list[Recognition]:  # type: ignore[override]
            if any(len(samples) == 2 for samples in batch):
                raise EngineError("not this one")
            return super().recognize_batch(batch)

        def recognize(self, samples: np.ndarray) -> Recognition:
            if len(samples) == 2:
                raise EngineError("not this one")
            return super().recognize(samples)

    engine = Picky(batches=True)
    engine.largest_batch = 3
    scheduler = await started(start(engine))
    answers = [scheduler.submit(sound(length), NETWORK) for length in (1, 2, 3)]
    assert done(answers[0]).text == "1"
    assert done(answers[2]).text == "3"
    assert isinstance(answers[1].exception(PATIENCE_S), EngineError)
