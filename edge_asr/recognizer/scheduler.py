"""The inference thread: it loads the model, owns it, answers one request after another, and changes it between two."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from edge_asr.errors import BrokenEngineError, EngineError
from edge_asr.recognizer.self_test import count_same
from edge_asr.types import Recognition, Samples

log = logging.getLogger(__name__)


class Recognizer(Protocol):
    """Samples -> recognition; used by one thread at a time."""

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


@dataclass(frozen=True, slots=True)
class _Swap:
    """A recogniser that waits to take over."""

    recognizer: Recognizer
    done: Future[None]


class Scheduler:
    """Hands requests to the thread `inference`, in order.

    Whoever submits bounds the queue: a listener has at most a few segments pending and waits for them. The threads are
    daemon ones, so that an inference that takes too long does not keep the process from ending.
    """

    def __init__(self, load: Callable[[], Recognizer]) -> None:
        """`load` makes the recogniser; it runs on the inference thread."""
        self._load = load
        self._loaded: Future[None] = Future()
        self._requests: queue.SimpleQueue[_Request | _Swap | None] = queue.SimpleQueue()  # None: the end
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._swapped: Future[None] | None = None
        self._swap_thread: threading.Thread | None = None
        self._recent: tuple[Samples, Recognition] | None = None
        self._closing = False
        self._lock = threading.Lock()
        self.broken: Future[None] = Future()
        """Raises BrokenEngineError from when on nothing can be recognised any more, until the process starts anew."""
        self.broken.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it

    @property
    def loading(self) -> bool:
        """True while the first model is being loaded."""
        return self._thread.ident is not None and not self._loaded.done()

    async def start(self) -> None:
        """Load the model. Raises BundleError or EngineError."""
        self._thread.start()
        await asyncio.wrap_future(self._loaded)

    def submit(self, samples: Samples) -> Future[Recognition]:
        """Ask for a recognition; the future can be cancelled until its turn has come."""
        request = _Request(samples)
        self._requests.put(request)
        return request.answer

    async def swap(self, load: Callable[[], Recognizer]) -> None:
        """Load another recogniser while the present one answers, try it, and let it answer from the next request on.

        `load` runs on a thread of its own. What was recognised last must give much the same text. Raises what `load`
        raises, or EngineError; then the present one goes on.
        """
        if self._swapped is not None and not self._swapped.done():
            raise EngineError("another engine is being loaded already; try again when it is done")
        self._swapped = Future()
        self._swapped.set_running_or_notify_cancel()  # whoever waits may give up, the thread goes on
        self._swap_thread = threading.Thread(target=self._prepare, args=(load, self._swapped), name="swap", daemon=True)
        self._swap_thread.start()
        await asyncio.wrap_future(self._swapped)

    async def close(self, timeout_s: float | None = None) -> bool:
        """Finish the request under way, drop the others, release the model.

        False: the request under way, or a load, took longer than `timeout_s`, and its thread was left behind.
        """
        with self._lock:
            self._closing = True
            self._drop_requests()
            self._requests.put(None)
        threads = [thread for thread in (self._thread, self._swap_thread) if thread is not None and thread.ident]
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in threads:
            await asyncio.to_thread(thread.join, None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _drop_requests(self) -> None:
        """Cancel what waits, but for a recogniser: the inference thread takes it, and releases it with its end."""
        swaps = []
        with contextlib.suppress(queue.Empty):
            while (item := self._requests.get_nowait()) is not None:
                if isinstance(item, _Swap):
                    swaps.append(item)
                else:
                    item.answer.cancel()
        for swap in swaps:
            self._requests.put(swap)

    def _work(self) -> None:
        if not self._loaded.set_running_or_notify_cancel():
            return
        try:
            recognizer = self._load()
        except Exception as error:  # noqa: BLE001 - start() raises it
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        while (item := self._requests.get()) is not None:
            if isinstance(item, _Swap):
                _release(recognizer)
                recognizer = item.recognizer
                item.done.set_result(None)
            else:
                self._answer(item, recognizer)
        _release(recognizer)

    def _answer(self, request: _Request, recognizer: Recognizer) -> None:
        if not request.answer.set_running_or_notify_cancel():
            return
        waited = (time.monotonic() - request.submitted_at) * 1e3
        try:
            recognition = recognizer.recognize(request.samples)
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            request.answer.set_exception(error)
            if isinstance(error, BrokenEngineError) and not self.broken.done():
                self.broken.set_exception(error)
            return
        if recognition.text:
            self._recent = request.samples, recognition
        stages_ms = {"queue": waited, **recognition.stages_ms}
        request.answer.set_result(dataclasses.replace(recognition, stages_ms=stages_ms))

    def _prepare(self, load: Callable[[], Recognizer], done: Future[None]) -> None:
        """Load and try a recogniser, on the thread `swap`, then hand it to the inference thread."""
        try:
            recognizer = load()
            try:
                self._try(recognizer)
                self._hand_over(_Swap(recognizer, done))
            except BaseException:  # whatever it was: nobody else knows of this recogniser
                _release(recognizer)
                raise
        except Exception as error:  # noqa: BLE001 - swap() raises it
            done.set_exception(error)

    def _try(self, recognizer: Recognizer) -> None:
        """Let a recogniser hear what was spoken last. Raises EngineError."""
        if self._recent is None:
            return
        samples, expected = self._recent
        found = recognizer.recognize(samples)
        if not are_alike(found, expected):
            raise EngineError(
                f"the new engine hears {len(found.tokens)} tokens in what was spoken last, the present one"
                f" {len(expected.tokens)}, and too few are the same"
            )

    def _hand_over(self, swap: _Swap) -> None:
        with self._lock:
            if self._closing:
                raise EngineError("the engine was loaded too late, everything stops")
            self._requests.put(swap)


def are_alike(found: Recognition, expected: Recognition) -> bool:
    """Tell whether two engines agree on a sound: but for one token, or half of them where there are many."""
    if bool(found.text) != bool(expected.text):
        return False
    texts = [[token.text for token in one.tokens] for one in (found, expected)]
    longest = max(map(len, texts))
    return longest - count_same(*texts) <= max(1, longest // 2)


def _release(recognizer: Recognizer) -> None:
    try:
        recognizer.close()
    except Exception as error:  # noqa: BLE001 - whatever its library says to that: it is no longer in use
        log.warning("an engine that is no longer in use could not be released: %s", error)
