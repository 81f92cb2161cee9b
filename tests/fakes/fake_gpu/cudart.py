"""The part of libcudart that makes CUDA graphs, behind `ctypes.CDLL`."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from ctypes import c_char_p, c_int, c_size_t, c_ulonglong, c_void_p

import fake_gpu
from fake_gpu import CAPTURE_INVALIDATED, INVALID_HANDLE, INVALID_VALUE, SUCCESS, TEXTS, CudaError

CUDA = {"8.5": 11040, "8.6": 12020, "10.3": 12060, "10.7": 12060, "10.13": 13000, "10.16": 13020, "11.4": 13020}
"""CUDA by release of TensorRT, as they come together on a Jetson."""

graphs, executables = {}, {}
_handles = itertools.count(0x9000, 0x10)


def cuda_version():
    """Return CUDA's version as the runtime says it: 12060."""
    return CUDA.get(os.environ.get("FAKE_TENSORRT", "10.3"), 13020)


def _guarded(function):
    def call(*arguments):
        try:
            return function(fake_gpu.gpu, *arguments) or SUCCESS
        except CudaError as error:
            return error.code

    return call


def _begin_capture(gpu, stream, mode):
    found = gpu.stream(stream or 0)
    if found is gpu.default_stream or found.capture is not None:
        return fake_gpu.CAPTURE_UNSUPPORTED
    gpu.check()
    found.capture, found.capture_mode, found.capture_broken = [], mode, False
    found.capture_thread = threading.get_ident()
    return SUCCESS


def _end_capture(gpu, stream, graph):
    found = gpu.stream(stream or 0)
    if found.capture is None:
        return INVALID_VALUE
    work, found.capture = found.capture, None
    if found.capture_broken:
        _write(graph, 0)
        return CAPTURE_INVALIDATED
    handle = next(_handles)
    graphs[handle] = work
    gpu.live["graphs"] += 1
    _write(graph, handle)
    return SUCCESS


def _instantiate(gpu, executable, graph, *_):
    if graph not in graphs:
        return INVALID_VALUE
    gpu.check()
    handle = next(_handles)
    executables[handle] = (list(graphs[graph]), gpu.allocate(1 << 16, "graph"))
    gpu.live["executable graphs"] += 1
    _write(executable, handle)
    return SUCCESS


def _launch(gpu, executable, stream):
    if executable not in executables:
        return INVALID_HANDLE
    found = gpu.stream(stream or 0)
    gpu.counts["graph launches"] += 1
    for work in executables[executable][0]:
        gpu.enqueue(found, work)
    return SUCCESS


def _destroy_executable(gpu, executable):
    if executable not in executables:
        return INVALID_VALUE
    gpu.release(executables.pop(executable)[1])
    gpu.live["executable graphs"] -= 1
    return SUCCESS


def _destroy(gpu, graph):
    if graphs.pop(graph, None) is None:
        return INVALID_VALUE
    gpu.live["graphs"] -= 1
    return SUCCESS


def _write(pointer, value):
    ctypes.cast(pointer, ctypes.POINTER(c_void_p))[0] = value


_texts = {code: ctypes.create_string_buffer(text.encode()) for code, text in {**TEXTS, 0: "no error"}.items()}


def _error_string(code):
    return ctypes.addressof(_texts.get(code, _texts[INVALID_VALUE]))


class FakeCudart:
    """Looks like a loaded library; its functions convert arguments as C functions do."""

    def __init__(self):
        version = cuda_version()
        instantiate = (c_void_p, c_void_p, c_void_p, c_void_p, c_size_t) if version < 12000 else None
        prototypes = {
            "cudaStreamBeginCapture": (_begin_capture, c_void_p, c_int),
            "cudaStreamEndCapture": (_end_capture, c_void_p, c_void_p),
            "cudaGraphInstantiate": (_instantiate, *(instantiate or (c_void_p, c_void_p, c_ulonglong))),
            "cudaGraphInstantiateWithFlags": (_instantiate, c_void_p, c_void_p, c_ulonglong),
            "cudaGraphLaunch": (_launch, c_void_p, c_void_p),
            "cudaGraphExecDestroy": (_destroy_executable, c_void_p),
            "cudaGraphDestroy": (_destroy, c_void_p),
            "cudaRuntimeGetVersion": (
                lambda _, out: ctypes.cast(out, ctypes.POINTER(c_int)).__setitem__(0, version),
                c_void_p,
            ),
            "cudaGetLastError": (lambda gpu: gpu.error or SUCCESS,),
            "cudaStreamSynchronize": (lambda gpu, stream: gpu.synchronize(gpu.stream(stream or 0)), c_void_p),
        }
        for name, (function, *types) in prototypes.items():
            setattr(self, name, ctypes.CFUNCTYPE(c_int, *types)(_guarded(function)))
        # A callback cannot return char *, a function made of its address can.
        self._error_string = ctypes.CFUNCTYPE(c_void_p, c_int)(_error_string)
        address = ctypes.cast(self._error_string, c_void_p).value
        self.cudaGetErrorString = ctypes.CFUNCTYPE(c_char_p, c_int)(address)
        self.cudaGetErrorName = ctypes.CFUNCTYPE(c_char_p, c_int)(address)


_real_cdll = ctypes.CDLL


def _cdll(name=None, *arguments, **options):
    if name is not None and "cudart" in str(name):
        if os.environ.get("FAKE_CUDART") == "missing":
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return FakeCudart()
    return _real_cdll(name, *arguments, **options)


def install():
    """Let ctypes find the fake wherever somebody loads libcudart."""
    ctypes.CDLL = _cdll


def uninstall():
    """Undo install()."""
    ctypes.CDLL = _real_cdll
