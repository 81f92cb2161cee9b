"""The latency budget: traces from made-up times, costs from made-up runs, and what follows from both."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from listening import Clock

from edge_asr.budget import (
    BUCKETS_S,
    CALM,
    FEW,
    JUDGED,
    MEMORY_S,
    OBSERVED,
    CostModel,
    LatencyBudget,
    LateWatch,
    RecentResponses,
)
from edge_asr.budget import percentiles as percentiles_of
from edge_asr.types import Marks, SegmentId, Transcript


def transcript(marks: Marks | None) -> Transcript:
    return Transcript(
        id=SegmentId("01930000-0000-7000-8000-000000000000"),
        device="hall",
        source="stdin",
        text="确认",
        text_raw="确认",
        confidence=0.9,
        started_at=None,
        offset_s=0.0,
        duration_s=1.0,
        tokens=(),
        latency_ms={"queue": 1.5, "features": 2.0, "model": 20.0},
        within_budget=None,
        decoded_at_pause=True,
        model="paraformer-tiny",
        engine="onnx-fp32",
        marks=marks,
    )


MARKS = Marks(speech_ended_at=100.0, segment_ended_at=100.4)


def test_the_trace_goes_from_the_end_of_speech_to_now() -> None:
    settled = LatencyBudget(300).settle(transcript(MARKS), now=100.65)
    assert list(settled.latency_ms) == ["endpoint", "capture", "queue", "features", "model", "response", "total"]
    assert settled.latency_ms == pytest.approx(
        {"endpoint": 400, "capture": 0, "queue": 1.5, "features": 2, "model": 20, "response": 250, "total": 650}
    )


def test_endpoint_and_response_make_the_total() -> None:
    trace = LatencyBudget(300).settle(transcript(MARKS), now=107.3).latency_ms
    assert trace["endpoint"] + trace["response"] == pytest.approx(trace["total"])


def test_what_was_split_has_no_end_that_is_waited_for() -> None:
    split = dataclasses.replace(transcript(MARKS), enforced=("split",))
    settled = LatencyBudget(300).settle(split, now=100.65)
    assert list(settled.latency_ms) == ["capture", "queue", "features", "model", "response"]
    assert settled.latency_ms["response"] == pytest.approx(250)
    assert settled.within_budget


@pytest.mark.parametrize(("now", "within"), [(100.5, True), (100.75, True), (100.9, True), (100.9001, False)])
def test_only_the_response_is_held_against_the_budget(now: float, within: bool) -> None:
    assert LatencyBudget(500).settle(transcript(Marks(50.0, 100.4)), now).within_budget is within


def test_what_was_settled_before_can_be_settled_again_later() -> None:
    budget = LatencyBudget(300)
    early = budget.settle(transcript(MARKS), now=100.5)
    late = budget.settle(early, now=101.0)
    assert (early.within_budget, late.within_budget) == (True, False)
    assert late.latency_ms["response"] == pytest.approx(600)
    assert late.latency_ms["total"] == pytest.approx(1000)


def test_a_transcript_without_marks_stays_as_it_is() -> None:
    unmarked = transcript(None)
    assert LatencyBudget(300).settle(unmarked, now=5.0) is unmarked


def test_nothing_else_of_the_transcript_changes() -> None:
    before = transcript(MARKS)
    after = LatencyBudget(300).settle(before, now=100.5)
    changed = {key for key in before.to_json() if before.to_json()[key] != after.to_json()[key]}
    assert changed == {"latency_ms", "within_budget"}
    assert before.latency_ms == {"queue": 1.5, "features": 2.0, "model": 20.0}


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        ([], (None, None, None)),
        ([12.345], (12.35, 12.35, 12.35)),
        ([float(k) for k in range(100, 0, -1)], (50, 95, 99)),
        ([1.0, 2.0, 900.0], (2, 900, 900)),
        ([9_999.0] * 500 + [float(k) for k in range(1, 1001)], (500, 950, 990)),
    ],
    ids=["none", "one", "a hundred", "three", "more than are kept"],
)
def test_percentiles_are_those_of_the_last_thousand_responses(
    responses: list[float], expected: tuple[float | None, ...]
) -> None:
    recent = RecentResponses()
    for response in responses:
        recent.add(response)
    assert recent.percentiles() == dict(zip(("p50", "p95", "p99"), expected, strict=True))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_a_percentile_is_the_least_value_that_so_many_per_cent_do_not_exceed(values: list[float]) -> None:
    for name, found in percentiles_of(values).items():
        share = int(name[1:])
        least = min(v for v in values if sum(other <= v for other in values) * 100 >= share * len(values))
        assert found == round(least, 2)


SECONDS = st.floats(0.05, 60.0)
RUNS = st.lists(st.tuples(SECONDS, st.floats(0.1, 5_000.0)), min_size=1, max_size=80)


def costs_of(*runs: tuple[float, float]) -> CostModel:
    costs = CostModel()
    for seconds, milliseconds in runs:
        costs.observe(seconds, milliseconds)
    return costs


@given(SECONDS)
def test_before_any_run_a_recognition_costs_nothing_and_a_segment_may_be_long(seconds: float) -> None:
    assert CostModel().estimate_ms(seconds) == 0.0
    assert CostModel().longest_s(1.0) == 30.0


@pytest.mark.parametrize(
    ("runs", "seconds", "expected"),
    [
        ([(3.0, 30.0)], 3.0, 30.0),
        ([(3.0, 30.0)], 2.5, 25.0),
        ([(3.0, 30.0)], 10.0, 100.0),
        ([(3.0, 30.0)], 1.0, 10.0),
        ([(0.2, 20.0)], 0.2, 20.0),
        ([(0.2, 20.0)], 0.4, 20.0),
        ([(1.0, 20.0), (8.0, 80.0)], 1.0, 20.0),
        ([(1.0, 20.0), (8.0, 80.0)], 3.0, 60.0),
        ([(1.0, 20.0), (8.0, 80.0)], 8.0, 80.0),
        ([(1.0, 20.0), (8.0, 80.0)], 30.0, 300.0),
        ([(1.0, 20.0), (8.0, 80.0), (12.0, 144.0)], 30.0, 360.0),
        ([(8.0, 80.0), (20.0, 100.0)], 2.0, 20.0),
        ([(45.0, 450.0)], 60.0, 600.0),
    ],
    ids=[
        "as observed", "alike in a bucket", "longer, as the nearest shorter one", "shorter, as a longer one",
        "what is very short costs as half a second", "and no less if it is a bit longer",
        "measured at loading: short", "measured at loading: what is between costs as the shorter one",
        "measured at loading: long", "measured at loading: longer still", "the nearest shorter one of several",
        "the nearest longer one of several", "longer than all buckets",
    ],
)  # fmt: skip
def test_what_a_recognition_costs(runs: list[tuple[float, float]], seconds: float, expected: float) -> None:
    assert costs_of(*runs).estimate_ms(seconds) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("edge", BUCKETS_S[:-1])
def test_a_length_at_the_edge_of_a_bucket_belongs_to_the_shorter_ones(edge: float) -> None:
    costs = costs_of((edge, 100.0 * edge), (edge + 0.01, 10.0 * edge))
    assert costs.estimate_ms(edge) == pytest.approx(100.0 * edge, rel=1e-3)
    assert costs.estimate_ms(edge + 0.02) == pytest.approx(10.0 * edge, rel=0.05)


@pytest.mark.parametrize(("slow", "expected"), [(2, 10.0), (3, 90.0)])
def test_an_estimate_is_what_95_of_100_runs_do_not_exceed(slow: int, expected: float) -> None:
    costs = costs_of(*[(2.0, 10.0)] * (OBSERVED - slow), *[(2.0, 90.0)] * slow)
    assert costs.estimate_ms(2.0) == pytest.approx(expected)


def test_runs_of_long_ago_are_forgotten() -> None:
    costs = costs_of(*[(2.0, 900.0)] * OBSERVED)
    for _ in range(OBSERVED):
        costs.observe(2.0, 10.0)
    assert costs.estimate_ms(2.0) == pytest.approx(10.0)


@pytest.mark.parametrize(("calm", "expected"), [(CALM - 1, 900.0), (CALM, 10.0)])
def test_what_was_measured_on_a_busy_machine_is_not_believed_for_long(calm: int, expected: float) -> None:
    costs = costs_of(*[(2.0, 900.0)] * 20, *[(2.0, 10.0)] * calm)
    assert costs.estimate_ms(2.0) == pytest.approx(expected)


def test_a_machine_that_becomes_busy_is_believed_as_soon_as_before() -> None:
    costs = costs_of(*[(2.0, 10.0)] * (OBSERVED - 3), *[(2.0, 900.0)] * 3)
    assert costs.estimate_ms(2.0) == pytest.approx(900.0)


@given(RUNS)
def test_an_estimate_is_among_the_costs_observed_of_its_bucket(runs: list[tuple[float, float]]) -> None:
    costs = costs_of(*runs)
    for low, high in pairwise((0.0, *BUCKETS_S)):
        rates = [ms / max(seconds, 0.5) for seconds, ms in runs if low < seconds <= high]
        if rates and high < BUCKETS_S[-1]:
            assert min(rates) * high - 0.01 * high <= costs.estimate_ms(high) <= max(rates) * high + 0.01 * high


@given(RUNS, SECONDS, SECONDS)
def test_in_a_bucket_what_is_longer_costs_no_less(runs: list[tuple[float, float]], one: float, other: float) -> None:
    costs, (short, long) = costs_of(*runs), sorted((one, other))
    same = not any(short <= edge < long for edge in BUCKETS_S[:-1])
    assert not same or costs.estimate_ms(short) <= costs.estimate_ms(long)


@pytest.mark.parametrize(
    ("ms_per_s", "budget_ms", "expected"),
    [(1.0, 300, 30.0), (10.0, 300, 30.0), (15.0, 300, 20.0), (20.0, 310, 15.5), (37.5, 300, 8.0), (500.0, 300, 8.0)],
)
def test_a_segment_may_be_as_long_as_can_be_decoded_in_time_8_to_30_s(
    ms_per_s: float, budget_ms: float, expected: float
) -> None:
    costs = costs_of(*[(edge, ms_per_s * edge) for edge in BUCKETS_S])
    assert LatencyBudget(budget_ms).longest_s(costs) == costs.longest_s(budget_ms) == expected


@given(RUNS, st.floats(1, 5_000), st.floats(0.5, 10), st.floats(10, 40))
def test_the_longest_segment_keeps_to_its_bounds_and_to_the_budget_if_any_can(
    runs: list[tuple[float, float]], budget_ms: float, shortest: float, longest: float
) -> None:
    costs = costs_of(*runs)
    found = costs.longest_s(budget_ms, shortest, longest)
    assert shortest <= found <= longest
    assert found == shortest or costs.estimate_ms(found) <= budget_ms


@pytest.mark.parametrize(
    ("cost_ms", "since_last_ms", "allowed"),
    [(0, 299, False), (0, 300, True), (150, 300, True), (151, 300, False), (151, 302, True), (1_000, 1_999, False)],
)
def test_partials_come_at_their_interval_and_take_half_of_the_time_at_most(
    cost_ms: float, since_last_ms: float, allowed: bool
) -> None:
    assert LatencyBudget(300).allows_partial(cost_ms, since_last_ms, interval_ms=300) is allowed


@pytest.mark.parametrize(("backlog_ms", "allowed"), [(0, True), (300, True), (300.1, False), (math.inf, False)])
def test_a_pause_is_decoded_at_once_unless_others_wait_longer_than_the_budget(backlog_ms: float, allowed: bool) -> None:
    assert LatencyBudget(300).allows_early(backlog_ms) is allowed


QUEUED = {"endpoint": 9_000.0, "queue": 400.0, "features": 3.0, "model": 50.0, "response": 460.0, "total": 9_460.0}
SLOW = {**QUEUED, "queue": 1.0, "model": 800.0, "response": 801.0}


def watched(pattern: str, share: float = 0.1) -> tuple[LateWatch, list[bool]]:
    """Return a watch after `.` in time, `q` late in the queue and `m` late in the model; and whether it changed."""
    watch = LateWatch(share)
    return watch, [watch.add(SLOW if mark == "m" else QUEUED, mark != ".") for mark in pattern]


@pytest.mark.parametrize(
    ("pattern", "share", "why"),
    [
        ("", 0.1, ""),
        ("....................", 0.1, ""),
        ("qqqq", 0.1, ""),
        ("qqqqq", 0.1, "5 of the last 5 transcripts were late, most because of: queue"),
        ("....q", 0.1, ""),
        ("...qq", 0.1, "2 of the last 5 transcripts were late, most because of: queue"),
        (".........q", 0.1, ""),
        ("........qq", 0.1, "2 of the last 10 transcripts were late, most because of: queue"),
        ("qq" + "." * 18, 0.1, ""),
        ("." * 17 + "mqm", 0.1, "3 of the last 20 transcripts were late, most because of: model"),
        ("." * 40 + "qqq", 0.1, "3 of the last 20 transcripts were late, most because of: queue"),
        ("." * 17 + "qqq", 0.5, ""),
        ("q", 0.0, ""),
        ("q" * JUDGED + "." * (FEW - 1), 0.1, "16 of the last 20 transcripts were late, most because of: queue"),
        ("q" * JUDGED + "." * FEW, 0.1, ""),
        ("q" * JUDGED + "." * FEW + "q", 0.1, ""),
        ("q" * JUDGED + "." * FEW + "q...q", 0.1, "2 of the last 5 transcripts were late, most because of: queue"),
        ("." * 17 + "qqq" + "....q....q....q", 0.1, "6 of the last 20 transcripts were late, most because of: queue"),
        ("." * 17 + "qqq" + "....q" + "." * 5, 0.1, ""),
        ("qqqqq" + "...q" * 5, 0.5, "5 of the last 20 transcripts were late, most because of: queue"),
        ("qqqqq", 1.0, ""),
    ],
)  # fmt: skip
def test_too_many_late_ones_are_told_with_the_stage_to_blame(pattern: str, share: float, why: str) -> None:
    assert watched(pattern, share)[0].why == why


def test_what_is_long_ago_is_not_told_any_more() -> None:
    clock = Clock()
    watch = LateWatch(0.1, clock)
    for _ in range(FEW):
        watch.add(QUEUED, True)
    clock.now += MEMORY_S
    assert watch.why
    clock.now += 0.1
    assert not watch.why, "nobody has spoken since"
    assert not watch.add(QUEUED, True)
    assert not watch.why, "and one is not many"


def test_the_wait_before_the_sound_was_looked_at_is_part_of_the_response_and_can_be_blamed() -> None:
    marks = dataclasses.replace(MARKS, heard_at=MARKS.segment_ended_at + 2.0)
    settled = LatencyBudget(300).settle(transcript(marks), MARKS.segment_ended_at + 2.1)
    assert settled.latency_ms["capture"] == pytest.approx(2_000)
    assert settled.latency_ms["response"] == pytest.approx(2_100)
    assert settled.within_budget is False
    watch = LateWatch(0.1)
    for _ in range(FEW):
        watch.add(settled.latency_ms, True)
    assert watch.why.endswith("because of: capture")


def test_once_told_it_takes_five_in_time_to_be_well_again_not_a_lesser_share() -> None:
    watch, _ = watched("." * 17 + "qqq" + "....q" * 3 + "....")
    assert watch.why
    watch.add(QUEUED, False)
    assert not watch.why


def test_that_it_begins_or_ends_is_told_once() -> None:
    _, changes = watched("qqqqqq" + "." * 8)
    assert [k for k, changed in enumerate(changes) if changed] == [4, 10]


@given(st.text("q.", max_size=60), st.floats(0, 1))
def test_a_watch_says_it_changed_whenever_it_did_and_is_well_after_five_in_time(pattern: str, share: float) -> None:
    watch, told = LateWatch(share), ""
    for k, mark in enumerate(pattern, 1):
        assert watch.add(QUEUED, mark == "q") == (bool(watch.why) != bool(told))
        told = watch.why
        assert not (told and "q" not in pattern[max(0, k - FEW) : k])


def test_neither_the_pause_nor_the_sums_are_to_blame() -> None:
    watch = LateWatch(0.1)
    for _ in range(FEW):
        watch.add({"endpoint": 5_000.0, "response": 400.0, "total": 5_400.0}, True)
    assert watch.why == "5 of the last 5 transcripts were late, most because of: response"
