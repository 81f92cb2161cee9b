"""One connection to an MQTT broker, from the attempt to the loss."""

from __future__ import annotations

import logging
import math
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from edge_asr.config_mqtt import MqttConfig

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
"""For the TCP connection, and again for the broker's answer to CONNECT."""
PROOF_S = 1.0
"""A broker that has owed an acknowledgement for longer may hang."""


class Connection:
    """One connection to the broker; apart from its own helper thread, only the thread that made it touches it.

    Each has a paho client of its own, so nothing that paho queued outlives it: what is sent again, and that `said`
    never is, its owner alone decides. DNS and TCP connect block, so they run on a short-lived daemon thread.
    """

    def __init__(
        self,
        config: MqttConfig,
        client_id: str,
        password: str | None,
        *,
        will_topic: str,
        on_acknowledged: Callable[[int], None],
        on_message: Callable[[str, bytes, bool], None],
        wake: Callable[[], None],
    ) -> None:
        """Start to connect; `wake` is called when there is something to serve.

        `on_acknowledged` gets a message id, `on_message` topic, payload and whether it was retained.
        """
        self.up_since: float | None = None
        """Monotonic seconds of the broker's acceptance."""
        self.failure: str | None = None
        """Why it is over, in words; None while it lives."""
        self.refused = False
        """The broker answered, and said no."""
        self.unacknowledged: dict[int, float] = {}
        """Id and moment of sending of the QoS 1 messages that await their PUBACK, in order."""
        self.proven_at = -math.inf
        """When the newest message that the broker has acknowledged was sent: then, at least, it was alive."""
        self._answer_by = math.inf
        self._opened = threading.Event()
        self._dropped = False
        self._on_acknowledged = on_acknowledged
        self._on_foreign_message = on_message
        self._wake = wake
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv311, reconnect_on_failure=False
        )
        self._client.username_pw_set(config.username, password)
        self._client.will_set(will_topic, "offline", qos=1, retain=True)
        self._client.max_inflight_messages_set(0)  # unlimited: the owner holds messages back, paho never does
        self._client.connect_timeout = CONNECT_TIMEOUT_S
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = self._on_publish
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        threading.Thread(target=self._open, args=(config,), name="publisher-connect", daemon=True).start()

    @property
    def up(self) -> bool:
        """Accepted by the broker and not known to be lost."""
        return self.up_since is not None and self.failure is None

    @property
    def clear(self) -> bool:
        """Up, and everything published so far has left for the network."""
        return self.up and not self._client.want_write()

    @property
    def brisk(self) -> bool:
        """Clear, and the broker owes no acknowledgement that should have come long ago."""
        now = time.monotonic()
        return self.clear and now - next(iter(self.unacknowledged.values()), now) <= PROOF_S

    def register(self, poller: select.poll) -> None:
        """Let the poller watch the socket, where there is one."""
        sock = self._client.socket() if self._opened.is_set() and self.failure is None else None
        if sock is not None:
            poller.register(sock.fileno(), select.POLLIN | (select.POLLOUT if self._client.want_write() else 0))

    def serve(self) -> None:
        """Read, write and keep alive, without blocking."""
        if not self._opened.is_set() or self.failure is not None:
            return
        for step in (self._client.loop_write, self._client.loop_read, self._client.loop_misc):
            self._check(step())
        if self.up_since is None and time.monotonic() > self._answer_by:
            self._fail("it accepts connections but does not answer")

    def publish(self, topic: str, payload: str, *, qos: int, retain: bool = False) -> int:
        """Publish now and return the message id; where that fails, `failure` says so afterwards."""
        sent_at = time.monotonic()
        info = self._client.publish(topic, payload, qos=qos, retain=retain)
        if qos > 0:
            self.unacknowledged[info.mid] = sent_at
        self._check(info.rc)
        return info.mid

    def subscribe(self, topics: str) -> None:
        """Ask for the messages on these topics, with QoS 1."""
        code, _ = self._client.subscribe(topics, qos=1)
        self._check(code)

    def disconnect(self) -> None:
        """End the connection properly: the broker discards the last will."""
        self._client.disconnect()
        self.drop()

    def drop(self) -> None:
        """Close the socket without a word, so that the broker publishes the last will."""
        self._dropped = True
        if self._opened.is_set():
            self._close_socket()

    def _open(self, config: MqttConfig) -> None:
        try:
            self._check(self._client.connect(config.host, config.port, keepalive=config.keepalive_s))
            self._tune(math.ceil(config.live_for_s * 1000))
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be encoded
            self._fail(_in_words(error))
        finally:
            self._answer_by = time.monotonic() + CONNECT_TIMEOUT_S
            self._opened.set()
            if self._dropped:
                self._close_socket()
            self._wake()

    def _tune(self, patience_ms: int) -> None:
        sock = self._client.socket()
        if isinstance(sock, socket.socket):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Where the network is dead, the kernel must not deliver a command minutes later by retransmission.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience_ms)

    def _close_socket(self) -> None:
        sock = self._client.socket()
        if sock is not None:
            sock.close()

    def _check(self, code: MQTTErrorCode) -> None:
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._fail(paho.error_string(code).rstrip(".").lower())

    def _fail(self, why: str) -> None:
        if self.failure is None:  # the first reason is the cause, the later ones follow from it
            self.failure = why

    def _on_connect(self, client: paho.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.refused = True
            self._fail(f"it refused: {str(reason).lower()}")
        else:
            self.up_since = time.monotonic()

    def _on_disconnect(self, client: paho.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._fail("the connection was lost" if reason == "Unspecified error" else str(reason).lower())

    def _on_publish(self, client: paho.Client, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        sent_at = self.unacknowledged.pop(mid, None)  # QoS 0 is reported too, and is not among them
        if sent_at is not None:
            self.proven_at = max(self.proven_at, sent_at)
            self._on_acknowledged(mid)

    def _on_subscribe(self, client: paho.Client, userdata: Any, mid: int, reasons: Any, properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            log.warning("the broker refuses to pass commands on; let this user subscribe to .../cmd/+ in its settings")

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # not every broker looks
            return
        self._on_foreign_message(topic, bytes(message.payload), message.retain)


def _in_words(error: OSError | ValueError) -> str:
    if isinstance(error, socket.gaierror):
        return "its name cannot be resolved"
    return (getattr(error, "strerror", None) or str(error)).lower()
