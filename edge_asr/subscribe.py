"""The transcripts of an appliance in order, each once: what is missing is asked for by `cmd/replay`."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

HELD_LIMIT = 20_000
"""Transcripts that wait for those before them; with one more the missing ones are given up."""
RETRY_S = 6.0
"""A replay that has brought nothing for so long is asked for again; the same request within 5 s is no new one."""
UNANSWERED_LIMIT = 5
"""So often an appliance that is alive may leave a request unanswered, while transcripts wait."""
IDS_LIMIT = 10_000
"""Ids that are remembered."""
ANEW_MS = 60_000
"""A lower number on a transcript so much younger than all others: the appliance counts anew."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A transcript whose turn it is."""

    transcript: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Gap:
    """Transcripts that will not come."""

    first: int
    last: int
    why: str


@dataclass(frozen=True, slots=True)
class Replay:
    """To be sent to `cmd/replay`."""

    from_seq: int

    @property
    def payload(self) -> str:
        """The command's payload."""
        return json.dumps({"from_seq": self.from_seq})


Event = Delivery | Gap | Replay

NOT_KEPT = "the appliance does not keep them any more"
NO_ANSWER = "the appliance does not answer cmd/replay: mqtt.commands is off there, or the broker does not let us ask"
TOO_MANY = f"more than {HELD_LIMIT} transcripts waited for them"


@dataclass(slots=True)
class _Request:
    """A replay that was asked for."""

    from_seq: int
    asked_at: float
    moved_at: float
    """When it last brought something."""
    got: set[int]
    """What has come, or was there, of what it is to bring."""
    known_to: int
    """The highest number that had come when it was asked for."""
    answer: tuple[int, int, int] | None = None
    """First, last and number of the transcripts that it brings."""
    came: int = 0
    """How many of them have come."""


class Ids:
    """Ids seen lately; the oldest are forgotten."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._ids

    def add(self, identifier: str) -> bool:
        """Remember one; return whether it is new."""
        if identifier in self._ids:
            self._ids.move_to_end(identifier)
            return False
        self._ids[identifier] = None
        if len(self._ids) > IDS_LIMIT:
            self._ids.popitem(last=False)
        return True


@dataclass(slots=True)
class Follower:
    """Puts the transcripts of one appliance in order; `now` is monotonic seconds everywhere.

    `next_seq` None: it begins with the first that comes. `newest_id` is the highest id delivered so far.
    A transcript is delivered once its predecessors are, or once the answer to `cmd/replay` shows that the appliance
    does not keep them any more: with everything there that the answer counts, what is still missing does not exist.
    What has no number, for it was kept in memory only, is delivered at once.
    """

    next_seq: int | None = None
    newest_id: str = ""
    _held: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _unnumbered: Ids = field(default_factory=Ids)
    _request: _Request | None = None
    _alive_at: float = -math.inf
    _unanswered: int = 0

    @property
    def waiting(self) -> int:
        """Transcripts that wait for those before them."""
        return len(self._held)

    def connected(self, now: float) -> list[Event]:
        """Ask for what was missed; on every connect, and whenever the appliance comes online: it has forgotten us."""
        self._unanswered = 0
        return [] if self.next_seq is None else [self._ask(now)]

    def alive(self, now: float) -> None:
        """Take note that something has come from the appliance just now."""
        self._alive_at = now

    def feed(self, payload: str | bytes | Mapping[str, Any], now: float) -> list[Event]:
        """Take a message of `transcript`; what is none is ignored."""
        transcript = payload if isinstance(payload, Mapping) else parse(payload)
        seq, identifier = (transcript.get("seq"), transcript.get("id")) if transcript else (None, None)
        if transcript is None or not isinstance(identifier, str):
            return []
        self.alive(now)
        if seq is None:
            return self._deliver(transcript) if self._unnumbered.add(identifier) else []
        return list(self._place(seq, identifier, transcript, now)) if _is_number(seq) else []

    def answer(self, payload: str | bytes | Mapping[str, Any], now: float) -> list[Event]:
        """Take a message of `cmd/replay/result`; answers to others' requests are ignored."""
        answer = payload if isinstance(payload, Mapping) else parse(payload)
        request = self._request
        if answer is None or request is None or request.answer is not None or answer.get("ok") is not True:
            return []
        if answer.get("asked", request.from_seq) != request.from_seq:
            return []
        self._unanswered = 0
        request.moved_at = now
        if answer.get("rows") == 0:
            self._request = None
            return [*self._skip(request.known_to), *self._settle(now)]
        first, last, rows = (answer.get(key) for key in ("from_seq", "to_seq", "rows"))
        if not (_is_number(first) and _is_number(last) and _is_number(rows)):
            return []
        request.answer = first, last, rows
        request.came = sum(first <= seq <= last for seq in request.got)
        return [*self._skip(first - 1), *self._settle(now)]

    def tick(self, now: float) -> list[Event]:
        """Ask again where a replay does not come, or give up what nobody can bring; to be called every second or so."""
        request = self._request
        if request is None or now - request.moved_at < RETRY_S:
            return []
        if request.answer is None and self._alive_at > request.asked_at and self._held:
            self._unanswered += 1
        if self._unanswered < UNANSWERED_LIMIT:
            return [self._ask(now)]
        self._request, self._unanswered = None, 0
        return list(self._skip(max(self._held), NO_ANSWER))

    def _place(self, seq: int, identifier: str, transcript: Mapping[str, Any], now: float) -> Iterator[Event]:
        if self.next_seq is None:
            self.next_seq = seq
        youngest = _milliseconds(self.newest_id)
        if seq < self.next_seq and youngest and _milliseconds(identifier) > youngest + ANEW_MS:
            self._held.clear()
            self._request, self.next_seq = None, 1
        if seq < self.next_seq or seq in self._held:
            return
        self._held[seq] = transcript
        self._count(seq, now)
        yield from self._flush()
        if len(self._held) > HELD_LIMIT:
            yield from self._skip(min(self._held) - 1, TOO_MANY)
        yield from self._settle(now)

    def _count(self, seq: int, now: float) -> None:
        """Take note of one that a replay may have brought."""
        request = self._request
        if request is None or seq in request.got:
            return
        request.got.add(seq)
        if request.answer is not None and seq <= request.answer[1]:
            request.came += 1
        if seq == self.next_seq or (request.answer is not None and seq <= request.answer[1]):
            request.moved_at = now

    def _settle(self, now: float) -> Iterator[Event]:
        """End a replay that is complete; begin one where something is missing."""
        request = self._request
        if request is not None and request.answer is not None and request.came >= request.answer[2]:
            self._request = None
            yield from self._skip(request.answer[1])
        if self._held and self._request is None:
            yield self._ask(now)

    def _ask(self, now: float) -> Replay:
        assert self.next_seq is not None, "there is something to ask for"
        self._request = _Request(self.next_seq, now, now, set(self._held), max(self._held, default=0))
        return Replay(self.next_seq)

    def _skip(self, last: int, why: str = NOT_KEPT) -> Iterator[Event]:
        """Deliver what is there up to this number: what is missing of it does not come."""
        for there in [*sorted(seq for seq in self._held if seq <= last), last + 1]:
            if self.next_seq is not None and self.next_seq < there:
                yield Gap(self.next_seq, there - 1, why)
                self.next_seq = there
            yield from self._flush()

    def _flush(self) -> Iterator[Event]:
        while self.next_seq in self._held:
            transcript = self._held.pop(self.next_seq)
            self.next_seq += 1
            if transcript["id"] not in self._unnumbered:  # else it was delivered before it got a number
                yield from self._deliver(transcript)

    def _deliver(self, transcript: Mapping[str, Any]) -> list[Event]:
        self.newest_id = max(self.newest_id, transcript["id"])
        return [Delivery(transcript)]


def parse(payload: str | bytes) -> Mapping[str, Any] | None:
    """Return the JSON object that a payload is; None: it is none."""
    try:
        content = json.loads(payload, parse_constant=_refuse)
    except (ValueError, RecursionError):  # a thousand brackets are too deep
        return None
    return content if isinstance(content, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _milliseconds(identifier: str) -> int:
    """Return the time in a UUIDv7, in Unix milliseconds; 0 where there is none."""
    try:
        return int(identifier[:13].replace("-", ""), 16)
    except ValueError:
        return 0
