"""What the `devices` command does: input devices as a table or as JSON, and a level meter."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edge_asr.audio.devices import InputDevice, choose, matching
from edge_asr.audio.microphone import MicrophoneSource
from edge_asr.audio.portaudio import input_devices
from edge_asr.config import MicrophoneSourceConfig
from edge_asr.errors import AudioError
from edge_asr.types import Samples

FLOOR_DBFS = -120.0
"""What digital silence is shown as."""
BAR_FLOOR_DBFS = -60.0
BAR_WIDTH = 40
WIDE = 1000
"""Columns that any table has room in."""
CAPTURING = "capturing"
METER_EVERY_S = 0.1
FIELDS = ("name", "host_api", "channels", "rate", "stable_id", "paths", "is_default")


def show_list(microphones: Sequence[MicrophoneSourceConfig], wanted: str | None, json_lines: bool) -> None:
    """Print the devices there are to record from, or those `wanted`, with the configured sources that mean them.

    Raises AudioError.
    """
    devices = input_devices()
    sources, problems = _sources_by_device(devices, microphones)
    if wanted is not None:
        devices, problems = matching(devices, wanted), []
    if json_lines:
        for device in devices:
            fields = {name: getattr(device, name) for name in FIELDS}
            print(json.dumps({**fields, "sources": sources.get(device.index, [])}, ensure_ascii=False))
        return
    if devices:
        _print_devices(devices, sources)
        print("\n*: the default. In the configuration, `device` is a name, a part of one, or a stable name.")
    else:
        print("no input device; plug one in")
    for problem in problems if devices else ():
        print(problem)


def metered(
    microphones: Sequence[MicrophoneSourceConfig], device: str | None, channel: int | None
) -> MicrophoneSourceConfig:
    """Return what the meter listens to: the device that is named, else the first configured one, else the default."""
    if device is not None:
        found = MicrophoneSourceConfig.model_construct(device=device)  # not checked: what is not found is told
    else:
        found = microphones[0] if microphones else MicrophoneSourceConfig()
    return found if channel is None else found.model_copy(update={"channel": channel})


def show_meter(microphone: MicrophoneSourceConfig, seconds: float | None, json_lines: bool) -> None:
    """Show how loud a device is, until Ctrl-C or for some seconds. Raises AudioError."""
    logging.getLogger("edge_asr.audio").setLevel(logging.ERROR)  # the meter itself shows what there is to warn of
    source = MicrophoneSource(microphone.device, microphone.channel, microphone.rate, microphone.source_name)
    asyncio.run(_print_levels(source, seconds) if json_lines else _draw_levels(source, seconds))


def _sources_by_device(
    devices: Sequence[InputDevice], microphones: Sequence[MicrophoneSourceConfig]
) -> tuple[dict[int, list[str]], list[str]]:
    """Return the names of the sources that mean each device, by its index, and why others mean none."""
    found: dict[int, list[str]] = {}
    problems = []
    for microphone in microphones:
        try:
            found.setdefault(choose(devices, microphone.device).index, []).append(microphone.source_name)
        except AudioError as error:
            problems.append(str(error))
    return found, problems


def _print_devices(devices: Sequence[InputDevice], sources: Mapping[int, Sequence[str]]) -> None:
    """Print a table, whatever its width where nobody sees it, else as a list where it is too wide: names stay whole."""
    table, terminal, wide = _table(devices, sources), Console(soft_wrap=True), Console(width=WIDE, soft_wrap=True)
    if terminal.is_terminal and wide.measure(table).maximum > terminal.width:
        for device in devices:
            print("\n  ".join(_lines(device, sources.get(device.index, []))))
    else:
        wide.print(table)


def _lines(device: InputDevice, sources: Sequence[str]) -> list[str]:
    channels = f"{device.channels} channel{'' if device.channels == 1 else 's'}"
    return [
        f"{'* ' if device.is_default else ''}{device.name}",
        f"{device.host_api}, {channels}, {device.rate} Hz",
        *filter(None, (device.stable_id, *device.paths)),
        *(f"source {source}" for source in sources),
    ]


def _table(devices: Sequence[InputDevice], sources: Mapping[int, Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("", "name", "host API", "channels", "rate", "stable name", *(["source"] if sources else [])):
        table.add_column(title, no_wrap=True)
    for device in devices:
        stable = ", ".join(filter(None, (device.stable_id, *device.paths)))
        cells = [device.name, device.host_api, str(device.channels), f"{device.rate} Hz", stable]
        if sources:
            cells.append(", ".join(sources.get(device.index, [])))
        table.add_row("*" if device.is_default else "", *map(Text, cells))
    return table


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """How loud the last moment was, and how the microphone is."""

    state: str
    why: str
    peak_dbfs: float
    rms_dbfs: float


async def _levels(source: MicrophoneSource, seconds: float | None) -> AsyncGenerator[Level, None]:
    """Yield a level ten times a second, also while there is no sound."""
    until = math.inf if seconds is None else time.monotonic() + seconds
    heard: list[Samples] = []
    listening = asyncio.create_task(_listen(source, heard), name="listen")
    try:
        while time.monotonic() < until and not listening.done():
            await asyncio.wait([listening], timeout=min(METER_EVERY_S, until - time.monotonic()))
            samples = np.concatenate([np.zeros(1, np.float32), *heard])
            heard.clear()
            health = source.health
            yield Level(health.state, health.why, _dbfs(np.abs(samples).max()), _dbfs(np.sqrt(np.mean(samples**2))))
    finally:
        source.close()
        await listening


async def _listen(source: MicrophoneSource, heard: list[Samples]) -> None:
    async with aclosing(source.chunks()) as chunks:
        async for chunk in chunks:
            heard.append(chunk.samples)


def _dbfs(level: float) -> float:
    return round(max(FLOOR_DBFS, 20 * math.log10(max(level, 1e-9))), 1)


async def _print_levels(source: MicrophoneSource, seconds: float | None) -> None:
    async for level in _levels(source, seconds):
        print(json.dumps(dataclasses.asdict(level), ensure_ascii=False), flush=True)


async def _draw_levels(source: MicrophoneSource, seconds: float | None) -> None:
    print(f"{source.name}; Ctrl-C ends")
    with Live(auto_refresh=False) as live:
        async for level in _levels(source, seconds):
            live.update(_shown(level, live.console.width), refresh=True)
    if not live.console.is_terminal:
        print()  # there only the last level is written, without an end of its line


def _shown(level: Level, width: int) -> Text:
    """Return a bar with its numbers, if there is sound, and below what is to be said of the microphone, if anything."""
    if level.state != CAPTURING:
        return Text(level.why or level.state)
    numbers = f" peak {level.peak_dbfs:6.1f}  rms {level.rms_dbfs:6.1f} dBFS"
    bar_width = max(0, min(BAR_WIDTH, width - len(numbers)))
    filled, peak = (
        round(bar_width * max(0.0, 1 - dbfs / BAR_FLOOR_DBFS)) for dbfs in (level.rms_dbfs, level.peak_dbfs)
    )
    colour = "red" if level.peak_dbfs > -1 else "yellow" if level.peak_dbfs > -6 else "green"
    bar = "█" * filled + "▒" * (peak - filled)
    return Text.assemble((f"{bar:<{bar_width}}", colour), numbers, f"\n{level.why}" if level.why else "")
