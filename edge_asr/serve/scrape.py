"""/metrics: what Prometheus is told."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from edge_asr.serve.context import Context
from edge_asr.serve.schemas import REFUSALS

_TEXT: dict[str, Any] = {
    "description": "Prometheus' text format",
    "content": {"text/plain": {"schema": {"type": "string"}}},
}


def routes(_context: Context) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.get(
        "/metrics",
        operation_id="metrics",
        summary="Counters, gauges and histograms",
        tags=["health"],
        response_class=Response,
        responses={200: _TEXT, **REFUSALS},
    )
    async def metrics(request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(REGISTRY), media_type=kind)

    return router
