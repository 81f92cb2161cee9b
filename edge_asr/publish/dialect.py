"""Other languages spoken on the connection of the publisher: what each has to say, and what it answers to."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One message of MQTT."""

    topic: str
    payload: str
    qos: int = 0
    retain: bool = False
    expires_s: int | None = None
    """After so many seconds a broker of MQTT 5 must not deliver it any more."""


class Greeting(enum.Enum):
    """What a message that came in asks for."""

    NOTHING = enum.auto()
    AGAIN = enum.auto()
    """Everything retained is to be published again: somebody was not there when it was."""


class Dialect(Protocol):
    """A language; only the publisher thread calls it, and it never blocks."""

    @property
    def topics(self) -> Sequence[str]:
        """What to subscribe to, on every connect."""

    def greet(self) -> Iterable[Message]:
        """Return what everybody must know, on every connect and whenever it is asked for again."""

    def said(self, said: Mapping[str, Any]) -> Iterable[Message]:
        """Return what goes out along with a message on `said`, of which this is the JSON object: at once or never."""

    def receive(self, topic: str, payload: bytes, retained: bool) -> Greeting:
        """Take a message on one of the topics."""

    def take(self) -> Iterable[Message]:
        """Return what has come up since the last call; who makes something come up wakes the publisher."""
