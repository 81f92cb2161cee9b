"""Which keys of the configuration may change while the appliance runs, and which wait for a restart. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from edge_asr.config import Config
from edge_asr.config_fields import Section

AT_RUN_TIME = (
    "model",
    "models",
    "engine",
    "gates",
    "segment.preset",
    "segment.content_endpointing",
    "segment.phrases",
    "listen.mode",
    "listen.phrases",
    "http.tokens",
    "http.token_file",
    "http.origins",
    "http.tls",
    "funasr.tls",
    "drain_s",
    "log",
)
"""These keys, and all below them."""
SWITCHES = ("http.tls.cert_file", "funasr.tls.cert_file")
"""From null, or to it, only with a restart: a port that is open goes on as it was opened."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What another configuration means for an appliance that runs."""

    config: Config
    """The present one, with what may change now."""
    now: tuple[str, ...]
    """The keys that do."""
    later: tuple[str, ...]
    """The keys that wait for a restart."""


def changes(present: Config, wanted: Config) -> Changes:
    """Return what is to be done to come from one configuration to another."""
    differing = list(_differing("", present, wanted))
    switched = [key for key, old, new in differing if key in SWITCHES and None in (old, new)]
    sections = [key.rpartition(".")[0] for key in switched]
    now = [key for key, *_ in differing if _is_below(key, AT_RUN_TIME) and not _is_below(key, sections)]
    config = present
    for key, _, new in differing:
        if key in now:
            config = _replaced(config, key.split("."), new)
    return Changes(config, tuple(now), tuple(key for key, *_ in differing if key not in now))


def _differing(prefix: str, present: Section, wanted: Section) -> Iterator[tuple[str, Any, Any]]:
    for name in type(present).model_fields:
        old, new, key = getattr(present, name), getattr(wanted, name), f"{prefix}{name}"
        if isinstance(old, Section) and type(old) is type(new):
            yield from _differing(f"{key}.", old, new)
        elif old != new:
            yield key, old, new


def _is_below(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _replaced(section: Any, path: list[str], value: Any) -> Any:
    """Return a section with another value at a path; nothing is checked again: both configurations were."""
    name, *rest = path
    return section.model_copy(update={name: _replaced(getattr(section, name), rest, value) if rest else value})
