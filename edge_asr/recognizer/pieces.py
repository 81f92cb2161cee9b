"""A sound recognised in pieces: where it is cut, and what the pieces come to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from edge_asr.recognizer.tokens import join
from edge_asr.types import SAMPLE_RATE, Recognition, Samples, Token

FRAME = SAMPLE_RATE // 100
"""Samples that a loudness is of: 10 ms."""
LEAST = 1e-30
"""Probability that stands for zero, which has no logarithm."""


def quietest(samples: Samples) -> int:
    """Return the sample where the middle third is quietest, in a pause as a rule; for 30 ms of sound or more."""
    third = len(samples) // 3
    frames = samples[third : third + third // FRAME * FRAME].reshape(-1, FRAME)
    return third + int(np.square(frames).sum(axis=1).argmin()) * FRAME + FRAME // 2


def joined(pieces: Sequence[tuple[int, Recognition]]) -> Recognition:
    """Return the recognition of a whole sound from those of its pieces, each with the sample that it begins at."""
    if len(pieces) == 1:
        return pieces[0][1]
    tokens = tuple(_moved(token, start * 1000 // SAMPLE_RATE) for start, found in pieces for token in found.tokens)
    stages: dict[str, float] = {}
    for _, found in pieces:
        _add(stages, found.stages_ms)
    text = join([token.text for token in tokens])
    last = pieces[-1][1]
    confidence = _confidence([found for _, found in pieces])
    return Recognition(text, tokens, confidence, stages, last.engine, model=last.model)


def _moved(token: Token, by_ms: int) -> Token:
    if token.start_ms is None or token.end_ms is None:
        return token
    return dataclasses.replace(token, start_ms=token.start_ms + by_ms, end_ms=token.end_ms + by_ms)


def _add(stages: dict[str, float], more: Mapping[str, float]) -> None:
    for stage, milliseconds in more.items():
        stages[stage] = stages.get(stage, 0.0) + milliseconds


def _confidence(pieces: Sequence[Recognition]) -> float | None:
    """Return exp of the mean log-probability of all tokens."""
    heard = [(len(found.tokens), found.confidence) for found in pieces if found.confidence is not None and found.tokens]
    if not heard:
        return None
    total = sum(count * math.log(max(confidence, LEAST)) for count, confidence in heard)
    return math.exp(total / sum(count for count, _ in heard))
