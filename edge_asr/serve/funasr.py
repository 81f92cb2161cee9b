"""FunASR's WebSocket protocol (modes online, offline, 2pass), so that its clients work unchanged.

They append online texts and replace them by the offline text of the segment, which is how everything here is worded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from edge_asr.config_server import FunasrConfig, LimitsConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.serve.access import AllowedNetworks
from edge_asr.serve.pcm import PcmStream
from edge_asr.serve.replies import Deltas, Replies
from edge_asr.serve.subtitles import Span, cues, words
from edge_asr.serve.wav_head import beginning
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
from edge_asr.types import SAMPLE_RATE, Partial, Transcript

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
                await _Session(socket, service, limits).run()
            except ClientError as error:
                await _refuse(socket, error)
            except EdgeAsrError as error:
                await _refuse(socket, client_error(error))

    return Starlette(routes=[WebSocketRoute("/{path:path}", serve)])


async def _refuse(socket: WebSocket, error: ClientError) -> None:
    log.debug("a FunASR client: %s", error)
    # Clients that wait for the end of an utterance take this for one that failed; the others see the connection close.
    message = {"text": "", "is_final": False, "is_end": True, "error": str(error)}
    await socket.send_text(json.dumps(message, ensure_ascii=False))
    await close(socket, error.code, str(error))


class _Session:
    """One client: utterance after utterance."""

    def __init__(self, socket: WebSocket, service: SpeechService, limits: LimitsConfig) -> None:
        self._socket = socket
        self._service = service
        self._idle_s, self._longest_s = limits.idle_s, limits.audio_s
        self._replies = Replies()
        self._stream: SpeechStream | None = None
        self._rate = SAMPLE_RATE
        self._pcm = PcmStream()
        self._head: bytes | None = b""
        """The first bytes of an utterance, until they tell what follows."""
        self._told = asyncio.Event()
        self._heard_s = 0.0
        """Of an utterance."""
        self._ending = False
        """The client has said all of it."""
        # The one client that names no mode sends recordings, and counts one message for each.
        self._wording = Wording(OFFLINE, "")

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
        if self._head is not None:
            data = self._behind_head(self._head + data)
        samples = self._pcm.push(data)
        self._heard_s += len(samples) / SAMPLE_RATE
        if self._wording.mode == OFFLINE and self._heard_s > self._longest_s:
            raise ClientError(POLICY, f"a recording of more than {self._longest_s:g} s; cut it, or take another mode")
        await self._stream.push(samples)

    def _behind_head(self, data: bytes) -> bytes:
        """Return the samples in the first bytes of an utterance, which may be a WAV file. Raises ClientError."""
        try:
            found = beginning(data)
            if found is not None and found.kind is not None:
                self._pcm = PcmStream(*found.kind)
        except ValueError as error:
            raise ClientError(UNSUPPORTED, f"the WAV file: {error}") from None
        self._head = data if found is None else None
        return b"" if found is None else data[found.place :]

    async def _obey(self, message: Mapping[str, Any]) -> None:
        """Take what a text frame says. Raises ClientError."""
        mode = message.get("mode", self._wording.mode)
        name = message.get("wav_name", self._wording.name)
        rate = message.get("audio_fs", self._rate)
        if mode not in MODES:
            raise ClientError(UNSUPPORTED, f"mode should be one of {', '.join(MODES)}")
        if not isinstance(name, str) or len(name) > LONGEST_NAME:
            raise ClientError(UNSUPPORTED, f"wav_name should be text of at most {LONGEST_NAME} characters")
        if message.get("wav_format", "pcm") not in ("pcm", "PCM", "wav"):
            raise ClientError(UNSUPPORTED, "wav_format should be pcm; send files to /recognize")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate != rate // 1:
            raise ClientError(UNSUPPORTED, "audio_fs should be a whole number, such as 16000")
        if ignored := [key for key in WITHOUT_EFFECT if message.get(key)]:
            log.debug("a FunASR client sets what has no effect here: %s", ", ".join(ignored))
        if message.get("is_speaking") is False or message.get("is_finished") is True:
            await self._finish()
        elif (mode, name) != (self._wording.mode, self._wording.name):
            await self._change(mode, name)
        if rate != self._rate:
            self._use(int(rate))

    def _use(self, rate: int) -> None:
        try:
            self._rate, self._pcm = rate, PcmStream(rate)
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
            self._ending = True
            self._stream.end()
            await self._stream.flush()
            self._stream = None
        self._pcm, self._head, self._heard_s = PcmStream(self._rate), b"", 0.0
        self._told.clear()
        self._replies.mark()
        await self._told.wait()  # what comes next may be worded otherwise

    async def _speak(self) -> None:
        held: list[dict[str, Any]] = []
        while True:
            reply = await self._replies.next()
            if self._replies.overrun:
                raise ClientError(POLICY, "the client does not read what it is sent; read faster")
            messages = [*held, *self._wording.of(reply)]
            # There are clients that look at the last message only: it has the last text, if that was still to come.
            held = messages[-1:] if self._ending and reply is not None else []
            if reply is None and len(messages) > 1:
                messages = [{**messages[-2], "is_final": True, "is_end": True}]
            for message in messages[: len(messages) - len(held)]:
                await self._socket.send_text(json.dumps(message, ensure_ascii=False))
            if reply is None:
                self._ending = False
                self._wording = Wording(self._wording.mode, self._wording.name)
                self._told.set()


@dataclass(frozen=True, slots=True)
class Times:
    """When words and sentences were said, since the beginning of the utterance; none where that is not known."""

    words: tuple[Span, ...]
    sentences: tuple[Span, ...]

    def to_json(self) -> dict[str, Any]:
        """Return them as FunASR's server words them, in milliseconds."""
        if not self.words:
            return {}
        spans = json.dumps([_ms(word) for word in self.words], separators=(",", ":"))
        return {"timestamp": spans, "stamp_sents": [self._sentence(sentence) for sentence in self.sentences]}

    def _sentence(self, sentence: Span) -> dict[str, Any]:
        start, end = _ms(sentence)
        within = [word for word in self.words if sentence.start_s <= word.start_s < sentence.end_s]
        text = " ".join(word.text for word in within)
        return {"text_seg": text, "punc": "", "start": start, "end": end, "ts_list": [_ms(word) for word in within]}


class Wording:
    """The messages of one utterance. Pure."""

    def __init__(self, mode: str, name: str) -> None:
        self.mode = mode
        self.name = name
        self._deltas = Deltas()
        self._times: list[Times] = []
        """Of a recording: those of its segments."""

    def of(self, reply: Partial | Transcript | None) -> list[dict[str, Any]]:
        """Return what is sent for a reply; None: the end of the utterance."""
        if reply is None:
            return [{**self._last(), "is_final": True, "is_end": True}]
        if isinstance(reply, Partial) and not reply.end:
            return [] if self.mode == OFFLINE else self._online(self._deltas.grow(reply.stable))
        if isinstance(reply, Transcript) and self.mode == ONLINE:
            return self._online(self._deltas.settle(reply.text))
        text = self._deltas.replace(reply.text)  # which is none where a segment comes to nothing
        times = _times(reply) if isinstance(reply, Transcript) else Times((), ())
        if self.mode == OFFLINE:
            self._times.append(times)
        return [{**self._message(FINALS[TWO_PASS], text), **times.to_json()}] if self.mode == TWO_PASS else []

    def _last(self) -> dict[str, Any]:
        """Return the message that ends an utterance; of a recording, it is the only one."""
        if self.mode != OFFLINE:
            return self._message(FINALS[self.mode], "")
        whole = Times(
            tuple(span for times in self._times for span in times.words),
            tuple(span for times in self._times for span in times.sentences),
        )
        return {**self._message(OFFLINE, self._deltas.said), **whole.to_json()}

    def _online(self, delta: str) -> list[dict[str, Any]]:
        return [self._message(ONLINES[self.mode], delta)] if delta else []

    def _message(self, kind: str, text: str) -> dict[str, Any]:
        return {"mode": kind, "wav_name": self.name, "text": text, "is_final": False}


def _times(transcript: Transcript) -> Times:
    if any(token.start_ms is None or token.end_ms is None for token in transcript.tokens):
        return Times((), ())
    return Times(tuple(words(transcript)), tuple(cues(transcript)))


def _ms(span: Span) -> tuple[int, int]:
    return round(span.start_s * 1e3), round(span.end_s * 1e3)
