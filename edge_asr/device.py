"""Care for the device: what it tells of itself in state and metrics, and whether it is strained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from edge_asr import metrics, sensors
from edge_asr.sensors import Reading
from edge_asr.tree import Tree

PRESSED = 0.1
"""Memory is short where nothing gets on for such a share of the time: a decode takes a tenth longer then."""
CALM_S = 30.0
"""A strain is over when it has not been seen for so long: what throttles swings to and fro."""
SHOWN_EVERY_S = 60.0
"""The state is published again whenever it changes, and temperatures always do."""


@dataclass(frozen=True, slots=True)
class _Seen:
    why: str
    at: float


class DeviceCare:
    """Looks at the device now and then; others ask, from any thread, what it saw."""

    def __init__(self, tree: Tree | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._tree = tree or Tree()
        self._clock = clock
        self._reading = Reading()
        self._shown: dict[str, Any] | None = None
        self._shown_at = 0.0
        self._strain: _Seen | None = None

    @property
    def strain(self) -> str:
        """Why the device has less to give than usual; empty while it has not."""
        seen = self._strain
        return "" if seen is None else seen.why

    def look(self) -> None:
        """Read all sensors; blocks for some milliseconds."""
        before, now = self._reading, self._clock()
        self._reading = reading = sensors.read(self._tree)
        why = _strain(before, reading)
        changed = bool(why) != bool(self.strain)
        if why:
            self._strain = _Seen(why, now)
        elif self._strain is not None and now - self._strain.at >= CALM_S:
            self._strain = None
        if self._shown is None or changed or now - self._shown_at >= SHOWN_EVERY_S:
            self._shown, self._shown_at = _describe(reading), now
        metrics.DEVICE.families = tuple(_families(reading, bool(self.strain)))

    def describe(self) -> dict[str, Any] | None:
        """Return what `state` says of the device; None where it tells nothing."""
        return self._shown or None


def _strain(before: Reading, reading: Reading) -> str:
    if reading.slowed:
        return f"the device is slowed down ({reading.slowed_by}{_hottest(reading)})"
    if (before.overcurrents or 0) < (reading.overcurrents or 0) and before.overcurrents is not None:
        return "the device is slowed down (it takes more current than it may)"
    if reading.pressure is not None and reading.pressure >= PRESSED:
        return f"memory is short (nothing got on for {reading.pressure:.0%} of the last 10 s)"
    return ""


def _hottest(reading: Reading) -> str:
    if not reading.temperatures_c:
        return ""
    zone = max(reading.temperatures_c, key=lambda name: reading.temperatures_c[name])
    return f"; {zone} has {reading.temperatures_c[zone]:.0f} °C"


def _describe(reading: Reading) -> dict[str, Any]:
    zones = reading.temperatures_c
    hottest = max(zones, key=lambda name: zones[name]) if zones else None
    values: dict[str, Any] = {
        "temperature_c": None if hottest is None else round(zones[hottest]),
        "zone": hottest,
        "throttled": reading.slowed,
        "power_mode": reading.power_mode,
        "power_w": {rail: round(watts, 1) for rail, watts in reading.power_w.items()} or None,
        "gpu_load": None if reading.gpu_load is None else round(reading.gpu_load, 2),
        "memory_available_mb": None if reading.available_mb is None else round(reading.available_mb, -1),
        "memory_pressure": reading.pressure,
    }
    return {name: value for name, value in values.items() if value is not None}


def _families(reading: Reading, strained: bool) -> Iterator[Metric]:
    """Yield a metric for each thing that is known."""
    labelled = (
        ("edge_asr_temperature_celsius", "Temperature of a zone.", "zone", reading.temperatures_c),
        ("edge_asr_power_watts", "Power that a rail takes.", "rail", reading.power_w),
    )
    for name, text, label, values in labelled:
        if values:
            family = GaugeMetricFamily(name, text, labels=[label])
            for each, value in values.items():
                family.add_metric([each], value)
            yield family
    if reading.power_mode is not None:
        family = GaugeMetricFamily("edge_asr_power_mode", "1 for nvpmodel's mode.", labels=["mode"])
        family.add_metric([reading.power_mode], 1)
        yield family
    hertz = None if reading.gpu_mhz is None else reading.gpu_mhz * 1e6
    available = None if reading.available_mb is None else reading.available_mb * 1e6
    single = (
        ("edge_asr_gpu_frequency_hertz", "Clock of the GPU.", hertz),
        ("edge_asr_gpu_load_ratio", "How busy the GPU is.", reading.gpu_load),
        ("edge_asr_memory_available_bytes", "Memory that programs can still get.", available),
        ("edge_asr_memory_pressure_ratio", "Share of time in which nothing got on for want of it.", reading.pressure),
        ("edge_asr_throttled", "1 while the device says that it is slowed down.", reading.slowed),
        ("edge_asr_strained", "1 while partials are left out to spare the device.", strained),
    )
    for name, text, known in single:
        if known is not None:
            yield GaugeMetricFamily(name, text, value=float(known))
