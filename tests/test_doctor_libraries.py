"""What the doctor says of libraries that are missing, unfit, or crash when they are loaded."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machines import (
    DESKTOP,
    GPU_ANSWERS,
    ORIN,
    ORIN_GPU,
    SERVER,
    STRICT,
    configured,
    lay_out,
    patient,
)

from edge_asr.config import MicrophoneSourceConfig
from edge_asr.doctor import libraries
from edge_asr.doctor.children import Answer, ask
from edge_asr.doctor.examination import CHECKS, examine
from edge_asr.doctor.report import ok
from edge_asr.tree import Tree


@pytest.mark.parametrize("version", ["8.5.2.2", "10.3.0", "10.13.3.9", "10.16.0", "11.4.1"])
def test_a_supported_tensorrt_is_all_right(tmp_path: Path, version: str) -> None:
    answers = {**GPU_ANSWERS, "tensorrt": Answer({"version": version})}
    assert libraries.tensorrt(patient(tmp_path, ORIN, answers)) == ok(version)


@pytest.mark.parametrize(
    ("version", "said"), [("8.6.2", "not supported"), ("10.9.0", "nobody has tried"), ("dev", "nobody has tried")]
)
def test_another_tensorrt_is_a_warning_where_it_is_wanted(tmp_path: Path, version: str, said: str) -> None:
    answers = {**GPU_ANSWERS, "tensorrt": Answer({"version": version})}
    finding = libraries.tensorrt(patient(tmp_path, ORIN, answers))
    assert finding.status == "warn"
    assert said in finding.found
    assert libraries.tensorrt(patient(tmp_path, ORIN, answers, target="onnx")).status == "ok"


def test_a_jetson_without_pycuda_is_told_which_one_cuda_13_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    answers = {**GPU_ANSWERS, "pycuda": Answer({}, missing="pycuda")}
    assert "newer than 2025.1.1" in str(libraries.pycuda(patient(tmp_path, ORIN, answers)).remedy)


def test_tensorrt_86_fails_where_it_is_a_must(tmp_path: Path) -> None:
    answers = {**GPU_ANSWERS, "tensorrt": Answer({"version": "8.6.2"})}
    assert libraries.tensorrt(patient(tmp_path, ORIN, answers, **STRICT)).status == "fail"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("ImportError: libnvdla_compiler.so: cannot open shared object file", "nvidia-l4t-dla-compiler"),
        ("OSError: libnvinfer.so.10: cannot open shared object file", "sudo apt install tensorrt"),
        ("ImportError: undefined symbol: _ZN9", "install TensorRT again"),
        ("loading it crashed with SIGSEGV", "install TensorRT again"),
    ],
)
def test_a_tensorrt_that_cannot_be_loaded_says_what_is_missing(tmp_path: Path, error: str, remedy: str) -> None:
    answers = {**GPU_ANSWERS, "tensorrt": Answer(error=error)}
    finding = libraries.tensorrt(patient(tmp_path, ORIN, answers))
    assert error in finding.found
    assert remedy in str(finding.remedy)


def test_a_tensorrt_that_lacks_another_module_is_not_taken_for_missing(tmp_path: Path) -> None:
    answers = {"tensorrt": Answer(error="ModuleNotFoundError: No module named 'numpy'", missing="numpy")}
    assert "'numpy'" in libraries.tensorrt(patient(tmp_path, ORIN, answers)).found


def test_jetpacks_tensorrt_that_an_environment_hides_is_pointed_out(tmp_path: Path) -> None:
    place = f"usr/lib/python3.{sys.version_info.minor}/dist-packages/tensorrt/__init__.py"
    finding = libraries.tensorrt(patient(tmp_path, {**ORIN, place: ""}))
    assert str(finding.remedy).startswith("python3 -m venv --system-site-packages")


def install(folder: Path, *names: str) -> None:
    """Leave what pip leaves of a distribution."""
    for name in names:
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def test_tensorrt_from_pip_is_not_for_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    install(packages, "tensorrt_cu12_libs", "tensorrt-cu12-bindings")
    monkeypatch.syspath_prepend(packages)
    finding = libraries.tensorrt(patient(tmp_path / "orin", ORIN, GPU_ANSWERS))
    assert finding.status == "warn"
    assert "pip uninstall -y tensorrt-cu12-bindings tensorrt-cu12-libs tensorrt" in str(finding.remedy)
    assert libraries.tensorrt(patient(tmp_path / "desktop", DESKTOP, GPU_ANSWERS)).status == "ok"


def test_two_onnxruntimes_in_one_folder_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "onnxruntime", "onnxruntime_gpu")
    monkeypatch.syspath_prepend(tmp_path)
    finding = libraries.onnxruntime_packages(patient(tmp_path / "machine", DESKTOP))
    assert (finding.status, finding.found) == ("fail", "onnxruntime and onnxruntime-gpu, which overwrite each other")
    assert finding.remedy == "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'edge-asr[gpu]'"


def test_an_onnxruntime_that_hides_another_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        (tmp_path / name).mkdir()
        install(tmp_path / name, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "onnxruntime"), str(tmp_path / "onnxruntime-gpu")])
    assert libraries.onnxruntime_packages(patient(tmp_path / "machine", SERVER)).status == "warn"


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (Answer({"version": "1.32.0", "providers": ["CPUExecutionProvider"]}), "ok", "1.32.0 with CPU"),
        (Answer({"version": "1.19.2", "providers": []}), "fail", "older than 1.20"),
        (Answer(error="No module named 'onnxruntime'", missing="onnxruntime"), "fail", "edge-asr[cpu]"),
        (Answer(error="No module named 'numpy'", missing="numpy"), "fail", "numpy"),
        (Answer(error="loading it crashed with SIGILL"), "fail", "SIGILL"),
    ],
)
def test_onnxruntime_is_a_must_for_it_hears_the_speech(tmp_path: Path, answer: Answer, status: str, said: str) -> None:
    finding = libraries.onnxruntime(patient(tmp_path, SERVER, {"onnxruntime": answer}))
    assert finding.status == status
    assert said in f"{finding.found} {finding.remedy}"


def test_cuda_of_onnxruntime_is_asked_for_only_where_it_is_configured(tmp_path: Path) -> None:
    on: dict[str, Any] = {"cuda": {"enabled": True}}
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    answers = {"onnxruntime": Answer({"version": "1.32.0", "providers": both})}
    fell_back = Answer({"providers": both[1:], "complaint": "libcudnn.so.9: cannot open shared object file"})
    assert libraries.onnxruntime_cuda(patient(tmp_path, DESKTOP)).status == "ok"
    assert libraries.cuda_driver(patient(tmp_path, DESKTOP, target="onnx")).status == "ok"
    assert libraries.cuda_driver(patient(tmp_path, DESKTOP, target="onnx", **on)).status == "warn"
    assert "built without CUDA" in libraries.onnxruntime_cuda(patient(tmp_path, DESKTOP, **on)).found
    broken = libraries.onnxruntime_cuda(patient(tmp_path, DESKTOP, {**answers, "onnxruntime-cuda": fell_back}, **on))
    assert "libcudnn.so.9" in broken.found
    runs = {**answers, "onnxruntime-cuda": Answer({"providers": both})}
    assert libraries.onnxruntime_cuda(patient(tmp_path, DESKTOP, runs, **on)).status == "ok"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("OSError: libcuda.so.1: cannot open shared object file", "install NVIDIA's driver"),
        ("RuntimeError: cuInit: no CUDA-capable device is detected (100)", "see device_nodes"),
        ("RuntimeError: cuInit: system has unsupported display driver / cuda driver combination (803)", "reboot"),
        ("it hung: not loaded after 30 s", "reboot"),
    ],
)
def test_a_driver_that_does_not_answer_says_why(tmp_path: Path, error: str, remedy: str) -> None:
    finding = libraries.cuda_driver(patient(tmp_path, DESKTOP, {"cuda": Answer(error=error)}))
    assert finding.status == "warn"
    assert error in finding.found
    assert remedy in str(finding.remedy)


def test_a_gpu_that_is_not_there_is_not_taken_for_another(tmp_path: Path) -> None:
    assert libraries.cuda_driver(patient(tmp_path, DESKTOP, GPU_ANSWERS, gpu=1)).found == "no GPU 1: CUDA sees 1"


def test_libcudart_is_wanted_for_recorded_launches_only(tmp_path: Path) -> None:
    answers = {"cuda": Answer({"driver": "12.6", "runtime": None, "gpus": [ORIN_GPU]})}
    assert libraries.cuda_runtime(patient(tmp_path, ORIN, answers)).status == "ok"
    assert libraries.cuda_runtime(patient(tmp_path, ORIN, answers, tensorrt={"cuda_graphs": True})).status == "warn"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(error="No module named 'sounddevice'", missing="sounddevice"), "edge-asr[microphone]"),
        (Answer(error="OSError: PortAudio library not found"), "libportaudio2"),
        (Answer({"inputs": []}), "plug in a microphone"),
    ],
)
def test_a_microphone_that_is_not_there_is_a_warning(tmp_path: Path, answer: Answer, said: str) -> None:
    finding = libraries.microphone(patient(tmp_path, SERVER, {"sounddevice": answer}))
    assert finding.status == "warn"
    assert said in str(finding.remedy)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Answer(error="No module named 'sounddevice'", missing="sounddevice"), "fail"),
        (Answer(error="OSError: PortAudio library not found"), "fail"),
        (Answer({"inputs": []}), "warn"),
    ],
)
def test_a_configured_microphone_needs_its_library_but_may_be_plugged_in_later(
    tmp_path: Path, answer: Answer, status: str
) -> None:
    plain = patient(tmp_path, SERVER, {"sounddevice": answer})
    listening = plain.settings.model_copy(update={"sources": (MicrophoneSourceConfig(),)})
    assert libraries.microphone(dataclasses.replace(plain, config=listening)).status == status


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give a function that makes `import tensorrt` do what it is told."""

    def write(code: str) -> None:
        (tmp_path / "tensorrt.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)

    return write


def test_a_library_that_loads_answers_whatever_it_prints(library: Callable[[str], None]) -> None:
    library("print('hello'); __version__ = '10.3.0'")
    assert ask("tensorrt").facts["version"] == "10.3.0"


def test_a_library_that_crashes_is_an_answer(library: Callable[[str], None]) -> None:
    library("import ctypes, sys; print('bad driver', file=sys.stderr, flush=True); ctypes.string_at(0)")
    assert ask("tensorrt").error == "loading it crashed with SIGSEGV (bad driver)"


def test_a_library_that_hangs_is_an_answer(library: Callable[[str], None]) -> None:
    library("import time; time.sleep(600)")
    assert ask("tensorrt", limit_s=1).error == "it hung: not loaded after 1 s"


def test_a_library_that_ends_the_process_is_an_answer(library: Callable[[str], None]) -> None:
    library("import os; os._exit(7)")
    assert ask("tensorrt").error == "loading it ended the process with 7"


def test_a_library_that_lacks_another_is_not_taken_for_missing(library: Callable[[str], None]) -> None:
    library("import libnvinfer_of_nobody")
    answer = ask("tensorrt")
    assert answer.missing == "libnvinfer_of_nobody"
    assert "ModuleNotFoundError" in str(answer.error)


def test_a_crash_is_one_failed_line_of_a_report(library: Callable[[str], None], tmp_path: Path) -> None:
    library("import os; os.abort()")
    tree = Tree(lay_out(tmp_path / "orin", ORIN))
    report = examine(lambda: configured(engine=STRICT), tree)
    found = {result.name: result.finding for result in report.results}
    assert found["tensorrt"].status == "fail"
    assert found["tensorrt"].found == "cannot be loaded: loading it crashed with SIGABRT"
    assert [result.name for result in report.results] == [check.name for check in CHECKS]


def test_onnxruntime_of_this_machine_answers() -> None:
    import onnxruntime

    assert ask("onnxruntime").facts["version"] == onnxruntime.__version__
    assert "CPUExecutionProvider" in ask("onnxruntime-cuda").facts["providers"]
