"""A subscriber's order of transcripts: each once, in order, gaps filled by replay, and known where they stay."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_asr import subscribe
from edge_asr.subscribe import NO_ANSWER, NOT_KEPT, RETRY_S, Delivery, Event, Follower, Gap, Ids, Replay

EPOCH_MS = 1_750_000_000_000


def identifier(milliseconds: int) -> str:
    """A UUIDv7 of that many milliseconds after the tests' beginning."""
    digits = f"{EPOCH_MS + milliseconds:012x}"
    return f"{digits[:8]}-{digits[8:]}-7000-8000-000000000000"


def row(seq: int | None, *, at_ms: int | None = None) -> dict[str, Any]:
    return {"seq": seq, "id": identifier(1000 * (seq or 0) if at_ms is None else at_ms), "text": f"t{seq}"}


def shown(events: Iterable[Event]) -> list[Any]:
    """Deliveries as their numbers, the rest as it is."""
    return [event.transcript["seq"] if isinstance(event, Delivery) else event for event in events]


def result(first: int, last: int, rows: int, **keys: object) -> dict[str, object]:
    return {"ok": True, "rows": rows, "from_seq": first, "to_seq": last, **keys}


NONE_KEPT = {"ok": True, "rows": 0, "from_seq": None, "to_seq": None}


def test_transcripts_are_delivered_as_they_come_and_each_once() -> None:
    follower = Follower()
    assert shown(follower.feed(json.dumps(row(5)), 0)) == [5]
    assert shown(follower.feed(json.dumps(row(6)).encode(), 0)) == [6]
    assert shown(follower.feed(row(6), 0)) == []
    assert shown(follower.feed(row(5), 0)) == []
    assert shown(follower.feed(row(7), 0)) == [7]


def test_what_comes_behind_a_gap_waits_until_the_replay_has_filled_it() -> None:
    follower = Follower(next_seq=5)
    assert shown(follower.feed(row(7), 0)) == [Replay(5)]
    assert shown(follower.feed(row(9), 0)) == []
    assert json.loads(Replay(5).payload) == {"from_seq": 5}
    assert shown(follower.answer(result(5, 9, 5), 0)) == []
    assert shown(follower.feed(row(5), 0)) == [5]
    assert follower.waiting == 2
    assert shown(follower.feed(row(6), 0)) == [6, 7]
    assert shown(follower.feed(row(7), 0)) == []
    assert shown(follower.feed(row(8), 0)) == [8, 9]
    assert shown(follower.feed(row(10), 0)) == [10]
    assert shown(follower.tick(100)) == []


def test_what_the_appliance_no_longer_keeps_is_a_gap() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    assert shown(follower.answer(result(8, 9, 2), 0)) == [Gap(5, 7, NOT_KEPT)]
    assert shown(follower.feed(row(8), 0)) == [8, 9]


def test_a_number_that_was_never_used_is_known_once_all_others_are_there() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    assert shown(follower.answer(result(5, 9, 3), 0)) == []
    assert shown(follower.feed(row(5), 0)) == [5]
    assert shown(follower.feed(row(7), 0)) == [Gap(6, 6, NOT_KEPT), 7, Gap(8, 8, NOT_KEPT), 9]


def test_rows_may_come_before_the_answer() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    assert shown([event for seq in (5, 6, 8) for event in follower.feed(row(seq), 0)]) == [5, 6]
    assert shown(follower.answer(result(5, 9, 4), 0)) == [Gap(7, 7, NOT_KEPT), 8, 9]


def test_nothing_is_kept_at_all() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    assert shown(follower.answer(NONE_KEPT, 0)) == [Gap(5, 8, NOT_KEPT), 9]
    assert shown(follower.connected(10)) == [Replay(10)]
    assert shown(follower.answer(NONE_KEPT, 10)) == []
    assert shown(follower.tick(100)) == []


def test_that_nothing_is_kept_says_nothing_of_what_was_published_later() -> None:
    follower = Follower(next_seq=5)
    follower.connected(0)
    follower.feed(row(9), 0)
    assert shown(follower.answer(NONE_KEPT, 0)) == [Replay(5)]


def test_on_every_connect_it_asks_for_what_it_has_missed() -> None:
    follower = Follower()
    assert follower.connected(0) == []
    follower.feed(row(5), 0)
    assert follower.connected(0) == [Replay(6)]


def test_an_answer_to_the_request_of_somebody_else_proves_nothing() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    assert shown(follower.answer(result(8, 9, 2, asked=8), 0)) == []
    assert shown(follower.answer(result(5, 9, 5, asked=5), 0)) == []
    assert shown([event for seq in (5, 6, 7, 8) for event in follower.feed(row(seq), 0)]) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b'{"ok": false, "why": "there is no command replay"}',
        b'{"ok": true}',
        b'{"ok": true, "rows": true, "from_seq": "x", "to_seq": -1}',
        b"[" * 100_000,
    ],
)
def test_an_answer_that_says_nothing_changes_nothing(answer: bytes) -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    assert shown(follower.answer(answer, 0)) == []
    assert shown(follower.tick(RETRY_S)) == [Replay(5)]


def test_a_replay_that_stops_half_way_is_asked_for_again() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    follower.answer(result(5, 9, 5), 1)
    follower.feed(row(5), 4)
    assert shown(follower.tick(RETRY_S + 3)) == []
    assert shown(follower.tick(RETRY_S + 4)) == [Replay(6)]


def test_new_transcripts_do_not_put_off_the_next_attempt() -> None:
    follower = Follower(next_seq=5)
    for seq in range(9, 20):
        follower.feed(row(seq), seq - 9)
    assert shown(follower.tick(RETRY_S)) == [Replay(5)]


def test_an_appliance_that_lives_and_never_answers_holds_nothing_back_for_ever() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    follower.feed(row(11), 1)
    events: list[Event] = []
    for second in range(2, 60):
        follower.alive(second)
        events += follower.tick(second)
    assert shown(events) == [*[Replay(5)] * 4, Gap(5, 8, NO_ANSWER), 9, Gap(10, 10, NO_ANSWER), 11]


def test_an_appliance_that_restarts_again_and_again_is_not_one_that_does_not_answer() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    events: list[Event] = []
    for second in range(1, 600):
        follower.alive(second)
        events += follower.tick(second)
        events += follower.connected(second) if second % 10 == 0 else []
    assert set(events) == {Replay(5)}


def test_an_appliance_that_is_away_is_waited_for() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    events = [event for second in range(1, 600) for event in follower.tick(second)]
    assert set(events) == {Replay(5)}


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscribe, "HELD_LIMIT", 3)
    follower = Follower(next_seq=1)
    events = [event for seq in (3, 4, 6, 8) for event in follower.feed(row(seq), 0)]
    assert [event.first for event in events if isinstance(event, Gap)] == [1]
    assert [seq for seq in shown(events) if isinstance(seq, int)] == [3, 4]
    assert follower.waiting == 2


def test_what_has_no_number_is_delivered_at_once_and_once() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(9), 0)
    assert shown(follower.feed(row(None, at_ms=1), 0)) == [None]
    assert shown(follower.feed(row(None, at_ms=1), 0)) == []


def test_what_got_its_number_later_is_not_delivered_again() -> None:
    follower = Follower(next_seq=5)
    follower.feed(row(None, at_ms=1), 0)
    assert shown(follower.feed(row(5, at_ms=1), 0)) == []
    assert shown(follower.feed(row(6), 0)) == [6]


def test_an_appliance_that_counts_anew_is_followed() -> None:
    follower = Follower(next_seq=5000, newest_id=identifier(0))
    assert shown(follower.feed(row(3, at_ms=120_000), 0)) == [Replay(1)]
    follower.answer(result(1, 3, 3), 0)
    assert shown(follower.feed(row(1, at_ms=100_000), 0)) == [1]
    assert shown(follower.feed(row(2, at_ms=110_000), 0)) == [2, 3]


def test_an_old_transcript_that_is_published_again_is_not_taken_for_that() -> None:
    follower = Follower(next_seq=5000, newest_id=identifier(5_000_000))
    assert shown(follower.feed(row(3), 0)) == []
    assert shown(Follower(next_seq=100).feed(row(3), 0)) == []  # nothing is known of what was delivered


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xff", b"null", b"[]", b"{}", b'{"seq": 1}', b'{"seq": "1", "id": "a"}', b'{"seq": 0, "id": "a"}',
     b'{"seq": true, "id": "a"}', b'{"seq": 1.0, "id": "a"}', b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_transcript_is_ignored(payload: bytes) -> None:
    assert Follower().feed(payload, 0) == []


def test_an_id_that_is_no_uuid_is_one_all_the_same() -> None:
    follower = Follower()
    assert shown(follower.feed({"seq": 1, "id": "x"}, 0)) == [1]
    assert shown(follower.feed({"seq": 1, "id": "y"}, 0)) == []


def test_only_so_many_ids_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscribe, "IDS_LIMIT", 2)
    ids = Ids()
    assert [ids.add(name) for name in "aabca"] == [True, False, True, True, True]


class Appliance:
    """What `cmd/replay` promises: rows in order, and how many; the line to it may lose and repeat."""

    def __init__(self, kept: Mapping[int, dict[str, Any]]) -> None:
        self.kept = kept
        self.line: list[tuple[str, dict[str, Any]]] = []

    def say(self, seq: int) -> None:
        self.line.append(("row", self.kept[seq]))

    def replay(self, from_seq: int, published: int) -> None:
        wanted = [seq for seq in self.kept if from_seq <= seq <= published]
        answer = result(wanted[0], wanted[-1], len(wanted)) if wanted else NONE_KEPT
        self.line.append(("answer", {**answer, "asked": from_seq}))
        self.line += [("row", self.kept[seq]) for seq in wanted]


@settings(deadline=None)
@given(st.data())
def test_over_a_line_that_loses_and_repeats_everything_kept_arrives_once_and_in_order(data: st.DataObject) -> None:
    numbers = sorted(data.draw(st.sets(st.integers(1, 30), min_size=1), label="kept"))
    appliance = Appliance({seq: row(seq) for seq in numbers})
    follower, now, delivered = Follower(next_seq=1), 0.0, list[int]()

    def take(events: Iterable[Event], published: int) -> None:
        for event in events:
            if isinstance(event, Replay):
                appliance.replay(event.from_seq, published)
            elif isinstance(event, Delivery):
                delivered.append(event.transcript["seq"])
            else:
                assert not set(range(event.first, event.last + 1)) & set(numbers)

    def drain(published: int, fates: st.SearchStrategy[str]) -> None:
        while appliance.line:
            kind, content = appliance.line.pop(0)
            for _ in range({"lost": 0, "once": 1, "twice": 2}[data.draw(fates)]):
                take(follower.feed(content, now) if kind == "row" else follower.answer(content, now), published)

    for seq in numbers:
        now += data.draw(st.sampled_from([0.0, 0.1, 7.0]))
        appliance.say(seq)
        drain(seq, st.sampled_from(["once", "once", "once", "lost", "twice"]))
        take(follower.tick(now) if data.draw(st.booleans()) else [], seq)
    for _ in range(4):
        now += 10
        take(follower.connected(now), numbers[-1])
        drain(numbers[-1], st.just("once"))
    assert delivered == numbers
    assert follower.waiting == 0
