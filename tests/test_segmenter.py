"""The segmenter: sequences written by hand with the events they must give, then properties of any sequence.

In a sequence `S` is a chunk of speech, `~` one that is speech only while speech goes on, `.` silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_asr.speech.segmenter import (
    ENDPOINTS,
    POST_ROLL,
    Ended,
    Event,
    Paused,
    Resumed,
    Rules,
    Segmenter,
    Split,
    Started,
)

LEVELS = {"S": 0.9, "~": 0.4, ".": 0.1}


def events(sequence: str | Sequence[float], rules: Rules, finish: bool = False) -> list[tuple[int, Event]]:
    """Return every event with the chunk that it came with; what `finish` gives counts as after the last."""
    segmenter = Segmenter(rules)
    probabilities = [LEVELS[chunk] if isinstance(chunk, str) else chunk for chunk in sequence]
    seen = [(chunk, event) for chunk, p in enumerate(probabilities) for event in segmenter.step(p)]
    return seen + ([(len(probabilities), event) for event in segmenter.finish()] if finish else [])


def rules(
    endpoint: int = 5, pre_roll: int = 2, min_speech: int = 3, max_length: int = 938, threshold: float = 0.5
) -> Rules:
    return Rules(threshold, endpoint, pre_roll, min_speech, max_length)


# Where a segment starts


def test_a_segment_starts_once_enough_chunks_are_speech_and_reaches_back_by_the_pre_roll() -> None:
    assert events("....SSS", rules()) == [(6, Started(2))]


def test_pre_roll_does_not_reach_before_the_first_chunk() -> None:
    assert events(".SSS", rules(pre_roll=9)) == [(3, Started(0))]


def test_pre_roll_does_not_reach_into_the_segment_before() -> None:
    assert events("SSS" + "." * 5 + "SSS", rules(pre_roll=9)) == [
        (2, Started(0)),
        (5, Paused(0, 6, 3)),
        (7, Ended(0, 6, 3)),
        (10, Started(6)),
    ]


def test_shorter_speech_than_min_speech_makes_no_segment() -> None:
    assert events("SS.SS.S..SS", rules(), finish=True) == []


@pytest.mark.parametrize("min_speech", [0, 1])
def test_a_single_chunk_is_enough_where_min_speech_asks_for_no_more(min_speech: int) -> None:
    assert events("...S", rules(min_speech=min_speech)) == [(3, Started(1))]


def test_silence_gives_no_event() -> None:
    assert events("." * 100, rules(), finish=True) == []


def test_nothing_at_all_gives_no_event() -> None:
    assert events("", rules(), finish=True) == []


# Hysteresis


def test_a_middling_chunk_starts_nothing() -> None:
    assert events("~" * 20, rules(), finish=True) == []


def test_speech_goes_on_through_middling_chunks() -> None:
    assert events("SSS" + "~" * 20 + ".....", rules()) == [
        (2, Started(0)),
        (25, Paused(0, 26, 23)),
        (27, Ended(0, 26, 23)),
    ]


def test_middling_chunks_complete_a_start() -> None:
    assert events("..S~~", rules()) == [(4, Started(0))]


def test_a_pause_is_over_with_a_middling_chunk() -> None:
    assert events("SSS...~", rules())[-1] == (6, Resumed())


@pytest.mark.parametrize(
    ("probability", "goes_on"), [(0.55, True), (0.5501, True), (0.5499, False)], ids=["at", "over", "under"]
)
def test_the_lower_threshold_is_0_15_below_the_upper(probability: float, goes_on: bool) -> None:
    seen = events([0.7, 0.7, 0.7, *[probability] * 3], rules(threshold=0.7))
    assert seen == [(2, Started(0)), *([] if goes_on else [(5, Paused(0, 6, 3))])]


# Pause and end


@pytest.mark.parametrize(("preset", "chunks"), [("aggressive", 5), ("default", 12), ("relaxed", 25)])
def test_a_preset_ends_a_segment_after_its_own_number_of_chunks(preset: str, chunks: int) -> None:
    spoken = "..SSSS"
    assert events(spoken + "." * 40, rules(endpoint=ENDPOINTS[preset])) == [
        (4, Started(0)),
        (8, Paused(0, 9, 4)),
        (5 + chunks, Ended(0, 9, 4)),
    ]


def test_a_pause_is_told_when_the_post_roll_has_passed_and_not_before() -> None:
    assert events("SSS..", rules()) == [(2, Started(0))]
    assert events("SSS...", rules()) == [(2, Started(0)), (5, Paused(0, 6, 3))]


def test_a_segment_keeps_the_post_roll_whatever_the_endpoint() -> None:
    ends = {events("SSS" + "." * 30, rules(endpoint=endpoint))[-1][1] for endpoint in (3, 5, 12, 25)}
    assert ends == {Ended(0, 3 + POST_ROLL, 3)}


def test_speech_after_a_pause_resumes_the_segment_and_a_longer_pause_is_told_again() -> None:
    assert events("SSS...SS.....", rules()) == [
        (2, Started(0)),
        (5, Paused(0, 6, 3)),
        (6, Resumed()),
        (10, Paused(0, 11, 5)),
        (12, Ended(0, 11, 5)),
    ]


def test_speech_before_the_post_roll_has_passed_is_no_resumption() -> None:
    assert events("SSS..SS..S..", rules()) == [(2, Started(0))]


def test_one_chunk_resumes_a_segment_however_many_start_one() -> None:
    assert events("SSSSSSSS....S", rules(min_speech=8))[-1] == (12, Resumed())


@pytest.mark.parametrize("endpoint", [1, 2, 3])
def test_an_endpoint_no_longer_than_the_post_roll_pauses_and_ends_at_once(endpoint: int) -> None:
    assert events("SSS......", rules(endpoint=endpoint)) == [
        (2, Started(0)),
        (2 + endpoint, Paused(0, 3 + endpoint, 3)),
        (2 + endpoint, Ended(0, 3 + endpoint, 3)),
    ]


# An endpoint for one pause


def told(sequence: str, at: int, chunks: int) -> list[tuple[int, Event]]:
    """Return the events of a segmenter that is told, before chunk `at`, how long the pause may last."""
    segmenter, seen = Segmenter(rules(endpoint=12)), []
    for chunk, mark in enumerate(sequence):
        if chunk == at:
            segmenter.endpoint_after(chunks)
        seen += [(chunk, event) for event in segmenter.step(LEVELS[mark])]
    return seen


@pytest.mark.parametrize("chunks", [5, 8, 12, 25, 31])
def test_a_pause_lasts_as_long_as_it_is_told_and_the_segment_is_the_same(chunks: int) -> None:
    assert told("SSS" + "." * 40, 6, chunks)[1:] == [(5, Paused(0, 6, 3)), (2 + chunks, Ended(0, 6, 3))]


@pytest.mark.parametrize("chunks", [0, 5, 9])
def test_a_pause_that_has_lasted_longer_than_it_is_told_ends_with_the_next_chunk(chunks: int) -> None:
    assert told("SSS" + "." * 40, 2 + 10, chunks)[-1] == (2 + 10, Ended(0, 6, 3))


def test_speech_in_the_next_chunk_still_resumes_a_segment_that_was_told_to_end() -> None:
    assert told("SSS" + "." * 9 + "S", 12, 5)[-1] == (12, Resumed())


def test_the_next_pause_of_a_segment_goes_by_the_rules_again() -> None:
    assert told("SSS" + "." * 20 + "S" + "." * 40, 6, 31)[2:] == [
        (23, Resumed()),
        (26, Paused(0, 27, 4)),
        (35, Ended(0, 27, 4)),
    ]


def test_the_next_segment_goes_by_the_rules_again() -> None:
    assert told("SSS" + "." * 5 + "SSS" + "." * 12, 6, 5)[-1] == (22, Ended(6, 14, 3))


@pytest.mark.parametrize("at", [1, 4, 5])
def test_what_has_not_paused_cannot_be_told_when_to_end(at: int) -> None:
    assert told("SSS" + "." * 40, at, 31) == told("SSS" + "." * 40, -1, 31)


def test_a_segment_that_is_told_to_wait_ends_all_the_same_where_it_is_too_long() -> None:
    segmenter = Segmenter(rules(endpoint=12, max_length=20))
    seen: list[tuple[int, Event]] = []
    for chunk, mark in enumerate("S" * 14 + "." * 20):
        seen += [(chunk, event) for event in segmenter.step(LEVELS[mark])]
        segmenter.endpoint_after(31)
    assert seen[-1] == (19, Ended(0, 17, 14))


# The end of the source


@pytest.mark.parametrize(("silence", "end"), [(0, 4), (1, 5), (2, 6), (3, 7), (4, 7)])
def test_finish_ends_an_open_segment_with_as_much_post_roll_as_there_is(silence: int, end: int) -> None:
    assert events("SSSS" + "." * silence, rules(), finish=True)[-1] == (4 + silence, Ended(0, end, 4))


def test_finish_after_a_pause_ends_where_the_pause_said() -> None:
    seen = events("SSSS....", rules(), finish=True)
    assert seen[-2:] == [(6, Paused(0, 7, 4)), (8, Ended(0, 7, 4))]


def test_finish_after_the_end_says_nothing_more() -> None:
    assert events("SSSS.....", rules(), finish=True)[-1][0] == 8


# Segments that grow too long


def test_a_long_segment_is_split_after_its_quietest_chunk() -> None:
    sound = [0.9] * 20
    sound[14] = 0.6
    assert events(sound, rules(max_length=20)) == [(2, Started(0)), (19, Split(0, 15, 15))]


def test_the_quietest_chunk_is_sought_in_the_second_half_only() -> None:
    sound = [0.9] * 20
    sound[5], sound[14] = 0.55, 0.6
    assert events(sound, rules(max_length=20))[-1] == (19, Split(0, 15, 15))


def test_the_quietest_chunk_is_sought_in_the_last_three_seconds_only() -> None:
    sound = [0.9] * 300
    sound[180], sound[250] = 0.55, 0.6
    assert events(sound, rules(max_length=300))[-1] == (299, Split(0, 251, 251))


def test_what_follows_a_split_is_a_segment_without_pre_roll() -> None:
    sound = [0.9] * 20
    sound[14] = 0.6
    assert events([*sound, 0.9, *[0.1] * 5], rules(max_length=20))[2:] == [
        (23, Paused(15, 24, 6)),
        (25, Ended(15, 24, 6)),
    ]


def test_a_segment_that_stays_too_long_is_split_again() -> None:
    sound = [0.9] * 40
    sound[14], sound[30] = 0.6, 0.6
    assert events(sound, rules(max_length=20))[1:] == [(19, Split(0, 15, 15)), (34, Split(15, 31, 16))]


def test_a_segment_that_has_paused_when_it_is_too_long_ends() -> None:
    assert events("S" * 16 + "." * 12 + "...SSS", rules(endpoint=12, max_length=20)) == [
        (2, Started(0)),
        (18, Paused(0, 19, 16)),
        (19, Ended(0, 19, 16)),
        (33, Started(29)),
    ]


def test_the_rest_of_a_split_holds_speech_even_where_silence_has_just_begun() -> None:
    assert events("S" * 18 + ".." + "." * 5, rules(max_length=20), finish=True)[1:] == [
        (19, Split(0, 11, 11)),
        (20, Paused(11, 21, 7)),
        (22, Ended(11, 21, 7)),
    ]


# Properties

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)


@st.composite
def any_rules(draw: st.DrawFn) -> Rules:
    """Rules as the configuration allows them: a segment is at least twice as long as pre-roll and start together."""
    pre_roll, min_speech = draw(st.integers(0, 12)), draw(st.integers(0, 6))
    return Rules(
        threshold=draw(st.sampled_from([0.3, 0.5, 0.8])),
        endpoint=draw(st.integers(1, 26)),
        pre_roll=pre_roll,
        min_speech=min_speech,
        max_length=draw(st.integers(max(8, 2 * (pre_roll + min_speech)), 120)),
    )


RUNS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 30)), max_size=20)
"""A sound as runs of chunks of one probability each."""


def chunks_of(runs: Iterable[tuple[float, int]]) -> list[float]:
    return [probability for probability, length in runs for _ in range(length)]


def segments_of(seen: Iterable[tuple[int, Event]]) -> list[Ended | Split]:
    return [event for _, event in seen if isinstance(event, Ended | Split)]


def moved(event: Event, by: int) -> Event:
    match event:
        case Resumed():
            return event
        case Started(start):
            return Started(start + by)
        case _:
            return dataclasses.replace(event, start=event.start + by, end=event.end + by)


@PROPERTY
@given(RUNS, any_rules())
def test_segments_are_in_order_do_not_overlap_and_keep_to_the_longest(
    runs: list[tuple[float, int]], given_rules: Rules
) -> None:
    sound = chunks_of(runs)
    segments = segments_of(events(sound, given_rules, finish=True))
    assert all(0 <= s.start < s.end <= len(sound) for s in segments)
    assert all(s.end - s.start <= given_rules.max_length for s in segments)
    assert all(1 <= s.speech <= s.end - s.start for s in segments)
    assert all(one.end <= next_.start for one, next_ in pairwise(segments))


@PROPERTY
@given(RUNS, any_rules())
def test_all_speech_that_is_long_enough_is_inside_a_segment(runs: list[tuple[float, int]], given_rules: Rules) -> None:
    sound = chunks_of(runs)
    inside = {
        chunk
        for segment in segments_of(events(sound, given_rules, finish=True))
        for chunk in range(segment.start, segment.end)
    }
    for speech, run in groupby(range(len(sound)), key=lambda chunk: sound[chunk] >= given_rules.threshold):
        run_of_chunks = list(run)
        if speech and len(run_of_chunks) >= given_rules.min_speech:
            assert inside.issuperset(run_of_chunks)


@PROPERTY
@given(RUNS, RUNS, any_rules())
def test_after_a_cut_a_segmenter_is_as_a_new_one(
    before: list[tuple[float, int]], after: list[tuple[float, int]], given_rules: Rules
) -> None:
    segmenter = Segmenter(given_rules)
    for probability in chunks_of(before):
        list(segmenter.step(probability))
    segmenter.cut()
    assert not segmenter.paused
    assert segmenter.earliest_needed == len(chunks_of(before))
    seen = [(chunk, event) for chunk, p in enumerate(chunks_of(after)) for event in segmenter.step(p)]
    seen += [(len(chunks_of(after)), event) for event in segmenter.finish()]
    assert [(chunk, moved(event, -len(chunks_of(before)))) for chunk, event in seen] == events(
        chunks_of(after), given_rules, finish=True
    )


@PROPERTY
@given(RUNS, any_rules(), st.integers(0, 40))
def test_other_endpoints_change_when_a_segment_ends_but_neither_its_order_nor_its_post_roll(
    runs: list[tuple[float, int]], given_rules: Rules, chunks: int
) -> None:
    segmenter, pause, floor = Segmenter(given_rules), None, 0
    for probability in chunks_of(runs):
        for event in segmenter.step(probability):
            if isinstance(event, Paused):
                pause = event
                segmenter.endpoint_after(chunks)
            if isinstance(event, Ended | Split):
                assert floor <= event.start < event.end
                floor = event.end
            if isinstance(event, Ended):
                assert pause is not None
                assert (pause.start, pause.end, pause.speech) == (event.start, event.end, event.speech)


@PROPERTY
@given(RUNS, any_rules())
def test_what_may_be_forgotten_is_never_named_again(runs: list[tuple[float, int]], given_rules: Rules) -> None:
    segmenter = Segmenter(given_rules)
    needed = 0
    for probability in chunks_of(runs):
        for event in segmenter.step(probability):
            assert isinstance(event, Resumed) or event.start >= needed
        assert segmenter.earliest_needed >= needed
        needed = segmenter.earliest_needed
    for event in segmenter.finish():
        assert isinstance(event, Resumed) or event.start >= needed


@PROPERTY
@given(st.integers(0, 2000), any_rules())
def test_silence_needs_no_more_than_the_pre_roll_kept(chunks: int, given_rules: Rules) -> None:
    segmenter = Segmenter(given_rules)
    for _ in range(chunks):
        assert not list(segmenter.step(0.0))
    assert chunks - segmenter.earliest_needed <= given_rules.pre_roll


@PROPERTY
@given(RUNS, any_rules())
def test_events_follow_each_other_as_told_and_a_segment_ends_as_its_last_pause_said(
    runs: list[tuple[float, int]], given_rules: Rules
) -> None:
    start: int | None = None
    pause: Paused | None = None
    for _, event in events(chunks_of(runs), given_rules, finish=True):
        match event:
            case Started():
                assert start is None
                start = event.start
            case Paused():
                assert start == event.start
                assert pause is None
                pause = event
            case Resumed():
                assert pause is not None
                pause = None
            case Split():
                assert start == event.start
                assert pause is None
                start = event.end
            case Ended():
                assert start == event.start
                assert pause is None or (pause.start, pause.end, pause.speech) == (event.start, event.end, event.speech)
                start = pause = None
    assert start is None
    assert pause is None
