"""What TensorRT's Python bindings have: by NVIDIA's sources for each release, and by the real bindings for two."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundled import REPOSITORY
from tensorrt_calls import MODULE, Releases, parameters

REAL = {"10.3": "10.3", "11.4": "11.1"}
"""Releases whose bindings scripts/bindings gets, and those whose facts stand for them."""
BINDINGS = REPOSITORY / ".bindings"
FACTS = REPOSITORY.parent / "shared" / "facts" / "tensorrt-api.json"
REDUCED = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text(encoding="utf-8"))
"""What of the facts our code and the fakes need, where the facts are not at hand."""
ALL = ("8.5", "8.6", "10.3", "10.7", "10.13", "10.16", "11.0", "11.1")
ENUM = ("name", "value")
"""What every member of an enumeration has."""
NEW_CLASSES = {"IProgressMonitor": "10.3", "ExecutionContextAllocationStrategy": "10.3"}
"""Classes that the facts do not list, by the first release that has them."""
SHOW = """
import inspect, json, tensorrt_bindings as trt

def show(owner):
    return {name: describe(owner, name) for name in dir(owner) if not name.startswith("__") or name == "__init__"}

def describe(owner, name):
    member = getattr(owner, name)
    if name in getattr(owner, "__members__", {}):
        return int(member)
    if isinstance(member, property):
        return "get" if member.fset is None else "get and set"
    if inspect.isclass(member):
        return "class"
    return [line.strip() for line in (member.__doc__ or "").splitlines() if f"{name}(" in line and "->" in line]

found = {name: show(member) for name, member in vars(trt).items() if inspect.isclass(member)}
names = {name: describe(trt, name) for name in dir(trt)}
print(json.dumps({"": names, **found, "Severity": show(trt.ILogger.Severity)}))
"""


def number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


@functools.cache
def real(release: str) -> dict[str, dict[str, Any]]:
    """Return by class the members of the real bindings: integers, kinds of property, signatures. Skips without them."""
    folder = BINDINGS / release
    if not (folder / "stubs").is_dir():
        pytest.skip(f"no bindings of TensorRT {release} in {BINDINGS.name}: scripts/bindings")
    paths = {"LD_LIBRARY_PATH": os.fspath(folder / "stubs"), "PYTHONPATH": os.fspath(folder)}
    result = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    shown: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return shown


@functools.cache
def facts() -> dict[str, dict[str, Releases]]:
    """Return by class and member the releases that have it."""
    if FACTS.is_file():
        listed = json.loads(FACTS.read_text(encoding="utf-8"))["members"]
        return {kind: {name: frozenset(found) for name, found in members.items()} for kind, members in listed.items()}
    return reduced()


def reduced() -> dict[str, dict[str, Releases]]:
    """Return the same of what is stored in this repository."""
    return {
        kind: {name: _span(*span) for name, span in members.items()} for kind, members in REDUCED["members"].items()
    }


def _span(first: str, last: str) -> Releases:
    return frozenset(release for release in ALL if number(first) <= number(release) <= number(last))


def has(kind: str, name: str) -> Releases:
    """Return the releases that have a member of a class, or a name of the module."""
    if kind == MODULE:
        return _has_class(name)
    if kind in facts() and not name.startswith("__") and not (kind in REDUCED["values"]["8.5"] and name in ENUM):
        return facts()[kind].get(name, frozenset())
    if any(kind in values for values in REDUCED["values"].values()) and name not in ENUM:
        return frozenset(release for release in ALL if name in _values(kind, release))
    return frozenset(_otherwise(kind, name))


def _has_class(name: str) -> Releases:
    if name in facts():
        return frozenset().union(*facts()[name].values())
    if name in NEW_CLASSES:
        return _span(NEW_CLASSES[name], ALL[-1])
    return frozenset(_otherwise(MODULE, name))


def _otherwise(kind: str, name: str) -> list[str]:
    """Return the releases whose bindings, or the next ones that are here, have it."""
    here = {release: REAL_OF[release] for release in ALL}
    return [release for release, bindings in here.items() if name in real(bindings).get(kind, {})]


REAL_OF = {release: "11.4" if number(release) >= (11,) else "10.3" for release in ALL}


def _values(kind: str, release: str) -> dict[str, int]:
    known = [one for one in REDUCED["values"] if number(one) <= max(number(release), (8, 5))]
    values: dict[str, int] = REDUCED["values"][known[-1]][kind]
    return values


def takes(signatures: list[str], arguments: int, keywords: tuple[str, ...]) -> bool:
    """Tell whether one of some signatures can be called so."""
    for signature in signatures:
        known = list(parameters(signature))
        names = [one.partition(":")[0].strip() for one in known]
        needed = [name for name, one in zip(names, known, strict=True) if " = " not in one]
        given = {*names[:arguments], *keywords}
        if (
            arguments <= len(names)
            and given <= set(names)
            and given >= set(needed)
            and not set(names[:arguments]) & {*keywords}
        ):
            return True
    return False
