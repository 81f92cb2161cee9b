"""Asks one library what it is, in a process of its own: a broken driver may crash or hang whoever loads it.

Started by `children.ask`. The answer is one JSON object on standard output; `error` in it is why there is none.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CUDART = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*."""
IDENTITY = bytes.fromhex(
    "08083a2f0a100a017812017922084964656e746974791201675a0b0a017812060a0408011200620b0a017912060a040801120042040a00100d"
)
"""The smallest graph: y = x, scalars, opset 13."""


def main(subject: str) -> None:
    """Write the answer about `subject`, and end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected, and is no news to the system
    answer = os.dup(1)
    os.dup2(2, 1)  # some libraries print when they are loaded
    try:
        facts = PROBES[subject]()
    except Exception as error:  # noqa: BLE001 - any error of a foreign library is the answer here
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        facts = {"error": f"{type(error).__name__}: {error}", "missing": missing}
    os.write(answer, json.dumps(facts).encode())
    os._exit(0)  # at a proper end a broken driver could still crash, or hang


def cuda() -> dict[str, Any]:
    """Return the driver's CUDA version, the GPUs, and the runtime's version where libcudart is there."""
    driver = ctypes.CDLL("libcuda.so.1")
    count, version = ctypes.c_int(), ctypes.c_int()
    _check(driver, "cuInit", driver.cuInit(0))
    _check(driver, "cuDriverGetVersion", driver.cuDriverGetVersion(ctypes.byref(version)))
    _check(driver, "cuDeviceGetCount", driver.cuDeviceGetCount(ctypes.byref(count)))
    gpus = [_gpu(driver, number) for number in range(count.value)]
    return {"driver": _version(version.value), "gpus": gpus, "runtime": _runtime()}


def tensorrt() -> dict[str, Any]:
    """Return TensorRT's version."""
    import tensorrt

    return {"version": str(tensorrt.__version__), "file": tensorrt.__file__}


def pycuda() -> dict[str, Any]:
    """Return pycuda's version."""
    import pycuda
    import pycuda.driver

    return {"version": str(pycuda.VERSION_TEXT)}


def onnxruntime() -> dict[str, Any]:
    """Return onnxruntime's version, and the providers that it was built with."""
    import onnxruntime

    return {
        "version": str(onnxruntime.__version__),
        "providers": onnxruntime.get_available_providers(),
        "file": onnxruntime.__file__,
    }


def onnxruntime_cuda() -> dict[str, Any]:
    """Return which providers a session has that asked for CUDA: it is only tried when a session wants it."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on: finds CUDA and cuDNN where pip puts them
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(IDENTITY, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    return {"providers": session.get_providers()}


def sounddevice() -> dict[str, Any]:
    """Return PortAudio's version and the names of the devices that sound can be recorded from."""
    import sounddevice

    devices = sounddevice.query_devices()
    return {
        "portaudio": sounddevice.get_portaudio_version()[1],
        "inputs": [device["name"] for device in devices if device["max_input_channels"] > 0],
    }


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "cuda": cuda,
    "tensorrt": tensorrt,
    "pycuda": pycuda,
    "onnxruntime": onnxruntime,
    "onnxruntime-cuda": onnxruntime_cuda,
    "sounddevice": sounddevice,
}


def _gpu(driver: ctypes.CDLL, number: int) -> dict[str, Any]:
    device, value, size, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    _check(driver, "cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), number))
    _check(driver, "cuDeviceGetName", driver.cuDeviceGetName(name, len(name), device))
    _check(driver, "cuDeviceTotalMem", driver.cuDeviceTotalMem_v2(ctypes.byref(size), device))
    capability = []
    for attribute in (MAJOR, MINOR):
        _check(driver, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
        capability.append(value.value)
    return {"name": name.value.decode(errors="replace"), "capability": capability, "bytes": size.value}


def _check(driver: ctypes.CDLL, call: str, code: int) -> None:
    if code != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{call}: {(text.value or b'unknown error').decode(errors='replace')} ({code})")


def _runtime() -> str | None:
    """Return libcudart's version, wherever the linker or pip's packages have it."""
    packages = [str(path) for folder in sys.path for path in Path(folder).glob("nvidia/*/lib/libcudart.so.*")]
    for name in (*CUDART, *packages):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        if library.cudaRuntimeGetVersion(ctypes.byref(version)) == 0:
            return _version(version.value)
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
