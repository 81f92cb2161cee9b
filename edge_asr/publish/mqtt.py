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
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from edge_asr import metrics
from edge_asr.config_mqtt import MqttConfig
from edge_asr.publish.client import Versions
from edge_asr.publish.commands import Command, Commands
from edge_asr.publish.connection import Connection
from edge_asr.publish.delivery import Delivery
from edge_asr.publish.dialect import Dialect, Greeting, Message
from edge_asr.publish.live import Live
from edge_asr.publish.outbox import Outbox
from edge_asr.publish.partials import Partials
from edge_asr.publish.payload import to_payload
from edge_asr.publish.reasons import Refusal
from edge_asr.types import Partial, Transcript

log = logging.getLogger(__name__)

INBOX_LIMIT = 1000
"""Transcripts offered and not yet recorded; one more drops the oldest, counted."""
GOODBYE_S = 1.0
"""How long `close` waits for the acknowledgement of `offline`."""
ERRANDS_LIMIT = 20
"""Answers to commands and messages of dialects published and not yet acknowledged; the others wait."""
ANSWER_FOR_S = 60
"""Nobody waits for longer for the answer to a command."""
GREET_WITHIN_S = 3.0
"""When everybody is asked to introduce themselves again, each does so some time within this."""
FLUSH_S = 10.0
"""`flush` is answered after this time at the latest."""
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


@dataclass(frozen=True, slots=True)
class _Flush:
    """Somebody waits until everything up to here is acknowledged and on the disk."""

    to_seq: int
    by: float
    """Monotonic seconds."""
    done: Future[Mapping[str, Any]]


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
        local = {"replay": self._replay, "flush": self._flush}
        self._commands = Commands(self._prefix, command, self.wake, local) if command and config.commands else None
        self._dialects = dialects
        self._changed = changed
        self._flushes: list[_Flush] = []
        self._errands: deque[Message] = deque()  # as many as commands and dialects have to say at a time
        self._errands_in_flight: set[int] = set()
        self._topics: dict[int, str] = {}  # of what is in flight and no transcript
        self._refused: dict[str, str] = {}  # why, by topic
        self._connection: Connection | None = None
        self._versions = Versions(config.protocol)
        self._greeted = False
        self._greet_at = math.inf
        self._tend_at = -math.inf
        self._state_sent: str | None = None
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
            self._thread.join(drain_s + 2 * GOODBYE_S)
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
        elif connection is not None and connection.up and time.monotonic() >= self._greet_at:
            self._greet(connection)
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
        topics = [] if self._commands is None else [self._commands.topics]
        topics += [topic for dialect in self._dialects for topic in dialect.topics]
        if topics:
            connection.subscribe(topics)
        self._delivery.begin()
        self._greetings += 1
        self._greeted = True
        self._warned.clear()
        self._refused.clear()
        self._greet(connection)
        self._look_for_trouble()

    def _greet(self, connection: Connection) -> None:
        """Publish everything retained: status, state, and what other languages need."""
        self._greet_at = math.inf
        self._publish(connection, Message(f"{self._prefix}/status", "online", qos=1, retain=True))
        self._state_sent = None
        for dialect in self._dialects:
            for message in dialect.greet():
                self._publish(connection, message)

    def _publish(self, connection: Connection, message: Message) -> int:
        """Publish what is no transcript."""
        message_id = connection.publish(message)
        if message.qos > 0:
            self._topics[message_id] = message.topic
        return message_id

    def _lose(self, why: str, *, lasting: bool = False, at_once: bool = False) -> None:
        """Give the connection up, and plan the next attempt."""
        connection, self._connection, self._greeted = self._connection, None, False
        if connection is not None:
            connection.drop()
            if connection.up_since and time.monotonic() - connection.up_since >= self._config.reconnect_max_s:
                self._failures = 0  # only a connection that lasted ends the back-off: a flapping one does not
        self._last_failure = why
        self._delivery.lose(connection)
        self._live.forget()
        self._errands_in_flight.clear()
        self._topics.clear()
        self._outbox.tend(online=False)
        self._look_for_trouble()
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
        if self._close_by is not None:
            return
        if self._commands is not None and topic.startswith(f"{self._prefix}/cmd/"):
            self._commands.receive(topic, payload, retained)
            return
        for dialect in self._dialects:
            if dialect.receive(topic, payload, retained) is Greeting.AGAIN:
                self._greet_at = time.monotonic() + random.uniform(0, GREET_WITHIN_S)

    def _acknowledge(self, message_id: int) -> None:
        self._errands_in_flight.discard(message_id)
        if (topic := self._topics.pop(message_id, None)) is None:
            self._delivery.acknowledge(message_id)
        elif self._refused.pop(topic, None) is not None:
            self._look_for_trouble()
        if self._trouble and not self._delivery.trouble:
            self._look_for_trouble()

    def _refuse(self, message_id: int, refusal: Refusal) -> None:
        self._errands_in_flight.discard(message_id)
        topic = self._topics.pop(message_id, None)
        if topic is None:
            self._delivery.refuse(message_id, refusal)
        elif topic not in self._refused:
            self._refused[topic] = refusal.why
            log.warning("the broker refuses what is published on %s: %s", topic, refusal.why)
        self._look_for_trouble()

    def _look_for_trouble(self) -> None:
        refused = next((f"the broker refuses {topic}: {why}" for topic, why in self._refused.items()), "")
        trouble = self._delivery.trouble or refused
        if trouble != self._trouble:
            self._trouble = trouble
            self._changed()

    def _send(self) -> None:
        partials = self._partials.take()  # here, connected or not: none waits for the broker
        self._delivery.note()
        self._finish_flushes()
        self._collect_errands()
        connection = self._connection
        if connection is None or not connection.up:
            return
        self._send_state(connection)
        self._delivery.send(connection)
        self._live.send(connection, self._say, self._delivery.content)
        for partial in partials:
            if connection.brisk:
                payload = to_payload(partial.to_json())
                connection.publish(Message(f"{self._prefix}/partial", payload, expires_s=self._live_s))
        self._run_errands(connection)

    @property
    def _live_s(self) -> int:
        return math.ceil(self._config.live_for_s)

    def _say(self, said: Mapping[str, Any]) -> None:
        assert self._connection is not None
        self._connection.publish(Message(f"{self._prefix}/said", to_payload(said), expires_s=self._live_s))
        for dialect in self._dialects:
            for message in dialect.said(said):
                self._connection.publish(message)

    def _send_state(self, connection: Connection) -> None:
        if self._state is not None and self._state != self._state_sent:
            self._state_sent = self._state
            self._publish(connection, Message(f"{self._prefix}/state", self._state_sent, qos=1, retain=True))

    def _collect_errands(self) -> None:
        """Take the answers to commands, and what dialects have to say: to nobody, where nobody is there to hear."""
        answers = self._commands.answers if self._commands is not None else ()
        while answers and len(self._errands) < ERRANDS_LIMIT:
            topic, payload = answers.popleft()
            self._errands.append(Message(topic, payload, qos=1, expires_s=ANSWER_FOR_S))
        for dialect in self._dialects:
            messages = list(dialect.take())
            if self._connection is not None and self._connection.up:
                self._errands.extend(messages)

    def _run_errands(self, connection: Connection) -> None:
        """Publish them; what a lost connection had in flight is not sent again: the state says it."""
        while self._errands and connection.up and len(self._errands_in_flight) < ERRANDS_LIMIT:
            message = self._errands.popleft()
            message_id = self._publish(connection, message)
            if message.qos > 0:
                self._errands_in_flight.add(message_id)
            self._collect_errands()

    def _tend(self) -> None:
        """Let the outbox look after itself, about once a second."""
        now = time.monotonic()
        if now >= self._tend_at:
            self._tend_at = now + TICK_S
            connection = self._connection
            self._outbox.tend(online=connection is not None and connection.up and connection.brisk)

    def _replay(self, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        """Obey `cmd/replay`."""
        done: Future[Mapping[str, Any]] = Future()
        done.set_result(self._delivery.replay(arguments["from_seq"]))
        return done

    def _flush(self, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        """Obey `cmd/flush`: answer once everything recorded so far is acknowledged and on the disk."""
        self._outbox.sync()
        flush = _Flush(self._outbox.stats().last_seq or 0, time.monotonic() + FLUSH_S, Future())
        self._flushes.append(flush)
        return flush.done

    def _finish_flushes(self) -> None:
        for flush in list(self._flushes):
            synced = self._outbox.synced_to >= flush.to_seq
            delivered = self._delivery.has_delivered(flush.to_seq)
            if (synced and delivered) or time.monotonic() > flush.by:
                self._flushes.remove(flush)
                flush.done.set_result({"pending": self._outbox.stats().pending, "synced": synced})

    def _wait(self) -> None:
        """Sleep until the broker sends, somebody calls `_wake`, or something is due; then serve the connection."""
        now = time.monotonic()
        due = min(now + TICK_S, self._greet_at)
        if self._connection is None:
            due = min(due, self._retry_at)
        if (live_until := self._live.next_end()) is not None:
            due = min(due, live_until)
        if self._flushes:
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
            self._send_state(connection)  # it may have been set at the very end
            self._collect_errands()
            self._run_errands(connection)
            offline = self._publish(connection, Message(f"{self._prefix}/status", "offline", qos=1, retain=True))
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
