"""Commands from MQTT: which messages are one, what they mean, how many are too many, and what is answered."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from types import MappingProxyType
from typing import Any, get_args

from edge_asr.config import SegmentConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.publish.payload import to_payload

log = logging.getLogger(__name__)

Command = Callable[[str, Mapping[str, Any]], "Future[Mapping[str, Any]]"]
"""Obeys a command, given by its name and typed arguments, without blocking; the future holds what to answer."""
Local = Callable[[Mapping[str, Any]], "Future[Mapping[str, Any]]"]
"""Obeys one command on the publisher thread."""
NOTHING_LOCAL: Mapping[str, Local] = MappingProxyType({})
Wish = tuple[Any, ...]
"""A command's name, and its arguments as pairs."""
STOP_LISTENING: Wish = ("listen", ("seconds", 0.0))
PAYLOAD_LIMIT = 1024
"""Bytes of a command's payload."""
REPEAT_S = 5.0
"""The same command within this time is the same wish, delivered or sent twice."""
KEPT_S = 2.0
"""What the broker has kept comes within this time after the subscription."""
RATE_LIMIT = 20
"""Commands taken in a second; the others are refused."""
PENDING_LIMIT = 32
"""Commands that are being obeyed; one more is refused."""
ANSWERS_LIMIT = 32
"""Answers that wait for the broker; one more drops the oldest."""
IDEMPOTENT = ("mute", "preset")
"""They say how things shall be, so they may be retained and repeated."""
PRESETS = get_args(SegmentConfig.model_fields["preset"].annotation)
LISTEN_S = (1, 120)
"""Seconds that listening may be asked for; 0 ends it."""
LAST_SEQ = 2**63 - 1
"""The highest number that a row of the outbox can have."""
SWITCH = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What is worth an answer: it is published on a topic of that name."""


class CommandError(EdgeAsrError):
    """A command cannot be obeyed; its text is the answer."""


class _Lane:
    """How many commands came lately, and are being obeyed."""

    def __init__(self) -> None:
        self._taken_at: deque[float] = deque(maxlen=RATE_LIMIT)
        self.pending: list[Future[Mapping[str, Any]]] = []

    def admit(self, now: float) -> None:
        """Raise CommandError where there are too many."""
        if len(self._taken_at) == RATE_LIMIT and now - self._taken_at[0] < 1:
            raise CommandError(f"more than {RATE_LIMIT} commands in a second; send fewer")
        self.pending = [future for future in self.pending if not future.done()]
        if len(self.pending) >= PENDING_LIMIT:
            raise CommandError(f"{PENDING_LIMIT} commands are still being obeyed; wait for their answers")
        self._taken_at.append(now)


class Commands:
    """Takes the messages below `<prefix>/cmd/`, has them obeyed, and keeps the answers until they are published.

    Only the publisher thread calls it; the futures end on any thread, and nothing that goes wrong is raised.
    """

    def __init__(
        self, prefix: str, command: Command, wake: Callable[[], None], local: Mapping[str, Local] = NOTHING_LOCAL
    ) -> None:
        """`wake` is called, from any thread, when there is an answer; `local` obeys these by name, others `command`."""
        self.topics = f"{prefix}/cmd/+"
        """What to subscribe to."""
        self.answers: deque[tuple[str, str]] = deque(maxlen=ANSWERS_LIMIT)
        """Topic and payload of each, to be taken from the left."""
        self._root = f"{prefix}/cmd/"
        self._command = command
        self._wake = wake
        self._local = local
        self._lanes = {True: _Lane(), False: _Lane()}
        """Mute has one of its own: it must get through, however much else comes."""
        self._obeyed: dict[Wish, float] = {}  # of the last REPEAT_S, so at most REPEAT_S * RATE_LIMIT
        self._subscribed_at = -math.inf
        self._retained: dict[str, bytes] = {}
        """What the broker kept of each that says how things shall be, as it was delivered last."""

    def receive(self, topic: str, payload: bytes, retained: bool) -> None:
        """Obey a message, refuse it with an answer, or ignore it where it is none of ours."""
        name = topic.removeprefix(self._root)
        if not NAME.fullmatch(name):
            log.debug("a message on %r is no command", topic)
        elif self._is_old(name, payload, retained):
            log.debug("the command %s is ignored: retained or emptied", name)
        else:
            with self._answering_failures(name):
                self._obey(name, payload)

    def subscribed(self) -> None:
        """Note that the broker is about to deliver what it has kept."""
        self._subscribed_at = time.monotonic()

    def _is_old(self, name: str, payload: bytes, retained: bool) -> bool:
        if name not in IDEMPOTENT:
            return retained
        kept = retained and time.monotonic() - self._subscribed_at < KEPT_S  # later it is retained, but a new wish
        again = kept and self._retained.get(name) == payload  # another connection is no other wish
        if retained:
            self._retained[name] = payload[:PAYLOAD_LIMIT]
        return again or not payload  # so a retained message is removed

    def _obey(self, name: str, payload: bytes) -> None:
        now = time.monotonic()
        arguments = parse(name, payload)  # nonsense takes nobody's place
        wish = name, *arguments.items()
        if name not in IDEMPOTENT and now - self._obeyed.get(wish, -math.inf) < REPEAT_S:
            log.debug("the command %s is ignored: repeated", name)
            return
        lane = self._lanes[arguments.get("mute") is True]
        lane.admit(now)
        self._remember(wish, now)
        obey = self._local.get(name)
        future = self._command(name, arguments) if obey is None else obey(arguments)
        lane.pending.append(future)
        future.add_done_callback(functools.partial(self._conclude, name))

    def _remember(self, wish: Wish, now: float) -> None:
        """Note what was obeyed just now; what was asked before listening was ended may be asked again."""
        self._obeyed = {
            key: at
            for key, at in self._obeyed.items()
            if now - at < REPEAT_S and not (key[0] == wish[0] and STOP_LISTENING in (key, wish))
        }
        self._obeyed[wish] = now

    def _conclude(self, name: str, future: Future[Mapping[str, Any]]) -> None:
        with self._answering_failures(name):
            self._answer(name, {"ok": True, **future.result()})

    @contextlib.contextmanager
    def _answering_failures(self, name: str) -> Iterator[None]:
        try:
            yield
        except EdgeAsrError as error:
            self._answer(name, {"ok": False, "why": str(error)})
        except CancelledError:
            self._answer(name, {"ok": False, "why": "it was given up"})
        except Exception:  # the command is another's; publishing goes on
            log.exception("the command %s failed", name)
            self._answer(name, {"ok": False, "why": "it failed; the log of the appliance says how"})

    def _answer(self, name: str, answer: Mapping[str, Any]) -> None:
        self.answers.append((f"{self._root}{name}/result", to_payload(answer)))
        self._wake()


def parse(name: str, payload: bytes) -> Mapping[str, Any]:
    """Return the typed arguments of a command; raise CommandError where there is no such command or it says nonsense.

    mute: `{"mute": bool}`; preset: `{"preset": str}`, one of those there are; listen: `{"seconds": float | None}`,
    where 0 ends it; reload and flush: `{}`; replay: `{"from_seq": int}`, from 1 on.
    """
    reader = READERS.get(name)
    if reader is None:
        raise CommandError(f"there is no command {name}; there are {', '.join(READERS)}")
    if len(payload) > PAYLOAD_LIMIT:
        raise CommandError(f"the payload has {len(payload)} bytes; {PAYLOAD_LIMIT} are the limit")
    try:
        text = payload.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise CommandError("the payload is not UTF-8") from error
    return reader(text)


def _mute(text: str) -> Mapping[str, Any]:
    wanted = SWITCH.get(text.lower())
    if wanted is None:
        wanted = _object(text, "mute").get("mute")
    if not isinstance(wanted, bool):
        raise CommandError("mute takes on or off")
    return {"mute": wanted}


def _preset(text: str) -> Mapping[str, Any]:
    wanted = text if text in PRESETS else _object(text, "preset").get("preset")
    if wanted not in PRESETS:
        raise CommandError(f"preset takes {', '.join(PRESETS[:-1])} or {PRESETS[-1]}")
    return {"preset": wanted}


def _listen(text: str) -> Mapping[str, Any]:
    shortest, longest = LISTEN_S
    seconds = _object(text or "{}", "seconds").get("seconds")
    if seconds is None:
        return {"seconds": None}
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not (seconds == 0 or shortest <= seconds <= longest):
        raise CommandError(f'listen takes nothing, or {{"seconds": n}} with n from {shortest} to {longest}; 0 ends it')
    return {"seconds": float(seconds)}


def _nothing(text: str, *, name: str) -> Mapping[str, Any]:
    if text not in ("", "{}"):
        raise CommandError(f"{name} takes nothing; send an empty payload")
    return {}


def _replay(text: str) -> Mapping[str, Any]:
    first = _object(text, "from_seq").get("from_seq")
    if isinstance(first, bool) or not isinstance(first, int) or not 1 <= first <= LAST_SEQ:
        raise CommandError('replay takes {"from_seq": n}: the number of the first transcript wanted, from 1 on')
    return {"from_seq": first}


READERS: dict[str, Callable[[str], Mapping[str, Any]]] = {
    "mute": _mute,
    "preset": _preset,
    "listen": _listen,
    "reload": functools.partial(_nothing, name="reload"),
    "flush": functools.partial(_nothing, name="flush"),
    "replay": _replay,
}
"""What makes typed arguments of the payload of each command there is."""


def _object(text: str, key: str) -> Mapping[str, Any]:
    """Return the JSON object with no key but this; what is none becomes one that nobody accepts."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # a thousand brackets are too deep
        content = None
    return content if isinstance(content, dict) and content.keys() <= {key} else {key: ""}
