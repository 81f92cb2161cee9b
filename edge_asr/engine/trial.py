"""Trying networks out: do they say what the published graph says, and how long do they take here?"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_asr.engine.graph import product_graph
from edge_asr.engine.weights import UnknownGraphError
from edge_asr.errors import EngineError
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Ids, Paraformer
from edge_asr.recognizer.self_test import count_same
from edge_asr.recognizer.whole import WholeParaformer
from edge_asr.types import SAMPLE_RATE, Samples

TRIED_S = (0.7, 2.0, 3.3, 5.0)
"""Seconds of the sounds that are compared."""
AGREE_EXACT, AGREE_ROUNDED = 0.99, 0.6
"""Share of equal tokens asked for: of fp32 against fp32, and with 8 bits on either side, where close calls flip."""
TIMED_S = 4.0
RUNS = 5
VOWELS_HZ = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
"""Formants of some vowels."""


def answers(recognizer: Paraformer | WholeParaformer) -> list[Ids | None]:
    """Return the token ids that a recogniser hears in some sounds; None where it fails (old exports, on nothing)."""
    return [_answer(recognizer, make(seconds)) for seconds in TRIED_S for make in (babble, hiss)]


def _answer(recognizer: Paraformer | WholeParaformer, sound: Samples) -> Ids | None:
    try:
        return recognizer.decode(sound).ids
    except EngineError:
        return None


def compare(ours: Sequence[Ids | None], published: Sequence[Ids | None], share: float, slack: int) -> int:
    """Return how many tokens were compared; raise UnknownGraphError where the answers are not the published graph's.

    `share` of the tokens must be the same; so must their number, but for `slack` sounds, where it may differ by one.
    """
    pairs = [pair for pair in zip(ours, published, strict=True) if pair[1] is not None]
    if not pairs:
        raise UnknownGraphError("it fails on every sound")
    equal = total = different = 0
    for found, expected in pairs:
        if found is None or expected is None:
            raise UnknownGraphError("ours fails where it does not")
        off = abs(len(found) - len(expected))
        different += min(off, 1)
        if off > 1 or different > slack:
            raise UnknownGraphError(f"it finds {len(expected)} tokens where ours finds {len(found)}")
        total += len(expected)
        equal += count_same(found.tolist(), expected.tolist())
    if equal < total * share:
        raise UnknownGraphError(f"only {equal} of {total} tokens are the same")
    return total


def time_ms(recognizer: Paraformer) -> float:
    """Return how long a few seconds of audio take, the median of some runs in milliseconds."""
    sound = babble(TIMED_S)
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        recognizer.recognize(sound)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def multiplies_signed_exactly() -> bool:
    """Tell whether products of unsigned with signed bytes are exact here.

    Without VNNI, x86 processors add two of them in 16 bits, which overflow with large weights.
    """
    values = np.full((64, 16), 127, np.int8)
    rows = 16  # one row alone may go another way
    with tempfile.TemporaryDirectory(prefix="edge_asr-") as folder:
        path, _ = product_graph(values).write(Path(folder), "product")
        network = OnnxNetwork(path, threads=1)
        product = network.run({"x": np.full((rows, 64), 255, np.uint8)})["y"]
        network.close()
    return bool((product == 64 * 127 * 255).all())


def hiss(seconds: float) -> Samples:
    """Return noise that swells and fades."""
    count = int(seconds * SAMPLE_RATE)
    swell = 0.55 - 0.45 * np.cos(2 * np.pi * 3.1 * np.arange(count) / SAMPLE_RATE)
    return (np.random.default_rng(count).standard_normal(count) * swell * 0.1).astype(np.float32)


def babble(seconds: float) -> Samples:
    """Return something like speech: vowels in a row, four a second, so that a trained model hears tokens."""
    time_s = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch_hz = 120 + 20 * np.sin(2 * np.pi * 0.7 * time_s)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE
    vowels = np.array(VOWELS_HZ, float)[(time_s * 4).astype(int) % len(VOWELS_HZ)]
    sound = np.zeros_like(time_s)
    for harmonic in range(1, 30):
        distance = (harmonic * pitch_hz[:, None] - vowels) / 90
        sound += np.sin(harmonic * phase) * (1 / (1 + distance**2)).sum(axis=1)
    syllables = 0.5 - 0.5 * np.cos(2 * np.pi * 4 * time_s)
    sound *= syllables
    return np.asarray(sound / max(np.abs(sound).max(), 1e-9) * 0.3, np.float32)
