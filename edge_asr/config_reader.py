"""From defaults, file, environment and command line to one configuration, or to all that is wrong with it."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from edge_asr.catalogue import CATALOGUE
from edge_asr.config import SOURCE_KINDS, Config, FileSourceConfig
from edge_asr.config_fields import Section
from edge_asr.errors import ConfigError

ENV_PREFIX = "EDGE_ASR_"
"""`EDGE_ASR_MQTT__PORT=1884` sets `mqtt.port`: two underscores between the section and the key."""
PATH_KEYS = (
    ("state_dir",),
    ("model",),
    ("engine", "dir"),
    ("mqtt", "username_file"),
    ("mqtt", "password_file"),
    ("mqtt", "tls", "ca_file"),
    ("mqtt", "tls", "cert_file"),
    ("mqtt", "tls", "key_file"),
    ("mqtt", "tls", "key_password_file"),
    ("outbox", "file"),
    ("http", "token_file"),
    ("http", "tls", "cert_file"),
    ("http", "tls", "key_file"),
    ("funasr", "tls", "cert_file"),
    ("funasr", "tls", "key_file"),
    ("sources", "*", "path"),
)
"""Keys that hold a path: in a file they are relative to that file's folder, elsewhere to the working directory."""

Key = tuple[str | int, ...]


def load_config(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    sources: Sequence[Mapping[str, str]] = (),
    model: str | Path | None = None,
    options: Mapping[str, tuple[str, object]] = types.MappingProxyType({}),
) -> Config:
    """Merge defaults, the file, `EDGE_ASR_*` variables and `section.key=value` overrides, in rising order.

    `sources`, where given, replace those of file and environment, and overrides refine them; `model` and `options` rise
    above all. `options` are a command's own, with key and value: `{"--target": ("engine.target", "auto")}`; None: not
    given.
    Raises ConfigError with all problems at once, one a line.
    """
    draft = _Draft()
    if path is not None:
        draft.read_file(path)
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(ENV_PREFIX):
            draft.set_text(name[len(ENV_PREFIX) :].lower().split("__"), text, name)
    if sources:
        draft.set_value(("sources",), [dict(source) for source in sources], "--source")
    for option in overrides:
        key, equals, text = option.partition("=")
        if equals and key.strip():
            draft.set_text(key.strip().split("."), text, f"-o {key.strip()}")
        else:
            draft.problems.append(f"-o {_shorten(option)}: should be section.key=value, such as -o mqtt.port=1884")
    if model is not None:
        draft.set_value(("model",), model, "--model")
    for name, (key, value) in options.items():
        if value is not None:
            draft.set_value(tuple(key.split(".")), value, name)
    return draft.validate()


def show_config(config: Config) -> str:
    """Return the configuration as YAML with its secrets masked."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML; where PyYAML lets one of Python's own errors through, this names the value and its line instead."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, ArithmeticError) as error:
            problem = f"cannot read the value {_shown(node.value)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


@dataclass
class _Draft:
    """Values gathered so far, where each came from, and everything found wrong with them."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read_file(self, path: Path) -> None:
        try:
            loader = _Loader(path.read_text(encoding="utf-8"))
            node = loader.get_single_node()
            data = None if node is None else loader.construct_document(node)
            if isinstance(node, yaml.MappingNode):
                self._note_lines(node, (), path)
        except OSError as error:
            self.problems.append(f"{path}: cannot read it: {error.strerror}; correct the path given to --config")
        except UnicodeDecodeError:
            self.problems.append(f"{path}: is not text in UTF-8; save it as UTF-8")
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            self.problems.append(f"{path}{line}: not valid YAML: {error.problem}; correct the line")
        except yaml.YAMLError as error:
            self.problems.append(f"{path}: not valid YAML: {' '.join(str(error).split())}")
        except RecursionError:
            self.problems.append(f"{path}: is nested too deeply, or a value holds itself; write it without")
        else:
            if data is not None and not isinstance(data, dict):
                self.problems.append(f"{path}: should hold 'key: value' lines; see config.yaml for an example")
            elif data:
                self.data = data
                for key in PATH_KEYS:
                    if key == ("model",) and data.get("model") in tuple(CATALOGUE):
                        continue  # a name, not a path
                    _anchor(self.data, key, path.resolve().parent)

    def _note_lines(self, node: yaml.Node, key: Key, path: Path) -> None:
        """Remember the line of each key, and report keys that stand twice (YAML would take the last)."""
        for child, value, line in _children(node):
            here = (*key, child)
            if here in self.origins:
                first = self.origins[here].rsplit(":", 1)[-1]
                self.problems.append(f"{path}:{line}: {_dotted(here)} is given twice, see line {first}; keep one")
            self.origins[here] = f"{path}:{line}"
            self._note_lines(value, here, path)

    def set_text(self, parts: Sequence[str], text: str, origin: str) -> None:
        """Set one key from text; a list's entry is named by its index, the next free one appends."""
        # No list has a billion entries, and Python refuses to read a number of thousands of digits.
        key: Key = tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in parts)
        origin = _shorten(origin)
        try:
            "".join(parts).encode()
            self.set_value(key, _parse(key, text), origin)
        except UnicodeEncodeError:
            self.problems.append(f"{origin}: unknown key; keys are plain letters")
        except yaml.constructor.ConstructorError as error:
            self.problems.append(f"{origin}: {error.problem}; correct it, or put it in quotes")
        except yaml.YAMLError:
            self.problems.append(f"{origin}: the value is not valid YAML; put it in quotes")
        except RecursionError:
            self.problems.append(f"{origin}: is nested too deeply")

    def set_value(self, key: Key, value: Any, origin: str) -> None:
        """Set one key; what stood there or below is forgotten."""
        if not _assign(self.data, key, value):
            self.problems.append(f"{origin}: there is no such entry; set the entries before it first")
            return
        for known in [known for known in self.origins if known[: len(key)] == key]:
            del self.origins[known]
        self.origins[key] = origin

    def validate(self) -> Config:
        # An empty section ("mqtt:" with nothing below) or null at the top level means: the default.
        given = {key: value for key, value in self.data.items() if value is not None}
        config = None
        try:
            config = Config.model_validate(given)
        except ValidationError as error:
            for details in error.errors():
                key = _plain_key(details["loc"])
                self.problems.append(_line(self._origin(key), _explain(key, details)))
        for clash in _clashes(given.get("sources")):
            self.problems.append(_line(self._origin(("sources",)), f"sources: {clash}"))
        if self.problems or config is None:
            raise ConfigError("\n".join(self.problems))
        return config

    def _origin(self, key: Key) -> str:
        """Return where a key came from: its own origin, else that of a key below, else above."""
        below = (origin for known, origin in self.origins.items() if known[: len(key)] == key and key)
        above = (self.origins[key[:end]] for end in range(len(key) - 1, 0, -1) if key[:end] in self.origins)
        return next(below, None) or next(above, "")


def _clashes(sources: Any) -> Iterator[str]:
    """Yield what is wrong between sources that may be wrong themselves; a validator would see right ones only."""
    entries = [entry for entry in sources if isinstance(entry, dict)] if isinstance(sources, list) else []
    names = [entry.get("name") or _microphone_name(entry) for entry in entries]
    twice = sorted({name for name in names if isinstance(name, str) and names.count(name) > 1})
    if twice:
        yield f"two sources are named {', '.join(map(_shown, twice))}; give each its own name"
    if sum(entry.get("kind") == "stdin" for entry in entries) > 1:
        yield "standard input can be a source only once; remove the others"


def _microphone_name(entry: dict[str, Any]) -> str | None:
    """Return what a microphone without a name is called; two channels of one device would be called the same."""
    return f"microphone:{entry.get('device') or 'default'}" if entry.get("kind") == "microphone" else None


def _line(origin: str, text: str) -> str:
    """Return one line of a ConfigError; an option names its key itself, so it is not named twice."""
    if origin.startswith("-o ") and text.startswith(f"{origin[3:]}:"):
        return f"-o {text}"
    return f"{origin}: {text}" if origin else text


def _children(node: yaml.Node) -> Iterator[tuple[str | int, yaml.Node, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield str(name.value), value, name.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield index, value, value.start_mark.line + 1


def _anchor(data: Any, key: Sequence[str], folder: Path) -> None:
    """Make the path at `key` (`*`: every entry of a list) absolute, seen from `folder`."""
    head, *rest = key
    if head == "*":
        for entry in data if isinstance(data, list) else ():
            _anchor(entry, rest, folder)
    elif isinstance(data, dict) and data.get(head) is not None:
        value = data[head]
        if rest:
            _anchor(value, rest, folder)
        elif isinstance(value, str) and value and not value.startswith("~"):
            data[head] = str(folder / value)


def _assign(data: Any, key: Key, value: Any) -> bool:
    """Set `value` at `key`, making what is missing on the way; return False where a list has no such entry."""
    head, *rest = key
    if isinstance(data, list):
        if not isinstance(head, int) or head > len(data):
            return False
        if head == len(data):
            data.append(None)
    elif not isinstance(data, dict):
        return False
    else:
        data.setdefault(head, None)
    if not rest:
        data[head] = value
        return True
    if data[head] is None:
        data[head] = [] if isinstance(rest[0], int) else {}
    return _assign(data[head], tuple(rest), value)


def _parse(key: Key, text: str) -> Any:
    """Return text as YAML, or as it stands where the key holds text: a password `0123` is no number."""
    if not _is_text(Config, key):
        return yaml.load(text, _Loader)
    return None if text in ("", "null") else text


def _is_text(annotation: Any, key: Key) -> bool:
    candidates = list(_flatten(annotation))
    if not key:
        if typing.get_origin(annotation) is tuple:  # a list of texts is none itself
            return False
        return any(candidate in (str, SecretStr, Path) or isinstance(candidate, str) for candidate in candidates)
    if isinstance(key[0], int):
        return _is_text(
            typing.get_args(annotation)[0] if typing.get_origin(annotation) is tuple else annotation, key[1:]
        )
    models = [candidate for candidate in candidates if isinstance(candidate, type) and issubclass(candidate, Section)]
    found = [model.model_fields[key[0]] for model in models if key[0] in model.model_fields]
    return any(_is_text(field_.annotation, key[1:]) for field_ in found)


def _flatten(annotation: Any) -> Iterator[Any]:
    """Yield the classes and literals that an annotation is made of."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _flatten(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType, tuple, Literal):
        for argument in typing.get_args(annotation):
            yield from _flatten(argument)
    else:
        yield annotation


def _plain_key(loc: Key) -> Key:
    """Return pydantic's location without the kind that it puts after the index of a source."""
    return (*loc[:2], *loc[3:]) if loc[:1] == ("sources",) else loc


def _shorten(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _shown(value: object) -> str:
    """Return a value as a message shows it, on one line of fair length."""
    try:
        return _shorten(repr(value))
    except ValueError:
        return "a number of thousands of digits"


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def _known_keys(key: Key, kind: object) -> list[str]:
    """Return the keys that stand beside `key`."""
    if len(key) == 1:
        return list(Config.model_fields)
    if key[0] == "sources":
        return list(SOURCE_KINDS.get(str(kind), FileSourceConfig).model_fields)
    models = [found for found in _flatten(Config.model_fields[str(key[0])].annotation) if issubclass(found, Section)]
    return [name for model in models for name in model.model_fields]


def _explain(key: Key, details: ErrorDetails) -> str:
    """Return the key, what is wrong with it, and the remedy."""
    if details["type"] == "extra_forbidden":
        return _explain_unknown(key, details)
    if details["type"] == "value_error":
        return f"{_dotted(key)}: {details['ctx']['error']}"
    if details["type"] == "union_tag_invalid":
        return _explain_kind(key, details["ctx"]["tag"])
    return f"{_dotted(key)}: {_complaint(key, details)}"


def _explain_unknown(key: Key, details: ErrorDetails) -> str:
    known = _known_keys(key, details["loc"][2] if key[0] == "sources" else None)
    nearest = difflib.get_close_matches(str(key[-1]), known, n=1)
    remedy = f"did you mean {_dotted((*key[:-1], nearest[0]))!r}?" if nearest else f"known here: {', '.join(known)}"
    return f"{_dotted(key)}: unknown key; {remedy}"


def _explain_kind(key: Key, kind: str) -> str:
    return f"{_dotted(key)}.kind: should be {' or '.join(map(repr, SOURCE_KINDS))}; got {_shown(kind)}"


def _complaint(key: Key, details: ErrorDetails) -> str:
    kind, given = details["type"], details["input"]
    if kind == "missing":
        return "is required; set it"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "should hold keys, each with its value"
    if kind == "tuple_type":
        return f"should be a list, such as {'[{kind: stdin}]' if key[0] == 'sources' else '[打开客厅灯]'}"
    if given is None:
        return "has no value; set it, or remove the line to get the default"
    if kind in ("string_type", "path_type") and isinstance(given, (bool, int, float)):
        return "should be text; put the value in quotes"
    message = details["msg"].removeprefix("Input ").removeprefix("String ").partition(", unable to parse")[0]
    if kind == "string_unicode":
        message = "should be text in UTF-8"
    if kind == "string_pattern_mismatch":
        message = "should have 1 to 64 letters, digits, '-' or '_' and nothing else"
    secret = any("password" in str(part) for part in key)
    return message if secret or isinstance(given, (dict, list)) else f"{message}; got {_shown(given)}"
