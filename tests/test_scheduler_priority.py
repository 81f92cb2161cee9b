"""Who is answered first, what gives way to a microphone, and which requests share a run."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future

import numpy as np
import pytest
from mosquitto import PATIENCE_S
from prometheus_client import REGISTRY

from edge_asr.budget import CostModel
from edge_asr.errors import EngineError, InterruptedRunError
from edge_asr.recognizer import scheduler as module
from edge_asr.recognizer.pieces import FRAME, joined, quietest
from edge_asr.recognizer.recognizers import MEASURED_S
from edge_asr.recognizer.requests import SHORTEST, Request
from edge_asr.recognizer.runs import MARGIN_S, MOST, SAFETY, Run, latest_start, may_share
from edge_asr.recognizer.scheduler import SMALLEST, Priority, Scheduler
from edge_asr.types import SAMPLE_RATE, Recognition, Samples, Token

MICROPHONE, NETWORK, PARTIAL = Priority
BAD = 13
"""Samples of a sound that no engine recognises."""
MEASURED = [seconds * SAMPLE_RATE for seconds in MEASURED_S]


def sound(samples: int) -> Samples:
    return np.zeros(samples, np.float32)


def seconds(length: float) -> Samples:
    return sound(round(length * SAMPLE_RATE))


class Held:
    """An engine whose runs take until they may end, or are interrupted; it notes the lengths of what it is given."""

    def __init__(self, batches: bool = False) -> None:
        self.batches = batches
        self.largest_batch = 64
        self.runs: list[list[int]] = []
        self.begun: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self.interrupts = 0
        self.closed = False
        self._state = threading.Condition()
        self._permits = math.inf
        self._interrupted = False

    def hold(self) -> None:
        with self._state:
            self._permits = 0

    def let(self, runs: float = 1) -> None:
        """Let so many runs end."""
        with self._state:
            self._permits += runs
            self._state.notify_all()

    def recognize(self, samples: Samples) -> Recognition:
        return self.recognize_batch([samples])[0]

    def recognize_batch(self, batch: Sequence[Samples]) -> list[Recognition]:
        lengths = [len(samples) for samples in batch]
        self.runs.append(lengths)
        self.begun.put(lengths)
        with self._state:
            assert self._state.wait_for(lambda: self._permits > 0 or self._interrupted, PATIENCE_S)
            if self._interrupted:
                raise InterruptedRunError("interrupted")
            self._permits -= 1
        if BAD in lengths:
            raise EngineError("it fails on that")
        return [Recognition(f"{n}", (Token(f"{n}", 0, 60, 0.5),), 0.5, {"model": 1.0}) for n in lengths]

    def interrupt(self) -> None:
        with self._state:
            self.interrupts += 1
            self._interrupted = True
            self._state.notify_all()

    def resume(self) -> None:
        with self._state:
            self._interrupted = False

    def close(self) -> None:
        self.closed = True

    def next_run(self) -> list[int]:
        """Wait until the next run begins."""
        return self.begun.get(timeout=PATIENCE_S)


@pytest.fixture
def engine() -> Held:
    return Held()


@pytest.fixture
async def scheduler(engine: Held) -> AsyncIterator[Scheduler]:
    """Start a scheduler with that engine, whose runs are held from now on."""
    scheduler = Scheduler(lambda: engine)
    await scheduler.start()
    for _ in MEASURED:
        engine.next_run()
    engine.runs.clear()
    engine.hold()
    yield scheduler
    engine.let(math.inf)
    await scheduler.close(PATIENCE_S)


def costing(ms_per_second: float) -> CostModel:
    costs = CostModel()
    costs.observe(30.0, ms_per_second * 30)
    return costs


def done(answer: Future[Recognition]) -> Recognition:
    return answer.result(PATIENCE_S)


def enforced(step: str) -> float:
    return REGISTRY.get_sample_value("edge_asr_enforced_total", {"step": step}) or 0.0


def in_s(seconds: float) -> float:
    return time.monotonic() + seconds


def is_idle(scheduler: Scheduler) -> bool:
    return scheduler.idle


async def until_idle(scheduler: Scheduler) -> None:
    async def wait() -> None:
        while not is_idle(scheduler):
            await asyncio.sleep(0)

    await asyncio.wait_for(wait(), PATIENCE_S)


async def test_microphones_go_first_then_the_earliest_deadline_then_whoever_came_first(
    engine: Held, scheduler: Scheduler
) -> None:
    first = scheduler.submit(sound(1))
    engine.next_run()
    waiting = [
        scheduler.submit(sound(9), PARTIAL, in_s(1000)),
        scheduler.submit(sound(7), NETWORK),
        scheduler.submit(sound(8), NETWORK),
        scheduler.submit(sound(6), NETWORK, in_s(3000)),
        scheduler.submit(sound(5), NETWORK, in_s(2000)),
        scheduler.submit(sound(4)),
        scheduler.submit(sound(3), MICROPHONE, in_s(5000)),
        scheduler.submit(sound(2), MICROPHONE, in_s(4000)),
    ]
    engine.let(math.inf)
    for answer in (first, *waiting):
        done(answer)
    assert engine.runs == [[length] for length in range(1, 10)]


@pytest.mark.parametrize("priority", [NETWORK, PARTIAL])
async def test_what_runs_gives_way_to_a_microphone_that_would_be_late(
    engine: Held, scheduler: Scheduler, priority: Priority
) -> None:
    before = enforced("interrupted")
    scheduler.costs = costing(1000)
    running = scheduler.submit(seconds(30), priority)
    engine.next_run()
    urgent = scheduler.submit(seconds(1), MICROPHONE, in_s(20))
    engine.let(math.inf)
    assert done(urgent).enforced == ()
    assert enforced("interrupted") == before + 1
    if priority == PARTIAL:
        assert running.cancelled()
        assert engine.runs == [[480_000], [16_000]]
    else:
        assert done(running).enforced == ("interrupted",)
        assert engine.runs == [[480_000], [16_000], [480_000]]
    assert engine.interrupts == 1


async def test_what_runs_is_finished_if_the_microphone_can_wait(engine: Held, scheduler: Scheduler) -> None:
    scheduler.costs = costing(1)
    running = scheduler.submit(seconds(30), NETWORK)
    engine.next_run()
    waiting = [scheduler.submit(seconds(1), MICROPHONE, deadline) for deadline in (in_s(1000), math.inf)]
    engine.let(math.inf)
    for answer in (running, *waiting):
        assert done(answer).enforced == ()
    assert engine.interrupts == 0


async def test_what_takes_longer_than_was_estimated_is_interrupted_when_it_is_time(
    engine: Held, scheduler: Scheduler
) -> None:
    scheduler.costs = costing(1)
    scheduler.submit(seconds(1), NETWORK)
    engine.next_run()
    urgent = scheduler.submit(seconds(1), MICROPHONE, in_s(2 * MARGIN_S))
    assert engine.next_run() == [16_000], "the run that nobody lets end has ended"
    engine.let(math.inf)
    done(urgent)


async def test_a_microphone_is_not_interrupted_for_another(engine: Held, scheduler: Scheduler) -> None:
    first = scheduler.submit(seconds(2))
    engine.next_run()
    second = scheduler.submit(seconds(1), MICROPHONE, in_s(-1))
    engine.let(math.inf)
    done(first)
    done(second)
    assert (engine.interrupts, engine.runs) == (0, [[32_000], [16_000]])


async def test_what_nobody_waits_for_any_more_is_interrupted(engine: Held, scheduler: Scheduler) -> None:
    before = enforced("interrupted")
    unwanted = scheduler.submit(seconds(30), NETWORK)
    engine.next_run()
    assert unwanted.cancel()
    await until_idle(scheduler)
    assert (engine.interrupts, enforced("interrupted")) == (1, before)


async def test_after_two_interruptions_a_sound_is_cut_where_it_is_quiet_and_joined_again(
    engine: Held, scheduler: Scheduler
) -> None:
    before = enforced("cut")
    noisy = np.ones(30 * SAMPLE_RATE, np.float32)
    pause = 12 * SAMPLE_RATE
    noisy[pause : pause + 2 * FRAME] = 0.0
    running = scheduler.submit(noisy, NETWORK)
    urgent = []
    for _ in range(2):
        assert engine.next_run() == [480_000]
        urgent.append(scheduler.submit(sound(5), MICROPHONE, in_s(-1)))
        assert engine.next_run() == [5]
        engine.let()
    engine.let(math.inf)
    recognition = done(running)
    ((_, *_), (_, *_), *halves) = [lengths for lengths in engine.runs if lengths != [5]]
    [first], [second] = halves
    assert first + second == 480_000
    assert pause <= first <= pause + 2 * FRAME
    assert recognition.text == f"{first} {second}"
    start = first * 1000 // SAMPLE_RATE
    assert [(token.start_ms, token.end_ms) for token in recognition.tokens] == [(0, 60), (start, start + 60)]
    assert recognition.confidence == pytest.approx(0.5)
    assert recognition.enforced == ("interrupted", "cut")
    assert list(recognition.stages_ms) == ["queue", "model"]
    assert recognition.stages_ms["model"] == 2.0
    assert enforced("cut") == before + 1


async def test_a_job_ends_however_busy_the_microphone_is(engine: Held, scheduler: Scheduler) -> None:
    running, lengths = scheduler.submit(seconds(30), NETWORK), []
    while not running.done():
        lengths += engine.next_run()
        run = scheduler._running
        assert run is not None
        gives_way = run.requests[0].piece.can_wait
        scheduler.submit(sound(5), MICROPHONE, in_s(-1))
        if not gives_way:
            engine.let()
        assert engine.next_run() == [5]
        engine.let()
    assert done(running).enforced == ("interrupted", "cut")
    assert min(lengths) > 2 * SHORTEST / 3
    assert len(lengths) < 100


async def test_what_was_interrupted_is_next_of_its_kind(engine: Held, scheduler: Scheduler) -> None:
    first = scheduler.submit(sound(1), NETWORK)
    engine.next_run()
    second = scheduler.submit(sound(2), NETWORK, in_s(1))
    urgent = scheduler.submit(sound(3), MICROPHONE, in_s(-1))
    engine.let(math.inf)
    for answer in (first, second, urgent):
        done(answer)
    assert engine.runs == [[1], [3], [1], [2]]


async def test_an_engine_that_cannot_be_interrupted_goes_on() -> None:
    class Plain:
        def __init__(self) -> None:
            self.busy, self.go_on = threading.Event(), threading.Event()
            self.lengths: list[int] = []

        def recognize(self, samples: Samples) -> Recognition:
            self.lengths.append(len(samples))
            self.busy.set()
            assert self.go_on.wait(PATIENCE_S)
            return Recognition("", (), None)

        def close(self) -> None:
            pass

    plain = Plain()
    scheduler = Scheduler(lambda: plain)
    await scheduler.start()
    assert plain.lengths == [], "it is not measured"
    running = scheduler.submit(sound(2), NETWORK)
    assert plain.busy.wait(PATIENCE_S)
    urgent = scheduler.submit(sound(1), MICROPHONE, in_s(-1))
    plain.go_on.set()
    assert done(running).enforced == done(urgent).enforced == ()
    await scheduler.close(PATIENCE_S)
    assert plain.lengths == [2, 1]


@pytest.mark.parametrize(
    ("left_s", "deadline_s", "cost_s", "interrupted_in_s"),
    [
        (10.0, 100.0, 1.0, 100.0 - SAFETY - MARGIN_S),
        (99.0, 100.0, 1.0, -math.inf),
        (0.0, 1.0, 1.0, -math.inf),
        (0.0, math.inf, 1.0, math.inf),
    ],
    ids=["it can wait so long", "it would be late", "it is late already", "it can wait for ever"],
)
def test_a_run_is_interrupted_as_late_as_can_be(
    left_s: float, deadline_s: float, cost_s: float, interrupted_in_s: float
) -> None:
    costs, now = costing(cost_s * 1e3), 1000.0
    run = Run([Request(seconds(30), NETWORK)], left_s * 1e3, now)
    waiting = [Request(seconds(1), MICROPHONE, now + deadline_s), Request(seconds(30), NETWORK, now)]
    assert run.interrupt_at(waiting, costs, now) == pytest.approx(now + interrupted_in_s)


def test_of_several_microphones_the_last_counts_as_well() -> None:
    costs = costing(1000.0)
    waiting = [Request(seconds(1), MICROPHONE, 100.0), Request(seconds(10), MICROPHONE, 101.0)]
    assert latest_start(waiting, costs) == pytest.approx(101.0 - 11 * SAFETY - MARGIN_S)


# Several in one run


@pytest.fixture
def batching(engine: Held) -> Held:
    engine.batches = True
    return engine


@pytest.mark.parametrize("priority", [MICROPHONE, NETWORK])
async def test_requests_that_wait_already_share_a_run(batching: Held, scheduler: Scheduler, priority: Priority) -> None:
    before = enforced("batched")
    first = scheduler.submit(sound(1), priority)
    batching.next_run()
    others = [scheduler.submit(sound(length), priority) for length in (2, 3, 4)]
    last = scheduler.submit(sound(5), PARTIAL)
    assert others[1].cancel()
    batching.let(math.inf)
    assert [done(others[k]).text for k in (0, 2)] == ["2", "4"]
    assert [done(others[k]).enforced for k in (0, 2)] == [("batched",)] * 2
    assert done(first).enforced == done(last).enforced == ()
    assert batching.runs == [[1], [2, 4], [5]]
    assert enforced("batched") == before + 2


@pytest.mark.parametrize("priority", [MICROPHONE, NETWORK])
async def test_no_more_than_so_many_share_a_run(batching: Held, scheduler: Scheduler, priority: Priority) -> None:
    scheduler.costs = CostModel()
    first = scheduler.submit(sound(1), priority)
    batching.next_run()
    others = [scheduler.submit(sound(2), priority) for _ in range(MOST[priority] + 1)]
    batching.let(math.inf)
    for answer in (first, *others):
        done(answer)
    assert [len(lengths) for lengths in batching.runs] == [1, MOST[priority], 1]


async def test_an_engine_that_takes_one_at_a_time_is_given_one(engine: Held, scheduler: Scheduler) -> None:
    answers = [scheduler.submit(sound(length)) for length in (1, 2, 3)]
    engine.let(math.inf)
    for answer in answers:
        assert done(answer).enforced == ()
    assert engine.runs == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("lengths_s", "deadline_s", "shared"),
    [([1, 1], 3.5, True), ([1, 1], 2.5, False), ([1, 2], 3.5, False), ([1], 0.0, False)],
    ids=["in time", "late", "late, for all are filled up", "late as it is"],
)
def test_only_so_many_share_a_run_that_the_earliest_deadline_is_met(
    lengths_s: Sequence[float], deadline_s: float, shared: bool
) -> None:
    now = 1000.0
    batch = [Request(seconds(length), MICROPHONE, now + deadline_s) for length in lengths_s]
    assert may_share(batch, costing(1000.0), now, 32) is shared


def test_what_shares_a_run_does_not_hold_up_a_microphone() -> None:
    two, three = ([Request(seconds(1), NETWORK) for _ in range(count)] for count in (2, 3))
    assert may_share(two, costing(30.0), 0.0, 32)
    assert not may_share(three, costing(30.0), 0.0, 32)


async def test_one_bad_sound_does_not_take_the_others_down(batching: Held, scheduler: Scheduler) -> None:
    first = scheduler.submit(sound(1))
    batching.next_run()
    one, bad, other = (scheduler.submit(sound(length)) for length in (2, BAD, 3))
    batching.let(math.inf)
    assert [done(answer).text for answer in (first, one, other)] == ["1", "2", "3"]
    with pytest.raises(EngineError, match="it fails on that"):
        done(bad)
    assert batching.runs == [[1], [2, BAD, 3], [2], [BAD], [3]]
    assert done(one).enforced == ()


async def test_a_batch_that_was_interrupted_is_asked_one_by_one(batching: Held, scheduler: Scheduler) -> None:
    first = scheduler.submit(sound(1), NETWORK)
    batching.next_run()
    others = [scheduler.submit(sound(length), NETWORK) for length in (2, 3)]
    batching.let()
    done(first)
    assert batching.next_run() == [2, 3]
    urgent = scheduler.submit(sound(4), MICROPHONE, in_s(-1))
    batching.let(math.inf)
    assert [done(answer).enforced for answer in (urgent, *others)] == [(), ("interrupted",), ("interrupted",)]
    assert batching.runs == [[1], [2, 3], [4], [2], [3]]


# What it costs


async def test_costs_are_measured_when_the_engine_is_loaded_and_anew_after_a_swap() -> None:
    old, new = Held(), Held()
    scheduler = Scheduler(lambda: old)
    assert scheduler.costs.estimate_ms(1.0) == 0.0
    await scheduler.start()
    assert old.runs == [[length] for length in MEASURED]
    assert scheduler.costs.estimate_ms(1.0) > 0.0
    scheduler.costs.observe(1.0, 1e6)
    await scheduler.swap(lambda: new)
    assert new.runs == [[length] for length in MEASURED]
    assert 0.0 < scheduler.costs.estimate_ms(1.0) < 1e6
    await scheduler.close(PATIENCE_S)


async def test_every_run_is_observed_but_for_those_that_were_interrupted(engine: Held, scheduler: Scheduler) -> None:
    observed: list[float] = []

    class Noting(CostModel):
        def observe(self, seconds: float, milliseconds: float) -> None:
            observed.append(seconds)

    scheduler.costs = Noting()
    running = scheduler.submit(seconds(4), NETWORK)
    engine.next_run()
    urgent = scheduler.submit(seconds(2), MICROPHONE, in_s(-1))
    bad = scheduler.submit(sound(BAD))
    engine.let(math.inf)
    for answer in (running, urgent):
        done(answer)
    with pytest.raises(EngineError):
        done(bad)
    assert observed == [2.0, 4.0]


async def test_an_engine_that_fails_on_noise_is_started_all_the_same() -> None:
    class Failing(Held):
        def recognize(self, samples: Samples) -> Recognition:
            raise EngineError("it fails on that")

    scheduler = Scheduler(Failing)
    await scheduler.start()
    assert scheduler.costs.estimate_ms(1.0) == 0.0
    await scheduler.close(PATIENCE_S)


async def test_what_waits_and_runs_for_microphones_is_the_backlog(engine: Held, scheduler: Scheduler) -> None:
    scheduler.costs = costing(1e9)  # so long that no time passes
    assert (scheduler.idle, scheduler.backlog_ms()) == (True, 0.0)
    first = scheduler.submit(seconds(1))
    engine.next_run()
    assert not scheduler.idle
    assert scheduler.backlog_ms() == pytest.approx(1e9, rel=1e-3)
    others = [
        scheduler.submit(seconds(2)),
        scheduler.submit(seconds(4), NETWORK),
        scheduler.submit(seconds(4), PARTIAL),
    ]
    assert scheduler.backlog_ms() == pytest.approx(3e9, rel=1e-3)
    engine.let(math.inf)
    for answer in (first, *others):
        done(answer)


async def test_an_engine_is_warmed_only_after_it_was_idle(
    engine: Held, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.costs = CostModel()
    scheduler.warm()
    assert is_idle(scheduler), "it has just been loaded"
    scheduler.submit(sound(BAD), PARTIAL)  # it fails: nothing is observed
    engine.next_run()
    engine.let()
    await until_idle(scheduler)
    scheduler.warm()
    assert is_idle(scheduler), "it is warm"
    monkeypatch.setattr(module, "WARM_AFTER_S", 0.0)
    scheduler.warm()
    assert engine.next_run() == [SMALLEST]
    scheduler.warm()
    engine.let(math.inf)
    await until_idle(scheduler)
    assert engine.runs == [[BAD], [SMALLEST]], "it was not idle the second time"
    assert scheduler.costs.estimate_ms(1.0) == 0.0, "a cold run says nothing of the next ones"


# Changes and the end


async def test_a_swap_goes_ahead_of_whatever_waits(engine: Held, scheduler: Scheduler) -> None:
    running = scheduler.submit(sound(1), NETWORK)
    engine.next_run()
    waiting = [scheduler.submit(sound(2), NETWORK), scheduler.submit(sound(3))]
    new = Held()
    swapping = asyncio.create_task(scheduler.swap(lambda: new))
    while scheduler._taking_over is None:
        await asyncio.sleep(0)
    engine.let(math.inf)
    await asyncio.wait_for(swapping, PATIENCE_S)
    for answer in (running, *waiting):
        done(answer)
    assert (engine.runs, new.runs[len(MEASURED) :]) == ([[1]], [[3], [2]])


async def test_what_was_interrupted_is_dropped_when_everything_stops(engine: Held, scheduler: Scheduler) -> None:
    running = scheduler.submit(seconds(30), NETWORK)
    engine.next_run()
    urgent = scheduler.submit(sound(1), MICROPHONE, in_s(-1))
    assert engine.next_run() == [1]
    closing = asyncio.create_task(scheduler.close(PATIENCE_S))
    await asyncio.wait([asyncio.wrap_future(running)], timeout=PATIENCE_S)
    assert running.cancelled()
    engine.let()
    assert await closing
    assert done(urgent).text == "1"
    assert engine.closed
    assert not [thread for thread in threading.enumerate() if thread.name in ("inference", "deadlines")]
    assert scheduler.submit(sound(1)).cancelled(), "nobody is there any more"


async def test_a_request_under_way_is_finished_when_everything_stops(engine: Held, scheduler: Scheduler) -> None:
    running = scheduler.submit(seconds(30), NETWORK)
    engine.next_run()
    closing = asyncio.create_task(scheduler.close(PATIENCE_S))
    while not scheduler._closing:
        await asyncio.sleep(0)
    engine.let()
    assert await closing
    assert done(running).text == "480000"
    assert engine.interrupts == 0


# Pieces


def found(text: str, confidence: float | None, start_ms: int | None = 0) -> Recognition:
    tokens = tuple(Token(piece, start_ms, start_ms, confidence or 0.0) for piece in text.split())
    return Recognition(text, tokens, confidence, {"model": 2.0}, "fake", model="tiny")


def test_pieces_are_joined_as_if_they_were_one() -> None:
    whole = joined([(0, found("今 hel@@", 0.5)), (16_000, found("", None)), (32_000, found("lo", 0.25))])
    assert whole.text == "今 hello"
    assert [token.start_ms for token in whole.tokens] == [0, 0, 2000]
    assert whole.confidence == pytest.approx((0.5 * 0.5 * 0.25) ** (1 / 3))
    assert (whole.stages_ms, whole.engine, whole.model) == ({"model": 6.0}, "fake", "tiny")


def test_pieces_without_text_times_or_probability_are_joined_as_well() -> None:
    assert joined([(0, found("", None)), (16_000, found("", None))]).confidence is None
    assert joined([(0, found("今", 0.0, None)), (16_000, found("天", 1.0, None))]).tokens[1].start_ms is None


@pytest.mark.parametrize("length", [3 * FRAME, 4 * SAMPLE_RATE + 1, 29 * SAMPLE_RATE + 7])
def test_a_sound_is_cut_in_its_middle_third(length: int) -> None:
    loud = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    loud[: length // 4] = loud[-length // 4 :] = 0.0  # quiet, but not in the middle
    assert length // 3 <= quietest(loud) <= length * 2 // 3
