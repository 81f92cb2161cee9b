"""`edge-asr devices`, as a process, on made-up devices."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 60.0
USB = {"name": "USB Mic: Audio (hw:1,0)", "max_input_channels": 1, "default_samplerate": 44_100.0}
PULSE = {"name": "pulse", "max_input_channels": 32, "default_samplerate": 48_000.0}

Plug = Callable[..., None]


@pytest.fixture(autouse=True)
def two_devices(plug: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug(USB, PULSE, value=16_384)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edge_asr", "devices", *arguments]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def devices(*arguments: str) -> tuple[int, str, str]:
    with start(*arguments) as process:
        output, errors = process.communicate(timeout=LIMIT_S)
    return process.returncode, output, errors


def test_devices_are_listed_with_what_the_configuration_wants() -> None:
    code, output, errors = devices()
    assert (code, errors) == (0, "")
    assert [line.split() for line in output.splitlines()[:3]] == [
        ["name", "host", "API", "channels", "rate", "stable", "name"],
        ["*", "USB", "Mic:", "Audio", "ALSA", "1", "44100", "Hz"],
        ["pulse", "ALSA", "32", "48000", "Hz"],
    ]


def test_only_devices_of_the_name_given_are_listed_and_one_that_is_not_there_is_an_error() -> None:
    named = [json.loads(line)["name"] for line in devices("PUL", "--json")[1].splitlines()]
    assert named == ["pulse"]
    both = [json.loads(line)["name"] for line in devices("u", "--json")[1].splitlines()]
    assert both == ["USB Mic: Audio", "pulse"]
    code, output, errors = devices("nothing")
    assert (code, output) == (2, "")
    assert errors.startswith("edge-asr: microphone nothing: not found; there is 'USB Mic: Audio'")


def on_a_terminal(columns: int, *arguments: str) -> str:
    """Return what a terminal of so many columns shows."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    command = [sys.executable, "-m", "edge_asr", "devices", *arguments]
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        output = b""
        with contextlib.suppress(OSError):  # so a terminal ends
            while data := os.read(ours, 4096):
                output += data
    os.close(ours)
    assert process.returncode == 0
    return output.decode().replace("\r\n", "\n")


def test_names_stay_whole_however_narrow_a_terminal_is() -> None:
    shown = on_a_terminal(40, "-o", "sources=[{kind: microphone, device: usb, name: hall}]")
    assert shown.splitlines()[:5] == [
        "* USB Mic: Audio", "  ALSA, 1 channel, 44100 Hz", "  source hall", "pulse", "  ALSA, 32 channels, 48000 Hz",
    ]  # fmt: skip
    assert [line.split() for line in on_a_terminal(100).splitlines()[1:3]] == [
        ["*", "USB", "Mic:", "Audio", "ALSA", "1", "44100", "Hz"],
        ["pulse", "ALSA", "32", "48000", "Hz"],
    ]


def test_names_stay_whole_in_a_pipe_that_claims_to_be_narrow(plug: Plug) -> None:
    name = "A microphone with a very long name: " + 10 * "USB Audio "
    plug({**USB, "name": f"{name}(hw:1,0)"})
    assert name.strip() in devices()[1]


def test_the_meter_fits_into_a_narrow_terminal() -> None:
    shown = on_a_terminal(40, "usb", "--meter", "--seconds", "1.5")
    bars = [line for line in re.split(r"[\r\n]|\x1b\[2K", re.sub(r"\x1b\[[0-9;?]*[mhl]", "", shown)) if "peak" in line]
    assert "██████████  peak   -6.0  rms   -6.0 dBFS" in bars
    assert max(map(len, bars)) <= 40


def test_devices_are_listed_as_json() -> None:
    code, output, _ = devices("--json")
    found: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert code == 0
    assert found[0] == {
        "name": "USB Mic: Audio", "host_api": "ALSA", "channels": 1, "rate": 44_100, "stable_id": None, "paths": [],
        "is_default": True, "sources": [],
    }  # fmt: skip
    assert [device["name"] for device in found] == ["USB Mic: Audio", "pulse"]


def test_devices_that_are_configured_are_marked_with_their_source() -> None:
    configured = "sources=[{kind: microphone, device: usb, name: hall}, {kind: microphone, device: gone}]"
    code, output, errors = devices("-o", configured)
    assert (code, errors) == (0, "")
    assert [line.split()[-1] for line in output.splitlines()[:3]] == ["source", "hall", "Hz"]
    assert output.splitlines()[-1].startswith("microphone gone: not found; there is 'USB Mic: Audio', 'pulse'")
    _, lines, _ = devices("--json", "-o", configured)
    assert [json.loads(line)["sources"] for line in lines.splitlines()] == [["hall"], []]


def test_the_meter_listens_to_the_configured_microphone() -> None:
    configured = ("-o", "sources=[{kind: microphone, device: gone}]")
    for asked, state in (((), "waiting"), (("usb",), "capturing")):
        code, output, _ = devices(*asked, "--meter", "--json", "--seconds", "1.5", *configured)
        assert (code, json.loads(output.splitlines()[-1])["state"]) == (0, state)


def test_without_devices_the_remedy_is_to_plug_one_in(plug: Plug) -> None:
    plug()
    assert devices() == (0, "no input device; plug one in\n", "")


def test_the_meter_shows_how_loud_it_is() -> None:
    code, output, errors = devices("usb", "--meter", "--json", "--seconds", "1.5")
    levels: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert (code, errors) == (0, "")
    assert {"state": "capturing", "why": "", "peak_dbfs": -6.0, "rms_dbfs": -6.0} in [
        {**level, "rms_dbfs": round(level["rms_dbfs"])} for level in levels
    ]


def test_the_meter_draws_a_bar() -> None:
    code, output, _ = devices("usb", "--meter", "--seconds", "1.5")
    assert code == 0
    assert "█" * 30 in output
    assert "peak   -6.0" in output


def test_the_meter_ends_at_an_interrupt() -> None:
    with start("usb", "--meter", "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["state"] in ("waiting", "capturing")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (130, "")


def test_the_meter_of_a_device_that_is_not_there_says_so_and_waits() -> None:
    code, output, errors = devices("Røde", "--meter", "--json", "--seconds", "1.5")
    last = json.loads(output.splitlines()[-1])
    assert (code, errors) == (0, "")
    assert last["state"] == "waiting"
    assert last["why"].startswith("microphone Røde: not found; there is 'USB Mic: Audio', 'pulse'")
    _, drawn, _ = devices("Røde", "--meter", "--seconds", "1.5")
    assert drawn.startswith("microphone:Røde; Ctrl-C ends\nmicrophone Røde: not found")
    assert drawn.endswith("\n")
    assert "peak" not in drawn


def test_without_sounddevice_there_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "fake/sounddevice.py").unlink()
    (tmp_path / "fake/sounddevice.py").write_text("raise ModuleNotFoundError('sounddevice')")
    line = "sounddevice is not installed; pip install 'edge-asr[microphone]'\n"
    assert devices() == (2, "", f"edge-asr: {line}")
    assert devices("--meter", "--json")[::2] == (2, f"edge-asr: microphone:default: {line}")
