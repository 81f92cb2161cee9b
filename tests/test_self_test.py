"""The self-test: what rounding explains passes, what it does not explain is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from bundled import write_wav

from edge_asr.errors import EngineError
from edge_asr.recognizer.manifest import SelfTest
from edge_asr.recognizer.paraformer import Decoded
from edge_asr.recognizer.self_test import check, difference
from edge_asr.types import Samples

IDS = tuple(range(100, 120))


def decoded(ids: Sequence[int] = IDS, alpha_sum: float = 20.0, score: float = -0.1) -> Decoded:
    return Decoded(np.array(ids), np.full(len(ids), score, np.float32), np.full(8, alpha_sum / 8, np.float32))


EXPECTED = SelfTest("sound.wav", IDS, 20.0)


@pytest.mark.parametrize(
    "found",
    [
        decoded(),
        decoded((*IDS[:18], 7, 8)),
        decoded(IDS[1:]),
        decoded((7, *IDS)),
        decoded(alpha_sum=20.39),
        decoded(alpha_sum=19.61),
    ],
    ids=["the same", "two of twenty others", "one too few", "one too many", "alphas higher", "alphas lower"],
)
def test_what_rounding_explains_passes(found: Decoded) -> None:
    assert difference(found, EXPECTED) is None


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (decoded((*IDS[:17], 7, 8, 9)), "only 17 of 20 tokens are the same"),
        (decoded(IDS[2:]), "it hears 18 tokens, not 20"),
        (decoded((7, 8, *IDS)), "it hears 22 tokens, not 20"),
        (decoded(()), "it hears 0 tokens, not 20"),
        (decoded(IDS[::-1]), "only 1 of 20 tokens are the same"),
        (decoded(alpha_sum=20.41), "its alphas sum up to 20.410, not to 20.000"),
        (decoded(alpha_sum=19.59), "its alphas sum up to 19.590, not to 20.000"),
        (decoded(alpha_sum=np.nan), "its numbers are not finite"),
        (decoded(score=np.inf), "its numbers are not finite"),
    ],
)
def test_what_rounding_does_not_explain_is_told(found: Decoded, why: str) -> None:
    assert difference(found, EXPECTED) == why


class Hearing:
    """Decodes whatever it is given to the same, and keeps it."""

    def __init__(self, answer: Decoded) -> None:
        self._answer = answer
        self.heard: Samples | None = None

    def decode(self, samples: Samples) -> Decoded:
        self.heard = samples
        return self._answer


def test_the_recording_is_heard_as_it_was_written(tmp_path: Path) -> None:
    sound = np.linspace(-0.9, 0.9, 16_000, dtype=np.float32)
    write_wav(tmp_path / "sound.wav", sound)
    engine = Hearing(decoded())
    check(engine, tmp_path, EXPECTED)
    assert engine.heard is not None
    assert engine.heard.dtype == np.float32
    np.testing.assert_allclose(engine.heard, sound, atol=1e-4)


def test_an_engine_that_fails_is_named_with_the_remedy(tmp_path: Path) -> None:
    write_wav(tmp_path / "sound.wav", np.zeros(100, np.float32))
    with pytest.raises(EngineError) as caught:
        check(Hearing(decoded(())), tmp_path, EXPECTED)
    assert str(caught.value) == (
        f"{tmp_path}: it failed its self-test (it hears 0 tokens, not 20);"
        " run edge-asr build-engine without --if-needed"
    )


@pytest.mark.parametrize("content", [None, b"", b"no sound"], ids=["missing", "empty", "damaged"])
def test_a_recording_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "sound.wav").write_bytes(content)
    with pytest.raises(EngineError, match=r"sound\.wav: cannot be read \(.*; run edge-asr build-engine") as caught:
        check(Hearing(decoded()), tmp_path, EXPECTED)
    assert "\n" not in str(caught.value)
