"""What a machine tells of itself: temperatures, power, clocks, memory, slowing down. What is missing is absent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_asr.tree import Tree

GPU_NODES = re.compile(r"gpu|gv11b|ga10b|gb10b")
"""GPUs of Jetsons among the names in /sys/class/devfreq."""
STANDING_READINGS = ("PMIC-Die",)
"""Zones that always say 100 degrees."""
LIKELY_TRIP_MC = 40_000
"""A trip point below is none: unused ones are 0, or below freezing."""
SLOWING = re.compile(r"cpufreq|devfreq|throttle-alert|^Processor$")
"""Cooling devices that slow something down, or tell that it is done: not fans. Names of Jetsons and of x86."""


@dataclass(frozen=True, slots=True)
class PowerMode:
    """What nvpmodel, which is the owner's to set, lets a Jetson take."""

    number: str | None = None
    """None: its files are not here."""
    chosen: bool = False
    """Somebody has set it; else it is the one that the machine comes with."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Of all modes, by their numbers."""

    @property
    def name(self) -> str | None:
        """Its name, its number where it has none, None where it is not known."""
        return None if self.number is None else self.names.get(self.number, self.number)


@dataclass(frozen=True, slots=True)
class Reading:
    """All sensors at one moment."""

    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    """By zone."""
    power_w: Mapping[str, float] = field(default_factory=dict)
    """By rail; that of a graphics card is `gpu`."""
    gpu_mhz: float | None = None
    gpu_load: float | None = None
    """0 to 1."""
    gpu_used_mb: float | None = None
    """Of a graphics card's own memory, where somebody has asked it. A Jetson has none."""
    available_mb: float | None = None
    """Of the host's memory."""
    pressure: float | None = None
    """Share of the last 10 s in which nothing got on for want of memory."""
    slowed: bool | None = None
    """Whether the machine says that it is slowed down by heat or by a lack of power; None: it cannot say."""
    slowed_by: str = ""
    """What says so."""
    overcurrents: int | None = None
    """How often a Jetson has been slowed down because it took too much current, since it was started."""
    power_mode: str | None = None
    """Of nvpmodel, by its name."""


def read(tree: Tree) -> Reading:
    """Read everything there is, in some milliseconds."""
    temperatures = _temperatures(tree)
    gpu = next((name for name in tree.find("sys/class/devfreq/*") if GPU_NODES.search(name.rpartition("/")[2])), None)
    clock = None if gpu is None else tree.number(f"{gpu}/cur_freq")
    load = None if gpu is None else tree.number(f"{gpu}/device/load")
    slowing = _slowing(tree)
    return Reading(
        temperatures_c=temperatures,
        power_w=_power(tree),
        gpu_mhz=None if clock is None else clock / 1e6,
        gpu_load=None if load is None else load / 1000,
        available_mb=available_mb(tree),
        pressure=_pressure(tree),
        slowed=None if slowing is None else bool(slowing),
        slowed_by=slowing or "",
        overcurrents=_overcurrents(tree),
        power_mode=power_mode(tree).name,
    )


def available_mb(tree: Tree) -> float | None:
    """Return how much memory programs can still get; None where the system does not say."""
    return _meminfo(tree, "MemAvailable")


def total_mb(tree: Tree) -> float | None:
    """Return how much memory there is; None where the system does not say."""
    return _meminfo(tree, "MemTotal")


def power_mode(tree: Tree) -> PowerMode:
    """Return the mode of nvpmodel."""
    configuration = tree.text("etc/nvpmodel.conf") or ""
    names = dict(re.findall(r"<\s*POWER_MODEL\s+ID=0*(\d+)\s+NAME=([^\s>]+)", configuration))
    chosen = re.search(r"pmode:0*(\d+)", tree.text("var/lib/nvpmodel/status") or "")
    preset = re.search(r"<\s*PM_CONFIG\s+DEFAULT=0*(\d+)", configuration)
    number = chosen or preset
    return PowerMode(None if number is None else number[1], chosen is not None, names)


def _meminfo(tree: Tree, key: str) -> float | None:
    found = re.search(rf"^{key}:\s+(\d+) kB", tree.text("proc/meminfo") or "", re.MULTILINE)
    return None if found is None else int(found[1]) * 1024 / 1e6


def _pressure(tree: Tree) -> float | None:
    found = re.search(r"^full avg10=(\d+\.\d+)", tree.text("proc/pressure/memory") or "", re.MULTILINE)
    return None if found is None else float(found[1]) / 100


def _zones(tree: Tree) -> dict[str, str]:
    """Return the folders of zones by the names of the zones."""
    folders = tree.find("sys/class/thermal/thermal_zone*")
    named = {tree.text(f"{folder}/type") or folder.rpartition("/")[2]: folder for folder in folders}
    return {name: folder for name, folder in named.items() if name not in STANDING_READINGS}


def _temperatures(tree: Tree) -> dict[str, float]:
    found = {name: tree.number(f"{folder}/temp") for name, folder in _zones(tree).items()}
    return {name: value / 1000 for name, value in found.items() if value is not None}


def _slowing(tree: Tree) -> str | None:
    """Return what slows the machine down, empty where nothing does; None where nothing here tells.

    Cooling devices know. Without them it is where a zone has reached its passive trip point, which is meant to.
    """
    names = {folder: tree.text(f"{folder}/type") or "" for folder in tree.find("sys/class/thermal/cooling_device*")}
    states = {name: tree.number(f"{folder}/cur_state") for folder, name in names.items() if SLOWING.search(name)}
    known = {name: state for name, state in states.items() if state is not None}
    if known:
        return ", ".join(name for name, state in known.items() if state > 0)
    return _hot(tree)


def _hot(tree: Tree) -> str | None:
    """Return the zones that are where they slow something down; None where no zone has such a point."""
    hot: dict[str, bool] = {}
    for zone, folder in _zones(tree).items():
        reading = tree.number(f"{folder}/temp")
        for name in tree.find(f"{folder}/trip_point_*_type"):
            point = tree.number(f"{name.removesuffix('_type')}_temp")
            if tree.text(name) == "passive" and reading is not None and point is not None and point > LIKELY_TRIP_MC:
                hot[zone] = hot.get(zone, False) or reading >= point
    return ", ".join(zone for zone, reached in hot.items() if reached) if hot else None


def _power(tree: Tree) -> dict[str, float]:
    """Return watts by rail: voltage times current of each channel that has both and a name."""
    found = {}
    for folder in tree.find("sys/bus/i2c/devices/*/hwmon/hwmon*"):
        for current in tree.find(f"{folder}/curr*_input"):
            channel = current.rpartition("/curr")[2].removesuffix("_input")
            milliamperes, millivolts = tree.number(current), tree.number(f"{folder}/in{channel}_input")
            name = tree.text(f"{folder}/in{channel}_label")
            if name and milliamperes is not None and millivolts is not None:
                found[name] = milliamperes * millivolts / 1e6
    return found


def _overcurrents(tree: Tree) -> int | None:
    counts = [tree.number(name) for name in tree.find("sys/class/hwmon/hwmon*/oc*_event_cnt")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
