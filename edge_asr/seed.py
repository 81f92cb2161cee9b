"""The seed file: what a person at another PC puts on the boot partition becomes part of the configuration."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from edge_asr.config_reader import load_config
from edge_asr.errors import ConfigError

SEEDS = ("edge_asr.yaml", "edge_asr.yml", "edge_asr.yaml.txt")
"""Its names; the last one is what Windows makes of the first."""
CONFIGURATION = "config.yaml"
BEFORE = "config.yaml.before"
PASSWORD = "credentials/mqtt_password"
ANEW = {"state_dir": "/var/lib/edge_asr", "sources": [{"kind": "microphone"}]}
"""What an appliance has at least, where there is no configuration that can be read."""
EITHER = (("username", "username_file"), ("password", "password_file"))
"""Of each two keys of `mqtt` only one may be set, so that a new one takes the place of the other."""
PUBLIC, SECRET = 0o644, 0o600


def find_seed(folders: Sequence[Path]) -> Path | None:
    """Return the seed file, from the first folder that has one."""
    return next((folder / name for folder in folders for name in SEEDS if (folder / name).is_file()), None)


def take_over(seed: Path, etc: Path, models: Path) -> bool:
    """Merge the seed into `etc`'s configuration, and its password into the credentials; return whether it is another.

    The configuration before stays as `config.yaml.before`. Whoever does this twice, after a power cut, does it once.
    Raises ConfigError where the outcome would not be valid, and OSError; then the configuration stays as it is.
    """
    given = _written_out(_read(seed), models)
    old = _existing(etc / CONFIGURATION)
    new = _merged(_making_room(old, given), given)
    _check(new, etc, seed.name)
    new = _keep_password(new, etc / PASSWORD)
    if new == old:
        return False
    with contextlib.suppress(FileNotFoundError):
        _write(etc / BEFORE, (etc / CONFIGURATION).read_bytes(), SECRET)
    _write(etc / CONFIGURATION, _text(new, f"# Made from a seed file; what was before it stands in {BEFORE}.\n"))
    return True


def erase(seed: Path) -> None:
    """Remove the file, with zeros in its place: it may hold a password. Raises OSError."""
    with seed.open("r+b") as file:
        file.write(bytes(seed.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
    seed.unlink()
    _sync(seed.parent)


def _read(seed: Path) -> dict[str, Any]:
    try:
        # Editors on Windows begin a file with a byte order mark.
        data = yaml.safe_load(seed.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{seed.name}: is not text in UTF-8; save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{seed.name}{line}: not valid YAML: {error.problem}; correct the line") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{seed.name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"{seed.name}: should hold 'key: value' lines, such as room: kitchen")
    return data


def _written_out(given: dict[str, Any], models: Path) -> dict[str, Any]:
    """Return the seed in the keys of the configuration: `room`, `mqtt: host:port` and an installed model are short."""
    full = dict(given)
    if "room" in full:
        full["home_assistant"] = _merged(full.get("home_assistant") or {}, {"area": full.pop("room")})
    if isinstance(full.get("mqtt"), str):
        host, colon, port = full["mqtt"].partition(":")
        full["mqtt"] = {"host": host, **({"port": int(port) if port.isdecimal() else port} if colon else {})}
    model = full.get("model")
    if isinstance(model, str) and re.fullmatch(r"[\w.-]+", model) and (models / model).is_dir():
        full["model"] = str(models / model)
    return full


def _existing(configuration: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError, ValueError):
        data = None
    return data if isinstance(data, dict) and data else ANEW


def _making_room(old: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the old configuration without what the seed's keys stand in for."""
    mqtt, new = old.get("mqtt"), given.get("mqtt")
    if not isinstance(mqtt, dict) or not isinstance(new, dict):
        return old
    gone = {other for pair in EITHER for key, other in (pair, pair[::-1]) if key in new}
    return {**old, "mqtt": {key: value for key, value in mqtt.items() if key not in gone}}


def _merged(old: Any, new: Any) -> Any:
    """Return the new value, or, of two sections, one with the keys of both."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _check(new: dict[str, Any], etc: Path, name: str) -> None:
    """Read it as the service would, from the folder that relative paths start at; raise ConfigError."""
    draft = etc / f"{CONFIGURATION}.seed"
    try:
        _write(draft, _text(new), SECRET)
        model = load_config(draft, environ={}).model
        if not model.is_dir():
            raise ConfigError(f"{name}: model: there is no {model}; name one that is installed, or a folder")
    except ConfigError as error:
        raise ConfigError(re.sub(rf"{re.escape(str(draft))}(:\d+)?", name, str(error))) from error
    finally:
        draft.unlink(missing_ok=True)


def _keep_password(new: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the configuration, which everybody may read, without the password: it goes to `file`; null is none."""
    section = new.get("mqtt")
    if not isinstance(section, dict) or "password" not in section:
        return new
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # An empty file is none: the service does not start where the file is missing.
    _write(file, b"" if section["password"] is None else f"{section['password']}\n".encode(), SECRET)
    return {**new, "mqtt": {key: value for key, value in section.items() if key != "password"}}


def _text(data: dict[str, Any], head: str = "") -> bytes:
    return (head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True)).encode()


def _write(path: Path, content: bytes, mode: int = PUBLIC) -> None:
    """Replace a file in one step, which outlives a power cut."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
