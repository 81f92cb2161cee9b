#!/usr/bin/env python3
"""How soon a virtual microphone is heard again after each fault: from its return to `listening` in the state.

Needs PulseAudio, ALSA's `pulse` plugin and Mosquitto: what the tests of the microphone need.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the servers that the tests start are ours too

from mosquitto import Mosquitto, Subscriber, send
from pulse import MICROPHONE, PulseServer, missing_parts

from edge_asr.types import SAMPLE_RATE

SOURCE = f"microphone:{MICROPHONE}"
ABSENT_S = (2.0, 12.0)
"""How long a fault lasts: by chance, for so much depends on when it was looked for last."""
LONG_S = 35.0
"""Longer than a watchdog waits."""
Fault = Callable[[PulseServer, int, int], Callable[[], None]]
"""Brings a fault about, given the broker's port, for the first, second, ... time; returns what ends it."""


def unplugged(server: PulseServer, port: int, number: int) -> Callable[[], None]:
    """The sink of the microphone goes."""
    server.remove_sink()
    return server.add_sink


def killed(server: PulseServer, port: int, number: int) -> Callable[[], None]:
    """The sound server dies; the device is back when a new one answers."""
    server.kill()
    return lambda: server.start(**{MICROPHONE: (SAMPLE_RATE, 1)})


def hanging(server: PulseServer, port: int, number: int) -> Callable[[], None]:
    """The sound server stops where it is."""
    server.suspend()
    return server.resume


def renamed(server: PulseServer, port: int, number: int) -> Callable[[], None]:
    """Another device comes, under another name that holds the old one."""
    server.remove_sink(f"{MICROPHONE}{number}" if number else MICROPHONE)
    new = f"{MICROPHONE}{number + 1}"

    def back() -> None:
        server.add_sink(new)
        server.name_microphone(new, new)

    return back


def muted(server: PulseServer, port: int, number: int) -> Callable[[], None]:
    """The microphone is closed because somebody wants it."""
    send(port, "edge_asr/bench/cmd/mute", "on")
    return lambda: send(port, "edge_asr/bench/cmd/mute", "off")


FAULTS: dict[str, tuple[Fault, tuple[float, float]]] = {
    "sink removed": (unplugged, ABSENT_S),
    "PulseAudio killed": (killed, ABSENT_S),
    "no data": (hanging, (10.0, 12.0)),
    "absent for long": (unplugged, (LONG_S, LONG_S + 5)),
    "muted for long": (muted, (LONG_S, LONG_S + 5)),
    "renamed": (renamed, ABSENT_S),
}
"""The last one leaves another device behind."""


def measure(server: PulseServer, port: int, times: int, seed: int = 0) -> Iterator[tuple[str, list[float]]]:
    """Yield each fault with the seconds that recovery took, `times` times."""
    rng = random.Random(seed)
    with Subscriber(port) as told:
        told.wait_for(lambda s: _health(s) == "listening", "the microphone is heard")
        for name, (fault, lasts_s) in FAULTS.items():
            took = []
            for number in range(times):
                back = fault(server, port, number)
                told.wait_for(lambda s: _health(s) not in ("listening", ""), f"{name}: the loss is told")
                time.sleep(rng.uniform(*lasts_s))
                back()
                took.append(_seconds_to_recovery(told, name))
            yield name, took


def _health(told: Subscriber) -> str:
    states = told.on("state")
    return "".join(source["health"] for source in states[-1].json["sources"]) if states else ""


def _seconds_to_recovery(told: Subscriber, name: str) -> float:
    began = time.monotonic()
    told.wait_for(lambda s: _health(s) == "listening", f"{name}: it is heard again")
    return time.monotonic() - began


@contextlib.contextmanager
def running_daemon(port: int, work: Path) -> Iterator[None]:
    """Run a daemon on the virtual microphone until the end of the block."""
    options = [f"mqtt.port={port}", "device_id=bench", f"state_dir={work / 'state'}"]
    command = [sys.executable, "-m", "edge_asr", "run", "--source", SOURCE]
    with subprocess.Popen([*command, *(part for option in options for part in ("-o", option))]) as process:
        try:
            yield
        finally:
            process.terminate()


def main() -> None:
    """Measure, and print a JSON object for each fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="how often each fault is brought about (5)")
    times = parser.parse_args().times
    if missing := missing_parts():
        sys.exit(f"microphone_faults: not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="edge_asr-bench-") as folder, contextlib.ExitStack() as stack:
        server, broker = PulseServer(), Mosquitto(Path(folder))
        os.environ.update(server.environment)
        stack.callback(server.close)
        stack.callback(broker.kill)
        server.start(**{MICROPHONE: (SAMPLE_RATE, 1)})
        broker.start()
        stack.enter_context(running_daemon(broker.port, Path(folder)))
        for name, took in measure(server, broker.port, times):
            seconds = {"median": statistics.median(took), "worst": max(took)}
            print(
                json.dumps({"fault": name, "times": len(took), **{k: round(s, 2) for k, s in seconds.items()}}),
                flush=True,
            )


if __name__ == "__main__":
    main()
