"""What tests of connections share: one that is served by the test itself, and the configuration of each way in."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from certificates import Certificates
from mosquitto import PATIENCE_S, Mosquitto, wait_for

from edge_asr.config_mqtt import MqttConfig
from edge_asr.publish.connection import Connection
from edge_asr.publish.dialect import Message
from edge_asr.publish.reasons import Refusal

WAYS = ("tcp", "tls", "websockets", "websockets+tls")
VERSIONS = ("3.1.1", "5")
WILL = Message("edge_asr/hall/status", "offline", qos=1, retain=True)


def way_in(broker: Mosquitto, way: str, certificates: Certificates | None = None, **keys: Any) -> MqttConfig:
    """Return the configuration of one of WAYS."""
    port = {
        "tcp": broker.port,
        "tls": broker.tls_port,
        "websockets": broker.websocket_port,
        "websockets+tls": broker.websocket_tls_port,
    }[way]
    if way.endswith("tls") and "tls" not in keys:
        assert certificates is not None
        keys["tls"] = {"ca_file": certificates.authority.file}
    return MqttConfig.model_validate({"port": port, "transport": way.partition("+")[0].replace("tls", "tcp"), **keys})


class Served:
    """A connection, served by whoever waits for something, until the end of the `with` block."""

    def __init__(self, config: MqttConfig, *, protocol: str = "5", name: str = "edge_asr-test") -> None:
        self.acknowledged: list[int] = []
        self.refused: list[tuple[int, Refusal]] = []
        self.messages: list[tuple[str, bytes, bool]] = []
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self.connection = Connection(
            config,
            name,
            protocol=protocol,
            will=WILL,
            on_acknowledged=self.acknowledged.append,
            on_refused=lambda message_id, refusal: self.refused.append((message_id, refusal)),
            on_message=lambda *message: self.messages.append(message),
            wake=self._wake,
        )

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait_for(self.connection._opened.is_set, "the end of the helper thread")
        self.connection.drop()
        self._bell.close()
        self._ear.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # nobody waits any more
            self._bell.send(b"\0")

    def serve(self, longest_s: float = 1.0) -> bool:
        """Sleep until there is something to do, and do it, as the publisher does; return whether nothing came."""
        poller = select.poll()
        poller.register(self._ear, select.POLLIN)
        self.connection.register(poller)
        awake = poller.poll(longest_s * 1000)
        if any(found == self._ear.fileno() for found, _ in awake):
            self._ear.recv(4096)
        self.connection.serve()
        return not awake

    def until(self, condition: Callable[[Served], object], what: str, longest_s: float = 1.0) -> None:
        """Serve until the condition holds, with the sleeps of the publisher."""
        give_up_at = time.monotonic() + PATIENCE_S
        while not condition(self):
            assert time.monotonic() < give_up_at, f"waited in vain for {what}; {self.connection.failure}"
            self.serve(longest_s)

    def connect(self) -> None:
        """Serve until the broker has accepted."""
        self.until(lambda s: s.connection.up or s.connection.failure, "the connection")
        assert self.connection.up, self.connection.failure

    def fail(self) -> str:
        """Serve until it has failed, and return why."""
        self.until(lambda s: s.connection.failure, "the failure", longest_s=0.05)
        assert self.connection.failure is not None
        return self.connection.failure

    def publish(self, topic: str, payload: str, *, qos: int = 1, **keys: Any) -> int:
        return self.connection.publish(Message(topic, payload, qos, **keys))

    def deliver(self, topic: str, payload: str, **keys: Any) -> None:
        """Publish with QoS 1, and serve until it is acknowledged."""
        message_id = self.publish(topic, payload, **keys)
        self.until(lambda s: message_id in s.acknowledged, "the acknowledgement")
