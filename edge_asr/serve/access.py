"""Who may ask: tokens, the cookies that stand for them, origins of web pages, and networks."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from edge_asr.config_server import TOKEN_HASH, HttpConfig, is_loopback
from edge_asr.errors import ConfigError

COOKIE = "edge_asr_session"
SHORTEST_TOKEN = 32
"""Characters: a shorter one could be guessed from its hash."""
SESSION_S = 30 * 86_400.0
"""So long may a page stay logged in; a restart of the server ends it too."""
SESSIONS = 1_000
"""As many pages may be logged in; beyond that the oldest is logged out."""


def hash_of(token: str) -> str:
    """Return a token as the configuration keeps it. Tokens are random, so no slower hash is needed."""
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def read_tokens(path: Path) -> list[str]:
    """Return the hashes of the tokens in a file, a line each. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"http.token_file: cannot read {path} ({error}); correct the path") from error
    found = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if not TOKEN_HASH.fullmatch(line) and len(line) < SHORTEST_TOKEN:
            raise ConfigError(
                f"http.token_file: line {number} of {path} is no hash, and too short for a token; make one with"
                " edge-asr token"
            )
        found.append(line if TOKEN_HASH.fullmatch(line) else hash_of(line))
    return found


def hashes_of(config: HttpConfig) -> tuple[str, ...]:
    """Return the hashes of all tokens. Raises ConfigError where their file is wrong, or empty though it is needed."""
    in_file = [] if config.token_file is None else read_tokens(config.token_file)
    hashes = tuple(dict.fromkeys((*config.tokens, *in_file)))
    if not hashes and (config.token_file is not None or not is_loopback(config.host)):
        raise ConfigError(f"http.token_file: no token in {config.token_file}; make one with edge-asr token")
    return hashes


class Access:
    """Decides who may ask the HTTP server; for the thread of its event loop."""

    def __init__(self, config: HttpConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError where the file of tokens is wrong, or empty though it is needed."""
        self._hashes = hashes_of(config)
        self._host = config.host.lower()
        self._origins = frozenset(config.origins)
        self._clock = clock
        self._sessions: OrderedDict[str, float] = OrderedDict()

    def use(self, hashes: tuple[str, ...], origins: Iterable[str]) -> None:
        """Let others in from now on: those with these tokens, and these pages. Other tokens end all sessions."""
        if hashes != self._hashes:
            self._sessions.clear()
        self._hashes, self._origins = hashes, frozenset(origins)

    @property
    def required(self) -> bool:
        """Whether a token is needed."""
        return bool(self._hashes)

    def allows(self, connection: HTTPConnection) -> bool:
        """Tell whether a request brings a token, or the cookie of who has logged in; nothing is needed without any."""
        if not self.required:
            return True
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.knows(token.strip())
        return self._is_session(connection.cookies.get(COOKIE, ""))

    def knows(self, token: str) -> bool:
        """Tell whether a token is one of ours, in a time that does not tell which."""
        given = hash_of(token)
        return sum(hmac.compare_digest(given, known) for known in self._hashes) > 0

    def log_in(self, token: str) -> str | None:
        """Return what the cookie of who has this token is; None for a wrong one. Only its hash is kept."""
        if not self.knows(token):
            return None
        session = secrets.token_urlsafe(32)
        self._sessions[hash_of(session)] = self._clock() + SESSION_S
        while len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)
        return session

    def log_out(self, connection: HTTPConnection) -> None:
        """End the session of a request."""
        self._sessions.pop(hash_of(connection.cookies.get(COOKIE, "")), None)

    def _is_session(self, session: str) -> bool:
        ends_at = self._sessions.get(hash_of(session))
        return ends_at is not None and self._clock() < ends_at

    def is_meant(self, connection: HTTPConnection) -> bool:
        """Tell whether a request names this server.

        Where no token is needed, a page of a foreign name that has been made to stand for our address is not let in.
        """
        name = _name_of(connection.headers.get("host", ""))
        return self.required or name == self._host or is_loopback(name)

    def has_good_origin(self, connection: HTTPConnection) -> bool:
        """Tell whether a request comes from no web page, from our own, or from one that may."""
        origin = connection.headers.get("origin")
        if origin is None:
            return True
        own = connection.headers.get("host", "").lower()
        return origin.lower() in self._origins or (bool(own) and urlsplit(origin.lower()).netloc == own)


def _name_of(host: str) -> str:
    """Return the name in a Host header, without its port."""
    name, _, rest = host.rpartition(":")
    if rest.isdecimal() and name:
        host = name
    return host.strip("[]").lower()


class AllowedNetworks:
    """Which addresses may come to a server whose clients send no token."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = [
            ipaddress.ip_network(network) for network in networks
        ]

    def admits(self, address: str) -> bool:
        """Tell whether an address may come; this machine always may."""
        try:
            found = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return found.is_loopback or any(found in network for network in self._networks)
