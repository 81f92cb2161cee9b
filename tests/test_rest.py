"""REST of the running server: curl, other programs, and what they do wrong."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from bundled import recording, sound_of, transcripts
from mosquitto import wait_for
from speech_server import Serving, serving

from edge_asr.serve import limits
from edge_asr.serve.admission import Admission
from edge_asr.service import SpeechService
from edge_asr.types import SAMPLE_RATE, TRANSCRIPT_SCHEMA, Samples, Transcript

TEXTS = transcripts()
NAMES = sorted(TEXTS)
FIRST, *_ = NAMES
MODEL = "paraformer-tiny"
MB = 1_000_000
BOUNDARY = "a boundary"
FORM = f'multipart/form-data; boundary="{BOUNDARY}"'


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(
        http={"limits": {"body_mb": 1, "audio_s": 30}}, wyoming={"enabled": False}, funasr={"enabled": False}
    ) as running:
        yield running


@pytest.fixture
def admissions(monkeypatch: pytest.MonkeyPatch) -> list[Admission]:
    """Return what is to hold the server's admission as soon as somebody has asked."""
    found: list[Admission] = []
    check = Admission.check

    def noted(self: Admission) -> None:
        found.append(self)
        check(self)

    monkeypatch.setattr(Admission, "check", noted)
    return found


@pytest.fixture(scope="module")
def curl() -> str:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("not installed: curl (Debian: apt install curl)")
    return program


def run(curl: str, *arguments: str) -> tuple[int, str]:
    """Return the status and the body of what curl gets."""
    command = [curl, "--silent", "--show-error", "--max-time", "30", "--write-out", "\n%{http_code}", *arguments]
    body, _, status = subprocess.run(command, capture_output=True, check=True, text=True).stdout.rpartition("\n")
    return int(status), body


def ask(
    server: Serving, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, Any]:
    """Return an answer and its JSON object."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        raw = answer.read()
        return answer, json.loads(raw) if raw else None
    finally:
        connection.close()


def refusal(server: Serving, *request: Any) -> tuple[int, str, str | None]:
    """Return status, message and code of what is refused, and check its shape."""
    answer, body = ask(server, *request)
    assert answer.headers["content-type"] == "application/json"
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return answer.status, body["error"]["message"], body["error"]["code"]


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"


def form(*parts: bytes) -> tuple[bytes, dict[str, str]]:
    """Return a body and its headers."""
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode(), {"Content-Type": FORM}


AUDIO = recording(FIRST).read_bytes()
WAV = {"Content-Type": "audio/wav"}
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("name", NAMES)
def test_curl_sends_a_form(server: Serving, curl: str, name: str) -> None:
    status, body = run(curl, "-F", f"file=@{recording(name)}", f"{server.url}/recognize")
    assert status == 200
    assert json.loads(body)["text"] == TEXTS[name]


@pytest.mark.parametrize("kind", ["audio/wav", "audio/x-wav; rate=16000", "application/octet-stream", "video/mp4"])
def test_curl_sends_the_audio_itself(server: Serving, curl: str, kind: str) -> None:
    arguments = ("--data-binary", f"@{recording(FIRST)}", "-H", f"Content-Type: {kind}")
    status, body = run(curl, *arguments, f"{server.url}/recognize")
    assert status == 200
    assert json.loads(body)["text"] == TEXTS[FIRST]


def test_curl_sends_audio_whose_length_it_does_not_know(server: Serving, curl: str) -> None:
    headers = ("-H", "Content-Type: audio/wav", "-H", "Transfer-Encoding: chunked")
    status, body = run(curl, "--data-binary", f"@{recording(FIRST)}", *headers, f"{server.url}/recognize")
    assert status == 200
    assert json.loads(body)["text"] == TEXTS[FIRST]


def test_an_answer_has_the_text_how_sure_it_is_and_the_transcripts(server: Serving) -> None:
    _, answer = ask(server, "POST", "/recognize", AUDIO, WAV)
    [transcript] = answer["segments"]
    assert answer["text"] == transcript["text"] == TEXTS[FIRST]
    assert answer["confidence"] == pytest.approx(transcript["confidence"])
    assert answer["duration"] == pytest.approx(len(sound_of(FIRST)) / SAMPLE_RATE, abs=1e-3)
    assert (answer["model"], answer["engine"]) == (MODEL, "onnx-fp32")
    assert transcript["schema"] == TRANSCRIPT_SCHEMA
    assert [token["text"] for token in transcript["tokens"]] == list(TEXTS[FIRST])
    assert transcript["latency_ms"].keys() >= {"features", "encoder", "decoder"}


def test_silence_is_answered_with_nothing_said(server: Serving) -> None:
    _, answer = ask(server, "POST", "/recognize", AUDIO[:44] + bytes(2 * SAMPLE_RATE), WAV)
    assert (answer["text"], answer["confidence"]) == ("", None)


def test_answers_may_not_be_kept_nor_taken_for_something_else(server: Serving) -> None:
    answer, _ = ask(server, "POST", "/recognize", AUDIO, WAV)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers


@pytest.mark.parametrize(
    ("request_", "status", "message", "code"),
    [
        (("GET", "/nothing/here"), 404, "no such address: GET /nothing/here", "not_found"),
        (("GET", "/docs"), 404, "no such address", "not_found"),
        (("GET", "/recognize"), 405, "/recognize does not take GET", "method_not_allowed"),
        (("POST", "/healthz"), 405, "/healthz does not take POST", "method_not_allowed"),
        (("POST", "/recognize/"), 404, "no such address", "not_found"),
        (("POST", "/recognize"), 415, "multipart/form-data", "unsupported_media_type"),
        (("POST", "/recognize", b"{}", JSON), 415, "audio/wav", "unsupported_media_type"),
        (("POST", "/v1/audio/transcriptions", AUDIO, WAV), 415, "multipart/form-data", "unsupported_media_type"),
        (("POST", "/recognize", b"", WAV), 400, "", "invalid_audio"),
        (("POST", "/recognize", b"RIFF" * 100, WAV), 400, "the upload", "invalid_audio"),
        (("POST", "/recognize", bytes(MB + 1), WAV), 413, "http.limits.body_mb", "too_large"),
        (("POST", "/recognize", *form()), 400, "a file is needed", None),
        (("POST", "/recognize", *form(part("file", b"no name"))), 400, "a file is needed", None),
        (("POST", "/recognize", *form(part("sound", AUDIO, "a.wav"))), 400, "in the field file", None),
        (("POST", "/recognize", *form(*[part("file", AUDIO, "a")] * 2)), 400, "more than one file", None),
        (("POST", "/recognize", *form(*[part("x", b"")] * 40)), 400, "more than 32 fields", None),
        (("POST", "/recognize", *form(part("x", bytes(70_000)))), 400, "more than 65536 bytes", None),
        (("POST", "/recognize", b"--other", {"Content-Type": FORM}), 400, "not built as a form", None),
        (("POST", "/recognize", form(part("file", AUDIO, "a"))[0][:-9], form()[1]), 400, "its end is missing", None),
        (("POST", "/recognize", form()[0].replace(b"--\r", b"\r\nA: b\r\n\r"), form()[1]), 400, "has no name", None),
        (("POST", "/recognize", b"", {"Content-Type": FORM.replace("a ", "a" * 300)}), 400, "too long", None),
        (("POST", "/recognize", b"", {"Content-Type": "multipart/form-data"}), 400, "boundary", None),
        (
            ("POST", "/v1/audio/transcriptions", *form(part("file", AUDIO, "a.wav"))),
            400,
            "a model is needed",
            None,
        ),
        (
            ("POST", "/v1/audio/transcriptions", *form(part("model", MODEL.encode()))),
            400,
            "a file is needed",
            None,
        ),
        (
            ("POST", "/v1/audio/transcriptions", *form(*[part("model", MODEL.encode())] * 2)),
            400,
            "model is there 2 times",
            None,
        ),
        (("GET", "/v1/models/%ff%00%2e%2e"), 404, "no model", "model_not_found"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_shape(
    server: Serving, request_: tuple[Any, ...], status: int, message: str, code: str | None
) -> None:
    told = refusal(server, *request_)
    assert (told[0], told[2]) == (status, code)
    assert message in told[1]
    assert "\n" not in told[1]
    assert not re.search(r"Traceback|\.py\b|/tmp|site-packages", told[1])


def test_a_method_that_is_not_there_is_answered_with_those_that_are(server: Serving) -> None:
    answer, body = ask(server, "HEAD", "/recognize")
    assert (answer.status, answer.headers["allow"], body) == (405, "POST", None)


def test_a_body_may_not_grow_beyond_the_limit_whatever_was_announced(server: Serving) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(
            b"POST /recognize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: audio/wav\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(17):
            client.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        assert client.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_who_sends_all_before_reading_is_still_told_that_it_was_too_much(server: Serving) -> None:
    for headers in (WAV, {"Host": "elsewhere"}):
        answer, _ = ask(server, "POST", "/recognize", bytes(20 * MB), headers)
        assert answer.status in (413, 421)
        assert answer.headers["connection"] == "close"


def test_a_body_that_nobody_wants_does_not_keep_the_connection(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DISCARD_S", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(b"POST /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 404 ")


def test_a_connection_serves_one_request_after_the_other(server: Serving) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for method, path, status in (("POST", "/recognize", 200), ("GET", "/nothing", 404), ("POST", "/recognize", 200)):
        connection.request(method, path, AUDIO if status == 200 else b"", WAV)
        before = connection.sock
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, connection.sock) == (status, before)
    connection.close()


def test_a_recording_that_is_too_long_is_refused(server: Serving) -> None:
    quiet = quiet_wav(31)
    assert refusal(server, "POST", "/recognize", quiet, WAV)[0::2] == (413, "audio_too_long")


def quiet_wav(seconds: int) -> bytes:
    """Return a WAV file of silence, 8-bit and 8 kHz: long, but no large upload."""
    size = 8_000 * seconds
    head = b"RIFF" + (36 + size).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    kind = b"\1\0\1\0" + (8_000).to_bytes(4, "little") * 2 + b"\1\0\x08\0"
    return head + kind + b"data" + size.to_bytes(4, "little") + b"\x80" * size


def test_no_upload_touches_the_disk(server: Serving) -> None:
    watching, written = True, []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(arguments[0])

    sys.addaudithook(watch)
    padded = AUDIO + bytes(MB - len(AUDIO) - 1000)
    answer, body = ask(server, "POST", "/recognize", *form(part("file", padded, "a.wav")))
    watching = False
    assert (answer.status, body["text"]) == (200, TEXTS[FIRST])
    assert [path for path in written if path != os.devnull] == []


def test_who_answers_says_so_and_who_can_recognise_too(server: Serving) -> None:
    alive, ready = ask(server, "GET", "/healthz"), ask(server, "GET", "/readyz")
    assert (alive[0].status, alive[1]) == (200, {"status": "alive"})
    assert (ready[0].status, ready[1]) == (200, {"state": "ready"})


def test_without_a_model_it_is_alive_but_not_ready(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpeechService, "engine", None)
    assert ask(server, "GET", "/healthz")[0].status == 200
    answer, body = ask(server, "GET", "/readyz")
    assert answer.status == 503
    assert body.keys() == {"state"}
    assert refusal(server, "POST", "/recognize", AUDIO, WAV)[0::2] == (503, "not_ready")


def test_too_much_to_do_is_said_before_anything_is_read(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "expected_wait_s", lambda self: 60.0)
    answer, body = ask(server, "POST", "/recognize", b"{}", JSON)
    assert (answer.status, body["error"]["code"]) == (503, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_bug_is_logged_and_told_without_what_it_was(
    server: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(samples: Samples, source: str) -> AsyncGenerator[Transcript, None]:
        raise RuntimeError("a secret of the program")

    monkeypatch.setattr(server.service, "transcribe", fail)
    status, message, code = refusal(server, "POST", "/recognize", AUDIO, WAV)
    assert (status, code) == (500, "internal_error")
    assert "secret" not in message
    wait_for(lambda: "a secret of the program" in caplog.text, "the log")
    monkeypatch.undo()
    assert ask(server, "POST", "/recognize", AUDIO, WAV)[1]["text"] == TEXTS[FIRST]


VERBOSE = (part("response_format", b"verbose_json"),)
TRANSCRIPTIONS = (part("file", AUDIO, "a.wav"), part("model", MODEL.encode()))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/recognize", (AUDIO, WAV)),
        ("/v1/audio/transcriptions", form(*TRANSCRIPTIONS)),
        ("/v1/audio/transcriptions", form(*TRANSCRIPTIONS, part("stream", b"true"))),
    ],
    ids=["recognize", "transcriptions", "stream"],
)
@pytest.mark.parametrize("told", [0, 1])
def test_work_for_a_client_that_has_gone_is_given_up(
    server: Serving,
    monkeypatch: pytest.MonkeyPatch,
    admissions: list[Admission],
    path: str,
    body: tuple[bytes, dict[str, str]],
    told: int,
) -> None:
    happened: list[str] = []
    transcribe = server.service.transcribe

    async def never_ending(samples: Samples, source: str) -> AsyncGenerator[Transcript, None]:
        try:
            for _ in range(told):
                async for transcript in transcribe(samples, source):
                    yield transcript
            happened.append("begun")
            await asyncio.Event().wait()
        finally:
            happened.append("given up")

    monkeypatch.setattr(server.service, "transcribe", never_ending)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", path, *body)
    wait_for(lambda: happened, "the work")
    assert happened == ["begun"]
    assert admissions[0].in_progress == 1
    connection.close()
    wait_for(lambda: happened == ["begun", "given up"], "the end of the work")
    wait_for(lambda: admissions[0].in_progress == 0, "its place for others")
    monkeypatch.undo()
    assert ask(server, "POST", "/recognize", AUDIO, WAV)[1]["text"] == TEXTS[FIRST]


@pytest.mark.parametrize("extra", [(), (part("stream", b"true"),), (part("stream", b"perhaps"),)])
def test_who_was_answered_makes_place_for_others(
    server: Serving, admissions: list[Admission], extra: tuple[bytes, ...]
) -> None:
    body, headers = form(*TRANSCRIPTIONS, *extra)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/audio/transcriptions", body, headers)
    connection.getresponse().read()
    connection.close()
    wait_for(lambda: admissions[0].in_progress == 0, "its place for others")


@pytest.fixture(scope="module")
def document(server: Serving) -> Any:
    return ask(server, "GET", "/openapi.json")[1]


def check(document: Any, schema: Any, value: Any) -> None:
    """Hold a value against a schema of the document."""
    whole = {**schema, "components": document["components"]}
    jsonschema_rs.Draft202012Validator(whole).validate(value)


def schema_of(document: Any, path: str, method: str, status: int, kind: str = "application/json") -> Any:
    return document["paths"][path][method]["responses"][str(status)]["content"][kind]["schema"]


def test_the_openapi_document_is_one(document: Any) -> None:
    schemathesis.openapi.from_dict(document).validate()


def test_every_operation_has_a_name_a_tag_and_its_refusals(document: Any) -> None:
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations) >= 6
    for one in operations:
        assert one["tags"]
        assert "422" not in one["responses"]
        assert "429" in one["responses"]
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert document["paths"]["/healthz"]["get"]["security"] == []


def test_what_is_answered_is_what_the_document_says(server: Serving, document: Any) -> None:
    def holds(path: str, method: str, *request: Any, at: str | None = None) -> None:
        answer, body = ask(server, method, at or path, *request)
        check(document, schema_of(document, path, method.lower(), answer.status), body)

    holds("/recognize", "POST", AUDIO, WAV)
    holds("/recognize", "POST", b"no audio", WAV)
    holds("/recognize", "POST", b"")
    holds("/healthz", "GET")
    holds("/readyz", "GET")
    holds("/v1/models", "GET")
    holds("/v1/models/{name}", "GET", at=f"/v1/models/{MODEL}")
    holds("/v1/models/{name}", "GET", at="/v1/models/other")
    for extra in ((), (part("include[]", b"logprobs"),), VERBOSE):
        holds("/v1/audio/transcriptions", "POST", *form(*TRANSCRIPTIONS, *extra))
    _, verbose = ask(server, "POST", "/v1/audio/transcriptions", *form(*TRANSCRIPTIONS, *VERBOSE))
    assert verbose["segments"]
    check(document, document["components"]["schemas"]["VerboseOut"], verbose)


def test_the_document_says_what_a_form_may_hold(document: Any) -> None:
    body = document["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]
    fields = body["content"]["multipart/form-data"]["schema"]
    assert fields["required"] == ["file", "model"]
    assert fields["properties"].keys() >= {
        "file", "model", "language", "prompt", "response_format", "temperature", "timestamp_granularities[]", "stream",
    }  # fmt: skip
