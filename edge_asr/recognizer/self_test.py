"""The self-test of an engine: does it hear in a recording what fp32 heard when it was built?"""

from __future__ import annotations

import wave
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_asr.errors import EngineError
from edge_asr.recognizer.manifest import SelfTest
from edge_asr.recognizer.paraformer import Decoded
from edge_asr.types import SAMPLE_RATE, Samples

SAME_IDS = 0.9
"""Of the tokens this share must be the same."""
COUNT_SLACK = 1
"""Tokens there may be too many or too few."""
ALPHA_SLACK = 0.02
"""The sum of the alphas may be off by this share."""
REMEDY = "run edge-asr build-engine without --if-needed"


class Decoder(Protocol):
    """Samples -> what the networks say of them."""

    def decode(self, samples: Samples) -> Decoded:
        """Decode `[n]` float32 samples at 16 kHz. Raises EngineError."""


def check(recognizer: Decoder, folder: Path, expected: SelfTest) -> None:
    """Raise EngineError unless the recogniser hears in the recording in `folder` what is expected."""
    decoded = recognizer.decode(_read(folder / expected.sound))
    if why := difference(decoded, expected):
        raise EngineError(f"{folder}: it failed its self-test ({why}); {REMEDY}")


def difference(decoded: Decoded, expected: SelfTest) -> str | None:
    """Return how an answer differs from what is expected by more than rounding explains; None where it does not."""
    if not np.isfinite(decoded.alphas).all() or not np.isfinite(decoded.log_probabilities).all():
        return "its numbers are not finite"
    total = float(decoded.alphas.sum())
    if abs(total - expected.alpha_sum) > ALPHA_SLACK * expected.alpha_sum:
        return f"its alphas sum up to {total:.3f}, not to {expected.alpha_sum:.3f}"
    found, wanted = decoded.ids.tolist(), list(expected.ids)
    if abs(len(found) - len(wanted)) > COUNT_SLACK:
        return f"it hears {len(found)} tokens, not {len(wanted)}"
    if (same := count_same(found, wanted)) < SAME_IDS * len(wanted):
        return f"only {same} of {len(wanted)} tokens are the same"
    return None


def count_same(found: Sequence[object], wanted: Sequence[object]) -> int:
    """Return how many tokens are the same and in the same order, whatever is missing or too much between them."""
    return sum(block.size for block in SequenceMatcher(None, found, wanted, autojunk=False).get_matching_blocks())


def _read(path: Path) -> Samples:
    """Return the samples of a WAV file as build-engine writes it: 16 kHz, mono, 16 bit. Raises EngineError."""
    try:
        with wave.open(str(path), "rb") as sound:
            kind = (sound.getframerate(), sound.getnchannels(), sound.getsampwidth())
            if kind != (SAMPLE_RATE, 1, 2):
                raise EngineError(f"{path}: no recording for a self-test {kind}; {REMEDY}")
            data = sound.readframes(sound.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise EngineError(f"{path}: cannot be read ({error}); {REMEDY}") from error
    samples: Samples = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
    return samples
