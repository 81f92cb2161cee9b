#!/usr/bin/env python3
"""Write `timestamps.npz` beside this file: what FunASR's `ts_prediction_lfr6_standard` says of some 300 drawn cases.

    pip install -e '.[recipe]'
    python tests/data/make_timestamps.py

A case is alphas `[T]`, the frames `[T]` at which peaks reach 1 - 1e-4 (the function looks at nothing else of them), a
number of tokens and an upsample rate; the answer is start and end of each token in ms, or an IndexError of FunASR's.
Rate 1 is the plain predictor: alphas with the tail 0.45 at their end, peaks of `cif_v1`. Rate 3 is BiCif: alphas scaled
to the number of tokens, peaks of `cif_wo_hidden`. Alphas are float16 values, so that they are stored small and exactly.

Cases whose answer changes when alphas change by a millionth are left out: they would test the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from funasr.models.paraformer.cif_predictor import cif_wo_hidden_v1
from funasr.utils.timestamp_tools import cif_wo_hidden, ts_prediction_lfr6_standard
from tqdm import tqdm

FIRED = 1.0 - 1e-4
TAIL = 0.45
EACH = 15
"""Cases of a kind and a rate."""
TRIES = 5
Draw = Callable[[np.random.Generator], np.ndarray]


@dataclass
class Case:
    """What the function is given."""

    kind: str
    rate: int
    alphas: np.ndarray
    peaks: np.ndarray
    tokens: int


def main() -> None:
    """Draw the cases, ask FunASR, store."""
    rng = np.random.default_rng(0)
    cases, answers, unsteady = [], [], 0
    for kind in tqdm(KINDS):
        for rate in (1, 3):
            for _ in range(EACH):
                case = draw(rng, kind, rate)
                answer = predict(case, case.alphas)
                if all(predict(case, nudged(rng, case.alphas)) == answer for _ in range(TRIES)):
                    cases.append(case)
                    answers.append(answer)
                else:
                    unsteady += 1
    store(Path(__file__).with_name("timestamps.npz"), cases, answers)
    failed = sum(answer is None for answer in answers)
    print(f"{len(cases)} cases, FunASR raises in {failed}; {unsteady} left out")


def predict(case: Case, alphas: np.ndarray) -> list[list[int]] | None:
    """Return FunASR's times, None where it raises; it writes into what it is given, hence the copies."""
    given = torch.from_numpy(alphas.copy()), torch.from_numpy(case.peaks.copy())
    try:
        return ts_prediction_lfr6_standard(*given, ["字"] * case.tokens, upsample_rate=case.rate)[1]
    except IndexError:
        return None


def nudged(rng: np.random.Generator, alphas: np.ndarray) -> np.ndarray:
    """Return alphas that differ by a millionth."""
    return (alphas * (1 + rng.uniform(-1e-6, 1e-6, len(alphas)))).astype(np.float32)


# Cases


def draw(rng: np.random.Generator, kind: str, rate: int) -> Case:
    """Return a case of a kind: drawn alphas, their peaks, and a number of tokens that fits or does not."""
    alphas, offsets = KINDS[kind]
    drawn = alphas(rng) if rate == 1 else np.repeat(alphas(rng), 3) * rng.uniform(0.1, 0.6)
    weights = plain(drawn) if rate == 1 else scaled(drawn)
    peaks = peaks_of(weights, rate)
    tokens = max(0, int(weights.sum(dtype=np.float64) + 1e-3) + int(rng.choice(offsets)))
    if kind == "swapped":
        return Case(kind, rate, float16(peaks), weights, tokens)
    return Case(kind, rate, weights, peaks, tokens)


def plain(drawn: np.ndarray) -> np.ndarray:
    """Return alphas as the plain predictor gives them."""
    return float16(np.append(drawn, TAIL))


def scaled(drawn: np.ndarray) -> np.ndarray:
    """Return alphas as BiCif gives them: their sum is a whole number of tokens."""
    total = drawn.sum()
    return float16(drawn * (max(1, round(total)) / total) if total else drawn)


def peaks_of(alphas: np.ndarray, rate: int) -> np.ndarray:
    """Return FunASR's peaks."""
    rows = torch.from_numpy(alphas)[None]
    return (cif_wo_hidden_v1(rows, 1.0) if rate == 1 else cif_wo_hidden(rows, FIRED))[0].numpy()


def float16(values: np.ndarray) -> np.ndarray:
    """Return the nearest float16 values as float32."""
    return values.astype(np.float16).astype(np.float32)


def speech(rng: np.random.Generator) -> np.ndarray:
    """Return weights that come and go, between two silences."""
    frames = rng.integers(5, 90)
    weights = rng.beta(0.6, 1.8, frames)
    return np.concatenate([np.zeros(rng.integers(0, 12)), weights, np.zeros(rng.integers(0, 12))])


def gaps(rng: np.random.Generator) -> np.ndarray:
    """Return bursts with silences longer than the 12 frames that a token may last."""
    bursts = [np.append(rng.beta(1.5, 1.5, rng.integers(1, 8)), np.zeros(rng.integers(10, 40))) for _ in range(4)]
    return np.concatenate(bursts)


def quiet(rng: np.random.Generator) -> np.ndarray:
    """Return weights that never fire."""
    return rng.uniform(0, 0.01, rng.integers(1, 40))


def one(rng: np.random.Generator) -> np.ndarray:
    """Return one token's weights."""
    weights = rng.beta(1, 3, rng.integers(3, 30))
    return weights * (rng.uniform(0.7, 1.4) / weights.sum())


def early(rng: np.random.Generator) -> np.ndarray:
    """Return weights that fire in the first frames: the shift of -1.5 frames makes their start negative."""
    return np.concatenate([rng.uniform(0.9, 0.999, rng.integers(1, 4)), rng.beta(0.6, 1.8, rng.integers(1, 30))])


def dense(rng: np.random.Generator) -> np.ndarray:
    """Return a token a frame, nearly."""
    return rng.uniform(0.7, 0.999, rng.integers(2, 40))


def short(rng: np.random.Generator) -> np.ndarray:
    """Return one to five frames."""
    return rng.uniform(0.05, 0.95, rng.integers(1, 6))


def silent(rng: np.random.Generator) -> np.ndarray:
    """Return zeros."""
    return np.zeros(rng.integers(1, 20))


KINDS: dict[str, tuple[Draw, list[int]]] = {
    "speech": (speech, [0]),
    "fitting": (speech, [-1]),
    "fewer": (speech, [-2, -3, -5]),
    "more": (speech, [1, 2, 3, 8]),
    "gaps": (gaps, [0]),
    "gaps, fitting": (gaps, [-1]),
    "quiet": (quiet, [0, 1, 2]),
    "one": (one, [0, 1]),
    "early": (early, [0, -1]),
    "dense": (dense, [0, 1, 5]),
    "short": (short, [0, 1]),
    "silent": (silent, [0, 1]),
    "swapped": (speech, [0]),
}
"""How alphas are drawn, and how far the number of tokens may be from what they say.

Fitting: one token less than peaks, the only number at which FunASR takes the peaks as they are. Swapped: alphas and
peaks in the places where `Paraformer.inference` puts them.
"""


# Storage


def store(path: Path, cases: list[Case], answers: list[list[list[int]] | None]) -> None:
    """Write one compressed file: lists of all cases end to end, with their lengths; -1 times where FunASR raises."""
    fired = np.concatenate([torch.from_numpy(case.peaks).ge(FIRED).numpy() for case in cases])
    np.savez_compressed(
        path,
        kinds=np.array([case.kind for case in cases]),
        rates=np.array([case.rate for case in cases], np.int8),
        tokens=np.array([case.tokens for case in cases], np.int16),
        frames=np.array([len(case.alphas) for case in cases], np.int16),
        alphas=np.concatenate([case.alphas for case in cases]).astype(np.float16),
        fired=fired,
        times_counts=np.array([-1 if answer is None else len(answer) for answer in answers], np.int16),
        times=np.array(list(chain(*(answer or [] for answer in answers))), np.int32).reshape(-1, 2),
    )


if __name__ == "__main__":
    main()
