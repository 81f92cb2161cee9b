"""Remove from a folder what its .dockerignore names, so that the folder is all that Docker would be sent of it.

Usage: python scripts/context.py FOLDER
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

WILD = re.compile(r"(\*\*/?|\*|\?|\\.|\[[^]]+\])")
KEPT = re.compile(r"Dockerfile(\..*)?|\.dockerignore")
"""What Docker is sent in any case."""


def expression(pattern: str) -> re.Pattern[str]:
    """Return what a pattern matches: from the top, `*` within one folder, `**` over any number of them."""
    meant = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = []
    for k, part in enumerate(WILD.split(pattern)):
        if k % 2 == 0:
            parts.append(re.escape(part))
        elif part.startswith("["):
            parts.append("[" + part[1:].replace("[", r"\["))
        else:
            parts.append(meant.get(part, part))
    return re.compile("".join(parts))


def rules(text: str) -> list[tuple[bool, re.Pattern[str]]]:
    """Return for each line of a .dockerignore whether it takes files out, or back in, and which."""
    found = []
    for line in text.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            path = posixpath.normpath(pattern.removeprefix("!").strip()).lstrip("/")
            found.append((not pattern.startswith("!"), expression(path)))
    return found


def left_out(name: str, ignoring: Sequence[tuple[bool, re.Pattern[str]]]) -> bool:
    """Is the file ignored? The last rule that matches it, or a folder that it is in, decides."""
    within = [name, *(str(parent) for parent in PurePosixPath(name).parents)]
    decisions = [out for out, pattern in ignoring if any(pattern.fullmatch(path) for path in within)]
    return bool(decisions) and decisions[-1] and not KEPT.fullmatch(PurePosixPath(name).name)


def prune(folder: Path) -> None:
    """Remove the files that are ignored, and the folders that are empty then."""
    ignore = folder / ".dockerignore"
    ignoring = rules(ignore.read_text(encoding="utf-8")) if ignore.exists() else []
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif left_out(path.relative_to(folder).as_posix(), ignoring):
            path.unlink()


if __name__ == "__main__":
    prune(Path(sys.argv[1]))
