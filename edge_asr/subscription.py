"""A connection to the broker that subscribes, and comes back whenever it is lost."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import select
import socket
import time
from collections.abc import Callable, Sequence

from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.publish.client import Versions
from edge_asr.publish.connection import Connection
from edge_asr.publish.dialect import Message

log = logging.getLogger(__name__)


class Subscription:
    """Messages of some topics, as long as `serve` is called; all in the caller's thread."""

    def __init__(
        self,
        config: MqttConfig,
        topics: Sequence[str],
        *,
        on_message: Callable[[str, bytes, bool], None],
        on_connected: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        """`on_message` gets topic, payload and whether it was retained; `tell` what a person is to know."""
        self._config = config
        self._client_id = f"edge_asr-subscribe-{secrets.token_hex(4)}"  # a configured one is the appliance's
        self._topics = topics
        self._on_message = on_message
        self._on_connected = on_connected
        self._tell = tell
        self._place = f"{config.host}:{config.port}"
        self._versions = Versions(config.protocol)
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._connection: Connection | None = None
        self._greeted = self._greeted_once = self._away = False
        self._failures = 0  # since a connection was made
        self._retry_at = 0.0

    def serve(self, seconds: float) -> None:
        """Do what there is to do, and wait for more for up to so long.

        Raises EdgeAsrError where the very first connection fails for a reason that does not pass by itself.
        """
        now = time.monotonic()
        if self._connection is None and now >= self._retry_at:
            self._connect()
        self._wait(seconds if self._connection is not None else min(seconds, self._retry_at - now))
        connection = self._connection
        if connection is None:
            return
        connection.serve()
        if connection.problem is not None:
            self._lose(connection)
        elif connection.up and not self._greeted:
            self._greet(connection)

    def publish(self, topic: str, payload: str) -> None:
        """Publish with QoS 1, if there is a connection."""
        if self._connection is not None and self._connection.up:
            self._connection.publish(Message(topic, payload, qos=1))

    def close(self) -> None:
        """Leave the broker."""
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None
        self._bell.close()
        self._ear.close()

    def _connect(self) -> None:
        self._greeted = False
        self._connection = Connection(
            self._config,
            self._client_id,
            protocol=self._versions.current,
            on_acknowledged=lambda message_id: None,
            on_message=self._on_message,
            largest_incoming=None,
            wake=self._wake,
        )

    def _greet(self, connection: Connection) -> None:
        self._versions.worked()
        self._failures = 0
        self._greeted = self._greeted_once = True
        if self._away:
            self._away = False
            self._tell(f"connected to the broker at {self._place} again")
        connection.subscribe(self._topics)
        self._on_connected()

    def _lose(self, connection: Connection) -> None:
        """Plan the next attempt; say once that the broker is away."""
        self._connection = None
        connection.drop()
        if self._versions.failed(unsupported=connection.unsupported, hung_up=connection.hung_up):
            return
        if connection.lasting and not self._greeted_once:
            raise EdgeAsrError(f"no connection to the broker at {self._place}: {connection.failure}")
        longest = self._config.reconnect_max_s
        delay_s = longest if connection.lasting else min(longest, self._config.reconnect_min_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, 16)
        self._retry_at = time.monotonic() + delay_s * random.uniform(0.5, 1.0)
        if not self._away:
            self._away = True
            self._tell(f"no connection to the broker at {self._place}: {connection.failure}; it is tried again")

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes up anyway
            self._bell.send(b"\0")

    def _wait(self, seconds: float) -> None:
        poller = select.poll()
        poller.register(self._ear, select.POLLIN)
        if self._connection is not None:
            self._connection.register(poller)
        poller.poll(max(0.0, seconds) * 1000)
        with contextlib.suppress(BlockingIOError):  # it was not the bell
            self._ear.recv(4096)
