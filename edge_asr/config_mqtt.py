"""The sections about the broker: the connection, the outbox, and who else is spoken to there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator

from edge_asr.config_fields import (
    Duration,
    Host,
    Integer,
    MqttText,
    Number,
    ReadableFile,
    Secret,
    Section,
    Topic,
    UserPath,
)
from edge_asr.errors import ConfigError

PORT, TLS_PORT = 1883, 8883


CREDENTIALS = "CREDENTIALS_DIRECTORY"
"""systemd puts the secrets of `LoadCredential=mqtt_username:...` and `mqtt_password:...` there."""


class TlsConfig(Section):
    """Encryption. The broker's certificate must be valid for `mqtt.host`: there is no way to switch that off."""

    enabled: bool = False
    """On as soon as one of the files is given."""
    ca_file: ReadableFile | None = None
    """Who signs the broker's certificate; null: whom the system trusts."""
    cert_file: ReadableFile | None = None
    """Our own certificate, where the broker asks for one."""
    key_file: ReadableFile | None = None
    """The key of our own certificate; null: it is in the same file."""
    key_password_file: ReadableFile | None = None

    @model_validator(mode="before")
    @classmethod
    def _files_switch_it_on(cls, data: Any) -> Any:
        if isinstance(data, bool):
            return {"enabled": data}
        if isinstance(data, Mapping) and any(value is not None for key, value in data.items() if key != "enabled"):
            return {"enabled": True, **data}
        return data

    @field_validator("key_file", "key_password_file")
    @classmethod
    def _belongs_to_a_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("cert_file", "") is None:
            raise ValueError("a key needs its certificate; set cert_file")
        return value


class MqttConfig(Section):
    """The broker, and how to publish on it."""

    enabled: bool = True
    host: Host = Field(default="127.0.0.1", min_length=1)
    port: Integer = Field(default=PORT, ge=1, le=65535)
    """Where it is not given: 1883, with TLS 8883."""
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    """Version of MQTT; auto: 5, and 3.1.1 where the broker does not know that."""
    transport: Literal["tcp", "websockets"] = "tcp"
    websocket_path: MqttText = Field(default="/mqtt", pattern=r"^/[^\s?#]*$")
    tls: TlsConfig = TlsConfig()
    username: Annotated[MqttText, Field(min_length=1)] | None = None
    username_file: ReadableFile | None = None
    """A file that holds the name."""
    password: Secret | None = None
    password_file: ReadableFile | None = None
    """A file that holds the password, so that it need not stand in the configuration."""
    client_id: Annotated[MqttText, Field(min_length=1)] | None = None
    """Null: made from the device id, unique and kept in `state_dir`."""
    base: Topic = Field(default="edge_asr", max_length=200)
    """Topics are `<base>/<device_id>/...`."""
    keepalive_s: Integer = Field(default=30, ge=5, le=65535)
    reconnect_min_s: Number = Field(default=0.5, gt=0, le=3600)
    reconnect_max_s: Number = Field(default=30.0, gt=0, le=3600)
    live_for_s: Number = Field(default=5.0, gt=0, le=3600)
    """An older transcript is not published on `said`: nobody should act on it any more."""
    commands: bool = True
    """Obey `<base>/<device_id>/cmd/...`: whoever may publish there may mute the appliance."""

    @model_validator(mode="before")
    @classmethod
    def _tls_has_its_own_port(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "port" in data or not data.get("tls"):
            return data
        try:
            encrypted = TlsConfig.model_validate(data["tls"]).enabled
        except ValueError:  # is said where the section itself is read
            return data
        return {**data, "port": TLS_PORT} if encrypted else data

    @field_validator("protocol", mode="before")
    @classmethod
    def _five_is_a_number_in_yaml(cls, value: Any) -> Any:
        return "5" if type(value) is int and value == 5 else value

    # Rules about two keys stand at the later one: those of a whole section are skipped when any of its keys is wrong.
    @field_validator("username_file")
    @classmethod
    def _one_name(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("username") is not None:
            raise ValueError("username and username_file are both set; keep one")
        return value

    @field_validator("password", "password_file")
    @classmethod
    def _password_belongs_to_a_user(cls, value: SecretStr | Path | None, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("password") is not None:
            raise ValueError("password and password_file are both set; keep one")
        names = [info.data.get(key, "") for key in ("username", "username_file")]
        if value is not None and names == [None, None] and _credential("mqtt_username") is None:
            raise ValueError("a password needs a username; set username")
        return value

    @field_validator("reconnect_max_s")
    @classmethod
    def _pauses_grow(cls, longest: float, info: ValidationInfo) -> float:
        if info.data.get("reconnect_min_s", 0) > longest:
            raise ValueError("is less than reconnect_min_s; raise it, or lower the other")
        return longest

    def read_username(self) -> str | None:
        """Return the name, from the file or systemd's credentials where it is there; raise ConfigError."""
        if self.username is not None:
            return self.username
        return _read(self.username_file or _credential("mqtt_username"), "mqtt.username_file")

    def read_password(self) -> str | None:
        """Return the password, from the file or systemd's credentials where it is there; raise ConfigError."""
        if self.password is not None:
            return self.password.get_secret_value()
        return _read(self.password_file or _credential("mqtt_password"), "mqtt.password_file")


class OutboxConfig(Section):
    """What keeps transcripts until the broker has them, and for a while after that."""

    enabled: bool = True
    """False: they are kept in memory, the newest 1000, and lost when the power is."""
    file: UserPath | None = None
    """Null: `outbox.sqlite3` in `state_dir`."""
    keep: Duration = Field(default=86_400.0, ge=0, le=366 * 86_400)
    """What the broker has acknowledged stays so long, for `cmd/replay`: a broker may lose what it acknowledged."""
    max_age: Duration = Field(default=30 * 86_400.0, ge=60, le=3660 * 86_400)
    """What no broker has acknowledged is given up when it is older, counted."""
    max_mb: Number = Field(default=20.0, ge=0.25, le=100_000)
    """Size of the file; beyond it the oldest goes, what is acknowledged first, counted."""


class HomeAssistantConfig(Section):
    """Discovery by Home Assistant: the appliance appears there by itself."""

    enabled: bool = True
    prefix: Topic = Field(default="homeassistant", max_length=200)
    """Home Assistant's own `discovery_prefix`."""
    form: Literal["device", "components"] = "device"
    """`device` is one message; `components`, one for each entity, is what releases before 2024.11 understand."""
    area: Annotated[MqttText, Field(min_length=1, max_length=255)] | None = None
    """The room that Home Assistant suggests for it."""
    name: Annotated[MqttText, Field(min_length=1, max_length=255)] | None = None
    """Name of the device there; null: the device id."""


class HermesConfig(Section):
    """The protocol of Rhasspy and Snips, in both directions."""

    enabled: bool = False
    site_id: Annotated[MqttText, Field(min_length=1)] | None = None
    """Null: the device id."""
    base: Topic = Field(default="hermes", max_length=200)


def _credential(name: str) -> Path | None:
    folder = os.environ.get(CREDENTIALS)
    path = Path(folder) / name if folder else None
    return path if path is not None and path.is_file() and not _is_blank(path) else None


def _is_blank(path: Path) -> bool:
    """Tell whether it is the unit's default: systemd does not start a service without a value for a credential."""
    try:
        return not path.read_bytes().strip()
    except OSError:  # is said where it is read
        return False


def _read(path: Path | None, key: str) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: cannot read {path}: {error}") from error
