"""The daemon on the fakes of TensorRT: it serves at once, builds, changes its engine, and says which one it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from bundled import BUNDLE
from daemons import SENTENCES, Daemon, Start, is_offline, is_ready
from mosquitto import Mosquitto, Subscriber, wait_for
from plans import RELEASE, plan, put_plan, put_processors
from tensorrt_fakes import FOLDER

from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import FP32, read_bundle
from edge_asr.recognizer.manifest import TENSORRT

BUILDING = "its TensorRT engine is being built"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with the engine for the processor."""
    put_processors(tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that are started from now on find the fakes."""
    plan()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAKE_TENSORRT", RELEASE)


def place_in(state: Path) -> Path:
    return engine_folder(read_bundle(BUNDLE), state, TENSORRT)


def listening(start: Start, port: int, state: Path, *options: str, **keys: Any) -> Daemon:
    """Start a daemon on the bundled model that listens to its standard input."""
    settings = [f"state_dir={state}", "engine.threads=1", "log.level=DEBUG", *options]
    arguments = [part for setting in settings for part in ("-o", setting)]
    return start(port, "--source", "stdin", "--model", str(BUNDLE), *arguments, **keys)


@contextlib.contextmanager
def somebody_building(place: Path) -> Iterator[None]:
    """Hold the folder of an engine as a build does: another waits."""
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def last_state(subscriber: Subscriber) -> Mapping[str, Any]:
    found: Mapping[str, Any] = subscriber.on("state")[-1].json
    return found


def wait_for_state(subscriber: Subscriber, engine: str, why: str) -> None:
    """Return when the state is ready, names an engine, and says why (a pattern)."""

    def reached(subscriber: Subscriber) -> bool:
        state = last_state(subscriber) if subscriber.on("state") else {}
        ready = (state.get("state"), state.get("engine")) == ("ready", engine)
        return ready and re.fullmatch(why, state["why"]) is not None

    subscriber.wait_for(reached, f"{engine} in the state, {why!r}")


def warnings(daemon: Daemon) -> list[str]:
    return [line.partition("WARNING")[2].strip() for line in daemon.log.splitlines() if " WARNING " in line]


def test_it_serves_at_once_builds_changes_and_every_transcript_names_its_engine(
    broker: Mosquitto, start: Start, state: Path
) -> None:
    with Subscriber(broker.port) as subscriber:
        with somebody_building(place_in(state)):
            daemon = listening(start, broker.port, state)
            wait_for_state(subscriber, FP32, BUILDING)
            daemon.hears(SENTENCES[0])
        wait_for_state(subscriber, TENSORRT, "")
        daemon.hears(SENTENCES[1])
        subscriber.wait_for(lambda s: len(s.on("said")) == 2, "both sentences")
        engines = [(message.json["text"], message.json["engine"]) for message in subscriber.on("said")]
        assert engines == [(SENTENCES[0], FP32), (SENTENCES[1], TENSORRT)]
        assert f"building TensorRT's engine of {BUNDLE.name}, once for this machine, in {place_in(state)}" in daemon.log
        assert "tensorrt-fp16 answers from now on" in daemon.log
        assert warnings(daemon) == []
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")


def test_a_plan_that_is_there_is_used_from_the_start(broker: Mosquitto, start: Start, state: Path) -> None:
    put_plan(state)
    with Subscriber(broker.port) as subscriber:
        daemon = listening(start, broker.port, state, "engine.strict=true")
        wait_for_state(subscriber, TENSORRT, "")
        daemon.hears(SENTENCES[0])
        assert "building" not in daemon.log
        assert daemon.stop() == 0


@pytest.mark.slow
def test_a_build_that_fails_is_one_warning_and_what_somebody_else_puts_there_is_used(
    broker: Mosquitto, start: Start, state: Path
) -> None:
    place = place_in(state)
    place.write_text("in the way")
    with Subscriber(broker.port) as subscriber:
        daemon = listening(start, broker.port, state)
        wait_for_state(subscriber, FP32, "its TensorRT engine could not be built: .*cannot write the engine there.*")
        [line] = warnings(daemon)
        assert f"{BUNDLE.name}: its TensorRT engine could not be built: {place}" in line
        daemon.hears(SENTENCES[0])
        place.unlink()
        shutil.copytree(plan(), place.with_name("draft"))
        place.with_name("draft").rename(place)
        wait_for_state(subscriber, TENSORRT, "")
        daemon.hears(SENTENCES[1])
        assert len(warnings(daemon)) == 1
        assert daemon.stop() == 0


@pytest.mark.slow
def test_a_plan_that_there_is_no_room_for_is_refused_and_the_old_engine_goes_on(
    broker: Mosquitto, start: Start, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GPU_MEMORY", "1000000,8000000000")
    monkeypatch.setenv("FAKE_GPU_INTEGRATED", "0")  # one that shares the host's memory has plenty
    place = place_in(state)
    with Subscriber(broker.port) as subscriber:
        daemon = listening(start, broker.port, state)
        wait_for_state(subscriber, FP32, "its TensorRT engine could not be built: .* free memory .*")
        shutil.copytree(plan(), place.with_name("draft"))
        shutil.rmtree(place)
        place.with_name("draft").rename(place)
        wait_for_state(subscriber, FP32, "its new TensorRT engine is not used: .*no room.*; restart edge-asr to use it")
        daemon.hears(SENTENCES[0])
        assert len(warnings(daemon)) == 2
        assert warnings(daemon)[1].endswith(last_state(subscriber)["why"])
        assert daemon.stop() == 0


def test_a_gpu_that_breaks_costs_no_sentence_and_the_state_says_so(
    broker: Mosquitto, start: Start, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_plan(state)
    broken = state.parent / "broken"
    monkeypatch.setenv("FAKE_GPU_FAIL_WITH", str(broken))
    with Subscriber(broker.port) as subscriber:
        daemon = listening(start, broker.port, state)
        wait_for_state(subscriber, TENSORRT, "")
        daemon.hears(SENTENCES[0])
        broken.touch()
        daemon.hears(SENTENCES[1])
        wait_for_state(subscriber, FP32, "tensorrt-fp16 cannot be used: .*launch failure.*")
        subscriber.wait_for(lambda s: len(s.on("said")) == 2, "both sentences")
        engines = [(message.json["text"], message.json["engine"]) for message in subscriber.on("said")]
        assert engines == [(SENTENCES[0], TENSORRT), (SENTENCES[1], FP32)]
        assert len(warnings(daemon)) == 1
        assert daemon.stop() == 0


def test_with_strict_a_gpu_that_breaks_ends_the_daemon_for_another_start(
    broker: Mosquitto, start: Start, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_plan(state)
    broken = state.parent / "broken"
    monkeypatch.setenv("FAKE_GPU_FAIL_WITH", str(broken))
    with Subscriber(broker.port) as subscriber:
        daemon = listening(start, broker.port, state, "engine.strict=true")
        wait_for_state(subscriber, TENSORRT, "")
        broken.touch()
        with contextlib.suppress(BrokenPipeError):  # it may end before the sentence does
            daemon.is_told(SENTENCES[0])
        assert daemon.end() == 1
        [line] = daemon.complaints
        assert "launch failure" in line
        subscriber.wait_for(is_offline, "offline")


@pytest.mark.slow
def test_with_strict_the_plan_is_built_before_anything_is_served(broker: Mosquitto, start: Start, state: Path) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = listening(start, broker.port, state, "engine.strict=true")
        wait_for_state(subscriber, TENSORRT, "")
        seen = [(message.json["state"], message.json["why"]) for message in subscriber.on("state")]
        assert [pair for k, pair in enumerate(seen) if pair not in seen[:k]] == [
            ("starting", "the model is loading"),
            ("starting", BUILDING),
            ("ready", ""),
        ]
        assert daemon.stop() == 0


def test_with_strict_a_plan_that_cannot_be_built_is_an_error(broker: Mosquitto, start: Start, state: Path) -> None:
    place_in(state).write_text("in the way")
    daemon = listening(start, broker.port, state, "engine.strict=true")
    assert daemon.end() == 3
    [line] = daemon.complaints
    assert "cannot write the engine there" in line
    assert warnings(daemon) == []


HANGING = """
import sys
from edge_asr import child, cli

pid = sys.argv.pop(1)
child._command = lambda *given: ["sh", "-c", f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60"]
cli.main()
"""


def test_a_daemon_that_builds_beside_its_work_takes_the_build_with_it(
    broker: Mosquitto, start: Start, state: Path, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    with Subscriber(broker.port) as subscriber:
        daemon = listening(start, broker.port, state, program=("-c", HANGING, str(pid)))
        wait_for_state(subscriber, FP32, BUILDING)
        wait_for(pid.exists, "the build")
        daemon.hears(SENTENCES[0])
        assert is_ready(subscriber)
        assert daemon.stop() == 0
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
        assert warnings(daemon) == []
