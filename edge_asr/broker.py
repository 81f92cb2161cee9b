"""A broker of our own on a free loopback port: Mosquitto as a child process, else amqtt in the event loop."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge_asr.errors import ConfigError, EdgeAsrError

HOST = "127.0.0.1"
MOSQUITTO, AMQTT = "mosquitto", "amqtt"
START_S = 10.0
"""How long Mosquitto may take until it accepts connections."""
SHUTDOWN_S = 5.0
"""How long a broker may take to end."""


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker at work, for everybody on this machine."""

    program: str
    """`mosquitto` or `amqtt`; the latter takes time from whatever runs in the same process."""
    port: int

    @property
    def protocol(self) -> Literal["auto", "3.1.1"]:
        """What `mqtt.protocol` should be: amqtt knows no MQTT 5, and does not answer one with properties."""
        return "3.1.1" if self.program == AMQTT else "auto"


@asynccontextmanager
async def serving() -> AsyncIterator[Broker]:
    """Run a broker until the end of the block. Raises ConfigError where none is installed."""
    mosquitto, port = _find_mosquitto(), _free_port()
    if mosquitto is None:
        async with _amqtt(port):
            yield Broker(AMQTT, port)
        return
    with _mosquitto(mosquitto, port) as process:
        await _accepts(process, port)
        yield Broker(MOSQUITTO, port)


def _find_mosquitto() -> str | None:
    """Return the path of Mosquitto, also from the directories that keep daemons and are in few people's PATH."""
    return shutil.which(MOSQUITTO) or shutil.which(MOSQUITTO, path="/usr/sbin:/usr/local/sbin")


@contextmanager
def _mosquitto(program: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryDirectory(prefix="edge_asr-broker-") as folder:
        config = Path(folder) / "mosquitto.conf"
        lines = (f"listener {port} {HOST}", "allow_anonymous true", "persistence false", "log_type error")
        config.write_text("\n".join(lines) + "\n", encoding="ascii")
        process = subprocess.Popen(
            [program, "-c", str(config)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us: what is under way still needs its broker
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(SHUTDOWN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _accepts(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when connections are accepted. Raises EdgeAsrError where that does not come."""
    give_up_at = time.monotonic() + START_S
    while True:
        if process.poll() is not None:
            raise EdgeAsrError(f"mosquitto ended with {process.returncode} when it was started; try: mosquitto -v")
        try:
            _, writer = await asyncio.open_connection(HOST, port)
        except OSError:
            if time.monotonic() > give_up_at:
                raise EdgeAsrError(f"mosquitto accepts no connection on port {port}; try: mosquitto -v") from None
            await asyncio.sleep(0.02)
        else:
            writer.close()
            await writer.wait_closed()
            return


@asynccontextmanager
async def _amqtt(port: int) -> AsyncIterator[None]:
    try:
        from amqtt.broker import Broker as InLoop
    except ImportError as error:
        raise ConfigError(
            "this needs a broker: install mosquitto, or pip install 'edge-asr[demo]' (scripts/setup does)"
        ) from error
    for name in ("amqtt", "transitions"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    asyncio.get_running_loop().set_exception_handler(_complain)
    broker = InLoop(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{HOST}:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    try:
        yield
    finally:
        # It waits for clients that are just connecting, for as long as they like.
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(broker.shutdown(), SHUTDOWN_S)


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what goes wrong in callbacks; a connection of the broker that is cancelled does not (Python < 3.12)."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
