"""The inference thread: it loads the model, owns it, answers what is most urgent, and changes it between two runs."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from edge_asr import metrics
from edge_asr.budget import CostModel
from edge_asr.errors import BrokenEngineError, EngineError, InterruptedRunError
from edge_asr.recognizer.network import Interruptible, interruptible
from edge_asr.recognizer.paraformer import noise
from edge_asr.recognizer.recognizers import Batching, measured, recognize_all, release, try_on
from edge_asr.recognizer.recognizers import Recognizer as Recognizer  # who makes one finds it beside Scheduler
from edge_asr.recognizer.requests import Priority as Priority  # who asks finds it beside `submit`
from edge_asr.recognizer.requests import Request, Waiting
from edge_asr.recognizer.runs import MOST, SAFETY, Run, Step, may_share
from edge_asr.types import SAMPLE_RATE, Recognition, Samples

WARM_AFTER_S = 2.0
"""An engine that has been idle for so long is slower at first."""
SMALLEST = 7_680
"""Samples of the smallest input: 8 frames of 60 ms."""


@dataclass(frozen=True, slots=True)
class _Swap:
    """A recogniser that waits to take over."""

    recognizer: Recognizer
    costs: CostModel
    done: Future[None]


class Scheduler:
    """Hands requests to the thread `inference`: a microphone's first, then by deadline, then in order.

    What runs gives way to a microphone that would be late otherwise, if the recogniser is Interruptible, and only such
    a one is measured. A partial is cancelled then; a request of NETWORK is begun again, and in the end cut into pieces
    that are short enough, so that it is done however busy the microphone.

    Whoever submits bounds the queue: a listener has at most a few segments pending and waits for them. The threads are
    daemon ones, so that an inference that takes too long does not keep the process from ending.
    """

    def __init__(self, load: Callable[[], Recognizer], batch_wait_s: float = 0.0) -> None:
        """`load` makes the recogniser; it runs on the inference thread.

        `batch_wait_s`: how long a request of NETWORK waits for company, on a recogniser that takes several at a time.
        """
        self._load = load
        self.batch_wait_s = batch_wait_s
        self._loaded: Future[None] = Future()
        self._loaded.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it
        self.costs = CostModel()
        """What a recognition costs; measured when a recogniser is loaded, and with every run."""
        self._interruptible: Sequence[Interruptible] = ()
        """The recogniser, if it is."""
        self._waiting = Waiting()
        self._running: Run | None = None
        self._idle_since = math.inf  # nothing is loaded
        self._taking_over: _Swap | None = None
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="deadlines", daemon=True)
        self._swapped: Future[None] | None = None
        self._swap_thread: threading.Thread | None = None
        self._recent: tuple[Samples, Recognition] | None = None
        """What was spoken last, for another recogniser to be tried on."""
        self._forgotten_at = -math.inf
        self._closing = False
        self._steps = 0
        self._step: Step | None = None
        self._lock = threading.RLock()
        """Of what waits, runs, or is to end."""
        self._changed = threading.Condition(self._lock)
        self._hurried = threading.Condition(self._lock)
        self.broken: Future[None] = Future()
        """Raises BrokenEngineError from when on nothing can be recognised any more, until the process starts anew."""
        self.broken.set_running_or_notify_cancel()

    @property
    def loading(self) -> bool:
        """True while the first model is being loaded."""
        return self._thread.ident is not None and not self._loaded.done()

    async def start(self) -> None:
        """Load the model. Raises BundleError or EngineError."""
        self._thread.start()
        self._watcher.start()
        await asyncio.wrap_future(self._loaded)

    @property
    def step(self) -> Step | None:
        """What the inference thread is at; None while it waits, or loads the first model. Never blocks."""
        return self._step

    @property
    def idle(self) -> bool:
        """True while nothing waits and nothing runs."""
        with self._lock:
            return self._running is None and not len(self._waiting)

    def submit(
        self, samples: Samples, priority: Priority = Priority.MICROPHONE, deadline: float = math.inf
    ) -> Future[Recognition]:
        """Ask for a recognition by `deadline` (monotonic seconds); the future can be cancelled until its turn has come.

        Those of NETWORK and PARTIAL can be cancelled until they are answered.
        """
        request = Request(samples, priority, deadline)
        request.answer.add_done_callback(lambda answer: self._forget(request) if answer.cancelled() else None)
        self._put(request)
        return request.answer

    @property
    def waiting(self) -> int:
        """How many requests wait to be begun with."""
        return len(self._waiting)

    def backlog_ms(self, least: Priority = Priority.MICROPHONE) -> float:
        """Return how many milliseconds of requests of this priority, or a higher one, wait or run, as far as is known.

        It is less where they share runs.
        """
        with self._lock:
            asked = [one.seconds for one in self._waiting if one.priority <= least]
            run = self._running
        backlog = sum(map(self.costs.estimate_ms, asked))
        if run is not None and run.priority <= least:
            backlog += run.left_ms(time.monotonic())
        return backlog

    def warm(self) -> None:
        """Let an engine that has been idle for a while run once on next to nothing: it is needed soon."""
        with self._lock:
            if not self.idle or time.monotonic() - self._idle_since < WARM_AFTER_S:
                return
            self._put(Request(noise()[:SMALLEST], Priority.PARTIAL, counts=False))

    def forget(self) -> None:
        """Keep none of the sound that was submitted so far once it is answered: someone wishes not to be heard."""
        with self._lock:
            self._recent, self._forgotten_at = None, time.monotonic()

    def _forget(self, request: Request) -> None:
        """Let nothing wait that nobody wants any more, and interrupt it where it runs."""
        with self._lock:
            self._waiting.discard(request)
            self._hurry()

    def _put(self, request: Request) -> None:
        with self._lock:
            if not self._closing:
                self._waiting.push(request)
                self._changed.notify()
                self._hurry()
                return
        request.give_up()

    async def swap(self, load: Callable[[], Recognizer]) -> None:
        """Load another recogniser while the present one answers, try it, and let it answer from the next request on.

        `load` runs on a thread of its own. What was recognised last must give much the same text. Raises what `load`
        raises, or EngineError; then the present one goes on.
        """
        if self._closing:
            raise EngineError("no engine answers that could be changed; restart edge-asr")
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
        self._end_waiting()
        all_threads = (self._thread, self._watcher, self._swap_thread)
        threads = [thread for thread in all_threads if thread is not None and thread.ident]
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in threads:
            await asyncio.to_thread(thread.join, None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _end_waiting(self) -> None:
        """Answer nothing from now on, but finish the request under way."""
        with self._lock:
            self._closing = True
            dropped = self._waiting.clear()
            self._changed.notify()
            self._hurried.notify()
        for request in dropped:
            request.give_up()

    def _work(self) -> None:
        try:
            recognizer = self._load()
            self.costs = measured(recognizer)
        except Exception as error:  # noqa: BLE001 - start() raises it
            self._end_waiting()
            self._refuse_swap()
            self._loaded.set_exception(error)
            return
        self._interruptible = interruptible(recognizer)
        self._idle_since = time.monotonic()
        self._loaded.set_result(None)
        while (item := self._next(recognizer)) is not None:
            if isinstance(item, Run):
                self._answer(item, recognizer)
            else:
                release(recognizer)
                recognizer, self.costs = item.recognizer, item.costs
                self._interruptible, self._idle_since = interruptible(recognizer), time.monotonic()
                item.done.set_result(None)
        release(recognizer)

    def _next(self, recognizer: Recognizer) -> _Swap | Run | None:
        """Wait for what is to be done next; None: the end. A recogniser goes first, also then: it is to be released."""
        with self._lock:
            while True:
                if (swap := self._taking_over) is not None:
                    self._taking_over = None
                    self._begin_step(Step(self._steps + 1))
                    return swap
                if self._closing:
                    return None
                if (company_s := self._company_s(recognizer)) > 0:
                    self._step = None
                    self._changed.wait(company_s)
                    continue
                if (first := self._waiting.pop()) is not None:
                    self._running = self._run(first, recognizer)
                    self._begin_step(Step(self._steps + 1, self._running.may_last_s))
                    return self._running
                self._step = None
                self._changed.wait()

    def _company_s(self, recognizer: Recognizer) -> float:
        """Return how long the next request waits for others to share its run, which a microphone's never does."""
        first = self._waiting.first
        if not self.batch_wait_s or first is None or first.priority != Priority.NETWORK or first.alone:
            return 0.0
        if not (isinstance(recognizer, Batching) and recognizer.batches):
            return 0.0
        if len(self._waiting) >= min(recognizer.largest_batch, MOST[Priority.NETWORK]):
            return 0.0
        latest = first.deadline - self.costs.estimate_ms(first.seconds) * SAFETY / 1e3
        return min(first.submitted_at + self.batch_wait_s, latest) - time.monotonic()

    def _begin_step(self, step: Step) -> None:
        self._steps, self._step = step.number, step

    def _run(self, first: Request, recognizer: Recognizer) -> Run:
        """Return a run for the request, and for those which may share it."""
        now, batch = time.monotonic(), [first]
        if len(self._waiting) and isinstance(recognizer, Batching) and recognizer.batches:
            most = recognizer.largest_batch
            batch = self._waiting.pop_companions(first, lambda more: may_share(more, self.costs, now, most))
        run = Run(batch, 0.0, now)
        run.estimate_ms = self.costs.estimate_ms(run.seconds)
        return run

    def _answer(self, run: Run, recognizer: Recognizer) -> None:
        started = time.monotonic()
        try:
            found = recognize_all(recognizer, [request.piece.samples for request in run.requests])
        except InterruptedRunError:
            self._end(run)
            self._begin_again(run)
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            self._end(run)
            self._fail(run, error)
        else:
            took_ms = (time.monotonic() - started) * 1e3
            if run.requests[0].counts:
                self.costs.observe(run.seconds, took_ms)
                _count(run, took_ms)
            self._end(run)
            self._take(run, found, took_ms)

    def _end(self, run: Run) -> None:
        """From here on nobody interrupts it any more: the next run is not to suffer."""
        with self._lock:
            self._running, self._idle_since = None, time.monotonic()
            for recognizer in self._interruptible if run.interrupted else ():
                recognizer.resume()

    def _take(self, run: Run, found: Sequence[Recognition], took_ms: float) -> None:
        """Answer the requests of a run, but for those of which there is more to do."""
        for request, recognition in zip(run.requests, found, strict=True):
            if len(found) > 1:
                request.enforce("batched")
                metrics.ENFORCED.labels("batched").inc()
            whole = request.take(recognition, took_ms)
            if whole is None:
                self._put(request)
                continue
            with self._lock:
                if whole.text and request.counts and request.submitted_at > self._forgotten_at:
                    self._recent = request.samples, whole
            request.settle(whole)

    def _begin_again(self, run: Run) -> None:
        """Let the requests of an interrupted run wait once more, or come to nothing."""
        for request in run.requests:
            if request.answer.cancelled():
                request.give_up()
                continue
            steps = request.interrupted()
            for step in steps if request.counts else ():
                metrics.ENFORCED.labels(step).inc()
            if request.priority == Priority.PARTIAL:
                request.give_up()
            else:
                self._put(request)

    def _fail(self, run: Run, error: Exception) -> None:
        """Tell whoever asked; of several it is not known whose sound was bad: each is asked alone."""
        if len(run.requests) > 1:
            for request in run.requests:
                request.alone = True
                self._put(request)
            return
        run.requests[0].fail(error)
        if isinstance(error, BrokenEngineError) and not self.broken.done():
            self.broken.set_exception(error)

    def _hurry(self) -> None:
        """Interrupt what runs if it is time, or have that watched."""
        with self._lock:
            at = self._interrupt_at()
            if at <= time.monotonic():
                self._interrupt()
            elif at < math.inf:
                self._hurried.notify()

    def _watch(self) -> None:
        """Interrupt what takes longer than was estimated, when a microphone cannot wait any more."""
        with self._lock:
            while not self._closing:
                left_s = self._interrupt_at() - time.monotonic()
                if left_s <= 0:
                    self._interrupt()
                else:
                    self._hurried.wait(min(left_s, threading.TIMEOUT_MAX))

    def _interrupt_at(self) -> float:
        """Return when what runs must be interrupted, inf: never."""
        if self._running is None or not self._interruptible:
            return math.inf
        return self._running.interrupt_at(self._waiting, self.costs, time.monotonic())

    def _interrupt(self) -> None:
        assert self._running is not None
        self._running.interrupted = True
        for recognizer in self._interruptible:
            recognizer.interrupt()

    def _prepare(self, load: Callable[[], Recognizer], done: Future[None]) -> None:
        """Load and try a recogniser, on the thread `swap`, then hand it to the inference thread."""
        try:
            recognizer = load()
            try:
                if (recent := self._recent) is not None:
                    try_on(recognizer, *recent)
                self._hand_over(_Swap(recognizer, measured(recognizer), done))
            except BaseException:  # whatever it was: nobody else knows of this recogniser
                release(recognizer)
                raise
        except Exception as error:  # noqa: BLE001 - swap() raises it
            done.set_exception(error)

    def _refuse_swap(self) -> None:
        """Release a recogniser that waits to take over from one that there will not be."""
        with self._lock:
            swap, self._taking_over = self._taking_over, None
        if swap is not None:
            release(swap.recognizer)
            swap.done.set_exception(EngineError("the first engine could not be loaded; restart edge-asr"))

    def _hand_over(self, swap: _Swap) -> None:
        with self._lock:
            if self._closing:
                raise EngineError("the engine was loaded too late, everything stops")
            self._taking_over = swap
            self._changed.notify()


def _count(run: Run, took_ms: float) -> None:
    metrics.BATCH.observe(len(run.requests))
    metrics.INFERENCE.inc(took_ms / 1e3)
    metrics.RECOGNIZED.inc(sum(len(request.piece.samples) for request in run.requests) / SAMPLE_RATE)
