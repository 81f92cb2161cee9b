"""The goldens' premises: weights, sounds and features are those that FunASR was given."""

from __future__ import annotations

import numpy as np
import pytest
from goldens import read_fingerprints, read_goldens, read_times_cases
from random_weights import (
    LONGEST,
    SCALE,
    SHIFT,
    SHORTEST,
    SIZES,
    UTTERANCES,
    Size,
    sounds_fingerprint,
    weights_fingerprint,
)

from edge_asr.recognizer.features import FeatureExtractor

TAIL = 0.45
CHANGED = (
    "are not those that FunASR was given: numpy's raw stream or random_weights.py has changed;"
    " if that was meant, run tests/data/make_goldens.py again"
)

each_size = pytest.mark.parametrize("size", SIZES)


@each_size
def test_the_weights_are_those_that_funasr_was_given(size: Size) -> None:
    assert weights_fingerprint(size) == read_fingerprints(size).weights, f"the weights {CHANGED}"


@each_size
def test_the_sounds_are_those_that_funasr_was_given(size: Size) -> None:
    assert sounds_fingerprint(size) == read_fingerprints(size).sounds, f"the sounds {CHANGED}"


@each_size
def test_the_features_are_those_that_funasr_was_given(size: Size) -> None:
    extract = FeatureExtractor(SHIFT, SCALE)
    for golden in read_goldens(size):
        features = extract(golden.samples)
        assert len(features) == len(golden.alphas)
        assert features.mean() == pytest.approx(golden.feature_mean, abs=1e-3)
        assert features.std() == pytest.approx(golden.feature_deviation, abs=1e-3)


@each_size
def test_the_count_is_the_floor_of_the_weights_with_the_tail(size: Size) -> None:
    for golden in read_goldens(size):
        assert golden.count == int(golden.alphas.sum(dtype=np.float64) + TAIL)


@each_size
def test_utterances_are_as_short_and_as_long_as_segments_get(size: Size) -> None:
    goldens = read_goldens(size)
    durations = [len(golden.samples) for golden in goldens]
    assert len(goldens) == UTTERANCES[size]
    assert (min(durations), max(durations)) == (SHORTEST, LONGEST)


@each_size
def test_tokens_vary_and_are_certain(size: Size) -> None:
    """Goldens that said the same of everything would prove little."""
    ids = np.concatenate([golden.ids for golden in read_goldens(size)])
    certain = np.concatenate([golden.certain for golden in read_goldens(size)])
    assert len(np.unique(ids)) > 50
    assert certain.mean() > 0.99


@each_size
def test_sherpa_onnx_has_the_same_ids_up_to_its_stop(size: Size) -> None:
    for golden in read_goldens(size):
        stops = np.flatnonzero(golden.ids == 2)
        heard = slice(0, stops[0] if len(stops) else None)
        assert len(golden.sherpa_ids) == len(golden.ids[heard])
        same = golden.sherpa_ids == golden.ids[heard]
        assert same[golden.certain[heard]].all()


@each_size
def test_each_token_that_is_not_special_has_a_time(size: Size) -> None:
    for golden in read_goldens(size):
        spoken = int((golden.ids > 2).sum())
        assert len(golden.times) == len(golden.swapped) == spoken


def test_the_cases_of_times_hold_the_edges() -> None:
    cases = read_times_cases()
    assert len(cases) >= 300
    assert all(len(case.alphas) == len(case.fired) for case in cases)
    assert {case.upsample_rate for case in cases} == {1, 3}
    answers = [case.times for case in cases]
    assert None in answers
    assert [] in answers
    assert any(times and times[0][0] < 0 for times in answers)
    assert any(times and len(times) == 1 for times in answers)
    assert any(case.times and case.fired.sum() == case.tokens + 1 for case in cases)
    assert any(case.times and case.fired.sum() < case.tokens + 1 for case in cases)
    assert any(case.times and case.fired.sum() > case.tokens + 1 for case in cases)
