"""What the doctor says of whole machines laid out as files, and of the real one."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from machines import (
    DESKTOP,
    GPU_ANSWERS,
    MACHINES,
    ORIN,
    PLAIN_ANSWERS,
    SERVER,
    STRICT,
    THOR,
    XAVIER,
    configured,
    examined,
    lay_out,
    run_doctor,
)

from edge_asr.config_reader import load_config
from edge_asr.doctor.examination import examine
from edge_asr.doctor.report import Report, Result, fail, ok, warn
from edge_asr.tree import Tree


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


def test_the_command_reports_a_wrong_configuration_in_its_lines() -> None:
    result = run_doctor("--json", "-o", "mqtt.hots=x", "-o", "drain_s=no")
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


@pytest.mark.parametrize(
    ("failed", "exit_code"), [((), 0), ((1,), 1), ((1, 3), 3), ((3, 1, 2), 2), ((2,), 2), ((3,), 3)]
)
def test_the_exit_code_is_that_of_the_first_cause(failed: tuple[int, ...], exit_code: int) -> None:
    results = [Result("broken", fail("it", "mend it"), code) for code in failed]
    report = Report([*results, Result("middling", warn("it", "mend it"), 2), Result("fine", ok("it"), 3)])
    assert report.exit_code == exit_code
    assert report.verdict == ("fail" if failed else "warn")


def test_help_documents_the_exit_codes() -> None:
    assert "2 if the configuration is wrong" in " ".join(run_doctor("--help").stdout.split())


def test_the_configuration_is_read_as_by_every_command(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("device_id: hall\nmqtt: {enabled: false}\n")
    report = examine(lambda: load_config(path), Tree(lay_out(tmp_path, SERVER)), PLAIN_ANSWERS.__getitem__)
    assert report.results[0].finding == ok("device_id hall, engine.target auto")
