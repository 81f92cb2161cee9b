"""Short texts are doubted: decoded again in disturbed sound, where there is time, and believed where that fails."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
from bundled import ENGINES, load, sound_of, transcripts

from edge_asr.errors import EngineError
from edge_asr.steadiness import NOISE_DB, SHIFT, Doubted, disturbed, steadiness
from edge_asr.types import SAMPLE_RATE, Recognition, Samples, Token

SOUND = np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32)


def heard(text: str, confidence: float = 0.9) -> Recognition:
    return Recognition(text, tuple(Token(one, None, None, confidence) for one in text), confidence if text else None)


class Engine:
    """Takes what is asked of it, and answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Samples, Future[Recognition]]] = []

    def submit(self, samples: Samples) -> Future[Recognition]:
        self.asked.append((samples, Future()))
        return self.asked[-1][1]

    def answer(self, number: int, answer: Recognition | Exception) -> None:
        _, future = self.asked[number]
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def doubted(engine: Engine, allowed: bool = True) -> Doubted:
    return Doubted(SOUND, engine.submit, lambda: allowed)


def test_disturbed_sound_is_later_or_has_faint_noise() -> None:
    later, noisy = disturbed(SOUND)
    assert np.array_equal(later[SHIFT:], SOUND)
    assert not later[:SHIFT].any()
    noise = noisy - SOUND
    assert 20 * np.log10(SOUND.std() / noise.std()) == pytest.approx(NOISE_DB, abs=0.1)
    assert later.dtype == noisy.dtype == np.float32
    assert np.array_equal(disturbed(SOUND)[1], noisy), "the same sound is judged the same"


def test_silence_stays_silent() -> None:
    assert not disturbed(np.zeros(9, np.float32))[1].any()


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([heard("取消", 0.8), heard("取消", 0.95)], 0.8),
        ([heard("取消", 0.95)] * 2, 0.9),
        ([heard("确认"), heard("取消")], 0),
    ],
)
def test_a_text_is_as_steady_as_the_least_sure_decode(others: list[Recognition], expected: float) -> None:
    assert steadiness(heard("取消", 0.9), others) == expected


@pytest.mark.parametrize("text", ["", "打开客厅灯"])
def test_a_long_text_and_none_are_believed_at_once(text: str) -> None:
    engine = Engine()
    asked = doubted(engine)
    engine.answer(0, heard(text))
    assert asked.result(0) == heard(text)
    assert len(engine.asked) == 1


def test_a_short_text_waits_for_both_answers() -> None:
    engine = Engine()
    asked = doubted(engine)
    engine.answer(0, heard("取消"))
    assert not asked.done()
    engine.answer(2, heard("取消", 0.7))
    assert not asked.done()
    engine.answer(1, heard("取消", 0.8))
    assert asked.result(0).steadiness == 0.7
    assert (asked.result(0).text, asked.result(0).confidence) == ("取消", 0.9)
    assert [len(sound) - len(SOUND) for sound, _ in engine.asked] == [0, SHIFT, 0]


def test_nobody_doubts_where_there_is_no_time() -> None:
    engine = Engine()
    asked = doubted(engine, allowed=False)
    engine.answer(0, heard("取消"))
    assert asked.result(0).steadiness is None
    assert len(engine.asked) == 1


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_what_cannot_be_asked_again_is_believed(how: str) -> None:
    engine = Engine()
    asked = doubted(engine)
    engine.answer(0, heard("取消"))
    if how == "failed":
        engine.answer(1, EngineError("on purpose"))
    else:
        engine.asked[1][1].cancel()
    assert not asked.done()
    engine.answer(2, heard("确认"))
    assert asked.result(0) == heard("取消")


def test_a_failure_is_told() -> None:
    engine = Engine()
    asked = doubted(engine)
    engine.answer(0, EngineError("on purpose"))
    with pytest.raises(EngineError, match="on purpose"):
        asked.result(0)


def test_it_is_cancelled_as_long_as_the_recognition_is_not_begun() -> None:
    engine = Engine()
    waiting, running = doubted(engine), doubted(engine)
    assert waiting.cancel()
    assert waiting.cancelled()
    engine.asked[1][1].set_running_or_notify_cancel()
    assert not running.cancel()
    engine.answer(1, heard("打开客厅灯"))
    assert running.result(0).text == "打开客厅灯"


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_bundled_model_knows_is_steady(engine: str) -> None:
    short = [name for name, text in transcripts().items() if len(text) <= 4]
    assert short
    recognizer = load(engine)
    for name in short:
        found = recognizer.recognize(sound_of(name))
        assert steadiness(found, [recognizer.recognize(sound) for sound in disturbed(sound_of(name))]) > 0.8
