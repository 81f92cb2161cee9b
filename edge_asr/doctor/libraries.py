"""Checks of what is installed: CUDA, TensorRT, onnxruntime, and what a microphone needs."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from edge_asr.config import MicrophoneSourceConfig
from edge_asr.doctor.patient import Patient
from edge_asr.doctor.report import Finding, Status, fail, lacking, ok, warn
from edge_asr.tree import Tree

TENSORRT_RELEASES = ((8, 5), (10, 3), (10, 13), (10, 16), (11, 4))
UNSUPPORTED = ((8, 6),)
OLDEST_ONNXRUNTIME = (1, 20)
LAST_FOR_PYTHON_310 = "1.23.2"
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that both install the package `onnxruntime`."""
PIP_LIBRARIES = re.compile(r"tensorrt(-cu\d+)?-(libs|bindings)")
"""What pip brings where TensorRT is taken from the package index; JetPack's is called `tensorrt` alone."""
REBOOT = "reboot; if that does not help, install the driver again (on a Jetson: flash JetPack)"


def cuda_driver(patient: Patient) -> Finding:
    """Return the driver's CUDA version and the GPUs, with their compute capability."""
    answer, need = patient.answer("cuda"), patient.needs_cuda
    if answer.error is not None:
        return lacking(need, f"no CUDA: {answer.error}", _cuda_remedy(patient.tree, answer.error))
    gpus = answer.facts["gpus"]
    if patient.engine.gpu >= len(gpus):
        remedy = "set engine.gpu to one of them" if gpus else "see device_nodes"
        return lacking(need, f"no GPU {patient.engine.gpu}: CUDA sees {len(gpus)}", remedy)
    shown = [f"{gpu['name']} (sm_{''.join(map(str, gpu['capability']))}, {gpu['bytes'] / 1e6:,.0f} MB)" for gpu in gpus]
    return ok(f"driver for CUDA {answer.facts['driver']}; {', '.join(shown)}")


def _cuda_remedy(tree: Tree, error: str) -> str:
    if "libcuda" in error:
        if tree.in_container:
            return "start the container with --runtime nvidia (or --gpus all)"
        package = "nvidia-l4t-cuda (sudo apt install)" if tree.is_jetson else "NVIDIA's driver"
        return f"install {package}"
    if "(803)" in error or "(804)" in error:
        return "the driver was updated while it ran, or does not fit the libraries: reboot, then update the older one"
    if "cuInit" in error:
        return "see device_nodes; if they are usable, reboot"
    return REBOOT


def cuda_runtime(patient: Patient) -> Finding:
    """Return the version of libcudart, which records CUDA graphs."""
    answer, wanted = patient.answer("cuda"), patient.engine.tensorrt.cuda_graphs
    if answer.error is not None:
        return lacking(patient.needs_tensorrt if wanted else "ok", "not looked for without a driver", "see cuda_driver")
    if answer.facts["runtime"] is None:
        remedy = "install it (JetPack 6: sudo apt install cuda-cudart-12-6), or set engine.tensorrt.cuda_graphs: false"
        return lacking(patient.needs_tensorrt if wanted else "ok", "libcudart is not found", remedy)
    return ok(f"CUDA {answer.facts['runtime']}")


def tensorrt(patient: Patient) -> Finding:
    """Return whether TensorRT can be loaded, and is a release that we support."""
    answer, need, tree = patient.answer("tensorrt"), patient.needs_tensorrt, patient.tree
    if answer.missing == "tensorrt":
        return lacking(need, "Python does not find it", _tensorrt_remedy(tree))
    if answer.error is not None:
        return lacking(need, f"cannot be loaded: {answer.error}", _load_remedy(tree, answer.error))
    version = str(answer.facts["version"])
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release in UNSUPPORTED:
        return lacking(need, f"{version}, which is not supported", "update to TensorRT 10.3 (JetPack 6.1) or later")
    from_pip = sorted(name for name, _ in _installed() if PIP_LIBRARIES.fullmatch(name))
    if tree.is_jetson and from_pip:
        remedy = f"pip uninstall -y {' '.join(from_pip)} tensorrt; {_tensorrt_remedy(tree)}"
        return warn(f"{version}, installed by pip, which is not made for a Jetson", remedy)
    if release not in TENSORRT_RELEASES:
        remedy = "run edge-asr build-engine: its self-test tells whether it works"
        return lacking("ok" if need == "ok" else "warn", f"{version}, which nobody has tried yet", remedy)
    return ok(version)


def _tensorrt_remedy(tree: Tree) -> str:
    if not tree.is_jetson:
        return "install TensorRT for this Python and CUDA, or set engine.target: onnx"
    theirs = [name.split("/")[2] for name in tree.find("usr/lib/python3.*/dist-packages/tensorrt")]
    own = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if theirs and own not in theirs:
        return f"JetPack's is for {theirs[0]}, this is {own}: use that Python, or bindings built for this one"
    python = "python3 -m venv --system-site-packages makes an environment that sees JetPack's"
    return python if theirs else f"sudo apt install python3-libnvinfer; {python}"


def _load_remedy(tree: Tree, error: str) -> str:
    if "libnvdla_compiler" in error:
        return "JetPack left it out: sudo apt install nvidia-l4t-dla-compiler, then sudo ldconfig"
    if "libcuda" in error or "libnvinfer" in error:
        if tree.in_container:
            return "use an image that has it (l4t-tensorrt), and start it with --runtime nvidia"
        return "install TensorRT's libraries (JetPack: sudo apt install tensorrt), then sudo ldconfig"
    return f"install TensorRT again as it fits Python {platform.python_version()}, or set engine.target: onnx"


def pycuda(patient: Patient) -> Finding:
    """Return whether pycuda can be loaded, which TensorRT engines need."""
    answer, need = patient.answer("pycuda"), patient.needs_tensorrt
    if answer.missing == "pycuda":
        remedy = "pip install 'edge-asr[tensorrt]'"
        if platform.machine() == "aarch64":
            remedy += ": no wheel for aarch64 is published, so it is built (needs nvcc), or take Jetson AI Lab's"
            remedy += "; JetPack 7 (CUDA 13) needs one newer than 2025.1.1"
        return lacking(need, "Python does not find it", remedy)
    if answer.error is not None:
        remedy = "see cuda_driver" if "libcuda" in answer.error else "install it again: it was built for another CUDA"
        return lacking(need, f"cannot be loaded: {answer.error}", remedy)
    return ok(str(answer.facts["version"]))


def onnxruntime_packages(patient: Patient) -> Finding:
    """Return which distributions of onnxruntime are installed: two overwrite each other's files."""
    places: dict[str, set[str]] = {}
    for name, folder in _installed():
        if name in ONNXRUNTIMES:
            places.setdefault(name, set()).add(str(folder))
    if not places:
        return ok("none known to pip")
    found = " and ".join(sorted(places))
    if len(places) < len(ONNXRUNTIMES):
        return ok(found)
    extra = "gpu" if patient.needs_cuda != "ok" else "cpu"
    remedy = f"pip uninstall -y {' '.join(ONNXRUNTIMES)}; pip install 'edge-asr[{extra}]'"
    if set.intersection(*places.values()):
        return fail(f"{found}, which overwrite each other", remedy)
    return warn(f"{found} in different folders, of which the first that Python finds is used", remedy)


def onnxruntime(patient: Patient) -> Finding:
    """Return whether onnxruntime can be loaded: voice detection runs on it, whatever the engine."""
    answer = patient.answer("onnxruntime")
    if answer.missing == "onnxruntime":
        return fail("Python does not find it", "pip install 'edge-asr[cpu]', or 'edge-asr[gpu]' with a GPU")
    if answer.error is not None:
        return fail(f"cannot be loaded: {answer.error}", f"pip uninstall -y {' '.join(ONNXRUNTIMES)}, then install one")
    version, providers = str(answer.facts["version"]), answer.facts["providers"]
    short = ", ".join(str(provider).removesuffix("ExecutionProvider") for provider in providers)
    found = f"{version} with {short}"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_ONNXRUNTIME:
        return fail(f"{found}, older than 1.20", "pip install --upgrade 'edge-asr[cpu]'")
    if sys.version_info[:2] == (3, 10):
        found += f"; {LAST_FOR_PYTHON_310} is the last for Python 3.10"
    return ok(found)


def onnxruntime_cuda(patient: Patient) -> Finding:
    """Return whether onnxruntime can use the GPU, where it is asked to."""
    if not patient.engine.cuda.enabled:
        return ok("engine.cuda.enabled is false")
    built_in = patient.answer("onnxruntime").facts.get("providers", [])
    if "CUDAExecutionProvider" not in built_in:
        remedy = "pip uninstall -y onnxruntime; pip install 'edge-asr[gpu]', or set engine.cuda.enabled: false"
        if patient.tree.is_jetson and sys.version_info[:2] == (3, 10):
            remedy += " (for Python 3.10 on a Jetson take Jetson AI Lab's onnxruntime-gpu)"
        return warn("this onnxruntime was built without CUDA", remedy)
    answer = patient.answer("onnxruntime-cuda")
    if answer.error is None and "CUDAExecutionProvider" in answer.facts["providers"]:
        return ok("a session runs on CUDA")
    why = answer.error or answer.facts.get("complaint") or "it falls back to the processor"
    remedy = "install the CUDA and cuDNN that it was built for (JetPack 6: cudnn9-cuda-12-6); see cuda_driver"
    return warn(f"no session on CUDA: {why}", remedy)


def microphone(patient: Patient) -> Finding:
    """Return the devices that PortAudio can record from; one that is configured may be plugged in later."""
    answer = patient.answer("sounddevice")
    sources = () if patient.config is None else patient.config.sources
    need: Status = "fail" if any(isinstance(source, MicrophoneSourceConfig) for source in sources) else "warn"
    if answer.missing == "sounddevice":
        remedy = "pip install 'edge-asr[microphone]'"
        return lacking(need, "sounddevice is not installed; files and standard input work", remedy)
    if answer.error is not None:
        remedy = "sudo apt install libportaudio2" if "PortAudio library" in answer.error else "see sound_nodes"
        return lacking(need, f"sounddevice cannot be loaded: {answer.error}", remedy)
    inputs = answer.facts["inputs"]
    if not inputs:
        remedy = "plug in a microphone, and see sound_nodes; files and standard input work without"
        return warn("PortAudio finds no device to record from", remedy)
    return ok(f"{len(inputs)}: {', '.join(map(str, inputs))}")


def _installed() -> Iterator[tuple[str, Path]]:
    """Yield name and folder of all distributions that Python sees."""
    for distribution in distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None
        if name:  # a broken installation has none
            yield re.sub(r"[-_.]+", "-", name).lower(), Path(str(distribution.locate_file(""))).resolve()
