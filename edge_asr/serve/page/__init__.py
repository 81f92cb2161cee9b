"""The page at /, and /captions, which it is told everything by. What is beside this module is sent as it is."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from edge_asr.serve.context import Context
from edge_asr.serve.errors import RefusedError
from edge_asr.serve.login import WITH_ORIGIN
from edge_asr.serve.replies import Outgoing
from edge_asr.serve.websocket import POLICY, TRY_AGAIN, ClientError, refuse, together

FOLDER = Path(__file__).parent
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""Of the page: what is said there can be nothing but text."""


def routes(context: Context) -> APIRouter:
    """Return the routes; none of them is of interest to programs but /captions."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in KINDS}

    @router.get("/")
    async def page() -> Response:
        return Response(
            files["index.html"],
            headers={"content-security-policy": CONTENT_POLICY, **WITH_ORIGIN},
            media_type=KINDS[".html"],
        )

    @router.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in files:
            raise RefusedError(404, "no such part of the page", code="not_found")
        return Response(files[name], media_type=KINDS[Path(name).suffix])

    @router.websocket("/captions")
    async def captions(socket: WebSocket) -> None:
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it has gone; RuntimeError: while we wrote
            try:
                await _show(context, socket)
            except ClientError as error:
                await refuse(socket, error)

    return router


async def _show(context: Context, socket: WebSocket) -> None:
    """Tell a viewer everything until it goes. Raises ClientError, WebSocketDisconnect."""
    if context.captions.crowded:
        raise ClientError(TRY_AGAIN, "too many watch already; close another page")
    await socket.send_json({"type": "hello", "login": context.access.required})
    with context.captions.watching() as viewer:
        await together(_until_gone(socket), _tell(socket, viewer))


async def _until_gone(socket: WebSocket) -> None:
    """Wait for the viewer to go; it has nothing to say."""
    message = await socket.receive()
    if message["type"] != "websocket.disconnect":
        raise ClientError(POLICY, "nothing is taken here; sound goes to /stream_recognize")


async def _tell(socket: WebSocket, viewer: Outgoing[str]) -> None:
    while (text := await viewer.next()) is not None:
        await socket.send_text(text)
    raise ClientError(POLICY, "what is said is not read fast enough; connect again")
