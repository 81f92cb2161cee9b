"""Refusals, in the shape that OpenAI's clients expect, on every route."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_asr.errors import AudioError, BusyError, EdgeAsrError, NotReadyError, TooLongAudioError

log = logging.getLogger(__name__)

INVALID, AUTHENTICATION, RATE, SERVER = (
    "invalid_request_error", "authentication_error", "rate_limit_error", "server_error",
)  # fmt: skip
KINDS = {401: AUTHENTICATION, 403: AUTHENTICATION, 429: RATE}
RETRY_S = 5.0


class RefusedError(Exception):
    """An answer that is an error, raised anywhere below a route."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """`code` and `param` as in OpenAI's API; `retry_after_s`: when it may be worth asking again."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind or KINDS.get(status, INVALID if status < 500 else SERVER)
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        found = {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    def response(self) -> Response:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, self.headers())


def refusal_of(error: EdgeAsrError) -> RefusedError:
    """Return how an error of ours is answered."""
    if isinstance(error, BusyError):
        return RefusedError(503, str(error), code="overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, NotReadyError):
        return RefusedError(503, str(error), code="not_ready", retry_after_s=RETRY_S)
    if isinstance(error, TooLongAudioError):
        return RefusedError(413, str(error), code="audio_too_long", param="file")
    if isinstance(error, AudioError):
        return RefusedError(400, str(error), code="invalid_audio", param="file")
    log.error("a request failed: %s", error)
    return RefusedError(500, "the recognition failed; see the log of edge-asr", code="engine_failed")


async def answer_refusal(request: Request, error: Exception) -> Response:
    """Handle RefusedError."""
    assert isinstance(error, RefusedError)
    return error.response()


async def answer_own_error(request: Request, error: Exception) -> Response:
    """Handle EdgeAsrError."""
    assert isinstance(error, EdgeAsrError)
    return refusal_of(error).response()


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Handle what the framework refuses: no such route, no such method."""
    assert isinstance(error, HTTPException)
    known: Mapping[int, tuple[str, str]] = {
        404: (f"no such address: {request.method} {request.url.path}; see /openapi.json", "not_found"),
        405: (f"{request.url.path} does not take {request.method}; see /openapi.json", "method_not_allowed"),
    }
    message, code = known.get(error.status_code, (str(error.detail), "bad_request"))
    refusal = RefusedError(error.status_code, message, code=code)
    return JSONResponse(refusal.body(), refusal.status, {**(error.headers or {}), **refusal.headers()})


async def answer_bug(request: Request, error: Exception) -> Response:
    """Handle everything else; the framework logs the trace."""
    return RefusedError(500, "internal error; see the log of edge-asr", code="internal_error").response()
