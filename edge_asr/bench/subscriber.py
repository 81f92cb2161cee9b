"""Takes what the daemon publishes, in a process of its own: here it would take time from what is measured."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from edge_asr.broker import HOST
from edge_asr.errors import EdgeAsrError

START_S = 30.0
"""How long it may take until it has subscribed."""
ARRIVAL_S = 10.0
"""How long the last message may take after the daemon has published it."""


class Subscriber:
    """Messages of one topic, in the order of their arrival; known once `collect` has returned."""

    def __init__(self, process: SpawnProcess, told: Connection, messages: Path) -> None:
        self._process = process
        self._told = told
        self._messages = messages

    async def collect(self) -> list[dict[str, Any]]:
        """Return all that the broker had when this was called. Raises EdgeAsrError where it takes too long."""
        self._told.send("end")
        await asyncio.to_thread(self._process.join, ARRIVAL_S)
        if self._process.exitcode != 0:
            raise EdgeAsrError("the subscriber of the bench has not come to its end; is the broker overloaded?")
        return [json.loads(line) for line in self._messages.read_text(encoding="utf-8").splitlines()]


@asynccontextmanager
async def subscribed(port: int, topic: str, messages: Path) -> AsyncIterator[Subscriber]:
    """Start a subscriber that writes to the file `messages`, and end it with the block. Raises EdgeAsrError."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_subscribe, args=(port, topic, messages, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not await asyncio.to_thread(_has_subscribed, ours):
            raise EdgeAsrError(f"the subscriber of the bench cannot reach the broker on port {port}")
        yield Subscriber(process, ours, messages)
    finally:
        process.kill()
        process.join()
        ours.close()


def _has_subscribed(told: Connection) -> bool:
    try:
        return told.poll(START_S) and bool(told.recv())
    except EOFError:
        return False


def _subscribe(port: int, topic: str, messages: Path, told: Connection) -> None:
    """Write a message a line, until told to end and nothing more is on its way, or until nobody is there to tell.

    What the broker has before a message of our own arrives before it.
    """
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever has started us
    last = f"{topic}/last"
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    with messages.open("wb") as out:

        def subscribe(*_: object) -> None:
            client.subscribe([(topic, 1), (last, 1)])

        def receive(_client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
            if message.topic == last:
                client.disconnect()
            else:
                out.write(message.payload + b"\n")

        def end() -> None:
            try:
                told.recv()
            except EOFError:
                os._exit(1)
            client.publish(last, qos=1)

        client.on_message = receive
        client.on_connect = subscribe
        client.on_subscribe = lambda *_: told.send(True)
        client.connect(HOST, port)
        threading.Thread(target=end, name="end", daemon=True).start()
        client.loop_forever()
