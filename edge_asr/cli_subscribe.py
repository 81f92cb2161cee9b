"""What the `subscribe` command does: what appliances publish, live, for people or as JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.live import Live

from edge_asr.cli_subscribe_view import JsonView, PrettyView, View, gap_in_words, plain
from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import ConfigError, EdgeAsrError
from edge_asr.subscribe import Delivery, Event, Follower, Gap, Replay
from edge_asr.subscription import Subscription

TOPICS = ("transcript", "said", "partial", "state", "status")
COMMAND_RESULTS = "cmd/+/result"
REPLAY, REPLAY_RESULT = "cmd/replay", "cmd/replay/result"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
TICK_S = 0.5
STATE_EVERY_S = 0.1
"""The state is written at once, in a flood of transcripts so often: killed then, it shows these once more."""
DEVICES_LIMIT = 1000
"""Appliances that are kept apart; of others nothing is shown."""


class Desk:
    """Hands messages on to the view; with `complete`, transcripts in order, and asks for those that are missing."""

    def __init__(self, base: str, shown: Sequence[str], view: View, followers: dict[str, Follower] | None) -> None:
        """`followers` None: transcripts are shown as they come."""
        self.followers = followers
        self.delivered: dict[str, int] = {}
        """The last number of each device that has been written out or given up."""
        self._prefix = f"{base}/"
        self._shown = set(shown)
        self._view = view
        self._devices: set[str] = set()

    def receive(self, topic: str, payload: bytes, retained: bool) -> Iterable[tuple[str, str]]:
        """Take a message; return topic and payload of what is to be published."""
        device, _, name = topic.removeprefix(self._prefix).partition("/")
        if not NAME.fullmatch(device) or (device not in self._devices and len(self._devices) >= DEVICES_LIMIT):
            return []
        self._devices.add(device)
        requests: list[tuple[str, str]] = []
        if self.followers is not None and name in ("transcript", REPLAY_RESULT):
            follower = self.followers.setdefault(device, Follower())
            take = follower.feed if name == "transcript" else follower.answer
            requests = self.handle(device, take(payload, time.monotonic()))
        elif self._wants(name):
            self._view.message(device, name, topic, payload)
        if self.followers is not None and not retained and device in self.followers:
            self.followers[device].alive(time.monotonic())
            if name == "status" and payload == b"online":
                return self.handle(device, self.followers[device].connected(time.monotonic()))
        return requests

    def handle(self, device: str, events: Iterable[Event]) -> list[tuple[str, str]]:
        """Show what a follower delivers; return topic and payload of what it asks for."""
        requests = []
        for event in events:
            if isinstance(event, Replay):
                requests.append((f"{self._prefix}{device}/{REPLAY}", event.payload))
            elif isinstance(event, Gap):
                tell(f"{device}: {gap_in_words(event.first, event.last)} missing: {event.why}")
                self.delivered[device] = event.last
            elif isinstance(event, Delivery):
                self._view.transcript(device, f"{self._prefix}{device}/transcript", event.transcript)
                if event.transcript.get("seq") is not None:
                    self.delivered[device] = event.transcript["seq"]
        return requests

    def _wants(self, name: str) -> bool:
        return name in self._shown or (COMMAND_RESULTS in self._shown and name.startswith("cmd/"))


class StateFile:
    """Where the numbers of the last transcripts are kept, for the next start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: dict[str, Any] = {}

    def read(self) -> dict[str, Follower]:
        """Return a follower for each device that was followed. Raises ConfigError."""
        try:
            self._written = json.loads(self._path.read_text(encoding="utf-8"))
            return {device: Follower(int(kept["seq"]) + 1, str(kept["id"])) for device, kept in self._written.items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError(f"--state {self._path}: cannot read it: {error.strerror}; correct the path") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(f"--state {self._path}: is no state of `subscribe`; remove it to begin anew") from error

    def write(self, desk: Desk) -> None:
        """Replace the file in one step, if anything is new. Raises EdgeAsrError."""
        followers = desk.followers or {}
        new = {device: {"seq": seq, "id": followers[device].newest_id} for device, seq in desk.delivered.items()}
        content = {**self._written, **new}
        if content == self._written:
            return
        try:
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file)
            Path(temporary).replace(self._path)
        except OSError as error:
            raise EdgeAsrError(f"--state {self._path}: cannot write it: {error.strerror}") from error
        self._written = content


def subscribe(
    config: MqttConfig,
    device: str,
    topics: Sequence[str],
    *,
    json_lines: bool = False,
    complete: bool = False,
    state: Path | None = None,
    since_seq: int | None = None,
) -> NoReturn:
    """Show what appliances publish until interrupted. Raises EdgeAsrError, KeyboardInterrupt and BrokenPipeError."""
    shown = _choose_topics(device, topics, json_lines=json_lines, complete=complete)
    if not complete and (state is not None or since_seq is not None):
        raise ConfigError("--state and --since-seq are about --complete; add it")
    if since_seq is not None and device == "+":
        raise ConfigError("--since-seq counts for one device; name it with --device")
    kept = StateFile(state) if state is not None else None
    followers = kept.read() if kept is not None else {}
    if since_seq is not None:
        followers.setdefault(device, Follower(since_seq))
    followers = {name: follower for name, follower in followers.items() if device in ("+", name)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as stack:
        view: View = JsonView() if json_lines else _pretty_view(stack, partials="partial" in shown)
        _follow(config, device, Desk(config.base, shown, view, followers if complete else None), shown, kept)


def _follow(config: MqttConfig, device: str, desk: Desk, shown: Sequence[str], kept: StateFile | None) -> NoReturn:
    def send(requests: Iterable[tuple[str, str]]) -> None:
        for topic, payload in requests:
            subscription.publish(topic, payload)

    def connected() -> None:
        for name, follower in (desk.followers or {}).items():
            send(desk.handle(name, follower.connected(time.monotonic())))

    names = {*shown, *(("transcript", "state", "status", REPLAY_RESULT) if desk.followers is not None else ())}
    if COMMAND_RESULTS in names:
        names.discard(REPLAY_RESULT)  # where two subscriptions overlap, some brokers send a message twice
    subscription = Subscription(
        config,
        [f"{config.base}/{device}/{name}" for name in sorted(names)],
        on_message=lambda topic, payload, retained: send(desk.receive(topic, payload, retained)),
        on_connected=connected,
        tell=tell,
    )
    written_at = -STATE_EVERY_S
    try:
        while True:
            subscription.serve(TICK_S)
            for name, follower in (desk.followers or {}).items():
                send(desk.handle(name, follower.tick(time.monotonic())))
            if kept is not None and time.monotonic() - written_at >= STATE_EVERY_S:
                kept.write(desk)
                written_at = time.monotonic()
    finally:
        subscription.close()
        if kept is not None:
            kept.write(desk)


def _choose_topics(device: str, topics: Sequence[str], *, json_lines: bool, complete: bool) -> Sequence[str]:
    """Return the topics to show. Raises ConfigError."""
    if device != "+" and not NAME.fullmatch(device):
        raise ConfigError(f"--device {device}: should be the device_id of an appliance, or + for all of them")
    if unknown := [topic for topic in topics if topic not in (*TOPICS, "all")]:
        raise ConfigError(f"--topic {unknown[0]}: should be one of {', '.join(TOPICS)}, or all")
    if complete and topics and not {"transcript", "all"} & set(topics):
        raise ConfigError("--complete is about transcripts; add --topic transcript")
    if "all" in topics:
        return (*TOPICS, COMMAND_RESULTS)
    if topics:
        return topics if "state" not in topics else (*topics, "status")
    return ("transcript",) if json_lines else ("transcript", "partial", "state", "status")


def _pretty_view(stack: ExitStack, *, partials: bool) -> PrettyView:
    console = Console()
    drawn = partials and console.is_terminal and not console.is_dumb_terminal
    live = Live(Group(), console=console, auto_refresh=False, transient=True) if drawn else None
    return PrettyView(console, stack.enter_context(live) if live is not None else None)


def tell(line: str) -> None:
    """Print a line for a person, not for whoever reads the output."""
    print(f"edge-asr: {plain(line)}", file=sys.stderr, flush=True)
