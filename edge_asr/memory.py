"""How much memory there is to be had, and that what is in it is not written down."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CORE_DUMP_FILTER = Path("/proc/self/coredump_filter")
LIBRARIES = 400_000_000
"""What CUDA and TensorRT take themselves: an estimate."""
ON_GPU = 1.3
"""A loaded plan takes so many times its file, with room for what is computed on the way: an estimate."""
ON_BOTH = 2.0
"""The same where host and GPU share their memory: while it is loaded, the file is there as well."""


def keep_out_of_core_dumps() -> None:
    """Have a crash of this process, or of its children, write no memory down: it holds what was spoken."""
    with contextlib.suppress(OSError, ValueError):  # a sandbox that forbids it has a limit of its own
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):  # a kernel without it
        CORE_DUMP_FILTER.write_text("0")  # a program that collects core dumps is no file: no limit holds for it


def give_back() -> None:
    """Give memory that was freed back to the system: glibc keeps it otherwise, for each thread that took some."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int:
    """Return how much memory programs can still get on this machine; everything, where nobody says."""
    try:
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return sys.maxsize


def lack(plan_bytes: int, host_free: int, gpu_free: int | None) -> str | None:
    """Return why TensorRT's plans of that size cannot be loaded beside what is loaded already; None where they can.

    `gpu_free`: None where the GPU uses the host's memory, as on a Jetson.
    """
    if gpu_free is None:
        return too_little("memory", host_free, ON_BOTH * plan_bytes + LIBRARIES)
    on_gpu = too_little("the GPU's memory", gpu_free, ON_GPU * plan_bytes)
    return on_gpu or too_little("memory", host_free, plan_bytes + LIBRARIES)


def too_little(what: str, free: int, needed: float) -> str | None:
    """Return why so many bytes of something are not to be had; None where they are."""
    return None if free >= needed else f"it needs about {needed / 1e6:.0f} MB of {what}, {free / 1e6:.0f} MB are free"
