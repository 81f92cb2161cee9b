"""What every request passes before its route: names, tokens, origins, rates, sizes. On a real socket."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from mosquitto import PATIENCE_S
from prometheus_client import REGISTRY
from speech_server import Serving, serving
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from edge_asr.serve.access import COOKIE, hash_of
from edge_asr.serve.limits import REMEMBERED, Rates, client_of

TOKEN = "a-token-of-at-least-thirty-two-characters"
BEARER = {"authorization": f"Bearer {TOKEN}"}
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(http={"limits": {"body_mb": 1}}) as one:
        yield one


@pytest.fixture(scope="module")
def guarded() -> Iterator[Serving]:
    with serving(http={"tokens": [hash_of(TOKEN)], "origins": ["https://panel.local"]}) as one:
        yield one


def ask(server: Serving, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def error(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer[2])["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_everything_but_health_and_login_needs_the_token(guarded: Serving) -> None:
    paths = [
        ("GET", "/v1/models"),
        ("GET", "/openapi.json"),
        ("POST", "/recognize"),
        ("GET", "/nothing"),
        ("POST", "/"),
    ]
    for method, path in paths:
        answer = ask(guarded, method, path)
        assert answer[0] == 401
        assert answer[1]["www-authenticate"] == "Bearer"
        assert error(answer)["code"] == "invalid_api_key"
        assert ask(guarded, method, path, None, **BEARER)[0] != 401
    for path in ("/healthz", "/readyz", "/login"):
        assert ask(guarded, "GET", path)[0] in (200, 503)
    status, headers, *_ = ask(guarded, "GET", "/")
    assert (status, headers["location"]) == (303, "/login"), "a person is asked for it"


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1/models/",
        "/V1/models",
        "/healthz/../v1/models",
        "/login/x",
        "/%2e/v1/models",
        "/healthz%2f..%2fv1/models",
    ],
)
def test_no_other_spelling_of_a_path_opens_the_door(guarded: Serving, path: str) -> None:
    assert ask(guarded, "GET", path)[0] == 401


def test_the_page_logs_in_with_the_token_and_out_again(guarded: Serving) -> None:
    form = {"content_type": "application/x-www-form-urlencoded"}
    assert b"<form" in ask(guarded, "GET", "/login")[2]
    assert ask(guarded, "POST", "/login", b"token=wrong", **form)[0] == 401
    status, headers, _ = ask(guarded, "POST", "/login", f"token={TOKEN}".encode(), **form)
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    session = cookie.partition(";")[0]
    assert ask(guarded, "GET", "/v1/models", cookie=session)[0] == 200
    assert ask(guarded, "POST", "/logout", b"", cookie=session)[0] == 303
    assert ask(guarded, "GET", "/v1/models", cookie=session)[0] == 401


def test_a_form_that_is_none_is_refused(guarded: Serving) -> None:
    assert ask(guarded, "POST", "/login", b"\xff" * 100)[0] == 400
    assert ask(guarded, "POST", "/login", b"a=1&" * 100)[0] == 400
    assert ask(guarded, "POST", "/login", b"x" * 100_000)[0] == 413


def test_pages_of_other_hosts_change_nothing_even_with_the_cookie(guarded: Serving) -> None:
    for origin, status in (("http://evil.example", 403), ("https://panel.local", 415), (None, 415)):
        headers = {} if origin is None else {"origin": origin}
        assert ask(guarded, "POST", "/recognize", b"x", **BEARER, **headers)[0] == status
    assert ask(guarded, "GET", "/v1/models", None, **BEARER, origin="http://evil.example")[0] == 200


def test_no_answer_lets_another_page_read_it(server: Serving) -> None:
    for method, path in (("GET", "/v1/models"), ("OPTIONS", "/recognize"), ("GET", "/nothing")):
        _, headers, _ = ask(server, method, path, origin="http://evil.example")
        assert not [name for name in headers if name.startswith("access-control")]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_a_name_that_was_made_to_stand_for_this_machine_is_refused(server: Serving) -> None:
    answer = ask(server, "GET", "/v1/models", host="evil.example")
    assert answer[0] == 421
    assert "another name" in error(answer)["message"]


async def test_websockets_are_refused_before_they_begin(server: Serving, guarded: Serving) -> None:
    cases: list[tuple[Serving, dict[str, str], int]] = [
        (guarded, {}, 401),
        (guarded, {**BEARER, "origin": "http://evil.example"}, 403),
        (server, {"origin": "http://evil.example"}, 403),
    ]
    for one, headers, status in cases:
        with pytest.raises(InvalidStatus) as refused:
            await asyncio.wait_for(connect(f"{one.ws_url}/stream_recognize", additional_headers=headers), PATIENCE_S)
        assert refused.value.response.status_code == status
    async with connect(f"{guarded.ws_url}/stream_recognize", additional_headers=BEARER) as socket:
        await socket.send('{"type": "end"}')


def test_an_upload_that_says_it_is_too_large_is_not_even_read(server: Serving) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    connection.putrequest("POST", "/recognize")
    connection.putheader("Content-Type", "audio/wav")
    connection.putheader("Content-Length", "1000000000000")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert b"more than 1 MB" in answer.read()
    assert answer.getheader("connection") == "close"
    connection.close()


def test_an_upload_without_a_length_ends_at_the_limit(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_asr.serve.limits.DISCARD_S", 0.2)

    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(65_536)

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        connection.request("POST", "/recognize", endless(), {"Content-Type": "audio/wav"}, encode_chunked=True)
    connection.close()


def test_who_asks_too_often_is_told_when_to_come_back() -> None:
    with serving(http={"limits": {"requests_per_minute": 12}}) as strict:
        answers = [ask(strict, "GET", "/healthz") for _ in range(4)]
    assert [answer[0] for answer in answers] == [200, 200, 429, 429]
    assert 1 <= int(answers[-1][1]["retry-after"]) <= 5
    assert error(answers[-1])["type"] == "rate_limit_error"


def test_a_bucket_fills_again_and_is_nobody_elses() -> None:
    now = [0.0]
    rates = Rates(60, clock=lambda: now[0])
    assert [rates.take("10.0.0.1") for _ in range(10)] == [0.0] * 10
    assert rates.take("10.0.0.1") == pytest.approx(1.0)
    assert rates.take("10.0.0.2") == 0
    now[0] += 1
    assert rates.take("10.0.0.1") == 0
    assert rates.take("10.0.0.1") == pytest.approx(1.0)


def test_one_client_has_many_addresses_of_ipv6_and_memory_is_bounded() -> None:
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:1")
    assert client_of("2001:db8::1") != client_of("2001:db8:0:1::1")
    assert client_of("::ffff:10.0.0.1") != client_of("::ffff:10.0.0.2")
    rates = Rates(60)
    for number in range(2 * REMEMBERED):
        rates.take(str(number))
    assert len(rates._buckets) == REMEMBERED


def test_metrics_count_who_was_not_let_in() -> None:
    for reason in ("requests", "wait"):
        assert REGISTRY.get_sample_value("edge_asr_requests_refused_total", {"reason": reason}) is not None
