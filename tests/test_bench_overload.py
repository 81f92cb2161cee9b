"""The bench of overloads: its voices make the load that is asked for, and its report finds whatever goes wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench is not part of the package

from bench.overload import (
    AROUND,
    RULES,
    SCALE,
    Arrival,
    Beat,
    Metered,
    Observed,
    Phase,
    Sample,
    Sentence,
    Setting,
    main,
    plan,
)
from bench.overload_report import figures, most_waiting_of_one_s, most_waiting_s
from edge_asr.errors import InterruptedRunError
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, Marks, SegmentId, Transcript

SETTING = Setting((Phase(0.5, 10), Phase(2.0, 20), Phase(0.5, 10)), streams=4, cost=1.0, max_backlog_s=10)
SENTENCES = [Sentence(1, 100, 30, 0), Sentence(2, 200, 50, 6), Sentence(3, 500, 30, 0)]


@given(st.integers(0, 1_000), st.integers(4, 20), st.floats(0.2, 3.0))
def test_voices_say_as_much_as_the_load_wants(seed: int, streams: int, load: float) -> None:
    cost = load / streams / 0.7
    said = plan(Setting((Phase(0.5 * load, 30), Phase(load, 60)), streams, cost, 10, seed=seed))
    for start_s, seconds, wanted in ((0, 30, 0.5 * load), (30, 60, load)):
        work_s = sum(
            sentence.segment_s * cost
            for voice in said
            for sentence in voice
            if start_s <= sentence.start * CHUNK_S < start_s + seconds
        )
        longest_s = 4.0 * cost * streams  # a voice may begin a sentence now or a little later
        assert work_s == pytest.approx(wanted * seconds, abs=longest_s)


@given(st.integers(0, 1_000))
def test_between_sentences_a_segment_ends_and_within_one_it_does_not(seed: int) -> None:
    for voice in plan(dataclasses.replace(SETTING, seed=seed)):
        assert [sentence.number for sentence in voice] == list(range(1, len(voice) + 1))
        for before, after in pairwise(voice):
            assert after.start - (before.start + before.length) >= RULES.endpoint + AROUND
        for sentence in voice:
            assert sentence.pause < RULES.endpoint
            assert sentence.sounds_at(sentence.start)
            assert sentence.sounds_at(sentence.start + sentence.length - 1)
            assert not sentence.sounds_at(sentence.start + sentence.length)


def test_too_few_voices_for_a_load_are_refused() -> None:
    with pytest.raises(ValueError, match="4 streams cannot make so much load; take more"):
        plan(dataclasses.replace(SETTING, phases=(Phase(3.1, 10),)))


def test_the_recogniser_tells_the_sentence_by_its_number_and_can_be_interrupted() -> None:
    samples = np.zeros(10 * CHUNK_SAMPLES, np.float32)
    samples[3 * CHUNK_SAMPLES] = 1_234 * SCALE
    recognizer = Metered(0.001)
    assert recognizer.recognize(samples).text == "1234"
    recognizer.interrupt()
    with pytest.raises(InterruptedRunError):
        recognizer.recognize(samples)
    recognizer.resume()
    assert recognizer.recognize(samples).text == "1234"
    assert len(recognizer.runs) == 3


def arrival(sentence: Sentence, waited_s: float = 0.1, source: str = "voice 0") -> Arrival:
    """Return the transcript of a sentence, so long after its segment ended; the run began at 0."""
    start, end_s = sentence.start - RULES.pre_roll, (sentence.start + sentence.length + RULES.endpoint) * CHUNK_S
    return Arrival(
        end_s + waited_s,
        Transcript(
            id=SegmentId(f"{source} {sentence.number}"),
            device="bench",
            source=source,
            text=str(sentence.number),
            text_raw=str(sentence.number),
            confidence=1.0,
            started_at=None,
            offset_s=start * CHUNK_S,
            duration_s=sentence.segment_s,
            tokens=(),
            latency_ms={},
            within_budget=waited_s <= 0.3,
            decoded_at_pause=False,
            model="metered",
            engine="metered",
            marks=Marks(end_s - 0.4, end_s),
        ),
        "too late" if waited_s > 0.3 else "",
    )


def lost(sentence: Sentence, waited_s: float) -> Arrival:
    found = arrival(sentence, waited_s)
    return dataclasses.replace(found, transcript=dataclasses.replace(found.transcript, lost=True, text=""))


def changed(sentence: Sentence, waited_s: float = 0.1, **fields: object) -> Arrival:
    found = arrival(sentence, waited_s)
    return dataclasses.replace(found, transcript=dataclasses.replace(found.transcript, **fields))  # type: ignore[arg-type]


def observed(*arrivals: Arrival, gated: int = 0) -> Observed:
    samples = [Sample(0.0, 50_000_000, 0.0), Sample(1.0, 90_000_000, 700.4), Sample(2.0, 60_000_000, 10.0)]
    said = [SENTENCES, [], [], []]
    return Observed(
        SETTING,
        said,
        0.0,
        list(arrivals),
        samples,
        segments=3,
        gated=gated,
        runs=[(9.0, 8.0), (11.0, 1.5), (20.0, 3.0)],
    )


WELL = [arrival(sentence) for sentence in SENTENCES]


def test_nothing_is_wrong_where_all_is_well() -> None:
    found = figures(observed(*WELL))
    wrong = ("lost", "late", "late_without_flag", "out_of_order", "silent", "doubled", "wrong_text", "all_in_time_s")
    assert {key: found[key] for key in wrong} == dict.fromkeys(wrong, 0)
    assert (found["sentences"], found["transcripts"]) == (3, 3)
    assert (found["mb_before"], found["mb_most"], found["mb_after"]) == (50, 90, 60)
    assert found["most_backlog_ms"] == 700
    assert found["busy_share"] == pytest.approx(4.5 / 20, abs=1e-3)


@pytest.mark.parametrize(
    ("arrivals", "wrong"),
    [
        (WELL[:2], {"silent": 1, "transcripts": 2}),
        ([WELL[1], WELL[0], WELL[2]], {"out_of_order": 1}),
        ([*WELL, WELL[2]], {"doubled": 1, "out_of_order": 1, "transcripts": 4}),
        ([*WELL[:2], lost(SENTENCES[2], 3.0)], {"lost": 1, "transcripts": 2}),
        ([*WELL[:2], arrival(SENTENCES[2], 3.0)], {"late": 1}),
        ([*WELL[:2], changed(SENTENCES[2], 3.0, within_budget=True)], {"late_without_flag": 1}),
        ([*WELL[:2], changed(SENTENCES[2], text="2")], {"wrong_text": 1}),
        ([*WELL[:2], changed(SENTENCES[2], duration_s=0.5)], {"silent": 1, "doubled": 1, "wrong_text": 1}),
        ([*WELL[:2], changed(SENTENCES[2], offset_s=505 * CHUNK_S)], {"silent": 1, "doubled": 1, "wrong_text": 1}),
        ([*WELL[:2], changed(SENTENCES[2], offset_s=20.0)], {"silent": 1, "doubled": 1, "wrong_text": 1}),
    ],
    ids=[
        "silent",
        "order",
        "doubled",
        "lost",
        "late",
        "late without a word",
        "text",
        "cut off",
        "begun late",
        "of nothing",
    ],
)
def test_what_is_wrong_is_found(arrivals: list[Arrival], wrong: dict[str, int]) -> None:
    well, found = figures(observed(*WELL)), figures(observed(*arrivals))
    counted = ("transcripts", "lost", "late", "late_without_flag", "out_of_order", "silent", "doubled", "wrong_text")
    assert {key: found[key] for key in counted if found[key] != well[key]} == wrong


def test_what_nothing_was_recognised_in_is_not_silent() -> None:
    assert figures(observed(*WELL[:2], gated=1))["silent"] == 0


def test_of_a_model_neither_text_nor_work_is_known() -> None:
    seen = observed(*WELL[:2], changed(SENTENCES[2], text="?", engine="onnx-int8"))
    found = figures(dataclasses.replace(seen, runs=[]))
    assert found["wrong_text"] == 0
    assert "busy_share" not in found


def test_a_recogniser_is_held_back_where_the_voices_are() -> None:
    beat = Beat(0.1)
    beat.enter()
    beat.reach(0)
    recognizer, samples = Metered(10.0, beat), np.zeros(CHUNK_SAMPLES, np.float32)
    run = threading.Thread(target=recognizer.recognize, args=(samples,), daemon=True)  # 320 ms: four chunks
    run.start()
    for chunk in range(1, 4):
        beat.reach(chunk)
    run.join(0.5)
    assert run.is_alive()
    beat.reach(4)
    run.join(20)
    assert not run.is_alive()
    assert (beat.seconds, beat.at(0.0), beat.at(time.monotonic())) == pytest.approx((0.5, 0.0, 0.5))
    beat.leave()
    assert beat.seconds == math.inf


def test_sentences_that_wait_at_the_same_time_are_added_up() -> None:
    together = [arrival(SENTENCES[0], 5.0), arrival(SENTENCES[1], 0.5), arrival(SENTENCES[1], 0.5, "voice 1")]
    seconds = [sentence.segment_s for sentence in SENTENCES]
    assert most_waiting_s(WELL) == pytest.approx(max(seconds))
    assert most_waiting_s(together) == pytest.approx(seconds[0] + 2 * seconds[1])
    assert most_waiting_of_one_s(together) == pytest.approx(seconds[0] + seconds[1])
    assert most_waiting_s([]) == most_waiting_of_one_s([]) == 0


def test_being_well_again_is_counted_from_the_end_of_the_overload() -> None:
    over = [Sentence(number, int(at / CHUNK_S), 25, 0) for number, at in enumerate((27.0, 29.0, 32.0, 35.0), 1)]
    arrivals = [arrival(over[0], 4.0), arrival(over[1], 3.0), arrival(over[2], 0.2), arrival(over[3], 0.2)]
    found = figures(dataclasses.replace(observed(*arrivals), plan=[over, [], [], []]))
    ends_s = [(sentence.start + sentence.length + RULES.endpoint) * CHUNK_S - 30 for sentence in over]
    assert found["all_in_time_s"] == found["state_well_s"] == pytest.approx(ends_s[1] + 3.0, abs=0.06)
    assert found["first_in_time_s"] == pytest.approx(ends_s[2] + 0.2, abs=0.06)


def test_a_run_from_the_command_line_prints_its_figures() -> None:
    shown: list[str] = []
    options = {"--load": 0.5, "--seconds": 1, "--before": 0.5, "--after": 0.5, "--streams": 16, "--cost": 0.05}
    main([str(word) for option in options.items() for word in option], shown.append)
    found = json.loads(shown[0])
    assert (found["load"], found["streams"], found["silent"], found["out_of_order"]) == (0.5, 16, 0, 0)
    assert found["mb_before"] > 0
