"""`edge-asr forget`: erase what the appliance keeps of what was said."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from edge_asr.config import Config
from edge_asr.publish.outbox import outbox_path
from edge_asr.publish.outbox_erasure import erase


def forget(settings: Config) -> None:
    """Erase the outbox, and print what is gone. Raises EdgeAsrError."""
    path = outbox_path(settings.outbox, settings.state_dir)
    with _as_owner_of(path):
        erased = erase(path)
    print(f"erased {erased.rows} transcripts in {path}, {erased.pending} of which no broker had acknowledged")
    if erased.damaged:
        print(f"removed {erased.damaged} files that had been set aside as damaged")


@contextlib.contextmanager
def _as_owner_of(path: Path) -> Iterator[None]:
    """Be the user whose file it is: of files that root makes beside it the service could use none."""
    if os.geteuid() != 0 or not path.exists():
        yield
        return
    owner, group = path.stat().st_uid, os.getegid()
    os.setegid(path.stat().st_gid)
    os.seteuid(owner)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
