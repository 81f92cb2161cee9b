"""What is published that is no transcript: status, state, answers to commands, and what other languages have to say."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Sequence

from edge_asr.publish.commands import Commands
from edge_asr.publish.connection import Connection
from edge_asr.publish.dialect import Dialect, Greeting, Message
from edge_asr.publish.reasons import Refusal

log = logging.getLogger(__name__)

ERRANDS_LIMIT = 20
"""Answers to commands and messages of dialects published and not yet acknowledged; the others wait."""
ANSWER_FOR_S = 60
"""Nobody waits for longer for the answer to a command."""
GREET_WITHIN_S = 3.0
"""When everybody is asked to introduce themselves again, each does so some time within this."""


class Notices:
    """For the publisher thread. All of it describes how things are now, so nothing of it outlives its connection."""

    def __init__(self, prefix: str, commands: Commands | None, dialects: Sequence[Dialect]) -> None:
        self.greet_at = math.inf
        """Monotonic seconds of the next greeting that somebody asked for."""
        self._prefix = prefix
        self._commands = commands
        self._dialects = dialects
        self._state_sent: str | None = None
        self._errands: deque[Message] = deque()  # as many as commands and dialects have to say at a time
        self._errands_in_flight: set[int] = set()
        self._topics: dict[int, str] = {}  # of what is in flight
        self._refused: dict[str, str] = {}  # why, by topic

    @property
    def trouble(self) -> str:
        """What the broker refuses, in words; empty: nothing."""
        return next((f"the broker refuses {topic}: {why}" for topic, why in self._refused.items()), "")

    def subscribe(self, connection: Connection) -> None:
        """Ask for commands, and for what other languages listen to; to be done on every connect."""
        if self._commands is not None:
            connection.subscribe([self._commands.topics], as_published=True)
            self._commands.subscribed()
        connection.subscribe([topic for dialect in self._dialects for topic in dialect.topics])

    def receive(self, topic: str, payload: bytes, retained: bool) -> None:
        """Take a message on one of the topics."""
        if self._commands is not None and topic.startswith(f"{self._prefix}/cmd/"):
            self._commands.receive(topic, payload, retained)
            return
        for dialect in self._dialects:
            if dialect.receive(topic, payload, retained) is Greeting.AGAIN:
                self.greet_at = time.monotonic() + random.uniform(0, GREET_WITHIN_S)

    def greet(self, connection: Connection) -> None:
        """Publish everything retained: status, and what other languages need; the state is due again."""
        self.greet_at = math.inf
        self._state_sent = None
        self.tell_status(connection, "online")
        for dialect in self._dialects:
            for message in dialect.greet():
                self._publish(connection, message)

    def tell_status(self, connection: Connection, status: str) -> int:
        """Publish `online` or `offline`."""
        return self._publish(connection, Message(f"{self._prefix}/status", status, qos=1, retain=True))

    def tell_state(self, connection: Connection, state: str | None) -> None:
        """Publish the state if it is another one than the last."""
        if state is not None and state != self._state_sent:
            self._state_sent = state
            self._publish(connection, Message(f"{self._prefix}/state", state, qos=1, retain=True))

    def collect(self, connection: Connection | None) -> None:
        """Take the answers to commands, and what dialects have to say: to nobody, where nobody is there to hear."""
        answers = self._commands.answers if self._commands is not None else ()
        while answers and len(self._errands) < ERRANDS_LIMIT:
            topic, payload = answers.popleft()
            self._errands.append(Message(topic, payload, qos=1, expires_s=ANSWER_FOR_S))
        for dialect in self._dialects:
            messages = list(dialect.take())
            if connection is not None and connection.up:
                self._errands.extend(messages)

    def send(self, connection: Connection) -> None:
        """Publish what was collected, and what comes up meanwhile."""
        while self._errands and connection.up and len(self._errands_in_flight) < ERRANDS_LIMIT:
            message = self._errands.popleft()
            message_id = self._publish(connection, message)
            if message.qos > 0:
                self._errands_in_flight.add(message_id)
            self.collect(connection)

    def _publish(self, connection: Connection, message: Message) -> int:
        message_id = connection.publish(message)
        if message.qos > 0:
            self._topics[message_id] = message.topic
        return message_id

    def acknowledge(self, message_id: int) -> bool:
        """Note that the broker has taken a message, if it was one of ours."""
        self._errands_in_flight.discard(message_id)
        if (topic := self._topics.pop(message_id, None)) is not None:
            self._refused.pop(topic, None)
        return topic is not None

    def refuse(self, message_id: int, refusal: Refusal) -> bool:
        """Note that the broker has refused a message, if it was one of ours."""
        self._errands_in_flight.discard(message_id)
        if (topic := self._topics.pop(message_id, None)) is None:
            return False
        if topic not in self._refused:
            self._refused[topic] = refusal.why
            log.warning("the broker refuses what is published on %s: %s", topic, refusal.why)
        return True

    def lose(self) -> None:
        """Forget what was for a connection that is over; it is not sent again: the state says it."""
        self.greet_at = math.inf  # every connection greets
        self._errands.clear()
        self._errands_in_flight.clear()
        self._topics.clear()
        self._refused.clear()
