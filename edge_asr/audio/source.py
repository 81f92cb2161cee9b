"""What a source of sound is, and how its samples become chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import numpy as np

from edge_asr.types import CHUNK_SAMPLES, Chunk, Samples


class AudioSource(Protocol):
    """Sound from one place, once: a source is used for one iteration and then closed."""

    @property
    def name(self) -> str:
        """What transcripts call the source: `file:` and the path as given, `stdin`, `microphone:` and the device."""

    def chunks(self) -> AsyncIterator[Chunk]:
        """Yield the sound as it comes; the last chunk is padded with zeros. Raises AudioError.

        `index` grows by 512, except after a chunk that is `lost`: there it grows by as much sound as is missing.
        """

    def close(self) -> None:
        """End the iteration and release threads and devices; may be called twice, from the event loop's thread."""


class Chunker:
    """Turns blocks of samples of any length into chunks."""

    def __init__(self, captured_at: Callable[[int], float], first: int = 0) -> None:
        """`captured_at` gives the monotonic seconds of the sample at an index; asked when a chunk is taken.

        `first`: the index of the first sample.
        """
        self._captured_at = captured_at
        self._rest: Samples = np.zeros(0, np.float32)
        self._index = first

    def push(self, samples: Samples) -> Iterator[Chunk]:
        """Yield the chunks that `samples` (`[n]` float32) complete: views of them. Take all before the next call."""
        samples = np.concatenate((self._rest, samples))
        whole = len(samples) - len(samples) % CHUNK_SAMPLES
        self._rest = samples[whole:]
        for piece in samples[:whole].reshape(-1, CHUNK_SAMPLES):
            index = self._index
            self._index += CHUNK_SAMPLES
            yield Chunk(piece, index, self._captured_at(index))

    def flush(self) -> Iterator[Chunk]:
        """Yield what is left at the end of the source, if anything, padded with zeros to a chunk."""
        if len(self._rest):
            yield from self.push(np.zeros(CHUNK_SAMPLES - len(self._rest), np.float32))
