"""The bench of false text: its sounds, what it counts, and one short run of the whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled import sound_of

from bench import false_sounds, false_text
from bench.false_sounds import MINUTE, Sound
from bench.false_text import BABBLE, COMMANDS, FOREIGN, MANDARIN, MUSIC, Heard
from edge_asr.answers import Gates
from edge_asr.speech.segmenter import Rules
from edge_asr.speech.wake_phrase import WakePhrase
from edge_asr.types import SAMPLE_RATE, Recognition, Samples, Segment, Token, new_segment_id

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
Maker = Callable[[int], Iterator[Sound]]
SOUNDS: dict[str, Maker] = {
    BABBLE: lambda seed: false_sounds.babble(seed, 1, None),
    FOREIGN: lambda seed: false_sounds.foreign(seed, 1, None),
    MANDARIN: lambda seed: false_sounds.mandarin(seed, 1, None),
}


def level(samples: Samples) -> float:
    return float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-12))


def levels(samples: Samples) -> list[float]:
    """Return the level of each tenth of a second."""
    return [level(part) for part in np.split(samples, len(samples) // 1600)]


# The sounds


@pytest.mark.slow
def test_music_is_loud_and_pauses_and_is_the_same_again() -> None:
    first, second = false_sounds.music(3, 2)
    assert len(first.samples) == len(second.samples) == MINUTE
    assert np.array_equal(first.samples, next(false_sounds.music(3, 2)).samples)
    assert not np.array_equal(first.samples, second.samples)
    assert not np.array_equal(first.samples, next(false_sounds.music(4, 2)).samples)
    assert first.expected is None
    assert -45 < level(first.samples) < -10
    assert min(levels(np.concatenate([first.samples, second.samples]))) < -65


@needs_espeak
@pytest.mark.parametrize(
    "kind", [FOREIGN, pytest.param(BABBLE, marks=pytest.mark.slow), pytest.param(MANDARIN, marks=pytest.mark.slow)]
)
def test_speech_is_loud_and_pauses_and_is_the_same_again(kind: str) -> None:
    [sound] = SOUNDS[kind](5)
    assert len(sound.samples) == MINUTE
    assert sound.expected is None
    assert np.array_equal(sound.samples, next(SOUNDS[kind](5)).samples)
    assert not np.array_equal(sound.samples, next(SOUNDS[kind](6)).samples)
    assert -45 < level(sound.samples) < -10
    assert min(levels(sound.samples)) < -60
    assert np.abs(sound.samples).max() <= 1.01


@needs_espeak
def test_commands_say_what_is_expected() -> None:
    spoken = list(false_sounds.commands(1, 12, None))
    assert len(spoken) == 12
    assert all(sound.expected and 1.6 < len(sound.samples) / SAMPLE_RATE < 8 for sound in spoken)
    assert len({sound.expected for sound in spoken}) > 8
    quiet = [level(sound.samples[: SAMPLE_RATE // 2]) for sound in spoken]
    assert max(quiet[::2]) < -65 < min(quiet[1::2]), "every other one is in noise"


# What is counted


def heard(
    kind: str,
    text: str,
    confidence: float,
    expected: str | None = None,
    sound: int = 0,
    speech_ratio: float = 0.5,
    steadiness: float | None = None,
) -> Heard:
    tokens = tuple(Token(character, 0, 1, confidence) for character in text)
    segment = Segment(new_segment_id(), 0, np.zeros(2 * SAMPLE_RATE, np.float32), 0, speech_ratio, None, None)
    recognition = Recognition(text, tokens, confidence if text else None, steadiness=steadiness)
    return Heard(kind, segment, recognition, sound, expected)


HEARD = [
    heard(MUSIC, "一", 0.9, steadiness=0.7), heard(MUSIC, "", 0.0), heard(MUSIC, "二", 0.9, speech_ratio=0.1),
    heard(FOREIGN, "三", 0.6),
    heard(MANDARIN, "小度小度打开灯", 0.9), heard(MANDARIN, "小肚小豆", 0.3), heard(MANDARIN, "打开灯", 0.9),
    heard(COMMANDS, "打开灯", 0.95, "打开灯", 0), heard(COMMANDS, "关闭灯", 0.7, "关闭灯", 1),
    heard(COMMANDS, "打灯", 0.4, "打开灯", 2),
    heard(COMMANDS, "确认", 0.9, "确认", 3), heard(COMMANDS, "确认", 0.9, "确认", 3),
]  # fmt: skip
MINUTES = {MUSIC: 30, FOREIGN: 120, MANDARIN: 60}
GATES = Gates(min_confidence=0.5, min_speech_ratio=0.3)


def test_the_counts_say_which_gate_dropped_what() -> None:
    music, foreign, mandarin = false_text.counts(HEARD, MINUTES, GATES)
    assert (music["segments"], music["published"], music["per_hour"]) == (3, 1, 2.0)
    assert music["dropped"] == {"empty": 1, "speech_ratio": 1}
    assert (foreign["published"], foreign["per_hour"], foreign["highest_confidence"]) == (1, 0.5, 0.6)
    assert (mandarin["published"], mandarin["dropped"]) == (2, {"confidence": 1})


def test_only_what_is_published_and_begins_with_the_phrase_is_addressed() -> None:
    found = false_text.addressed(HEARD, GATES, WakePhrase(["小度小度"]))
    assert [one.recognition.text for one in found] == ["小度小度打开灯"]


def test_phrases_drawn_from_what_is_said_anyway_are_heard() -> None:
    two, three, four = false_text.alarms(HEARD, 0.5, GATES, ["打", "开", "灯", "关"])
    assert (two["characters"], two["phrases"], two["most"]) == (2, 100, 2.0)
    assert 0 < three["per_hour"] < four["per_hour"] < 2, "打开灯; and 打开灯关 without one, whichever it is"
    assert all(row["above_half"] / row["phrases"] == row["per_hour"] / row["most"] for row in (two, three, four))


def test_a_higher_threshold_costs_right_commands() -> None:
    every = list(false_text.costs(HEARD, MINUTES, GATES))
    rows = {row["min_confidence"]: row for row in every if not row["steadiness"]}
    steady = {row["min_confidence"]: row for row in every if row["steadiness"]}
    assert steady[0.8] == {**rows[0.8], "steadiness": false_text.STEADINESS, MUSIC: 0.0}
    assert (rows[0.0][MUSIC], rows[0.0][FOREIGN], rows[0.0]["right_dropped"]) == (2.0, 0.5, 0)
    assert (rows[0.65][FOREIGN], rows[0.65]["right_dropped"], rows[0.65]["wrong_dropped"]) == (0.0, 0, 1)
    assert (rows[0.8][MUSIC], rows[0.8]["right_dropped"]) == (2.0, 1)
    assert all((row["right"], row["wrong"]) == (2, 1) for row in rows.values()), "two segments are not one command"


# The whole


@needs_espeak
@pytest.mark.slow
def test_a_short_run_writes_every_segment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "heard.json"
    false_text.main(["--minutes", "1", "--commands", "4", "--seed", "5", "--json", str(out)])
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert [row["minutes"] for row in result["counts"]] == [1, 1, 1, 1]
    commands = [one for one in result["heard"] if one["kind"] == COMMANDS]
    assert len(commands) == 4
    assert any(one["text"] == one["expected"] for one in commands)
    for row in result["counts"]:
        gates = [one["gate"] for one in result["heard"] if one["kind"] == row["sound"]]
        assert (len(gates), gates.count(None)) == (row["segments"], row["published"])
    assert "| sound | minutes |" in capsys.readouterr().out


def test_streams_go_on_from_sound_to_sound_and_commands_do_not() -> None:
    class Length:
        def recognize(self, samples: Samples) -> Recognition:
            return Recognition(str(len(samples)), (), 0.5)

        def close(self) -> None:
            pass

    spoken = np.pad(sound_of("01.wav"), (SAMPLE_RATE, 0))
    half = len(spoken) // 2 + 3
    rules = Rules()
    whole = list(false_text.listen(MUSIC, [Sound(np.pad(spoken, (0, SAMPLE_RATE)))], Length(), rules))
    parts = [Sound(spoken[:half]), Sound(np.pad(spoken[half:], (0, SAMPLE_RATE)))]
    assert [one.recognition.text for one in false_text.listen(MUSIC, parts, Length(), rules)] == [
        one.recognition.text for one in whole
    ]
    alone = list(false_text.listen(COMMANDS, [Sound(spoken, "打开客厅灯")] * 2, Length(), rules))
    assert [one.sound for one in alone] == [0, 1]
    assert alone[0].recognition == alone[1].recognition
