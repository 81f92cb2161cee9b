"""What systemd is told, over real datagram sockets."""

from __future__ import annotations

import asyncio
import math
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_asr.systemd import Notifier, Progress, extend_timeout, feed_watchdog


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
    notifier.extend(120)
    notifier.stopping()
    notifier.ready()
    notifier.status("ready")
    heard = [server.recv(4096).decode() for _ in range(6)]
    assert heard[:3] == ["STATUS=loading the model", "READY=1", "WATCHDOG=1"]
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", heard[3])
    assert heard[4] == "EXTEND_TIMEOUT_USEC=120000000"
    assert heard[5] == "STOPPING=1\nSTATUS=stopping"
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


async def test_systemd_waits_for_a_build_and_for_nothing_else(listening: tuple[socket.socket, str]) -> None:
    server, name = listening
    built: list[bool] = [False, True, True, False]
    enough = asyncio.Event()

    def building() -> bool:
        if not built:
            enough.set()
            return False
        return built.pop()

    extending = asyncio.create_task(extend_timeout(Notifier({"NOTIFY_SOCKET": name}), building, 0.001))
    await asyncio.wait_for(enough.wait(), 10)
    extending.cancel()
    server.setblocking(False)
    assert [server.recv(100), server.recv(100)] == [b"EXTEND_TIMEOUT_USEC=120000000"] * 2
    with pytest.raises(BlockingIOError):
        server.recv(100)


@dataclass(frozen=True)
class At:
    number: int
    may_last_s: float = 15.0


class Thread:
    """A thread and a clock, both moved by hand."""

    def __init__(self) -> None:
        self.step: At | None = None
        self.now = 0.0
        self.gets_on = Progress(lambda: self.step, lambda: self.now)

    def looked_at(self, seconds: float, times: int) -> list[bool]:
        """Look every `seconds`, at once for the first time."""
        found = []
        for _ in range(times):
            found.append(self.gets_on())
            self.now += seconds
        return found


def test_a_thread_that_waits_gets_on() -> None:
    assert all(Thread().looked_at(60, 10))


def test_a_thread_at_one_step_is_stuck_when_that_has_lasted_too_long_until_it_gets_on_after_all() -> None:
    thread = Thread()
    thread.step = At(1)
    assert thread.looked_at(5, 6) == [True, True, True, True, False, False]
    thread.step = At(2)
    assert thread.looked_at(5, 2) == [True, True]
    thread.step = None
    assert thread.gets_on()


def test_a_thread_at_one_short_step_after_another_gets_on() -> None:
    thread = Thread()
    for number in range(20):
        thread.step = At(number)
        assert all(thread.looked_at(5, 3))


def test_a_step_that_may_last_long_may() -> None:
    thread = Thread()
    thread.step = At(1, may_last_s=90)
    assert thread.looked_at(30, 5) == [True, True, True, True, False]


def test_a_step_that_went_on_after_a_time_without_limit_has_all_of_its_time() -> None:
    thread = Thread()
    thread.step = At(1)
    assert all(thread.looked_at(5, 3))
    thread.step = None
    assert all(thread.looked_at(60, 3))
    thread.step = At(1)
    assert all(thread.looked_at(5, 4))
