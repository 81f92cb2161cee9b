"""The seed file: taken over from the boot partition, or refused where a person at another PC reads why."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundled import BUNDLE

from edge_asr import seed as seed_module
from edge_asr.cli_seed import RESULT, take_seed
from edge_asr.config_mqtt import CREDENTIALS
from edge_asr.config_reader import load_config
from edge_asr.errors import ConfigError, EdgeAsrError

OLD = f"# by hand\nmodel: {BUNDLE}\nsources: [{{kind: microphone}}]\nmqtt: {{host: 10.0.0.1, port: 1884}}\n"


class Disk:
    """The folders of an appliance that matter here."""

    def __init__(self, root: Path) -> None:
        self.boot, self.etc, self.models = root / "boot", root / "etc" / "edge_asr", root / "models"
        for folder in (self.boot, self.etc, self.models):
            folder.mkdir(parents=True)
        self.configuration = self.etc / "config.yaml"
        self.configuration.write_text(OLD)
        self.before = self.etc / "config.yaml.before"
        self.password = self.etc / "credentials" / "mqtt_password"
        self.seed = self.boot / "edge_asr.yaml"

    def take(self, text: str | bytes) -> None:
        self.seed.write_bytes(text.encode() if isinstance(text, str) else text)
        take_seed([self.boot / "efi", self.boot], self.etc, self.models)

    def told(self) -> str:
        return (self.boot / RESULT).read_text(encoding="utf-8")

    def config(self) -> dict[str, Any]:
        data = yaml.safe_load(self.configuration.read_text(encoding="utf-8"))
        assert isinstance(data, dict)
        return data


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_the_seed_names_is_changed_and_the_rest_stays(disk: Disk) -> None:
    disk.take("room: 客厅\r\nmqtt:\r\n  host: 10.0.0.2\r\ndevice_id: kitchen\r\n")
    config = load_config(disk.configuration, environ={})
    assert (config.mqtt.host, config.mqtt.port) == ("10.0.0.2", 1884)
    assert (config.home_assistant.area, config.device_id, config.model) == ("客厅", "kitchen", BUNDLE)
    assert mode(disk.configuration) == 0o644
    assert disk.before.read_text() == OLD
    assert not disk.seed.exists()
    assert "taken over" in disk.told()


def test_the_short_forms_are_written_out(disk: Disk) -> None:
    (disk.models / "mine").symlink_to(BUNDLE)
    disk.take("mqtt: nas.local:8884\nmodel: mine\n")
    assert disk.config()["mqtt"] == {"host": "nas.local", "port": 8884}
    assert disk.config()["model"] == str(disk.models / "mine")


def test_a_password_goes_where_only_root_reads_it(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.configuration.write_text(f"{OLD[:-2]}, password_file: /dev/null, username: other}}\n")
    disk.take("mqtt: {username: speech, password: geheim}\n")
    assert mode(disk.password) == 0o600
    assert mode(disk.password.parent) == 0o700
    assert b"geheim" not in b"".join(file.read_bytes() for file in disk.etc.iterdir() if file.is_file())
    monkeypatch.setenv(CREDENTIALS, str(disk.password.parent))
    mqtt = load_config(disk.configuration, environ={}).mqtt
    assert (mqtt.read_username(), mqtt.read_password()) == ("speech", "geheim")


def test_a_password_of_null_is_none(disk: Disk) -> None:
    disk.take("mqtt: {username: speech, password: geheim}\n")
    disk.take("mqtt: {username: null, password: null}\n")
    assert (disk.password.read_bytes(), mode(disk.password)) == (b"", 0o600)


def test_the_same_seed_again_changes_nothing(disk: Disk) -> None:
    disk.take("room: kitchen\n")
    written = disk.configuration.stat().st_mtime_ns
    disk.take("room: kitchen\n")
    assert disk.configuration.stat().st_mtime_ns == written
    assert disk.before.read_text() == OLD
    assert "nothing new" in disk.told()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mqtt: {hots: x}\n", "edge_asr.yaml: mqtt.hots: unknown key; did you mean 'mqtt.host'?"),
        ("room: a\nmqtt: [\n", "edge_asr.yaml:3: not valid YAML"),
        ("mqtt: {password: geheim}\n", "a password needs a username"),
        ("mqtt: {username: a, password: 1234}\n", "put the value in quotes"),
        ("mqtt: host:port\n", "mqtt.port"),
        ("just text\n", "should hold 'key: value' lines"),
        ("", "should hold 'key: value' lines"),
        ("room: küche\n".encode("latin-1"), "save it as UTF-8"),
        ("a: &a [*a]\n", "is nested too deeply"),
        ("model: mine\n", "model: there is no "),
    ],
)
def test_a_wrong_seed_changes_nothing_and_the_reason_lies_beside_it(disk: Disk, text: str | bytes, reason: str) -> None:
    with pytest.raises(ConfigError, match="was not taken over"):
        disk.take(text)
    assert disk.configuration.read_text() == OLD
    assert [file.name for file in disk.etc.iterdir()] == ["config.yaml"]
    assert disk.seed.exists()
    assert reason in disk.told()
    assert "NOT taken over" in disk.told()
    assert "geheim" not in disk.told()


def test_the_next_seed_replaces_the_reason(disk: Disk) -> None:
    with pytest.raises(ConfigError):
        disk.take("rooom: kitchen\n")
    disk.take("room: kitchen\n")
    assert "NOT" not in disk.told()


@pytest.mark.parametrize("name", ["edge_asr.yml", "edge_asr.yaml.txt"])
def test_names_that_other_systems_make_of_it_are_taken_too(disk: Disk, name: str) -> None:
    disk.seed = disk.boot / name
    disk.take("\ufeffroom: kitchen\n")
    assert disk.config()["home_assistant"] == {"area": "kitchen"}
    assert not disk.seed.exists()


@pytest.mark.parametrize("before", [None, b"\xff", b"[a: b", b""])
def test_a_seed_replaces_a_configuration_that_cannot_be_read(disk: Disk, before: bytes | None) -> None:
    disk.configuration.unlink()
    if before is not None:
        disk.configuration.write_bytes(before)
    disk.take(f"model: {BUNDLE}\n")
    config = load_config(disk.configuration, environ={})
    assert (str(config.state_dir), config.sources[0].kind) == ("/var/lib/edge_asr", "microphone")
    assert disk.before.exists() == (before is not None)


def test_what_the_seed_held_is_overwritten_before_it_is_removed(disk: Disk) -> None:
    other = disk.boot / "other"
    disk.seed.write_text("room: kitchen\n")
    other.hardlink_to(disk.seed)
    take_seed([disk.boot], disk.etc, disk.models)
    assert other.read_bytes().strip(b"\0") == b""


def test_a_seed_that_cannot_be_removed_is_named(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("edge_asr.cli_seed.erase", refuse)
    with pytest.raises(EdgeAsrError, match="taken over, but it cannot be removed"):
        disk.take("room: kitchen\n")
    assert disk.config()["home_assistant"] == {"area": "kitchen"}


def test_a_power_cut_between_any_two_writes_is_made_good_by_the_next_start(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = seed_module._write
    for survived in range(4):
        count = 0

        def cut(path: Path, content: bytes, mode: int = 0o644, last: int = survived) -> None:
            nonlocal count
            if count == last:
                raise KeyboardInterrupt
            count += 1
            real(path, content, mode)

        disk.configuration.write_text(OLD)
        with monkeypatch.context() as patch:
            patch.setattr(seed_module, "_write", cut)
            with pytest.raises(KeyboardInterrupt):
                disk.take("mqtt: {username: speech, password: geheim}\n")
        load_config(disk.configuration, environ={})
        take_seed([disk.boot], disk.etc, disk.models)
        assert disk.config()["mqtt"]["username"] == "speech"
        assert disk.password.read_text() == "geheim\n"
        assert disk.before.read_text() == OLD


def test_without_a_seed_nothing_happens(disk: Disk) -> None:
    take_seed([disk.boot, disk.boot / "efi"], disk.etc, disk.models)
    assert list(disk.boot.iterdir()) == []


def test_the_command_says_it_in_one_line_and_ends_with_2(disk: Disk) -> None:
    disk.seed.write_text("rooom: kitchen\n")
    result = subprocess.run(
        [sys.executable, "-m", "edge_asr.cli_seed", disk.boot, "--etc", disk.etc, "--models", disk.models],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "edge_asr.yaml: rooom: unknown key" in result.stderr
    assert result.stderr.count("\n") == 1
