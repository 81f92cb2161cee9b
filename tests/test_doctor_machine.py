"""What the doctor says of a board: release, device nodes, clocks, heat, memory and time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from bundled import bundle_of
from machines import (
    ORIN,
    STRICT,
    lay_out,
    patient,
    release,
)

from edge_asr.doctor import machine
from edge_asr.recognizer.bundle import FP32
from edge_asr.tree import Tree


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


@pytest.mark.parametrize(("state", "kept"), [(0, True), (1, True), (5, False), (-1, None)])
def test_the_kernels_word_on_its_clock_is_understood(
    monkeypatch: pytest.MonkeyPatch, state: int, kept: bool | None
) -> None:
    library = SimpleNamespace(adjtimex=lambda query: state)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert machine.kernel_clock() is kept


def test_this_kernel_answers() -> None:
    assert machine.kernel_clock() in (True, False, None)
