"""How the `subscribe` command shows messages: a line a sentence for people, or a JSON object a line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from edge_asr.publish.payload import to_payload
from edge_asr.subscribe import Ids, parse

TEXT_LIMIT = 2000
"""Characters of a text that a terminal is shown."""
PARTIALS_LIMIT = 4
"""Lines of what is being said."""
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Kinds of characters that a terminal would obey, or that would turn a line round: they are shown as escapes."""
OBEYED = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
"""Those that JSON leaves as they are."""


def plain(value: object) -> str:
    r"""Return text from the network as a terminal may be shown it: on one line, a control character as `\x1b`."""
    text = value if isinstance(value, str) else ""
    shown = "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in INVISIBLE else letter
        for letter in text[:TEXT_LIMIT]
    )
    return shown + ("…" if len(text) > TEXT_LIMIT else "")


def json_line(topic: str, payload: bytes) -> str:
    """Return a message as a JSON object on one line: its own, or its text as `payload`, with the topic."""
    content = parse(payload)
    return _line(topic, {"payload": payload.decode("utf-8", "backslashreplace")} if content is None else content)


def _line(topic: str, content: Mapping[str, Any]) -> str:
    try:
        line = to_payload({"topic": topic, **{key: value for key, value in content.items() if key != "topic"}})
    except RecursionError:  # deeper than can be written, though it could be read
        line = to_payload({"topic": topic, "payload": "nested too deeply"})
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


class View(Protocol):
    """Shows messages."""

    def message(self, device: str, name: str, topic: str, payload: bytes) -> None:
        """Show a message on the topic `name` of a device."""

    def transcript(self, device: str, topic: str, transcript: Mapping[str, Any]) -> None:
        """Show a transcript whose turn it is."""


class JsonView:
    """A line a message, written at once."""

    def message(self, device: str, name: str, topic: str, payload: bytes) -> None:
        """Print it."""
        print(json_line(topic, payload), flush=True)

    def transcript(self, device: str, topic: str, transcript: Mapping[str, Any]) -> None:
        """Print it."""
        print(_line(topic, transcript), flush=True)


class PrettyView:
    """A line a sentence; below them, on a terminal, what is being said."""

    def __init__(self, console: Console, live: Live | None) -> None:
        """`live` None: partials are not shown."""
        self._console = console
        self._live = live
        self._ids = Ids()
        self._last_seq: dict[str, int] = {}
        self._conditions: dict[tuple[str, str], str] = {}
        self._partials: dict[str, Text] = {}

    def message(self, device: str, name: str, topic: str, payload: bytes) -> None:
        """Show a sentence, what is being said, or a change of how the device is."""
        content, text = parse(payload), plain(payload.decode("utf-8", "backslashreplace"))
        if name == "status":
            self._change(device, name, text)
        elif content is None:
            self._print(Text(f"{device} {name} {text}", "bright_black"))
        elif name == "transcript":
            if self._ids.add(str(content.get("id"))):
                self._note_gap(device, content.get("seq"))
                self.transcript(device, topic, content)
        elif name == "said":
            self._sentence(device, content, "said")
        elif name == "partial":
            self._partial(device, content)
        elif name == "state":
            self._change(device, name, _condition(content))
        else:
            self._print(Text(f"{device} {name} {text}", "bright_black"))

    def transcript(self, device: str, topic: str, transcript: Mapping[str, Any]) -> None:
        """Print the line of a sentence."""
        self._sentence(device, transcript)

    def _sentence(self, device: str, sentence: Mapping[str, Any], *flags: str) -> None:
        self._partials.pop(str(sentence.get("id")), None)
        latency = sentence.get("latency_ms")
        response = _number(latency.get("response") if isinstance(latency, Mapping) else None, "{:.0f} ms")
        facts = [_number(sentence.get("confidence"), "{:.2f}"), response]
        known = {"late": sentence.get("within_budget") is False, "replayed": sentence.get("replayed") is True}
        flags = (*flags, *(flag for flag, holds in known.items() if holds))
        text = Text("lost: nobody had the time to recognise it", "red")
        if sentence.get("lost") is not True:
            text = Text(plain(sentence.get("text")), "bold")
        where = Text(f"{_moment(sentence.get('start'))}  {device}  {plain(sentence.get('source'))}", "cyan")
        line = [where, text, Text("  ".join(filter(None, facts)), "bright_black"), Text(" ".join(flags), "yellow")]
        self._print(Text("  ").join(part for part in line if part))
        self._draw()

    def _partial(self, device: str, partial: Mapping[str, Any]) -> None:
        identifier = str(partial.get("id"))
        self._partials.pop(identifier, None)
        if partial.get("end") is not True:
            line = f"          {device}  {plain(partial.get('source'))}  {plain(partial.get('text'))}"
            self._partials[identifier] = Text(line, "bright_black", no_wrap=True, overflow="ellipsis")
        while len(self._partials) > PARTIALS_LIMIT:
            del self._partials[next(iter(self._partials))]
        self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(Group(*self._partials.values()), refresh=True)

    def _note_gap(self, device: str, seq: object) -> None:
        if not isinstance(seq, int) or isinstance(seq, bool):
            return
        last = self._last_seq.get(device, seq)
        if seq > last + 1:
            self._print(Text(f"{device}: {gap_in_words(last + 1, seq - 1)} missing", "yellow"))
        self._last_seq[device] = max(seq, last)

    def _change(self, device: str, name: str, condition: str) -> None:
        if self._conditions.get((device, name)) != condition:
            self._conditions[device, name] = condition
            bad = condition == "offline" or condition.startswith("degraded")
            self._print(Text(f"{device}: {condition}", "red" if bad else "green"))

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True, highlight=False)


def gap_in_words(first: int, last: int) -> str:
    """Return which transcripts."""
    return f"transcript {first} is" if first == last else f"transcripts {first} to {last} are"


def _condition(state: Mapping[str, Any]) -> str:
    why = plain(state.get("why"))
    muted = ", muted" if state.get("mute") is True else ""
    return f"{plain(state.get('state'))}{muted}{f': {why}' if why else ''}"


def _moment(start: object) -> str:
    """Return a time of the transcript as the clock here shows it; the day too where it is another."""
    try:
        moment = datetime.fromisoformat(str(start).replace("Z", "+00:00")).astimezone()
    except (ValueError, OverflowError, OSError):
        return " " * 8
    return moment.strftime("%H:%M:%S" if moment.date() == datetime.now().date() else "%Y-%m-%d %H:%M:%S")


def _number(value: object, form: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    try:
        return form.format(float(value))
    except OverflowError:
        return ""
