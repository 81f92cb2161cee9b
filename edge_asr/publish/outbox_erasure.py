"""Erasing all that an outbox has on disk, or asking the service that has it to do so; numbers go on."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_asr.errors import EdgeAsrError
from edge_asr.publish.outbox_file import OutboxFile, OutboxOwnedError, Owner
from edge_asr.publish.outbox_schema import damaged_copies, is_there
from edge_asr.publish.outbox_trouble import in_words

PATIENCE_S = 60.0
"""How long the service, or the disk, may take."""
LOOK_S = 0.05
FAULTS = (sqlite3.Error, OSError)


@dataclass(frozen=True, slots=True)
class Erased:
    """What is gone."""

    rows: int
    """Transcripts."""
    pending: int
    """Those of them that no broker has acknowledged."""
    damaged: int
    """Files that had been set aside."""


class Wish:
    """A file beside the outbox that asks whoever has the outbox to erase it; it vanishes once that is done."""

    def __init__(self, outbox: Path) -> None:
        self._path = outbox.with_name(f"{outbox.name}.forget")

    def seen(self) -> tuple[int, int] | None:
        """Return what tells one wish from another; None: nobody asks. Raises OSError."""
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_ctime_ns

    def ask(self) -> int:
        """Ask; return the handle that the answer is read from."""
        return os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def answer(self, answer: Erased | str) -> None:
        """Say what is gone, or why nothing is, and take the file away. Raises OSError."""
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.write(handle, json.dumps({"why": answer} if isinstance(answer, str) else asdict(answer)).encode())
            finally:
                os.close(handle)
        finally:
            self.withdraw()

    def withdraw(self) -> None:
        """Take the file away."""
        self._path.unlink(missing_ok=True)


def remove_damaged(outbox: Path) -> int:
    """Remove the files that were set aside, whatever can still be read in them; return how many. Raises OSError."""
    copies = damaged_copies(outbox)
    for copy in copies:
        copy.unlink(missing_ok=True)
    return len(copies)


def erase(outbox: Path, patience_s: float = PATIENCE_S) -> Erased:
    """Erase the outbox and what was set aside of it; the service does it where it runs.

    Raises EdgeAsrError where that cannot be, or is not done in time.
    """
    try:
        if not is_there(outbox) and not damaged_copies(outbox):
            raise EdgeAsrError(
                f"there is no outbox at {outbox}, so nothing was erased; give the --config that the service runs with"
            )
        return _erase(outbox, patience_s)
    except PermissionError as error:
        raise EdgeAsrError(f"not erased: {outbox} is another user's; run this as root, or as that user") from error
    except FAULTS as error:
        raise EdgeAsrError(f"not erased: {in_words(error, outbox)}") from error


def _erase(outbox: Path, patience_s: float) -> Erased:
    wish, answers = Wish(outbox), None
    try:
        for _ in _until(patience_s):
            try:
                owner = Owner(outbox)
            except OutboxOwnedError:
                answers = wish.ask() if answers is None else answers
                if os.fstat(answers).st_nlink == 0:
                    return _read(answers)
            else:
                try:
                    return _erase_ourselves(outbox, patience_s)
                finally:
                    owner.release()
        raise EdgeAsrError(
            f"the service that has {outbox} did not erase it within {patience_s:.0f} s; "
            "stop it (systemctl stop edge-asr) and repeat this"
        )
    finally:
        if answers is not None:
            wish.withdraw()
            os.close(answers)


def _read(handle: int) -> Erased:
    answer = json.loads(os.pread(handle, 1000, 0) or b'{"why": "the service says nothing; repeat this"}')
    if why := answer.get("why"):
        raise EdgeAsrError(f"not erased: {why}")
    return Erased(**answer)


def _erase_ourselves(outbox: Path, patience_s: float) -> Erased:
    file = OutboxFile(outbox)  # what is damaged is set aside by that
    try:
        rows, pending = file.erase()
        if not wait(file.is_erased, patience_s):
            raise EdgeAsrError(f"{outbox}: another program reads it, and so keeps the log with it; end that program")
    finally:
        file.close()
        file.syncing.close(patience_s)
    return Erased(rows, pending, remove_damaged(outbox))


def wait(condition: Callable[[], bool], patience_s: float) -> bool:
    """Return True as soon as the condition holds, False where it does not in time."""
    return any(condition() for _ in _until(patience_s))


def _until(patience_s: float) -> Iterator[None]:
    give_up_at = time.monotonic() + patience_s
    while time.monotonic() < give_up_at:
        yield
        time.sleep(LOOK_S)
