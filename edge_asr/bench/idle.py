"""What the appliance takes while nobody speaks: the daemon in a process of its own, fed with noise as it would come."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
from prometheus_client import REGISTRY

from edge_asr import logs, metrics
from edge_asr.app import Daemon
from edge_asr.bench.proc import Reading, cpu_share, read_process, trend, wakeups_per_s
from edge_asr.bench.progress import Tick, shown
from edge_asr.config import Config, ListenConfig, StdinSourceConfig
from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.fresh_state import fresh_state
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE

NOISE = 1e-3
"""Deviation of the noise, -60 dBFS: a quiet room."""
NOISE_S = 60
"""It is the same again after so long."""
READ_EVERY_S = 1.0
WARM_UP_S = 60.0
"""The beginning, which is not counted; a tenth of a short run."""
END_S = 30.0
"""How long the daemon may take to end."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error that has ended the daemon."""

    text: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class _Child:
    """A daemon at work."""

    process: SpawnProcess
    sound: Connection
    """Where its standard input comes from."""
    told: Connection
    """Says `True` when it listens, and what was counted, or what went wrong, at its end."""

    def hear(self) -> Any:
        """Return what it says next. Raises the error that has ended it."""
        try:
            said = self.told.recv()
        except EOFError:
            self.process.join(END_S)
            raise EdgeAsrError(f"the daemon of the bench has ended with {self.process.exitcode}") from None
        if isinstance(said, _Failure):
            error = EdgeAsrError(said.text)
            error.exit_code = said.exit_code
            raise error
        return said


def idle(config: Config, minutes: float) -> dict[str, Any]:
    """Let the daemon listen to noise for so long, and return the figures, as printed with `--json`.

    Raises EdgeAsrError, with the exit code of what has ended the daemon, and KeyboardInterrupt where a signal ends it.
    """
    seconds = minutes * 60
    with _interruptible(), fresh_state(config) as fresh, _listening(_quiet(fresh)) as child:
        child.hear()
        with shown("idle", seconds) as tick:
            readings = _feed(child, seconds, tick)
        child.sound.close()
        counted = child.hear()
    return {"minutes": minutes, **_figures(readings, min(WARM_UP_S, seconds / 10)), **counted}


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: everything is cleaned up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet(config: Config) -> Config:
    """Return the configuration with nothing but noise to hear, and always."""
    return config.model_copy(
        update={"sources": (StdinSourceConfig(),), "mqtt": MqttConfig(enabled=False), "listen": ListenConfig()}
    )


def _feed(child: _Child, seconds: float, tick: Tick) -> list[Reading]:
    """Send noise, a chunk whenever a microphone would have one; return what the daemon took, once a second."""
    noise = NOISE * np.random.default_rng(0).standard_normal((int(NOISE_S / CHUNK_S), CHUNK_SAMPLES))
    chunks = [chunk.tobytes() for chunk in np.round(noise * 32768).astype("<i2")]
    started = time.monotonic()
    readings: list[Reading] = []
    for number in range(1, round(seconds * SAMPLE_RATE / CHUNK_SAMPLES) + 1):
        time.sleep(max(0.0, started + number * CHUNK_S - time.monotonic()))
        try:
            os.write(child.sound.fileno(), chunks[number % len(chunks)])
        except BrokenPipeError:
            child.hear()  # says why
            raise
        if number * CHUNK_S >= len(readings) * READ_EVERY_S:
            readings.append(read_process(child.process.pid or 0))
            tick(number * CHUNK_S)
    return readings


def _figures(readings: list[Reading], warm_up_s: float) -> dict[str, Any]:
    """Return what was taken after the warm-up."""
    warm = [reading for reading in readings if reading.at >= readings[0].at + warm_up_s]
    sizes = [reading.rss_bytes / 1e6 for reading in warm]
    slope = trend([reading.at / 3600 for reading in warm], sizes)
    return {
        "seconds": round(warm[-1].at - warm[0].at, 1),
        "cpu_share": round(cpu_share(warm), 4),
        "wakeups_per_s": round(wakeups_per_s(warm), 1),
        "rss_start_mb": round(sizes[0], 2),
        "rss_end_mb": round(sizes[-1], 2),
        "rss_max_mb": round(max(sizes), 2),
        "slope_mb_per_h": None if slope is None else round(slope[0], 3),
        "slope_error_mb_per_h": None if slope is None else round(slope[1], 3),
    }


@contextmanager
def _listening(config: Config) -> Iterator[_Child]:
    """Start a daemon; none is left behind."""
    context = get_context("spawn")
    heard, sound = context.Pipe(duplex=False)
    told, tells = context.Pipe(duplex=False)
    process = context.Process(target=_listen, args=(config, heard, tells))
    process.start()
    heard.close()
    tells.close()
    try:
        yield _Child(process, sound, told)
    finally:
        sound.close()
        process.join(END_S)
        process.kill()
        process.join()
        told.close()


def _listen(config: Config, heard: Connection, tells: Connection) -> None:
    """Be the daemon; `heard` is standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever has started us, and then nothing more comes
    logs.set_up(config.log)
    sys.stdin = os.fdopen(heard.fileno(), "r", closefd=False)
    try:
        tells.send(asyncio.run(_daemon(config, tells)))
    except EdgeAsrError as error:
        tells.send(_Failure(str(error), error.exit_code))  # not every error can be sent itself


async def _daemon(config: Config, tells: Connection) -> Mapping[str, Any]:
    daemon = Daemon(config)
    async with daemon.running():
        tells.send(True)
        await daemon.finished()
        return {
            "segments": _count("edge_asr_segments_total"),
            "transcripts": _count("edge_asr_transcripts_total"),
            "model": config.model.name,
            "engine": next((name for name in metrics.ENGINES if _count("edge_asr_engine", engine=name)), None),
            "threads": config.engine.threads,
        }


def _count(name: str, **labels: str) -> int:
    return round(REGISTRY.get_sample_value(name, labels) or 0)
