"""A short visit to the broker, by a command that waits for its end."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator

from edge_asr.config_mqtt import MqttConfig
from edge_asr.publish.client import Versions
from edge_asr.publish.connection import Connection
from edge_asr.publish.reasons import Problem

ATTEMPTS = Versions.HANG_UPS + 1
TOO_LATE = Problem("no answer in time", "correct mqtt.host and mqtt.port, or see to name server and firewall")


@contextlib.contextmanager
def visiting(config: MqttConfig, client_id: str, limit_s: float) -> Iterator[Connection]:
    """Connect, with the version of MQTT that the broker knows, and yield the connection; disconnect at the end.

    It is not up, and has a `problem`, where the broker has not admitted us within `limit_s` seconds.
    """
    give_up_at = time.monotonic() + limit_s
    versions = Versions(config.protocol)
    for attempt in range(1, ATTEMPTS + 1):
        with _Visit(config, client_id, versions.current) as visit:
            connection = visit.connection
            visit.wait_until_up(give_up_at)
            switched = versions.failed(unsupported=connection.unsupported, hung_up=connection.hung_up)
            again = (switched or (connection.hung_up and config.protocol == "auto")) and time.monotonic() < give_up_at
            if connection.up or not again or attempt == ATTEMPTS:
                connection.problem = connection.problem or (None if connection.up else TOO_LATE)
                yield connection
                return


class _Visit:
    """A connection that is served by whoever waits."""

    def __init__(self, config: MqttConfig, client_id: str, protocol: str) -> None:
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self.connection = Connection(
            config,
            client_id,
            protocol=protocol,
            on_acknowledged=lambda message_id: None,
            on_message=lambda topic, payload, retained: None,
            wake=self._wake,
        )

    def __enter__(self) -> _Visit:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.disconnect()
        self._bell.close()
        self._ear.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # nobody waits any more
            self._bell.send(b"\0")

    def wait_until_up(self, give_up_at: float) -> None:
        """Serve until the broker has admitted us, the connection is over, or it is too late."""
        connection = self.connection
        while not (connection.up or connection.problem) and (left := give_up_at - time.monotonic()) > 0:
            poller = select.poll()
            poller.register(self._ear, select.POLLIN)
            connection.register(poller)
            poller.poll(min(left, 1.0) * 1000)
            with contextlib.suppress(BlockingIOError):  # it was not the bell
                self._ear.recv(4096)
            connection.serve()
