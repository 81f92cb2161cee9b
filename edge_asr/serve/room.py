"""How much decoded sound is in memory at a time: a small file may hold hours of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_asr import metrics
from edge_asr.errors import BusyError


class Place:
    """So many seconds of sound, kept for one request."""

    def __init__(self, room: Room, seconds: float) -> None:
        self._room = room
        self.seconds = seconds

    def shrink(self, seconds: float) -> None:
        """Keep less: the sound has turned out to be so long."""
        self._room.give_back(self.seconds - seconds)
        self.seconds = seconds


class Room:
    """Seconds of sound that may be in memory. Who comes first is served first. For one event loop's thread."""

    def __init__(self, seconds: float, wait_s: float) -> None:
        """`wait_s`: so long is waited for a place."""
        self.free_s = seconds
        self._wait_s = wait_s
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def place(self, seconds: float) -> AsyncIterator[Place]:
        """Keep a place for as much sound as it may be, until the block ends. Raises BusyError."""
        await self._take(seconds)
        place = Place(self, seconds)
        try:
            yield place
        finally:
            self.give_back(place.seconds)

    def give_back(self, seconds: float) -> None:
        """Let others have it."""
        self.free_s += seconds
        while self._waiting and self._waiting[0][0] <= self.free_s:
            wanted, turn = self._waiting.popleft()
            self.free_s -= wanted
            turn.set_result(None)

    async def _take(self, seconds: float) -> None:
        if not self._waiting and seconds <= self.free_s:
            self.free_s -= seconds
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((seconds, turn))
        try:
            await asyncio.wait_for(asyncio.shield(turn), self._wait_s)
        except asyncio.TimeoutError:
            self._leave(seconds, turn)
            metrics.REFUSED.labels("wait").inc()
            why = f"the recordings of others took more than {self._wait_s:g} s; ask again later"
            raise BusyError(why, self._wait_s) from None
        except asyncio.CancelledError:
            self._leave(seconds, turn)
            raise

    def _leave(self, seconds: float, turn: asyncio.Future[None]) -> None:
        """Give up one's turn, which may just have come."""
        if turn.done():
            self.give_back(seconds)
        else:
            self._waiting.remove((seconds, turn))
            self.give_back(0.0)  # who stands behind may have been waiting for this one only
