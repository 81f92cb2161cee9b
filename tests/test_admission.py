"""Who is let in, and who is sent away: no queue grows without end."""

from __future__ import annotations

import heapq
from contextlib import ExitStack

import pytest
from prometheus_client import REGISTRY

from edge_asr.errors import BusyError
from edge_asr.serve.admission import Admission


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock, wait_s: float = 2.0, *, backlog_s: float = 0.0, requests: int = 64) -> Admission:
    return Admission(wait_s, lambda: backlog_s, requests=requests, clock=clock, chance=lambda: 0.0)


def test_a_server_that_has_nothing_to_do_lets_everybody_in() -> None:
    gate = admission(Clock())
    with gate.request():
        assert gate.in_progress == 1
        assert gate.expected_wait_s() == 0
    assert gate.in_progress == 0


def test_the_pace_is_that_of_what_was_done_whoever_did_it() -> None:
    clock = Clock()
    gate = admission(clock)
    with gate.request():
        clock.now += 0.5
    clock.now += 1000  # nobody asked meanwhile, which says nothing
    with gate.request():
        clock.now += 0.5
        assert gate.expected_wait_s() == pytest.approx(0.5)


def test_several_at_a_time_are_done_so_much_faster() -> None:
    clock = Clock()
    gate = admission(clock, wait_s=10)
    for _ in range(100):
        with ExitStack() as together:
            for _ in range(4):
                together.enter_context(gate.request())
            clock.now += 1.0
    assert gate.expected_wait_s() == 0
    with gate.request():
        assert gate.expected_wait_s() < 0.6


def test_who_would_wait_too_long_is_told_when_to_come_back() -> None:
    clock = Clock()
    gate = admission(clock)
    with gate.request():
        clock.now += 1.5
    before = refused("wait")
    with gate.request(), gate.request():
        with pytest.raises(BusyError, match="more than 2 s; ask again later") as busy, gate.request():
            pass
        assert busy.value.retry_after_s == pytest.approx(1.5)
    assert refused("wait") == before + 1


def test_what_waits_for_the_engine_counts_whoever_asked() -> None:
    gate = admission(Clock(), backlog_s=2.5)
    with pytest.raises(BusyError):
        gate.check()


def test_there_are_so_many_uploads_in_memory_and_no_more() -> None:
    gate = admission(Clock(), requests=2)
    with gate.request(), gate.request(), pytest.raises(BusyError, match="2 requests") as busy, gate.request():
        pass
    assert busy.value.retry_after_s >= 1


def test_who_comes_back_does_not_come_back_all_at_once() -> None:
    clock = Clock()
    waits = []
    for chance in (0.0, 0.5, 1.0):
        gate = Admission(2.0, lambda: 8.0, clock=clock, chance=lambda chance=chance: chance)  # type: ignore[misc]
        with pytest.raises(BusyError) as busy:
            gate.check()
        waits.append(busy.value.retry_after_s)
    assert waits == pytest.approx([4.0, 5.0, 6.0])


@pytest.mark.parametrize("servers", [1, 3])
def test_three_times_what_can_be_done_makes_nobody_wait_for_ever(servers: int) -> None:
    """Arrivals on a made-up clock, each of them 0.1 s of work for one of the servers."""
    clock = Clock()
    gate = admission(clock)
    free = [clock.now] * servers
    done: list[tuple[float, int, ExitStack]] = []
    waits, refused = [], 0
    arrivals = 3_000
    for number in range(arrivals):
        at = 100.0 + number * 0.1 / servers / 3
        while done and done[0][0] <= at:
            clock.now, _, stack = heapq.heappop(done)
            stack.close()
        clock.now = at
        stack = ExitStack()
        try:
            stack.enter_context(gate.request())
        except BusyError:
            refused += 1
            continue
        begins = max(at, heapq.heappop(free))
        heapq.heappush(free, begins + 0.1)
        heapq.heappush(done, (begins + 0.1, number, stack))
        waits.append(begins - at)
    assert max(waits) < 2 * 2.0
    assert refused == pytest.approx(arrivals * 2 / 3, rel=0.1)
    while done:
        clock.now, _, stack = heapq.heappop(done)
        stack.close()
    assert gate.in_progress == 0


def refused(reason: str) -> float:
    return REGISTRY.get_sample_value("edge_asr_requests_refused_total", {"reason": reason}) or 0.0
