"""Which release the fake is, and what that release has."""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path

VERSIONS = {
    "8.5": "8.5.2.2",
    "8.6": "8.6.2.3",
    "10.3": "10.3.0",
    "10.7": "10.7.0",
    "10.13": "10.13.3.9",
    "10.16": "10.16.1.11",
    "11.4": "11.4.0.106",
}
FACTS = {"11.4": "11.1"}
"""The release whose facts stand for another's."""
RELEASE = os.environ.get("FAKE_TENSORRT", "10.3")
if RELEASE == "broken":
    raise OSError("libnvdla_compiler.so: cannot open shared object file: No such file or directory")
if RELEASE not in VERSIONS:
    raise ImportError(f"FAKE_TENSORRT={RELEASE}: not one of {', '.join(VERSIONS)}")
VERSION = VERSIONS[RELEASE]
API = json.loads((Path(__file__).parents[2] / "data" / "tensorrt_api.json").read_text(encoding="utf-8"))


def number(release):
    """Return a release as numbers that compare."""
    return tuple(int(part) for part in release.split("."))


NUMBER = number(RELEASE)


def exists(kind, name):
    """Tell whether this release has a member; what the facts do not list exists in all."""
    span = API["members"].get(kind, {}).get(name)
    return span is None or number(span[0]) <= number(FACTS.get(RELEASE, RELEASE)) <= number(span[1])


def of_release(kind):
    """Take out of a class what this release does not have, and let nobody set what it does not have."""
    for name in list(vars(kind)):
        if not exists(kind.__name__, name):
            delattr(kind, name)

    def set_known(self, name, value):
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"'{kind.__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)

    kind.__setattr__ = set_known
    return kind


def plain(name, default=None, read_only=False):
    """Return a property that holds a value, as `_name`."""
    get = lambda self: getattr(self, f"_{name}", default)  # noqa: E731
    return property(get, None if read_only else lambda self, value: setattr(self, f"_{name}", value))


def make_enum(name):
    """Return an enumeration with the members and integers of this release; it is no int, as in pybind11."""
    known = [release for release in API["values"] if number(release) <= NUMBER]
    values = API["values"][known[-1]][name]
    made = enum.Enum(name, {key: value for key, value in values.items() if exists(name, key)})
    made.__int__ = made.__index__ = lambda self: self.value
    return made
