"""Logging: one line a record on standard error, whatever is in it; no spoken text at INFO."""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from edge_asr.config import LogConfig
from edge_asr.types import iso_time

ERROR_MARK: Final = "<3>"
MARKS = ((logging.CRITICAL, "<2>"), (logging.ERROR, ERROR_MARK), (logging.WARNING, "<4>"), (logging.INFO, "<6>"))
"""What the journal knows a priority by (sd-daemon(3)), from which level on."""
DEBUG_MARK = "<7>"
LONGEST = 12_000
"""Characters of a line: the journal cuts after 48 KiB, and would take a mark from what begins there."""
LONGEST_OBJECT = 48_000
"""Bytes of an object, for the same reason."""
KEPT = 3_900
"""Characters of the message, and of the traceback, that are kept of an object that would be longer."""
_INVISIBLE = r"\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # C1, other ends of lines, other directions
_UNSAFE = re.compile(rf"[\x00-\x1f{_INVISIBLE}\ud800-\udfff]")
_UNSEEN = re.compile(f"[{_INVISIBLE}]")


def set_up(config: LogConfig) -> None:
    """Send records of a level and above to standard error; called again, it changes both for what follows."""
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter(config.format))
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [handler]  # in one step: no record of another thread is lost, or written twice
    root.setLevel(config.level)
    for old in before:
        old.close()


def in_journal() -> bool:
    """Tell whether standard error is the journal itself: systemd leaves its device and inode (systemd.exec(5))."""
    try:
        found = os.fstat(2)
    except OSError:  # closed by whoever started the program
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def one_line(text: str) -> str:
    """Return a text without ends of lines and control characters, which names of files and devices may have."""
    line = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}… ({len(line) - LONGEST} more characters)"


def _formatter(name: str) -> logging.Formatter:
    if name == "json":
        return _Json()
    return _Journal() if name == "auto" and in_journal() else _Text()


class _Formatter(logging.Formatter):
    """Finds what there is to write; that an argument cannot be written is no reason to write nothing."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        message = _attempt("message", record, record.getMessage)
        return self.compose(record, message, _attempt("traceback", record, lambda: self._trace(record)))

    def compose(self, record: logging.LogRecord, message: str, trace: str) -> str:
        """Return the lines of a record with a traceback, which may be empty."""
        raise NotImplementedError

    def _trace(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
        return "\n".join(part for part in (trace, record.stack_info) if part)


class _Text(_Formatter):
    """A line with the time, and those of a traceback below it: indented, so that none can pass for a record."""

    def compose(self, record: logging.LogRecord, message: str, trace: str) -> str:
        return f"{self.formatTime(record)} " + "\n".join(_lines(record, message, trace))


class _Journal(_Formatter):
    """The same without the time, and with the priority on every line: to the journal each is a record."""

    def compose(self, record: logging.LogRecord, message: str, trace: str) -> str:
        mark = next((mark for level, mark in MARKS if record.levelno >= level), DEBUG_MARK)
        return "\n".join(f"{mark}{line}" for line in _lines(record, message, trace))


class _Json(_Formatter):
    """One object; no priority in front of it, which would have to be taken off again."""

    def __init__(self) -> None:
        super().__init__()
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        self._ascii = codecs.lookup(encoding).name != "utf-8"  # what cannot be encoded would break the object

    def compose(self, record: logging.LogRecord, message: str, trace: str) -> str:
        line = self._object(record, message, trace)
        if len(line.encode()) > LONGEST_OBJECT:
            line = self._object(record, message[:KEPT], trace[-KEPT:])
        return line

    def _object(self, record: logging.LogRecord, message: str, trace: str) -> str:
        fields: dict[str, Any] = {
            "time": iso_time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": message,
            "thread": record.threadName,
        }
        if trace:
            fields["exception"] = trace
        whole = {key: value and value.encode(errors="backslashreplace").decode() for key, value in fields.items()}
        line = json.dumps(whole, ensure_ascii=self._ascii)
        return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def _lines(record: logging.LogRecord, message: str, trace: str) -> Iterator[str]:
    yield one_line(f"{record.levelname:7} {record.name}: {message}")
    yield from (f"  {one_line(line)}" for line in trace.split("\n") if line)


def _attempt(what: str, record: logging.LogRecord, write: Callable[[], str]) -> str:
    try:
        return write()
    except Exception as error:  # noqa: BLE001 - an argument may raise anything when it is asked for its text
        return f"{record.filename}:{record.lineno}: this {what} cannot be written ({type(error).__name__})"
