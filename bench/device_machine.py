"""What a machine is: the board, its modes, and the versions of what runs on it."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from bench.device_results import Machine
from bench.floor import find
from bench.sensors import card_name
from edge_asr import __version__
from edge_asr.recognizer.manifest import Manifest, this_machine
from edge_asr.sensors import power_mode, total_mb
from edge_asr.tree import RELEASE_FILE, Tree

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "pycuda")


def describe(tree: Tree, gpu: int = 0) -> Machine:
    """Return what is to be known of a machine."""
    name = tree.text("proc/device-tree/model") or card_name(gpu) or this_machine()
    memory_mb = total_mb(tree)
    known = find(name, (memory_mb or 0) / 1e3)
    governors = {tree.text(path) for path in tree.find("sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")}
    return Machine(
        name=name,
        known_as=None if known is None else known.name,
        cpu=this_machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_mb=None if memory_mb is None else round(memory_mb),
        l4t=(tree.text(RELEASE_FILE) or "").partition("\n")[0] or None,
        power_mode=power_mode(tree).name,
        governors=sorted(filter(None, governors)),
        kernel=platform.release(),
    )


def software(manifest: Manifest) -> dict[str, str]:
    """Return the versions of what an engine was built and runs with."""
    found = {"python": platform.python_version(), "edge_asr": __version__, **manifest.versions}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if manifest.plan is not None:  # JetPack's packages are none of Python's
        found |= {"tensorrt": manifest.plan.tensorrt, "cuda": manifest.plan.cuda}
    return found
