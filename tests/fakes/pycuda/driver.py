"""The part of pycuda.driver that the recogniser and the builder use, with pycuda's rules on contexts and threads."""

from __future__ import annotations

import builtins
import enum
import threading
import warnings

import fake_gpu
import numpy as np
from fake_gpu import CudaError, cudart

gpu = fake_gpu.gpu
if not gpu.driver:
    raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")
cudart.install()


class Error(Exception):
    """Base of pycuda's exceptions."""


class MemoryError(Error, builtins.MemoryError):  # noqa: A001
    """Out of memory."""


class LogicError(Error):
    """A wrong call, or an illegal access of a kernel."""


class LaunchError(Error):
    """A kernel failed."""


class RuntimeError(Error):  # noqa: A001
    """No device, and the like."""


CLASSES = {
    fake_gpu.OUT_OF_MEMORY: MemoryError,
    fake_gpu.LAUNCH_FAILED: LaunchError,
    fake_gpu.NO_DEVICE: RuntimeError,
    fake_gpu.NOT_READY: RuntimeError,
}


def _call(routine, function, *arguments):
    """Call a function of the device, and raise pycuda's exception where it fails."""
    try:
        return function(*arguments)
    except CudaError as error:
        raise CLASSES.get(error.code, LogicError)(f"{routine} failed: {error}") from None


def _fail(routine, code, detail=""):
    def fail():
        raise CudaError(code, detail)

    _call(routine, fail)


class device_attribute(enum.Enum):  # noqa: N801
    """Some attributes of a device."""

    MULTIPROCESSOR_COUNT = 16
    INTEGRATED = 18
    CLOCK_RATE = 13
    COMPUTE_CAPABILITY_MAJOR = 75
    COMPUTE_CAPABILITY_MINOR = 76


class ctx_flags(enum.IntEnum):  # noqa: N801
    """How the host waits; enums of Boost.Python are integers."""

    SCHED_AUTO = 0
    SCHED_SPIN = 1
    SCHED_YIELD = 2
    SCHED_BLOCKING_SYNC = 4
    BLOCKING_SYNC = 4
    SCHED_MASK = 7
    MAP_HOST = 8
    LMEM_RESIZE_TO_MAX = 16


class event_flags(enum.IntEnum):  # noqa: N801
    """Kinds of events."""

    DEFAULT = 0
    BLOCKING_SYNC = 1
    DISABLE_TIMING = 2
    INTERPROCESS = 4


class host_alloc_flags:  # noqa: N801
    """Kinds of page-locked memory."""

    PORTABLE = 1
    DEVICEMAP = 2
    WRITECOMBINED = 4


_initialized = False


def init(flags=0):
    """Start the driver. Raises RuntimeError without a GPU."""
    global _initialized
    if not gpu.present:
        _fail("cuInit", fake_gpu.NO_DEVICE)
    _initialized = True


def get_version():
    """Return the CUDA version that pycuda was built with."""
    version = cudart.cuda_version()
    return version // 1000, version % 1000 // 10, version % 10


def get_driver_version():
    """Return the driver's CUDA version."""
    return cudart.cuda_version()


class Device:
    """The only device has number 0."""

    def __init__(self, number):
        if not _initialized:
            _fail("cuDeviceGet", fake_gpu.NOT_INITIALIZED)
        if number != 0:
            _fail("cuDeviceGet", fake_gpu.INVALID_DEVICE)

    @staticmethod
    def count():
        if not _initialized:
            _fail("cuDeviceGetCount", fake_gpu.NOT_INITIALIZED)
        return 1

    def name(self):
        return gpu.name

    def compute_capability(self):
        return gpu.sm

    def total_memory(self):
        return gpu.total

    def pci_bus_id(self):
        return "0000:00:00.0"

    def get_attribute(self, attribute):
        return {
            device_attribute.MULTIPROCESSOR_COUNT: gpu.multiprocessors,
            device_attribute.INTEGRATED: gpu.integrated,
            device_attribute.CLOCK_RATE: 918000,
            device_attribute.COMPUTE_CAPABILITY_MAJOR: gpu.sm[0],
            device_attribute.COMPUTE_CAPABILITY_MINOR: gpu.sm[1],
        }[attribute]

    def retain_primary_context(self):
        return _call("cuDevicePrimaryCtxRetain", Context, _KEY, "primary contexts")

    def make_context(self, flags=0):
        context = _call("cuCtxCreate", Context, _KEY, "contexts")
        _push(context)
        return context


_KEY = object()
_local = threading.local()


def _stack():
    """Return this thread's contexts, those on top that have been detached taken away."""
    if not hasattr(_local, "stack"):
        _local.stack = []
    while _local.stack and not _local.stack[-1].valid:
        _local.stack.pop()
        _note(_local.stack)
    return _local.stack


def _note(stack):
    gpu.stacks[threading.current_thread().name] = len(stack)


def _push(context):
    stack = _stack()
    stack.append(context)
    _note(stack)


class Context:
    """A context of the device; work needs one on top of its thread's stack."""

    def __init__(self, key=None, kind="contexts"):
        if key is not _KEY:
            raise builtins.RuntimeError("This class cannot be instantiated from Python")
        gpu.check()
        self.valid = True
        self._kind, self._thread = kind, threading.get_ident()
        gpu.live[kind] += 1

    def push(self):
        if not self.valid:
            _fail("cuCtxPushCurrent", fake_gpu.INVALID_CONTEXT)
        _push(self)

    @staticmethod
    def pop():
        stack = _stack()
        if not stack:
            _fail("context::pop", fake_gpu.INVALID_CONTEXT, "cannot pop non-current context")
        stack.pop()
        _note(stack)

    def detach(self):
        if not self.valid:
            _fail("context::detach", fake_gpu.INVALID_CONTEXT, "cannot detach from invalid context")
        stack = _stack()
        if (stack and stack[-1] is self) or self._thread == threading.get_ident():
            gpu.live[self._kind] -= 1
        # On another thread pycuda takes the context for gone and releases nothing.
        self.valid = False
        _stack()

    def __del__(self):
        if getattr(self, "valid", False):
            self.detach()

    @staticmethod
    def get_current():
        stack = _stack()
        return stack[-1] if stack else None

    @staticmethod
    def get_device():
        _current("cuCtxGetDevice")
        return Device(0)

    @staticmethod
    def synchronize():
        _current("cuCtxSynchronize")
        _call("cuCtxSynchronize", gpu.synchronize_all)


def _current(routine):
    """Return the context on top of this thread's stack. Raises LogicError where there is none."""
    stack = _stack()
    if not stack:
        _fail(routine, fake_gpu.INVALID_CONTEXT)
    return stack[-1]


class _Dependent:
    """Something that lives in a context, and is given back in it."""

    def __init__(self, routine):
        self._context = _current(routine)
        self._owned = True

    def _give_back(self, routine):
        if not self._owned:
            _fail(routine, fake_gpu.INVALID_HANDLE)
        self._owned = False
        context, stack = self._context, _stack()
        if not context.valid:
            return  # without a word it is never given back
        if not (stack and stack[-1] is context) and context._thread != threading.get_ident():
            warnings.warn(f"{routine}: out of its context's thread, it is never given back", UserWarning, stacklevel=3)
        else:
            self._destroy()

    def __del__(self):
        if getattr(self, "_owned", False):
            self._give_back(type(self).__name__)


class DeviceAllocation(_Dependent):
    """Device memory; int() is its address."""

    def __init__(self, size):
        super().__init__("cuMemAlloc")
        self._owned = False
        self._allocation = _call("cuMemAlloc", gpu.allocate, size)
        self._owned = True

    def __int__(self):
        return self._allocation.address

    __index__ = __int__

    def free(self):
        self._give_back("device_allocation::free")

    def _destroy(self):
        gpu.settle()
        gpu.release(self._allocation)


def mem_alloc(size):
    """Return a DeviceAllocation of `size` bytes."""
    if type(size) is not int:
        raise TypeError("Python argument types in mem_alloc did not match C++ signature: mem_alloc(unsigned long)")
    return DeviceAllocation(size)


def mem_get_info():
    """Return the free and all bytes of the device."""
    _current("cuMemGetInfo")
    return gpu.available, gpu.total


class PagelockedHostAllocation(_Dependent):
    """Host memory that the device copies from and to by itself."""

    def __init__(self, size, flags):
        super().__init__("cuMemHostAlloc")
        self._owned = False
        room = np.full(size + 4096, fake_gpu.GARBAGE, np.uint8)
        start = -room.ctypes.data % 4096
        self._data, self._flags = room[start : start + size], flags
        _call("cuMemHostAlloc", gpu.check)
        gpu.counts["allocations"] += 1
        if gpu.counts["allocations"] == gpu.out_of_memory_at:
            _fail("cuMemHostAlloc", fake_gpu.OUT_OF_MEMORY)
        self._allocation = gpu.map_host(self._data)
        self._owned = True
        self.__array_interface__ = dict(self._data.__array_interface__)

    def get_device_pointer(self):
        if not self._flags & host_alloc_flags.DEVICEMAP:
            _fail("cuMemHostGetDevicePointer", fake_gpu.INVALID_VALUE)
        return self._allocation.address

    def get_flags(self):
        return self._flags

    def free(self):
        self._give_back("pagelocked_host_allocation::free")

    def _destroy(self):
        gpu.settle()
        gpu.release(self._allocation)


def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
    """Return an array of page-locked memory, its `base` the allocation."""
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    dtype = np.dtype(dtype)
    size = int(np.prod(dims, dtype=np.int64)) * dtype.itemsize
    if not size:
        _fail("cuMemHostAlloc", fake_gpu.INVALID_VALUE)
    allocation = PagelockedHostAllocation(size, int(mem_flags))
    allocation.__array_interface__ |= {"shape": dims, "typestr": dtype.str, "descr": [("", dtype.str)], "strides": None}
    return np.asarray(allocation)


def pagelocked_zeros(shape, dtype, order="C", mem_flags=0):
    """Return the same, filled with zeros."""
    result = pagelocked_empty(shape, dtype, order, mem_flags)
    result.fill(0)
    return result


def pagelocked_empty_like(array, mem_flags=0):
    """Return page-locked memory of an array's shape and type."""
    return pagelocked_empty(array.shape, array.dtype, "C", mem_flags)


class Stream(_Dependent):
    """Work in order, which nobody does before it is waited for."""

    def __init__(self, flags=0):
        super().__init__("cuStreamCreate")
        self._owned = False
        self._stream = _call("cuStreamCreate", gpu.add_stream, not flags & 1)
        self._owned = True

    @property
    def handle(self):
        return self._stream.handle

    def synchronize(self):
        _call("cuStreamSynchronize", gpu.synchronize, self._stream)

    def is_done(self):
        return _query("cuStreamQuery", self._stream, lambda: not self._stream.queue)

    def wait_for_event(self, event):
        mark, other = event._mark, event._stream
        if other is not None:
            _call("cuStreamWaitEvent", gpu.enqueue, self._stream, lambda: gpu.synchronize(other, mark.is_set))

    def _destroy(self):
        if gpu.error is None:
            _call("cuStreamDestroy", gpu.synchronize, self._stream)
        gpu.streams.pop(self._stream.handle, None)


def _query(routine, stream, done):
    """Let one piece of work happen, and tell whether something holds: time passes for whoever polls."""
    with gpu.lock:
        _call(routine, gpu.check)
        if stream.capture is not None:
            stream.capture_broken = True
            _fail(routine, fake_gpu.CAPTURE_UNSUPPORTED)
        if not done() and stream.queue:
            _call(routine, gpu.step, stream)
        return done()


class Event(_Dependent):
    """A mark in a stream."""

    def __init__(self, flags=0):
        super().__init__("cuEventCreate")
        _call("cuEventCreate", gpu.check)
        self._flags, self._stream, self._mark = int(flags), None, threading.Event()
        gpu.live["events"] += 1

    def record(self, stream=None):
        _current("cuEventRecord")
        self._stream = gpu.default_stream if stream is None else stream._stream
        self._mark = threading.Event()
        _call("cuEventRecord", gpu.enqueue, self._stream, self._mark.set)
        return self

    def synchronize(self):
        if self._stream is not None:
            _call("cuEventSynchronize", gpu.synchronize, self._stream, self._mark.is_set)
        return self

    def query(self):
        return self._stream is None or _query("cuEventQuery", self._stream, self._mark.is_set)

    def time_since(self, event):
        if (self._flags | event._flags) & event_flags.DISABLE_TIMING:
            _fail("cuEventElapsedTime", fake_gpu.INVALID_HANDLE)
        if not (self._mark.is_set() and event._mark.is_set()):
            _fail("cuEventElapsedTime", fake_gpu.NOT_READY)
        return 0.5

    def time_till(self, event):
        return event.time_since(self)

    def _destroy(self):
        gpu.live["events"] -= 1


def _address(value, routine):
    if isinstance(value, DeviceAllocation):
        return int(value)
    if type(value) is not int:
        raise TypeError(f"Python argument types in {routine} did not match C++ signature: {type(value).__name__}")
    return value


def _stream_of(stream):
    return gpu.default_stream if stream is None else stream._stream


def memcpy_htod(dest, src):
    """Copy to the device, and wait."""
    _current("cuMemcpyHtoD")
    target, (source, size) = _address(dest, "memcpy_htod"), fake_gpu.address_of(src)
    _call("cuMemcpyHtoD", gpu.forbid_while_capturing)
    _call("cuMemcpyHtoD", gpu.synchronize_all, True)
    _call("cuMemcpyHtoD", lambda: np.copyto(gpu.view(target, size, "copy to"), fake_gpu.host_bytes(source, size)))


def memcpy_dtoh(dest, src):
    """Copy from the device, and wait."""
    _current("cuMemcpyDtoH")
    source, (target, size) = _address(src, "memcpy_dtoh"), fake_gpu.address_of(dest, writable=True)
    _call("cuMemcpyDtoH", gpu.forbid_while_capturing)
    _call("cuMemcpyDtoH", gpu.synchronize_all, True)
    _call("cuMemcpyDtoH", lambda: np.copyto(fake_gpu.host_bytes(target, size), gpu.view(source, size, "copy of")))


def memcpy_htod_async(dest, src, stream=None):
    """Copy to the device later: page-locked memory is read then, other memory now."""
    _current("cuMemcpyHtoDAsync")
    target, (source, size) = _address(dest, "memcpy_htod_async"), fake_gpu.address_of(src)
    data = fake_gpu.host_bytes(source, size)
    if not gpu.is_pinned(source, size):
        gpu.counts["copies of pageable memory"] += 1
        data = data.copy()
    work = lambda: np.copyto(gpu.view(target, size, "copy to"), data)  # noqa: E731
    _call("cuMemcpyHtoDAsync", gpu.enqueue, _stream_of(stream), work)


def memcpy_dtoh_async(dest, src, stream=None):
    """Copy from the device later; into memory that is not page-locked: now."""
    _current("cuMemcpyDtoHAsync")
    source, (target, size) = _address(src, "memcpy_dtoh_async"), fake_gpu.address_of(dest, writable=True)
    data = fake_gpu.host_bytes(target, size)
    work = lambda: np.copyto(data, gpu.view(source, size, "copy of"))  # noqa: E731
    _call("cuMemcpyDtoHAsync", gpu.enqueue, _stream_of(stream), work)
    if not gpu.is_pinned(target, size):
        gpu.counts["copies of pageable memory"] += 1
        _call("cuMemcpyDtoHAsync", gpu.synchronize, _stream_of(stream))


def memcpy_dtod_async(dest, src, size, stream=None):
    """Copy within the device later."""
    _current("cuMemcpyDtoDAsync")
    target, source = _address(dest, "memcpy_dtod_async"), _address(src, "memcpy_dtod_async")
    work = lambda: np.copyto(gpu.view(target, size, "copy to"), gpu.view(source, size, "copy of"))  # noqa: E731
    _call("cuMemcpyDtoDAsync", gpu.enqueue, _stream_of(stream), work)


def memset_d8_async(dest, data, size, stream=None):
    """Fill memory with a byte later."""
    _current("cuMemsetD8Async")
    target = _address(dest, "memset_d8_async")
    _call("cuMemsetD8Async", gpu.enqueue, _stream_of(stream), lambda: gpu.view(target, size, "fill").fill(data))


def memset_d8(dest, data, size):
    """Fill memory with a byte."""
    _current("cuMemsetD8")
    target = _address(dest, "memset_d8")
    _call("cuMemsetD8", gpu.synchronize_all, True)
    _call("cuMemsetD8", lambda: gpu.view(target, size, "fill").fill(data))
