"""How a client is named, and what errors of connecting are called."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from edge_asr.config_mqtt import CREDENTIALS, MqttConfig
from edge_asr.errors import ConfigError
from edge_asr.publish import client
from edge_asr.publish.client import client_id, in_words, make_client


def test_the_client_id_is_unique_and_stays(tmp_path: Path) -> None:
    first = client_id(MqttConfig(), "hall", tmp_path / "one")
    assert first.startswith("edge_asr-hall-")
    assert client_id(MqttConfig(), "hall", tmp_path / "one") == first
    assert client_id(MqttConfig(), "hall", tmp_path / "two") != first
    assert client_id(MqttConfig(client_id="mine"), "hall", tmp_path / "three") == "mine"
    assert not (tmp_path / "three").exists()
    assert (tmp_path / "one/client_id").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe", b"0123456"])
def test_a_damaged_client_id_is_made_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "client_id").write_bytes(content)
    made = client_id(MqttConfig(), "hall", tmp_path)
    assert client_id(MqttConfig(), "hall", tmp_path) == made


def test_where_nothing_can_be_kept_the_client_id_comes_from_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(client, "MACHINE_ID", tmp_path / "machine-id")
    (tmp_path / "machine-id").write_text("0123456789abcdef\n")
    ids = {client_id(MqttConfig(), device, tmp_path / "file") for device in ("hall", "hall", "kitchen")}
    assert len(ids) == 2
    (tmp_path / "machine-id").write_text("fedcba9876543210\n")
    assert client_id(MqttConfig(), "hall", tmp_path / "file") not in ids
    (tmp_path / "machine-id").unlink()
    assert client_id(MqttConfig(), "hall", tmp_path / "file").startswith("edge_asr-hall-")
    assert "the client id cannot be kept in" in caplog.text


def test_account_and_secrets_are_read_from_files_and_credentials_at_each_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "name").write_text("hall\n")
    (tmp_path / "word").write_text("first\n")
    config = MqttConfig.model_validate({"username_file": tmp_path / "name", "password_file": tmp_path / "word"})
    assert (account(config), account(config)) == (("hall", "first"), ("hall", "first"))
    (tmp_path / "word").write_text("second\n")
    assert account(config) == ("hall", "second")
    (tmp_path / "mqtt_username").write_text("desk")
    (tmp_path / "mqtt_password").write_text("third")
    monkeypatch.setenv(CREDENTIALS, str(tmp_path))
    assert account(MqttConfig()) == ("desk", "third")


def account(config: MqttConfig) -> tuple[str | None, str | None]:
    made = make_client(config, "x", "5")
    return made.username, made.password


def test_a_file_with_a_secret_that_has_gone_or_is_too_long_is_named(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("x" * 70_000)
    config = MqttConfig.model_validate({"username": "hall", "password_file": tmp_path / "word"})
    with pytest.raises(ConfigError, match=r"mqtt\.password: should be at most 65535 bytes long; correct its file"):
        make_client(config, "x", "5")
    (tmp_path / "word").unlink()
    with pytest.raises(ConfigError, match=r"mqtt\.password_file: cannot read .*word") as raised:
        make_client(config, "x", "5")
    assert in_words(raised.value, config).startswith("mqtt.password_file: cannot read")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(socket.EAI_NONAME, "x"), "its name cannot be resolved; correct mqtt.host"),
        (ConnectionRefusedError(111, "Connection refused"), "connection refused: nobody listens there; start"),
        (TimeoutError("timed out"), "it does not answer; correct mqtt.host and mqtt.port"),
        (OSError(113, "No route to host"), "no route to host; correct mqtt.host and mqtt.port"),
        (ConnectionResetError(104, "Connection reset by peer"), "connection reset by peer; correct"),
        (UnicodeError("label too long"), "label too long; correct"),
        (RuntimeError(), "runtimeerror; correct"),
        (ConfigError("mqtt.password_file: cannot read it"), "mqtt.password_file: cannot read it; correct it"),
        (ConfigError("a; b; c"), "a; b; c"),
    ],
)
def test_errors_have_words_and_a_remedy(error: Exception, words: str) -> None:
    assert in_words(error, MqttConfig()).startswith(words)


@pytest.mark.parametrize("keys", [{}, {"transport": "websockets"}])
def test_the_defaults_make_a_client_of_each_version(keys: dict[str, Any]) -> None:
    config = MqttConfig.model_validate(keys)
    assert [int(make_client(config, "x", version).protocol) for version in ("5", "3.1.1")] == [5, 4]
