"""What the disk says, in words."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

from edge_asr.publish.outbox_schema import ForeignFileError, is_damage


def is_full(error: BaseException) -> bool:
    """Tell whether there is no room left, on the disk or in the file."""
    return "is full" in str(error) or _number(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def leaves_file_usable(error: BaseException) -> bool:
    """Tell whether the file can still be read, and written once what is wrong is over, without opening it again."""
    return is_full(error) or _is_busy(error)


def in_words(error: Exception, path: Path) -> str:
    """Return one line that says what is wrong, and what to do about it."""
    if isinstance(error, ForeignFileError):
        return str(error)
    if is_full(error):
        return f"the disk with {path} is full; free some space"
    if is_damage(error):
        return f"{path} is damaged; it will be set aside"
    if _is_busy(error):
        return f"another program holds a lock on {path}; end it"
    if isinstance(error, PermissionError) or _number(error) == errno.EROFS or "readonly" in str(error):
        return f"{path} cannot be written; let the appliance's user write to it and to its folder"
    if isinstance(error, sqlite3.Error) and "disk I/O" in str(error):
        return f"{path}: the disk fails ({error}); replace it, or set outbox.file to another one"
    return f"{path} cannot be used ({error}); look after its disk and folder"


def _is_busy(error: BaseException) -> bool:
    return "locked" in str(error)


def _number(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None
