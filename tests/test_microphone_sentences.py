"""Sentences through the virtual microphone are understood as each is alone: the bench of that, in short."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mosquitto import Mosquitto
from pulse import PulseServer

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench is not part of the package
from bench.microphone import SYNTHETIC, Spoken, judge, measure, record, sentences
from edge_asr.types import SAMPLE_RATE

NOTHING = np.zeros(SAMPLE_RATE, np.float32)
TEXTS = ("打开灯", "一二三", "四五六", "关灯")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="not installed: espeak-ng (Debian: apt install espeak-ng)"
)
def test_ten_sentences_with_pauses_are_heard_as_each_is_alone(
    broker: Mosquitto, pulse_server: PulseServer, tmp_path: Path
) -> None:
    spoken = sentences(tmp_path, 10, seed=11)
    figures = measure(pulse_server, broker.port, spoken, tmp_path)
    assert figures["differing"] == []
    assert figures[SYNTHETIC]["microphone"] == {"cer": 0.0, "first": 10, "last": 10}
    assert [figures[key] for key in ("in_order", "overlapping", "elsewhere", "lost", "gaps", "overruns")] == [
        True, 0, 0, 0, 0.0, 0.0,
    ]  # fmt: skip


def figures_of(*segments: tuple[float, float, str], shift: float = 3.0) -> dict[str, Any]:
    """Judge segments (sentence that they begin with and end with, text), as a microphone heard them 3 s later."""
    spoken = [Spoken(SYNTHETIC, text, NOTHING) for text in TEXTS]
    tape = record(spoken)
    told = []
    for first, last, text in segments:
        begins = tape.spans[int(first)][0] + (first % 1)
        ends = tape.spans[int(last)][0] + (last % 1 or 1)
        place = {"offset_s": begins - 0.29 + shift, "duration_s": ends - begins + 0.39}
        told.append({**place, "text": text, "within_budget": True})
    return judge(spoken, tape, told, [list(TEXTS)])


def test_sentences_that_were_cut_or_joined_are_put_together_again_and_counted() -> None:
    figures = figures_of((0, 0.5, "打"), (0.5, 0, "开灯"), (1, 2, "一二三四五六"), (3, 3, "关灯"))
    assert figures["differing"] == []
    assert (figures["cut"], figures["joined"], figures["lost"], figures["in_order"]) == (1, 1, 0, True)


def test_what_is_lost_out_of_order_or_said_by_nobody_is_counted() -> None:
    figures = figures_of((0, 0, "打开灯"), (3, 3, "关灯"), (1, 1, "一二"))
    assert (figures["in_order"], figures["lost"]) == (False, 1)
    assert [found["heard"] for found in figures["differing"]] == ["一二", ""]
    assert figures[SYNTHETIC]["microphone"] == {"cer": 36.36, "first": 3, "last": 2}
