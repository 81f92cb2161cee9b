"""Room for decoded sound: who comes first is served first, and nothing of it is lost."""

from __future__ import annotations

import asyncio
import random

import pytest
from mosquitto import PATIENCE_S

from edge_asr.errors import BusyError
from edge_asr.serve.room import Room


async def test_there_is_no_more_than_fits() -> None:
    """Many of all lengths, some of which give up while they wait or hold."""
    room, most, held = Room(100.0, PATIENCE_S), 0.0, 0.0
    chance = random.Random(0)

    async def take(seconds: float) -> None:
        nonlocal held, most
        async with room.place(seconds) as place:
            held += place.seconds
            most = max(most, held)
            await asyncio.sleep(0)
            held -= place.seconds
            place.shrink(seconds / 2)
            held += place.seconds
            try:
                await asyncio.sleep(0.001)
            finally:
                held -= place.seconds

    tasks = [asyncio.create_task(take(chance.choice((1.0, 40.0, 100.0)))) for _ in range(300)]
    while pending := [task for task in tasks if not task.done()]:
        chance.choice(pending).cancel()
        await asyncio.sleep(0.001)
    assert 0 < most <= 100
    assert (room.free_s, held) == (100.0, 0.0)


async def test_a_long_one_is_not_passed_by_short_ones() -> None:
    room, order = Room(10.0, PATIENCE_S), []

    async def take(seconds: float) -> None:
        async with room.place(seconds):
            order.append(seconds)

    async with room.place(5.0):
        waiting = [asyncio.create_task(take(seconds)) for seconds in (10.0, 1.0, 2.0)]
        await asyncio.sleep(0)
        assert order == []
        waiting[0].cancel()  # and those behind it need not wait for anybody
        await asyncio.gather(*waiting[1:])
    assert order == [1.0, 2.0]


async def test_who_waits_too_long_is_told_to_come_back() -> None:
    room = Room(1.0, 0.01)
    async with room.place(1.0):
        with pytest.raises(BusyError, match="ask again later"):
            await asyncio.wait_for(room._take(0.5), PATIENCE_S)
    assert room.free_s == 1.0
