"""The files by which a machine tells what it is: /etc, /proc, /sys and /dev, below a root that tests choose."""

from __future__ import annotations

import grp
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

READ_LIMIT = 1 << 16
RELEASE_FILE = "etc/nv_tegra_release"
TEGRA_NODES = ("dev/nvmap", "dev/nvhost-ctrl-gpu", "dev/nvgpu")
NVIDIA_FILES = ("dev/nvidia0", "dev/nvidiactl", "proc/driver/nvidia/version")
CONTAINER_MARKS = (".dockerenv", "run/.containerenv")


def may_use(path: Path) -> bool:
    """Return whether this process may read and write a device node, whatever gives it the right to."""
    return os.access(path, os.R_OK | os.W_OK)


class Tree:
    """Reads files that may be absent, unreadable or damaged: what cannot be read is absent, never zero.

    All names are relative to the root, without a slash in front.
    """

    def __init__(self, root: Path = Path("/"), usable: Callable[[Path], bool] = may_use) -> None:
        self.root = root
        self._usable = usable

    def text(self, name: str) -> str | None:
        """Return the beginning of a file without surrounding space, None where it cannot be read."""
        try:
            with (self.root / name).open("rb") as file:
                return file.read(READ_LIMIT).decode(errors="replace").strip("\0 \t\r\n")
        except (OSError, ValueError):  # a sensor that is switched off gives EAGAIN
            return None

    def number(self, name: str) -> int | None:
        """Return the integer that a file holds, None where it holds none."""
        text = self.text(name)
        return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,18}", text) else None

    def has(self, *names: str) -> bool:
        """Return whether one of these files or folders is there."""
        return any(os.path.lexists(self.root / name) for name in names)

    def find(self, *patterns: str) -> list[str]:
        """Return the names that match, `cpu2` before `cpu10`."""
        found: set[str] = set()
        for pattern in patterns:
            try:
                found.update(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))
            except OSError:  # a folder that nobody may list
                continue
        return sorted(found, key=_natural)

    def unusable(self, names: Iterable[str]) -> list[str]:
        """Return which device nodes this process may not read and write."""
        return [name for name in names if not self._usable(self.root / name)]

    def groups(self, names: Iterable[str]) -> list[str]:
        """Return the groups that nodes belong to, by name, or by number where they have none here."""
        return sorted({name for name in map(self._group, names) if name})

    @property
    def is_jetson(self) -> bool:
        """Whether this is one: by its release file, its device tree, or its device nodes, in a container too."""
        compatible = self.text("proc/device-tree/compatible") or ""
        return self.has(RELEASE_FILE, *TEGRA_NODES) or "nvidia,tegra" in compatible

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU of NVIDIA's, seen from its driver's files; it may still be out of order."""
        return self.is_jetson or self.has(*NVIDIA_FILES)

    @property
    def in_container(self) -> bool:
        """Whether this is a container of Docker's or Podman's."""
        return self.has(*CONTAINER_MARKS)

    def _group(self, name: str) -> str:
        try:
            number = (self.root / name).stat().st_gid
        except OSError:
            return ""
        try:
            return grp.getgrgid(number).gr_name
        except KeyError:  # of the host, seen from a container
            return str(number)


def _natural(name: str) -> list[str | int]:
    # Text and digits take turns, so like is compared with like.
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]
