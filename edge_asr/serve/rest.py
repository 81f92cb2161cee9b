"""REST: one recording in, its transcripts out; and how the server is."""

from __future__ import annotations

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
    """Whether something can be recognised, and why not."""

    state: str
    why: str


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
            samples, found = await while_connected(request, transcribed(context, upload))
        return JSONResponse(_recognized(found, len(samples) / SAMPLE_RATE))

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
        state = context.health()
        seen = {"state": state["state"], "why": state["why"]}
        return JSONResponse(seen, 200 if context.service.ready else 503)

    return router


async def decoded(context: Context, upload: Upload) -> Samples:
    """Return the sound of an upload. Raises RefusedError, AudioError."""
    if not upload.has_file:
        raise RefusedError(400, "a file is needed, in the field file of the form", param="file")
    return await context.decoders.decode(upload.data)


async def transcribed(context: Context, upload: Upload) -> tuple[Samples, list[Transcript]]:
    """Return the sound of an upload and its transcripts. Raises RefusedError, EdgeAsrError."""
    samples = await decoded(context, upload)
    return samples, await collected(context.service.transcribe(samples, SOURCE))


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
