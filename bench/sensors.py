"""What a machine tells of itself while it works: temperatures, power, clocks, memory. What is missing is absent."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import statistics
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from edge_asr import sensors
from edge_asr.sensors import Reading
from edge_asr.tree import Tree

WHOLE_BOARD = re.compile(r"^(VDD_IN|POM_5V_IN|VIN)$")
"""Rails that everything else hangs on."""
NVIDIA_SMI = ("memory.used", "temperature.gpu", "power.draw", "clocks.sm", "clocks_throttle_reasons.active")
SLOWED = 0x8 | 0x20 | 0x40 | 0x80
"""Bits of nvidia-smi's reasons: slowed by hardware, by heat (twice), by a lack of power. Its other bits are normal."""
EVERY_S = 1.0


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
    reading = sensors.read(tree)
    if not card:
        return reading
    reasons = card.get("clocks_throttle_reasons.active")
    told = [
        hot for hot in (reading.slowed, None if reasons is None else bool(int(reasons) & SLOWED)) if hot is not None
    ]
    return dataclasses.replace(
        reading,
        temperatures_c={**reading.temperatures_c, **_named("gpu card", card.get("temperature.gpu"))},
        power_w={**reading.power_w, **_named("gpu", card.get("power.draw"))},
        gpu_mhz=card.get("clocks.sm") if reading.gpu_mhz is None else reading.gpu_mhz,
        gpu_used_mb=card.get("memory.used"),
        slowed=any(told) if told else None,
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


def _throttled(readings: Sequence[Reading]) -> bool | None:
    told = [reading.slowed for reading in readings if reading.slowed is not None]
    counts = [reading.overcurrents for reading in readings if reading.overcurrents is not None]
    if not told and not counts:
        return None
    return any(told) or (bool(counts) and counts[-1] > counts[0])
