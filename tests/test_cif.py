"""CIF against integrate-and-fire written out frame by frame, and times against FunASR's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from goldens import read_goldens, read_times_cases
from random_weights import SIZES, Size

from edge_asr.recognizer.cif import Alphas, overlaps, times_of_fires, token_times

Floats = npt.NDArray[np.float64]

TAIL = 0.45
CASES = 400


def integrate_and_fire(alphas: Sequence[float], frames: Floats, tail: float) -> Floats:
    """Return the embeddings `[N, d]` of `[T]` alphas and `[T, d]` frames: add up, and give one out at each whole."""
    width = frames.shape[1]
    embeddings, embedding, integrated = [], np.zeros(width), 0.0
    for alpha, frame in zip([*alphas, tail], [*frames, np.zeros(width)], strict=True):
        missing = 1.0 - integrated
        if alpha < missing:
            integrated += alpha
            embedding += alpha * frame
        else:
            embeddings.append(embedding + missing * frame)
            integrated = alpha - missing
            embedding = integrated * frame
    return np.array(embeddings).reshape(-1, width)


def weights(seed: int) -> Alphas:
    """Return alphas as a sigmoid gives them: of many lengths, from hardly any tokens to one a frame."""
    rng = np.random.default_rng(seed)
    most = rng.uniform(0.02, 0.999)
    return (rng.random(rng.integers(1, 200)) * most).astype(np.float32)


def test_overlaps_are_integrate_and_fire() -> None:
    counts = set()
    for seed in range(CASES):
        alphas = weights(seed)
        frames = np.random.default_rng(seed).standard_normal((len(alphas), 5))
        expected = integrate_and_fire(alphas.tolist(), frames, TAIL)
        shares = overlaps(alphas, TAIL)
        assert shares.dtype == np.float32
        assert shares.shape == (len(expected), len(alphas))
        np.testing.assert_allclose(shares @ frames, expected, atol=1e-5)
        counts.add(len(shares))
    assert {0, 1, 2} <= counts
    assert max(counts) > 50


@pytest.mark.parametrize("step", [0.25, 0.5])
def test_overlaps_are_integrate_and_fire_where_sums_hit_whole_numbers(step: float) -> None:
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        alphas = (rng.integers(0, round(1 / step), rng.integers(1, 60)) * step).astype(np.float32)
        frames = rng.standard_normal((len(alphas), 3))
        for tail in (0.0, 0.25, 0.5):
            expected = integrate_and_fire(alphas.tolist(), frames, tail)
            shares = overlaps(alphas, tail)
            assert len(shares) == len(expected)
            np.testing.assert_allclose(shares @ frames, expected, atol=1e-6)


def test_each_token_but_the_last_is_whole_and_no_frame_gives_more_than_it_has() -> None:
    for seed in range(CASES):
        alphas = weights(seed)
        shares = overlaps(alphas, TAIL)
        assert (shares >= 0).all()
        assert (shares.sum(axis=0) <= alphas + 1e-5).all()
        np.testing.assert_allclose(shares[:-1].sum(axis=1), 1, atol=1e-5)
        if len(shares):
            assert 1 - TAIL - 1e-5 <= shares[-1].sum() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("alphas", "tokens"),
    [([], 0), ([0.0], 0), ([0.54], 0), ([0.56], 1), ([0.5, 0.5], 1), ([0.9] * 4, 4), ([0.0] * 30, 0)],
)
def test_the_number_of_tokens_is_the_whole_part_of_the_sum_with_the_tail(alphas: list[float], tokens: int) -> None:
    assert overlaps(np.array(alphas, np.float32), TAIL).shape == (tokens, len(alphas))


def test_half_a_minute_loses_no_token() -> None:
    alphas = np.full(510, 0.1, np.float32)
    assert np.cumsum(alphas)[-1] < 51 <= alphas.sum(dtype=np.float64), "in single precision one would be lost"
    assert len(overlaps(alphas, 0.0)) == 51


# Times


def test_times_are_those_of_funasr() -> None:
    cases = read_times_cases()
    assert len(cases) >= 300
    for case in cases:
        found = times_of_fires(case.alphas, case.fired, case.tokens, case.upsample_rate)
        # Where nothing fires FunASR has no times, be there tokens or not; ours says that they cannot be told.
        unknown = found is None and not case.times
        assert unknown or found == case.times, case.kind


@pytest.mark.parametrize("size", SIZES)
def test_times_of_whole_utterances_are_those_of_funasr(size: Size) -> None:
    for golden in read_goldens(size):
        spoken = int((golden.ids > 2).sum())
        assert token_times(golden.alphas, TAIL, spoken) == golden.times


@pytest.mark.parametrize("alphas", [[], [0.0] * 10, [0.5] * 10])
def test_no_token_has_no_times(alphas: list[float]) -> None:
    assert token_times(np.array(alphas, np.float32), TAIL, 0) == []


@pytest.mark.parametrize("rate", [1, 3])
def test_without_any_weight_times_cannot_be_told(rate: int) -> None:
    assert times_of_fires(np.zeros(20, np.float32), np.zeros(20, np.bool_), 2, rate) is None
