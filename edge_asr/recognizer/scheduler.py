"""The inference thread: it loads the model, owns it, and answers one request after another."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from edge_asr.types import Recognition, Samples


class Recognizer(Protocol):
    """Samples -> recognition; used by one thread."""

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` float32 samples at 16 kHz. Raises EngineError."""

    def close(self) -> None:
        """Release the model."""


class Scheduler:
    """Hands requests to the thread `inference`, in order.

    Whoever submits bounds the queue: a listener has at most a few segments pending and waits for them.
    """

    def __init__(self, load: Callable[[], Recognizer]) -> None:
        """`load` makes the recogniser; it runs on the inference thread."""
        self._load = load
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._recognizer: Recognizer | None = None

    async def start(self) -> None:
        """Load the model. Raises BundleError or EngineError."""
        self._recognizer = await asyncio.wrap_future(self._thread.submit(self._load))

    def submit(self, samples: Samples) -> Future[Recognition]:
        """Ask for a recognition; the future can be cancelled until its turn has come."""
        return self._thread.submit(self._recognize, samples, time.monotonic())

    async def close(self) -> None:
        """Finish the request under way, drop the others, release the model."""
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        if self._recognizer is not None:
            self._recognizer.close()

    def _recognize(self, samples: Samples, submitted_at: float) -> Recognition:
        assert self._recognizer is not None, "start() comes first"
        waited = (time.monotonic() - submitted_at) * 1e3
        recognition = self._recognizer.recognize(samples)
        return dataclasses.replace(recognition, stages_ms={"queue": waited, **recognition.stages_ms})
