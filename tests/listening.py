"""What tests of a listener are made of: a source and a detector that the test feeds, a sink that keeps everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np

from edge_asr.budget import LatencyBudget
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Chunk, Partial, Transcript

BUDGET = LatencyBudget(300)
SPEECH, SILENCE, LOST = "x", ".", "!"
GAP = 100
"""Chunks that are missing where there is a `!`, itself counted: 3.2 s."""


class Fed:
    """A source whose chunks come when the test says so; a chunk's samples tell whether it is speech, or lost."""

    name = "fed"

    def __init__(self, pattern: str, then_wait: bool = False, pace: float = 1.0) -> None:
        """`pace`: seconds that pass for each second of sound."""
        self._chunks = []
        index = 0
        for mark in pattern:
            samples = np.full(CHUNK_SAMPLES, float(mark == SPEECH), np.float32)
            self._chunks.append(Chunk(samples, index, pace * index / SAMPLE_RATE, mark == LOST))
            index += CHUNK_SAMPLES * (GAP if mark == LOST else 1)
        self._then_wait = then_wait
        self.taken = asyncio.Event()
        self._closed = asyncio.Event()

    async def chunks(self) -> AsyncIterator[Chunk]:
        for chunk in self._chunks:
            yield chunk
        self.taken.set()
        if self._then_wait:
            await self._closed.wait()

    def close(self) -> None:
        self._closed.set()


class ByLevel:
    """A detector that notes how many chunks it had heard whenever it was reset."""

    def __init__(self) -> None:
        self.heard = 0
        self.resets: list[int] = []

    def __call__(self, chunk: Chunk) -> float:
        assert not chunk.lost
        self.heard += 1
        return float(chunk.samples[0])

    def reset(self) -> None:
        self.resets.append(self.heard)


class Collector:
    def __init__(self) -> None:
        self.transcripts: list[Transcript] = []
        self.partials: list[Partial] = []

    def offer(self, transcript: Transcript) -> None:
        self.transcripts.append(transcript)

    def offer_partial(self, partial: Partial) -> None:
        self.partials.append(partial)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Exactly:
    """A wake phrase that is these very tokens."""

    def __init__(self, phrase: str) -> None:
        self._phrase = tuple(phrase)

    def after(self, tokens: Sequence[str]) -> int | None:
        return len(self._phrase) if tuple(tokens[: len(self._phrase)]) == self._phrase else None

    def may_follow(self, tokens: Sequence[str]) -> bool:
        return all(token == wanted for token, wanted in zip(tokens, self._phrase, strict=False))
