"""What systemd is told, over real datagram sockets."""

from __future__ import annotations

import asyncio
import math
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from edge_asr.systemd import Answering, Notifier, feed_watchdog


@pytest.fixture(params=["path", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@edge-asr-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind("\0" + name[1:] if name.startswith("@") else name)
        server.settimeout(10)
        yield server, name


def test_systemd_hears_each_notification(listening: tuple[socket.socket, str]) -> None:
    server, name = listening
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.status("loading\nthe model")
    notifier.status("loading the model")
    notifier.ready()
    notifier.alive()
    notifier.reloading()
    notifier.stopping()
    notifier.ready()
    notifier.status("ready")
    heard = [server.recv(4096).decode() for _ in range(5)]
    assert heard[:3] == ["STATUS=loading the model", "READY=1", "WATCHDOG=1"]
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", heard[3])
    assert heard[4] == "STOPPING=1\nSTATUS=stopping"
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(4096)


@pytest.mark.parametrize("name", ["", "/nowhere/notify", "@nobody-listens-here", "x" * 300, "a\0b"])
def test_nobody_to_tell_is_no_trouble(name: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready()
    notifier.status("ready")
    assert notifier.watchdog_s == math.inf


def test_a_socket_that_nobody_reads_does_not_block(listening: tuple[socket.socket, str]) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": listening[1]})
    for _ in range(2000):
        notifier.alive()


@pytest.mark.parametrize(
    ("pid", "seconds"), [("", 15.0), (str(os.getpid()), 15.0), ("1", math.inf)], ids=["no pid", "ours", "another's"]
)
def test_signs_of_life_come_at_half_of_the_time(pid: str, seconds: float) -> None:
    assert Notifier({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": pid}).watchdog_s == seconds


@pytest.mark.parametrize("wanted", ["0", "soon", "-5"])
def test_a_senseless_time_means_no_watchdog(wanted: str) -> None:
    assert Notifier({"WATCHDOG_USEC": wanted}).watchdog_s == math.inf


async def test_the_watchdog_is_fed_only_while_alive(listening: tuple[socket.socket, str]) -> None:
    server, name = listening
    asked: list[bool] = [True, False, False, True]
    enough = asyncio.Event()

    def alive() -> bool:
        if not asked:
            enough.set()
            return False
        return asked.pop()

    feeding = asyncio.create_task(feed_watchdog(Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "2000"}), alive))
    await asyncio.wait_for(enough.wait(), 10)
    feeding.cancel()
    server.setblocking(False)
    assert [server.recv(100), server.recv(100)] == [b"WATCHDOG=1"] * 2
    with pytest.raises(BlockingIOError):
        server.recv(100)


class Thread:
    """An inference thread and a clock, both moved by hand."""

    def __init__(self) -> None:
        self.idle, self.now = True, 0.0
        self.questions: list[Future[None]] = []

    def ask(self) -> Future[None]:
        self.questions.append(Future())
        return self.questions[-1]

    def after(self, seconds: float) -> float:
        self.now += seconds
        return self.now


def answering(thread: Thread) -> Answering:
    return Answering(lambda: thread.idle, thread.ask, 15.0, lambda: thread.now)


def test_an_idle_thread_is_alive_and_is_asked_nothing() -> None:
    thread = Thread()
    alive = answering(thread)
    assert all(alive() for _ in range(10) if thread.after(60))
    assert not thread.questions


def test_a_stuck_thread_is_not_alive_after_15_s() -> None:
    thread = Thread()
    alive = answering(thread)
    thread.idle = False
    assert [alive() for _ in range(5) if thread.after(5)] == [True, True, True, False, False]
    assert len(thread.questions) == 1


def test_a_busy_thread_that_answers_is_alive() -> None:
    thread = Thread()
    alive = answering(thread)
    thread.idle = False
    for _ in range(20):
        thread.after(5)
        assert alive()
        if thread.questions:
            thread.questions.pop().set_result(None)
