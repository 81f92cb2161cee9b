"""What devices with microphones ask of their broker: all day, when it comes back, and after an hour without it."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import os
import shutil
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from bench.fleet_arrivals import DAY_S, Array
from bench.load import Sentence, Setting, bundled_sentences, daemon, free_port, make_tape, until_ready
from edge_asr.bench.proc import read_process
from edge_asr.broker import HOST, serving
from edge_asr.publish.connection import IN_FLIGHT_LIMIT, OPEN_S
from edge_asr.types import SAMPLE_RATE

PATIENCE_S = 60.0
BROKER_PER_S = 11_000.0
"""QoS 1 that one Mosquitto brought to one reader (`--measure`, docs/scale.md), all on the same two cores: a floor."""
CONNECTS_PER_S = 5_000.0
"""Connections: a third of what it took here, for each is also greeted with two subscriptions and two messages."""
DEVICE_PER_S = 3_800.0
"""Transcripts that one appliance publishes, where many have piled up (docs/outbox.md)."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a device publishes on a topic: messages, bytes of each (topic and payload), and how surely."""

    messages: float
    size: float
    qos: int


SENTENCE = {
    "partial": Traffic(6.6, 196, 0),
    "said": Traffic(1.0, 1_246, 0),
    "transcript": Traffic(1.0, 1_231, 1),
    "state": Traffic(0.8, 579, 1),
}
"""For a sentence of 3.3 s, as `--measure` counted on 2026-11-24."""
IDLE_STATE = Traffic(1 / 60, 563, 1)
"""A second in which nobody speaks: the sensors are shown anew every minute (docs/mqtt.md)."""
PACKET = 7
"""Bytes of MQTT beside topic and payload: head, length, packet id, properties."""
PUBACK = 4
GREETING = 5
"""Packets that a device sends when it connects: CONNECT, two SUBSCRIBE, status, state."""


def broker_load(devices: int, sentences_a_day: float, peak: float, readers: int = 1) -> dict[str, Any]:
    """Return what the broker gets and gives in a second, at the mean of the day and at the peak."""
    found: dict[str, Any] = {}
    for name, factor in (("mean", 1.0), ("peak", peak)):
        said = devices * sentences_a_day / DAY_S * factor
        rates = {topic: said * traffic.messages for topic, traffic in SENTENCE.items()}
        rates["state"] += devices * IDLE_STATE.messages
        sizes = {topic: traffic.size + PACKET for topic, traffic in SENTENCE.items()}
        acknowledged = sum(rates[topic] for topic, traffic in SENTENCE.items() if traffic.qos)
        into = sum(rates[topic] * sizes[topic] for topic in rates)
        found[name] = {
            "sentences_per_s": round(said, 2),
            "messages_per_s": {topic: round(rate, 1) for topic, rate in rates.items()},
            "in_per_s": round(sum(rates.values()), 1),
            "qos1_per_s": round(acknowledged, 1),
            "out_per_s": round(readers * sum(rates.values()), 1),
            "in_kb_per_s": round(into / 1e3, 1),
            "out_kb_per_s": round((readers * into + acknowledged * PUBACK) / 1e3, 1),
        }
    return found


def delays(rng: np.random.Generator, failures: Array, least_s: float = 0.5, most_s: float = 30.0) -> Array:
    """Return how long devices wait after so many failures, as edge_asr/publish/mqtt.py does."""
    waits = np.minimum(most_s, least_s * 2.0 ** np.minimum(failures, 16)) * rng.uniform(0.5, 1.0, len(failures))
    return np.asarray(waits, dtype=np.float64)


def storm(
    devices: int, down_s: float, connects_per_s: float, seed: int = 0, limits_s: tuple[float, float] = (0.5, 30.0)
) -> dict[str, Any]:
    """Return how devices come back to a broker that was away: it refuses at once, then takes so many a second.

    Who waits for longer than OPEN_S for an answer gives up, and tries again after its pause.
    """
    rng = np.random.default_rng(seed)
    failures = np.zeros(devices)
    at, attempts = np.zeros(devices), []
    while (away := at < down_s).any():
        attempts.append(at[away])
        at[away] += delays(rng, failures[away], *limits_s)
        failures[away] += 1
    queue = [(float(when), int(number)) for number, when in enumerate(at)]
    heapq.heapify(queue)
    came, tried, free_at = np.full(devices, np.inf), [], down_s
    while queue:
        when, number = heapq.heappop(queue)
        tried.append(when)
        answered_at = max(when, free_at) + 1 / connects_per_s
        if answered_at - when <= OPEN_S:
            came[number] = free_at = answered_at
            continue
        delay = float(delays(rng, failures[number : number + 1], *limits_s)[0])
        failures[number] += 1
        heapq.heappush(queue, (when + OPEN_S + delay, number))
    seconds = np.arange(0, float(came.max()) - down_s + 2)
    asked = np.histogram(np.asarray(tried) - down_s, seconds)[0]
    taken = np.histogram(came - down_s, seconds)[0]
    refused = np.concatenate(attempts)
    first = [float(np.histogram(refused, (start, start + 1))[0][0]) for start in (0, 1, 2)]
    return {
        "down_s": down_s,
        "refused_per_s_at_first": first,
        "refused_per_s_at_last": round(float((refused > down_s - 30).sum()) / min(30.0, down_s), 1),
        "asked_per_s_most": int(asked.max()),
        "taken_per_s_most": int(taken.max()),
        "given_up": len(tried) - devices,
        "back_s": {f"{share} %": round(float(np.percentile(came, share)) - down_s, 1) for share in (50, 95, 100)},
        "asked_per_s": asked.tolist(),
        "came_s": (came - down_s).tolist(),
    }


def replay(
    came_s: Sequence[float], rows: float, broker_per_s: float, live_per_s: float, device_per_s: float
) -> dict[str, Any]:
    """Return how outboxes drain once devices are back: they share what the broker has left, none faster than it can."""
    came, left = np.asarray(came_s), np.full(len(came_s), float(rows))
    second, rates = 0, []
    spare = broker_per_s - live_per_s
    while left.any() and spare > 0:
        draining = (came <= second) & (left > 0)
        if count := int(draining.sum()):
            sent = np.minimum(left[draining], min(device_per_s, spare / count))
            left[draining] -= sent
            left[left < 1e-9] = 0
            rates.append(float(sent.sum()))
        else:
            rates.append(0.0)
        second += 1
    return {
        "rows": round(rows * len(came_s)),
        "drained_s": second if spare > 0 else None,
        "rows_per_s_most": round(max(rates, default=0.0)),
        "rows_per_s": [round(rate) for rate in rates],
    }


def _mosquitto_pid() -> int:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    named = {int(pid): Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip() for pid in children}
    return next(pid for pid, name in named.items() if name == "mosquitto")


def _publish(port: int, number: int, payload: bytes, seconds: float, counts: Any) -> None:
    """Publish with QoS 1, 20 in flight as an appliance has them, and count what is acknowledged."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"load-{number}", protocol=paho.MQTTv5)
    client.max_inflight_messages_set(IN_FLIGHT_LIMIT)
    client.connect(HOST, port)
    client.loop_start()
    ends_at, flying = time.monotonic() + seconds, deque[paho.MQTTMessageInfo]()
    acknowledged = 0
    while time.monotonic() < ends_at:
        flying.append(client.publish(f"edge_asr/load-{number}/transcript", payload, qos=1))
        if len(flying) >= IN_FLIGHT_LIMIT:
            flying.popleft().wait_for_publish(PATIENCE_S)
            acknowledged += 1
    counts.put(acknowledged)
    client.disconnect()
    client.loop_stop()


def _connect(port: int, number: int, seconds: float, counts: Any) -> None:
    """Connect, wait for the broker's word, hang up, again and again (MQTT 3.1.1), and count."""
    name = f"c{number}".encode()
    body = b"\x00\x04MQTT\x04\x02\x00\x1e" + len(name).to_bytes(2, "big") + name
    packet, ends_at, taken = b"\x10" + bytes([len(body)]) + body, time.monotonic() + seconds, 0
    while time.monotonic() < ends_at:
        with socket.create_connection((HOST, port), PATIENCE_S) as sock:
            sock.sendall(packet)
            taken += sock.recv(4) == b"\x20\x02\x00\x00"
    counts.put(taken)


def _together(work: Callable[..., None], processes: int, *arguments: Any) -> int:
    """Let so many processes do it, and return what they counted together."""
    context = get_context("spawn")
    counts = context.Queue()
    running = [
        context.Process(target=work, args=(arguments[0], number, *arguments[1:], counts)) for number in range(processes)
    ]
    for process in running:
        process.start()
    found = sum(counts.get(timeout=PATIENCE_S) for _ in running)
    for process in running:
        process.join()
    return int(found)


@contextlib.contextmanager
def _reading(port: int, file: Path) -> Iterator[None]:
    """Let a subscriber write a line of two bytes for each message, until the block ends."""
    program = shutil.which("mosquitto_sub") or "mosquitto_sub"
    command = [program, "-p", str(port), "-q", "1", "-t", "edge_asr/#", "-F", "."]
    with file.open("wb") as out, subprocess.Popen(command, stdout=out) as process:
        try:
            yield
        finally:
            process.terminate()


async def measure_broker(seconds: float, size: int, folder: Path, processes: int = 2) -> dict[str, Any]:
    """Return what one Mosquitto takes, with one reader and all clients on the same machine: a floor."""
    found: dict[str, Any] = {"seconds": seconds, "size": size}
    async with serving() as broker:
        pid = _mosquitto_pid()
        used_s = read_process(pid).cpu_s
        with _reading(broker.port, folder / "read"):
            count = await asyncio.to_thread(_together, _publish, processes, broker.port, b"x" * size, seconds)
        used_s = read_process(pid).cpu_s - used_s
        read = (folder / "read").stat().st_size // 2
        found["qos1"] = {**_each(count, used_s, seconds), "read_per_s": round(read / seconds)}
        used_s = read_process(pid).cpu_s
        count = await asyncio.to_thread(_together, _connect, processes, broker.port, seconds)
        found["connects"] = _each(count, read_process(pid).cpu_s - used_s, seconds)
    return found


def _each(count: int, used_s: float, seconds: float) -> dict[str, float]:
    return {"per_s": round(count / seconds), "broker_ms_each": round(1e3 * used_s / max(1, count), 4)}


async def measure_messages(seconds: float, folder: Path, *, silent: bool = False) -> dict[str, Any]:
    """Return what the daemon publishes while sentences are spoken, or nothing is, by topic: messages, mean bytes."""
    setting = Setting(0, 0, seconds, 0.0)
    silence = [Sentence(np.zeros(SAMPLE_RATE, np.float32), None)]
    said = make_tape(folder / "tape.wav", silence if silent else bundled_sentences(), seconds)
    counted: dict[str, list[int]] = {}

    def take(client: paho.Client, data: Any, message: paho.MQTTMessage) -> None:
        counted.setdefault(message.topic.split("/", 2)[2], []).append(len(message.topic) + len(message.payload))

    async with serving() as broker:
        client = paho.Client(CallbackAPIVersion.VERSION2)
        client.on_message = take
        client.connect(HOST, broker.port)
        client.subscribe("edge_asr/#", 1)
        client.loop_start()
        http = free_port()
        with daemon(folder, http, broker.port, setting, folder / "tape.wav") as process:
            await until_ready(http, process, folder / "daemon.log")
            await asyncio.sleep(seconds + 3)  # the tape plays at the pace of speech
        client.disconnect()
        client.loop_stop()
    return {
        "sentences": 0 if silent else len(said),
        "seconds": seconds,
        "topics": {
            topic: {"messages": len(sizes), "bytes": round(sum(sizes) / len(sizes))} for topic, sizes in counted.items()
        },
    }
