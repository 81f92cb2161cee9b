"""Transcripts on MQTT: `said` for acting, at once or never; `transcript` for the record, from the outbox.

`partial` is what is being said: at once or never.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_asr import metrics
from edge_asr.config_mqtt import MqttConfig
from edge_asr.publish.client import Versions
from edge_asr.publish.commands import Command, Commands
from edge_asr.publish.connection import Connection
from edge_asr.publish.delivery import Delivery
from edge_asr.publish.dialect import Dialect, Message
from edge_asr.publish.live import Live
from edge_asr.publish.notices import Notices
from edge_asr.publish.outbox import CLOSE_S, Outbox
from edge_asr.publish.partials import Partials
from edge_asr.publish.payload import to_payload
from edge_asr.publish.reasons import Refusal
from edge_asr.types import Partial, Transcript

log = logging.getLogger(__name__)

INBOX_LIMIT = 1000
"""Transcripts offered and not yet recorded; one more drops the oldest, counted."""
GOODBYE_S = 1.0
"""How long `close` waits for the acknowledgement of `offline`."""
TICK_S = 1.0
"""The longest sleep of the publisher thread: paho looks after the keep-alive in between, the outbox after itself."""


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
    """Transcripts given up: no room, offered after the close, or impossible to write down."""
    queued: int
    """Transcripts not yet acknowledged, those in flight and those that wait in the outbox included."""
    reconnects: int
    """Connections after the first one."""
    last_failure: str
    """Why the last connection ended, or did not come about; empty: none has."""


class MqttPublisher:
    """A sink that publishes transcripts, the appliance's status and its state; the thread `publisher` does the work.

    It alone uses the outbox and the connection: take, insert, commit, publish. It never waits for a disk to be flushed.
    """

    def __init__(
        self,
        config: MqttConfig,
        device_id: str,
        outbox: Outbox,
        *,
        client_id: str,
        finish: Callable[[Transcript], Transcript] = lambda given: given,
        command: Command | None = None,
        dialects: Sequence[Dialect] = (),
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; the publisher thread calls `finish` once for each transcript, before it is serialised.

        It calls `command` for each command that comes in; None, or `mqtt.commands` off: none is listened to. It closes
        the outbox in the end, and calls `changed` when `trouble` is another one.
        """
        self._config = config
        self._finish = finish
        self._prefix = f"{config.base}/{device_id}"
        self._client_id = client_id
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)

        self._lock = threading.Lock()  # guards the five that other threads write
        self._inbox: deque[tuple[Transcript, float]] = deque()  # at most INBOX_LIMIT, drops the oldest, in _rejected
        self._offered = self._rejected = self._rejected_live = 0
        self._state: str | None = None
        self._close_by: float | None = None

        self._outbox = outbox
        self._delivery = Delivery(outbox, f"{self._prefix}/transcript")
        self._live = Live(config.live_for_s)
        self._partials = Partials()
        local = {"replay": self._delivery.replay, "flush": self._delivery.flush}
        commands = Commands(self._prefix, command, self.wake, local) if command and config.commands else None
        self._notices = Notices(self._prefix, commands, dialects)
        self._dialects = dialects
        self._changed = changed
        self._connection: Connection | None = None
        self._versions = Versions(config.protocol)
        self._greeted = False
        self._tend_at = -math.inf
        self._attempts = self._greetings = 0
        self._failures = 0  # since a connection lasted
        self._retry_at = -math.inf
        self._last_failure = ""
        self._warned: set[str] = set()  # the failures told of in this outage
        self._trouble = ""
        self._recorded = self._unwritable = 0

    @property
    def trouble(self) -> str:
        """What the broker refuses, in words; empty: nothing. From any thread."""
        return self._trouble

    def describe(self) -> dict[str, Any]:
        """Return what `state` says of the broker, from any thread: what went wrong is told once it is over."""
        reconnects = max(0, self._greetings - 1)
        return {"connected": self._greeted, "reconnects": reconnects, "last_failure": self._last_failure}

    def start(self) -> None:
        """Start the thread; it connects by itself, as often as needed."""
        self._thread.start()

    def offer(self, transcript: Transcript) -> None:
        """Take a transcript, from any thread, without blocking."""
        self._partials.forget(transcript.id)
        with self._lock:
            self._offered += 1
            if self._close_by is not None:
                self._reject(transcript)
                return
            if len(self._inbox) >= INBOX_LIMIT:
                self._reject(self._inbox.popleft()[0])
            self._inbox.append((transcript, time.monotonic()))
        self.wake()

    def _reject(self, transcript: Transcript) -> None:
        """Count a transcript that the publisher thread will never see."""
        self._rejected += 1
        metrics.DROPPED_TRANSCRIPTS.inc()
        if not transcript.lost:
            self._rejected_live += 1
            metrics.DROPPED_SAID.inc()

    def offer_partial(self, partial: Partial) -> None:
        """Publish a partial at once or never, from any thread, without blocking; never after its transcript."""
        self._partials.add(partial)
        self.wake()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Publish the state, from any thread; the latest wins and is published again on every connect."""
        text = to_payload(state)
        with self._lock:
            self._state = text
        self.wake()

    def stats(self) -> PublisherStats:
        """Return the counters, from any thread."""
        connection = self._connection
        recorded = self._recorded  # read before the outbox: of what moves meanwhile, nothing may be missing
        outbox = self._outbox.stats()
        with self._lock:
            offered, rejected, rejected_live = self._offered, self._rejected, self._rejected_live
        return PublisherStats(
            connected=self._greeted and connection is not None and connection.up,
            sent=self._delivery.sent,
            said=self._live.said,
            dropped_live=self._live.dropped + rejected_live,
            dropped_transcripts=rejected + self._unwritable + outbox.dropped,
            queued=offered - rejected - recorded + outbox.pending,
            reconnects=max(0, self._greetings - 1),
            last_failure=self._last_failure,
        )

    def close(self, drain_s: float) -> None:
        """Refuse further offers, send what is queued for up to `drain_s` if the broker is there, say `offline`, end.

        What is left stays in the outbox for the next start.
        """
        with self._lock:
            close_by = time.monotonic() + drain_s  # a second call may only hasten the end
            self._close_by = close_by if self._close_by is None else min(self._close_by, close_by)
        self.wake()
        if self._thread.ident is None:
            self._take()
            self._outbox.close()
        else:
            self._thread.join(drain_s + 2 * GOODBYE_S + CLOSE_S)
        if not self._thread.is_alive():
            self._bell.close()
            self._ear.close()

    def wake(self) -> None:
        """Have the thread look at what has come up; from any thread."""
        with contextlib.suppress(OSError):  # full: it wakes up anyway; closed: nobody is left to wake
            self._bell.send(b"\0")

    def _run(self) -> None:
        while not self._is_done():
            try:
                self._take()
                self._keep_connected()
                self._send()
                self._tend()
                self._wait()
            except Exception:  # a bug met by one message must not silence the appliance for good
                log.exception("publishing failed; connecting anew")
                self._lose("internal error")
                time.sleep(self._config.reconnect_min_s)
        self._say_goodbye()

    def _is_done(self) -> bool:
        if self._close_by is None:
            return False
        if time.monotonic() >= self._close_by or not (self.stats().queued or self._live.next_end()):
            return True
        if self._connection is None and self._attempts > 0:  # the broker is absent: waiting would not help
            self._take()
            return True
        return False

    def _take(self) -> None:
        """Record what was offered, all of it at once."""
        with self._lock:
            taken = list(self._inbox)
            self._inbox.clear()
        written: list[tuple[Transcript, float, str]] = []
        for transcript, offered_at in taken:
            finished = self._finished(transcript)
            try:
                written.append((finished, offered_at, to_payload(finished.to_json())))
            except Exception:  # whatever it is, the others must be recorded
                log.exception("the transcript %s cannot be written down and is dropped", transcript.id)
                self._unwritable += 1
                metrics.DROPPED_TRANSCRIPTS.inc()
        rows = (
            self._delivery.record([(transcript.id, payload) for transcript, _, payload in written]) if written else []
        )
        self._recorded += len(taken)
        for (transcript, offered_at, _), row in zip(written, rows, strict=True):
            self._live.add(transcript, row, offered_at, self._connection)

    def _finished(self, transcript: Transcript) -> Transcript:
        try:
            return self._finish(transcript)
        except Exception:  # the hook is another's; a sentence without its trace is better than none
            log.exception("the transcript %s could not be finished", transcript.id)
            return transcript

    def _keep_connected(self) -> None:
        connection = self._connection
        if connection is not None and connection.failure is not None:
            other = self._versions.failed(unsupported=connection.unsupported, hung_up=connection.hung_up)
            self._lose(connection.failure, lasting=connection.lasting, at_once=other)
        elif connection is not None and connection.up and not self._greeted:
            self._arrive(connection)
        elif connection is not None and connection.up and time.monotonic() >= self._notices.greet_at:
            self._notices.greet(connection)
        elif connection is None and self._may_try():
            self._attempts += 1
            self._connection = Connection(
                self._config,
                self._client_id,
                protocol=self._versions.current,
                will=Message(f"{self._prefix}/status", "offline", qos=1, retain=True),
                on_acknowledged=self._acknowledge,
                on_refused=self._refuse,
                on_message=self._receive,
                wake=self.wake,
            )

    def _may_try(self) -> bool:
        return time.monotonic() >= self._retry_at and (self._close_by is None or self._attempts == 0)

    def _arrive(self, connection: Connection) -> None:
        self._versions.worked()
        where = f"{self._config.host}:{self._config.port}"
        log.info("connected to the broker at %s, with MQTT %s", where, connection.protocol)
        self._notices.subscribe(connection)
        self._delivery.begin()
        self._greetings += 1
        self._greeted = True
        self._warned.clear()
        self._changed()
        self._notices.greet(connection)

    def _lose(self, why: str, *, lasting: bool = False, at_once: bool = False) -> None:
        """Give the connection up, and plan the next attempt."""
        connection, self._connection = self._connection, None
        greeted, self._greeted = self._greeted, False
        if connection is not None:
            connection.drop()
            if connection.up_since and time.monotonic() - connection.up_since >= self._config.reconnect_max_s:
                self._failures = 0  # only a connection that lasted ends the back-off: a flapping one does not
        self._last_failure = why
        self._delivery.lose(connection)
        self._live.forget()
        self._notices.lose()
        self._tend_outbox(online=False)
        self._look_for_trouble()
        if greeted:
            self._changed()
        longest = self._config.reconnect_max_s
        delay_s = min(longest, self._config.reconnect_min_s * 2.0 ** min(self._failures, 16))
        # Many appliances must not come back in step; and what only people can mend is not asked for all the time.
        delay_s = (longest if lasting else delay_s) * random.uniform(0.5, 1.0)
        delay_s = 0.0 if at_once else delay_s
        self._failures += 1
        self._retry_at = time.monotonic() + delay_s
        level = logging.DEBUG if why in self._warned else logging.WARNING
        if len(self._warned) < 10:
            self._warned.add(why)
        where = f"{self._config.host}:{self._config.port}"
        log.log(level, "no connection to the broker at %s: %s; trying again in %.1f s", where, why, delay_s)

    def _receive(self, topic: str, payload: bytes, retained: bool) -> None:
        if self._close_by is None:
            self._notices.receive(topic, payload, retained)

    def _acknowledge(self, message_id: int) -> None:
        if not self._notices.acknowledge(message_id):
            self._delivery.acknowledge(message_id)
        if self._trouble:
            self._look_for_trouble()

    def _refuse(self, message_id: int, refusal: Refusal) -> None:
        if not self._notices.refuse(message_id, refusal):
            self._delivery.refuse(message_id, refusal)
        self._look_for_trouble()

    def _look_for_trouble(self) -> None:
        trouble = self._delivery.trouble or self._notices.trouble
        if trouble != self._trouble:
            self._trouble = trouble
            self._changed()

    def _send(self) -> None:
        partials = self._partials.take()  # here, connected or not: none waits for the broker
        self._delivery.note()
        connection = self._connection
        self._notices.collect(connection)
        if connection is None or not connection.up:
            return
        self._notices.tell_state(connection, self._state)
        self._delivery.send(connection)
        self._live.send(connection, self._say, self._delivery.content)
        for partial in partials:
            if connection.brisk:
                payload = to_payload(partial.to_json())
                connection.publish(Message(f"{self._prefix}/partial", payload, expires_s=self._live_s))
        self._notices.send(connection)

    @property
    def _live_s(self) -> int:
        return math.ceil(self._config.live_for_s)

    def _say(self, said: Mapping[str, Any]) -> None:
        assert self._connection is not None
        self._connection.publish(Message(f"{self._prefix}/said", to_payload(said), expires_s=self._live_s))
        for dialect in self._dialects:
            for message in dialect.said(said):
                self._connection.publish(message)

    def _tend(self) -> None:
        """Let the outbox look after itself, about once a second."""
        now = time.monotonic()
        if now >= self._tend_at:
            self._tend_at = now + TICK_S
            connection = self._connection
            self._tend_outbox(online=connection is not None and connection.up and connection.brisk)

    def _tend_outbox(self, online: bool) -> None:
        if self._outbox.tend(online):
            self._delivery.forget()

    def _wait(self) -> None:
        """Sleep until the broker sends, somebody calls `_wake`, or something is due; then serve the connection."""
        now = time.monotonic()
        due = min(now + TICK_S, self._notices.greet_at)
        if self._connection is None:
            due = min(due, self._retry_at)
        if (live_until := self._live.next_end()) is not None:
            due = min(due, live_until)
        if self._delivery.flushing:
            due = min(due, now + 0.05)  # the disk does not wake us
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
        """Say `offline`, and leave the rest in the outbox."""
        connection = self._connection
        if connection is not None and connection.up:
            self._notices.tell_state(connection, self._state)  # it may have been set at the very end
            self._notices.collect(connection)
            self._notices.send(connection)
            offline = self._notices.tell_status(connection, "offline")
            give_up_at = time.monotonic() + GOODBYE_S
            while connection.up and offline in connection.unacknowledged and time.monotonic() < give_up_at:
                self._wait()
            if offline not in connection.unacknowledged:
                connection.disconnect()
        if connection is not None:
            connection.drop()
        self._take()
        self._delivery.lose(None)
        self._live.forget()
        self._connection = None
        self._outbox.close()
        if left := self.stats().queued:
            log.warning("%d transcripts wait in the outbox for the next start: the broker did not take them", left)
