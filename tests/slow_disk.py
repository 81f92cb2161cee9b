"""A disk that takes long to sync, made of a shared library that is loaded before all others (LD_PRELOAD)."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "data" / "slow_fsync.c"


@dataclass(frozen=True)
class Sync:
    """An fsync or fdatasync, noted as it began."""

    at: float
    """Monotonic seconds, as of `time.monotonic`."""
    thread: int
    """As of `threading.get_native_id`; that of the main thread is the process's."""
    path: str


@dataclass(frozen=True)
class SlowDisk:
    """What a child process needs so that each fsync below a folder sleeps, and is noted.

    `subprocess.Popen(..., env={**os.environ, **disk.environment})`; then `disk.syncs()`.
    """

    library: Path
    folder: Path
    log: Path
    ms: int

    @property
    def environment(self) -> dict[str, str]:
        """What is to be added to the environment of the child."""
        return {
            "LD_PRELOAD": str(self.library),
            "SLOW_FOLDER": str(self.folder),
            "SLOW_LOG": str(self.log),
            "SLOW_MS": str(self.ms),
        }

    def syncs(self) -> list[Sync]:
        """Return what was noted so far, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        noted = (line.split(" ", 3) for line in lines)
        return [Sync(float(at), int(thread), path) for at, thread, _, path in noted]


def make_slow_disk(tmp_path: Path, folder: Path, ms: int) -> SlowDisk:
    """Compile the library into `tmp_path`; each fsync of a file below `folder` (real path) takes `ms` longer."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("not installed: a C compiler (Debian: apt install gcc libc6-dev)")
    library = tmp_path / "slow_fsync.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, SOURCE], check=True)
    return SlowDisk(library, folder.resolve(), tmp_path / "syncs.log", ms)
