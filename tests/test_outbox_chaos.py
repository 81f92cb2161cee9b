"""Whatever happens to the broker, the appliance and who listens: what is committed arrives, in order, each once."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chaos import FILE, Feeder, Kept, Listener, Orders, read_outbox
from daemons import SENTENCES, Start, is_ready
from mosquitto import Mosquitto, Subscriber, wait_for

log = logging.getLogger(__name__)

TOTAL = 2000
KILLS = 20
OUTAGES = 15
RESTARTS = 8
"""Of the subscriber."""
SLACK_S = 0.05
"""At most so long after its cue something happens: the moment is nobody's choice."""
DRAIN_S = 90.0
ON_THE_WAY = ("seq", "replayed", "age_s")

pytestmark = pytest.mark.slow


@dataclass(frozen=True, order=True)
class Step:
    """Something that happens once so many transcripts have been offered."""

    cue: int
    what: str


def plan(dice: random.Random) -> list[Step]:
    """Return what goes wrong: process, broker and subscriber each have troubles of their own, at the same time."""
    steps = [Step(dice.randrange(20, TOTAL - 20), "kill the appliance") for _ in range(KILLS)]
    steps += [Step(dice.randrange(20, TOTAL - 20), "restart the subscriber") for _ in range(RESTARTS)]
    outages = ["stop", "kill", "kill and forget", "freeze", "freeze and kill"] * (OUTAGES // 5)
    dice.shuffle(outages)
    share = TOTAL // OUTAGES
    for number, outage in enumerate(outages):
        begin = number * share + dice.randrange(share // 3)
        end = begin + dice.randrange(5, 2 * share // 3)
        steps += [Step(begin, f"broker: {outage}"), Step(end, f"broker: end of {outage}")]
    return sorted(steps)


class Fate:
    """Lets the steps happen, and notes what the outbox held at the moments of death."""

    def __init__(self, broker: Mosquitto, feeder: Feeder, listener: Listener, folder: Path) -> None:
        self.snapshots: list[list[Kept]] = []
        self._broker, self._feeder, self._listener, self._folder = broker, feeder, listener, folder
        self._acts: Mapping[str, Callable[[], None]] = {
            "kill the appliance": self._kill_the_appliance,
            "restart the subscriber": listener.restart,
            "broker: stop": broker.stop,
            "broker: end of stop": broker.start,
            "broker: kill": broker.kill,
            "broker: end of kill": broker.start,
            "broker: kill and forget": self._forget,
            "broker: end of kill and forget": broker.start,
            "broker: freeze": broker.freeze,
            "broker: end of freeze": broker.thaw,
            "broker: freeze and kill": broker.freeze,
            "broker: end of freeze and kill": self._restart_without_memory,
        }

    def happen(self, steps: Iterable[Step], dice: random.Random) -> None:
        for step in steps:
            self._feeder.wait_until_offered(step.cue)
            time.sleep(dice.uniform(0, SLACK_S))
            self._acts[step.what]()

    def _kill_the_appliance(self) -> None:
        self._feeder.kill()
        self.snapshots.append(read_outbox(self._folder / FILE))
        self._feeder.start()

    def _forget(self) -> None:
        self._broker.kill()
        (self._folder / "mosquitto.db").unlink(missing_ok=True)

    def _restart_without_memory(self) -> None:
        self._forget()
        self._broker.start()


@pytest.mark.parametrize(("rate", "lasting"), [(40, False), (200, True)])
def test_what_is_committed_arrives_in_order_and_once_whoever_dies(
    tmp_path: Path, mosquitto_installed: None, rate: int, lasting: bool
) -> None:
    seed = int(os.environ.get("CHAOS_SEED", str(rate)))
    log.warning("CHAOS_SEED=%d", seed)
    dice = random.Random(seed)
    broker = Mosquitto(tmp_path, persistence=True)
    broker.start()
    feeder = Feeder(Orders(broker.port, str(tmp_path), str(tmp_path / "offered"), TOTAL, rate))
    try:
        with Listener(broker.port, lasting=lasting) as listener:
            fate = Fate(broker, feeder, listener, tmp_path)
            feeder.start()
            fate.happen(plan(dice), dice)
            feeder.wait_until_offered(TOTAL)
            wait_for(lambda: is_drained(tmp_path / FILE, listener), "the end of the drain", DRAIN_S)
            feeder.close()
    finally:
        feeder.kill()
        broker.kill()
    kept = read_outbox(tmp_path / FILE)
    log.warning(
        "committed %d of %d; arrived %d, asked %d times", len(kept), TOTAL, len(listener.raw), listener.requests
    )
    check_file(kept, fate.snapshots, feeder.offered)
    check_listener(kept, listener)


def is_drained(file: Path, listener: Listener) -> bool:
    kept = read_outbox(file)
    return all(row.acknowledged for row in kept) and listener.complete_to == kept[-1].seq


def check_file(kept: list[Kept], snapshots: list[list[Kept]], offered: list[str]) -> None:
    """Nothing that was committed has gone, become another or lost its acknowledgement; nothing waits."""
    assert len(snapshots) == KILLS
    last = {row.seq: row for row in kept}
    for row in (row for snapshot in snapshots for row in snapshot):
        assert (last[row.seq].id, last[row.seq].payload) == (row.id, row.payload)
    for before, after in zip(snapshots, [*snapshots[1:], kept], strict=True):
        marked = {row.seq for row in after if row.acknowledged}
        assert {row.seq for row in before if row.acknowledged} <= marked
    assert all(row.acknowledged for row in kept)
    places = {identifier: place for place, identifier in enumerate(offered)}
    order = [places[row.id] for row in kept]
    assert order == sorted(set(order))
    assert len(offered) == TOTAL
    assert len(kept) >= TOTAL - 10 * KILLS  # what was offered in the moment of death


def check_listener(kept: list[Kept], listener: Listener) -> None:
    """Independent of the follower: all of it has come, unchanged; and the follower makes of it what is in the file."""
    committed = {row.seq: row for row in kept}
    assert {message["seq"] for message in listener.raw} == committed.keys()
    for message in listener.raw:
        row = committed[message["seq"]]
        assert as_recorded(message) == as_recorded(row.payload)
    assert listener.delivered == [row.id for row in kept]
    assert listener.gaps == []
    said = [message["id"] for message in listener.said]
    assert len(said) == len(set(said))
    assert set(said) <= {row.id for row in kept}
    assert not any(message["replayed"] for message in listener.said)
    assert listener.retained == []


def as_recorded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a transcript gets when it is published."""
    stages = {stage: value for stage, value in content["latency_ms"].items() if stage != "outbox"}
    return {**{key: content[key] for key in content if key not in ON_THE_WAY}, "latency_ms": stages}


def test_the_whole_appliance_killed_in_outages_has_everything_it_wrote_down_delivered(
    broker: Mosquitto, start: Start, tmp_path: Path
) -> None:
    file, output = tmp_path / FILE, tmp_path / "subscribed"
    options = ["--source", "stdin", "-o", f"outbox.file={file}"]
    follow = ["subscribe", "--complete", "--json", "--device", "hall", "--since-seq", "1"]
    program = [sys.executable, "-m", "edge_asr", *follow, "-o", f"mqtt.port={broker.port}"]
    with output.open("wb") as pipe, subprocess.Popen(program, stdout=pipe) as subscriber:
        try:
            for attempt in range(3):
                daemon = start(broker.port, *options)
                with Subscriber(broker.port) as witness:
                    witness.wait_for(is_ready, "ready")
                daemon.is_told(SENTENCES[attempt])
                wait_for_rows(file, 2 * attempt + 1)
                broker.kill()
                daemon.is_told(SENTENCES[attempt + 1])
                wait_for_rows(file, 2 * attempt + 2)
                daemon.stop(signal.SIGKILL)
                broker.start()
            last = start(broker.port, *options)
            wait_for(lambda: len(output.read_bytes().splitlines()) == 6, "everything")
            last.stop()
        finally:
            subscriber.terminate()
    kept = read_outbox(file)
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [row.id for row in kept]
    assert all(row.acknowledged for row in kept)


def wait_for_rows(file: Path, count: int) -> None:
    wait_for(lambda: len(read_outbox(file)) == count, f"{count} rows")
