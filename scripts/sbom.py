"""The software bill of materials, CycloneDX 1.6: what a lock installs, each with its hash, its licence and its needs.

Usage: python scripts/sbom.py --lock FILE --python 3.12 --machine x86_64 --extras A,B --wheels DIR --own FILE --out FILE
The files of the lock are fetched into --wheels, as that machine would do it. SOURCE_DATE_EPOCH is the time it bears.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseAcknowledgement
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pip_for import target_environment

PIP_FOR = Path(__file__).with_name("pip_for.py")
GLIBC_MINOR = {"3.10": 35, "3.11": 36, "3.12": 39, "3.13": 41}
"""The C library of the oldest system that has this Python: Ubuntu 22.04, Debian 12, Ubuntu 24.04, Debian 13."""
NOT_SAID = ("", "UNKNOWN")
LONGEST_NAME = 60
"""A licence field that is longer holds the licence's text."""


@dataclass(frozen=True)
class Wheel:
    """A file that is installed."""

    path: Path
    metadata: Message

    @property
    def name(self) -> str:
        """The package's name, in the one spelling that purls have."""
        return canonicalize_name(self.metadata["Name"])

    @property
    def sha256(self) -> str:
        """What the file is, whoever has it from where."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def read_wheel(path: Path) -> Wheel:
    """Return a wheel with what it says of itself."""
    with ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return Wheel(path, HeaderParser().parsestr(wheel.read(name).decode("utf-8")))


def fetch(lock: Path, python: str, machine: str, folder: Path) -> list[Wheel]:
    """Fetch all that the lock names and nothing else, by its hashes; returns it in the order of names."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC_MINOR[python], 4, -1)]
    wanted = [f"--platform={platform}" for platform in (*platforms, f"manylinux2014_{machine}", f"linux_{machine}")]
    command = [sys.executable, str(PIP_FOR), python, machine, "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *wanted]
    subprocess.run([*command, f"--dest={folder}", f"--requirement={lock}"], check=True)
    return sorted((read_wheel(path) for path in folder.glob("*.whl")), key=lambda wheel: wheel.name)


def licence_of(metadata: Message) -> Any:
    """Return the licence that a package declares: as an expression, else in its own words, else by its classifiers."""
    make = LicenseFactory().make_from_string
    declared = LicenseAcknowledgement.DECLARED
    if expression := metadata["License-Expression"]:
        return make(expression, license_acknowledgement=declared)
    said = (metadata["License"] or "").strip()
    if said not in NOT_SAID and len(said) <= LONGEST_NAME and "\n" not in said:
        return make(said, license_acknowledgement=declared)
    classifiers = [
        text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", ()) if text.startswith("License :: ")
    ]
    return make(", ".join(classifiers), license_acknowledgement=declared) if classifiers else None


def component(wheel: Wheel, kind: ComponentType) -> Component:
    """Return the entry of one package."""
    version = wheel.metadata["Version"]
    purl = PackageURL("pypi", None, wheel.name, version)
    licence = licence_of(wheel.metadata)
    return Component(
        type=kind,
        name=wheel.name,
        version=version,
        bom_ref=str(purl),
        purl=purl,
        description=wheel.metadata["Summary"],
        licenses=[licence] if licence else [],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=wheel.sha256)],
        properties=[Property(name="edge_asr:file", value=wheel.path.name)],
    )


def needs(wheel: Wheel, extras: Iterable[str], environment: dict[str, str]) -> set[str]:
    """Return the names of what a package needs there, with these extras."""
    found: set[str] = set()
    for text in wheel.metadata.get_all("Requires-Dist", ()):
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)):
            found.add(canonicalize_name(requirement.name))
    return found


def bill(
    own: Wheel, wheels: Iterable[Wheel], extras: Iterable[str], environment: dict[str, str], when: datetime
) -> Bom:
    """Return the bill: our own wheel, whose parts are the other ones."""
    top = component(own, ComponentType.APPLICATION)
    parts = {wheel.name: component(wheel, ComponentType.LIBRARY) for wheel in wheels}
    # One and the same for the same release, and another for every other.
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"{top.purl}#{own.sha256}")
    bom = Bom(serial_number=serial, metadata=BomMetaData(component=top, timestamp=when), components=parts.values())
    for wheel, entry, wanted in [(own, top, extras), *((wheel, parts[wheel.name], ()) for wheel in wheels)]:
        missing = needs(wheel, wanted, environment) - set(parts)
        if missing:
            sys.exit(f"sbom: the lock lacks {', '.join(sorted(missing))}, which {wheel.name} needs: make the lock anew")
        bom.register_dependency(entry, [parts[name] for name in sorted(needs(wheel, wanted, environment))])
    return bom


def main() -> None:
    """Write the bill that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, kind in (("lock", Path), ("wheels", Path), ("own", Path), ("out", Path)):
        parser.add_argument(f"--{option}", type=kind, required=True)
    parser.add_argument("--python", choices=GLIBC_MINOR, required=True)
    parser.add_argument("--machine", choices=("x86_64", "aarch64"), required=True)
    parser.add_argument("--extras", type=lambda text: text.split(","), required=True)
    asked = parser.parse_args()
    try:
        wheels = fetch(asked.lock, asked.python, asked.machine, asked.wheels)
    except subprocess.CalledProcessError:
        sys.exit(f"sbom: what {asked.lock} names cannot be had; see above")
    when = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), timezone.utc)
    environment = target_environment(asked.python, asked.machine)
    made = bill(read_wheel(asked.own), wheels, asked.extras, environment, when)
    asked.out.write_text(JsonV1Dot6(made).output_as_string(indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
