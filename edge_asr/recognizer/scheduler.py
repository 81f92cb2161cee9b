"""The inference thread: it loads the model, owns it, answers one request after another, and changes it between two."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from edge_asr.budget import CostModel
from edge_asr.errors import BrokenEngineError, EngineError
from edge_asr.recognizer.paraformer import noise
from edge_asr.recognizer.requests import Priority as Priority  # who asks finds it beside `submit`
from edge_asr.recognizer.requests import Request, Waiting
from edge_asr.recognizer.self_test import count_same
from edge_asr.types import Recognition, Samples

log = logging.getLogger(__name__)

WARM_AFTER_S = 2.0
"""An engine that has been idle for so long is slower at first."""
SMALLEST = 7_680
"""Samples of the smallest input: 8 frames of 60 ms."""


class Recognizer(Protocol):
    """Samples -> recognition; used by one thread at a time."""

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` float32 samples at 16 kHz. Raises EngineError."""

    def close(self) -> None:
        """Release the model."""


@dataclass(frozen=True, slots=True)
class _Running:
    """What the inference thread is at."""

    request: Request
    estimate_ms: float
    started_at: float

    def left_ms(self) -> float:
        return max(0.0, self.estimate_ms - (time.monotonic() - self.started_at) * 1e3)


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
        self.costs = CostModel()
        """What a recognition costs."""
        self._waiting = Waiting()
        self._running: _Running | None = None
        self._idle_since = -math.inf
        self._taking_over: _Swap | None = None
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._swapped: Future[None] | None = None
        self._swap_thread: threading.Thread | None = None
        self._recent: tuple[Samples, Recognition] | None = None
        self._closing = False
        self._changed = threading.Condition()
        """Of what waits, runs, or is to end; its lock guards all of that."""
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

    @property
    def idle(self) -> bool:
        """True while nothing waits and nothing runs."""
        with self._changed:
            return self._running is None and not len(self._waiting)

    def submit(
        self, samples: Samples, priority: Priority = Priority.MICROPHONE, deadline: float = math.inf
    ) -> Future[Recognition]:
        """Ask for a recognition by `deadline` (monotonic seconds); the future can be cancelled until its turn has come.

        Those of NETWORK and PARTIAL can be cancelled until they are answered.
        """
        request = Request(samples, priority, deadline)
        self._put(request)
        return request.answer

    def backlog_ms(self) -> float:
        """Return how many milliseconds of microphones' requests wait or run, as far as can be told."""
        with self._changed:
            asked = [one for one in self._waiting if one.priority == Priority.MICROPHONE]
            running = self._running
        backlog = sum(self.costs.estimate_ms(one.seconds) for one in asked)
        if running is not None and running.request.priority == Priority.MICROPHONE:
            backlog += running.left_ms()
        return backlog

    def warm(self) -> None:
        """Let an engine that has been idle for a while run once on next to nothing: it is needed soon."""
        with self._changed:
            if not self.idle or time.monotonic() - self._idle_since < WARM_AFTER_S:
                return
        self._put(Request(noise()[:SMALLEST], Priority.PARTIAL, counts=False))

    def _put(self, request: Request) -> None:
        with self._changed:
            if not self._closing:
                self._waiting.push(request)
                self._changed.notify()
                return
        request.answer.cancel()

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
        with self._changed:
            self._closing = True
            dropped = self._waiting.clear()
            self._changed.notify()
        for request in dropped:
            request.answer.cancel()
        threads = [thread for thread in (self._thread, self._swap_thread) if thread is not None and thread.ident]
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in threads:
            await asyncio.to_thread(thread.join, None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _work(self) -> None:
        if not self._loaded.set_running_or_notify_cancel():
            return
        try:
            recognizer = self._load()
        except Exception as error:  # noqa: BLE001 - start() raises it
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        while (item := self._next()) is not None:
            if isinstance(item, _Swap):
                _release(recognizer)
                recognizer = item.recognizer
                item.done.set_result(None)
            else:
                self._answer(item, recognizer)
        _release(recognizer)

    def _next(self) -> _Swap | _Running | None:
        """Wait for what is to be done next; None: the end. A recogniser goes first, also then: it is to be released."""
        with self._changed:
            while True:
                if (swap := self._taking_over) is not None:
                    self._taking_over = None
                    return swap
                if self._closing:
                    return None
                if (request := self._waiting.pop()) is not None:
                    estimate = self.costs.estimate_ms(request.seconds)
                    self._running = _Running(request, estimate, time.monotonic())
                    return self._running
                self._changed.wait()

    def _answer(self, running: _Running, recognizer: Recognizer) -> None:
        request, started = running.request, running.started_at
        try:
            recognition = recognizer.recognize(request.samples)
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            self._done()
            request.fail(error)
            if isinstance(error, BrokenEngineError) and not self.broken.done():
                self.broken.set_exception(error)
            return
        if request.counts:
            self.costs.observe(request.seconds, (time.monotonic() - started) * 1e3)
        self._done()
        if recognition.text:
            self._recent = request.samples, recognition
        waited = (started - request.submitted_at) * 1e3
        stages_ms = {"queue": waited, **recognition.stages_ms}
        request.settle(dataclasses.replace(recognition, stages_ms=stages_ms))

    def _done(self) -> None:
        with self._changed:
            self._running, self._idle_since = None, time.monotonic()

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
        with self._changed:
            if self._closing:
                raise EngineError("the engine was loaded too late, everything stops")
            self._taking_over = swap
            self._changed.notify()


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
