"""/captions: what is said near the appliance, for those who watch, as it is spoken; and how things are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from edge_asr.serve.replies import Outgoing
from edge_asr.types import Partial, Transcript, iso_time

HISTORY = 200
"""Sentences whose latency is remembered, without what was said."""
LEVELS_EVERY_S = 0.1
VIEWERS = 32
"""As many may watch at a time."""

Levels = Callable[[], Mapping[str, float]]


class Captions:
    """Takes transcripts, partials and states from any thread, and tells those who watch. Nobody: it costs nothing.

    Nothing that was said is kept for who comes later.
    """

    def __init__(self, levels: Levels) -> None:
        """`levels`: how loud each source is, in dB of full scale; asked ten times a second while somebody watches."""
        self._levels = levels
        self._lock = threading.Lock()  # of the two that any thread writes
        self._history: deque[Mapping[str, Any]] = deque(maxlen=HISTORY)
        self._state: Mapping[str, Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._viewers: set[Outgoing[str]] = set()
        self._metering: asyncio.Task[None] | None = None

    def offer(self, transcript: Transcript) -> None:
        """Take a transcript whose trace is complete. None of its partials comes after it."""
        trace = _trace(transcript)
        with self._lock:
            self._history.append(trace)
        self._tell(object(), {"type": "said", **transcript.to_json()}, ("partial", transcript.id))

    def offer_partial(self, partial: Partial) -> None:
        """Take what is known of a segment so far."""
        self._tell(("partial", partial.id), {"type": "partial", **partial.to_json()})

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take how things are now."""
        with self._lock:
            self._state = state
        self._tell("state", {"type": "state", **state})

    @property
    def crowded(self) -> bool:
        """True while nobody else may watch."""
        return len(self._viewers) >= VIEWERS

    @contextlib.contextmanager
    def watching(self) -> Iterator[Outgoing[str]]:
        """Yield what a viewer is to be told: texts of JSON, first `state` and `history`. For the server's loop."""
        self._loop = asyncio.get_running_loop()
        viewer: Outgoing[str] = Outgoing()
        with self._lock:
            history, state = list(self._history), self._state
            self._viewers.add(viewer)
        viewer.put("state", _text({"type": "state", **state}))
        viewer.put("history", _text({"type": "history", "sentences": history}))
        if self._metering is None:
            self._metering = asyncio.create_task(self._meter(), name="levels")
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)
            if not self._viewers:
                self._metering.cancel()
                self._metering = None

    def _tell(self, key: Hashable, message: Mapping[str, Any], instead_of: Hashable = None) -> None:
        if self._loop is not None and self._viewers:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                self._loop.call_soon_threadsafe(self._spread, key, message, instead_of)

    def _spread(self, key: Hashable, message: Mapping[str, Any], instead_of: Hashable) -> None:
        text = _text(message)
        for viewer in self._viewers:
            viewer.drop(instead_of)
            viewer.put(key, text)

    async def _meter(self) -> None:
        while True:
            levels = {name: round(level, 1) for name, level in self._levels().items()}
            self._spread("levels", {"type": "levels", "levels": levels}, None)
            await asyncio.sleep(LEVELS_EVERY_S)


def _trace(transcript: Transcript) -> dict[str, Any]:
    """Return where the time of a sentence went, without what was said."""
    return {
        "start": None if transcript.started_at is None else iso_time(transcript.started_at),
        "source": transcript.source,
        "latency_ms": {stage: round(value, 2) for stage, value in transcript.latency_ms.items()},
        "within_budget": transcript.within_budget,
        "decoded_at_pause": transcript.decoded_at_pause,
        "lost": transcript.lost,
    }


def _text(message: Mapping[str, Any]) -> str:
    return json.dumps(message)  # ASCII: a byte of a file name that is no text could not be sent otherwise
