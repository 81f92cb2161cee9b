"""The chunks of a source that a segment may still need, and how a segment is cut out of them."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from edge_asr.speech.energy import end_of_sound
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE, Chunk, Marks, Samples, Segment, SegmentId


class Recording:
    """Chunks in order, counted from 0; those that nobody needs any more are dropped."""

    def __init__(self) -> None:
        self._chunks: deque[Chunk] = deque()
        self._first = 0

    def append(self, chunk: Chunk) -> None:
        """Take the next chunk."""
        self._chunks.append(chunk)

    def forget(self, before: int) -> None:
        """Drop the chunks before chunk `before`."""
        while self._chunks and self._first < before:
            self._chunks.popleft()
            self._first += 1

    def between(self, start: int, end: int) -> list[Chunk]:
        """Return chunks `start` to `end` (exclusive)."""
        return [self._chunks[k - self._first] for k in range(start, end)]

    def samples(self, start: int, end: int) -> Samples:
        """Return the sound of chunks `start` to `end` (exclusive)."""
        return np.concatenate([chunk.samples for chunk in self.between(start, end)])

    def captured_at(self, chunk: int) -> float:
        """Return the monotonic seconds of a chunk's first sample."""
        return self._chunks[chunk - self._first].captured_at

    def cut(self, segment_id: SegmentId, start: int, end: int, speech: int, live: bool) -> Segment:
        """Return chunks `start` to `end` as a segment that the last chunk has ended; `live`: its moments are known."""
        now, now_wall = time.monotonic(), time.time()
        ended_at = min(now, self._chunks[-1].captured_at + CHUNK_S)  # though it may have had to wait since
        chunks = self.between(start, end)
        samples = np.concatenate([chunk.samples for chunk in chunks])
        return Segment(
            id=segment_id,
            revision=0,
            samples=samples,
            index=chunks[0].index,
            speech_ratio=speech / len(chunks),
            started_at=now_wall - (now - chunks[0].captured_at) if live else None,
            marks=Marks(_sound_ended_at(chunks, samples), ended_at, now) if live else None,
        )


def _sound_ended_at(chunks: list[Chunk], samples: Samples) -> float:
    sound_end = end_of_sound(samples)
    last = chunks[(sound_end - 1) // CHUNK_SAMPLES]
    within = sound_end - (last.index - chunks[0].index)
    return last.captured_at + within / SAMPLE_RATE
