"""The audio that comes with a request, as a form or as the body itself; none of it ever touches the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, Request

from edge_asr.serve.errors import RefusedError
from edge_asr.serve.form import FIELD_BYTES, FORM, MOST_FIELDS, Form
from edge_asr.serve.limits import content_type

_T = TypeVar("_T")

RAW = ("audio/", "video/", "application/octet-stream")


@dataclass(frozen=True, slots=True)
class Upload:
    """What a request brought."""

    data: bytes | bytearray
    """The file; empty where there was none."""
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The others; `name[]` counts as `name`."""
    has_file: bool = True

    def one(self, name: str) -> str | None:
        """Return a field that may be there once. Raises RefusedError."""
        values = self.fields.get(name, ())
        if len(values) > 1:
            raise RefusedError(400, f"{name} is there {len(values)} times; send it once", param=name)
        return values[0] if values else None


async def read_upload(request: Request, *, raw: bool = False) -> Upload:
    """Return the file and the fields of a form; `raw`: the body itself may be the file. Raises RefusedError."""
    kind = content_type(request.headers)
    try:
        if raw and kind.startswith(RAW):
            return Upload(await request.body())
        if kind == FORM:
            return await _read_form(request)
    except ClientDisconnect:
        raise _ended() from None
    also = " or the audio itself as audio/wav or another audio type" if raw else ""
    raise RefusedError(415, f"send a form (multipart/form-data) with a file in it{also}", code="unsupported_media_type")


async def read_fields(request: Request) -> dict[str, str]:
    """Return the fields of a small form that a page sends. Raises RefusedError."""
    body = await read_small(request, FIELD_BYTES)
    try:
        return dict(parse_qsl(body.decode("ascii"), max_num_fields=MOST_FIELDS))
    except ValueError:
        raise RefusedError(400, "the form cannot be read; send the form of the page") from None


async def read_small(request: Request, most: int) -> bytes:
    """Return a body of no more than so many bytes. Raises RefusedError."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise RefusedError(413, f"more than {most} bytes; nothing here needs as many", code="too_large")
    except ClientDisconnect:
        raise _ended() from None
    return body


def _ended() -> RefusedError:
    return RefusedError(400, "the connection ended in the middle of the body")


async def _read_form(request: Request) -> Upload:
    form = Form(request.headers["content-type"])
    async for part in request.stream():
        form.write(part)
    form.finish()
    return Upload(form.file or b"", form.fields, form.file is not None)


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Do some work, and give it up when the client goes. Raises what the work raises; nobody sees an answer then."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RefusedError(499, "the client has gone")
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collected(items: AsyncGenerator[_T, None]) -> list[_T]:
    """Return all of what is generated, and close it whatever happens."""
    try:
        return [item async for item in items]
    finally:
        await items.aclose()
