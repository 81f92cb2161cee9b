"""Takes back what a broker keeps of an appliance: discovery by Home Assistant, status and state."""

from __future__ import annotations

import secrets
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.publish.client import Version, Versions
from edge_asr.publish.connection import OPEN_S, Connection
from edge_asr.publish.dialect import Message
from edge_asr.publish.home_assistant import discovery_topics, is_ours
from edge_asr.publish.reasons import Refusal

QUIET_S = 1.0
"""A broker that has sent nothing for so long after the subscription has sent all that it keeps."""
LOOK_S = 15.0
"""The longest look at what it keeps."""
ACKNOWLEDGE_S = 10.0
"""For the acknowledgement of all that is taken back."""


@dataclass(slots=True)
class Forgotten:
    """What was found of an appliance, and taken back."""

    removed: list[str] = field(default_factory=list)
    """Topics, in the order of their removal."""
    left: list[str] = field(default_factory=list)
    """Topics of commands that somebody else has had retained."""
    online: bool = False
    """The appliance is connected: it publishes all of it again, at the latest when it connects anew."""


class Forgetter:
    """A short visit to a broker."""

    def __init__(self, config: MqttConfig) -> None:
        self._config = config
        self._retained: dict[str, bytes] = {}
        self._heard_at = 0.0
        self._refusals: list[str] = []

    def forget(self, device_id: str, discovery_prefix: str) -> Forgotten:
        """Empty all that an appliance has had retained; returns once the broker has acknowledged it.

        Raises EdgeAsrError where the broker is away, or says no, and ConfigError where a file of the configuration
        cannot be read.
        """
        connection = self._connect()
        try:
            base = f"{self._config.base}/{device_id}"
            self._look(connection, base, discovery_topics(discovery_prefix, device_id))
            found = self._sort(base)
            self._empty(connection, found.removed)
            return found
        finally:
            connection.disconnect()

    def _connect(self) -> Connection:
        versions = Versions(self._config.protocol)
        while True:
            connection = self._open(versions.current)
            self._serve(connection, partial(_is_decided, connection), OPEN_S, raises=False)
            if connection.up:
                return connection
            connection.drop()
            if not versions.failed(unsupported=connection.unsupported, hung_up=connection.hung_up):
                raise self._failed(connection.failure)

    def _open(self, protocol: Version) -> Connection:
        return Connection(
            self._config,
            f"edge_asr-forget-{secrets.token_hex(4)}",  # the appliance's own would end its connection
            protocol=protocol,
            on_acknowledged=lambda message_id: None,
            on_refused=self._note_refusal,
            on_message=self._note,
            largest_incoming=None,
            wake=lambda: None,
        )

    def _look(self, connection: Connection, base: str, discovery: tuple[str, ...]) -> None:
        connection.subscribe([f"{base}/status", f"{base}/state", f"{base}/cmd/+", *discovery])
        self._heard_at = time.monotonic()
        self._serve(connection, lambda: time.monotonic() - self._heard_at > QUIET_S, LOOK_S)

    def _sort(self, base: str) -> Forgotten:
        own = [topic for topic, payload in self._retained.items() if self._is_own(topic, payload, base)]
        return Forgotten(
            # The status last: Home Assistant then has no entity left to call unavailable.
            sorted(own, key=lambda topic: (topic == f"{base}/status", topic.startswith(base), topic)),
            sorted(topic for topic in self._retained if topic.startswith(f"{base}/cmd/")),
            self._retained.get(f"{base}/status") == b"online",
        )

    @staticmethod
    def _is_own(topic: str, payload: bytes, base: str) -> bool:
        return topic in (f"{base}/status", f"{base}/state") or (topic.endswith("/config") and is_ours(payload))

    def _empty(self, connection: Connection, topics: list[str]) -> None:
        for topic in topics:
            connection.publish(Message(topic, "", qos=1, retain=True))
        self._serve(connection, lambda: not connection.unacknowledged, ACKNOWLEDGE_S)
        if self._refusals:
            raise EdgeAsrError(f"the broker does not let this user take it back: {self._refusals[0]}")
        if connection.unacknowledged:
            raise self._failed("it does not acknowledge; see to the broker and the network")

    def _serve(
        self, connection: Connection, done: Callable[[], bool], patience_s: float, *, raises: bool = True
    ) -> None:
        """Serve the connection until something is so, or too much time has passed; it may have failed meanwhile."""
        give_up_at = time.monotonic() + patience_s
        while not done() and connection.failure is None and time.monotonic() < give_up_at:
            poller = select.poll()
            connection.register(poller)
            poller.poll(50)
            connection.serve()
        if raises and connection.failure is not None:
            raise self._failed(connection.failure)

    def _failed(self, why: str | None) -> EdgeAsrError:
        return EdgeAsrError(f"the broker at {self._config.host}:{self._config.port}: {why or 'no answer in time'}")

    def _note(self, topic: str, payload: bytes, retained: bool) -> None:
        if retained and payload:
            self._retained[topic] = payload
            self._heard_at = time.monotonic()

    def _note_refusal(self, message_id: int, refusal: Refusal) -> None:
        self._refusals.append(refusal.why)


def _is_decided(connection: Connection) -> bool:
    return connection.up_since is not None
