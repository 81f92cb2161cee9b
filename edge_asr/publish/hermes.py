"""Hermes, the protocol of Rhasspy and Snips: what was heard goes out in it, and its dialogue managers are obeyed.

A dialogue manager opens a session by `startListening` and waits for a `textCaptured` with its id; `toggleOff` keeps the
appliance from hearing what the house itself says, until `toggleOn`.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from edge_asr.config_mqtt import HermesConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.publish.commands import LISTEN_S, RATE_LIMIT, Command
from edge_asr.publish.dialect import Greeting, Message
from edge_asr.publish.hermes_text import NOBODY, Caller, text_captured
from edge_asr.publish.payload import to_payload
from edge_asr.types import iso_time

log = logging.getLogger(__name__)

PAYLOAD_LIMIT = 16_384
"""Bytes of a request; the list of intents in one may be long."""
NAME_LIMIT = 256
"""Characters of a session's id and the like."""
SESSIONS_LIMIT = 8
"""Open sessions; one more ends the oldest."""
REPEAT_S = 5.0
"""The same request within this time, while its session is still open, was delivered twice."""
LAST_WORDS_S = 5.0
"""Who began to speak at the end of the time to listen is waited for so much longer."""
STOPPED_S = 2.0
"""The same once listening was stopped."""
FEEDBACK_S = 120.0
"""A toggleOff that gives a reason holds no longer than this: its toggleOn may have been lost."""
REASONS_LIMIT = 16
"""Reasons to hear nothing; one more takes the place of the oldest."""
EXPIRES_S = 5
"""Nobody should act on what was heard any more after that."""
FAILED = "it failed; the log of the appliance says how"
HELD_BY = "hermes"
"""Whose mute it is: it is to end with `toggleOn`, and not to end the mute of anybody else."""


class _RequestError(EdgeAsrError):
    """A request that cannot be obeyed; its text is the answer."""


@dataclass(slots=True, eq=False)
class _Session:
    """Somebody waits for what is said next."""

    caller: Caller
    payload: bytes
    opened_at: float
    """Clock seconds."""
    opened: str
    """The same as wall time, in ISO 8601."""
    until: float
    """Clock seconds; by then it is answered, with an empty text if need be."""
    one_sentence: bool
    """Answered with the first sentence; else with all of them, once it is stopped."""
    stopped: bool = False
    heard: list[Mapping[str, Any]] = field(default_factory=list)

    def is_asked_again(self, payload: bytes, now: float) -> bool:
        """Tell whether this request is the one that opened it, delivered once more."""
        return not self.stopped and payload == self.payload and now - self.opened_at < REPEAT_S

    def hears(self, said: Mapping[str, Any]) -> bool:
        """Tell whether a sentence is for this session: what was over before it began, such as a wake word, is not."""
        end = said.get("end")
        return end is None or end >= self.opened


class Hermes:
    """The dialect; for the publisher thread."""

    def __init__(
        self,
        config: HermesConfig,
        device_id: str,
        command: Command | None,
        wake: Callable[[], None],
        *,
        listen_s: float = 8.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`listen_s`: how long a session waits for somebody to begin. `command` None: it speaks, and obeys nobody."""
        self._site = config.site_id or device_id
        self._base = config.base
        self._command = command
        self._wake = wake
        self._listen_s = listen_s
        self._clock = clock
        self._wall = wall
        requests: dict[str, Callable[[Mapping[str, Any], bytes], None]] = {
            "startListening": self._start,
            "stopListening": self._stop,
            "toggleOn": self._toggle_on,
            "toggleOff": self._toggle_off,
        }
        self._requests = {f"{self._base}/asr/{name}": (name, obey) for name, obey in requests.items()}
        self._sessions: dict[str | None, _Session] = {}  # the oldest first, at most SESSIONS_LIMIT
        self._started: deque[float] = deque(maxlen=RATE_LIMIT)
        self._reasons: dict[str, float] = {}  # to hear nothing, and until when; at most REASONS_LIMIT
        self._muted = False
        self._insist = False  # on being muted, though it was asked for before: somebody may have ended that
        self._muting: Future[Mapping[str, Any]] | None = None
        self._out: deque[Message] = deque(maxlen=4 * SESSIONS_LIMIT)
        self._ended: deque[tuple[str, _Session | None, Future[Mapping[str, Any]]]] = deque()  # filled by any thread

    @property
    def topics(self) -> Sequence[str]:
        """What is asked of speech recognisers."""
        return () if self._command is None else tuple(self._requests)

    def greet(self) -> Iterable[Message]:
        """Return nothing: Hermes retains nothing."""
        return ()

    def said(self, said: Mapping[str, Any]) -> Iterable[Message]:
        """Answer the sessions that wait for it; with none, it is told all the same."""
        if not said.get("text"):
            return []
        waiting = [session for session in self._sessions.values() if session.hears(said)]
        for session in waiting:
            session.heard.append(said)
        answered = [self._answer(session) for session in waiting if session.one_sentence or session.stopped]
        return answered if waiting else [self._captured(NOBODY, [said])]

    def receive(self, topic: str, payload: bytes, retained: bool) -> Greeting:
        """Obey a request for this site; what is retained is old, and what is no JSON object is nobody's."""
        found = self._requests.get(topic)
        request = _object(payload) if found is not None and not retained and self._command is not None else None
        if found is None or request is None or request.get("siteId", "default") != self._site:
            return Greeting.NOTHING
        name, obey = found
        try:
            obey(request, payload)
        except _RequestError as error:
            self._fail(str(error), name, request.get("sessionId"))
        return Greeting.NOTHING

    def take(self) -> Iterable[Message]:
        """Return errors, and the answers of sessions that have waited long enough."""
        while self._ended:
            self._conclude(*self._ended.popleft())
        now = self._clock()
        for session in [session for session in self._sessions.values() if now >= session.until]:
            self._out.append(self._answer(session))
        self._settle()
        taken = list(self._out)
        self._out.clear()
        return taken

    def _start(self, request: Mapping[str, Any], payload: bytes) -> None:
        now = self._clock()
        caller = Caller(*(_text(request, key) for key in ("sessionId", "wakewordId", "lang")))
        before = self._sessions.get(caller.session)
        if before is not None and before.is_asked_again(payload, now):
            return
        if len(self._started) == RATE_LIMIT and now - self._started[0] < 1:
            raise _RequestError(f"more than {RATE_LIMIT} requests in a second; send fewer")
        self._started.append(now)
        one_sentence = request.get("stopOnSilence") is not False
        seconds = self._listen_s if one_sentence else float(LISTEN_S[1])
        session = _Session(caller, payload, now, iso_time(self._wall()), now + seconds + LAST_WORDS_S, one_sentence)
        self._sessions.pop(caller.session, None)
        if len(self._sessions) >= SESSIONS_LIMIT:
            self._out.append(self._answer(next(iter(self._sessions.values()))))
        self._sessions[caller.session] = session
        self._ask("listen", {"seconds": seconds}, "startListening", session)

    def _stop(self, request: Mapping[str, Any], _payload: bytes) -> None:
        """End a session: what is being said is waited for, and what was heard is the answer."""
        session = self._sessions.get(_text(request, "sessionId"))
        if session is None or session.stopped:
            return  # it had its answer
        session.stopped = True
        session.until = min(session.until, self._clock() + STOPPED_S)
        if all(other.stopped for other in self._sessions.values()):
            self._ask("listen", {"seconds": 0.0}, "stopListening", session)

    def _toggle_off(self, request: Mapping[str, Any], _payload: bytes) -> None:
        reason = _text(request, "reason") or ""
        self._reasons.pop(reason, None)
        if len(self._reasons) >= REASONS_LIMIT:
            del self._reasons[next(iter(self._reasons))]
        self._reasons[reason] = self._clock() + FEEDBACK_S if reason else math.inf
        self._insist = True
        self._settle()

    def _toggle_on(self, request: Mapping[str, Any], _payload: bytes) -> None:
        reason = _text(request, "reason") or ""
        if reason:
            self._reasons.pop(reason, None)
        else:
            self._reasons.clear()
        self._settle()

    def _settle(self) -> None:
        """Have the appliance muted while there is a reason, and what was muted for these unmuted after the last."""
        now = self._clock()
        self._reasons = {reason: until for reason, until in self._reasons.items() if now < until}
        wanted = bool(self._reasons)
        if self._muting is not None and not self._muting.done():
            return
        if wanted != self._muted or (wanted and self._insist):
            self._muted, self._insist = wanted, False
            self._muting = self._ask("mute", {"mute": wanted, "by": HELD_BY}, "toggleOff" if wanted else "toggleOn")

    def _answer(self, session: _Session) -> Message:
        """Close a session with what was heard; nobody is listened to any longer on behalf of the last one."""
        del self._sessions[session.caller.session]
        if not session.stopped and all(other.stopped for other in self._sessions.values()):
            self._ask("listen", {"seconds": 0.0}, "stopListening", session)
        return self._captured(session.caller, session.heard)

    def _captured(self, caller: Caller, heard: Sequence[Mapping[str, Any]]) -> Message:
        payload = to_payload(text_captured(self._site, caller, heard))
        return Message(f"{self._base}/asr/textCaptured", payload, expires_s=EXPIRES_S)

    def _ask(
        self, name: str, arguments: Mapping[str, Any], context: str, session: _Session | None = None
    ) -> Future[Mapping[str, Any]]:
        assert self._command is not None  # without it no request is listened to
        try:
            future = self._command(name, arguments)
        except Exception:  # the command is another's; publishing goes on
            log.exception("%s failed", context)
            future = Future()
            future.set_exception(EdgeAsrError(FAILED))
        future.add_done_callback(functools.partial(self._note, context, session))
        return future

    def _note(self, context: str, session: _Session | None, future: Future[Mapping[str, Any]]) -> None:
        self._ended.append((context, session, future))
        self._wake()

    def _conclude(self, context: str, session: _Session | None, future: Future[Mapping[str, Any]]) -> None:
        """Tell what went wrong; a session that could not be opened is answered, lest a dialogue wait for it."""
        why = _failure(context, future)
        if not why:
            return
        self._fail(why, context, None if session is None else session.caller.session)
        if context == "startListening" and session is not None and session in self._sessions.values():
            session.stopped = True  # nobody listens
            self._out.append(self._answer(session))

    def _fail(self, error: str, context: str, session: Any) -> None:
        session = session if isinstance(session, str) and len(session) <= NAME_LIMIT else None
        content = {"error": error, "context": context, "siteId": self._site, "sessionId": session}
        self._out.append(Message(f"{self._base}/error/asr", to_payload(content)))


def _failure(context: str, future: Future[Mapping[str, Any]]) -> str:
    """Return in words why a command was not obeyed; empty: it was."""
    try:
        future.result()
    except EdgeAsrError as error:
        return str(error)
    except CancelledError:
        return "it was given up"
    except Exception:  # the command is another's; publishing goes on
        log.exception("%s failed", context)
        return FAILED
    return ""


def _object(payload: bytes) -> Mapping[str, Any] | None:
    if len(payload) > PAYLOAD_LIMIT:
        return None
    try:
        content = json.loads(payload.decode("utf-8"))
    except (ValueError, RecursionError):  # a thousand brackets are too deep
        return None
    return content if isinstance(content, dict) else None


def _text(request: Mapping[str, Any], key: str) -> str | None:
    value = request.get(key)
    if value is not None and not (isinstance(value, str) and len(value) <= NAME_LIMIT):
        raise _RequestError(f"{key} should be text of at most {NAME_LIMIT} characters")
    return value or None
