"""Who may ask: tokens, cookies, names, origins and networks; and what the configuration refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from starlette.requests import HTTPConnection

from edge_asr.config import Config
from edge_asr.config_server import FunasrConfig, HttpConfig, WyomingConfig, is_loopback
from edge_asr.errors import ConfigError
from edge_asr.serve.access import COOKIE, SESSION_S, SESSIONS, Access, AllowedNetworks, hash_of

TOKEN = "a-token-of-at-least-thirty-two-characters"
WITH_TOKEN = HttpConfig(host="0.0.0.0", tokens=(hash_of(TOKEN),))


def asking(**headers: str) -> HTTPConnection:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return HTTPConnection({"type": "http", "headers": raw, "path": "/", "scheme": "http"})


def test_on_this_machine_nobody_needs_a_token() -> None:
    access = Access(HttpConfig())
    assert not access.required
    assert access.allows(asking())


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_token_lets_in(scheme: str) -> None:
    assert Access(WITH_TOKEN).allows(asking(authorization=f"{scheme} {TOKEN}"))


@pytest.mark.parametrize(
    "given",
    [
        *("", TOKEN, "Bearer", "Bearer "),
        *(f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Bearer {hash_of(TOKEN)}"),
    ],
)
def test_anything_else_does_not(given: str) -> None:
    assert not Access(WITH_TOKEN).allows(asking(authorization=given))
    assert not Access(WITH_TOKEN).allows(asking(cookie=f"{COOKIE}={TOKEN}"))


def test_a_file_may_have_hashes_and_tokens_and_remarks(tmp_path: Path) -> None:
    other = "another-token-of-thirty-two-characters"
    path = tmp_path / "tokens"
    path.write_text(f"# of the hall\n{hash_of(TOKEN)}\n\n  {other}  \n", encoding="utf-8")
    access = Access(HttpConfig(host="0.0.0.0", token_file=path))
    assert access.knows(TOKEN)
    assert access.knows(other)
    assert not access.knows("# of the hall")


def test_a_file_with_a_short_token_names_the_line_and_not_the_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# first\nsecret\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 2 of .* too short") as refused:
        Access(HttpConfig(token_file=path))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe"])
def test_a_file_without_any_token_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(ConfigError, match=r"http\.token_file"):
        Access(HttpConfig(token_file=tmp_path / "tokens"))


def test_who_has_logged_in_is_let_in_by_the_cookie_until_it_logs_out() -> None:
    access = Access(WITH_TOKEN)
    assert access.log_in("wrong") is None
    session = access.log_in(TOKEN)
    assert session is not None
    assert session != TOKEN
    assert access.allows(asking(cookie=f"{COOKIE}={session}"))
    access.log_out(asking(cookie=f"{COOKIE}={session}"))
    assert not access.allows(asking(cookie=f"{COOKIE}={session}"))


def test_a_session_ends_and_there_are_only_so_many() -> None:
    now = [0.0]
    access = Access(WITH_TOKEN, clock=lambda: now[0])
    first = access.log_in(TOKEN)
    now[0] = SESSION_S
    assert not access.allows(asking(cookie=f"{COOKIE}={first}"))
    second = access.log_in(TOKEN)
    for _ in range(SESSIONS):
        last = access.log_in(TOKEN)
    assert not access.allows(asking(cookie=f"{COOKIE}={second}"))
    assert access.allows(asking(cookie=f"{COOKIE}={last}"))


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8080", "127.0.0.1:8080", "127.1.2.3", "[::1]:8080", "[::1]", "LOCALHOST"],
)
def test_without_tokens_this_machine_is_meant_by_its_own_names(host: str) -> None:
    assert Access(HttpConfig()).is_meant(asking(host=host))


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:8080", "127.0.0.1.evil.example", "192.168.1.2", "localhost.evil"],
)
def test_without_tokens_a_foreign_name_is_refused_whatever_it_resolves_to(host: str) -> None:
    assert not Access(HttpConfig()).is_meant(asking(host=host))
    assert Access(WITH_TOKEN).is_meant(asking(host=host))


@pytest.mark.parametrize(
    ("origin", "good"),
    [
        (None, True),
        ("http://127.0.0.1:8080", True),
        ("https://127.0.0.1:8080", True),
        ("https://panel.local", True),
        ("HTTPS://PANEL.LOCAL", True),
        ("http://panel.local", False),
        ("http://127.0.0.1:9090", False),
        ("http://evil.example", False),
        ("null", False),
        ("", False),
    ],
)
def test_pages_of_other_hosts_are_told_by_their_origin(origin: str | None, good: bool) -> None:
    access = Access(HttpConfig(origins=("https://panel.local",)))
    headers = {"host": "127.0.0.1:8080", **({} if origin is None else {"origin": origin})}
    assert access.has_good_origin(asking(**headers)) is good


@pytest.mark.parametrize(
    ("address", "may"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("192.168.1.77", True),
        ("::ffff:192.168.1.77", True),
        ("fe80::1%eth0", True),
        ("192.168.2.1", False),
        ("10.0.0.1", False),
        ("2001:db8::1", False),
        ("not an address", False),
        ("", False),
    ],
)
def test_networks_admit_their_own(address: str, may: bool) -> None:
    assert AllowedNetworks(["192.168.1.0/24", "fe80::/10"]).admits(address) is may


def test_any_address_but_loopback_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "box.local"):
        assert not is_loopback(host)
        with pytest.raises(ValidationError, match="edge-asr token"):
            HttpConfig(host=host)
        HttpConfig(host=host, enabled=False)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        HttpConfig(host=host)


@pytest.mark.parametrize("section", [WyomingConfig, FunasrConfig])
def test_servers_without_tokens_need_networks_beyond_loopback(
    section: type[WyomingConfig] | type[FunasrConfig],
) -> None:
    with pytest.raises(ValidationError, match="name the networks"):
        section(enabled=True, host="0.0.0.0")
    assert section(enabled=True, host="0.0.0.0", allow_networks=("192.168.1.7/24",)).allow_networks == (
        "192.168.1.0/24",
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"tokens": ["secret"]},
        {"tokens": ["sha256:12"]},
        {"origins": ["panel.local"]},
        {"origins": ["https://panel.local/page"]},
        {"tls": {"key_file": __file__}},
        {"limits": {"body_mb": 0}},
        {"port": 70_000},
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({"http": keys})
