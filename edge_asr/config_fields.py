"""What the sections of the configuration are made of: checked kinds of values, and the base of all sections."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, SecretStr

MAX_MQTT_BYTES = 65_535
"""The longest string that MQTT carries."""
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
"""Control characters and those that are none: a broker may hang up when it meets one."""
DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def _expand(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("should be a path, without a NUL character in it")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError("there is no home directory for '~'; give an absolute path") from error


def _readable(path: Path) -> Path:
    if not os.access(path, os.R_OK) or not path.is_file():
        raise ValueError(f"cannot read {path}; create it or correct the path")
    return path


def _encodable(value: str) -> str:
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError("should be text in UTF-8") from error
    if size > MAX_MQTT_BYTES:
        raise ValueError(f"should be at most {MAX_MQTT_BYTES} bytes long")
    return value


def _secret(value: SecretStr) -> SecretStr:
    _encodable(value.get_secret_value())
    return value


def _mqtt_text(value: str) -> str:
    if UNPRINTABLE.search(_encodable(value)):
        raise ValueError("should be text without control characters")
    return value


def _topic(value: str) -> str:
    if not value or value.startswith(("/", "$")) or value.endswith("/") or re.search(r"[+#]|//", value):
        raise ValueError("should be a topic without '+', '#', a leading '/' or '$', or a trailing '/'")
    return value


def _host(value: str) -> str:
    try:
        value.encode("idna")
    except UnicodeError as error:
        raise ValueError("should be the name or address of a host") from error
    return value


def _number(value: Any) -> Any:
    # YAML reads yes, no, on and off as booleans, and pydantic would go on to read those as 1 and 0.
    if isinstance(value, bool):
        raise ValueError("should be a number, not yes or no")
    return value


def _duration(value: Any) -> Any:
    """Return seconds of a text such as 24h."""
    if isinstance(value, str):
        if (found := DURATION.fullmatch(value.strip())) is None:
            raise ValueError("should be a time such as 90s, 30m, 24h or 7d")
        return float(found[1]) * SECONDS[found[2]]
    return _number(value)


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds; also as text with a unit."""
UserPath = Annotated[Path, AfterValidator(_expand)]
ReadableFile = Annotated[UserPath, AfterValidator(_readable)]
MqttText = Annotated[str, AfterValidator(_mqtt_text)]
Topic = Annotated[MqttText, AfterValidator(_topic)]
Host = Annotated[MqttText, AfterValidator(_host)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]


class Section(BaseModel):
    """What all sections share: they are frozen and refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
