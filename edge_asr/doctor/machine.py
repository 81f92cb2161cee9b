"""Checks of the board: its release, device nodes, power and clocks, temperatures, memory and time."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass

from edge_asr import sensors
from edge_asr.doctor.patient import Patient
from edge_asr.doctor.report import Finding, fail, lacking, ok, warn
from edge_asr.recognizer.bundle import FP32, INT8
from edge_asr.recognizer.manifest import TENSORRT
from edge_asr.tree import RELEASE_FILE, Tree

GPU_NODES = ("dev/nvmap", "dev/nvhost*", "dev/nvgpu/*/*", "dev/dri/renderD*")
"""Of a Jetson."""
CARD_NODES = ("dev/nvidia[0-9]*", "dev/nvidiactl", "dev/nvidia-uvm")
"""Of a graphics card, and of a Thor beside the others."""
NOT_FOR_USERS = re.compile(r"dbg|prof|ctxsw|sched|power")
"""Nodes that only root and debuggers may use, and need."""
OWN_GOVERNORS = ("intel_pstate", "amd-pstate-epp", "amd-pstate")
"""Drivers of which `powersave` is the normal mode, and no slow one."""
SYNCHRONISED = "run/systemd/timesync/synchronized"
MEMORY_FACTOR = {INT8: 2.2, FP32: 1.7}
"""Memory that a loaded engine takes, as a multiple of its weights."""
BUILD_FACTOR = 3
"""The same for building with TensorRT, of the weights in fp32."""


@dataclass(frozen=True, slots=True)
class _Era:
    """Releases of L4T that have the same TensorRT, from `since` up to the next era."""

    since: tuple[int, int]
    jetpack: str
    """For people only: what to do is decided by the release's number."""
    tensorrt: str
    remedy: str | None = None


_UPDATE = "update to JetPack 6.1 or later (L4T 36.4), or set engine.target: onnx"
ERAS = (
    _Era((39, 2), "JetPack 7.2", "10.16 or 11.4"),
    _Era((38, 0), "JetPack 7.0 or 7.1", "10.13"),
    _Era((36, 4), "JetPack 6.1 or later", "10.3"),
    _Era((36, 0), "JetPack 6.0", "8.6, which is not supported", _UPDATE),
    _Era((35, 2), "JetPack 5.1", "8.5"),
    _Era((0, 0), "before JetPack 5.1", "not supported", "update to JetPack 5.1 or later, or set engine.target: onnx"),
)
NEWEST = 39
UNKNOWN = (37,)
"""Major releases that never were, or that nobody has seen."""


def release(patient: Patient) -> Finding:
    """Return which L4T a Jetson has, and whether its TensorRT is one that we support."""
    tree, need = patient.tree, patient.needs_tensorrt
    text = tree.text(RELEASE_FILE)
    if text is None:
        return _no_release(tree) if tree.is_jetson else ok("not a Jetson")
    numbers = re.search(r"R(\d{1,4})\s*\(release\),\s*REVISION:\s*(\d{1,4})(?:\.(\d{1,4}))?", text)
    if numbers is None:
        remedy = "put back the file of NVIDIA's package nvidia-l4t-core"
        return warn(f"/{RELEASE_FILE} is no release of L4T: {text[:60]!r}", remedy)
    version = (int(numbers[1]), int(numbers[2]))
    shown = ".".join(part for part in numbers.groups() if part is not None)
    if version[0] > NEWEST or version[0] in UNKNOWN or (39, 0) <= version < (39, 2):
        remedy = "run edge-asr build-engine: its self-test tells whether it works"
        return warn(f"L4T {shown}, which nobody has tried yet", remedy)
    era = next(era for era in ERAS if version >= era.since)
    found = f"L4T {shown} ({era.jetpack}), TensorRT {era.tensorrt}"
    return ok(found) if era.remedy is None else lacking(need, found, era.remedy)


def _no_release(tree: Tree) -> Finding:
    if tree.in_container:
        mount = f"docker run -v /{RELEASE_FILE}:/{RELEASE_FILE}:ro"
        return warn(f"a Jetson, but the container does not see /{RELEASE_FILE}", f"mount it: {mount}")
    return warn(f"a Jetson without /{RELEASE_FILE}", "install NVIDIA's package nvidia-l4t-core: sudo apt install")


def device_nodes(patient: Patient) -> Finding:
    """Return whether the GPU's device nodes are there, and this user may use them."""
    tree, need = patient.tree, patient.needs_cuda
    patterns = (*GPU_NODES, *CARD_NODES) if tree.is_jetson else CARD_NODES
    nodes = [name for name in tree.find(*patterns) if not NOT_FOR_USERS.search(name)]
    if not nodes:
        return lacking(need, "no device nodes of a GPU of NVIDIA's", _nodes_remedy(tree))
    if unusable := tree.unusable(nodes):
        groups = ",".join(tree.groups(unusable)) or "video"
        return lacking(need, f"no access to {_list(unusable)}", _group_remedy(tree, groups))
    return ok(f"{len(nodes)} of the GPU, all usable: {_list(nodes)}")


def _nodes_remedy(tree: Tree) -> str:
    if tree.in_container:
        return "start the container with --runtime nvidia (or --gpus all)"
    return "install NVIDIA's driver; on a Jetson flash JetPack again"


def _group_remedy(tree: Tree, groups: str) -> str:
    if tree.in_container:
        return f"start the container with {' '.join(f'--group-add {group}' for group in groups.split(','))}"
    return f"sudo usermod -aG {groups} $USER, then log in again; in a systemd unit SupplementaryGroups="


def sound_nodes(patient: Patient) -> Finding:
    """Return whether there is a device to record from, and this user may use it."""
    tree = patient.tree
    nodes = tree.find("dev/snd/pcm*c")
    if not nodes:
        where = "start the container with --device /dev/snd, or " if tree.in_container else ""
        remedy = f"{where}plug in a microphone; files and standard input work without"
        return warn("no device to record from in /dev/snd", remedy)
    if unusable := tree.unusable(nodes):
        groups = ",".join(tree.groups(unusable)) or "audio"
        return warn(f"no access to {_list(unusable)}", _group_remedy(tree, groups))
    return ok(f"{len(nodes)} to record from: {_list(nodes)}")


def power_mode(patient: Patient) -> Finding:
    """Return the mode of nvpmodel, which is the owner's to set."""
    tree = patient.tree
    mode = sensors.power_mode(tree)
    if mode.number is None:
        return ok("not known: nvpmodel's files are not here" if tree.is_jetson else "not a Jetson")
    name = mode.names.get(mode.number, "unknown")
    found = f"{name} (mode {mode.number}{'' if mode.chosen else ', as configured'})"
    others = ", ".join(f"{other} {name}" for other, name in mode.names.items())
    return ok(f"{found}{f'; there are {others}; sudo nvpmodel -m N sets one' if others else ''}")


def gpu_clock(patient: Patient) -> Finding:
    """Return how fast the GPU runs now, how fast it may run, and who decides."""
    tree = patient.tree
    folders = [name for name in tree.find("sys/class/devfreq/*") if sensors.GPU_NODES.search(name.rpartition("/")[2])]
    found = [text for text in (_clock(tree, folder) for folder in folders) if text]
    return ok("; ".join(found) or ("not known: no clock of the GPU in /sys" if tree.is_jetson else "not a Jetson"))


def _clock(tree: Tree, folder: str) -> str:
    now, most = tree.number(f"{folder}/cur_freq"), tree.number(f"{folder}/max_freq")
    governor = tree.text(f"{folder}/governor")
    parts = [
        "" if now is None else f"{now / 1e6:.0f} MHz now",
        "" if most is None else f"{most / 1e6:.0f} MHz at most",
        f"governor {governor}" if governor else "",
    ]
    shown = ", ".join(part for part in parts if part)
    return f"{folder.rpartition('/')[2]}: {shown}" if shown else ""


def cpu_clock(patient: Patient) -> Finding:
    """Return how many cores are on and who decides on their clocks; warn where they are held at the lowest."""
    tree = patient.tree
    cores = [name for name in tree.find("sys/devices/system/cpu/cpu[0-9]*") if re.search(r"/cpu\d+$", name)]
    on = [core for core in cores if tree.number(f"{core}/online") != 0]
    governors = {tree.text(f"{core}/cpufreq/scaling_governor") for core in on} - {None}
    clocks = [tree.number(f"{core}/cpufreq/scaling_max_freq") for core in on]
    most = max((clock for clock in clocks if clock is not None), default=None)
    names = ", ".join(sorted(filter(None, governors)))
    found = f"{len(on)} of {len(cores)} cores on" if cores else "cores not known"
    found += f", {most / 1000:.0f} MHz at most" if most is not None else ""
    found += f", governor {names}" if names else ""
    drivers = {tree.text(f"{core}/cpufreq/scaling_driver") for core in on}
    if "powersave" in governors and not drivers & set(OWN_GOVERNORS):
        remedy = "echo schedutil | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        return warn(f"{found}: the cores stay at their lowest clock", remedy)
    return ok(found)


def temperatures(patient: Patient) -> Finding:
    """Return the highest temperature; warn where the board slows down because of it."""
    tree = patient.tree
    hot: list[str] = []
    readings: list[tuple[float, str]] = []
    for folder in tree.find("sys/class/thermal/thermal_zone*"):
        reading, name = tree.number(f"{folder}/temp"), tree.text(f"{folder}/type") or folder.rpartition("/")[2]
        if reading is None or name in sensors.STANDING_READINGS:
            continue
        readings.append((reading / 1000, name))
        limit = _throttles_at(tree, folder)
        if limit is not None and reading >= limit:
            hot.append(f"{name} {reading / 1000:.1f} °C, slowed down from {limit / 1000:.0f} on")
    if not readings:
        return ok("no sensors")
    if hot:
        return warn("; ".join(hot), "let air to the board, or clean its fan; latency grows while it is slowed down")
    highest, name = max(readings)
    return ok(f"at most {highest:.1f} °C ({name})")


def _throttles_at(tree: Tree, folder: str) -> int | None:
    """Return the lowest temperature, in thousandths of a degree, from which a zone slows something down."""
    points = [name.removesuffix("_type") for name in tree.find(f"{folder}/trip_point_*_type")]
    limits = [tree.number(f"{point}_temp") for point in points if tree.text(f"{point}_type") == "passive"]
    return min((limit for limit in limits if limit is not None and limit > sensors.LIKELY_TRIP_MC), default=None)


def memory(patient: Patient) -> Finding:
    """Return whether the configured model fits into what is free, and into what there is."""
    known = dict(re.findall(r"^(\w+):\s+(\d{1,15}) kB", patient.tree.text("proc/meminfo") or "", re.MULTILINE))
    sizes = {name: int(size) * 1024 for name, size in known.items()}
    if "MemAvailable" not in sizes or "MemTotal" not in sizes:
        return warn("not known: /proc/meminfo cannot be read", "mount /proc")
    need, why = _memory_needed(patient)
    swap = sizes.get("SwapFree", 0)
    found = f"{_mb(sizes['MemAvailable'])} free, {_mb(swap)} of swap; {why} needs about {_mb(need)}"
    if need > sizes["MemTotal"] + sizes.get("SwapTotal", 0):
        return fail(found, "use a smaller model, or add swap")
    if need > sizes["MemAvailable"]:
        return warn(found, "end other programs, add swap, or use a smaller model")
    if patient.needs_tensorrt != "ok" and (build := BUILD_FACTOR * patient.weights_bytes(FP32)) > sizes["MemAvailable"]:
        remedy = "end other programs while it builds, or add swap"
        return warn(f"{found}, building for {TENSORRT} about {_mb(build)}", remedy)
    return ok(found)


def _memory_needed(patient: Patient) -> tuple[int, str]:
    """Return the bytes that the configured target takes, and its name; where it may be either, the greater."""
    target = patient.settings.engine.target
    engines = (target,) if target in MEMORY_FACTOR else tuple(MEMORY_FACTOR)
    needs = [(int(MEMORY_FACTOR[engine] * patient.weights_bytes(engine)), engine) for engine in engines]
    return max(needs)


def wall_clock(patient: Patient, kernel: Callable[[], bool | None] | None = None) -> Finding:
    """Return whether the clock is right: events carry wall times."""
    if patient.tree.has(SYNCHRONISED):
        return ok("synchronised")
    synchronised = (kernel or kernel_clock)()
    if synchronised is None:
        return ok("cannot be told in here; on the host: timedatectl")
    if synchronised:
        return ok("synchronised")
    remedy = "sudo timedatectl set-ntp true, or install chrony; events carry wall times"
    return warn("not synchronised", remedy)


def kernel_clock() -> bool | None:
    """Return whether the kernel says that somebody keeps its clock right; None where it may not be asked."""
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # zeros: only asks
    return None if state < 0 else state != 5  # TIME_ERROR


def _list(names: list[str]) -> str:
    shown = ", ".join(f"/{name}" for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
