"""One connection to an MQTT broker, from the attempt to the loss."""

from __future__ import annotations

import itertools
import logging
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.publish import reasons, second_look
from edge_asr.publish.client import CONNECT_TIMEOUT_S, ErrorLog, explain, make_client, start_connect
from edge_asr.publish.dialect import Message
from edge_asr.publish.reasons import Problem, Refusal

log = logging.getLogger(__name__)

OPEN_S = 30.0
"""For name, connection and handshakes together: a name may be looked up for ever."""
PROOF_S = 1.0
"""A broker that has owed an acknowledgement for longer may hang."""
IN_FLIGHT_LIMIT = 20
"""Messages of QoS 1 that may be on their way in one direction, where the broker does not want fewer."""
LARGEST_INCOMING = 65_536
"""A larger packet a broker of MQTT 5 does not pass on to us, in bytes: commands are short. None: it passes on all."""
PACKETS_AT_A_TIME = 100
"""Packets read before the owner may do something else."""
OVERHEAD_BYTES = 32
"""What a packet of PUBLISH has beside topic and payload, at most."""


class Connection:
    """One connection to the broker; apart from its own helper thread, only the thread that made it touches it.

    Each has a paho client of its own, so nothing that paho queued outlives it: what is sent again, and that `said`
    never is, its owner alone decides. DNS, TCP connect and handshakes block, so they run on a short-lived daemon
    thread, as does the reading of certificates and secrets.
    """

    def __init__(
        self,
        config: MqttConfig,
        client_id: str,
        *,
        protocol: str,
        will: Message | None = None,
        on_acknowledged: Callable[[int], None],
        on_refused: Callable[[int, Refusal], None] = lambda message_id, refusal: None,
        on_message: Callable[[str, bytes, bool], None],
        wake: Callable[[], None],
        largest_incoming: int | None = LARGEST_INCOMING,
    ) -> None:
        """Start to connect; `wake` is called, by the helper thread, when there is something to serve.

        `on_acknowledged` and `on_refused` get what `publish` has returned, `on_message` topic, payload and whether it
        was retained; all of them are called by `serve`.
        """
        self.protocol = protocol
        """5 or 3.1.1."""
        self.up_since: float | None = None
        """Monotonic seconds of the broker's acceptance."""
        self.problem: Problem | None = None
        """Why it is over; None while it lives."""
        self.refused = False
        """The broker answered, and said no."""
        self.unsupported = False
        """The broker does not know this version of MQTT."""
        self.hung_up = False
        """The broker closed the connection instead of answering: an old one does that when it meets a new version."""
        self.in_flight_limit = IN_FLIGHT_LIMIT
        """Messages of QoS 1 that should await their PUBACK at a time; what the broker does not take yet waits here."""
        self.largest_packet: int | None = None
        """Bytes of the largest packet that the broker takes; None: it has not said. What is larger is refused here."""
        self.unacknowledged: dict[int, float] = {}
        """Id and moment of publishing of the QoS 1 messages that await their PUBACK, in order."""
        self.proven_at = -math.inf
        """When the newest message that the broker has answered was published: then, at least, it was alive."""
        self._config = config
        self._client_id = client_id
        self._open_by = math.inf
        self._answer_by = math.inf
        self._largest_incoming = largest_incoming
        self._opened = threading.Event()
        self._dropped = False
        self._cut_short = False  # it ended without an answer to CONNECT
        self._first_bytes = b""
        self._receive_maximum = 65_535
        self._ids = itertools.count(1)
        self._in_flight: dict[int, int] = {}  # our id of each message, by paho's
        self._held: deque[tuple[int, Message]] = deque()
        self._not_sent: deque[tuple[int, Refusal]] = deque()
        self._subscriptions: dict[int, Sequence[str]] = {}
        self._on_acknowledged = on_acknowledged
        self._on_refused = on_refused
        self._on_foreign_message = on_message
        self._wake = wake
        self._errors = ErrorLog()
        self._client: paho.Client | None = None
        self._will = will
        self._help(self._open)

    @property
    def failure(self) -> str | None:
        """Why it is over and what helps, in words; None while it lives."""
        return None if self.problem is None else str(self.problem)

    @property
    def lasting(self) -> bool:
        """It is over for a reason that does not pass by itself: trying again soon is of no use."""
        return self.problem is not None and self.problem.lasting

    @property
    def up(self) -> bool:
        """Accepted by the broker and not known to be lost."""
        return self.up_since is not None and self.problem is None

    @property
    def clear(self) -> bool:
        """Up, and everything published so far has left for the network."""
        return self.up and not self._held and not self._live.want_write()

    @property
    def brisk(self) -> bool:
        """Clear, and the broker owes no acknowledgement that should have come long ago."""
        now = time.monotonic()
        return self.clear and now - next(iter(self.unacknowledged.values()), now) <= PROOF_S

    @property
    def _live(self) -> paho.Client:
        assert self._client is not None, "opened"
        return self._client

    def register(self, poller: select.poll) -> None:
        """Let the poller watch the socket, where there is one."""
        sock = None if self.problem is not None or self._dropped else self._socket()
        if sock is not None:
            # What TLS has decrypted ahead no poll sees: that the socket can be written to, as nearly always, wakes.
            busy = self._live.want_write() or self._not_sent or self._pending(sock)
            poller.register(sock.fileno(), select.POLLIN | (select.POLLOUT if busy else 0))

    def serve(self) -> None:
        """Read, write and keep alive, without blocking."""
        if self.problem is not None or self._dropped:
            return
        if not self._opened.is_set():
            if time.monotonic() > self._open_by:
                self._fail(Problem("no answer in time", "see to mqtt.host, the name server and the network"))
            return
        if self.up_since is not None or self._peek():
            self._read()
        self._send_held()
        for step in (self._live.loop_write, self._live.loop_misc):
            self._check(step())
        while self._not_sent:
            self._on_refused(*self._not_sent.popleft())
        if self._cut_short and self.problem is None:
            self._help(self._look_closer)
        elif self.up_since is None and time.monotonic() > self._answer_by:
            remedy = "see whether mqtt.port and mqtt.transport are those of an MQTT broker, and its log"
            self._fail(Problem("it accepts connections but does not answer", remedy))

    def publish(self, message: Message) -> int:
        """Publish now and return the message's id; where that fails, `failure` says so afterwards.

        What is too large for the broker is not sent: with QoS 1 `on_refused` is told, soon.
        """
        message_id = next(self._ids)
        size = len(message.topic.encode()) + len(message.payload.encode()) + OVERHEAD_BYTES
        if self.largest_packet is not None and size > self.largest_packet:
            self._refuse_ourselves(message_id, message, reasons.too_large(size, self.largest_packet))
        elif message.qos == 0:
            self._send(message_id, message)
        else:
            self.unacknowledged[message_id] = time.monotonic()
            self._held.append((message_id, message))
            self._send_held()
        return message_id

    def subscribe(self, topics: Sequence[str], *, as_published: bool = False) -> None:
        """Ask for the messages on these topics, with QoS 1.

        Whether a message was published as one to be retained is passed on where the broker has kept it; `as_published`:
        always, which only a broker of MQTT 5 can.
        """
        if topics:
            if self.protocol == "5":
                options = SubscribeOptions(qos=1, retainAsPublished=as_published)
                code, number = self._live.subscribe([(topic, options) for topic in topics])
            else:
                code, number = self._live.subscribe([(topic, 1) for topic in topics])
            if number is not None:
                self._subscriptions[number] = topics
            self._check(code)

    def disconnect(self) -> None:
        """End the connection properly: the broker discards the last will."""
        if self._opened.is_set() and self._client is not None:
            self._client.disconnect()
        self.drop()

    def drop(self) -> None:
        """Close the socket without a word, so that the broker publishes the last will."""
        self._dropped = True
        if self._opened.is_set():
            self._close_socket()

    def _help(self, work: Callable[[], None]) -> None:
        """Let a helper thread do what blocks; until it is done only it touches the client."""
        self._opened.clear()
        self._open_by = time.monotonic() + OPEN_S
        threading.Thread(target=work, name="publisher-connect", daemon=True).start()

    def _open(self) -> None:
        """Make the client and connect; on a helper thread."""
        try:
            client = self._client = make_client(self._config, self._client_id, self.protocol)
            client.enable_logger(self._errors.logger)
            if self._will is not None:
                client.will_set(self._will.topic, self._will.payload, self._will.qos, self._will.retain)
            client.max_inflight_messages_set(0)  # unlimited: what has to wait waits here
            client.on_connect = self._on_connect
            client.on_disconnect = self._on_disconnect
            client.on_publish = self._on_publish
            client.on_subscribe = self._on_subscribe
            client.on_message = self._on_message
            client.on_socket_open = self._before_connect(client.on_socket_open)
            start_connect(
                client,
                self._config,
                timeout_s=CONNECT_TIMEOUT_S,
                receive_maximum=IN_FLIGHT_LIMIT,
                largest_packet=self._largest_incoming,
            )
        except Exception as error:  # whatever it is, the owner waits to be told
            if not isinstance(error, (OSError, ValueError, EdgeAsrError)):
                log.exception("connecting to the broker failed")
            self._fail(self._why_not_accepted() if self._cut_short else explain(error, self._config))
        finally:
            self._answer_by = time.monotonic() + CONNECT_TIMEOUT_S
            self._opened.set()
            if self._dropped:
                self._close_socket()
            self._wake()

    def _before_connect(self, prepare: Any) -> Callable[[paho.Client, Any, Any], None]:
        """Return what paho calls when the handshakes are done and CONNECT is next."""

        def check(client: paho.Client, userdata: Any, sock: Any) -> None:
            if prepare is not None:
                prepare(client, userdata, sock)
            if self._dropped:  # a late CONNECT would end the owner's newer connection, which has the same client id
                raise ConnectionAbortedError("no longer wanted")

        return check

    def _socket(self) -> Any:
        return self._live.socket() if self._opened.is_set() and self._client is not None else None

    def _close_socket(self) -> None:
        if (sock := self._socket()) is not None:
            sock.close()

    @staticmethod
    def _pending(sock: Any) -> bool:
        return hasattr(sock, "pending") and sock.pending() > 0

    def _peek(self) -> bool:
        """Note what the other side says first, which may not be MQTT; return whether there is something to read.

        What came between the look and the reading would be lost, so nothing is read that was not looked at.
        """
        sock = self._socket()
        if type(sock) is socket.socket:
            try:
                first = sock.recv(8, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                return True  # the reading tells what happened
            self._first_bytes = self._first_bytes or first
        return True

    def _read(self) -> None:
        for _ in range(PACKETS_AT_A_TIME):
            self._check(self._live.loop_read())
            if self.problem is not None or not self._pending(self._socket()):
                return

    def _send_held(self) -> None:
        while self._held and self.up and len(self._in_flight) < self._receive_maximum:
            self._send(*self._held.popleft())

    def _send(self, message_id: int, message: Message) -> None:
        properties = None
        if message.expires_s is not None and self.protocol == "5":
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.MessageExpiryInterval = message.expires_s
        info = self._live.publish(message.topic, message.payload, message.qos, message.retain, properties)
        if message.qos > 0:
            self._in_flight[info.mid] = message_id
        self._check(info.rc)

    def _refuse_ourselves(self, message_id: int, message: Message, refusal: Refusal) -> None:
        if message.qos > 0:
            self._not_sent.append((message_id, refusal))
        else:
            log.warning("a message on %s is not sent: %s", message.topic, refusal.why)

    def _check(self, code: MQTTErrorCode) -> None:
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS and not self._cut_short:
            self._fail(Problem(paho.error_string(code).rstrip(".").lower(), reasons.LOG))

    def _fail(self, problem: Problem) -> None:
        if self.problem is None:  # the first reason is the cause, the later ones follow from it
            self.problem = problem

    def _on_connect(self, client: paho.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if getattr(properties, "MaximumQoS", 1) == 0:
            reason = ReasonCode(PacketTypes.CONNACK, "QoS not supported")
        elif getattr(properties, "RetainAvailable", 1) == 0:
            reason = ReasonCode(PacketTypes.CONNACK, "Retain not supported")
        if reason.is_failure:
            self.refused = True
            self.unsupported = reason.value == reasons.UNSUPPORTED_VERSION
            self._fail(reasons.refused_connection(reason.value, str(reason), **_explanation(properties)))
            return
        self._receive_maximum = getattr(properties, "ReceiveMaximum", self._receive_maximum)
        self.in_flight_limit = min(IN_FLIGHT_LIMIT, self._receive_maximum)
        self.largest_packet = getattr(properties, "MaximumPacketSize", None)
        self.up_since = time.monotonic()

    def _on_disconnect(self, client: paho.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if self.problem is not None:
            return
        if flags.is_disconnect_packet_from_server:
            explanation = _explanation(properties)
            problem = reasons.ended_connection(reason.value, str(reason), client_id=self._client_id, **explanation)
            self.refused = problem.lasting
            self._fail(problem)
        elif self.up_since is None:
            self._cut_short = True
        else:
            self._fail(self._why_lost(str(reason)))

    def _look_closer(self) -> None:
        """Find out why the broker hung up; on a helper thread."""
        try:
            self._fail(self._why_not_accepted())
        finally:
            self._opened.set()
            self._wake()

    def _why_not_accepted(self) -> Problem:
        """Return why it ended without an answer to CONNECT; blocks."""
        first = self._first_bytes
        problem = second_look.cut_short(self._config, self.protocol, first, self._errors.last)
        self.unsupported = self.refused = first.startswith(second_look.CONNACK)
        self.hung_up = not first and not problem.lasting  # or another reason than the version was found
        return problem

    def _why_lost(self, reason: str) -> Problem:
        if reason == "Keep alive timeout":
            return Problem("it has stopped answering", "see to the broker and the network")
        if reason == "Protocol error":
            return Problem("it sent what MQTT does not allow", reasons.LOG)
        error = self._errors.last
        why = "the connection was lost" + (f" ({error.strerror.lower()})" if error and error.strerror else "")
        return Problem(why, f"see the broker's log, and whether another client uses the client id {self._client_id}")

    def _on_publish(self, client: paho.Client, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        message_id = self._in_flight.pop(mid, None)  # QoS 0 is reported too, and is not among them
        if message_id is None:
            return
        self.proven_at = max(self.proven_at, self.unacknowledged.pop(message_id))
        if reason.is_failure:
            said = getattr(properties, "ReasonString", "")
            self._on_refused(message_id, reasons.refused_message(reason.value, str(reason), said=said))
        else:
            self._on_acknowledged(message_id)

    def _on_subscribe(self, client: paho.Client, userdata: Any, mid: int, codes: Any, properties: Any) -> None:
        topics = self._subscriptions.pop(mid, ())
        refused = [
            f"{topic}: {str(code).lower()}" for topic, code in zip(topics, codes, strict=False) if code.is_failure
        ]
        if refused:
            remedy = "let this user subscribe there in the broker's access list"
            log.warning("the broker refuses to pass commands on (%s); %s", ", ".join(refused), remedy)

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # not every broker looks
            return
        self._on_foreign_message(topic, bytes(message.payload), message.retain)


def _explanation(properties: Any) -> dict[str, str]:
    """Return what a broker of MQTT 5 adds to a reason code."""
    return {
        "said": getattr(properties, "ReasonString", ""),
        "server": getattr(properties, "ServerReference", ""),
    }
