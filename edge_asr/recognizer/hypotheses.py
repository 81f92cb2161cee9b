"""What is known of a segment while it grows: the beginning that two decodes in a row agree on. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from edge_asr.recognizer.tokens import CONTINUES, join

UNSETTLED = 2
"""Tokens at the end of a decode that more sound may still change: they halve the beginnings that prove wrong."""


class Hypotheses:
    """The decodes of one segment, each of more of it than the one before."""

    def __init__(self) -> None:
        self._last: list[str] = []
        self._stable: list[str] = []

    def add(self, tokens: Sequence[str]) -> tuple[str, str]:
        """Take the next decode's tokens; return its text and the stable beginning, which only ever grows.

        Where a decode contradicts what is stable already, that stays: whoever shows it has shown it.
        """
        agreed = _common(tokens[:-UNSETTLED], self._last[:-UNSETTLED])
        while agreed and agreed[-1].endswith(CONTINUES):  # half a word is no word
            agreed.pop()
        if len(agreed) > len(self._stable) and agreed[: len(self._stable)] == self._stable:
            self._stable = agreed
        self._last = list(tokens)
        return join(tokens), join(self._stable)


def _common(these: Sequence[str], those: Sequence[str]) -> list[str]:
    """Return the beginning that both share."""
    pairs = zip(these, those, strict=False)
    return [this for this, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
