"""Care for the device: what it tells of itself, that a strain spares partials and nothing else, and that it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import ORIN, XAVIER
from prometheus_client import generate_latest

from edge_asr import metrics, sensors
from edge_asr.device import CALM_S, SHOWN_EVERY_S, DeviceCare
from edge_asr.tree import Tree

COOLING = "sys/class/thermal/cooling_device"
RAIL = "sys/bus/i2c/devices/1-0040/hwmon/hwmon3"
DEVICES = {
    f"{COOLING}0/type": "cpufreq-cpu0", f"{COOLING}0/cur_state": "0",
    f"{COOLING}1/type": "pwm-fan", f"{COOLING}1/cur_state": "2",
    f"{COOLING}2/type": "cpu-throttle-alert", f"{COOLING}2/cur_state": "0",
    f"{RAIL}/in1_label": "VDD_IN", f"{RAIL}/in1_input": "5000", f"{RAIL}/curr1_input": "1840",
    "sys/class/hwmon/hwmon5/oc1_event_cnt": "2",
    "proc/pressure/memory": "some avg10=1.20 avg60=0.50\nfull avg10=0.40 avg60=0.10 avg300=0.00 total=1\n",
}  # fmt: skip
"""What the tests' Orin lacks; its fan turns."""


class Device:
    """A machine of files, looked at by a clock that the test moves."""

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self._root = root
        self.now = 1000.0
        self.write(files)
        self.care = DeviceCare(Tree(root), lambda: self.now)

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            (self._root / name).parent.mkdir(parents=True, exist_ok=True)
            (self._root / name).write_text(text)

    def look(self) -> DeviceCare:
        self.care.look()
        return self.care


@pytest.fixture(autouse=True)
def no_metrics_left() -> Iterator[None]:
    yield
    metrics.DEVICE.families = ()


def exposed() -> dict[str, float]:
    """Return what Prometheus would read of the device."""
    wanted = ("temperature", "power_", "gpu_", "memory_", "throttled", "strained")
    lines = [line for line in generate_latest().decode().splitlines() if line.startswith("edge_asr_")]
    found = dict(line.rsplit(" ", 1) for line in lines)
    return {name: float(value) for name, value in found.items() if name.removeprefix("edge_asr_").startswith(wanted)}


def test_an_orin_tells_how_it_is(tmp_path: Path) -> None:
    device = Device(tmp_path, {**ORIN, **DEVICES})
    assert device.look().describe() == {
        "temperature_c": 49,
        "zone": "cpu-thermal",
        "throttled": False,
        "power_mode": "MAXN_SUPER",
        "power_w": {"VDD_IN": 9.2},
        "memory_available_mb": 5100.0,
        "memory_pressure": 0.004,
    }
    assert device.care.strain == ""
    assert exposed() == {
        'edge_asr_temperature_celsius{zone="cpu-thermal"}': 48.531,
        'edge_asr_temperature_celsius{zone="gpu-thermal"}': 47.187,
        'edge_asr_power_watts{rail="VDD_IN"}': 9.2,
        'edge_asr_power_mode{mode="MAXN_SUPER"}': 1.0,
        "edge_asr_gpu_frequency_hertz": 306e6,
        "edge_asr_memory_available_bytes": pytest.approx(4983112 * 1024),
        "edge_asr_memory_pressure_ratio": 0.004,
        "edge_asr_throttled": 0.0,
        "edge_asr_strained": 0.0,
    }


def test_a_xavier_on_jetpack_5_tells_less(tmp_path: Path) -> None:
    described = Device(tmp_path, dict(XAVIER)).look().describe()
    assert described is not None
    assert (described["zone"], described["power_mode"], described["throttled"]) == ("CPU-therm", "MODE_30W_ALL", False)
    assert "power_w" not in described


def test_what_there_is_no_sensor_for_is_absent_and_not_zero(tmp_path: Path) -> None:
    device = Device(tmp_path, {})
    assert device.look().describe() is None
    assert device.care.strain == ""
    assert exposed() == {"edge_asr_strained": 0.0}


@pytest.mark.parametrize("text", ["", "garbage", "-", "99999999999999999999", "1\n2"])
def test_a_sensor_that_says_nothing_sensible_is_absent(tmp_path: Path, text: str) -> None:
    names = [name for name in {**ORIN, **DEVICES} if name.startswith(("sys/", "proc/"))]
    Device(tmp_path, dict.fromkeys(names, text))
    reading = sensors.read(Tree(tmp_path))
    assert (reading.temperatures_c, reading.power_w, reading.gpu_mhz, reading.pressure) == ({}, {}, None, None)
    assert (reading.slowed, reading.overcurrents) == (None, None)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({f"{COOLING}2/cur_state": "1"}, "the device is slowed down (cpu-throttle-alert; cpu-thermal has 49 °C)"),
        ({f"{COOLING}0/cur_state": "12"}, "the device is slowed down (cpufreq-cpu0; cpu-thermal has 49 °C)"),
        (
            {"sys/class/hwmon/hwmon5/oc1_event_cnt": "3"},
            "the device is slowed down (it takes more current than it may)",
        ),
        ({"proc/pressure/memory": "full avg10=25.00 avg60=0\n"}, "memory is short (nothing got on for 25% of the last"),
    ],
)
def test_a_strain_is_told_and_ends_after_a_while(tmp_path: Path, files: dict[str, str], why: str) -> None:
    device = Device(tmp_path, {**ORIN, **DEVICES})
    before = {name: {**ORIN, **DEVICES}[name] for name in files}
    assert device.look().strain == ""
    device.write(files)
    assert device.look().strain.startswith(why)
    assert exposed()["edge_asr_strained"] == 1.0
    device.write(before)
    device.now += CALM_S - 1
    assert device.look().strain.startswith(why)
    device.now += 1
    assert device.look().strain == ""
    assert exposed()["edge_asr_strained"] == 0.0


def test_without_cooling_devices_a_zone_at_its_trip_point_is_a_strain(tmp_path: Path) -> None:
    device = Device(tmp_path, dict(ORIN))
    assert device.look().strain == ""
    device.write({"sys/class/thermal/thermal_zone0/temp": "99500\n"})
    assert device.look().strain == "the device is slowed down (cpu-thermal; cpu-thermal has 100 °C)"


def test_the_state_does_not_change_with_every_degree(tmp_path: Path) -> None:
    device = Device(tmp_path, {**ORIN, **DEVICES})
    before = device.look().describe()
    device.write({"sys/class/thermal/thermal_zone0/temp": "60000\n"})
    device.now += SHOWN_EVERY_S - 1
    assert device.look().describe() == before
    device.now += 1
    described = device.look().describe()
    assert described is not None
    assert described["temperature_c"] == 60
