"""A publisher with an outbox as a process of its own that can be killed, whoever follows it, and what its outbox holds.

Run as a program it is that publisher: the argument is its `Orders` as JSON, and it lives until standard input ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from mosquitto import PATIENCE_S, wait_for
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from publishers import BASE, transcript

from edge_asr.config_mqtt import MqttConfig, OutboxConfig
from edge_asr.publish.mqtt import MqttPublisher
from edge_asr.publish.outbox import DiskOutbox
from edge_asr.subscribe import Delivery, Event, Follower, Gap, Replay
from edge_asr.types import Token, Transcript

FILE = "outbox.sqlite3"
SENTENCE = "今天晚上把客厅的灯关掉"
LOOP_S = 0.2
PAUSE_S = 0.05
"""Between two attempts of a follower to connect."""
STATE_S = 0.1
"""Between two states that the process publishes."""
KEEPALIVE_S = 5


@dataclass(frozen=True)
class Orders:
    """What the process is to do."""

    port: int
    folder: str
    """Of the outbox and of the log."""
    offered: str
    """The file that gets the id of each transcript, before it is offered."""
    total: int
    """How many ids the file shall have in the end."""
    rate: float
    """Transcripts a second."""
    mqtt: Mapping[str, Any] = field(default_factory=dict)
    outbox: Mapping[str, Any] = field(default_factory=dict)


class Feeder:
    """The process that offers transcripts; killed, it can be started again and goes on where it was."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._process: subprocess.Popen[bytes] | None = None
        self._offered = Path(orders.offered)
        self._offered.touch()

    @property
    def offered(self) -> list[str]:
        """The ids offered so far."""
        return self._offered.read_text().split()

    @property
    def log(self) -> str:
        """What all the processes have written to their logs."""
        return (Path(self.orders.folder) / "feeder.log").read_text()

    @property
    def alive(self) -> bool:
        """It has neither been killed nor ended by itself."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        with (Path(self.orders.folder) / "feeder.err").open("ab") as errors:
            command = [sys.executable, __file__, json.dumps(dataclasses.asdict(self.orders))]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._reap()

    def close(self) -> None:
        """Let it end properly."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            assert self._process.wait(PATIENCE_S) == 0, (Path(self.orders.folder) / "feeder.err").read_text()
            self._process = None

    def wait_until_offered(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        size = 37 * count  # bytes of an id and its line feed: the file is not read a thousand times
        wait_for(lambda: not self.alive or self._offered.stat().st_size >= size, f"transcript {count}", timeout_s)
        assert self.alive, (Path(self.orders.folder) / "feeder.err").read_text()

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait(PATIENCE_S)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None


class Listener:
    """A subscriber that follows the appliance until the end of the `with` block, over any outage of the broker.

    What it has received raw is kept as well, for those who do not believe the follower.
    """

    def __init__(self, port: int, *, lasting: bool = False) -> None:
        """`lasting`: the broker is asked to keep what comes while it is away."""
        self.delivered: list[str] = []
        """Ids in the order of their delivery."""
        self.gaps: list[Gap] = []
        self.raw: list[Mapping[str, Any]] = []
        """What came on `transcript`."""
        self.said: list[Mapping[str, Any]] = []
        self.retained: list[str] = []
        """Topics of what came retained."""
        self.requests = 0
        self.restarts = 0
        self._port = port
        self._lasting = lasting
        self._follower = Follower(1)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Listener:
        self._begin()
        return self

    def __exit__(self, *reason: object) -> None:
        self._end()

    @property
    def complete_to(self) -> int:
        """The last number up to which all were delivered, or are known not to come."""
        return (self._follower.next_seq or 1) - 1

    def restart(self) -> None:
        """Begin anew, knowing no more than how far it has come."""
        self._end()
        self.restarts += 1
        self._follower = Follower(self._follower.next_seq, self._follower.newest_id)
        self._begin()

    def _begin(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._ended,), name="listener", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
            assert not self._thread.is_alive(), "the listener ends"

    def _run(self, ended: threading.Event) -> None:
        while not ended.is_set():
            client = paho.Client(CallbackAPIVersion.VERSION2, "listener", clean_session=not self._lasting)
            client.on_connect = self._subscribe
            client.on_subscribe = lambda client, *_: self._act(client, self._follower.connected(time.monotonic()))
            client.on_message = self._receive
            with contextlib.suppress(OSError):  # nobody listens there at present
                client.connect("127.0.0.1", self._port, KEEPALIVE_S)
                while not ended.is_set() and client.loop(LOOP_S) == MQTTErrorCode.MQTT_ERR_SUCCESS:
                    self._act(client, self._follower.tick(time.monotonic()))
            client.disconnect()
            if (sock := client.socket()) is not None:
                sock.close()
            ended.wait(PAUSE_S)

    def _subscribe(self, client: paho.Client, *details: Any) -> None:
        client.subscribe([(f"{BASE}/{topic}", 1) for topic in ("transcript", "said", "cmd/replay/result")])

    def _receive(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        now = time.monotonic()
        self._follower.alive(now)
        if message.retain:
            self.retained.append(message.topic)
        if message.topic == f"{BASE}/said":
            self.said.append(json.loads(message.payload))
        elif message.topic == f"{BASE}/transcript":
            self.raw.append(json.loads(message.payload))
            self._act(client, self._follower.feed(bytes(message.payload), now))
        else:
            self._act(client, self._follower.answer(bytes(message.payload), now))

    def _act(self, client: paho.Client, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Delivery):
                self.delivered.append(event.transcript["id"])
            elif isinstance(event, Gap):
                self.gaps.append(event)
            elif isinstance(event, Replay):
                self.requests += 1
                client.publish(f"{BASE}/cmd/replay", event.payload, qos=1)


@dataclass(frozen=True)
class Kept:
    """A row of the outbox file."""

    seq: int
    id: str
    acknowledged: bool
    payload: Mapping[str, Any]


def read_outbox(file: Path) -> list[Kept]:
    """Return what is committed, in order, as somebody sees it who only has the file."""
    select = "SELECT seq, id, settled_at IS NOT NULL AND refused IS NULL, payload FROM transcripts ORDER BY seq"
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=PATIENCE_S)) as database:
        rows = database.execute(select).fetchall()
    return [Kept(seq, identifier, bool(acknowledged), json.loads(text)) for seq, identifier, acknowledged, text in rows]


def realistic(number: int) -> Transcript:
    """Return a transcript as they are: with its tokens about 1.5 kB of JSON."""
    given = transcript(f"{SENTENCE}{number}")
    tokens = tuple(Token(letter, 160 * k, 160 * k + 150, 0.97) for k, letter in enumerate(given.text))
    stages = {"endpoint": 168.0, "queue": 0.21, "features": 1.13, "encoder": 21.44, "cif": 0.31, "decoder": 6.02}
    return dataclasses.replace(given, tokens=tokens, latency_ms={**stages, "response": 2.1, "total": 199.2})


@dataclass(frozen=True)
class Appliance:
    """A publisher in this process."""

    publisher: MqttPublisher
    outbox: DiskOutbox
    obeyed: list[str]
    """Names of the commands that were not the publisher's own business."""


@contextlib.contextmanager
def appliance(
    folder: Path, port: int, *, connect: Callable[..., sqlite3.Connection] = sqlite3.connect, **mqtt: Any
) -> Iterator[Appliance]:
    """Yield a publisher with an outbox in the folder; it is closed at the end without waiting for anybody."""
    obeyed: list[str] = []

    def obey(name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        obeyed.append(name)
        return _disobey(name, arguments)

    outbox = DiskOutbox(OutboxConfig(), folder / FILE, connect=connect)
    publisher = MqttPublisher(settings(port, **mqtt), "hall", outbox, client_id="chaos", command=obey)
    publisher.start()
    try:
        yield Appliance(publisher, outbox, obeyed)
    finally:
        publisher.close(0.0)


def settings(port: int, **keys: Any) -> MqttConfig:
    quick = {"port": port, "reconnect_min_s": 0.05, "reconnect_max_s": 0.2, "keepalive_s": KEEPALIVE_S}
    return MqttConfig.model_validate({**quick, **keys})


def main() -> None:
    """Offer transcripts, and publish until standard input ends."""
    orders = Orders(**json.loads(sys.argv[1]))
    folder = Path(orders.folder)
    logging.basicConfig(level=logging.DEBUG, filename=folder / "feeder.log", format="%(levelname)s %(message)s")
    outbox = DiskOutbox(OutboxConfig.model_validate(orders.outbox), folder / FILE)
    publisher = MqttPublisher(settings(orders.port, **orders.mqtt), "hall", outbox, client_id="chaos", command=_disobey)
    publisher.start()
    ended = threading.Event()
    threading.Thread(target=_show_state, args=(publisher, outbox, ended), name="state", daemon=True).start()
    with Path(orders.offered).open("ab", buffering=0) as file:
        for given in _pace(orders, len(Path(orders.offered).read_bytes().split())):
            file.write(f"{given.id}\n".encode())
            publisher.offer(given)
    sys.stdin.read()
    ended.set()
    publisher.close(PATIENCE_S)


def _pace(orders: Orders, done: int) -> Iterator[Transcript]:
    for number in range(done, orders.total):
        yield realistic(number)
        time.sleep(1 / orders.rate)


def _show_state(publisher: MqttPublisher, outbox: DiskOutbox, ended: threading.Event) -> None:
    while not ended.wait(STATE_S):
        publisher.set_state({"outbox": outbox.stats().to_json(), "pid": os.getpid()})


def _disobey(name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
    """Answer commands that are not the publisher's own business."""
    future: Future[Mapping[str, Any]] = Future()
    future.set_result({})
    return future


if __name__ == "__main__":
    main()
