"""What the outbox costs: how fast it drains to a real Mosquitto, and that no slow disk or broker delays an answer.

Each measurement runs in a process of its own. Mosquitto and gcc have to be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the broker that the tests start is ours too

import paho.mqtt.client as paho
from chaos import FILE, realistic
from mosquitto import Mosquitto, Subscriber, free_port, wait_for
from paho.mqtt.enums import CallbackAPIVersion
from slow_disk import make_slow_disk

from edge_asr.config_mqtt import MqttConfig, OutboxConfig
from edge_asr.publish.mqtt import MqttPublisher
from edge_asr.publish.outbox import DiskOutbox
from edge_asr.publish.payload import to_payload
from edge_asr.types import Transcript

WAYS = ("plain", "slow disk", "frozen broker", "no broker", "slow disk and no broker")
SLOW_MS = 200
"""What each fsync takes on the slow disk."""
WARM_UP = 8
"""Transcripts of a round that are not counted: imports, the first statement, the first connection."""
BATCH = 100
"""Rows in a transaction while the outbox is filled."""
PATIENCE_S = 300.0
NOTHING: Mapping[str, str] = MappingProxyType({})
THIS = (sys.executable, str(Path(__file__).resolve()))
MEBIBYTE = 1024 * 1024


def filled(folder: Path, rows: int) -> int:
    """Make an outbox with so many rows that nobody has acknowledged; return the bytes of their payloads."""
    outbox = DiskOutbox(OutboxConfig(max_mb=1000), folder / FILE)
    payloads = [(given.id, to_payload(given.to_json())) for given in map(realistic, range(rows))]
    for start in range(0, rows, BATCH):
        outbox.add(payloads[start : start + BATCH])
    outbox.close()
    return sum(len(payload.encode()) for _, payload in payloads)


@contextlib.contextmanager
def publishing(
    folder: Path, port: int, finish: Callable[[Transcript], Transcript] = lambda given: given
) -> Iterator[MqttPublisher]:
    """Yield a running publisher, configured as it is by default but for its patience with an absent broker."""
    outbox = DiskOutbox(OutboxConfig(max_mb=1000), folder / FILE)
    publisher = MqttPublisher(MqttConfig(port=port), "hall", outbox, client_id="bench", finish=finish)
    publisher.start()
    try:
        yield publisher
    finally:
        publisher.close(0.0)


def drain(rows: int) -> dict[str, Any]:
    """Publish what has piled up to a broker with one subscriber; seconds from the start of the publisher on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = filled(folder, rows)
        broker = Mosquitto(folder)
        broker.start()
        try:
            with Subscriber(broker.port, "edge_asr/hall/transcript") as subscriber:
                cpu_s, started_at = time.process_time(), time.monotonic()
                with publishing(folder, broker.port) as publisher:
                    wait_for(lambda: publisher.stats().sent >= rows, "all acknowledgements", PATIENCE_S)
                    took_s, cpu_s = time.monotonic() - started_at, time.process_time() - cpu_s
                subscriber.wait_for(lambda s: len(s.messages) >= rows, "all transcripts")
                arrived = [message.json["seq"] for message in subscriber.messages]
        finally:
            broker.kill()
    return {
        "rows": rows,
        "megabytes": round(size / 1e6, 2),
        "seconds": round(took_s, 2),
        "rows_per_s": round(rows / took_s),
        "cpu_us_per_row": round(cpu_s / rows * 1e6),  # with what reads the subscriber's output
        "arrived": len(arrived),
        "in_order": arrived == sorted(arrived),
    }


def respond(way: str, folder: Path, count: int, rate: float) -> dict[str, Any]:
    """Offer transcripts at a steady rate; for each, milliseconds from the offer to the finish hook, and to `said`."""
    offered: dict[str, float] = {}
    finished: dict[str, float] = {}

    def finish(given: Transcript) -> Transcript:
        finished[given.id] = time.monotonic()
        return given

    with (
        surroundings(way) as (broker, port),
        hearing(port if broker else None) as heard,
        publishing(folder, port, finish) as publisher,
    ):
        wait_for(lambda: publisher.stats().connected == (broker is not None), "the connection")
        for number in range(WARM_UP + count):
            if number == WARM_UP:
                if way == "frozen broker" and broker is not None:
                    broker.freeze()
                offered.clear()
                cpu_s, started_at = time.process_time(), time.monotonic()
            given = realistic(number)
            offered[given.id] = time.monotonic()
            publisher.offer(given)
            time.sleep(1 / rate)
        wait_for(lambda: offered.keys() <= finished.keys(), "the last of them")
        cpu_s, ended_at = time.process_time() - cpu_s, time.monotonic()
    return {
        "response_ms": [1000 * (finished[given] - at) for given, at in offered.items()],
        "said_ms": [1000 * (heard[given] - at) for given, at in offered.items() if given in heard],
        "cpu_s": cpu_s,
        "started_at": started_at,
        "ended_at": ended_at,
    }


@contextlib.contextmanager
def surroundings(way: str) -> Iterator[tuple[Mosquitto | None, int]]:
    """Yield the broker, where there is one, and its port."""
    if way.endswith("no broker"):
        yield None, free_port()
        return
    with tempfile.TemporaryDirectory() as name:
        broker = Mosquitto(Path(name))
        broker.start()
        try:
            yield broker, broker.port
        finally:
            broker.kill()


@contextlib.contextmanager
def hearing(port: int | None) -> Iterator[Mapping[str, float]]:
    """Yield the moments (monotonic seconds) at which ids arrive on `said`; none without a port."""
    heard: dict[str, float] = {}
    if port is None:
        yield heard
        return
    subscribed = threading.Event()

    def note(client: paho.Client, data: Any, message: paho.MQTTMessage) -> None:
        heard.setdefault(json.loads(message.payload)["id"], time.monotonic())

    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_message = note
    client.connect("127.0.0.1", port)
    client.subscribe("edge_asr/hall/said")
    client.loop_start()
    try:
        wait_for(subscribed.is_set, "the subscription")
        yield heard
    finally:
        client.loop_stop()


def recover(megabytes: float) -> dict[str, Any]:
    """Fill an outbox to a size, kill the process that did it, and open the file: seconds until it can be used."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / FILE
        with subprocess.Popen([*THIS, "--fill", str(megabytes), "--folder", name], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        sizes = [round(path.stat().st_size / MEBIBYTE, 2) for path in (file, file.with_name(f"{FILE}-wal"))]
        started_at = time.monotonic()
        outbox = DiskOutbox(OutboxConfig(max_mb=1000), file)
        first = outbox.pending(None, 20)
        took_s = time.monotonic() - started_at
        stats = outbox.stats()
        outbox.close()
    return {
        "file_mib": sizes[0],
        "wal_mib": sizes[1],
        "rows": stats.rows,
        "offered_first": [row.seq for row in first][:1],
        "open_ms": round(took_s * 1000, 1),
    }


def fill(folder: Path, megabytes: float) -> None:
    """Add rows until the files are so large, say so, and wait to be killed."""
    outbox = DiskOutbox(OutboxConfig(max_mb=1000), folder / FILE)
    number = 0
    while sum(path.stat().st_size for path in folder.glob(f"{FILE}*")) < megabytes * MEBIBYTE:
        rows = [realistic(number + k) for k in range(BATCH)]
        outbox.add([(given.id, to_payload(given.to_json())) for given in rows])
        number += BATCH
    print("full", flush=True)
    signal.pause()


def in_turns(count: int, rate: float, rounds: int) -> dict[str, Any]:
    """Measure all ways in turns, each round in another order and each turn in a process of its own."""
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in (*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]):
            turns[way].append(take_turn(way, math.ceil(count / rounds), rate))
    return {way: summed(parts) for way, parts in turns.items()}


def take_turn(way: str, count: int, rate: float) -> dict[str, Any]:
    """Measure one way on a disk that notes its fsyncs, and is slow where that is the way."""
    with tempfile.TemporaryDirectory() as tools, tempfile.TemporaryDirectory() as folder:
        disk = make_slow_disk(Path(tools), Path(folder), SLOW_MS if way.startswith("slow disk") else 0)
        options = ["--way", way, "--folder", folder, "--count", str(count), "--rate", str(rate)]
        turn = run(options, disk.environment)
        turn["syncs"] = [sync.at for sync in disk.syncs() if turn["started_at"] <= sync.at < turn["ended_at"]]
    return turn


def summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return percentiles over all turns, and what is counted by the second and by the transcript."""
    values = {key: [value for part in parts for value in part[key]] for key in ("response_ms", "said_ms")}
    count, seconds = len(values["response_ms"]), sum(part["ended_at"] - part["started_at"] for part in parts)
    figures: dict[str, Any] = {"count": count, "seconds": round(seconds, 1)}
    for key, found in values.items():
        figures[key] = {name: percentile(found, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}
    figures["said"] = len(values["said_ms"])
    figures["fsyncs_per_s"] = round(sum(len(part["syncs"]) for part in parts) / seconds, 2)
    figures["fsyncs_in_one_s"] = max(most_within(part["syncs"], 1.0) for part in parts)
    figures["cpu_ms_per_transcript"] = round(sum(part["cpu_s"] for part in parts) / count * 1000, 2)
    return figures


def most_within(moments: Sequence[float], seconds: float) -> int:
    """Return how many moments there are, at most, within so many seconds."""
    return max((sum(at <= other < at + seconds for other in moments) for at in moments), default=0)


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that so many are not above; None where there is none."""
    ordered = sorted(values)
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 2) if ordered else None


def run(options: Sequence[str], environment: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    """Run a measurement in a process of its own, and return what it has measured."""
    environment = {**os.environ, **environment}
    finished = subprocess.run([*THIS, *options], stdout=subprocess.PIPE, check=True, env=environment)
    content: dict[str, Any] = json.loads(finished.stdout)
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--rows", type=int, default=10_000, help="transcripts to drain (default: 10000)")
    parser.add_argument("--count", type=int, default=240, help="transcripts of each way (default: 240)")
    parser.add_argument("--rate", type=float, default=4.0, help="of them in a second (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default: 5)")
    parser.add_argument("--megabytes", type=float, default=20.0, help="size of the outbox to recover (default: 20)")
    parser.add_argument("--only", choices=("drain", "response", "recovery"))
    for internal in ("--way", "--fill", "--folder", "--drain", "--recover"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.fill:
        fill(Path(given.folder), float(given.fill))
    elif given.way:
        print(json.dumps(respond(given.way, Path(given.folder), given.count, given.rate)))
    elif given.drain:
        print(json.dumps(drain(int(given.drain))))
    elif given.recover:
        print(json.dumps(recover(float(given.recover))))
    else:
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Run what was asked for and print it."""
    parts: Mapping[str, Callable[[], dict[str, Any]]] = {
        "drain": lambda: run(["--drain", str(given.rows)]),
        "recovery": lambda: run(["--recover", str(given.megabytes)]),
        "response": lambda: in_turns(given.count, given.rate, given.rounds),
    }
    figures = {name: part() for name, part in parts.items() if given.only in (None, name)}
    if given.json:
        print(json.dumps(figures))
        return
    for name, part in figures.items():
        print(name)
        for key, value in part.items():
            print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
