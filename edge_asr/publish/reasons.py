"""What a broker's reason codes mean: in words, with the remedy, and whether trying again soon may help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """The broker has refused a message."""

    why: str
    permanent: bool
    """This message will never pass; otherwise it may, once somebody has put the broker right."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no connection."""

    why: str
    remedy: str
    lasting: bool = False
    """It does not pass by itself: trying again soon only fills logs."""

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}"


ACCOUNT = "correct mqtt.username and the password, or the broker's access list"
LOG = "see the broker's log"
PASSES = "it passes by itself"
UNSUPPORTED_VERSION, TAKEN_OVER, OTHER_SERVERS = 132, 142, (156, 157)

_NO_CONNECTION = {
    128: (LOG, False),
    129: (LOG, False),
    130: (LOG, False),
    131: (LOG, False),
    UNSUPPORTED_VERSION: ("set mqtt.protocol to auto, or to the version that it speaks", True),
    133: ("set mqtt.client_id to a name that it admits", True),
    134: (ACCOUNT, True),
    135: (ACCOUNT, True),
    136: (PASSES, False),
    137: (PASSES, False),
    138: ("ask whoever runs the broker to admit this device", True),
    139: (PASSES, False),
    140: (ACCOUNT, True),
    141: ("raise mqtt.keepalive_s if the network is that slow", False),
    144: ("correct mqtt.base", True),
    147: (LOG, False),
    149: ("raise the limit for packets in the broker's settings", False),
    150: ("raise the limit for messages in the broker's settings", True),
    151: ("raise the quota in the broker's settings", True),
    152: ("ask whoever runs the broker", True),
    153: (LOG, False),
    154: ("let the broker retain messages: status and state are retained", True),
    155: ("let the broker take QoS 1: transcripts are sent with it", True),
    159: (PASSES, True),
    160: (PASSES, False),
}
"""Remedy and whether it lasts, for the codes of CONNACK and DISCONNECT."""
_PERMANENT = {149, 153}
"""Packet too large, payload format invalid: about the message itself."""
_NO_MESSAGE = {
    135: "let this user publish there in the broker's access list",
    144: "correct mqtt.base, or let the broker take this topic",
    149: "raise the limit for messages in the broker's settings",
    151: "raise the quota in the broker's settings",
}


def refused_connection(code: int, name: str, *, said: str = "", server: str = "") -> Problem:
    """Return what a CONNACK means; `said` is the broker's own explanation, `server` the one it points to."""
    remedy, lasting = _remedy(code, server)
    return Problem(f"it refused: {_named(name, said)}", remedy, lasting)


def ended_connection(code: int, name: str, *, client_id: str, said: str = "", server: str = "") -> Problem:
    """Return what a DISCONNECT from the broker means."""
    if code == TAKEN_OVER:
        why = f"another client uses the client id {client_id}"
        return Problem(why, "give each device its own mqtt.client_id", lasting=True)
    remedy, lasting = _remedy(code, server)
    return Problem(f"it ended the connection: {_named(name, said)}", remedy, lasting)


def refused_message(code: int, name: str, *, said: str = "") -> Refusal:
    """Return what a PUBACK means that is none."""
    return Refusal(f"{_named(name, said)}; {_NO_MESSAGE.get(code, LOG)}", code in _PERMANENT)


def too_large(size: int, limit: int) -> Refusal:
    """Return what is said of a message that need not even be sent."""
    return Refusal(f"it has {size} bytes, and the broker takes {limit}; {_NO_MESSAGE[149]}", permanent=True)


def _remedy(code: int, server: str) -> tuple[str, bool]:
    if code in OTHER_SERVERS:
        return (f"set mqtt.host to {server}" if server else "ask whoever runs the broker which", True)
    return _NO_CONNECTION.get(code, (LOG, False))


def _named(name: str, said: str) -> str:
    words = "".join(letter for letter in said if letter.isprintable())[:200]
    return f"{name.lower()} ({words})" if words else name.lower()
