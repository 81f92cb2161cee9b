"""A transcribed file says what sherpa-onnx says of it, on the same graph: 200 sentences that nothing was trained on."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sherpa_onnx
import soxr
from bundled import BUNDLE, load, recipe, write_wav

from edge_asr.answers import Labels
from edge_asr.audio.decode import read
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.speech.segmenter import Rules
from edge_asr.speech.vad import SileroDetector
from edge_asr.transcribe import transcribe
from edge_asr.types import SAMPLE_RATE

SENTENCES = 200
SEED = 7_031_977
WHISPERS = ("whisper", "whisperf")
"""Silero takes synthetic whispering for no speech now and then, and then we print nothing: sherpa-onnx has no VAD."""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Held-out sentences of every kind, by voices known and unknown to the model, as WAV files."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("not installed: espeak-ng (Debian: apt install espeak-ng)")
    phrases, synthesis = recipe("phrases"), recipe("synthesis")
    folder = tmp_path_factory.mktemp("sentences")
    rng = random.Random(SEED)
    voices = synthesis.Voices(folder / "voices", random_voices=20, seed=SEED)
    names = [name for name in (*synthesis.EVALUATION_VOICES, *voices.published, *voices.random) if name not in WHISPERS]
    kinds = [kind for kind in phrases.KINDS if kind != "fixed"]
    paths = []
    for index in range(SENTENCES):
        spoken = phrases.sentence(rng, kinds, held_out=True)
        dry = voices.speak(spoken.reading(rng), rng.choice(names), rng.randint(140, 210), rng.randint(30, 70))
        samples = np.asarray(soxr.resample(dry, synthesis.RATE, SAMPLE_RATE), np.float32) * np.float32(
            rng.uniform(0.1, 0.6)
        )
        paths.append(write_wav(folder / f"{index:03d} {spoken.text}.wav", np.pad(samples, rng.randint(1000, 6000))))
    return paths


def test_a_transcribed_file_has_the_text_that_sherpa_onnx_gives(recordings: list[Path]) -> None:
    recognizer = load("onnx-fp32")
    sherpa = sherpa_onnx.OfflineRecognizer.from_paraformer(str(recognizer.bundle.graph), str(BUNDLE / "tokens.txt"))
    ours = {path.stem: transcribed(path, recognizer) for path in recordings}
    theirs = {path.stem: ask_sherpa(path, sherpa) for path in recordings}
    recognizer.close()
    assert ours == theirs
    assert all(ours.values())
    assert sum(stem.split()[1] == text for stem, text in ours.items()) > SENTENCES / 2


def transcribed(path: Path, recognizer: Paraformer) -> str:
    labels = Labels("test", f"file:{path}", "paraformer-tiny")
    return "".join(t.text for t in transcribe(path, recognizer, SileroDetector(), Rules(), labels))


def ask_sherpa(path: Path, sherpa: Any) -> str:
    stream = sherpa.create_stream()
    stream.accept_waveform(SAMPLE_RATE, read(path))
    sherpa.decode_stream(stream)
    return str(stream.result.text)
