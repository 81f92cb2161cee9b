"""The HTTP application: its routes, and what all of them share."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from edge_asr import __version__
from edge_asr.errors import EdgeAsrError
from edge_asr.serve import admin, errors, login, openai, page, rest, scrape, websocket
from edge_asr.serve.context import Context
from edge_asr.serve.limits import Gate

DESCRIPTION = """Speech recognition on this machine: a recording in, its transcripts out. The microphones here are
answered first. Streams: `/stream_recognize`, a WebSocket (docs/server.md)."""


def make_app(context: Context) -> FastAPI:
    """Return the application."""
    app = FastAPI(
        title="edge_asr",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            errors.RefusedError: errors.answer_refusal,
            EdgeAsrError: errors.answer_own_error,
            HTTPException: errors.answer_http_error,
            Exception: errors.answer_bug,
        },
        redirect_slashes=False,
    )
    for part in (rest, openai, websocket, login, scrape, admin, page):
        app.include_router(part.routes(context))
    app.add_middleware(Gate, access=context.access, limits=context.config.limits)
    _describe_access(app)
    return app


def _describe_access(app: FastAPI) -> None:
    """Have the OpenAPI document say that a token may be needed."""
    describe = app.openapi

    def with_access() -> dict[str, Any]:
        document = describe()
        document.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}, {}]
        return document

    app.openapi = with_access  # type: ignore[method-assign]
