"""paho clients as the configuration wants them, and why they cannot connect, in words."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import secrets
import socket
import ssl
import traceback
from pathlib import Path
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_asr.config_fields import MAX_MQTT_BYTES
from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import ConfigError, EdgeAsrError
from edge_asr.publish import second_look, tls
from edge_asr.publish.reasons import Problem

log = logging.getLogger(__name__)

Version = Literal["5", "3.1.1"]

CONNECT_TIMEOUT_S = 5.0
"""For the TCP connection, for each step of a handshake, and again for the broker's answer to CONNECT."""
MACHINE_ID = Path("/etc/machine-id")

for _packets in ReasonCode.names[149].values():
    # So Mosquitto answers a message that is too large; paho would hang up on it, for the standard does not list it.
    _packets.append(PacketTypes.PUBACK)


def make_client(config: MqttConfig, client_id: str, protocol: str) -> paho.Client:
    """Return a client with account, TLS and transport set; secrets are read anew. Raises ConfigError."""
    version = paho.MQTTv5 if protocol == "5" else paho.MQTTv311
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id,
        protocol=version,
        transport=config.transport,
        reconnect_on_failure=False,
    )
    if config.transport == "websockets":
        client.ws_set_options(path=config.websocket_path)
        client.on_socket_open = _keep_partial_frames
    if config.tls.enabled:
        client.tls_set_context(tls.make_context(config.tls))
    username, password = config.read_username(), config.read_password()
    for key, secret in (("username", username), ("password", password)):
        if secret is not None and len(secret.encode()) > MAX_MQTT_BYTES:
            raise ConfigError(f"mqtt.{key}: should be at most {MAX_MQTT_BYTES} bytes long; correct its file")
    client.username_pw_set(username, password)
    client.connect_timeout = CONNECT_TIMEOUT_S
    return client


def start_connect(
    client: paho.Client,
    config: MqttConfig,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    receive_maximum: int | None = None,
    largest_packet: int | None = None,
) -> None:
    """Connect, with all handshakes, and send CONNECT for a session that ends with the connection; blocks.

    With MQTT 5 the broker is told how many messages of QoS 1 may be on the way to us, and how large a packet may be.
    Raises OSError or ValueError: `in_words` says what they mean.
    """
    client.connect_timeout = timeout_s
    options: dict[str, Any] = {}
    if client.protocol == paho.MQTTv5:
        options = {"clean_start": True, "properties": _wishes(receive_maximum, largest_packet)}
    try:
        code = client.connect(config.host, config.port, config.keepalive_s, **options)
    except Exception as error:
        _close_sockets_of(error)
        raise
    if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
        raise ConnectionAbortedError(paho.error_string(code).rstrip(".").lower())
    _tune(client, math.ceil(config.live_for_s * 1000))


def _wishes(receive_maximum: int | None, largest_packet: int | None) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = 0
    if receive_maximum is not None:
        properties.ReceiveMaximum = receive_maximum
    if largest_packet is not None:
        properties.MaximumPacketSize = largest_packet
    return properties


def _close_sockets_of(error: Exception) -> None:
    """Close what paho had opened when a handshake failed: it leaves that to the garbage collector."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            if isinstance(value, socket.socket):
                value.close()


def _tune(client: paho.Client, patience_ms: int) -> None:
    sock = client.socket()
    if sock is None:
        return
    with socket.socket(fileno=os.dup(sock.fileno())) as twin:  # a WebSocket does not show its socket
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Where the network is dead, the kernel must not deliver a command minutes later by retransmission.
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience_ms)


def _keep_partial_frames(client: paho.Client, userdata: Any, sock: Any) -> None:
    """Let paho offer a packet again whose WebSocket frame has only partly been sent: it would forget the packet."""
    send = sock.send

    def send_all(data: bytes | bytearray) -> int:
        sent: int = send(data)
        if sent == 0 and data:
            raise BlockingIOError
        return sent

    sock.send = send_all


class ErrorLog(logging.Handler):
    """Keeps the last error of the network that a client met: paho tells its callbacks less than its log."""

    def __init__(self) -> None:
        super().__init__()
        self.last: OSError | None = None
        self.logger = logging.Logger("paho", logging.ERROR)
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the error."""
        for argument in record.args or ():
            if isinstance(argument, OSError):
                self.last = argument


def client_id(config: MqttConfig, device_id: str, state_dir: Path) -> str:
    """Return a client id that is unique at the broker, and the same after a restart."""
    return config.client_id or f"edge_asr-{device_id}-{_kept_suffix(device_id, state_dir / 'client_id')}"


def _kept_suffix(device_id: str, file: Path) -> str:
    try:
        kept = file.read_text(encoding="ascii").strip() if file.exists() else ""
        if re.fullmatch(r"[0-9a-f]{8}", kept):
            return kept
        suffix = secrets.token_hex(4)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("w", encoding="ascii") as output:
            output.write(f"{suffix}\n")
            output.flush()
            os.fsync(output.fileno())
    except (OSError, UnicodeDecodeError) as error:
        log.warning("the client id cannot be kept in %s (%s); it is made from the machine's id", file, error)
        return _machine_suffix(device_id)
    return suffix


def _machine_suffix(device_id: str) -> str:
    try:
        machine = MACHINE_ID.read_bytes().strip()
    except OSError:
        machine = socket.gethostname().encode()
    return hashlib.sha256(machine + b"\0" + device_id.encode()).hexdigest()[:8]


def in_words(error: Exception, config: MqttConfig) -> str:
    """Return one line: why there is no connection, and the remedy; as `explain`."""
    return str(explain(error, config))


def explain(error: Exception, config: MqttConfig) -> Problem:
    """Return what an error of `make_client` or `start_connect` means; blocks where the server is asked once more."""
    if isinstance(error, EdgeAsrError):
        why, _, remedy = str(error).rpartition("; ")
        return Problem(why or remedy, remedy if why else "correct it", lasting=True)
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in tls.WRONG_HOST:
            return tls.wrong_host(second_look.valid_names(config), config.host)
        return tls.untrusted(error)
    if isinstance(error, ssl.SSLError):
        return tls.failed(error, config)
    if isinstance(error, paho.WebsocketConnectionError):
        return second_look.no_websocket(config)
    if isinstance(error, socket.gaierror):
        return Problem("its name cannot be resolved", "correct mqtt.host, or the machine's name server")
    if isinstance(error, ConnectionRefusedError):
        remedy = "start the broker, or correct mqtt.host and mqtt.port (by itself Mosquitto only listens locally)"
        return Problem("connection refused: nobody listens there", remedy)
    if isinstance(error, TimeoutError):
        return Problem("it does not answer", "correct mqtt.host and mqtt.port, or let them through the firewall")
    if isinstance(error, (ConnectionResetError, BrokenPipeError)) and config.tls.enabled:
        return tls.no_tls_there()
    words = (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
    return Problem(words, "correct mqtt.host and mqtt.port, or see to the network")


class Versions:
    """Which version of MQTT to speak: the configured one; by `auto` 5, until the broker shows not to know it."""

    HANG_UPS = 2
    """So often in a row a broker hangs up on 5 before that is taken for the reason."""

    def __init__(self, configured: str) -> None:
        self.current: Version = "3.1.1" if configured == "3.1.1" else "5"
        self._may_change = configured == "auto"
        self._hang_ups = 0
        self._switched = False  # since one has worked

    def worked(self) -> None:
        """Keep the current version: the broker has accepted it."""
        self._hang_ups = 0
        self._switched = False

    def failed(self, *, unsupported: bool, hung_up: bool) -> bool:
        """Take note of a failed attempt; return whether to make the next one, with another version, at once."""
        self._hang_ups = self._hang_ups + 1 if hung_up else 0
        if not self._may_change or not (unsupported or self._hang_ups >= self.HANG_UPS):
            return False
        self._hang_ups = 0
        self.current = "3.1.1" if self.current == "5" else "5"
        at_once, self._switched = not self._switched, True  # where neither is understood, there is no hurry
        return at_once
