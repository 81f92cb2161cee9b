"""FunASR's WebSocket protocol (modes online, offline, 2pass), so that its clients work unchanged.

They append online texts and replace them by the offline text of the segment, which is how everything here is worded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from edge_asr.config_server import FunasrConfig, LimitsConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.serve.access import AllowedNetworks
from edge_asr.serve.pcm import PcmStream
from edge_asr.serve.replies import Deltas, Replies
from edge_asr.serve.subtitles import cues
from edge_asr.serve.websocket import (
    POLICY,
    UNSUPPORTED,
    ClientError,
    client_error,
    close,
    json_object,
    received,
    together,
)
from edge_asr.service import SpeechService, SpeechStream
from edge_asr.types import Partial, Transcript

log = logging.getLogger(__name__)

SOURCE = "funasr"
ONLINE, OFFLINE, TWO_PASS = "online", "offline", "2pass"
MODES = (ONLINE, OFFLINE, TWO_PASS)
ONLINES = {ONLINE: "online", TWO_PASS: "2pass-online"}
FINALS = {ONLINE: "online", OFFLINE: "offline", TWO_PASS: "2pass-offline"}
"""The mode of a message, by that of the client."""
SUBPROTOCOL = "binary"
LONGEST_NAME = 256
WITHOUT_EFFECT = ("hotwords", "itn", "chunk_size", "chunk_interval", "encoder_chunk_look_back",
                  "decoder_chunk_look_back", "svs_lang", "svs_itn", "vad_tail_sil", "vad_max_len")  # fmt: skip


def make_funasr_app(service: SpeechService, config: FunasrConfig, limits: LimitsConfig) -> Starlette:
    """Return the application; any path will do."""
    networks = AllowedNetworks(config.allow_networks)

    async def serve(socket: WebSocket) -> None:
        if socket.client is None or not networks.admits(socket.client.host):
            await socket.close(POLICY, "this network may not come; see funasr.allow_networks")
            return
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None)
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it has gone; RuntimeError: while we wrote
            try:
                await _Session(socket, service, limits.idle_s).run()
            except ClientError as error:
                await _refuse(socket, error)
            except EdgeAsrError as error:
                await _refuse(socket, client_error(error))

    return Starlette(routes=[WebSocketRoute("/{path:path}", serve)])


async def _refuse(socket: WebSocket, error: ClientError) -> None:
    log.debug("a FunASR client: %s", error)
    await socket.send_text(json.dumps({"text": "", "is_final": True, "error": str(error)}, ensure_ascii=False))
    await close(socket, error.code, str(error))


class _Session:
    """One client: utterance after utterance."""

    def __init__(self, socket: WebSocket, service: SpeechService, idle_s: float) -> None:
        self._socket = socket
        self._service = service
        self._idle_s = idle_s
        self._replies = Replies()
        self._stream: SpeechStream | None = None
        self._pcm = PcmStream()
        self._at_head = True
        self._told = asyncio.Event()
        self._wording = Wording(TWO_PASS, "")

    async def run(self) -> None:
        try:
            await together(self._listen(), self._speak())
        finally:
            if self._stream is not None:
                self._stream.cancel()

    async def _listen(self) -> None:
        while True:
            frame = await received(self._socket, self._idle_s)
            if isinstance(frame, bytes):
                await self._hear(frame)
            else:
                await self._obey(json_object(frame))

    async def _hear(self, data: bytes) -> None:
        if self._stream is None:
            partials = self._wording.mode != OFFLINE
            self._stream = self._service.stream(self._replies, SOURCE, partials=partials)
        if self._at_head:
            self._at_head, data = False, _without_header(data)
        await self._stream.push(self._pcm.push(data))

    async def _obey(self, message: Mapping[str, Any]) -> None:
        """Take what a text frame says. Raises ClientError."""
        mode = message.get("mode", self._wording.mode)
        name = message.get("wav_name", self._wording.name)
        rate = message.get("audio_fs", self._pcm.kind[0])
        if mode not in MODES:
            raise ClientError(UNSUPPORTED, f"mode should be one of {', '.join(MODES)}")
        if not isinstance(name, str) or len(name) > LONGEST_NAME:
            raise ClientError(UNSUPPORTED, f"wav_name should be text of at most {LONGEST_NAME} characters")
        if message.get("wav_format", "pcm") not in ("pcm", "PCM", "wav"):
            raise ClientError(UNSUPPORTED, "wav_format should be pcm; send files to /recognize")
        if not isinstance(rate, int) or isinstance(rate, bool):
            raise ClientError(UNSUPPORTED, "audio_fs should be a number, such as 16000")
        if ignored := [key for key in WITHOUT_EFFECT if message.get(key)]:
            log.debug("a FunASR client sets what has no effect here: %s", ", ".join(ignored))
        if message.get("is_speaking") is False:
            await self._finish()
        elif (mode, name) != (self._wording.mode, self._wording.name):
            await self._change(mode, name)
        if rate != self._pcm.kind[0]:
            self._use(rate)

    def _use(self, rate: int) -> None:
        try:
            self._pcm = PcmStream(rate)
        except ValueError as error:
            raise ClientError(UNSUPPORTED, f"audio_fs: {error}") from None

    async def _change(self, mode: str, name: str) -> None:
        """Begin another utterance."""
        if self._stream is not None:
            await self._finish()
        self._wording = Wording(mode, name)

    async def _finish(self) -> None:
        """End the utterance, and say so."""
        if self._stream is not None:
            await self._stream.push(self._pcm.flush())
            self._stream.end()
            await self._stream.flush()
            self._stream = None
        rate = self._pcm.kind[0]
        self._pcm, self._at_head = PcmStream(rate), True
        self._told.clear()
        self._replies.mark()
        await self._told.wait()  # what comes next may be worded otherwise

    async def _speak(self) -> None:
        while True:
            reply = await self._replies.next()
            if self._replies.overrun:
                raise ClientError(POLICY, "the client does not read what it is sent; read faster")
            for message in self._wording.of(reply):
                await self._socket.send_text(json.dumps(message, ensure_ascii=False))
            if reply is None:
                self._wording = Wording(self._wording.mode, self._wording.name)
                self._told.set()


def _without_header(data: bytes) -> bytes:
    """Return the samples of a WAV file's beginning; other bytes are samples already."""
    place = data.find(b"data", 12)
    return data[place + 8 :] if data[:4] == b"RIFF" and data[8:12] == b"WAVE" and place > 0 else data


class Wording:
    """The messages of one utterance. Pure."""

    def __init__(self, mode: str, name: str) -> None:
        self.mode = mode
        self.name = name
        self._deltas = Deltas()

    def of(self, reply: Partial | Transcript | None) -> list[dict[str, Any]]:
        """Return what is sent for a reply; None: the end of the utterance."""
        if reply is None:
            text = self._deltas.said if self.mode == OFFLINE else ""
            return [{**self._message(FINALS[self.mode], text), "is_final": True}]
        if isinstance(reply, Partial) and not reply.end:
            return [] if self.mode == OFFLINE else self._online(self._deltas.grow(reply.stable))
        if isinstance(reply, Transcript) and self.mode == ONLINE:
            return self._online(self._deltas.settle(reply.text))
        text = self._deltas.replace(reply.text)  # which is none where a segment comes to nothing
        times = _times(reply) if isinstance(reply, Transcript) else {}
        return [{**self._message(FINALS[TWO_PASS], text), **times}] if self.mode == TWO_PASS else []

    def _online(self, delta: str) -> list[dict[str, Any]]:
        return [self._message(ONLINES[self.mode], delta)] if delta else []

    def _message(self, kind: str, text: str) -> dict[str, Any]:
        return {"mode": kind, "wav_name": self.name, "text": text, "is_final": False}


def _times(transcript: Transcript) -> dict[str, Any]:
    """Return the times of tokens and sentences, in milliseconds of the utterance, as FunASR's server words them."""
    offset_ms = round((transcript.offset_s or 0.0) * 1e3)
    if not transcript.tokens or any(token.start_ms is None or token.end_ms is None for token in transcript.tokens):
        return {}
    spans = [[offset_ms + (t.start_ms or 0), offset_ms + (t.end_ms or 0)] for t in transcript.tokens]
    sentences = [
        {"text_seg": cue.text, "punc": "", "start": round(cue.start_s * 1e3), "end": round(cue.end_s * 1e3)}
        for cue in cues(transcript)
    ]
    return {"timestamp": json.dumps(spans, separators=(",", ":")), "stamp_sents": sentences}
