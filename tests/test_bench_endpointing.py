"""The simulation of endpointing, on tapes that are made up: what is a cut, what is late, what is lost."""

from __future__ import annotations

import random

import numpy as np
import pytest
from bundled import recording, transcripts

from bench.endpointing import PUBLISH_MS, Heard, Listening
from bench.endpointing_report import figures, judgements, presets
from bench.paused import Part, Pause, Tape, recorded, tape
from edge_asr.speech.completeness import ContentEndpoint
from edge_asr.speech.segmenter import Rules
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Chunk, Recognition, Samples

BEFORE, AFTER = 20, 60
"""Chunks of silence."""


class Loud:
    """A detector that hears speech where there is any sound."""

    def __call__(self, chunk: Chunk) -> float:
        return float(np.abs(chunk.samples).max() > 0)

    def reset(self) -> None:
        """Nothing is remembered."""


class Reader:
    """A recogniser that reads the value of the last sound: a number of the texts."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self.asked = 0

    def recognize(self, samples: Samples) -> Recognition:
        self.asked += 1
        return Recognition(self._texts[round(float(samples[samples > 0][-1]) * 10) - 1], (), 1.0)


def spoken(*chunks: int) -> Tape:
    """Return a tape with sound and silence by turns, each so many chunks long: a sentence with pauses inside."""
    values, pauses, position = [np.zeros(BEFORE * CHUNK_SAMPLES)], [], BEFORE
    for number, count in enumerate(chunks):
        if number % 2:
            pauses.append(Pause(position * CHUNK_SAMPLES, (position + count) * CHUNK_SAMPLES, ""))
        values.append(np.full(count * CHUNK_SAMPLES, 0.0 if number % 2 else (number // 2 + 1) / 10))
        position += count
    values.append(np.zeros(AFTER * CHUNK_SAMPLES))
    samples = np.concatenate(values).astype(np.float32)
    return Tape("打开灯", "switch", "nobody", samples, position * CHUNK_SAMPLES, tuple(pauses))


def hear(made: Tape, endpoint: int, texts: list[str], content: bool = True) -> Heard:
    listening = Listening(made, Loud(), Reader(texts))
    return listening.hear(Rules(endpoint=endpoint), ContentEndpoint(endpoint) if content else None)


@pytest.mark.parametrize(("pause", "cut"), [(11, False), (12, True), (14, True)])
def test_a_pause_as_long_as_the_endpoint_is_a_cut(pause: int, cut: bool) -> None:
    assert hear(spoken(10, pause, 10), 12, ["好的", "好的"]).cut == (cut,)


@pytest.mark.parametrize(("text", "cut"), [("打开", False), ("好的", True), ("打开客厅灯", True)])
def test_what_ends_open_is_not_cut(text: str, cut: bool) -> None:
    assert hear(spoken(10, 14, 10), 12, [text, "打开灯"]).cut == (cut,)
    assert hear(spoken(10, 14, 10), 12, [text, "打开灯"], content=False).cut == (True,)


def test_only_the_pauses_that_end_a_segment_are_cuts() -> None:
    assert hear(spoken(10, 6, 10, 13, 10), 12, ["好的"] * 3).cut == (False, True)


@pytest.mark.parametrize(("text", "chunks"), [("打开灯", 5), ("好的", 5), ("打开", 31)])
def test_latency_counts_from_the_end_of_the_sentence(text: str, chunks: int) -> None:
    heard = hear(spoken(10), 5, [text])
    assert (heard.endpoint_ms, heard.total_ms) == (chunks * 32, chunks * 32 + PUBLISH_MS)
    assert (heard.at_pause, heard.text, heard.elsewhere) == (True, text, 0)


class Slow(Listening):
    """Every decode takes 200 ms."""

    def decode(self, start: int, end: int) -> tuple[Recognition, float]:
        return super().decode(start, end)[0], 200.0


def test_a_slow_decode_is_waited_for_and_its_text_counts_once_it_is_there() -> None:
    slow = Slow(spoken(10), Loud(), Reader(["打开灯"]))
    hidden = slow.hear(Rules(endpoint=12), None)
    assert (hidden.endpoint_ms, hidden.total_ms) == (12 * 32, 12 * 32 + PUBLISH_MS)
    waited = slow.hear(Rules(endpoint=5), None)
    assert (waited.endpoint_ms, waited.total_ms) == (5 * 32, 3 * 32 + 200 + PUBLISH_MS)
    # Decoded from chunk 3 on, for 6.25 chunks: chunk 10 is the first that is judged by it.
    assert slow.hear(Rules(endpoint=12), ContentEndpoint(12)).endpoint_ms == 10 * 32


def test_a_sentence_that_falls_apart_elsewhere_is_told() -> None:
    made = spoken(10, 14, 10)
    without = Tape(made.text, made.kind, made.voice, made.samples, made.end, ())
    heard = hear(without, 12, ["好的", "好的"])
    assert heard.elsewhere == 1
    assert figures([heard]).sentences_cut == 1.0


def test_an_end_that_nobody_heard_is_lost() -> None:
    heard = hear(spoken(10, 14, 1), 12, ["好的", "好的"])
    assert (heard.cut, heard.endpoint_ms, heard.total_ms) == ((True,), None, None)


def test_each_sound_is_decoded_once_whatever_is_tried_on_it() -> None:
    reader = Reader(["好的", "好的"])
    listening = Listening(spoken(10, 6, 10), Loud(), reader)
    for endpoint in range(4, 20):
        listening.hear(Rules(endpoint=endpoint), ContentEndpoint(endpoint))
    assert reader.asked == 3  # the first part, the second one, both


def test_figures_count_pauses_and_sentences() -> None:
    heard = [hear(spoken(10, 6, 10, 13, 10), 12, ["好的"] * 3), hear(spoken(10), 12, ["好的"])]
    found = figures(heard)
    assert (found.pauses_cut, found.sentences_cut, found.lost, found.at_pause) == (0.5, 0.5, 0, 1.0)
    assert found.total_ms["p50"] == 12 * 32 + PUBLISH_MS


def test_tables_have_a_row_for_each_case() -> None:
    listening = [Listening(spoken(10, 6, 10), Loud(), Reader(["打开", "打开灯"]))]
    assert len(presets({"alone": listening}).splitlines()) == 2 + 9
    assert "| at pauses inside | 1 | 0.0 % | 0.0 % | 100.0 % | 0.0 % |" in judgements(listening)
    assert "| at ends | 1 | 100.0 % |" in judgements(listening)


def test_a_tape_knows_its_pauses_and_its_end() -> None:
    parts = [Part("打开", np.full(8000, 0.2, np.float32)), Part("灯", np.full(4000, 0.2, np.float32))]
    made = tape(parts, "打开灯", "switch", "nobody", random.Random(1), noise_db=30)
    (pause,) = made.pauses
    assert pause.said == "打开"
    assert 0.2 <= (pause.end - pause.start) / SAMPLE_RATE <= 0.45
    assert made.end == pause.end + 4000
    assert len(made.samples) == made.end + 2 * SAMPLE_RATE
    loud = np.abs(made.samples) > 0.03
    assert not loud[pause.start : pause.end].any()
    assert loud[pause.end : made.end].all()


def test_a_recording_is_cut_open_inside() -> None:
    (made,) = recorded({recording("02.wav"): transcripts()["02.wav"]})
    assert 1 <= len(made.pauses) <= 2
    for pause in made.pauses:
        silence = made.samples[pause.start : pause.end]
        assert np.sqrt(np.square(silence).mean()) < 0.01
