"""The sections about the speech server: who may ask over the network, in which dialect, and for how much."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from edge_asr.config_fields import Host, Integer, Number, ReadableFile, Section

TOKEN_HASH = re.compile(r"sha256:[0-9a-f]{64}")
"""A token as the configuration keeps it."""


def _token(value: str) -> str:
    if not TOKEN_HASH.fullmatch(value):
        raise ValueError("should be sha256: and 64 hexadecimal digits; edge-asr token makes a token and its line")
    return value


def _origin(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+", value):
        raise ValueError("should be an origin such as https://panel.local:8443")
    return value.lower()


def _network(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("should be a network such as 192.168.1.0/24, in quotes")
    try:
        return str(ipaddress.ip_network(value.strip(), strict=False))
    except ValueError as error:
        raise ValueError("should be a network such as 192.168.1.0/24, or one address") from error


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Network = Annotated[str, AfterValidator(_network)]


class ServerTlsConfig(Section):
    """Encryption of what the server sends; it takes effect with a restart."""

    cert_file: ReadableFile | None = None
    """The certificate, with those between it and its authority."""
    key_file: ReadableFile | None = None
    """Its key; null: it is in the same file."""

    @field_validator("key_file")
    @classmethod
    def _belongs_to_a_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("cert_file", "") is None:
            raise ValueError("a key needs its certificate; set cert_file")
        return value


class LimitsConfig(Section):
    """What one request, one client and all of them together may ask for."""

    body_mb: Number = Field(default=25.0, gt=0, le=1024)
    """The largest upload."""
    audio_s: Number = Field(default=600.0, ge=1, le=36_000)
    """The longest recording of one request; streams may last for ever."""
    connections: Integer = Field(default=256, ge=1, le=10_000)
    """Open at a time, on each port."""
    connections_per_client: Integer = Field(default=64, ge=1, le=10_000)
    """The same, from one address; from this machine: all of them."""
    streams: Integer = Field(default=32, ge=1, le=1000)
    """Streams that are listened to at a time, of all dialects."""
    requests_per_minute: Integer = Field(default=1200, ge=1, le=1_000_000)
    """From one address."""
    header_s: Number = Field(default=10.0, gt=0, le=300)
    """In which a request must have been made."""
    body_s: Number = Field(default=60.0, gt=0, le=3600)
    """In which its body must have come."""
    idle_s: Number = Field(default=60.0, gt=0, le=86_400)
    """After which a connection that says nothing is closed."""
    wait_s: Number = Field(default=10.0, gt=0, le=300)
    """So long may a request have to wait for its turn; beyond that it is refused at once, with Retry-After."""


class HttpConfig(Section):
    """The HTTP server: REST, OpenAI's API and WebSocket."""

    enabled: bool = True
    host: Host = Field(default="127.0.0.1", min_length=1)
    """The address to listen on; any but loopback needs a token."""
    port: Integer = Field(default=8080, ge=0, le=65_535)
    """0: any that is free."""
    tokens: tuple[Annotated[str, AfterValidator(_token)], ...] = ()
    """Hashes of the tokens that are taken."""
    token_file: ReadableFile | None = None
    """More of them, a line each: a hash, or a token of at least 32 characters as it is."""
    tls: ServerTlsConfig = ServerTlsConfig()
    origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    """Pages of other hosts that may open a WebSocket here; the own one may."""
    limits: LimitsConfig = LimitsConfig()

    @field_validator("token_file")
    @classmethod
    def _is_needed(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        host = info.data.get("host", "127.0.0.1")
        if info.data.get("enabled") and not is_loopback(host) and value is None and not info.data.get("tokens", True):
            raise ValueError(
                f"{host} can be reached from other machines, which needs a token: run edge-asr token, and set"
                " http.tokens or http.token_file"
            )
        return value


class _TokenlessConfig(Section):
    """What servers share whose clients cannot send a token."""

    enabled: bool = False
    host: Host = Field(default="127.0.0.1", min_length=1)
    """The address to listen on; any but loopback needs allow_networks."""
    port: Integer = Field(default=0, ge=0, le=65_535)
    allow_networks: tuple[Network, ...] = ()
    """Who may come from elsewhere, such as 192.168.1.0/24. This machine always may."""

    @field_validator("allow_networks")
    @classmethod
    def _are_needed(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        host = info.data.get("host", "127.0.0.1")
        if info.data.get("enabled") and not is_loopback(host) and not value:
            raise ValueError(
                f"{host} can be reached from other machines, and these clients send no token: name the networks that"
                " may come, such as 192.168.1.0/24"
            )
        return value


class WyomingConfig(_TokenlessConfig):
    """Wyoming, for Home Assistant's Assist."""

    port: Integer = Field(default=10_300, ge=0, le=65_535)
    zeroconf: bool = True
    """Announce it, where allow_networks lets somebody in."""


class FunasrConfig(_TokenlessConfig):
    """FunASR's WebSocket protocol."""

    port: Integer = Field(default=10_095, ge=0, le=65_535)
    tls: ServerTlsConfig = ServerTlsConfig()
    """FunASR's clients expect it unless told otherwise."""
