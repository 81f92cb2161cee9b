"""What a machine tells of itself while it works: temperatures, power, clocks, memory. What is missing is absent."""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from edge_asr.doctor.tree import Tree

GPU_NODES = re.compile(r"gpu|gv11b|ga10b|gb10b")
"""GPUs of Jetsons among the names in /sys/class/devfreq."""
STANDING_READINGS = ("PMIC-Die",)
"""Zones that always say 100 degrees."""
LIKELY_TRIP_MC = 40_000
"""A trip point below is none: unused ones are 0, or below freezing."""
WHOLE_BOARD = re.compile(r"^(VDD_IN|POM_5V_IN|VIN)$")
"""Rails that everything else hangs on."""
NVIDIA_SMI = ("memory.used", "temperature.gpu", "power.draw", "clocks.sm", "clocks_throttle_reasons.active")
SLOWED = 0x8 | 0x20 | 0x40 | 0x80
"""Bits of nvidia-smi's reasons: slowed by hardware, by heat (twice), by a lack of power. Its other bits are normal."""
EVERY_S = 1.0


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
    """Of a graphics card's own memory. A Jetson has none."""
    available_mb: float | None = None
    """Of the host's memory."""
    slowed: bool | None = None
    """Whether the machine says that it is slowed down by heat or by a lack of power; None: it cannot say."""
    overcurrents: int | None = None
    """How often a Jetson has been slowed down because it took too much current, since it was started."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What was read over a time."""

    highest_c: Mapping[str, float] = field(default_factory=dict)
    """By zone."""
    mean_w: Mapping[str, float] = field(default_factory=dict)
    """By rail."""
    board_w: float | None = None
    """Mean of the rail that everything else hangs on, or of a graphics card."""
    highest_gpu_mhz: float | None = None
    gpu_used_mb: float | None = None
    """The most."""
    least_available_mb: float | None = None
    throttled: bool | None = None
    """None: nothing here tells."""


def read(tree: Tree, card: Mapping[str, float] | None = None) -> Reading:
    """Read everything there is; `card`: what nvidia-smi says, by the names in NVIDIA_SMI."""
    card = card or {}
    temperatures = {**_temperatures(tree), **_named("gpu card", card.get("temperature.gpu"))}
    gpu = next((name for name in tree.find("sys/class/devfreq/*") if GPU_NODES.search(name.rpartition("/")[2])), None)
    clock = None if gpu is None else tree.number(f"{gpu}/cur_freq")
    load = None if gpu is None else tree.number(f"{gpu}/device/load")
    reasons = card.get("clocks_throttle_reasons.active")
    told = [hot for hot in (_is_hot(tree), None if reasons is None else bool(int(reasons) & SLOWED)) if hot is not None]
    return Reading(
        temperatures_c=temperatures,
        power_w={**_power(tree), **_named("gpu", card.get("power.draw"))},
        gpu_mhz=card.get("clocks.sm") if clock is None else clock / 1e6,
        gpu_load=None if load is None else load / 1000,
        gpu_used_mb=card.get("memory.used"),
        available_mb=available_mb(tree),
        slowed=any(told) if told else None,
        overcurrents=_overcurrents(tree),
    )


def read_card(gpu: int = 0) -> dict[str, float]:
    """Return what nvidia-smi says of a graphics card; empty where it is not there. A Jetson's says nearly nothing."""
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_card(said)


def card_name(gpu: int = 0) -> str | None:
    """Return what nvidia-smi calls a graphics card; None where it is not there."""
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def parse_card(said: str) -> dict[str, float]:
    """Return the numbers in a line of nvidia-smi; what it does not support is absent."""
    found = {}
    for name, text in zip(NVIDIA_SMI, said.strip().split(","), strict=False):
        with contextlib.suppress(ValueError):
            found[name] = float(int(text, 16)) if text.strip().startswith("0x") else float(text)
    return found


def available_mb(tree: Tree) -> float | None:
    """Return how much memory programs can still get; None where the system does not say."""
    return _meminfo(tree, "MemAvailable")


def total_mb(tree: Tree) -> float | None:
    """Return how much memory there is; None where the system does not say."""
    return _meminfo(tree, "MemTotal")


def summarise(readings: Sequence[Reading]) -> Summary:
    """Return the extremes and means of some readings."""
    zones = {zone for reading in readings for zone in reading.temperatures_c}
    rails = {rail for reading in readings for rail in reading.power_w}
    means = {
        rail: round(statistics.fmean(each.power_w[rail] for each in readings if rail in each.power_w), 2)
        for rail in sorted(rails)
    }
    board = [watts for rail, watts in means.items() if WHOLE_BOARD.match(rail) or rail == "gpu"]
    return Summary(
        highest_c={
            zone: max(each.temperatures_c[zone] for each in readings if zone in each.temperatures_c)
            for zone in sorted(zones)
        },
        mean_w=means,
        board_w=board[0] if board else None,
        highest_gpu_mhz=max((each.gpu_mhz for each in readings if each.gpu_mhz is not None), default=None),
        gpu_used_mb=max((each.gpu_used_mb for each in readings if each.gpu_used_mb is not None), default=None),
        least_available_mb=min((each.available_mb for each in readings if each.available_mb is not None), default=None),
        throttled=_throttled(readings),
    )


class Sampler:
    """Reads the sensors now and then, on a thread of its own, while the block runs."""

    def __init__(self, tree: Tree, gpu: int | None = None) -> None:
        """`gpu`: the number of a graphics card that nvidia-smi is to be asked about."""
        self._tree, self._gpu = tree, gpu
        self._readings: list[Reading] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sensors", daemon=True)

    def __enter__(self) -> Sampler:
        self._note()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._note()

    @property
    def summary(self) -> Summary:
        """Of everything read so far."""
        return summarise(self._readings)

    def _work(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._note()

    def _note(self) -> None:
        self._readings.append(read(self._tree, None if self._gpu is None else read_card(self._gpu)))


def forget_peak() -> None:
    """Let the kernel count this process's peak of memory anew, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_peak_mb() -> float | None:
    """Return the most memory that this process has had since `forget_peak`; None where the system does not say."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Tree().text("proc/self/status") or "", re.MULTILINE)
    return None if found is None else int(found[1]) * 1024 / 1e6


def _named(name: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {name: value}


def _meminfo(tree: Tree, key: str) -> float | None:
    found = re.search(rf"^{key}:\s+(\d+) kB", tree.text("proc/meminfo") or "", re.MULTILINE)
    return None if found is None else int(found[1]) * 1024 / 1e6


def _zones(tree: Tree) -> dict[str, str]:
    """Return the folders of zones by the names of the zones."""
    folders = tree.find("sys/class/thermal/thermal_zone*")
    named = {tree.text(f"{folder}/type") or folder.rpartition("/")[2]: folder for folder in folders}
    return {name: folder for name, folder in named.items() if name not in STANDING_READINGS}


def _temperatures(tree: Tree) -> dict[str, float]:
    found = {name: tree.number(f"{folder}/temp") for name, folder in _zones(tree).items()}
    return {name: value / 1000 for name, value in found.items() if value is not None}


def _is_hot(tree: Tree) -> bool | None:
    """Tell whether a zone is where it slows something down; None where no zone has such a point."""
    hot = []
    for folder in _zones(tree).values():
        reading = tree.number(f"{folder}/temp")
        for name in tree.find(f"{folder}/trip_point_*_type"):
            point = tree.number(f"{name.removesuffix('_type')}_temp")
            if tree.text(name) == "passive" and reading is not None and point is not None and point > LIKELY_TRIP_MC:
                hot.append(reading >= point)
    return any(hot) if hot else None


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


def _throttled(readings: Sequence[Reading]) -> bool | None:
    told = [reading.slowed for reading in readings if reading.slowed is not None]
    counts = [reading.overcurrents for reading in readings if reading.overcurrents is not None]
    if not told and not counts:
        return None
    return any(told) or (bool(counts) and counts[-1] > counts[0])
