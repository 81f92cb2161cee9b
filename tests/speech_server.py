"""The daemon with its speech server in this process, on a thread of its own, and how to reach it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bundled import BUNDLE
from mosquitto import wait_for

from edge_asr.app import Daemon
from edge_asr.config import Config
from edge_asr.serve.server import SpeechServer
from edge_asr.service import SpeechService


@dataclass(frozen=True)
class Serving:
    """A daemon that serves."""

    daemon: Daemon
    loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int:
        return self.daemon.ports["http"]

    @property
    def funasr_port(self) -> int:
        return self.daemon.ports["funasr"]

    @property
    def wyoming_port(self) -> int:
        return self.daemon.ports["wyoming"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def server(self) -> SpeechServer:
        assert self.daemon._server is not None
        return self.daemon._server

    @property
    def service(self) -> SpeechService:
        """For the server's thread, but its counts."""
        return self.server._service


@contextmanager
def serving(
    *, taken: frozenset[str] = frozenset(), reread: Callable[[], Config] | None = None, **sections: Any
) -> Iterator[Serving]:
    """Serve with the bundled model on free ports until the block ends: `serving(http={"limits": {"body_mb": 1}})`.

    Without a broker and sources, unless the sections say otherwise. `taken`: sections whose ports cannot be opened yet;
    `reread`: see Daemon.
    """
    defaults: dict[str, Any] = {
        "device_id": "hall",
        "model": BUNDLE,
        "engine": {"threads": 1},
        "mqtt": {"enabled": False},
        "outbox": {"enabled": False},  # the folder is that of all tests
        "drain_s": 2,
    }
    for section in ("http", "wyoming", "funasr"):
        sections[section] = {"enabled": True, "port": 0, **sections.get(section, {})}
    config = Config.model_validate({**defaults, **sections})
    started: list[Serving] = []
    failures: list[BaseException] = []
    ready = threading.Event()

    async def run() -> None:
        async with (daemon := Daemon(config, reread)).running():
            wanted = {name for name in PORTS if sections[name]["enabled"]} - taken
            while not daemon.ports.keys() >= wanted:
                await asyncio.sleep(0.005)
            started.append(Serving(daemon, asyncio.get_running_loop()))
            ready.set()
            await daemon._stop.wait()

    def work() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:  # noqa: BLE001 - told on the thread of the test
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work, name="daemon")
    thread.start()
    wait_for(ready.is_set, "the server")
    if failures:
        thread.join()
        raise failures[0]
    try:
        yield started[0]
    finally:
        with contextlib.suppress(RuntimeError):  # the test has stopped it
            started[0].loop.call_soon_threadsafe(started[0].daemon.stop)
        thread.join()
    if failures:
        raise failures[0]


PORTS = {"http", "wyoming", "funasr"}
