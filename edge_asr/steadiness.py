"""Whether a short text stays what it is when its sound changes a little.

What a model knows does; what it takes for something else, foreign speech for a command, often does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

import numpy as np

from edge_asr.types import Recognition, Samples

SHORT = 4
"""Tokens up to which a text is looked at: longer ones come about by chance hardly ever."""
SHIFT = 480
"""Samples: half of a row of features."""
NOISE_DB = 20.0
"""White noise, below the sound."""

Submit = Callable[[Samples], "Future[Recognition]"]


def disturbed(samples: Samples) -> tuple[Samples, Samples]:
    """Return the sound half a row of features later, and in faint noise."""
    noise = np.random.default_rng(0).standard_normal(len(samples), np.float32)
    noise *= np.float32(float(np.std(samples)) * 10 ** (-NOISE_DB / 20))
    return np.pad(samples, (SHIFT, 0)), samples + noise


def steadiness(recognition: Recognition, others: Sequence[Recognition]) -> float:
    """Return the lowest confidence that a text has in disturbed sound as well; 0: there it is another one."""
    sure = (one.confidence or 0.0 if one.text == recognition.text else 0.0 for one in others)
    return min(recognition.confidence or 0.0, *sure)


def is_short(recognition: Recognition) -> bool:
    """Tell whether a text is one to be looked at."""
    return bool(recognition.text) and len(recognition.tokens) <= SHORT


class Doubted(Future[Recognition]):
    """A recognition that is asked for, and, where its text is a short one, asked for again in disturbed sound.

    It can be cancelled as long as the recognition itself can be.
    """

    def __init__(self, samples: Samples, submit: Submit, allowed: Callable[[], bool]) -> None:
        """`submit` asks for a recognition; `allowed` tells whether there is time to ask again: else it is believed."""
        super().__init__()
        self._samples = samples
        self._submit = submit
        self._allowed = allowed
        self._again: list[Future[Recognition]] = []
        self._first = submit(samples)
        self._first.add_done_callback(self._take)

    def cancel(self) -> bool:
        """See Future."""
        return self._first.cancel()

    def _take(self, first: Future[Recognition]) -> None:
        if first.cancelled():
            super().cancel()
        elif (error := first.exception()) is not None:
            self.set_exception(error)
        elif is_short(first.result()) and self._allowed():
            self._again = [self._submit(sound) for sound in disturbed(self._samples)]
            for one in self._again:
                one.add_done_callback(self._compare)
        else:
            self.set_result(first.result())

    def _compare(self, _: Future[Recognition]) -> None:
        if not all(one.done() for one in self._again):
            return
        recognition = self._first.result()
        if not any(one.cancelled() or one.exception() for one in self._again):  # else it is believed
            sure = steadiness(recognition, [one.result() for one in self._again])
            recognition = dataclasses.replace(recognition, steadiness=sure)
        with contextlib.suppress(InvalidStateError):  # both ended at once, on two threads
            self.set_result(recognition)
