"""Events of Wyoming, read within bounds: a JSON line, more JSON, then raw bytes, each as long as the line says."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

from wyoming.event import Event, Eventable, write_event

LINE_BYTES = 65_536
"""The JSON line."""
DATA_BYTES = 65_536
"""The JSON after it."""
PAYLOAD_BYTES = 1 << 20
"""The raw bytes: half a minute of 16 kHz, 16 bits. Clients send pieces of a fraction of a second."""


class BadEventError(Exception):
    """What came is no event, or too long a one; the text says so to the client."""


async def read_event(reader: asyncio.StreamReader) -> Event | None:
    """Return the next event, None at the end of the stream.

    The reader's limit is that of the line. Raises BadEventError, after which the stream makes no sense any more.
    """
    try:
        line = await reader.readuntil(b"\n")
        head = _object(line)
        data_bytes, payload_bytes = (
            _length(head, "data_length", DATA_BYTES),
            _length(head, "payload_length", PAYLOAD_BYTES),
        )
        data = _data(head.get("data"))
        if data_bytes:
            data.update(_object(await reader.readexactly(data_bytes)))
        payload = await reader.readexactly(payload_bytes) if payload_bytes else None
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError:
        raise BadEventError(f"no line of JSON within {LINE_BYTES} bytes") from None
    kind = head.get("type")
    if not isinstance(kind, str):
        raise BadEventError("an event needs a type, which is text")
    return Event(kind, data, payload)


def bytes_of(event: Eventable) -> bytes:
    """Return an event as it is sent."""
    out = io.BytesIO()
    write_event(event.event(), out)
    return out.getvalue()


def text_in(event: Event, key: str) -> str | None:
    """Return a text of an event, None where it has none. Raises BadEventError for anything else."""
    value = event.data.get(key)
    if value is not None and not isinstance(value, str):
        raise BadEventError(f"{key} of {event.type[:40]} should be text")
    return value


def number_in(event: Event, key: str) -> int:
    """Return a whole number of an event. Raises BadEventError."""
    value = event.data.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadEventError(f"{event.type[:40]} needs {key}, a whole number")
    return value


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise BadEventError("what was sent is no JSON") from None
    return _data(found if found is not None else [])


def _data(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadEventError("an event, and its data, should be JSON objects")
    return value


def _length(head: dict[str, Any], key: str, most: int) -> int:
    value = head.get(key)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise BadEventError(f"{key} should be 0 to {most}")
    return value
