"""The WebSocket /stream_recognize: sound in as it is spoken, partials and finals out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from edge_asr.errors import BusyError, EdgeAsrError, NotReadyError
from edge_asr.serve.context import Context
from edge_asr.serve.pcm import RATES, PcmStream
from edge_asr.serve.replies import Replies, Reply
from edge_asr.service import SpeechService, SpeechStream
from edge_asr.types import SAMPLE_RATE, Transcript

log = logging.getLogger(__name__)

SOURCE = "websocket"
NORMAL, UNSUPPORTED, POLICY, INTERNAL, TRY_AGAIN = 1000, 1003, 1008, 1011, 1013
LARGEST_TEXT = 65_536
"""Characters of a text frame."""
REASON_BYTES = 120
"""Of a close frame; it holds 123."""


class Hello(BaseModel):
    """What a client may say first."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["config"]
    sample_rate: int = Field(default=SAMPLE_RATE, ge=RATES[0], le=RATES[1])
    partials: bool = True
    preset: str | None = None


class ClientError(Exception):
    """The client did what it may not, or cannot be served: it is told, and the connection closed."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def routes(context: Context) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.websocket("/stream_recognize")
    async def stream_recognize(socket: WebSocket) -> None:
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it has gone; RuntimeError: while we wrote
            try:
                context.admission.check()
                await _Session(socket, context.service, context.config.limits.idle_s).run()
            except ClientError as error:
                await refuse(socket, error)
            except EdgeAsrError as error:
                await refuse(socket, client_error(error))

    return router


def client_error(error: EdgeAsrError) -> ClientError:
    """Return how a client is told of an error of ours."""
    if isinstance(error, (BusyError, NotReadyError)):
        return ClientError(TRY_AGAIN, str(error))
    log.error("a stream failed: %s", error)
    return ClientError(INTERNAL, "the recognition failed; see the log of edge-asr")


async def refuse(socket: WebSocket, error: ClientError) -> None:
    """Tell why, and close."""
    message = {"type": "error", "error": {"message": str(error), "code": error.code}}
    await socket.send_text(json.dumps(message, ensure_ascii=False))
    await close(socket, error.code, str(error))


async def close(socket: WebSocket, code: int, reason: str) -> None:
    """Close, with as much of the reason as a close frame holds."""
    if socket.application_state == WebSocketState.CONNECTED:
        await socket.close(code, reason.encode()[:REASON_BYTES].decode(errors="ignore"))


async def received(socket: WebSocket, idle_s: float) -> str | bytes:
    """Return the next frame. Raises WebSocketDisconnect, ClientError."""
    try:
        message = await asyncio.wait_for(socket.receive(), idle_s)
    except asyncio.TimeoutError:
        raise ClientError(POLICY, f"nothing came for {idle_s:g} s; connect again when there is sound") from None
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", NORMAL))
    if (data := message.get("bytes")) is not None:
        return bytes(data)
    text = str(message.get("text", ""))
    if len(text) > LARGEST_TEXT:
        raise ClientError(UNSUPPORTED, f"a text frame of more than {LARGEST_TEXT} characters; send sound as binary")
    return text


def json_object(text: str) -> Mapping[str, Any]:
    """Return the object of a text frame. Raises ClientError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ClientError(UNSUPPORTED, "a text frame should be a JSON object; send sound as binary")
    return found


async def together(*parts: Any) -> None:
    """Run coroutines until the first has ended; the others are cancelled. Raises what it raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if task in done:
            task.result()


class _Session:
    """One client."""

    def __init__(self, socket: WebSocket, service: SpeechService, idle_s: float) -> None:
        self._socket = socket
        self._service = service
        self._idle_s = idle_s
        self._replies = Replies()
        self._stream: SpeechStream | None = None
        self._pcm = PcmStream()

    async def run(self) -> None:
        try:
            await together(self._listen(), self._speak())
        finally:
            if self._stream is not None:
                self._stream.cancel()

    async def _listen(self) -> None:
        """Hear the client out, then say that this was all, and wait to be closed."""
        frame = await received(self._socket, self._idle_s)
        hello = Hello(type="config")
        if isinstance(frame, str) and json_object(frame).get("type") != "end":
            hello = _hello(frame)
            frame = await received(self._socket, self._idle_s)
        self._pcm = PcmStream(hello.sample_rate)
        self._stream = self._open(hello)
        while not isinstance(frame, str):
            await self._stream.push(self._pcm.push(frame))
            frame = await received(self._socket, self._idle_s)
        if (kind := json_object(frame).get("type")) != "end":
            raise ClientError(UNSUPPORTED, f'type {str(kind)[:32]!r} now; send sound, or {{"type": "end"}}')
        await self._stream.push(self._pcm.flush())
        self._stream.end()
        await self._stream.flush()
        self._replies.end()
        await asyncio.Event().wait()

    def _open(self, hello: Hello) -> SpeechStream:
        try:
            return self._service.stream(self._replies, SOURCE, partials=hello.partials, preset=hello.preset)
        except ValueError as error:
            raise ClientError(UNSUPPORTED, str(error)) from None

    async def _speak(self) -> None:
        while (reply := await self._replies.next()) is not None:
            await self._socket.send_text(json.dumps(_json(reply), ensure_ascii=False))
        if self._replies.overrun:
            raise ClientError(POLICY, "the client does not read what it is sent; read faster")
        await self._socket.send_text('{"type": "end"}')
        await close(self._socket, NORMAL, "all is said")


def _hello(text: str) -> Hello:
    try:
        return Hello.model_validate(json_object(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ClientError(UNSUPPORTED, f'{where}: {first["msg"]}; send {{"type": "config", ...}}, or sound') from None


def _json(reply: Reply) -> dict[str, Any]:
    return {"type": "final" if isinstance(reply, Transcript) else "partial", **reply.to_json()}
