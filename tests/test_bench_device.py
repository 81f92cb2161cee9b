"""bench.device: what it measures on the bundled model, and its sensors, floors and lists on made-up machines."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled import BUNDLE, engine_of
from plans import RELEASE, plan
from tensorrt_fakes import fake_tensorrt

from bench import device, device_check, device_measure, device_results, sensors
from bench.device_machine import describe
from bench.device_results import SCHEMA_FILE, Check, Latency, Memory, Result
from bench.floor import KNOWN, Dimensions, dimensions_of, find, floor_ms
from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer import onnx_network
from edge_asr.recognizer.bundle import FP32, INT8, read_bundle
from edge_asr.recognizer.manifest import read_manifest
from edge_asr.recognizer.paraformer import Decoded, Paraformer
from edge_asr.sensors import Reading
from edge_asr.tree import Tree

TINY = ["--quick", "--seconds", "0.3,0.9", "--batches", "1,2", "--runs", "2", "--idle", "0.01", "--threads", "1"]


def run(json_file: Path, *arguments: str) -> Result:
    device.main(["--model", str(BUNDLE), *TINY, "--json", str(json_file), *arguments])
    return device_results.read(json_file)


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in this process what would run in another: it is quicker."""

    def directly(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(device_measure, "in_child", directly)


# The command


def test_fp32_is_measured_at_each_length_and_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path / "r.json", "--engine", str(engine_of(FP32)), "--target", FP32)
    assert [(each.seconds, each.batch) for each in result.latency] == [(0.3, 1), (0.9, 1), (0.3, 2), (0.9, 2)]
    for each in result.latency:
        assert 0 < each.p50_ms <= each.p95_ms <= each.p99_ms
        assert (each.runs, each.floor_ms, each.cuda_graphs) == (2, None, None)
        assert {"features", "encoder", "decoder"} <= set(each.stages_ms)
    assert [pause.seconds for pause in result.after_idle] == [0.3]
    assert (result.engine.name, result.engine.build_s, result.engine.self_test) == (FP32, None, "none")
    assert result.check is None
    assert result.memory.total_mb is not None
    assert result.memory.total_mb > 10
    assert (result.model.name, result.quick) == (BUNDLE.name, True)
    out, err = capsys.readouterr()
    assert out.startswith("### ")
    assert "| 0.9 s | 2 |" in out
    assert "0.3 s x 2" in err


@pytest.mark.usefixtures("no_children")
def test_int8_is_held_against_fp32_and_runs_one_by_one(tmp_path: Path) -> None:
    result = run(tmp_path / "r.json", "--engine", str(engine_of(INT8)), "--target", INT8, "--idle", "0")
    assert {each.batch for each in result.latency} == {1}
    assert result.after_idle == []
    assert result.check is not None
    assert result.check.sounds > 8  # its own recordings among them
    assert 0.9 < result.check.same_tokens / result.check.tokens <= 1


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize(("target", "within"), [("onnx-cuda", 1e-4), ("onnx-cuda-fp16", 0.05)])
def test_cuda_is_measured_with_and_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, within: float
) -> None:
    monkeypatch.setattr(onnx_network, "CUDA_PROVIDER", onnx_network.CPU_PROVIDER)
    monkeypatch.setattr(onnx_network, "CUDA_DEVICE", "cpu")
    jetson = files(tmp_path / "root", {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "proc/meminfo": "MemTotal:        7620000 kB\nMemAvailable:    5000000 kB\n",
    })  # fmt: skip
    monkeypatch.setattr(device_measure, "Tree", lambda _: jetson)
    monkeypatch.setattr(sensors, "read_card", lambda _: {"memory.used": 100.0, "power.draw": 9.5})
    result = run(tmp_path / "r.json", "--engine", str(engine_of(FP32)), "--target", target)
    assert [(each.batch, each.cuda_graphs) for each in result.latency] == [
        *[(1, False)] * 2, *[(2, False)] * 2, *[(1, True)] * 2
    ]  # fmt: skip
    assert (result.engine.name, result.sensors.board_w, result.memory.gpu_mb) == (target, 9.5, 0.0)
    assert result.engine.megabytes == pytest.approx(
        4e-6 * result.model.weights / (2 if "fp16" in target else 1), rel=0.1
    )
    assert result.machine.known_as == "Jetson Orin Nano 8 GB"
    assert all(each.floor_ms is not None and each.floor_ms > 0 for each in result.latency)
    assert result.check is not None
    assert result.check.same_sounds == result.check.sounds
    assert result.check.largest_difference is not None
    assert result.check.largest_difference < within


@pytest.mark.usefixtures("no_children")
def test_tensorrt_is_measured_with_every_switch(tmp_path: Path) -> None:
    folder = plan()
    with fake_tensorrt(RELEASE):
        result = run(tmp_path / "r.json", "--engine", str(folder), "--target", "tensorrt-fp16", "--seconds", "0.9")
    switches = [(each.batch, each.cuda_graphs, each.mapped_memory) for each in result.latency]
    assert switches == [(1, False, False), (2, False, False), (1, True, False), (1, False, True), (1, True, True)]
    assert (result.engine.name, result.engine.self_test, result.left_out) == ("tensorrt-fp16", "passed", [])
    assert result.software["tensorrt"].startswith(RELEASE)
    assert result.check is not None
    assert result.check.same_tokens > 0.98 * result.check.tokens


@pytest.mark.usefixtures("no_children")
def test_an_engine_is_built_where_there_is_none_and_the_time_is_told(tmp_path: Path) -> None:
    options = ["--seconds", "0.3", "--idle", "0", "--runs", "1"]
    result = run(tmp_path / "r.json", "--engine", str(tmp_path / "engine"), "--target", FP32, *options)
    assert result.engine.build_s is not None
    assert result.engine.build_s > 0
    assert read_manifest(tmp_path / "engine") is not None


def test_without_a_model_it_says_so_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        device.main(["--model", str(tmp_path)])
    assert str(ended.value.code).startswith(f"bench.device: {tmp_path}")
    assert len(str(ended.value.code).splitlines()) == 1


def test_a_shape_that_an_engine_has_no_room_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recognize_batch = Paraformer.recognize_batch

    def small(self: Any, batch: Sequence[Any], padding: int = 0) -> Any:
        if len(batch) > 1:
            raise EngineError("/home/me/engine: no profile")
        return recognize_batch(self, batch, padding)

    monkeypatch.setattr(Paraformer, "recognize_batch", small)
    result = run(tmp_path / "r.json", "--engine", str(engine_of(FP32)), "--target", FP32)
    assert result.left_out == ["0.3 s x 2: engine: no profile", "0.9 s x 2: engine: no profile"]
    assert {each.batch for each in result.latency} == {1}


# The child


def test_what_a_child_returns_or_raises_arrives(tmp_path: Path) -> None:
    assert device_check.in_child(os.getpid) != os.getpid()
    with pytest.raises(BundleError, match="nothing"):
        device_check.in_child(read_bundle, tmp_path / "nothing")


def test_a_child_that_is_killed_is_said_so() -> None:
    with pytest.raises(EngineError, match="raise_signal ended with -9"):
        device_check.in_child(signal.raise_signal, signal.SIGKILL)


# Text against fp32


def heard(*ids: int, score: float = -0.1) -> Decoded:
    return Decoded(np.array(ids, np.int64), np.full(len(ids), score, np.float32), np.zeros(4, np.float32))


def test_tokens_and_sounds_that_are_the_same_are_counted() -> None:
    found = [heard(5, 6, 7, score=-0.3), heard(5, 9, 7), heard()]
    expected = [heard(5, 6, 7), heard(5, 6, 7), heard()]
    check = device_check.compare(found, expected)
    assert dataclasses.replace(check, largest_difference=None) == Check(3, 6, 5, 2, None)
    assert check.largest_difference == pytest.approx(0.2)


# Results


def test_the_schema_is_that_of_the_results() -> None:
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == device_results.schema(), (
        "python -m bench.device_results writes it"
    )


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"schema": "edge_asr.device/2"}, "schema"),
        ({"more": 1}, "more"),
        ({"latency": [{}]}, "latency.0.seconds"),
        ({"machine": None}, "machine"),
    ],
)
def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], place: str) -> None:
    path = tmp_path / "r.json"
    device_results.write(path, RESULT)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        device.main(["--list", str(path), "--out", str(tmp_path / "devices.md")])
    assert f"{path}: not a result of bench.device: {place}: " in str(ended.value.code)
    assert len(str(ended.value.code).splitlines()) == 1


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    device_results.write(tmp_path / "r.json", RESULT)
    assert device_results.read(tmp_path / "r.json") == RESULT


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2), (0.95, 4), (0.25, 1), (0.0, 1), (1.0, 4)])
def test_percentiles_are_times_that_were_measured(share: float, expected: float) -> None:
    assert device_results.percentile([4, 1, 3, 2], share) == expected


@pytest.mark.parametrize(
    ("memory", "total"),
    [
        (Memory(500, 900, 300), 1400),
        (Memory(500, None, 1300), 1300),  # a Jetson: the GPU's share is not the process's
        (Memory(500, None, 100), 500),
        (Memory(None, None, None), None),
    ],
)
def test_memory_counts_the_gpu(memory: Memory, total: float | None) -> None:
    assert memory.total_mb == total


# The list


RESULT = Result(
    schema="edge_asr.device/1", date="2026-11-22", command="python -m bench.device", quick=False, load_average=0.1,
    machine=device_results.Machine("NVIDIA Jetson Orin Nano Developer Kit", "Jetson Orin Nano 8 GB", "aarch64", 6, 7800,
                                   "# R36 (release), REVISION: 4.3", "MAXN", ["schedutil"], "5.15.148-tegra"),
    software={"python": "3.10.12"}, model=device_results.Model("paraformer-large", 215_000_000),
    engine=device_results.Engine("tensorrt-fp16", "tensorrt-fp16", 0, True, 300.0, 1.5, 440.0, "passed"),
    check=Check(10, 100, 99, 9, 0.012),
    latency=[Latency(2.0, 1, False, False, 100, 9, 21.0, 22.0, 23.0, {"encoder": 15.0}, 6.4),
             Latency(2.0, 4, False, False, 100, 9, 51.0, 52.0, 53.0, {"encoder": 15.0}, 9.4),
             Latency(2.0, 1, True, False, 100, 9, 11.0, 12.0, 13.0, {"encoder": 8.0}, 6.4)],
    after_idle=[device_results.AfterIdle(1.0, 60.0, 80.0, 30.0)], memory=Memory(700, None, 1400),
    sensors=device_results.Sensors(True, {"gpu-thermal": 71.5}, {"VDD_IN": 9.25}, 9.25, 4.5, 625.0), left_out=["x: y"],
    note="made up",
)  # fmt: skip


def test_results_become_a_list_in_their_section_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = dataclasses.replace(
        RESULT,
        machine=dataclasses.replace(RESULT.machine, name="Another | board", known_as=None, l4t=None),
        check=None, latency=[], after_idle=[], memory=Memory(None, None, None), left_out=[],
        sensors=device_results.Sensors(None, {}, {}, None, None, None),
    )  # fmt: skip
    out = tmp_path / "devices.md"
    out.write_text("# Devices\n\nBy hand.\n\n<!-- begin devices -->\nold\n<!-- end devices -->\n\nBelow.\n", "utf-8")
    paths = [tmp_path / "1.json", tmp_path / "2.json"]
    for path, result in zip(paths, (RESULT, bare), strict=True):
        device_results.write(path, result)
    device.main(["--list", *map(str, paths), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# Devices\n\nBy hand.\n")
    assert text.endswith("Below.\n")
    assert "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| Jetson"))
    assert row == (
        "| Jetson Orin Nano 8 GB (throttled) | paraformer-large | tensorrt-fp16 | – | 21.0 | – | – | –"
        " | 80.0 (1 s, idle 60 s) | 1400 MB | 9.2 W"
        " | 99 of 100 tokens in 10 sounds, log-probabilities within 0.012 | 2026-11-22 |"
    )
    assert (
        r"| Another \| board | paraformer-large | tensorrt-fp16 | – | – | – | – | – | – | – | – | it is fp32 |" in text
    )
    assert "| 2 s | 1 | on | off | 100 | 9 | 11.00 | 12.00 | 13.00 | 6.40 | encoder 8.0 |" in text
    assert "* Left out: x: y" in text
    assert "VDD_IN 9.25 W; in pauses 4.5 W" in text
    for block in text.split("\n\n"):
        assert len({line.replace(r"\|", "").count("|") for line in block.splitlines() if line[:1] == "|"}) <= 1, block


# Floors


LARGE = Dimensions(512, 158_428_672, 50, 48_433_152, 8_388_608, 16)


def test_operations_are_counted_by_hand() -> None:
    dimensions = Dimensions(
        width=4, encoder_weights=100, encoder_attentions=2, decoder_weights=10, decoder_frame_weights=20,
        decoder_attentions=3,
    )  # fmt: skip
    # 5 frames, 2 tokens: 5 * 120 + 2 * 10 products with weights; 2 * 2 * 25 * 4 in the encoder's attention, 7 * 10 * 4
    # in the decoder's and for the embeddings. Each is a multiplication and an addition.
    assert dimensions.operations(5, 2) == 2 * (620 + 400 + 280)
    assert dimensions.operations(5, 2, batch=3) == 3 * dimensions.operations(5, 2)


@pytest.mark.parametrize(
    ("name", "ms"), [("Jetson AGX Xavier", 3.2), ("Jetson AGX Orin 64 GB", 2.1), ("Jetson Orin Nano 8 GB", 6.3)]
)
def test_a_short_command_is_bound_by_the_weights(name: str, ms: float) -> None:
    known = next(each for each in KNOWN if each.name == name)
    assert floor_ms(known, "tensorrt-fp16", LARGE, 17, 4, 1) == pytest.approx(ms, abs=0.06)
    assert floor_ms(known, "onnx-cuda", LARGE, 17, 4, 1) == pytest.approx(2 * ms, abs=0.12)


def test_a_long_one_is_bound_by_arithmetic() -> None:
    known = next(each for each in KNOWN if each.name == "Jetson AGX Xavier")
    expected = LARGE.operations(500, 120) / 11e12 * 1e3
    assert floor_ms(known, "tensorrt-fp16", LARGE, 500, 120, 1) == pytest.approx(expected)
    assert floor_ms(known, "tensorrt-fp16", LARGE, 500, 120, 8) == pytest.approx(8 * expected)


def test_dimensions_are_those_of_the_networks() -> None:
    folder = engine_of(FP32)
    manifest = read_manifest(folder)
    assert manifest is not None
    found = dimensions_of(folder / manifest.encoder, folder / manifest.decoder)
    width, blocks, decoders = found.width, found.encoder_attentions, found.decoder_attentions
    assert (width, blocks, decoders) == (176, 6, 2)
    assert found.decoder_frame_weights == decoders * width * 2 * width
    stored = manifest.files
    weights = sum(record.size for name, record in stored.items() if name.endswith(".data")) / 4
    assert found.weights == pytest.approx(weights, rel=0.05)


@pytest.mark.parametrize(
    ("name", "memory_gb", "known"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", 65.0, "Jetson AGX Orin 64 GB"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 32.0, "Jetson AGX Orin 32 GB"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 16.4, "Jetson Orin NX 16 GB"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7.9, "Jetson Orin Nano Super 8 GB"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit", 7.9, "Jetson Orin Nano 8 GB"),
        ("Jetson-AGX", 33.0, "Jetson AGX Xavier"),
        ("NVIDIA Jetson Xavier NX Developer Kit", 8.0, "Jetson Xavier NX"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 131.0, "Jetson Thor T5000"),
        ("NVIDIA GeForce RTX 3090", 64.0, "GeForce RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", 64.0, None),
        ("NVIDIA H200", 128.0, "H200"),
        ("AMD EPYC", 64.0, None),
    ],
)
def test_devices_are_known_by_name_and_memory(name: str, memory_gb: float, known: str | None) -> None:
    found = find(name, memory_gb)
    assert (found.name if found else None) == known


def test_every_device_says_where_its_limits_are_from() -> None:
    assert all(each.source and each.fp16_tflops > 0 and each.bandwidth_gb_s > 0 for each in KNOWN)


# Sensors


def files(root: Path, contents: dict[str, str]) -> Tree:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return Tree(root)


ZONE, RAIL = "sys/class/thermal/thermal_zone", "sys/bus/i2c/devices/1-0040/hwmon/hwmon3"
GPU = "sys/class/devfreq/17000000.gpu"
JETSON = {
    f"{ZONE}0/type": "cpu-thermal", f"{ZONE}0/temp": "51500",
    f"{ZONE}1/type": "gpu-thermal", f"{ZONE}1/temp": "48000",
    f"{ZONE}1/trip_point_0_type": "passive", f"{ZONE}1/trip_point_0_temp": "99000",
    f"{ZONE}2/type": "cv0-thermal",  # switched off: no reading
    f"{ZONE}3/type": "PMIC-Die", f"{ZONE}3/temp": "100000",
    f"{RAIL}/in1_label": "VDD_IN", f"{RAIL}/in1_input": "5000", f"{RAIL}/curr1_input": "1840",
    f"{RAIL}/in2_label": "VDD_CPU_GPU_CV", f"{RAIL}/in2_input": "4900", f"{RAIL}/curr2_input": "500",
    f"{RAIL}/in7_label": "sum of shunt voltages", f"{RAIL}/in7_input": "900", f"{RAIL}/curr4_input": "2340",
    f"{GPU}/cur_freq": "306000000", f"{GPU}/device/load": "998",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000",
    "sys/class/hwmon/hwmon5/oc1_event_cnt": "2", "sys/class/hwmon/hwmon5/oc3_event_cnt": "1",
    "proc/meminfo": "MemTotal:        7620000 kB\nMemFree:          100000 kB\nMemAvailable:    5000000 kB\n",
}  # fmt: skip


def test_a_jetson_tells_temperatures_power_clocks_and_memory(tmp_path: Path) -> None:
    assert sensors.read(files(tmp_path, JETSON)) == Reading(
        temperatures_c={"cpu-thermal": 51.5, "gpu-thermal": 48.0},
        power_w={"VDD_IN": 9.2, "VDD_CPU_GPU_CV": 2.45},
        gpu_mhz=306.0,
        gpu_load=0.998,
        available_mb=5120.0,
        slowed=False,
        overcurrents=3,
    )


def test_what_there_is_no_sensor_for_is_absent_and_not_zero(tmp_path: Path) -> None:
    assert sensors.read(Tree(tmp_path)) == Reading()
    assert sensors.summarise([sensors.read(Tree(tmp_path))]) == sensors.Summary()


def test_a_zone_at_its_trip_point_means_throttled(tmp_path: Path) -> None:
    hot = sensors.read(files(tmp_path, {**JETSON, f"{ZONE}1/temp": "99000"}))
    assert hot.slowed is True
    cool = dataclasses.replace(hot, slowed=False)
    assert sensors.summarise([cool, hot, cool]).throttled is True
    assert sensors.summarise([cool, cool]).throttled is False


def test_a_trip_point_that_is_not_set_means_nothing(tmp_path: Path) -> None:
    assert sensors.read(files(tmp_path, {**JETSON, f"{ZONE}1/trip_point_0_temp": "0"})).slowed is None


def test_too_much_current_meanwhile_means_throttled() -> None:
    before, after = Reading(overcurrents=3), Reading(overcurrents=4)
    assert sensors.summarise([before, after]).throttled is True
    assert sensors.summarise([before, before]).throttled is False


def test_means_and_extremes_skip_what_was_not_read() -> None:
    first = Reading({"cpu": 40.0}, {"VDD_IN": 4.0}, gpu_mhz=300.0, gpu_used_mb=100.0, available_mb=900.0)
    second = Reading({"cpu": 50.0, "gpu": 45.0}, {}, gpu_mhz=600.0, available_mb=800.0)
    third = Reading({}, {"VDD_IN": 8.0, "VDD_SOC": 1.0})
    found = sensors.summarise([first, second, third])
    assert found.highest_c == {"cpu": 50.0, "gpu": 45.0}
    assert found.mean_w == {"VDD_IN": 6.0, "VDD_SOC": 1.0}
    assert (found.board_w, found.highest_gpu_mhz, found.gpu_used_mb) == (6.0, 600.0, 100.0)
    assert (found.least_available_mb, found.throttled) == (800.0, None)


@pytest.mark.parametrize(
    ("reasons", "slowed"), [("0x0000000000000000", False), ("0x0000000000000001", False), ("0x0000000000000048", True)]
)
def test_a_graphics_card_is_asked_through_nvidia_smi(tmp_path: Path, reasons: str, slowed: bool) -> None:
    card = sensors.parse_card(f"1234, 65, 170.52, 1695, {reasons}\n")
    reading = sensors.read(Tree(tmp_path), card)
    assert reading == Reading({"gpu card": 65.0}, {"gpu": 170.52}, gpu_mhz=1695.0, gpu_used_mb=1234.0, slowed=slowed)
    assert sensors.summarise([reading]).board_w == 170.52


def test_what_a_card_does_not_tell_is_absent() -> None:
    assert sensors.parse_card("[N/A], 51, [Not Supported], [N/A], [N/A]\n") == {"temperature.gpu": 51.0}
    assert sensors.parse_card("") == {}


def test_without_nvidia_smi_there_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sensors.read_card() == {}
    assert sensors.card_name() is None


def test_nvidia_smi_is_asked_for_that_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *=name*) echo "NVIDIA L4";; *--id=1*) echo "7, 40, 9.5, 210, 0x1";; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert sensors.card_name(1) == "NVIDIA L4"
    assert sensors.read_card(1)["memory.used"] == 7.0


def test_a_sampler_reads_at_both_ends(tmp_path: Path) -> None:
    tree = files(tmp_path, JETSON)
    with sensors.Sampler(tree) as sampler:
        files(tmp_path, {f"{ZONE}0/temp": "61500"})
    assert sampler.summary.highest_c["cpu-thermal"] == 61.5


def test_a_machine_is_described_by_its_own_files(tmp_path: Path) -> None:
    tree = files(tmp_path, {
        **JETSON,
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081\n# KERNEL_VARIANT: oot\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n",
        "var/lib/nvpmodel/status": "pmode:0001",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    })  # fmt: skip
    machine = describe(tree)
    assert (machine.name, machine.known_as) == ("NVIDIA Jetson Orin Nano Developer Kit", "Jetson Orin Nano 8 GB")
    assert (machine.l4t, machine.power_mode) == ("# R36 (release), REVISION: 4.3, GCID: 38968081", "7W")
    assert (machine.governors, machine.memory_mb) == (["schedutil"], 7803.0)
