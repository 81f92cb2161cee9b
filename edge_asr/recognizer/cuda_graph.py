"""CUDA graphs: recorded launches. pycuda has no calls for them, libcudart has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from edge_asr.errors import BrokenEngineError, EngineError

THREAD_LOCAL = 1
"""cudaStreamCaptureModeThreadLocal: another thread may allocate memory while this one records."""
RESTART = "restart edge-asr; if it happens again, dmesg says more"


class Graph:
    """Launches that were recorded, with all addresses and shapes."""

    def __init__(self, runtime: ctypes.CDLL, stream: int, launch: Callable[[], bool]) -> None:
        """Record `launch` on `stream`. Raises EngineError."""
        self._runtime, self._stream = runtime, ctypes.c_void_p(stream)
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(runtime.cudaStreamBeginCapture(self._stream, THREAD_LOCAL))
        try:
            launched = launch()
        finally:
            status = runtime.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
        self._check(status)
        try:
            if not launched:
                raise EngineError("the launches cannot be recorded")
            self._check(runtime.cudaGraphInstantiateWithFlags(ctypes.byref(self._executable), graph, 0))
        finally:
            runtime.cudaGraphDestroy(graph)

    def launch(self) -> None:
        """Do it all again. Raises BrokenEngineError."""
        self._check(self._runtime.cudaGraphLaunch(self._executable, self._stream), BrokenEngineError)

    def close(self) -> None:
        """Give it back, once."""
        self._runtime.cudaGraphExecDestroy(self._executable)

    def _check(self, status: int, kind: type[EngineError] = EngineError) -> None:
        if status:
            self._runtime.cudaGetLastError()  # or else the next call of the runtime would report it once more
            why = self._runtime.cudaGetErrorString(status).decode(errors="replace")
            raise kind(f"CUDA graph: {why}; {RESTART}")


def load_runtime(major: int) -> ctypes.CDLL:
    """Load libcudart of CUDA `major`. Raises EngineError."""
    version = "11.0" if major == 11 else str(major)
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{version}")
        _declare(runtime)
    except (OSError, AttributeError) as error:  # it is not there, or older than 11.4
        raise EngineError(f"CUDA graphs need libcudart ({error})") from error
    return runtime


def _declare(runtime: ctypes.CDLL) -> None:
    """Say what its functions take. Raises AttributeError where it lacks one."""
    pointer = ctypes.c_void_p
    runtime.cudaStreamBeginCapture.argtypes = [pointer, ctypes.c_int]
    runtime.cudaStreamEndCapture.argtypes = [pointer, pointer]
    runtime.cudaGraphInstantiateWithFlags.argtypes = [pointer, pointer, ctypes.c_ulonglong]
    runtime.cudaGraphLaunch.argtypes = [pointer, pointer]
    runtime.cudaGraphExecDestroy.argtypes = [pointer]
    runtime.cudaGraphDestroy.argtypes = [pointer]
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
