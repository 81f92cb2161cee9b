"""Nothing spoken is found anywhere but in the outbox for as long as that keeps it, and nowhere after `edge-asr forget`.

What is looked at: every file below the daemon's state, working, temporary and home folders, what it logs, what the
kernel tells of the process, and what the broker retains.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from bundled import REPOSITORY
from daemons import SENTENCES, Daemon, is_offline, is_ready, spoken, texts_on
from mosquitto import PATIENCE_S, Mosquitto, Subscriber, wait_for
from numpy.typing import NDArray

from edge_asr import memory
from edge_asr.types import Samples

SAID = SENTENCES[:3]
PIECE = 4
"""So many letters in a row of a sentence are found."""
MOMENT = 400
"""Samples of the sound that is looked for."""
FAULTY_ENGINE = """
import sys
from edge_asr.recognizer.paraformer import Paraformer

recognize, heard = Paraformer.recognize, []

def fail_on_the_second(self, samples, *arguments, **keywords):
    text = recognize(self, samples, *arguments, **keywords)
    if len(samples) > 16_000:  # not at the start
        heard.append(text)
        if len(heard) > 1:
            raise RuntimeError("the engine is made to fail")
    return text

Paraformer.recognize = fail_on_the_second
sys.argv[0] = "edge-asr"
from edge_asr.cli import main
main()
"""


def needles() -> dict[str, bytes]:
    """Return what must not be found: every piece of what is said, in four encodings."""
    pieces = {sentence[at : at + PIECE] for sentence in SAID for at in range(len(sentence) - PIECE + 1)}
    found = {f"{piece} in {code}": piece.encode(code) for piece in pieces for code in ("utf-8", "gbk", "utf-16-le")}
    return found | {f"{piece} in JSON": json.dumps(piece)[1:-1].encode() for piece in pieces}


def sounds() -> dict[str, Samples]:
    """Return the loudest moment of each sentence."""
    pcm = {sentence: np.frombuffer(spoken(sentence), "<i2").astype(np.float32) for sentence in SAID}
    loudest = {sentence: max(int(np.argmax(np.abs(sound))), MOMENT) for sentence, sound in pcm.items()}
    return {sentence: sound[loudest[sentence] - MOMENT : loudest[sentence]] for sentence, sound in pcm.items()}


NEEDLES = needles()
SOUNDS = sounds()


def spoken_in(content: bytes) -> list[str]:
    """Return what of it can be found in some bytes."""
    return [name for name, needle in NEEDLES.items() if needle in content]


def sounding_in(content: bytes) -> list[str]:
    """Return of which sentences the sound can be found in some bytes: as PCM or floats, at any volume."""
    found = set()
    for kind in ("<i2", "<f4"):
        width = np.dtype(kind).itemsize
        for start in range(width):
            length = max(0, len(content) - start) // width
            sound = np.nan_to_num(np.frombuffer(content, kind, length, min(start, len(content)))).clip(-1e5, 1e5)
            found |= {sentence for sentence, moment in SOUNDS.items() if is_in(moment, sound.astype(np.float64))}
    return [f"the sound of {sentence}" for sentence in sorted(found)]


def is_in(moment: Samples, sound: NDArray[np.float64]) -> bool:
    """Tell whether a moment is part of a sound: where its correlation with it is nearly 1."""
    if len(sound) < len(moment):
        return False
    power = np.convolve(sound**2, np.ones(len(moment)), "valid") * float(moment.astype(np.float64) @ moment)
    alike = np.correlate(sound, moment.astype(np.float64), "valid")
    return bool(np.any((power > 0) & (alike > 0.99 * np.sqrt(np.maximum(power, 0)))))


class Home:
    """The folders of a daemon: all that it may write to."""

    def __init__(self, folder: Path, engines: Path) -> None:
        self.folder = folder
        for name in ("state", "tmp", "work", "home"):
            (folder / name).mkdir(parents=True)
        shutil.copytree(engines, folder / "state", dirs_exist_ok=True)
        self._before = {str(file.relative_to(folder)) for file in folder.rglob("*")}
        self.outbox = folder / "state" / "outbox.sqlite3"

    def found(self) -> dict[str, list[str]]:
        """Return what can be found, by the file that holds it."""
        found = {}
        for file in self.folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                content, name = file.read_bytes(), str(file.relative_to(self.folder))
                found[name] = spoken_in(content) + ([] if name in self._before else sounding_in(content))
        return {name: what for name, what in found.items() if what}

    def found_elsewhere(self) -> dict[str, list[str]]:
        """Return the same without the outbox."""
        kept = {f"state/{self.outbox.name}{suffix}" for suffix in ("", "-wal")}
        return {name: what for name, what in self.found().items() if name not in kept}

    def recorded(self) -> int:
        with closing(sqlite3.connect(f"file:{self.outbox}?mode=ro", uri=True, timeout=PATIENCE_S)) as database:
            return int(database.execute("SELECT count(*) FROM transcripts").fetchone()[0])

    def forget(self) -> str:
        command = [sys.executable, "-W", "error", "-m", "edge_asr", "forget", "-o", f"state_dir={self.folder}/state"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def home(tmp_path: Path, state_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    made = Home(tmp_path / "appliance", state_folder)
    for name, folder in {"HOME": "home", "XDG_DATA_HOME": "home", "XDG_CACHE_HOME": "home", "TMPDIR": "tmp"}.items():
        monkeypatch.setenv(name, str(made.folder / folder))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(made.folder / "work")
    return made


Run = Callable[..., Daemon]


@pytest.fixture
def run(home: Home, broker: Mosquitto) -> Iterator[Run]:
    """Return what starts a daemon with the default settings; at the end none is left."""
    daemons: list[Daemon] = []

    def start(*options: str, program: tuple[str, ...] = ("-m", "edge_asr")) -> Daemon:
        own = [f"state_dir={home.folder}/state", "outbox.file=null", "home_assistant.enabled=true", *options]
        arguments = ["--source", "stdin", *(part for option in own for part in ("-o", option))]
        log = home.folder / f"daemon-{len(daemons)}.log"  # a journal: what is written there is found as well
        daemons.append(Daemon(log, broker.port, *arguments, program=program))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.wait(PATIENCE_S)
        assert daemon.process.stdin is not None
        daemon.process.stdin.close()


def say(daemon: Daemon, subscriber: Subscriber) -> None:
    """Have a daemon hear the sentences, and a subscriber them."""
    subscriber.wait_for(is_ready, "ready")
    for sentence in SAID:
        daemon.is_told(sentence)
        subscriber.wait_for(lambda _, wanted=sentence: wanted in texts_on(subscriber, "transcript"), sentence)  # type: ignore[misc]


def told_by_the_kernel(pid: int) -> bytes:
    """Return what anybody on the machine, or root, can read of a process."""
    process = Path("/proc", str(pid))
    threads = [(task / "comm").read_bytes() for task in (process / "task").iterdir()]
    return b"".join([*((process / name).read_bytes() for name in ("cmdline", "environ", "status")), *threads])


def retained(broker: Mosquitto) -> list[tuple[str, str]]:
    """Return the topics and payloads that the broker keeps."""
    with Subscriber(broker.port) as late:
        late.wait_for(lambda found: found.on("status") and found.on("state") and found.on("config"), "what is kept")
        return [(message.topic, message.payload) for message in late.messages if message.retained]


@pytest.mark.parametrize(
    "written",
    [
        SAID[1][2 : 2 + PIECE].encode(),
        json.dumps({"text": SAID[0]}).encode(),
        SAID[2].encode("gbk"),
        b"x" + spoken(SAID[0]),
        bytes(44) + (np.frombuffer(spoken(SAID[1]), "<i2") * 0.3).astype("<i2").tobytes(),
        (np.frombuffer(spoken(SAID[2]), "<i2") / np.float32(32768)).tobytes(),
    ],
    ids=["piece", "JSON", "GBK", "PCM", "soft WAV", "floats"],
)
def test_what_is_written_is_found(tmp_path: Path, state_folder: Path, written: bytes) -> None:
    home = Home(tmp_path / "appliance", state_folder)
    (home.folder / "tmp" / "written").write_bytes(b"before" + written)
    assert list(home.found()) == ["tmp/written"]


def test_nothing_spoken_is_found_but_in_the_outbox_and_nothing_at_all_once_it_is_forgotten(
    home: Home, broker: Mosquitto, run: Run
) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = run()
        say(daemon, subscriber)
        assert home.found(), "the search finds nothing where there is something"
        assert home.found_elsewhere() == {}
        assert spoken_in(told_by_the_kernel(daemon.process.pid)) == []
        kept = retained(broker)
        assert {topic.rpartition("/")[2] for topic, _ in kept} == {"status", "state", "config"}
        assert [topic for topic, payload in kept if spoken_in(payload.encode())] == []

        assert home.forget().startswith(f"erased {len(SAID)} transcripts in {home.outbox}, 0 of which")
        assert home.found() == {}

        daemon.is_told(SAID[0])
        subscriber.wait_for(lambda _: len(subscriber.on("transcript")) == len(SAID) + 1, "one more")
        assert subscriber.on("transcript")[-1].json["seq"] == len(SAID) + 1
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")
    assert home.found_elsewhere() == {}
    assert home.forget().startswith("erased 1 transcripts")
    assert home.found() == {}


def test_what_the_outbox_no_longer_keeps_is_gone_from_the_disk(home: Home, broker: Mosquitto, run: Run) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = run("outbox.keep=0")
        say(daemon, subscriber)
        wait_for(lambda: home.recorded() == 0, "an empty outbox")
        assert daemon.stop() == 0
    assert home.found() == {}


@pytest.mark.slow
def test_what_waits_for_a_broker_is_forgotten_too_and_never_published(home: Home, broker: Mosquitto, run: Run) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = run()
        subscriber.wait_for(is_ready, "ready")
    broker.kill()
    for sentence in SAID:
        daemon.is_told(sentence)
    wait_for(lambda: home.recorded() == len(SAID), "what is recorded")

    assert f"{len(SAID)} of which no broker had acknowledged" in home.forget()

    assert home.found() == {}
    broker.start()
    with Subscriber(broker.port) as subscriber:
        subscriber.wait_for(is_ready, "ready")
        daemon.is_told(SAID[0])
        subscriber.wait_for(lambda _: subscriber.on("transcript"), "what is said afterwards")
        assert [message.json["seq"] for message in subscriber.on("transcript")] == [len(SAID) + 1]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGABRT])
def test_nothing_more_is_found_when_the_process_dies(
    home: Home, broker: Mosquitto, run: Run, how: signal.Signals
) -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        with Subscriber(broker.port) as subscriber:
            daemon = run()
            say(daemon, subscriber)
            assert resource.prlimit(daemon.process.pid, resource.RLIMIT_CORE)[0] == 0
            dumped = Path("/proc", str(daemon.process.pid), "coredump_filter").read_text(encoding="utf-8")
            assert int(dumped, 16) == 0
            assert daemon.stop(how) == -how
            subscriber.wait_for(is_offline, "the last will")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    assert home.found_elsewhere() == {}
    home.forget()
    assert home.found() == {}


def test_a_sandbox_that_forbids_setting_limits_does_not_hinder_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", forbid)
    monkeypatch.setattr(memory, "CORE_DUMP_FILTER", tmp_path / "nowhere" / "coredump_filter")
    memory.keep_out_of_core_dumps()


@pytest.mark.slow
def test_nothing_spoken_is_in_the_log_when_the_engine_fails(home: Home, broker: Mosquitto, run: Run) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = run(program=("-c", FAULTY_ENGINE))
        subscriber.wait_for(is_ready, "ready")
        log = home.folder / "daemon-0.log"
        for sentence in SAID:
            daemon.is_told(sentence)
        wait_for(lambda: "the engine is made to fail" in log.read_text(encoding="utf-8"), "the failure")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.end()
    assert home.found_elsewhere() == {}
    home.forget()
    assert home.found() == {}
