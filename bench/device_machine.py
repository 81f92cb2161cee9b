"""What a machine is: the board, its modes, and the versions of what runs on it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version

from bench import sensors
from bench.device_results import Machine
from bench.floor import find
from edge_asr import __version__
from edge_asr.doctor.tree import RELEASE_FILE, Tree
from edge_asr.recognizer.manifest import Manifest, this_machine

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "pycuda")


def describe(tree: Tree, gpu: int = 0) -> Machine:
    """Return what is to be known of a machine."""
    name = tree.text("proc/device-tree/model") or sensors.card_name(gpu) or this_machine()
    memory_mb = sensors.total_mb(tree)
    known = find(name, (memory_mb or 0) / 1e3)
    governors = {tree.text(path) for path in tree.find("sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")}
    return Machine(
        name=name,
        known_as=None if known is None else known.name,
        cpu=this_machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_mb=None if memory_mb is None else round(memory_mb),
        l4t=(tree.text(RELEASE_FILE) or "").partition("\n")[0] or None,
        power_mode=_power_mode(tree),
        governors=sorted(filter(None, governors)),
        kernel=platform.release(),
    )


def _power_mode(tree: Tree) -> str | None:
    """Return the mode that nvpmodel has set, by name where its configuration has one."""
    chosen = re.search(r"pmode:0*(\d+)", tree.text("var/lib/nvpmodel/status") or "")
    if chosen is None:
        return None
    named = re.search(rf"<\s*POWER_MODEL\s+ID=0*{chosen[1]}\s+NAME=([^\s>]+)", tree.text("etc/nvpmodel.conf") or "")
    return named[1] if named else chosen[1]


def software(manifest: Manifest) -> dict[str, str]:
    """Return the versions of what an engine was built and runs with."""
    found = {"python": platform.python_version(), "edge_asr": __version__, **manifest.versions}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if manifest.plan is not None:  # JetPack's packages are none of Python's
        found |= {"tensorrt": manifest.plan.tensorrt, "cuda": manifest.plan.cuda}
    return found
