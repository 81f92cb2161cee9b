"""The page's way in: a token once, a cookie from then on."""

from __future__ import annotations

import html

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from edge_asr.serve.access import COOKIE, SESSION_S
from edge_asr.serve.context import Context
from edge_asr.serve.errors import RefusedError
from edge_asr.serve.limits import Rates
from edge_asr.serve.upload import read_fields

ATTEMPTS_PER_MINUTE = 60
"""From one address; ten at once."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
WITH_ORIGIN = {"referrer-policy": "same-origin"}
"""Browsers send the origin of a form, which is looked at, only where its page may send a referrer to us."""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>edge_asr</title>
<style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
form { max-width: 24rem; margin: 20vh auto 0; padding: 0 1rem }
input, button { font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; margin-top: .5rem }
</style>
<main>
<form method="post" action="login">
<h1>edge_asr</h1>
<p role="alert">{message}</p>
<label for="token">Token 令牌</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Log in 登录</button>
</form>
</main>
</html>
"""


def routes(context: Context) -> APIRouter:
    """Return the routes; none of them is of interest to programs."""
    router = APIRouter(include_in_schema=False)
    rates = Rates(ATTEMPTS_PER_MINUTE)

    @router.get("/login")
    async def ask() -> Response:
        return _page("", 200)

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        client = "" if request.client is None else request.client.host
        if wait_s := rates.take(client):
            raise RefusedError(429, "too many attempts; try again later", retry_after_s=wait_s)
        fields = await read_fields(request)
        session = context.access.log_in(fields.get("token", "").strip())
        if session is None:
            return _page("Wrong token. 令牌错误。", 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            COOKIE, session, max_age=int(SESSION_S), httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return answer

    @router.post("/logout")
    async def log_out(request: Request) -> Response:
        context.access.log_out(request)
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer

    return router


def _page(message: str, status: int) -> Response:
    headers = {"content-security-policy": POLICY, **WITH_ORIGIN}
    return HTMLResponse(PAGE.replace("{message}", html.escape(message)), status, headers)
