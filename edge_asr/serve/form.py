"""Forms (multipart/form-data), taken apart as they come; all of a form stays in memory."""

from __future__ import annotations

import logging

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from edge_asr.serve.errors import RefusedError

FORM = "multipart/form-data"
FILE = "file"
"""The only field that may be a file."""
MOST_FIELDS = 32
FIELD_BYTES = 65_536

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # its warnings are what clients do wrong: they are told


class Form:
    """One form. Whoever writes to it bounds its size."""

    def __init__(self, content_type: str) -> None:
        """Raises RefusedError."""
        self.fields: dict[str, list[str]] = {}
        """What was sent for each name; `name[]` counts as `name`."""
        self.file: bytearray | None = None
        self._name = ""
        self._part = bytearray()
        self._is_file = False
        self._count = 0
        self._header, self._value, self._disposition = b"", b"", b""
        self._complete = False
        _, options = parse_options_header(content_type)
        if not options.get(b"boundary"):
            raise _unreadable("its boundary is missing in Content-Type")
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_header,
                    "on_header_value": self._add_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._add_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _unreadable("its boundary is too long") from error

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises RefusedError."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _unreadable("it is not built as a form") from error

    def finish(self) -> None:
        """Raise RefusedError where something is missing."""
        if not self._complete:
            raise _unreadable("its end is missing")

    def _begin_part(self) -> None:
        self._disposition = b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _unreadable("a part of it has no name")
        self._name = options[b"name"].decode(errors="replace").removesuffix("[]")
        self._is_file = b"filename" in options
        self._part = bytearray()
        if self._is_file:
            self._begin_file()
        else:
            self._count += 1
            if self._count > MOST_FIELDS:
                raise _unreadable(f"it has more than {MOST_FIELDS} fields")

    def _begin_file(self) -> None:
        if self._name != FILE:
            raise RefusedError(400, f"the file is expected in the field {FILE}", param=FILE)
        if self.file is not None:
            raise RefusedError(400, "there is more than one file; send them one by one", param=FILE)
        self.file = self._part

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._part += memoryview(data)[start:end]
        if not self._is_file and len(self._part) > FIELD_BYTES:
            raise _unreadable(f"a field of it has more than {FIELD_BYTES} bytes")

    def _end_part(self) -> None:
        if not self._is_file:
            self.fields.setdefault(self._name, []).append(self._part.decode(errors="replace"))

    def _end(self) -> None:
        self._complete = True


def _unreadable(why: str) -> RefusedError:
    return RefusedError(400, f"the form cannot be read: {why}; send it as curl -F does")
