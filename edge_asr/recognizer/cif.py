"""CIF, continuous integrate-and-fire: which frames make which token, and when it was spoken."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Alphas = npt.NDArray[np.float32]
Overlaps = npt.NDArray[np.float32]


def overlaps(alphas: Alphas, tail: float) -> Overlaps:
    """Return `cif` `[N, T]`: the share of frame t in token k, for `alphas` `[T]`.

    With ps the running sum of alphas, token k is what lies between k and k + 1, so its share of frame t is the overlap
    of [k, k + 1] with [ps(t-1), ps(t)]. N is the integer part of the whole sum with the `tail` added. `cif @ enc` is
    the same as FunASR's sequential integrate-and-fire (`cif_v1_export`), without its differences of large sums.
    """
    # In float64: over 500 frames single precision would move a boundary now and then.
    ends = np.cumsum(alphas, dtype=np.float64)
    starts = ends - alphas
    tokens = np.arange(int(ends[-1] + tail) if len(ends) else 0, dtype=np.float64)[:, None]
    shares = np.minimum(ends, tokens + 1)
    shares -= np.maximum(starts, tokens)
    return np.maximum(shares, 0, out=shares).astype(np.float32)


ROW_MS = 60
"""Milliseconds from one encoder frame to the next."""
SHIFT = -1.5
"""Frames that FunASR moves all times by."""
EDGE = 5
"""More frames than this before the first token or behind the last one are silence."""
LONGEST = 12
"""Frames that a token lasts at most; what follows is silence."""
NEARLY_ONE = 1.0 - 1e-4
ROUNDING = 1e-4
"""More than what sums of a few hundred float32 can be wrong by."""


def token_times(alphas: Alphas, tail: float, tokens: int) -> list[tuple[int, int]] | None:
    """Return start and end in ms of `tokens` tokens for `alphas` `[T]`; None where they cannot be told.

    They are FunASR's, `ts_prediction_lfr6_standard` of the plain predictor with the tail as one more frame.
    """
    with_tail = np.append(alphas, np.float32(tail))
    # In Python's floats: for so few numbers that is quicker than to wake a dozen functions of numpy.
    fired, total, whole = [], 0.0, 0
    for alpha in with_tail.tolist():
        total += alpha
        # A sum a hair below a whole number counts as a fire too.
        fired.append(total >= whole + 1 or total % 1 >= NEARLY_ONE)
        whole = int(total)
    return times_of_fires(with_tail, fired, tokens, rate=1)


def times_of_fires(alphas: Alphas, fired: Iterable[bool], tokens: int, rate: int) -> list[tuple[int, int]] | None:
    """Return start and end in ms of each token: it lasts from one fire to the next.

    `alphas` and `fired` `[T]` are of `rate` frames a row. Where there is not one fire more than tokens, alphas are
    scaled to give that number (sherpa-onnx gives up there). None: still too few or too many fires.
    """
    if not tokens:
        return []
    places = [frame + SHIFT for frame, fires in enumerate(fired) if fires]
    if len(places) != tokens + 1:
        places = [frame + SHIFT for frame in _scaled_fires(alphas, tokens + 1)]
    if not 2 <= len(places) <= tokens + 1:
        return None
    spans = [(start, min(end, start + LONGEST)) for start, end in pairwise(places)]
    # Up to the end, or half way into the silence there; unless silence has begun before, within the last token.
    start, last, frames = places[-2], places[-1], len(alphas)
    if last - start <= LONGEST:
        spans[-1] = (start, (frames + last) / 2 if frames - last > EDGE else frames)
    seconds = ROW_MS / 1000 / rate
    return [(int(start * seconds * 1000), int(end * seconds * 1000)) for start, end in spans]


def _scaled_fires(alphas: Alphas, fires: int) -> list[int]:
    """Return the frames that fire, one at most each, when alphas are scaled to a sum of `fires`."""
    total = np.float32(alphas.sum(dtype=np.float64))
    if not total > 0:
        return []
    scaled = alphas / (total / np.float32(fires))
    found = []
    integrated = 0.0
    for frame, alpha in enumerate(scaled.tolist()):
        integrated += alpha
        if abs(integrated - NEARLY_ONE) < ROUNDING:
            return _scaled_fires_in_single_precision(scaled)
        if integrated >= NEARLY_ONE:
            integrated -= NEARLY_ONE
            found.append(frame)
    return found


def _scaled_fires_in_single_precision(scaled: Alphas) -> list[int]:
    """Count as FunASR does, in float32, where a sum that ends up a hair below a whole number fires a frame later."""
    found = []
    integrated, threshold = np.float32(0), np.float32(NEARLY_ONE)
    for frame, alpha in enumerate(scaled):
        integrated += alpha
        if integrated >= threshold:
            integrated -= threshold
            found.append(frame)
    return found
