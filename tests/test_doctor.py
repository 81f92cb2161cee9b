"""What the doctor says of machines laid out as files, of broken libraries, and of the real machine."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from bundled import BUNDLE, bundle_of, engine_of
from machines import (
    DESKTOP,
    GPU_ANSWERS,
    ORIN,
    ORIN_GPU,
    PLAIN_ANSWERS,
    SERVER,
    THOR,
    XAVIER,
    lay_out,
    release,
)
from mosquitto import Mosquitto, Subscriber, free_port

from edge_asr.config import Config
from edge_asr.config_reader import load_config
from edge_asr.doctor import libraries, machine, service
from edge_asr.doctor.children import Answer, ask
from edge_asr.doctor.examination import CHECKS, Check, examine
from edge_asr.doctor.patient import Patient
from edge_asr.doctor.report import Finding, Report, ok
from edge_asr.doctor.tree import Tree
from edge_asr.errors import ConfigError
from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import FP32
from edge_asr.recognizer.manifest import FILE

STRICT: Mapping[str, Any] = {"target": "tensorrt-fp16", "strict": True}
MACHINES = {"orin": ORIN, "xavier": XAVIER, "thor": THOR, "desktop": DESKTOP, "server": SERVER}


def configured(**sections: Any) -> Config:
    return Config.model_validate({"model": BUNDLE, "mqtt": {"enabled": False}, **sections})


def patient(
    root: Path,
    files: Mapping[str, str],
    answers: Mapping[str, Answer] = PLAIN_ANSWERS,
    usable: Callable[[Path], bool] = lambda path: True,
    **engine: Any,
) -> Patient:
    return Patient(Tree(lay_out(root, files), usable), configured(engine=engine), "", answers)


def examined(
    root: Path, files: Mapping[str, str], answers: Mapping[str, Answer], **sections: Any
) -> tuple[Report, dict[str, Finding]]:
    tree = Tree(lay_out(root, files), lambda path: True)
    report = examine(lambda: configured(**sections), tree, lambda subject: answers[subject])
    return report, {result.name: result.finding for result in report.results}


# Whole machines


def test_an_orin_in_order_has_nothing_to_be_done_but_to_build_its_engine(tmp_path: Path) -> None:
    report, found = examined(tmp_path, ORIN, GPU_ANSWERS)
    assert {name for name, finding in found.items() if finding.status != "ok"} == {"tensorrt_engine"}
    assert (report.verdict, report.exit_code) == ("warn", 0)
    assert found["l4t"].found == "L4T 36.4.7 (JetPack 6.1 or later), TensorRT 10.3"
    assert found["cuda_driver"].found == "driver for CUDA 12.6; Orin (sm_87, 7,803 MB)"
    assert found["power_mode"].found.startswith("MAXN_SUPER (mode 2); there are 0 15W, 1 25W, 2 MAXN_SUPER;")
    assert found["gpu_clock"].found == "17000000.gpu: 306 MHz now, 1020 MHz at most, governor nvhost_podgov"
    assert found["cpu_clock"].found == "6 of 6 cores on, 1984 MHz at most, governor schedutil"
    assert found["temperatures"].found == "at most 48.5 °C (cpu-thermal)"
    assert found["memory"].found.startswith("5,103 MB free, 3,901 MB of swap; onnx-fp32 needs about ")
    assert found["microphone"].found == "1: ReSpeaker 4 Mic Array"
    assert "edge-asr build-engine" in str(found["tensorrt_engine"].remedy)


def test_a_xavier_reads_its_own_names_and_its_constant_sensor_is_no_heat(tmp_path: Path) -> None:
    _, found = examined(tmp_path, XAVIER, PLAIN_ANSWERS)
    assert found["l4t"] == ok("L4T 35.4.1 (JetPack 5.1), TensorRT 8.5")
    assert found["power_mode"].found.startswith("MODE_30W_ALL (mode 3, as configured)")
    assert found["gpu_clock"].found.startswith("17000000.gv11b: 115 MHz now")
    assert found["cpu_clock"].found.startswith("6 of 8 cores on")
    assert found["temperatures"] == ok("at most 34.0 °C (CPU-therm)")
    assert found["tensorrt"].status == "warn"
    assert "JetPack's is for python3.8, this is python3." in str(found["tensorrt"].remedy)


def test_a_thor_has_nodes_of_both_kinds_and_two_clocks(tmp_path: Path) -> None:
    _, found = examined(tmp_path, THOR, GPU_ANSWERS)
    assert found["l4t"] == ok("L4T 38.4.0 (JetPack 7.0 or 7.1), TensorRT 10.13")
    assert found["device_nodes"].found.endswith("/dev/nvidia0, /dev/nvidiactl, /dev/nvmap")
    assert "gpu-gpc-0: 1575 MHz now" in found["gpu_clock"].found
    assert "gpu-nvd-0: 0 MHz now" in found["gpu_clock"].found
    assert found["power_mode"] == ok("not known: nvpmodel's files are not here")


@pytest.mark.parametrize(("target", "expected"), [("auto", "warn"), ("tensorrt-fp16", "warn"), ("onnx", "ok")])
def test_a_desktop_with_a_gpu_lacks_tensorrt_only_where_the_target_wants_it(
    tmp_path: Path, target: str, expected: str
) -> None:
    report, found = examined(tmp_path, DESKTOP, PLAIN_ANSWERS, engine={"target": target})
    assert {found[name].status for name in ("tensorrt", "pycuda", "cuda_driver")} == {expected}
    assert found["l4t"] == ok("not a Jetson")
    assert found["cpu_clock"].status == "ok"  # powersave is the normal mode of intel_pstate
    assert report.exit_code == 0


def test_without_a_gpu_nothing_is_said_against_auto(tmp_path: Path, state_folder: Path) -> None:
    report, found = examined(tmp_path, SERVER, PLAIN_ANSWERS, state_dir=state_folder)
    assert {name for name, finding in found.items() if finding.status != "ok"} == {"sound_nodes", "microphone"}
    assert found["tensorrt_engine"] == ok("not needed here")
    assert report.exit_code == 0


def test_a_strict_target_that_cannot_run_fails_with_3(tmp_path: Path) -> None:
    report, found = examined(tmp_path, SERVER, PLAIN_ANSWERS, engine=STRICT)
    assert {found[name].status for name in ("tensorrt", "pycuda", "cuda_driver", "device_nodes")} == {"fail"}
    assert found["engine"].status == "ok"  # nothing stands in for a strict target
    assert (report.verdict, report.exit_code) == ("fail", 3)


@pytest.mark.parametrize("files", MACHINES.values(), ids=list(MACHINES))
@pytest.mark.parametrize("garbage", ["", "\0\udcff", "-1", "99999999999999999999", "# R (release), REVISION: x"])
def test_damaged_files_break_no_check(tmp_path: Path, files: Mapping[str, str], garbage: str) -> None:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(garbage.encode(errors="surrogateescape"))
    report = examine(configured, Tree(tmp_path), GPU_ANSWERS.__getitem__)
    assert not [result for result in report.results if "broke" in result.finding.found]


@pytest.mark.parametrize("files", MACHINES.values(), ids=list(MACHINES))
def test_unreadable_files_break_no_check_and_give_no_figures(tmp_path: Path, files: Mapping[str, str]) -> None:
    for name in files:
        (tmp_path / name).mkdir(parents=True)  # a folder cannot be read as a file
    report = examine(configured, Tree(tmp_path), GPU_ANSWERS.__getitem__)
    found = {result.name: result.finding.found for result in report.results}
    assert not [text for text in found.values() if "broke" in text]
    assert found["temperatures"] == "no sensors"
    assert " MHz" not in found["gpu_clock"] + found["cpu_clock"]


# The board


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        (release(35, "4.1"), "ok", "TensorRT 8.5"),
        (release(35, "1.0"), "warn", "update to JetPack 5.1"),
        (release(32, "7.1"), "warn", "update to JetPack 5.1"),
        (release(36, "3.0"), "warn", "update to JetPack 6.1"),
        (release(36, "4"), "ok", "L4T 36.4 "),
        (release(36, "5.0"), "ok", "TensorRT 10.3"),
        (release(37, "1.0"), "warn", "nobody has tried"),
        (release(38, "2.0"), "ok", "TensorRT 10.13"),
        (release(39, "1.0"), "warn", "nobody has tried"),
        (release(39, "2.1"), "ok", "10.16 or 11.4"),
        (release(40, "0.0"), "warn", "nobody has tried"),
        ("Ubuntu", "warn", "nvidia-l4t-core"),
    ],
)
def test_the_release_decides_what_is_supported(tmp_path: Path, text: str, status: str, said: str) -> None:
    finding = machine.release(patient(tmp_path, {"etc/nv_tegra_release": text}))
    assert finding.status == status
    assert said in f"{finding.found} {finding.remedy}"
    assert (finding.remedy is None) == (status == "ok")


def test_an_unsupported_release_fails_where_tensorrt_is_a_must_and_is_all_right_where_it_is_not(tmp_path: Path) -> None:
    files = {"etc/nv_tegra_release": release(36, "3.0")}
    assert machine.release(patient(tmp_path, files, **STRICT)).status == "fail"
    assert machine.release(patient(tmp_path, files, target="onnx")).status == "ok"


@pytest.mark.parametrize(
    "files", [{"dev/nvmap": ""}, {"proc/device-tree/compatible": "nvidia,p3767-0005\0nvidia,tegra234"}]
)
def test_a_container_on_a_jetson_is_told_to_mount_the_release(tmp_path: Path, files: Mapping[str, str]) -> None:
    finding = machine.release(patient(tmp_path, {**files, ".dockerenv": ""}))
    assert finding.status == "warn"
    assert "-v /etc/nv_tegra_release:/etc/nv_tegra_release:ro" in str(finding.remedy)


def of_the_gpu(path: Path) -> bool:
    return not path.as_posix().partition("/dev/")[2].startswith("nv")


def test_nodes_that_may_not_be_used_name_the_groups_that_may(tmp_path: Path) -> None:
    finding = machine.device_nodes(patient(tmp_path, ORIN, usable=of_the_gpu))
    group = Tree(tmp_path).groups(["dev/nvmap"])[0]
    assert finding.status == "warn"
    nodes = "/dev/nvgpu/igpu0/channel, /dev/nvgpu/igpu0/ctrl, /dev/nvhost-ctrl-gpu, /dev/nvmap"
    assert finding.found == f"no access to {nodes}"
    assert f"sudo usermod -aG {group} $USER" in str(finding.remedy)


def test_nodes_for_debuggers_only_are_nobodys_loss(tmp_path: Path) -> None:
    def usable(path: Path) -> bool:
        return "prof" not in path.name

    assert machine.device_nodes(patient(tmp_path, ORIN, usable=usable)).status == "ok"


def test_a_group_that_has_no_name_in_a_container_is_given_by_number(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {**ORIN, ".dockerenv": ""})
    if os.getuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(root / "dev/nvmap", 0, 54_321)
    finding = machine.device_nodes(patient(tmp_path, {}, usable=lambda path: path.name != "nvmap"))
    assert finding.remedy == "start the container with --group-add 54321"


def test_nodes_that_are_not_there_want_the_runtime_in_a_container(tmp_path: Path) -> None:
    files = {"etc/nv_tegra_release": release(36, "4.7"), "run/.containerenv": ""}
    assert "--runtime nvidia" in str(machine.device_nodes(patient(tmp_path, files)).remedy)


def test_a_microphones_node_wants_its_group(tmp_path: Path) -> None:
    finding = machine.sound_nodes(patient(tmp_path, ORIN, usable=lambda path: False))
    assert (finding.status, finding.found) == ("warn", "no access to /dev/snd/pcmC0D0c")
    assert "usermod -aG" in str(finding.remedy)


def test_a_zone_beyond_its_limit_is_a_warning(tmp_path: Path) -> None:
    finding = machine.temperatures(patient(tmp_path, {**ORIN, "sys/class/thermal/thermal_zone1/temp": "99500\n"}))
    assert finding.status == "warn"
    assert finding.found == "gpu-thermal 99.5 °C, slowed down from 99 on"


def test_powersave_is_a_warning_where_it_means_the_lowest_clock(tmp_path: Path) -> None:
    slow = {"sys/devices/system/cpu/cpu3/cpufreq/scaling_governor": "powersave\n"}
    finding = machine.cpu_clock(patient(tmp_path, {**ORIN, **slow}))
    assert finding.status == "warn"
    assert "governor powersave, schedutil" in finding.found


def meminfo(total: int, available: int, swap: int) -> str:
    return f"MemTotal: {total} kB\nMemAvailable: {available} kB\nSwapTotal: {swap} kB\nSwapFree: {swap} kB\n"


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        (meminfo(8_000_000, 4_000_000, 0), "ok", "4,096 MB free"),
        (meminfo(8_000_000, 10_000, 0), "warn", "end other programs"),
        (meminfo(8_000, 8_000, 0), "fail", "smaller model"),
        (meminfo(8_000, 8_000, 80_000), "warn", "82 MB of swap"),
        ("MemTotal: 5 kB\n", "warn", "/proc/meminfo"),
    ],
)
def test_memory_is_held_against_what_the_model_takes(tmp_path: Path, text: str, status: str, said: str) -> None:
    finding = machine.memory(patient(tmp_path, {"proc/meminfo": text}))
    assert finding.status == status
    assert said in f"{finding.found} {finding.remedy}"


def test_memory_is_held_against_the_build_where_tensorrt_is_wanted(tmp_path: Path) -> None:
    files = {"proc/meminfo": meminfo(8_000_000, 30_000, 0)}
    assert machine.memory(patient(tmp_path, files)).status == "ok"
    finding = machine.memory(patient(tmp_path, files, target="tensorrt-fp16"))
    assert finding.status == "warn"
    assert "building for tensorrt-fp16 about" in finding.found


def test_the_precision_that_is_not_published_is_estimated(tmp_path: Path) -> None:
    whole = patient(tmp_path, {}).weights_bytes(FP32)
    only_fp32 = patient(tmp_path, {})
    only_fp32.__dict__["bundle"] = bundle_of(FP32)
    assert only_fp32.weights_bytes("onnx-int8") == whole // 4
    only_int8 = patient(tmp_path, {})
    only_int8.__dict__["bundle"] = bundle_of("onnx-int8")
    assert only_int8.weights_bytes(FP32) == 4 * only_int8.weights_bytes("onnx-int8")


@pytest.mark.parametrize(("kernel", "status"), [(True, "ok"), (False, "warn"), (None, "ok")])
def test_a_clock_that_nobody_keeps_is_a_warning(tmp_path: Path, kernel: bool | None, status: str) -> None:
    assert machine.wall_clock(patient(tmp_path, {}), lambda: kernel).status == status


def test_the_kernel_can_be_asked_for_its_clock() -> None:
    assert machine.kernel_clock() in (True, False, None)


# Libraries


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


# Probes, each in a real process


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


# The appliance's own


def test_a_check_that_breaks_fails_and_the_others_go_on(tmp_path: Path) -> None:
    def breaks(patient: Patient) -> Finding:
        raise RuntimeError("unforeseen")

    checks = (Check("first", breaks), Check("second", lambda patient: ok("fine")))
    report = examine(configured, Tree(tmp_path), PLAIN_ANSWERS.__getitem__, checks)
    assert [result.finding.status for result in report.results] == ["fail", "ok"]
    assert report.results[0].finding.found == "the check itself broke: RuntimeError: unforeseen"
    assert report.exit_code == 1


def test_a_wrong_configuration_fails_with_2_and_the_machine_is_looked_at_all_the_same(tmp_path: Path) -> None:
    def read() -> Config:
        raise ConfigError("config.yaml:3: mqtt.hots: unknown key\nconfig.yaml:4: drain_s: should be a number")

    report = examine(read, Tree(lay_out(tmp_path, ORIN)), GPU_ANSWERS.__getitem__)
    found = {result.name: result.finding for result in report.results}
    assert report.exit_code == 2
    assert len(found["configuration"].found.splitlines()) == 2
    assert found["bundle"].found == "not looked at: configuration comes first"
    assert found["l4t"].status == "ok"


def test_a_model_that_is_not_there_fails_with_3_and_is_named_once(tmp_path: Path) -> None:
    report, found = examined(tmp_path, SERVER, PLAIN_ANSWERS, model=tmp_path / "nowhere")
    assert report.exit_code == 3
    assert found["bundle"].status == "fail"
    assert "set `model`" in str(found["bundle"].remedy)
    for name in ("engine", "memory", "disk"):
        assert (found[name].status, found[name].found) == ("warn", "not looked at: bundle comes first")


def test_an_engine_is_not_looked_at_where_onnxruntime_crashes(tmp_path: Path) -> None:
    answers = {**PLAIN_ANSWERS, "onnxruntime": Answer(error="loading it crashed with SIGILL")}
    _, found = examined(tmp_path, SERVER, answers)
    assert found["engine"].found == "not looked at: onnxruntime comes first"


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """Give a copy of the bundled model's engine."""
    return Path(shutil.copytree(engine_of(FP32), tmp_path / "engine"))


def look_at(folder: Path, root: Path, **engine: Any) -> Finding:
    return service.engine(patient(root, SERVER, dir=folder, **engine))


def test_an_engine_that_fits_is_all_right(built: Path, tmp_path: Path) -> None:
    assert look_at(built, tmp_path / "machine") == ok(f"{built}, undamaged")


def test_a_flipped_byte_of_an_engine_is_found(built: Path, tmp_path: Path) -> None:
    path = next(built.glob("encoder-*.data"))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    finding = look_at(built, tmp_path / "machine")
    assert (finding.status, finding.found) == ("fail", f"{path}: damaged")
    assert str(finding.remedy).startswith(f"edge-asr build-engine --model {BUNDLE}")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": null}'])
def test_a_damaged_manifest_is_found(built: Path, tmp_path: Path, text: str) -> None:
    (built / FILE).write_text(text)
    finding = look_at(built, tmp_path / "machine")
    assert finding.status == "fail"
    assert FILE in finding.found


def change(folder: Path, **keys: Any) -> None:
    path = folder / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"schema": "edge_asr.engine/1"}, "another version of edge_asr (edge_asr.engine/1)"),
        ({"machine": "abacus"}, "it was built for abacus"),
        ({"versions": {"onnxruntime": "1.0"}}, "it was measured with onnxruntime 1.0"),
    ],
)
def test_a_stale_engine_is_built_again_unless_it_was_named(
    tmp_path: Path, built: Path, keys: Mapping[str, Any], why: str
) -> None:
    change(built, **keys)
    assert look_at(built, tmp_path / "machine").status == "fail"
    config = configured(state_dir=tmp_path / "state")
    place = engine_folder(bundle_of(FP32), config.state_dir)
    shutil.copytree(built, place)
    finding = service.engine(Patient(Tree(tmp_path), config, "", PLAIN_ANSWERS))
    assert finding.status == "warn"
    assert why in finding.found
    assert "built at the first start" in finding.found


def test_an_engine_that_is_not_there_yet_is_built_at_the_first_start(tmp_path: Path) -> None:
    _, found = examined(tmp_path, SERVER, PLAIN_ANSWERS, state_dir=tmp_path / "state")
    assert found["engine"].status == "warn"
    assert found["engine"].found == "there is none yet; it is built at the first start"


PLAN = {
    "tensorrt": "10.3.0", "cuda": "12.6", "gpu": "Orin", "sm": "8.7", "l4t": release(36, "4.7").splitlines()[0],
    "typing": "strong", "softmax_fp16": False, "scale": 1, "profiles": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({}, None),
        ({"tensorrt": "10.13.3"}, "it was built for TensorRT 10.13.3, this is 10.3.0"),
        ({"sm": "7.2"}, "it was built for compute capability 7.2, this is 8.7"),
        ({"l4t": "# R35 (release)"}, "it was built for L4T # R35 (release), this is # R36"),
        ({"softmax_fp16": True}, "it was built for softmax_fp16 True, this is False"),
    ],
)
def test_a_plan_is_held_against_the_machine(
    tmp_path: Path, built: Path, keys: Mapping[str, Any], why: str | None
) -> None:
    change(built, engine="tensorrt-fp16", plan={**PLAN, **keys})
    config = configured(state_dir=tmp_path / "state")
    shutil.copytree(built, engine_folder(bundle_of(FP32), config.state_dir, "tensorrt-fp16"))
    orin = Patient(Tree(lay_out(tmp_path / "orin", ORIN)), config, "", GPU_ANSWERS)
    finding = service.tensorrt_engine(orin)
    assert finding.status == ("ok" if why is None else "warn")
    assert (why or "undamaged") in finding.found
    blind = dataclasses.replace(orin, answers={**GPU_ANSWERS, "tensorrt": Answer(error="it hung")})
    report = examine(lambda: config, blind.tree, blind.answers.__getitem__)
    found = {result.name: result.finding.found for result in report.results}
    assert found["tensorrt_engine"] == "not looked at: tensorrt comes first"


def test_a_file_in_the_place_of_the_state_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report, found = examined(tmp_path / "machine", SERVER, PLAIN_ANSWERS, state_dir=tmp_path / "file" / "state")
    assert found["state_dir"].found == f"{tmp_path / 'file'} is no folder"
    assert report.exit_code == 1


def test_a_state_folder_is_made_by_nobody_who_only_looks(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    _, found = examined(tmp_path / "machine", SERVER, PLAIN_ANSWERS, state_dir=folder)
    assert found["state_dir"] == ok(f"{folder}, to be made in {tmp_path}")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
    finding = service.disk(patient(tmp_path, SERVER))
    assert finding.status == "warn"
    assert finding.found.startswith("1 MB free in ")


# The broker


def visit(port: int, **account: Any) -> Finding:
    config = configured(mqtt={"port": port, **account})
    return service.broker(Patient(Tree(), config, "", {}))


@pytest.fixture
def guarded(tmp_path: Path, mosquitto_installed: None) -> Iterator[Mosquitto]:
    """Yield a Mosquitto that admits one account only."""
    server = Mosquitto(tmp_path, username="hall", password="open-sesame")
    server.start()
    yield server
    server.kill()


def test_a_broker_admits_its_account_and_nothing_is_published(guarded: Mosquitto) -> None:
    with Subscriber(guarded.port, username="hall", password="open-sesame") as subscriber:
        finding = visit(guarded.port, username="hall", password="open-sesame")
        assert finding == ok(f"127.0.0.1:{guarded.port} admits us as hall")
        command = ["mosquitto_pub", "-p", str(guarded.port), "-u", "hall", "-P", "open-sesame", "-t", "end", "-n"]
        subprocess.run(command, check=True, timeout=30)
        subscriber.wait_for(lambda seen: seen.messages, "the end")
        assert [message.topic for message in subscriber.messages] == ["end"]


@pytest.mark.parametrize("account", [{"username": "hall", "password": "0pen-sesame"}, {}])
def test_a_wrong_account_is_told_from_a_broker_that_is_away(guarded: Mosquitto, account: Mapping[str, str]) -> None:
    finding = visit(guarded.port, **account)
    assert finding.status == "fail"
    assert finding.found.endswith(": it refused: not authorized")
    assert "mqtt.username" in str(finding.remedy)


def test_a_closed_port_is_told() -> None:
    finding = visit(free_port())
    assert finding.status == "fail"
    assert finding.found.endswith("without an account: nobody listens there")


def test_a_name_that_nobody_knows_is_told() -> None:
    finding = service.unreachable(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    assert finding.found == "its name cannot be resolved"


def test_what_listens_and_is_no_broker_is_told() -> None:
    def hang_up(listener: socket.socket) -> None:
        with listener, listener.accept()[0] as visitor:
            visitor.recv(4096)

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=hang_up, args=(listener,), daemon=True)
    thread.start()
    finding = visit(listener.getsockname()[1])
    thread.join(30)
    assert finding.found.endswith("it accepts connections but hangs up")


@pytest.mark.slow
def test_a_broker_that_hangs_is_given_up(broker: Mosquitto) -> None:
    broker.freeze()
    assert visit(broker.port).found.endswith("it accepts connections but does not answer")


# The command


def run(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_asr", "doctor", *options]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120)


def test_the_command_prints_one_object_with_stable_keys(guarded: Mosquitto) -> None:
    options = [f"mqtt.port={guarded.port}", "mqtt.username=hall", "mqtt.password=open-sesame", "engine.target=onnx"]
    result = run("--json", *(part for option in options for part in ("-o", option)))
    report = json.loads(result.stdout)
    assert list(report) == ["schema", "version", "verdict", "exit_code", "checks"]
    assert report["schema"] == "edge_asr.doctor/1"
    assert [check["name"] for check in report["checks"]] == [check.name for check in CHECKS]
    for check in report["checks"]:
        assert list(check) == ["name", "status", "found", "remedy"]
        assert (check["remedy"] is None) == (check["status"] == "ok")
        assert check["found"]
    assert report["verdict"] in ("ok", "warn")
    assert (result.returncode, report["exit_code"], result.stderr) == (0, 0, "")
    assert "open-sesame" not in result.stdout


def test_the_command_says_what_is_wrong_with_the_broker_and_never_the_password(guarded: Mosquitto) -> None:
    options = [f"mqtt.port={guarded.port}", "mqtt.username=hall", "mqtt.password=wrong-word"]
    result = run(*(part for option in options for part in ("-o", option)))
    assert result.returncode == 1
    assert "it refused: not authorized\n" in result.stdout
    assert "wrong-word" not in result.stdout + result.stderr
    assert "\x1b" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("This machine is not ready: 1 check failed, ")


def test_the_command_reports_a_wrong_configuration_in_its_lines() -> None:
    result = run("--json", "-o", "mqtt.hots=x", "-o", "drain_s=no")
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert (result.returncode, result.stderr) == (2, "")
    assert "did you mean 'mqtt.host'?" in checks["configuration"]["found"]
    assert checks["broker"]["found"] == "not looked at: configuration comes first"


def test_the_command_is_coloured_on_a_terminal_only() -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "FORCE_COLOR"):
        environ.pop(name, None)
    command = [sys.executable, "-m", "edge_asr", "doctor", "-o", "mqtt.enabled=false"]
    with subprocess.Popen(command, stdout=theirs, stdin=subprocess.DEVNULL, env=environ) as child:
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 65536):
                shown += block
        except OSError:  # the last one who wrote has gone
            pass
        assert child.wait(60) == 0
    os.close(ours)
    assert b"\x1b[32mok" in shown


def test_help_documents_the_exit_codes() -> None:
    assert "2 if the configuration is wrong" in " ".join(run("--help").stdout.split())


def test_the_configuration_is_read_as_by_every_command(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("device_id: hall\nmqtt: {enabled: false}\n")
    report = examine(lambda: load_config(path), Tree(lay_out(tmp_path, SERVER)), PLAIN_ANSWERS.__getitem__)
    assert report.results[0].finding == ok("device_id hall, engine.target auto")
