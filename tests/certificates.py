"""Certificates made by the `openssl` program: an authority, and what it signs for brokers and clients."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
"""Kind of all keys: made in no time."""


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, in PEM form."""

    file: Path
    key: Path


class Authority:
    """Signs certificates; who trusts `file` trusts them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.file = folder / f"{name}.crt"
        self._key = folder / f"{name}.key"
        self._folder = folder
        subject = ("-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign")
        openssl("req", "-x509", *KEY, "-noenc", "-days", "2", *subject, "-keyout", self._key, "-out", self.file)

    def issue(
        self, name: str, hosts: Sequence[str] = (), *, days: int = 2, key_password: Path | None = None
    ) -> Certificate:
        """Return a new certificate, valid for these DNS names and addresses; with -1 days it has expired."""
        made = Certificate(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        lock = ("-passout", f"file:{key_password}") if key_password else ("-noenc",)
        openssl("req", *KEY, *lock, "-subj", f"/CN={name}", "-keyout", made.key, "-out", request)
        names = ",".join(f"{'IP' if host[0].isdigit() else 'DNS'}:{host}" for host in hosts)
        extensions.write_text(f"subjectAltName={names}\n" if names else "basicConstraints=CA:FALSE\n")
        signer = ("-CA", self.file, "-CAkey", self._key, "-CAcreateserial", "-days", days)
        openssl("x509", "-req", "-in", request, *signer, "-extfile", extensions, "-out", made.file)
        return made


@dataclass(frozen=True)
class Certificates:
    """What tests of TLS need."""

    authority: Authority
    foreign: Authority
    """Nobody trusts it."""
    server: Certificate
    """For localhost and 127.0.0.1."""
    client: Certificate


def make_certificates(folder: Path) -> Certificates:
    authority, foreign = Authority(folder, "authority"), Authority(folder, "foreign-authority")
    server = authority.issue("broker", ("localhost", "127.0.0.1"))
    return Certificates(authority, foreign, server, authority.issue("appliance"))


def openssl(*arguments: object) -> None:
    result = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
