"""OpenAI's API for transcriptions, so that its clients work unchanged."""

from __future__ import annotations

import contextlib
import json
import math
import re
import zlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from edge_asr.errors import EdgeAsrError
from edge_asr.serve.context import Context
from edge_asr.serve.errors import RefusedError, refusal_of
from edge_asr.serve.rest import SOURCE, decoded, transcribed
from edge_asr.serve.schemas import (
    ERRORS,
    LANGUAGE,
    REFUSALS,
    ModelOut,
    ModelsOut,
    TranscriptionOut,
    VerboseOut,
    transcription_form,
)
from edge_asr.serve.subtitles import cues, srt, text_of, vtt, words
from edge_asr.serve.upload import Upload, read_upload, while_connected
from edge_asr.types import SAMPLE_RATE, Transcript

ALIAS = "whisper-1"
"""What clients that know no other name ask for."""
FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
STREAMED = ("json", "text")
GRANULARITIES = ("segment", "word")
OF_SPEAKERS = ("known_speaker_names", "known_speaker_references")
OWNER = "edge_asr"
CREATED = 0
"""Nobody knows when a bundle was made."""
LANGUAGES = {"zh": "chinese", "en": "english"}
CHINESE = re.compile("[\u3400-\u9fff]")
LEAST = 1e-9
"""Confidence whose logarithm is taken at least."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for."""

    form: str
    granularities: tuple[str, ...]
    logprobs: bool
    stream: bool
    language: str | None


def routes(context: Context) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post(
        "/audio/transcriptions",
        operation_id="createTranscription",
        summary="OpenAI's transcriptions",
        responses={200: _ANSWERS, 404: _NO_MODEL, **ERRORS},
        openapi_extra={"requestBody": transcription_form()},
    )
    async def transcriptions(request: Request) -> Response:
        context.admission.check()
        upload = await read_upload(request)
        wish = read_wish(upload)
        check_model(upload.one("model"), context.service.model)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(context.admission.request())
            if wish.stream:
                return await _streamed(context, request, upload, wish, stack)
            duration_s, found = await while_connected(request, transcribed(context, upload))
        return rendered(found, duration_s, wish)

    @router.get(
        "/models", operation_id="listModels", summary="The models", responses={200: {"model": ModelsOut}, **REFUSALS}
    )
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(context.service.model)]})

    @router.get(
        "/models/{name}",
        operation_id="retrieveModel",
        summary="One of them",
        responses={200: {"model": ModelOut}, 404: _NO_MODEL, **REFUSALS},
        openapi_extra={"parameters": [_NAME]},
    )
    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        check_model(name, context.service.model)
        return JSONResponse(_model(name))

    return router


_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_NO_MODEL = {**ERRORS[400], "description": "No such model"}
_EXAMPLE = {"schema": {"type": "string"}}
_ANSWERS: dict[str, Any] = {
    "model": TranscriptionOut | VerboseOut,
    "description": "As `response_format` asks for; with `stream` server-sent events",
    "content": {"text/plain": _EXAMPLE, "text/event-stream": _EXAMPLE, "application/x-subrip": _EXAMPLE,
                "text/vtt": _EXAMPLE},
}  # fmt: skip


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": OWNER}


def check_model(name: str | None, present: str) -> None:
    """Raise RefusedError for a model that is not here."""
    if name is None:
        raise RefusedError(400, "a model is needed, in the field model of the form", param="model")
    if name not in (present, ALIAS):
        message = f"no model {name[:64]!r} here; take {present}, or its alias {ALIAS}"
        raise RefusedError(404, message, code="model_not_found", param="model")


def read_wish(upload: Upload) -> Wish:
    """Return what a form asks for. Raises RefusedError."""
    form = _choice(upload, "response_format", FORMATS) or "json"
    granularities = tuple(upload.fields.get("timestamp_granularities", ()))
    include = tuple(upload.fields.get("include", ()))
    stream = _truth(upload, "stream")
    language = upload.one("language") or None
    for value in granularities:
        _check("timestamp_granularities", value, GRANULARITIES)
    for value in include:
        _check("include", value, ("logprobs",))
    if granularities and form != "verbose_json":
        message = "timestamp_granularities need response_format verbose_json"
        raise RefusedError(400, message, param="timestamp_granularities")
    if include and form != "json":
        raise RefusedError(400, "include needs response_format json", param="include")
    if stream and form not in STREAMED:
        raise RefusedError(400, f"stream needs response_format {' or '.join(STREAMED)}", param="stream")
    if language is not None and not re.fullmatch(LANGUAGE, language):
        raise RefusedError(400, "language should be a code of ISO 639-1, such as zh", param="language")
    _check_temperature(upload.one("temperature"))
    for name in OF_SPEAKERS:
        if name in upload.fields:
            raise RefusedError(400, f"speakers are not told apart here; leave out {name}", param=name)
    return Wish(form, granularities or GRANULARITIES[:1], bool(include), stream, language)


def _choice(upload: Upload, name: str, known: Sequence[str]) -> str | None:
    value = upload.one(name)
    if value is not None:
        _check(name, value, known)
    return value


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RefusedError(400, f"{name} should be one of {', '.join(known)}; not {value[:64]!r}", param=name)


def _truth(upload: Upload, name: str) -> bool:
    value = (upload.one(name) or "false").lower()
    _check(name, value, ("true", "false", "1", "0"))
    return value in ("true", "1")


def _check_temperature(value: str | None) -> None:
    try:
        good = value is None or 0 <= float(value) <= 1
    except ValueError:
        good = False
    if not good:
        raise RefusedError(400, "temperature should be a number from 0 to 1", param="temperature")


def rendered(found: Sequence[Transcript], duration_s: float, wish: Wish) -> Response:
    """Return the answer in the format that was asked for."""
    if wish.form == "text":
        return PlainTextResponse(f"{text_of(found)}\n")
    if wish.form == "srt":
        return PlainTextResponse(srt(found), media_type="application/x-subrip; charset=utf-8")
    if wish.form == "vtt":
        return PlainTextResponse(vtt(found), media_type="text/vtt")
    if wish.form == "verbose_json":
        return JSONResponse(verbose(found, duration_s, wish))
    logprobs = {"logprobs": list(_logprobs(found))} if wish.logprobs else {}
    return JSONResponse({"text": text_of(found), **logprobs, "usage": _usage(duration_s)})


def verbose(found: Sequence[Transcript], duration_s: float, wish: Wish) -> dict[str, Any]:
    """Return the object of verbose_json."""
    text = text_of(found)
    spoken = ("zh" if CHINESE.search(text) else "en") if text else (wish.language or "")[:2].lower()
    answer: dict[str, Any] = {
        "task": "transcribe",
        "language": LANGUAGES.get(spoken, "unknown"),
        "duration": round(duration_s, 3),
        "text": text,
        "usage": _usage(duration_s),
    }
    if "segment" in wish.granularities:
        answer["segments"] = list(_segments(found))
    if "word" in wish.granularities:
        answer["words"] = [
            {"word": word.text, "start": round(word.start_s, 3), "end": round(word.end_s, 3)}
            for transcript in found
            for word in words(transcript)
        ]
    return answer


def _segments(found: Sequence[Transcript]) -> Iterator[dict[str, Any]]:
    number = 0
    for transcript in found:
        for cue in cues(transcript):
            raw = cue.text.encode()
            yield {
                "id": number,
                "seek": 0,
                "start": round(cue.start_s, 3),
                "end": round(cue.end_s, 3),
                "text": cue.text,
                "tokens": [],  # ids say nothing without the vocabulary
                "temperature": 0.0,
                "avg_logprob": round(math.log(max(transcript.confidence or 0.0, LEAST)), 4),
                "compression_ratio": round(len(raw) / len(zlib.compress(raw)), 4),
                "no_speech_prob": 0.0,
            }
            number += 1


def _logprobs(found: Sequence[Transcript]) -> Iterator[dict[str, Any]]:
    for transcript in found:
        for token in transcript.tokens:
            logprob = round(math.log(max(token.confidence, LEAST)), 4)
            yield {"token": token.text, "bytes": list(token.text.encode()), "logprob": logprob}


def _usage(duration_s: float) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(duration_s, 3)}


async def _streamed(
    context: Context, request: Request, upload: Upload, wish: Wish, stack: contextlib.AsyncExitStack
) -> Response:
    """Return the answer as events; what goes wrong up to the first one is still told by the status."""
    samples = await while_connected(request, stack.enter_async_context(decoded(context, upload)))
    found = context.service.transcribe(samples, SOURCE)
    stack.push_async_callback(found.aclose)
    first = await while_connected(request, _next(found))
    return _Events(_events(first, found, len(samples) / SAMPLE_RATE, wish), stack.pop_all())


async def _next(found: AsyncGenerator[Transcript, None]) -> Transcript:
    return await anext(found)


async def _events(
    first: Transcript, found: AsyncGenerator[Transcript, None], duration_s: float, wish: Wish
) -> AsyncGenerator[str, None]:
    so_far: list[Transcript] = []
    transcript: Transcript | None = first
    try:
        while transcript is not None:
            before = text_of(so_far)
            so_far.append(transcript)
            delta = text_of(so_far)[len(before) :]
            logprobs = {"logprobs": list(_logprobs([transcript]))} if wish.logprobs else {}
            if delta:
                yield _event({"type": "transcript.text.delta", "delta": delta, **logprobs})
            transcript = await anext(found, None)
    except EdgeAsrError as error:  # the status is out already
        yield _event(refusal_of(error).body())
        return
    logprobs = {"logprobs": list(_logprobs(so_far))} if wish.logprobs else {}
    yield _event({"type": "transcript.text.done", "text": text_of(so_far), **logprobs, "usage": _usage(duration_s)})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Events(StreamingResponse):
    """Server-sent events that let go of what they hold, however they end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], held: contextlib.AsyncExitStack) -> None:
        super().__init__(events)
        self._events = events
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._held.aclose()
