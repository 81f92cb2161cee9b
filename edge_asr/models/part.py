"""A file that is not all here yet: `<path>.part`, and beside it what is known of where it came from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from edge_asr.catalogue import ModelFile

SUFFIX = ".part"
NOTE_SUFFIX = ".part.json"


class WrongFileError(Exception):
    """A file is not what the catalogue says."""


class Part:
    """The beginning of one file from one address."""

    def __init__(self, folder: Path, file: ModelFile, url: str) -> None:
        self.file = file
        self.url = url
        self.target = folder / file.path
        self.path = folder / f"{file.path}{SUFFIX}"
        self.resumed = False
        """Whether some of it came in another answer than the last one."""
        self.reached = 0
        """The most bytes that were here since `begin`."""
        self._note_path = folder / f"{file.path}{NOTE_SUFFIX}"
        self._note = _read_note(self._note_path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def size(self) -> int:
        """Bytes that are here."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def total(self) -> int | None:
        """Bytes of the whole file, as far as known."""
        return self._note.get("total") if self.file.size is None else self.file.size

    @property
    def complete(self) -> bool:
        """Whether all bytes are here, right or wrong."""
        return self.total is not None and self.size == self.total

    def begin(self) -> None:
        """Keep what can be continued from this address, discard the rest."""
        same = self._note.get("url") == self.url and (self._note.get("validator") or self.complete)
        # Where the hash is known, bytes of any source are as good: a wrong one shows at the end.
        usable = self.file.sha256 is not None or same
        if not usable or (self.total is not None and self.size > self.total):
            self.discard()
        self.reached = self.size
        self.resumed = self.size > 0

    def resume_headers(self) -> dict[str, str]:
        """Return what asks for the rest, and for the rest of this very version where it has a name."""
        if not self.size:
            return {}
        headers = {"Range": f"bytes={self.size}-"}
        validator = self._note.get("validator")
        return {**headers, "If-Range": validator} if validator and self._note.get("url") == self.url else headers

    def restart(self, validator: str | None, total: int | None) -> None:
        """Begin with the first byte. Emptied before it is noted what comes: never old bytes under a new name."""
        self.discard()
        self.resumed = False
        self._note = {"url": self.url, "validator": validator, "total": total}
        self._note_path.write_text(json.dumps(self._note), encoding="utf-8")

    def append(self, block: bytes) -> None:
        """Add bytes."""
        with self.path.open("ab") as out:
            out.write(block)
        self.reached = max(self.reached, self.size)

    def discard(self) -> None:
        """Forget all of it."""
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)
        self._note = {}

    def finish(self) -> None:
        """Check it and give it its name. Raises WrongFileError, and then nothing of it is left."""
        try:
            check(self.path, self.file)
        except WrongFileError:
            self.discard()
            raise
        sync(self.path)
        self.path.rename(self.target)
        self._note_path.unlink(missing_ok=True)


def check(path: Path, file: ModelFile) -> None:
    """Raise WrongFileError where size or hash of what lies at `path` are not those of the catalogue."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise WrongFileError("is missing")
    if file.size not in (None, size):
        raise WrongFileError(f"has {size} bytes instead of {file.size}")
    if file.sha256 is not None and (found := sha256(path)) != file.sha256:
        raise WrongFileError(f"has sha256 {found[:12]}… instead of {file.sha256[:12]}…")


def sha256(path: Path) -> str:
    """Return a file's hash in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
