"""What travels: its JSON form as subscribers rely on it, ids and times."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_asr.types import Chunk, Marks, Segment, SegmentId, Token, Transcript, iso_time, new_segment_id

KEYS = [
    "schema", "id", "seq", "device", "source", "text", "text_itn", "text_raw", "language", "confidence", "start", "end",
    "offset_s", "time_synced", "duration_s", "tokens", "latency_ms", "within_budget", "decoded_at_pause", "enforced",
    "model", "engine", "replayed", "age_s",
]  # fmt: skip


def transcript(**changes: Any) -> Transcript:
    made = Transcript(
        id=SegmentId("01930000-0000-7000-8000-000000000000"),
        device="hall",
        source="microphone:USB",
        text="打开客厅灯",
        text_raw="打开客厅灯",
        confidence=0.123456,
        started_at=1_795_328_723.4124,
        offset_s=12.40049,
        duration_s=1.8964,
        tokens=(Token("打", 120, 300, 0.98765), Token("开", None, None, 1.0)),
        latency_ms={"queue": 0.123, "model": 21.456},
        within_budget=True,
        decoded_at_pause=True,
        model="paraformer-tiny",
        engine="onnx-int8",
    )
    return dataclasses.replace(made, **changes)


def test_a_transcript_has_exactly_the_keys_of_its_schema() -> None:
    assert list(transcript().to_json()) == KEYS
    assert list(transcript(started_at=None, confidence=None, offset_s=None, tokens=()).to_json()) == KEYS


def test_a_transcript_is_rendered_with_rounded_numbers() -> None:
    assert transcript(marks=Marks(1.0, 2.0)).to_json() == {
        "schema": "edge_asr.transcript/1",
        "id": "01930000-0000-7000-8000-000000000000",
        "seq": None,
        "device": "hall",
        "source": "microphone:USB",
        "text": "打开客厅灯",
        "text_itn": None,
        "text_raw": "打开客厅灯",
        "language": None,
        "confidence": 0.1235,
        "start": "2026-11-22T06:25:23.412Z",
        "end": "2026-11-22T06:25:25.308Z",
        "offset_s": 12.4,
        "time_synced": None,
        "duration_s": 1.896,
        "tokens": [
            {"text": "打", "start_ms": 120, "end_ms": 300, "confidence": 0.9877},
            {"text": "开", "start_ms": None, "end_ms": None, "confidence": 1.0},
        ],
        "latency_ms": {"queue": 0.12, "model": 21.46},
        "within_budget": True,
        "decoded_at_pause": True,
        "enforced": [],
        "model": "paraformer-tiny",
        "engine": "onnx-int8",
        "replayed": False,
        "age_s": 0.0,
    }


def test_what_cannot_be_known_is_null() -> None:
    unknown = transcript(started_at=None, offset_s=None, confidence=None, within_budget=None).to_json()
    assert {key for key, value in unknown.items() if value is None} == {
        "seq", "text_itn", "language", "confidence", "start", "end", "offset_s", "time_synced", "within_budget",
    }  # fmt: skip


def test_the_json_form_is_json() -> None:
    rendered = transcript().to_json()
    assert json.loads(json.dumps(rendered, ensure_ascii=False, allow_nan=False)) == rendered


def test_a_start_of_zero_is_a_time() -> None:
    assert transcript(started_at=0.0).to_json()["start"] == "1970-01-01T00:00:00.000Z"


@pytest.mark.parametrize(
    "thing",
    [
        Chunk(np.zeros(512, np.float32), 0, 0.0),
        Token("打", None, None, 1.0),
        Marks(0.0, 1.0),
        transcript(),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_travels_is_frozen(thing: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(thing, dataclasses.fields(thing)[0].name, None)


def test_a_segment_knows_its_duration() -> None:
    segment = Segment(new_segment_id(), 0, np.zeros(24_000, np.float32), 0, 0.5, None, Marks(0.0, 0.0))
    assert segment.duration_s == 1.5


# Ids


def test_an_id_is_a_uuid_of_version_7() -> None:
    for _ in range(200):
        parsed = uuid.UUID(new_segment_id())
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)


def test_an_id_begins_with_the_unix_milliseconds() -> None:
    before = time.time_ns() // 1_000_000
    milliseconds = uuid.UUID(new_segment_id()).int >> 80
    assert before <= milliseconds <= time.time_ns() // 1_000_000


def test_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    moments = [now + 1_000_000 * step for step in (0, 1, 2, 1000, 86_400_000)]
    ids = []
    for moment in moments:
        monkeypatch.setattr(time, "time_ns", lambda moment=moment: moment)
        ids.append(new_segment_id())
    assert ids == sorted(ids)


def test_ids_of_one_moment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: moment)
    assert len({new_segment_id() for _ in range(1000)}) == 1000


# Times


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_795_328_723.412, "2026-11-22T06:25:23.412Z"),
        (1_795_328_723.0, "2026-11-22T06:25:23.000Z"),
        (1_795_305_599.9999, "2026-11-21T23:59:59.999Z"),
    ],
)
def test_a_time_is_utc_with_milliseconds(seconds: float, text: str) -> None:
    assert iso_time(seconds) == text


@settings(deadline=None, derandomize=True)
@given(st.floats(0, 4_000_000_000))
def test_times_are_of_one_length_and_sort_as_text(seconds: float) -> None:
    assert len(iso_time(seconds)) == len("2026-11-22T06:12:03.412Z")
    assert iso_time(seconds) <= iso_time(seconds + 0.002)
