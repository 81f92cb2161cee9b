"""REST: one recording in, its transcripts out; and how the server is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_asr.serve.context import Context
from edge_asr.serve.errors import RefusedError
from edge_asr.serve.schemas import ERRORS, OPEN_REFUSALS, Recognized, form_or_audio
from edge_asr.serve.subtitles import text_of
from edge_asr.serve.upload import Upload, collected, read_upload, while_connected
from edge_asr.types import SAMPLE_RATE, Samples, Transcript

SOURCE = "http"
"""What transcripts call a recording of a request."""
NO_TOKEN: dict[str, Any] = {"security": []}


class Alive(BaseModel):
    """The process answers."""

    status: str


class Ready(BaseModel):
    """Whether something can be recognised."""

    state: str


def routes(context: Context) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.post(
        "/recognize",
        operation_id="recognize",
        summary="The transcripts of a recording",
        tags=["recognition"],
        responses={200: {"model": Recognized}, **ERRORS},
        openapi_extra={"requestBody": form_or_audio()},
    )
    async def recognize(request: Request) -> Response:
        context.admission.check()
        upload = await read_upload(request, raw=True)
        with context.admission.request():
            duration_s, found = await while_connected(request, transcribed(context, upload))
        return JSONResponse(_recognized(found, duration_s))

    @router.get(
        "/healthz",
        operation_id="alive",
        summary="The process answers",
        tags=["health"],
        responses={200: {"model": Alive}, **OPEN_REFUSALS},
        openapi_extra=NO_TOKEN,
    )
    async def alive() -> Response:
        return JSONResponse({"status": "alive"})

    @router.get(
        "/readyz",
        operation_id="ready",
        summary="Something can be recognised",
        tags=["health"],
        responses={**OPEN_REFUSALS, 200: {"model": Ready}, 503: {"model": Ready, "description": "Not yet"}},
        openapi_extra=NO_TOKEN,
    )
    async def ready() -> Response:
        # Not why: that names files and microphones, and this is for everybody.
        return JSONResponse({"state": context.appliance.describe()["state"]}, 200 if context.service.ready else 503)

    return router


@asynccontextmanager
async def decoded(context: Context, upload: Upload) -> AsyncIterator[Samples]:
    """Yield the sound of an upload, which has its place in memory so long. Raises RefusedError, EdgeAsrError."""
    if not upload.has_file:
        raise RefusedError(400, "a file is needed, in the field file of the form", param="file")
    async with context.room.place(context.config.limits.audio_s) as place:
        samples = await context.decoders.decode(upload.data)
        place.shrink(len(samples) / SAMPLE_RATE)
        yield samples


async def transcribed(context: Context, upload: Upload) -> tuple[float, list[Transcript]]:
    """Return how many seconds an upload lasts, and its transcripts. Raises RefusedError, EdgeAsrError."""
    async with decoded(context, upload) as samples:
        return len(samples) / SAMPLE_RATE, await collected(context.service.transcribe(samples, SOURCE))


def _recognized(found: list[Transcript], duration_s: float) -> dict[str, Any]:
    known = [transcript.confidence for transcript in found if transcript.confidence is not None]
    return {
        "text": text_of(found),
        "confidence": round(float(np.exp(np.mean(np.log(np.maximum(known, 1e-9))))), 4) if known else None,
        "duration": round(duration_s, 3),
        "model": found[0].model,
        "engine": found[0].engine,
        "segments": [transcript.to_json() for transcript in found],
    }
