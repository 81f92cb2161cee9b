"""The service on a real systemd: installed, disturbed, upgraded and removed, in this order, on one machine.

Runs with scripts/test-systemd only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from appliance import CONFIGURATION, STATE, TREE, UNIT, Appliance, appliance
from bundled import transcripts

pytestmark = [pytest.mark.systemd, pytest.mark.skipif(not TREE.is_dir(), reason="made by scripts/test-systemd")]

WATCHDOG_S = 30.0
SAMPLES = transcripts()
FIRST, SECOND, THIRD = list(SAMPLES)[:3]
STUCK = """\
import pathlib, threading
import edge_asr.recognizer.onnx_network as module
run = module.OnnxNetwork.run
def stuck(self, inputs):
    if pathlib.Path("/run/stuck").exists():
        threading.Event().wait()
    return run(self, inputs)
module.OnnxNetwork.run = stuck
"""
"""A fault from outside: an inference that never ends, and cannot be interrupted."""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with appliance(tmp_path_factory.mktemp("appliance")) as machine:
        machine.listen()
        yield machine


@pytest.fixture(autouse=True)
def stop_at_the_first_failure(request: pytest.FixtureRequest) -> None:
    """Each test begins where the one before it ended."""
    if request.session.testsfailed:
        pytest.skip("a test before it failed")


def test_it_installs_and_becomes_ready(machine: Appliance) -> None:
    machine.install("--mqtt", "localhost:1883", "--room", "客厅")
    assert machine.active
    assert re.match("ready|degraded: .*silence", machine.show("StatusText"))
    assert machine.run("systemctl", "is-enabled", UNIT).stdout.strip() == "enabled"
    assert "paraformer-tiny" in machine.journal()


def test_systemd_finds_nothing_wrong_with_the_units(machine: Appliance) -> None:
    units = [f"/etc/systemd/system/{unit.name}" for unit in (machine.root / "etc/systemd/system").glob("edge-asr*")]
    assert len(units) == 3
    verdict = machine.run("systemd-analyze", "verify", *units)
    assert verdict.stdout + verdict.stderr == ""


@pytest.mark.parametrize("unit", ["edge-asr.service", "edge-asr-engine.service", "edge-asr-seed.service"])
def test_the_units_leave_little_open(machine: Appliance, unit: str) -> None:
    verdict = machine.run("systemd-analyze", "security", "--offline=yes", f"/etc/systemd/system/{unit}", check=False)
    found = re.search(r"Overall exposure level .*: (\d+\.\d)", verdict.stdout)
    assert found, verdict.stdout
    assert float(found[1]) <= 2.5


ASK = """\
import sys, urllib.request
with open(sys.argv[1], "rb") as file:
    request = urllib.request.Request("http://127.0.0.1:8080/recognize", file.read(), {"Content-Type": "audio/wav"})
print(urllib.request.urlopen(request).read().decode())
"""


def test_what_is_asked_is_answered(machine: Appliance) -> None:
    """The children that decode uploads set their limits in the sandbox."""
    answer = machine.run("python3", "-c", ASK, f"/media/stick/samples/{FIRST}").stdout
    assert json.loads(answer)["text"] == SAMPLES[FIRST]


def test_what_is_said_is_published(machine: Appliance) -> None:
    machine.until(machine.state, "the state")
    assert machine.say(FIRST) == SAMPLES[FIRST]


def test_installing_again_changes_nothing(machine: Appliance) -> None:
    before = machine.show("MainPID")
    printed = machine.install("--room", "厨房").stderr
    assert "runs already" in printed
    assert "stays as it is; change --room there" in printed
    assert machine.show("MainPID") == before


def test_a_killed_service_is_started_again(machine: Appliance) -> None:
    restarts = machine.restarts
    machine.run("systemctl", "kill", "--signal=KILL", UNIT)
    machine.until(lambda: machine.restarts == restarts + 1 and machine.active, "the restart")
    assert machine.say(SECOND) == SAMPLES[SECOND]


def test_muted_it_runs_on(machine: Appliance) -> None:
    before, since = machine.show("MainPID"), machine.show("WatchdogTimestampMonotonic")
    machine.command("mute", "ON")
    machine.until(lambda: machine.state().get("mute") and not machine.recording(), "mute")
    machine.until(
        lambda: int(machine.show("WatchdogTimestampMonotonic")) > int(since) + 2e6 * WATCHDOG_S,
        "two periods of the watchdog",
        patience_s=4 * WATCHDOG_S,
    )
    assert machine.show("MainPID") == before
    machine.command("mute", "OFF")
    machine.until(lambda: machine.state().get("mute") is False, "the end of mute")
    assert machine.say(THIRD) == SAMPLES[THIRD]


def test_it_reloads(machine: Appliance) -> None:
    before, since = machine.show("MainPID"), machine.now()
    machine.run("systemctl", "reload", UNIT)
    machine.until(lambda: "answers from now on" in machine.journal(since), "the reload")
    machine.until(lambda: machine.active, "the end of the reload")
    assert machine.show("MainPID") == before
    assert machine.say(FIRST) == SAMPLES[FIRST]


def test_a_wrong_configuration_fails_once_and_says_why(machine: Appliance) -> None:
    machine.configure(lambda text: text + "segmant: {}\n")
    since = machine.now()
    assert machine.run("systemctl", "restart", UNIT, check=False).returncode != 0
    machine.until(lambda: machine.show("ActiveState") == "failed", "the failure")
    assert (machine.show("ExecMainStatus"), machine.restarts) == ("2", 0)
    assert "segmant" in machine.journal(since, "err")
    assert machine.run("systemctl", "list-jobs").stdout.startswith("No jobs")
    machine.configure(lambda text: text.replace("segmant: {}\n", ""))
    machine.run("systemctl", "restart", UNIT)


def test_a_stuck_inference_is_ended_by_the_watchdog(machine: Appliance) -> None:
    (machine.root / "etc/faults").mkdir()
    (machine.root / "etc/faults/sitecustomize.py").write_text(STUCK)
    drop_in = machine.root / f"etc/systemd/system/{UNIT}.d/fault.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nEnvironment=PYTHONPATH=/etc/faults\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", UNIT)
    assert machine.say(FIRST) == SAMPLES[FIRST]
    restarts, since = machine.restarts, machine.now()
    machine.run("touch", "/run/stuck")
    machine.until(machine.recording, "the microphone")
    machine.play(FIRST)
    machine.until(lambda: machine.restarts == restarts + 1, "the watchdog", patience_s=4 * WATCHDOG_S)
    machine.run("rm", "/run/stuck")
    assert "Watchdog timeout" in machine.journal(since)
    drop_in.unlink()
    drop_in.parent.rmdir()
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", UNIT)
    assert machine.say(SECOND) == SAMPLES[SECOND]


def spoken(machine: Appliance) -> list[str]:
    """Return the files that hold what was said, as the model that came with the stick does of itself."""
    command = ["grep", "-rlaF", *(f"-e{text}" for text in SAMPLES.values())]
    command += ["/etc", "/home", "/root", "/tmp", "/var", "/run/log"]
    found = machine.run(*command, check=False).stdout.split()
    return [name for name in found if not name.startswith(f"/{STATE}/installed/")]


def test_what_was_said_is_in_the_outbox_only_until_it_is_told_to_forget(machine: Appliance) -> None:
    for text in SAMPLES.values():
        assert text not in machine.run("journalctl", "--no-pager", "--output", "verbose").stdout
    assert {name.rpartition("/")[2].partition("-")[0] for name in spoken(machine)} == {"outbox.sqlite3"}
    machine.run("edge-asr", "forget", "--config", "/etc/edge_asr/config.yaml")
    assert spoken(machine) == []
    assert machine.run("find", f"/{STATE}", "-user", "root", "-not", "-path", "*/installed*").stdout == ""


def test_it_is_there_again_after_a_reboot_and_takes_a_seed_over(machine: Appliance) -> None:
    seed = machine.root / "boot/edge_asr.yaml"
    seed.write_text("room: 书房\nmqtt: {username: box, password: open-sesame}\n", encoding="utf-8")
    machine.reboot()
    machine.heard.clear()
    machine.listen()
    machine.until(lambda: machine.active, "the service")
    machine.until(lambda: machine.state().get("engine"), "the engine")
    assert machine.say(THIRD) == SAMPLES[THIRD]
    assert not seed.exists()
    configuration = (machine.root / CONFIGURATION).read_text(encoding="utf-8")
    assert "书房" in configuration
    assert "open-sesame" not in configuration + machine.run("journalctl", "--no-pager", "--output", "verbose").stdout
    assert (machine.root / "etc/edge_asr/credentials/mqtt_password").read_text() == "open-sesame\n"


def test_an_upgrade_keeps_what_it_knows(machine: Appliance) -> None:
    configuration = (machine.root / CONFIGURATION).read_text()
    engines = sorted((machine.root / STATE / "engines").rglob("manifest.json"))
    built = [file.stat().st_mtime_ns for file in engines]
    last = [body["seq"] for topic, body in machine.heard if topic.endswith("/transcript")][-1]
    printed = machine.install(stick="newer").stderr
    assert re.search(r"77\.1-\w+ is ready; before it ran ", printed)
    machine.until(lambda: machine.state().get("version") == "77.1", "the new version")
    assert machine.say(FIRST) == SAMPLES[FIRST]
    assert (machine.root / CONFIGURATION).read_text() == configuration
    assert built
    assert [file.stat().st_mtime_ns for file in engines] == built
    assert [body["seq"] for topic, body in machine.heard if topic.endswith("/transcript")][-1] == last + 1


def test_a_release_that_does_not_start_is_rolled_back(machine: Appliance) -> None:
    failed = machine.install(stick="broken", check=False)
    assert failed.returncode == 1
    assert "RuntimeError: broken" in failed.stderr
    assert re.search(r"rolled back: 77\.1-\w+ runs again", failed.stderr)
    assert machine.active
    machine.until(lambda: machine.state().get("version") == "77.1", "the version before")
    assert machine.say(SECOND) == SAMPLES[SECOND]
    releases = [folder.name.partition("-")[0] for folder in (machine.root / "opt/edge_asr/releases").iterdir()]
    assert "77.2" not in releases


def test_uninstalling_leaves_nothing_but_data(machine: Appliance) -> None:
    machine.run("/media/stick/current/scripts/uninstall")
    left = machine.run(
        "find", "/etc", "/opt", "/usr", "/var", "/run", "-xdev", "-iname", "*edge?asr*", "-not", "-path", "*/proc/*"
    ).stdout.split()
    assert sorted(left) == ["/etc/edge_asr", "/var/lib/edge_asr"]
    assert machine.run("systemctl", "is-active", UNIT, check=False).stdout.strip() == "inactive"
    assert "edge-asr" not in machine.run("systemctl", "list-unit-files").stdout
    assert Path(machine.root / CONFIGURATION).is_file()
    assert (machine.root / STATE / "outbox.sqlite3").is_file()


def test_purging_leaves_nothing(machine: Appliance) -> None:
    machine.install("--mqtt", "localhost:1883")
    machine.run("/media/stick/current/scripts/uninstall", "--purge")
    left = machine.run("find", "/etc", "/opt", "/usr", "/var", "/run", "-xdev", "-iname", "*edge?asr*").stdout.split()
    assert left == []
    assert "edge-asr" not in (machine.root / "etc/passwd").read_text()
