"""A broker of our own: the real Mosquitto, and what serves where there is none."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mosquitto import PATIENCE_S

from edge_asr import broker
from edge_asr.broker import AMQTT, HOST, MOSQUITTO, serving
from edge_asr.errors import ConfigError, EdgeAsrError


def accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


async def test_mosquitto_serves_until_the_end_of_the_block(mosquitto_installed: None) -> None:
    async with serving() as served:
        assert served.program == MOSQUITTO
        assert accepts(served.port)
    assert not accepts(served.port)


async def test_mosquitto_ends_with_whoever_is_cancelled(mosquitto_installed: None) -> None:
    ports: asyncio.Queue[int] = asyncio.Queue()

    async def serve() -> None:
        async with serving() as served:
            await ports.put(served.port)
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    port = await ports.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not accepts(port)


async def test_a_mosquitto_that_does_not_start_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "_find_mosquitto", lambda: "/bin/false")
    with pytest.raises(EdgeAsrError, match="mosquitto ended with 1 when it was started"):
        await serving().__aenter__()


WITHOUT_MOSQUITTO = """
import asyncio
from edge_asr import broker

async def show():
    async with broker.serving() as served:
        _, writer = await asyncio.open_connection(broker.HOST, served.port)
        writer.close()
        print(served.program)

broker._find_mosquitto = lambda: None
asyncio.run(show())
"""


def test_without_mosquitto_amqtt_serves() -> None:
    pytest.importorskip("amqtt", reason="scripts/setup demo")
    # In a process of its own: amqtt leaves connections to the garbage collector.
    command = [sys.executable, "-c", WITHOUT_MOSQUITTO]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{AMQTT}\n", "")


async def test_with_neither_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "_find_mosquitto", lambda: None)
    monkeypatch.setitem(sys.modules, "amqtt.broker", None)
    with pytest.raises(ConfigError, match="install mosquitto, or pip install"):
        await serving().__aenter__()


def test_mosquitto_is_found_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / MOSQUITTO
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert broker._find_mosquitto() == str(program)
