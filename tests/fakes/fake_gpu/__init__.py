"""One simulated GPU under the fakes of pycuda and TensorRT: memory with bounds, late streams, faults on demand.

Settings come from the environment, so that they reach child processes:

FAKE_GPU            none: no GPU; nodriver: no libcuda either
FAKE_GPU_SM         compute capability, 8.7
FAKE_GPU_MEMORY     free,total in bytes
FAKE_GPU_NAME
FAKE_GPU_INTEGRATED 0: its memory is not the host's
FAKE_GPU_MULTIPROCESSORS
FAKE_GPU_BARE       1: TensorRT's own tactics have no kernel for it, those of all libraries do
FAKE_GPU_OOM_AT     the n-th allocation fails
FAKE_GPU_FAIL_AT    the n-th execution is a launch failure, and all that follows fails
FAKE_GPU_FAIL_WITH  from when on this file exists, every execution is a launch failure
FAKE_GPU_NAN_AT     the n-th execution and all later ones answer NaN
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import itertools
import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np

ALIGNMENT = 512
GUARD = 1 << 20
"""Addresses that belong to nobody, between two allocations."""
GARBAGE = 0xFF
"""What fresh memory is filled with: NaN as floats, -1 as integers."""

SUCCESS, OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE = 0, 2, 3, 100
INVALID_VALUE, INVALID_DEVICE, INVALID_CONTEXT, INVALID_HANDLE, NOT_READY = 1, 101, 201, 400, 600
ILLEGAL_ADDRESS, LAUNCH_FAILED = 700, 719
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
TEXTS = {
    OUT_OF_MEMORY: "out of memory",
    NOT_INITIALIZED: "initialization error",
    NO_DEVICE: "no CUDA-capable device is detected",
    INVALID_VALUE: "invalid argument",
    INVALID_DEVICE: "invalid device ordinal",
    INVALID_CONTEXT: "invalid device context",
    INVALID_HANDLE: "invalid resource handle",
    NOT_READY: "device not ready",
    ILLEGAL_ADDRESS: "an illegal memory access was encountered",
    LAUNCH_FAILED: "unspecified launch failure",
    CAPTURE_UNSUPPORTED: "operation not permitted when stream is capturing",
    CAPTURE_INVALIDATED: "operation failed due to a previous error during capture",
}


class CudaError(Exception):
    """A call that failed, with CUDA's code."""

    def __init__(self, code, detail=""):
        super().__init__(detail or TEXTS.get(code, "unknown"))
        self.code = code


class Allocation:
    """Some bytes of device memory, or of host memory that the device may see."""

    def __init__(self, address, data, kind):
        self.address, self.data, self.kind = address, data, kind

    @property
    def size(self):
        return len(self.data)

    def __repr__(self):
        return f"<{self.kind} {self.size} bytes at {self.address:#x}>"


class Stream:
    """Work in order, not done before somebody waits for it."""

    handles = itertools.count(0x5000, 0x10)

    def __init__(self, blocking=True):
        self.handle = next(self.handles)
        self.blocking = blocking
        """Waits for synchronous calls, and they for it; a CU_STREAM_NON_BLOCKING one does not."""
        self.queue = []
        self.capture = None
        """What has been recorded since cudaStreamBeginCapture."""
        self.capture_mode = 0
        self.capture_thread = None
        self.capture_broken = False


class Gpu:
    """The device, and all that was taken from it."""

    def __init__(self):
        environ = os.environ
        self.present = environ.get("FAKE_GPU", "") not in ("none", "nodriver")
        self.driver = environ.get("FAKE_GPU", "") != "nodriver"
        self.sm = tuple(int(part) for part in environ.get("FAKE_GPU_SM", "8.7").split("."))
        memory = environ.get("FAKE_GPU_MEMORY", f"{6 << 30},{8 << 30}").split(",")
        self.free, self.total = (int(part) for part in memory)
        self.name = environ.get("FAKE_GPU_NAME", "Fake Orin (nvgpu)")
        self.integrated = int(environ.get("FAKE_GPU_INTEGRATED", 1))
        self.multiprocessors = int(environ.get("FAKE_GPU_MULTIPROCESSORS", 8))
        self.bare = int(environ.get("FAKE_GPU_BARE", 0))
        self.out_of_memory_at = int(environ.get("FAKE_GPU_OOM_AT", 0))
        self.fail_at = int(environ.get("FAKE_GPU_FAIL_AT", 0))
        self.fail_with = Path(environ.get("FAKE_GPU_FAIL_WITH", "/never"))
        self.nan_at = int(environ.get("FAKE_GPU_NAN_AT", 0))
        self.lock = threading.RLock()
        self.allocations = {}
        self.streams = {}
        self.live = Counter()
        """Objects by kind: contexts, events, engines, execution contexts, graphs."""
        self.stacks = {}
        """Depth of the stack of contexts by thread, where it is not 0."""
        self.counts = Counter()
        """What was done: allocations, executions, graph launches, copies from or to memory that is not pinned."""
        self.violations = []
        """What no program may do, in words; the device only says `illegal memory access`."""
        self.error = None
        """The code of a failed kernel: from then on every call fails with it."""
        self._next = 0x7F_0000_0000
        self._bases = []
        self.default_stream = Stream()
        self.streams[0] = self.default_stream

    # Memory

    @property
    def used(self):
        return sum(one.size for one in self.allocations.values() if one.kind != "pinned")

    @property
    def available(self):
        return max(self.free - self.used, 0)

    def allocate(self, size, kind="device"):
        """Return an Allocation of `size` bytes. Raises CudaError."""
        with self.lock:
            self.check()
            self.forbid_while_capturing()
            if size <= 0:
                raise CudaError(INVALID_VALUE)
            self.counts["allocations"] += 1
            if self.counts["allocations"] == self.out_of_memory_at or (kind != "pinned" and size > self.available):
                raise CudaError(OUT_OF_MEMORY)
            return self._place(np.full(size, GARBAGE, np.uint8), kind)

    def map_host(self, data):
        """Return the Allocation by which the device sees host memory."""
        with self.lock:
            return self._place(data, "pinned")

    def _place(self, data, kind):
        address = self._next
        self._next += (len(data) + GUARD + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        self.allocations[address] = Allocation(address, data, kind)
        bisect.insort(self._bases, address)
        return self.allocations[address]

    def release(self, allocation):
        with self.lock:
            if self.allocations.pop(allocation.address, None) is None:
                raise CudaError(INVALID_VALUE)
            self._bases.remove(allocation.address)

    def view(self, address, size, what="access"):
        """Return the bytes `[size]` at an address. Raises CudaError, and remembers why, where they are nobody's."""
        with self.lock:
            index = bisect.bisect_right(self._bases, address) - 1
            found = self.allocations[self._bases[index]] if index >= 0 else None
            if found is None or address >= found.address + found.size + GUARD // 2:
                self._illegal(f"{what}: {size} bytes at {address:#x}, which belongs to no allocation")
            offset = address - found.address
            if offset + size > found.size:
                self._illegal(f"{what}: {size} bytes at offset {offset} of {found}")
            return found.data[offset : offset + size]

    def bytes_from(self, address):
        """Return how many bytes an allocation has from an address on; 0 where there is none."""
        with self.lock:
            return max(
                (
                    one.address + one.size - address
                    for one in self.allocations.values()
                    if one.address <= address < one.address + one.size
                ),
                default=0,
            )

    def _illegal(self, detail):
        self.violations.append(detail)
        raise CudaError(ILLEGAL_ADDRESS, f"{TEXTS[ILLEGAL_ADDRESS]} ({detail})")

    def is_pinned(self, address, size):
        """Tell whether host memory was given out by the driver, so that copies of it are asynchronous."""
        return any(
            one.kind == "pinned"
            and one.data.ctypes.data <= address
            and address + size <= one.data.ctypes.data + one.size
            for one in list(self.allocations.values())
        )

    # Streams

    def check(self):
        """Raise CudaError where a kernel has failed before: the context is lost."""
        if self.error is not None:
            raise CudaError(self.error)

    def stream(self, handle):
        if not isinstance(handle, int) or handle not in self.streams:
            self.violations.append(f"no stream of handle {handle!r}")
            raise CudaError(INVALID_HANDLE)
        return self.streams[handle]

    def add_stream(self, blocking=True):
        self.check()
        stream = Stream(blocking)
        self.streams[stream.handle] = stream
        return stream

    def enqueue(self, stream, work):
        """Let a stream do something later, or record it while it captures."""
        with self.lock:
            self.check()
            (stream.queue if stream.capture is None else stream.capture).append(work)

    def forbid_while_capturing(self):
        """Break the captures that do not allow calls like the one being made."""
        here = threading.get_ident()
        for stream in self.streams.values():
            forbids = stream.capture_mode == 0 or (stream.capture_mode == 1 and stream.capture_thread == here)
            if stream.capture is not None and forbids:
                stream.capture_broken = True
                raise CudaError(CAPTURE_UNSUPPORTED)

    def step(self, stream):
        """Do the next piece of a stream's work."""
        work = stream.queue.pop(0)
        try:
            work()
        except CudaError as error:
            self.error = error.code
            stream.queue.clear()
            raise

    def synchronize(self, stream, until=None):
        """Do a stream's work, all of it or until something holds. Raises CudaError."""
        with self.lock:
            self.check()
            if stream.capture is not None:
                stream.capture_broken = True
                raise CudaError(CAPTURE_UNSUPPORTED)
            while stream.queue and not (until and until()):
                self.step(stream)

    def synchronize_all(self, blocking_only=False):
        with self.lock:
            self.check()
            for stream in list(self.streams.values()):
                if stream.blocking or not blocking_only:
                    self.synchronize(stream)

    def settle(self):
        """Do all work before memory is given back; where something went wrong before, that is all the same."""
        with contextlib.suppress(CudaError):
            self.forbid_while_capturing()
            for stream in list(self.streams.values()):
                if stream.capture is None:
                    self.synchronize(stream)

    # Faults, and what is left

    def executed(self):
        """Count an execution. Return whether it is to answer NaN. Raises CudaError where it is to fail."""
        self.counts["executions"] += 1
        number = self.counts["executions"]
        if self.fail_with.exists() or (self.fail_at and number >= self.fail_at):
            raise CudaError(LAUNCH_FAILED)
        return bool(self.nan_at) and number >= self.nan_at

    def leaks(self):
        """Return what has been taken and not given back, in words; a primary context may be kept by the process."""
        found = [repr(one) for one in self.allocations.values()]
        found += [f"stream {handle:#x}" for handle in self.streams if handle]
        found += [
            f"{count} {kind}" for kind, count in sorted(self.live.items()) if count > (kind == "primary contexts")
        ]
        found += [f"{depth} contexts on the stack of thread {name}" for name, depth in self.stacks.items() if depth]
        return found


def address_of(buffer, writable=False):
    """Return the address and the size in bytes of a contiguous buffer."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise BufferError("ndarray is not C-contiguous")
    if writable and view.readonly:
        raise BufferError("buffer is read-only")
    array = np.frombuffer(view.cast("B") if view.ndim else view, np.uint8)
    return array.ctypes.data, view.nbytes


def host_bytes(address, size):
    """Return host memory as bytes that can be written."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


gpu = Gpu()
