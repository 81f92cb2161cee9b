"""Transcripts on MQTT: `said` for acting, at once or never; `transcript` for the record, until the broker has it.

`partial` is what is being said: at once or never.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge_asr import metrics
from edge_asr.config_mqtt import MqttConfig
from edge_asr.publish.commands import Command, Commands
from edge_asr.publish.connection import Connection
from edge_asr.publish.partials import Partials
from edge_asr.publish.payload import to_payload
from edge_asr.types import Partial, Transcript

log = logging.getLogger(__name__)

QUEUE_LIMIT = 1000
"""Transcripts held while the broker is away or slow; one more drops the oldest that is not in flight, counted."""
IN_FLIGHT_LIMIT = 20
"""Transcripts published and not yet acknowledged; the others wait."""
GOODBYE_S = 1.0
"""How long `close` waits for the acknowledgement of `offline`."""
ANSWERS_IN_FLIGHT_LIMIT = 20
"""Answers to commands published and not yet acknowledged."""
TICK_S = 1.0
"""The longest sleep of the publisher thread: paho looks after the keep-alive in between."""


@dataclass(frozen=True, slots=True)
class PublisherStats:
    """What the publisher has done since its start."""

    connected: bool
    """The broker has accepted the connection, and it is not known to be lost."""
    sent: int
    """Transcripts that the broker has acknowledged."""
    said: int
    """Transcripts published on `said`."""
    dropped_live: int
    """Transcripts not published on `said`, though there was something to act on: broker away, or too old."""
    dropped_transcripts: int
    """Transcripts given up: no room, left over at the close, offered after it, or impossible to publish."""
    queued: int
    """Transcripts not yet acknowledged, those in flight included."""
    reconnects: int
    """Connections after the first one."""


@dataclass(slots=True)
class _Record:
    """A transcript on its way to the broker."""

    transcript: Transcript
    offered_at: float
    """Monotonic seconds."""
    replayed: bool = False
    """It could not be sent on the connection of its moment."""
    failed: bool = False
    """Publishing it has raised."""

    @property
    def ended_at(self) -> float:
        """When its speech was seen to have ended (monotonic seconds); the offer, where it did not come in live."""
        marks = self.transcript.marks
        return self.offered_at if marks is None else marks.segment_ended_at

    def payload(self, **extra: str) -> str:
        """Return the JSON of the transcript with its age as of now."""
        age_s = time.monotonic() - self.offered_at
        transcript = dataclasses.replace(self.transcript, age_s=age_s, replayed=self.replayed)
        return to_payload({**extra, **transcript.to_json()})


class MqttPublisher:
    """A sink that publishes transcripts, the appliance's status and its state; the thread `publisher` does the work.

    `said` is meant for acting, so it goes out only if the broker is connected when the thread takes the transcript, and
    has since acknowledged something: a broker that hangs takes bytes all the same, and would deliver a command when it
    wakes up. The proof is, as a rule, the PUBACK of the transcript itself, and costs one round trip.

    `seq` stays null until an outbox numbers the transcripts.
    """

    def __init__(
        self,
        config: MqttConfig,
        device_id: str,
        *,
        finish: Callable[[Transcript], Transcript] = lambda given: given,
        command: Command | None = None,
    ) -> None:
        """Prepare; the publisher thread calls `finish` once for each transcript, before it is serialised.

        It calls `command` for each command that comes in; None, or `mqtt.commands` off: none is listened to.
        Raises ConfigError where the password cannot be read.
        """
        self._config = config
        self._finish = finish
        self._prefix = f"{config.base}/{device_id}"
        self._client_id = config.client_id or f"edge_asr-{device_id}"
        self._password = config.read_password()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)

        self._lock = threading.Lock()  # guards the six that other threads write
        self._inbox: deque[_Record] = deque()  # at most QUEUE_LIMIT, drops the oldest, counted in _rejected
        self._offered = 0
        self._rejected = self._rejected_live = 0
        self._state: str | None = None
        self._close_by: float | None = None

        self._partials = Partials()
        self._commands = Commands(self._prefix, command, self._wake) if command and config.commands else None
        self._answers_in_flight: set[int] = set()
        self._waiting: deque[_Record] = deque()  # together with _in_flight at most QUEUE_LIMIT
        self._in_flight: dict[int, _Record] = {}
        self._live: deque[_Record] = deque(maxlen=QUEUE_LIMIT)
        self._connection: Connection | None = None
        self._greeted = False
        self._state_sent: str | None = None
        self._attempts = self._greetings = 0
        self._failures = 0  # since a connection lasted
        self._retry_at = -math.inf
        self._warned: set[bool] = set()  # in this outage: of the absence (False), of the refusal (True)
        self._full = False  # it has been said that there is no room
        self._sent = self._said = self._dropped_live = self._dropped_transcripts = 0

    def start(self) -> None:
        """Start the thread; it connects by itself, as often as needed."""
        self._thread.start()

    def offer(self, transcript: Transcript) -> None:
        """Take a transcript, from any thread, without blocking."""
        record = _Record(transcript, time.monotonic())
        self._partials.forget(transcript.id)
        with self._lock:
            self._offered += 1
            if self._close_by is not None:
                self._reject(record)
                return
            full = len(self._inbox) >= QUEUE_LIMIT
            if full:
                self._reject(self._inbox.popleft())
            self._inbox.append(record)
        if full:
            self._warn_of_no_room()
        self._wake()

    def _reject(self, record: _Record) -> None:
        """Count a transcript that the publisher thread will never see."""
        self._rejected += 1
        metrics.DROPPED_TRANSCRIPTS.inc()
        if not record.transcript.lost:
            self._rejected_live += 1
            metrics.DROPPED_SAID.inc()

    def offer_partial(self, partial: Partial) -> None:
        """Publish a partial at once or never, from any thread, without blocking; never after its transcript."""
        self._partials.add(partial)
        self._wake()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Publish the state, from any thread; the latest wins and is published again on every connect."""
        text = to_payload(state)
        with self._lock:
            self._state = text
        self._wake()

    def stats(self) -> PublisherStats:
        """Return the counters, from any thread."""
        connection = self._connection
        sent, dropped, dropped_live = self._sent, self._dropped_transcripts, self._dropped_live
        with self._lock:  # read last: of what moves meanwhile, nothing may be missing from `queued`
            offered, rejected, rejected_live = self._offered, self._rejected, self._rejected_live
        return PublisherStats(
            connected=self._greeted and connection is not None and connection.up,
            sent=sent,
            said=self._said,
            dropped_live=dropped_live + rejected_live,
            dropped_transcripts=dropped + rejected,
            queued=offered - rejected - sent - dropped,
            reconnects=max(0, self._greetings - 1),
        )

    def close(self, drain_s: float) -> None:
        """Refuse further offers, send what is queued for up to `drain_s` if the broker is there, say `offline`, end."""
        with self._lock:
            close_by = time.monotonic() + drain_s  # a second call may only hasten the end
            self._close_by = close_by if self._close_by is None else min(self._close_by, close_by)
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(drain_s + 2 * GOODBYE_S)
        if not self._thread.is_alive():
            self._bell.close()
            self._ear.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes up anyway; closed: nobody is left to wake
            self._bell.send(b"\0")

    def _run(self) -> None:
        while not self._is_done():
            try:
                self._take()
                self._keep_connected()
                self._send()
                self._wait()
            except Exception:  # a bug met by one message must not silence the appliance for good
                log.exception("publishing failed; connecting anew")
                self._lose("internal error", refused=False)
                time.sleep(self._config.reconnect_min_s)
        self._say_goodbye()

    def _is_done(self) -> bool:
        if self._close_by is None:
            return False
        if time.monotonic() >= self._close_by or not (self.stats().queued or self._live):
            return True
        return self._connection is None and self._attempts > 0  # the broker is absent: waiting would not help

    def _take(self) -> None:
        """Move what was offered to the queues."""
        while self._inbox:
            with self._lock:
                record = self._inbox.popleft()
            try:
                record.transcript = self._finish(record.transcript)
            except Exception:  # the hook is another's; a sentence without its trace is better than none
                log.exception("the transcript %s could not be finished", record.transcript.id)
            record.replayed = self._connection is None or not self._connection.up
            self._waiting.append(record)
            if len(self._waiting) + len(self._in_flight) > QUEUE_LIMIT:
                self._waiting.popleft()
                self._drop_transcripts(1)
                self._warn_of_no_room()
            if record.transcript.lost:
                continue  # there is nothing to act on
            if record.replayed or len(self._live) == QUEUE_LIMIT:
                self._drop_live(1)  # the broker is away (or the oldest command makes room)
            if not record.replayed:
                self._live.append(record)

    def _drop_transcripts(self, count: int) -> None:
        self._dropped_transcripts += count
        metrics.DROPPED_TRANSCRIPTS.inc(count)

    def _drop_live(self, count: int) -> None:
        self._dropped_live += count
        metrics.DROPPED_SAID.inc(count)

    def _warn_of_no_room(self) -> None:
        """Say once, until the broker has been given everything, that transcripts are lost."""
        if not self._full:
            self._full = True
            log.warning("%d transcripts wait for the broker: from now on the oldest are dropped", QUEUE_LIMIT)

    def _keep_connected(self) -> None:
        connection = self._connection
        if connection is not None and connection.failure is not None:
            self._lose(connection.failure, connection.refused)
        elif connection is not None and connection.up and not self._greeted:
            self._greet(connection)
        elif connection is None and self._may_try():
            self._attempts += 1
            self._connection = Connection(
                self._config,
                self._client_id,
                self._password,
                will_topic=f"{self._prefix}/status",
                on_acknowledged=self._acknowledge,
                on_message=self._obey,
                wake=self._wake,
            )

    def _may_try(self) -> bool:
        return time.monotonic() >= self._retry_at and (self._close_by is None or self._attempts == 0)

    def _greet(self, connection: Connection) -> None:
        log.info("connected to the broker at %s:%d", self._config.host, self._config.port)
        connection.publish(f"{self._prefix}/status", "online", qos=1, retain=True)
        if self._commands is not None:
            connection.subscribe(self._commands.topics)
        self._state_sent = None
        self._greetings += 1
        self._greeted = True
        self._warned.clear()

    def _lose(self, why: str, refused: bool) -> None:
        """Give the connection up, keep the transcripts that it did not deliver, and plan the next attempt."""
        connection, self._connection, self._greeted = self._connection, None, False
        if connection is not None:
            connection.drop()
            if connection.up_since and time.monotonic() - connection.up_since >= self._config.reconnect_max_s:
                self._failures = 0  # only a connection that lasted ends the back-off: a flapping one does not
        self._waiting.extendleft(reversed(self._in_flight.values()))
        self._in_flight.clear()
        self._answers_in_flight.clear()
        for record in self._waiting:
            record.replayed = True
        self._drop_live(len(self._live))
        self._live.clear()
        delay_s = min(self._config.reconnect_max_s, self._config.reconnect_min_s * 2.0 ** min(self._failures, 16))
        delay_s *= random.uniform(0.5, 1.0)  # many appliances must not come back in step
        self._failures += 1
        self._retry_at = time.monotonic() + delay_s
        level = logging.DEBUG if refused in self._warned else logging.WARNING
        self._warned.add(refused)
        where = f"{self._config.host}:{self._config.port}"
        log.log(level, "no connection to the broker at %s: %s; trying again in %.1f s", where, why, delay_s)

    def _obey(self, topic: str, payload: bytes, retained: bool) -> None:
        if self._commands is not None and self._close_by is None:
            self._commands.receive(topic, payload, retained)

    def _acknowledge(self, message_id: int) -> None:
        self._answers_in_flight.discard(message_id)
        if self._in_flight.pop(message_id, None) is not None:
            self._sent += 1

    def _send(self) -> None:
        partials = self._partials.take()  # here, connected or not: none waits for the broker
        connection = self._connection
        if connection is None or not connection.up:
            return
        self._send_state(connection)
        while self._waiting and connection.up and len(self._in_flight) < IN_FLIGHT_LIMIT:
            self._send_record(connection)
        if not self._waiting:
            self._full = False
        self._send_live(connection)
        for partial in partials:
            if connection.brisk:
                connection.publish(f"{self._prefix}/partial", to_payload(partial.to_json()), qos=0)
        self._send_answers(connection)

    def _send_state(self, connection: Connection) -> None:
        if self._state is not None and self._state != self._state_sent:
            self._state_sent = self._state
            connection.publish(f"{self._prefix}/state", self._state_sent, qos=1, retain=True)

    def _send_answers(self, connection: Connection) -> None:
        """Publish what commands led to; what a lost connection had in flight is not sent again: the state says it."""
        answers = self._commands.answers if self._commands is not None else ()
        while answers and connection.up and len(self._answers_in_flight) < ANSWERS_IN_FLIGHT_LIMIT:
            topic, payload = answers.popleft()
            self._answers_in_flight.add(connection.publish(topic, payload, qos=1))

    def _send_record(self, connection: Connection) -> None:
        """Publish the transcript that waits first; one that raises again on the next connection is given up."""
        record = self._waiting[0]
        try:
            message_id = connection.publish(f"{self._prefix}/transcript", record.payload(), qos=1)
        except Exception:  # whatever it is, the transcripts behind this one must go out
            if not record.failed:
                record.failed = True
                raise
            log.exception("the transcript %s cannot be published and is dropped", record.transcript.id)
            self._drop_transcripts(1)
        else:
            self._in_flight[message_id] = record
        self._waiting.popleft()

    def _send_live(self, connection: Connection) -> None:
        """Publish on `said` what was spoken just now, once the broker has shown that it is alive since the offer."""
        while self._live:
            record = self._live[0]
            if time.monotonic() - record.ended_at > self._config.live_for_s:
                self._live.popleft()
                self._drop_live(1)
            elif connection.clear and connection.proven_at >= record.offered_at:
                connection.publish(f"{self._prefix}/said", record.payload(event_type="said"), qos=0)
                self._live.popleft()
                self._said += 1
            else:
                return

    def _wait(self) -> None:
        """Sleep until the broker sends, somebody calls `_wake`, or something is due; then serve the connection."""
        now = time.monotonic()
        due = now + TICK_S
        if self._connection is None:
            due = min(due, self._retry_at)
        if self._live:
            due = min(due, self._live[0].ended_at + self._config.live_for_s)
        if self._close_by is not None:
            due = min(due, max(self._close_by, now + 0.01))  # after it, GOODBYE_S runs in short steps
        poller = select.poll()
        poller.register(self._ear, select.POLLIN)
        if self._connection is not None:
            self._connection.register(poller)
        poller.poll(max(0.0, due - now) * 1000)
        with contextlib.suppress(BlockingIOError):  # it was not the bell
            self._ear.recv(4096)
        if self._connection is not None:
            self._connection.serve()

    def _say_goodbye(self) -> None:
        connection = self._connection
        if connection is not None and connection.up:
            self._send_state(connection)  # it may have been set at the very end
            self._send_answers(connection)
            offline = connection.publish(f"{self._prefix}/status", "offline", qos=1, retain=True)
            give_up_at = time.monotonic() + GOODBYE_S
            while connection.up and offline in connection.unacknowledged and time.monotonic() < give_up_at:
                self._wait()
            if offline not in connection.unacknowledged:
                connection.disconnect()
        if connection is not None:
            connection.drop()
        left = self.stats().queued
        if left:
            log.warning("closed with %d transcripts that the broker did not take", left)
        self._drop_transcripts(left)
        self._drop_live(len(self._live) + sum(not record.transcript.lost for record in self._inbox))
        for queue in (self._inbox, self._waiting, self._in_flight, self._live):
            queue.clear()
        self._connection = None
