"""The latency budget: traces from made-up times."""

from __future__ import annotations

import pytest

from edge_asr.budget import LatencyBudget, RecentResponses
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
    assert list(settled.latency_ms) == ["endpoint", "queue", "features", "model", "response", "total"]
    assert settled.latency_ms == pytest.approx(
        {"endpoint": 400, "queue": 1.5, "features": 2, "model": 20, "response": 250, "total": 650}
    )


def test_endpoint_and_response_make_the_total() -> None:
    trace = LatencyBudget(300).settle(transcript(MARKS), now=107.3).latency_ms
    assert trace["endpoint"] + trace["response"] == pytest.approx(trace["total"])


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
