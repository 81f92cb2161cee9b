"""What the scheduler wants of a recogniser, and what it asks of one before that answers: its cost, and a trial."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from edge_asr.budget import CostModel
from edge_asr.errors import EngineError
from edge_asr.recognizer.network import interruptible
from edge_asr.recognizer.paraformer import noise
from edge_asr.recognizer.self_test import count_same
from edge_asr.types import Recognition, Samples

log = logging.getLogger(__name__)

MEASURED_S = (1, 8)
"""Seconds of noise whose cost is measured when an engine is loaded."""


class Recognizer(Protocol):
    """Samples -> recognition; used by one thread at a time."""

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` float32 samples at 16 kHz. Raises EngineError."""

    def close(self) -> None:
        """Release the model."""


@runtime_checkable
class Batching(Protocol):
    """What a recogniser may be as well: one that takes several sounds at a time."""

    @property
    def batches(self) -> bool:
        """Whether it does so at present, in one run."""

    @property
    def largest_batch(self) -> int:
        """How many of them a run takes at most."""

    def recognize_batch(self, batch: Sequence[Samples]) -> list[Recognition]:
        """Recognise several segments, each as if it were alone. Raises EngineError."""


def try_on(recognizer: Recognizer, samples: Samples, expected: Recognition) -> None:
    """Let a recogniser hear what another one has heard. Raises EngineError where that is something else."""
    found = recognizer.recognize(samples)
    if not are_alike(found, expected):
        raise EngineError(
            f"the new engine hears {len(found.tokens)} tokens in what was spoken last, the present one"
            f" {len(expected.tokens)}, and too few are the same"
        )


def are_alike(found: Recognition, expected: Recognition) -> bool:
    """Tell whether two engines agree on a sound: but for one token, or half of them where there are many."""
    if bool(found.text) != bool(expected.text):
        return False
    texts = [[token.text for token in one.tokens] for one in (found, expected)]
    longest = max(map(len, texts))
    return longest - count_same(*texts) <= max(1, longest // 2)


def measured(recognizer: Recognizer) -> CostModel:
    """Return what a recogniser costs, as far as it can be measured."""
    costs = CostModel()
    for seconds in MEASURED_S if interruptible(recognizer) else ():
        sound, started = noise(seconds), time.monotonic()
        try:
            recognizer.recognize(sound)
        except EngineError as error:  # the first request tells whoever has to know
            log.debug("%d s of noise: %s", seconds, error)
        else:
            costs.observe(seconds, (time.monotonic() - started) * 1e3)
    return costs


def recognize_all(recognizer: Recognizer, batch: Sequence[Samples]) -> list[Recognition]:
    """Recognise one segment, or several. Raises EngineError or InterruptedRunError."""
    if len(batch) > 1 and isinstance(recognizer, Batching):
        return recognizer.recognize_batch(batch)
    return [recognizer.recognize(samples) for samples in batch]


def release(recognizer: Recognizer) -> None:
    """Close a recogniser. What its library says to that is of no importance any more."""
    try:
        recognizer.close()
    except Exception as error:  # noqa: BLE001 - see above
        log.warning("an engine that is no longer in use could not be released: %s", error)
