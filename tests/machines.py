"""Machines as their files tell of them, laid out below a folder for the doctor: Jetsons and others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bundled import BUNDLE

from edge_asr.config import Config
from edge_asr.doctor.children import Answer
from edge_asr.doctor.examination import examine
from edge_asr.doctor.patient import Patient
from edge_asr.doctor.report import Finding, Report
from edge_asr.tree import Tree

MEMINFO = """\
MemTotal:        7619796 kB
MemFree:          512340 kB
MemAvailable:    4983112 kB
Buffers:           73612 kB
SwapTotal:       3809888 kB
SwapFree:        3809888 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""
NVPMODEL = """\
#
# FORMAT:
# < PARAM TYPE=PARAM_TYPE NAME=PARAM_NAME >
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online

< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
CPU_ONLINE CORE_0 1

# mandatory section to configure the default power mode
< PM_CONFIG DEFAULT=1 >
"""


def release(major: int, revision: str) -> str:
    """Return a release file as L4T has it."""
    return (
        f"# R{major} (release), REVISION: {revision}, GCID: 42132812, BOARD: generic, EABI: aarch64,"
        " DATE: Thu Sep 18 22:54:44 UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
    )


def _cores(count: int, governor: str = "schedutil", driver: str = "tegra194") -> dict[str, str]:
    files = {}
    for core in range(count):
        folder = f"sys/devices/system/cpu/cpu{core}"
        files[f"{folder}/cpufreq/scaling_governor"] = f"{governor}\n"
        files[f"{folder}/cpufreq/scaling_driver"] = f"{driver}\n"
        files[f"{folder}/cpufreq/scaling_max_freq"] = "1984000\n"
    return {**files, "sys/devices/system/cpu/cpufreq/boost": "0\n"}


def _zone(number: int, name: str, reading: str, *passive: int) -> dict[str, str]:
    folder = f"sys/class/thermal/thermal_zone{number}"
    files = {f"{folder}/type": f"{name}\n", f"{folder}/temp": reading}
    for point, limit in enumerate(passive):
        files[f"{folder}/trip_point_{point}_type"] = "passive\n"
        files[f"{folder}/trip_point_{point}_temp"] = f"{limit}\n"
    return files


def _gpu(name: str, now: int, most: int, governor: str) -> dict[str, str]:
    folder = f"sys/class/devfreq/{name}"
    return {f"{folder}/cur_freq": f"{now}\n", f"{folder}/max_freq": f"{most}\n", f"{folder}/governor": f"{governor}\n"}


ORIN = {
    "etc/nv_tegra_release": release(36, "4.7"),
    "etc/nvpmodel.conf": NVPMODEL,
    "var/lib/nvpmodel/status": "pmode:0002",
    "proc/meminfo": MEMINFO,
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "dev/nvmap": "",
    "dev/nvhost-ctrl-gpu": "",
    "dev/nvhost-prof-gpu": "",
    "dev/nvgpu/igpu0/channel": "",
    "dev/nvgpu/igpu0/ctrl": "",
    "dev/nvgpu/igpu0/prof": "",
    "dev/dri/renderD128": "",
    "dev/dri/card0": "",
    "dev/snd/pcmC0D0c": "",
    "dev/snd/pcmC0D0p": "",
    "run/systemd/timesync/synchronized": "",
    **_gpu("17000000.gpu", 306_000_000, 1_020_000_000, "nvhost_podgov"),
    **_cores(6),
    **_zone(0, "cpu-thermal", "48531\n", 99_000, 0),
    **_zone(1, "gpu-thermal", "47187\n", 99_000, -127_000),
    **_zone(2, "cv0-thermal", ""),
}
"""An Orin Nano Super on JetPack 6.2; what is not switched on has no temperature."""
XAVIER = {
    "etc/nv_tegra_release": release(35, "4.1"),
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=MODE_30W_ALL >\n"
    "< PM_CONFIG DEFAULT=3 >\n",
    "proc/meminfo": MEMINFO,
    "dev/nvmap": "",
    "dev/nvhost-ctrl": "",
    "dev/nvhost-ctrl-gpu": "",
    "run/systemd/timesync/synchronized": "",
    "usr/lib/python3.8/dist-packages/tensorrt/__init__.py": "",
    **_gpu("17000000.gv11b", 114_750_000, 905_250_000, "nvhost_podgov"),
    **_cores(8),
    "sys/devices/system/cpu/cpu6/online": "0\n",
    "sys/devices/system/cpu/cpu7/online": "0\n",
    **_zone(0, "CPU-therm", "34000\n", 86_000),
    **_zone(1, "PMIC-Die", "100000\n", 100_000),
}
"""An AGX Xavier on JetPack 5.1."""
THOR = {
    "etc/nv_tegra_release": release(38, "4.0"),
    "proc/meminfo": MEMINFO,
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,tegra264\0",
    "dev/nvidia0": "",
    "dev/nvidiactl": "",
    "dev/nvmap": "",
    "run/systemd/timesync/synchronized": "",
    **_gpu("gpu-gpc-0", 1_575_000_000, 1_575_000_000, "performance"),
    **_gpu("gpu-nvd-0", 0, 1_692_000_000, "performance"),
    **_cores(14),
    **_zone(0, "tj-thermal", "38312\n", 105_000),
}
"""A Thor on JetPack 7.1."""
DESKTOP = {
    "proc/meminfo": MEMINFO,
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15\n",
    "dev/nvidia0": "",
    "dev/nvidiactl": "",
    "dev/nvidia-uvm": "",
    "dev/dri/renderD128": "",
    "run/systemd/timesync/synchronized": "",
    **_cores(8, "powersave", "intel_pstate"),
    **_zone(0, "x86_pkg_temp", "52000\n", 0),
}
"""A PC with a GPU of NVIDIA's."""
SERVER = {"proc/meminfo": MEMINFO, "run/systemd/timesync/synchronized": ""}
"""A machine without a GPU, of which a container shows little."""

MACHINES = {"orin": ORIN, "xavier": XAVIER, "thor": THOR, "desktop": DESKTOP, "server": SERVER}
STRICT: Mapping[str, Any] = {"target": "tensorrt-fp16", "strict": True}
"""A section `engine` that allows for nothing less than TensorRT."""

ORIN_GPU = {"name": "Orin", "capability": [8, 7], "bytes": 7_802_667_008}
ONNXRUNTIME = Answer({"version": "1.23.2", "providers": ["CPUExecutionProvider"], "file": ""})
GPU_ANSWERS: Mapping[str, Answer] = {
    "cuda": Answer({"driver": "12.6", "runtime": "12.6", "gpus": [ORIN_GPU]}),
    "tensorrt": Answer({"version": "10.3.0", "file": "/usr/lib/python3.10/dist-packages/tensorrt/__init__.py"}),
    "pycuda": Answer({"version": "2024.1.2"}),
    "onnxruntime": ONNXRUNTIME,
    "sounddevice": Answer({"portaudio": "PortAudio V19.6.0", "inputs": ["ReSpeaker 4 Mic Array"]}),
}
"""What the libraries of a machine in order say."""
PLAIN_ANSWERS: Mapping[str, Answer] = {
    "cuda": Answer(error="OSError: libcuda.so.1: cannot open shared object file: No such file or directory"),
    "tensorrt": Answer(error="ModuleNotFoundError: No module named 'tensorrt'", missing="tensorrt"),
    "pycuda": Answer(error="ModuleNotFoundError: No module named 'pycuda'", missing="pycuda"),
    "onnxruntime": ONNXRUNTIME,
    "sounddevice": Answer(error="ModuleNotFoundError: No module named 'sounddevice'", missing="sounddevice"),
}
"""What they say where there is no GPU and no microphone."""


def lay_out(root: Path, files: Mapping[str, str]) -> Path:
    """Write a machine's files below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def configured(**sections: Any) -> Config:
    return Config.model_validate({"model": BUNDLE, "mqtt": {"enabled": False}, **sections})


def patient(
    root: Path,
    files: Mapping[str, str],
    answers: Mapping[str, Answer] = PLAIN_ANSWERS,
    usable: Callable[[Path], bool] = lambda path: True,
    **engine: Any,
) -> Patient:
    return Patient(Tree(lay_out(root, files), usable), configured(engine=engine), "", answers)


def examined(
    root: Path, files: Mapping[str, str], answers: Mapping[str, Answer], **sections: Any
) -> tuple[Report, dict[str, Finding]]:
    tree = Tree(lay_out(root, files), lambda path: True)
    report = examine(lambda: configured(**sections), tree, lambda subject: answers[subject])
    return report, {result.name: result.finding for result in report.results}


def run_doctor(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_asr", "doctor", *options]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120)
