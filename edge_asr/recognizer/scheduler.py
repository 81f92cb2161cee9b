"""The inference thread: it loads the model, owns it, and answers one request after another."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from edge_asr.types import Recognition, Samples


class Recognizer(Protocol):
    """Samples -> recognition; used by one thread."""

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` float32 samples at 16 kHz. Raises EngineError."""

    def close(self) -> None:
        """Release the model."""


@dataclass(frozen=True, slots=True)
class _Request:
    """Samples that wait for their turn."""

    samples: Samples
    submitted_at: float = field(default_factory=time.monotonic)
    answer: Future[Recognition] = field(default_factory=Future)


class Scheduler:
    """Hands requests to the thread `inference`, in order.

    Whoever submits bounds the queue: a listener has at most a few segments pending and waits for them. The thread is a
    daemon one, so that an inference that takes too long does not keep the process from ending.
    """

    def __init__(self, load: Callable[[], Recognizer]) -> None:
        """`load` makes the recogniser; it runs on the inference thread."""
        self._load = load
        self._loaded: Future[None] = Future()
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()  # None: the end
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    async def start(self) -> None:
        """Load the model. Raises BundleError or EngineError."""
        self._thread.start()
        await asyncio.wrap_future(self._loaded)

    def submit(self, samples: Samples) -> Future[Recognition]:
        """Ask for a recognition; the future can be cancelled until its turn has come."""
        request = _Request(samples)
        self._requests.put(request)
        return request.answer

    async def close(self, timeout_s: float | None = None) -> bool:
        """Finish the request under way, drop the others, release the model.

        False: the request under way took longer than `timeout_s`, and its thread was left behind.
        """
        with contextlib.suppress(queue.Empty):
            while (request := self._requests.get_nowait()) is not None:
                request.answer.cancel()
        self._requests.put(None)
        if self._thread.ident is None:
            return True
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        if not self._loaded.set_running_or_notify_cancel():
            return
        try:
            recognizer = self._load()
        except Exception as error:  # noqa: BLE001 - start() raises it
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        while (request := self._requests.get()) is not None:
            _answer(request, recognizer)
        recognizer.close()


def _answer(request: _Request, recognizer: Recognizer) -> None:
    if not request.answer.set_running_or_notify_cancel():
        return
    waited = (time.monotonic() - request.submitted_at) * 1e3
    try:
        recognition = recognizer.recognize(request.samples)
    except Exception as error:  # noqa: BLE001 - whoever asked gets it
        request.answer.set_exception(error)
    else:
        stages_ms = {"queue": waited, **recognition.stages_ms}
        request.answer.set_result(dataclasses.replace(recognition, stages_ms=stages_ms))
