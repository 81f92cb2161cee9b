"""Stands in for sounddevice in a recording process: devices and faults that no machine has at will.

The file that FAKE_SOUNDDEVICE names is read whenever devices are listed, and holds JSON: `devices` (a list of what
query_devices gives), `refused_rates`, `refused` (an error), `hang_after` and `end_after` (blocks), `overflow_at` (a
block), `slow` (a factor), `value` (of all samples), `adc_age_s` (how long ago it says a block began).
"""

from __future__ import annotations

import json
import os
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

default = SimpleNamespace(hostapi=0)


class PortAudioError(Exception):
    """As PortAudio's own: text, then number."""


def _settings() -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(Path(os.environ["FAKE_SOUNDDEVICE"]).read_text(encoding="utf-8"))
    return settings


def _initialize() -> None:
    pass


def _terminate() -> None:
    pass


def query_hostapis() -> list[dict[str, Any]]:
    return [{"name": "ALSA", "default_input_device": 0}]


def query_devices() -> list[dict[str, Any]]:
    return [{"index": index, "hostapi": 0, **device} for index, device in enumerate(_settings()["devices"])]


class RawInputStream:
    """Gives the numbers 0, 1, 2, ... (modulo 30,000) on its first channel, and their negatives on the others."""

    def __init__(
        self,
        samplerate: int,
        blocksize: int,
        device: int,
        channels: int,
        dtype: str,
        callback: Callable[[memoryview, int, Any, Any], None],
        finished_callback: Callable[[], None],
        dither_off: bool,
    ) -> None:
        assert dtype == "int16"
        self._settings = _settings()
        if samplerate in self._settings.get("refused_rates", ()):
            raise PortAudioError("Invalid sample rate", -9997)
        if "refused" in self._settings:
            raise PortAudioError(self._settings["refused"], -9985)
        self.samplerate = float(samplerate)
        self._frames, self._channels = blocksize, channels
        self._callback, self._finished = callback, finished_callback
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> RawInputStream:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        started, number = time.monotonic(), 0
        step = self._frames / self.samplerate * self._settings.get("slow", 1.0)
        while number != self._settings.get("end_after"):
            if number == self._settings.get("hang_after"):
                self._stopped.wait()
                return
            if self._stopped.wait(max(0.0, started + (number + 1) * step - time.monotonic())):
                return
            status = SimpleNamespace(input_overflow=number == self._settings.get("overflow_at"))
            age_s = self._settings.get("adc_age_s", 0.05)
            times = SimpleNamespace(currentTime=7e9, inputBufferAdcTime=7e9 - age_s)
            self._callback(self._block(number), self._frames, times, status)
            number += 1
        self._finished()

    def _block(self, number: int) -> memoryview:
        samples = array("h")
        for frame in range(number * self._frames, (number + 1) * self._frames):
            value = self._settings.get("value", frame % 30_000)
            samples.extend([value, *([-value] * (self._channels - 1))])
        return memoryview(samples.tobytes())
