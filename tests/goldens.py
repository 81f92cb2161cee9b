"""What FunASR's torch code says of the random-weight utterances, as `data/make_goldens.py` stored it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from random_weights import UTTERANCES, Size, utterance

from edge_asr.types import Samples

DATA = Path(__file__).parent / "data"
CERTAIN = 1e-3
"""Lead over the second best id above which ids must be equal."""

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Times = list[tuple[int, int]]


@dataclass(frozen=True)
class Golden:
    """One utterance."""

    index: int
    ids: npt.NDArray[np.int64]
    """Raw argmax ids `[N]`, special ones among them."""
    log_probabilities: Floats
    """Of those ids."""
    leads: Floats
    """Log-probability above the second best id."""
    alphas: Floats
    """`[T]`, without the tail."""
    feature_mean: float
    feature_deviation: float
    sherpa_ids: npt.NDArray[np.int64]
    """sherpa-onnx's: up to the first 2, with 0 and 1."""
    times: Times
    """Start and end in ms of each token that is not special, of alphas and fires with the tail's frame."""
    swapped: Times
    """The same as FunASR's own inference prints them: there alphas and fires change places."""

    @cached_property
    def samples(self) -> Samples:
        """The sound, made anew."""
        return utterance(self.index)

    @property
    def count(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def certain(self) -> npt.NDArray[np.bool_]:
        """Where ids must be equal, `[N]`."""
        return self.leads > CERTAIN


@dataclass(frozen=True)
class Fingerprints:
    """Hashes of what the goldens were made from."""

    weights: str
    sounds: str


@dataclass(frozen=True)
class TimesCase:
    """What FunASR's `ts_prediction_lfr6_standard` says of given weights."""

    kind: str
    upsample_rate: int
    alphas: Floats
    """`[T]`, with the tail where the rate is 1."""
    fired: npt.NDArray[np.bool_]
    """Where the given peaks reach 1 - 1e-4, `[T]`."""
    tokens: int
    times: Times | None
    """Start and end in ms, not always of every token; None where FunASR raises IndexError."""


def read_goldens(size: Size) -> list[Golden]:
    """Return the utterances of a size, in their order."""
    stored = _load(size)
    ids, log_probabilities, leads = (_parts(stored, name, "counts") for name in ("ids", "log_probabilities", "leads"))
    alphas, sherpa_ids = _parts(stored, "alphas", "frames"), _parts(stored, "sherpa_ids", "sherpa_counts")
    times, swapped = _parts(stored, "times", "times_counts"), _parts(stored, "swapped", "swapped_counts")
    return [
        Golden(
            index=index,
            ids=next(ids).astype(np.int64),
            log_probabilities=next(log_probabilities),
            leads=next(leads),
            alphas=next(alphas),
            feature_mean=float(stored["feature_means"][index]),
            feature_deviation=float(stored["feature_deviations"][index]),
            sherpa_ids=next(sherpa_ids).astype(np.int64),
            times=_pairs(next(times)),
            swapped=_pairs(next(swapped)),
        )
        for index in range(UTTERANCES[size])
    ]


def read_fingerprints(size: Size) -> Fingerprints:
    """Return the hashes of the weights and sounds that FunASR was given."""
    stored = _load(size)
    return Fingerprints(str(stored["weights"]), str(stored["sounds"]))


def read_times_cases() -> list[TimesCase]:
    """Return the cases that `data/make_timestamps.py` drew."""
    stored = _load("timestamps")
    alphas, fired = _parts(stored, "alphas", "frames"), _parts(stored, "fired", "frames")
    known = stored["times_counts"] >= 0
    times = _parts({**stored, "counts": np.maximum(stored["times_counts"], 0)}, "times", "counts")
    return [
        TimesCase(
            kind=str(stored["kinds"][index]),
            upsample_rate=int(stored["rates"][index]),
            alphas=next(alphas).astype(np.float32),
            fired=next(fired),
            tokens=int(stored["tokens"][index]),
            times=_pairs(part) if known[index] else None,
        )
        for index, part in enumerate(times)
    ]


def _load(name: str) -> dict[str, Array]:
    with np.load(DATA / f"{name}.npz") as stored:
        return dict(stored)


def _parts(stored: dict[str, Array], name: str, lengths: str) -> Iterator[Array]:
    """Yield an array cut into the parts of each utterance."""
    yield from np.split(stored[name], np.cumsum(stored[lengths], dtype=np.int64)[:-1])


def _pairs(times: Array) -> Times:
    return [(int(start), int(end)) for start, end in times]
