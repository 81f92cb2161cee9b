"""/admin: what the MQTT commands do, for those who have no broker at hand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_asr.errors import EdgeAsrError
from edge_asr.serve.context import Context
from edge_asr.serve.errors import RefusedError
from edge_asr.serve.schemas import ERRORS, REFUSALS, Failure
from edge_asr.serve.upload import read_small

LARGEST = 4_096
"""Bytes of a command."""
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": Failure, "description": "Not as things are; nothing changed"}
}


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Mute(_Command):
    """Close all microphones, or open them."""

    mute: bool


class Preset(_Command):
    """What ends a segment."""

    preset: str = Field(description="aggressive, default or relaxed")


class Listen(_Command):
    """Hear whoever speaks for a while (push to talk)."""

    seconds: float | None = Field(default=None, ge=0, le=120, description="null: the configured time; 0: no longer")


class Nothing(_Command):
    """No arguments."""


class StateOut(BaseModel):
    """How the appliance is, as it is published on MQTT; more keys than these."""

    state: str
    why: str
    model: str
    engine: str | None
    mute: bool
    preset: str
    listen: str


Arguments = TypeVar("Arguments", bound=_Command)
COMMANDS: Mapping[str, tuple[type[_Command], str]] = {
    "mute": (Mute, "Close all microphones, or open them again"),
    "preset": (Preset, "Change what ends a segment"),
    "listen": (Listen, "Push to talk"),
    "reload": (Nothing, "Read configuration and model anew, and change to them between two requests"),
    "rollback": (Nothing, "Change back to the model that answered before"),
}


def routes(context: Context) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["administration"])

    @router.get(
        "/admin/state",
        operation_id="state",
        summary="How the appliance is",
        responses={200: {"model": StateOut}, **REFUSALS},
    )
    async def state() -> Response:
        return JSONResponse(context.appliance.describe())

    def add(name: str, kind: type[_Command], summary: str) -> None:
        async def obey(request: Request) -> Response:
            return await _obeyed(context, name, await _arguments(request, kind))

        router.add_api_route(
            f"/admin/{name}",
            obey,
            methods=["POST"],
            operation_id=name,
            summary=summary,
            responses={200: {"model": dict[str, Any]}, **ERRORS, **CONFLICT},
            openapi_extra={"requestBody": _body(kind)},
        )

    for name, (kind, summary) in COMMANDS.items():
        add(name, kind, summary)
    return router


def _body(kind: type[_Command]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    return {"required": bool(schema.get("required")), "content": {"application/json": {"schema": schema}}}


async def _arguments(request: Request, kind: type[Arguments]) -> Arguments:
    """Return what a command is to do; no body is an empty one. Raises RefusedError."""
    body = await read_small(request, LARGEST)
    try:
        return kind.model_validate_json(body.strip() or b"{}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RefusedError(400, ": ".join(filter(None, (where, first["msg"]))), param=where or None) from None


async def _obeyed(context: Context, name: str, arguments: _Command) -> Response:
    try:
        result = await asyncio.wrap_future(context.appliance.command(name, arguments.model_dump()))
    except EdgeAsrError as error:
        raise RefusedError(409, str(error), code="refused") from error
    except asyncio.CancelledError:  # everything stops
        raise RefusedError(503, "edge-asr stops; ask again", code="not_ready") from None
    return JSONResponse(dict(result))
