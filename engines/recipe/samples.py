"""The sample recordings that come with the bundled model: our own synthesis, for the demonstration and the tests."""

from __future__ import annotations

import random
import wave
from pathlib import Path

import numpy as np
import soxr
from phrases import Sentence, number
from synthesis import RATE, Voices

SAMPLES = (
    ("f3", ("打开", "客厅", "灯")),
    ("m3", ("把", "卧室", "空调", "调到", *number(26), "度")),
    ("Annie", ("现在", "几点")),
    ("steph", ("音量", "调到", "百分之", *number(35))),
    ("m1", ("启动", *number(3), "号", "产线")),
    ("f2", ("设置", *number(20), "分钟", "闹钟")),
    ("Andy", ("一", "三", "八", "零", "五", "二", "七", "四")),
    ("m4", ("急停", "仓库", "传送带")),
)
SPEED = 165


def write_samples(folder: Path, work: Path) -> None:
    """Write `01.wav` and so on (16 kHz, PCM16) with `transcripts.tsv` (file, text)."""
    folder.mkdir(parents=True, exist_ok=True)
    voices = Voices(work / "voices" / "samples", random_voices=0)
    noise = np.random.default_rng(0)
    lines = []
    for index, (voice, words) in enumerate(SAMPLES, 1):
        spoken = Sentence(words, "sample")
        dry = voices.speak(spoken.reading(random.Random(index)), voice, SPEED)
        samples = np.pad(np.asarray(soxr.resample(dry, RATE, 16_000)) * 0.4, 6400)
        samples += 1e-4 * noise.standard_normal(len(samples))
        with wave.open(str(folder / f"{index:02d}.wav"), "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(2)
            writer.setframerate(16_000)
            writer.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
        lines.append(f"{index:02d}.wav\t{spoken.text}\n")
    (folder / "transcripts.tsv").write_text("".join(lines), encoding="utf-8")
