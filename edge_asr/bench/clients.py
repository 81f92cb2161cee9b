"""Clients of the network beside the microphones: each asks for one long recording after another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from edge_asr.recognizer.scheduler import Priority, Scheduler
from edge_asr.types import SAMPLE_RATE, Samples

RECORDING_S = 30
"""The longest that is recognised in one piece."""
LEVEL = 0.1


@dataclass(slots=True)
class Served:
    """What became of the clients' requests."""

    requests: int = 0
    """Answered."""
    cut: int = 0
    """Of those, recognised in parts, because microphones interrupted them."""


@asynccontextmanager
async def asking(scheduler: Scheduler, clients: int) -> AsyncIterator[Served]:
    """Let so many clients ask until the block ends, each for the next recording when it has its answer."""
    served = Served()
    asked = [asyncio.create_task(_ask(scheduler, n, served), name=f"client {n}") for n in range(clients)]
    try:
        yield served
    finally:
        for task in asked:
            task.cancel()
        ended = await asyncio.gather(*asked, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):  # one that asks no more makes the figures better than they are
            raise error


async def _ask(scheduler: Scheduler, number: int, served: Served) -> None:
    samples = _recording(number)
    while True:
        found = await asyncio.wrap_future(scheduler.submit(samples, Priority.NETWORK))
        served.requests += 1
        served.cut += "cut" in found.enforced


def _recording(number: int) -> Samples:
    sound: Samples = np.random.default_rng(number).standard_normal(RECORDING_S * SAMPLE_RATE).astype(np.float32)
    sound *= np.float32(LEVEL)
    return sound
