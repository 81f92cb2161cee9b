"""A replay at the pace of speech through the whole appliance: streams, daemon, broker, subscriber."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_asr.app import STOP_SIGNALS, Daemon
from edge_asr.bench.clients import Served, asking
from edge_asr.bench.progress import EVERY_S, Tick, shown
from edge_asr.bench.subscriber import subscribed
from edge_asr.bench.tape import Tape, record_all
from edge_asr.bench.verdict import Counts, judge, place
from edge_asr.broker import HOST, Broker, serving
from edge_asr.config import Config, FileSourceConfig, GatesConfig, ListenConfig
from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.fresh_state import fresh_state
from edge_asr.types import SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay came to."""

    figures: Mapping[str, Any]
    """As they are printed with `--json`."""
    failure: EdgeAsrError | None
    """What the daemon complains of at the end, such as segments lost."""


def replay(config: Config, files: Sequence[str], streams: int, clients: int = 0) -> Outcome:
    """Play every file on each of so many streams, at the pace of speech, beside so many clients, and measure.

    Raises AudioError, ConfigError, BundleError, EngineError, and KeyboardInterrupt where a signal ends it.
    """
    return asyncio.run(_until_stopped(config, tuple(dict.fromkeys(files)), streams, clients))


async def _until_stopped(config: Config, files: Sequence[str], streams: int, clients: int) -> Outcome:
    replaying = asyncio.create_task(_replay(config, files, streams, clients), name="replay")
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, replaying.cancel)
    try:
        return await replaying
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _replay(config: Config, files: Sequence[str], streams: int, clients: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="edge_asr-bench-") as name, fresh_state(config) as fresh:
        folder = Path(name)
        tapes = record_all(folder, files, streams)
        messages = folder / "messages"
        async with serving() as broker:
            played = _played(fresh, tapes, broker)
            topic = f"{played.mqtt.base}/{played.device_id}/transcript"
            async with subscribed(broker.port, topic, messages) as subscriber:
                before = Counts.now()
                seconds = max(tape.length for tape in tapes.values()) / SAMPLE_RATE
                failure, served = await _run(Daemon(played), seconds, clients)
                counts = Counts.now().since(before)
                events = await subscriber.collect()
        figures = judge(place(events, tapes), tapes, counts)
    beside = {"clients": clients, "client_requests": served.requests, "client_requests_cut": served.cut}
    return Outcome({**figures, **_circumstances(config, streams, broker.program, events), **beside}, failure)


def _played(config: Config, tapes: Mapping[str, Tape], broker: Broker) -> Config:
    """Return the configuration with the tapes as sources, to be published at this port, whatever is said."""
    return config.model_copy(
        update={
            "sources": tuple(FileSourceConfig(path=tape.path, name=name) for name, tape in tapes.items()),
            "mqtt": MqttConfig(
                host=HOST, port=broker.port, protocol=broker.protocol, base=config.mqtt.base, commands=False
            ),
            "gates": GatesConfig(min_confidence=0, min_speech_ratio=0, min_steadiness=0, max_tokens_per_s=0),
            "listen": ListenConfig(),
        }
    )


async def _run(daemon: Daemon, seconds: float, clients: int) -> tuple[EdgeAsrError | None, Served]:
    """Play all tapes to their end; return what the daemon complains of, and what the clients had."""
    async with daemon.running(), asking(daemon.scheduler, clients) as served:
        with shown("replay", seconds) as tick:
            async with _ticking(tick):
                try:
                    await daemon.finished()
                except EdgeAsrError as error:  # what it was worth is told beside it
                    return error, served
    return None, served


@asynccontextmanager
async def _ticking(tick: Tick) -> AsyncIterator[None]:
    """Tell now and then how much time has passed."""

    async def tell() -> None:
        started = time.monotonic()
        while True:
            tick(time.monotonic() - started)
            await asyncio.sleep(EVERY_S)

    telling = asyncio.create_task(tell(), name="progress")
    try:
        yield
    finally:
        telling.cancel()


def _circumstances(config: Config, streams: int, broker: str, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    engines = Counter(event["engine"] for event in events if event["engine"])
    return {
        "streams": streams,
        "preset": config.segment.preset,
        "content_endpointing": config.segment.content_endpointing,
        "response_budget_ms": config.budget.response_ms,
        "model": config.model.name,
        "engine": engines.most_common(1)[0][0] if engines else None,
        "threads": config.engine.threads,
        "broker": broker,
    }
