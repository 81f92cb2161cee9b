"""The demonstration: a broker, the daemon on the bundled samples, and a subscriber that prints what arrives."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edge_asr import logs
from edge_asr.app import STOP_SIGNALS, Daemon
from edge_asr.audio.decode import decode
from edge_asr.broker import HOST, serving
from edge_asr.config import BUNDLED_MODEL, Config, FileSourceConfig
from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import ConfigError
from edge_asr.fresh_state import fresh_state
from edge_asr.types import SAMPLE_RATE, Samples

GAP_S = 1.0
"""Silence between two samples."""
ARRIVAL_S = 10.0
"""How long the last message may take after the daemon has published it."""

GO_ON = """
How to go on
  your own broker    {program} run --source FILE.wav -o mqtt.host=BROKER
  raw audio          arecord -t raw -f S16_LE -r 16000 -c 1 | {program} run --source stdin
  a real model       {program} models pull paraformer-small      (82 MB; or transcribe --model DIR)
  everything else    config.yaml, each key with a comment; README.md
The bundled model knows some 60 command words and numbers, learnt from synthetic speech: real use wants a real model."""


def run_demo(config: Config, keep: bool) -> int:
    """Run the demonstration; return 0 if the text of every sample arrived, else 1.

    Where the configuration names no model it plays the bundled one, whatever was pulled: that has samples to play.
    """
    if "model" not in config.model_fields_set:
        config = config.model_copy(update={"model": BUNDLED_MODEL})
    logs.set_up(config.log.model_copy(update={"level": "WARNING"}))
    return asyncio.run(_until_stopped(config, keep))


async def _until_stopped(config: Config, keep: bool) -> int:
    """Run; SIGINT and SIGTERM stop everything in order, which is how `--keep` is meant to end."""
    showing = asyncio.create_task(_run(config, keep), name="demo")
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, showing.cancel)
    try:
        return await showing
    except asyncio.CancelledError:
        return 0 if keep else 1


async def _run(config: Config, keep: bool) -> int:
    samples = _read_samples(config.model / "samples")
    with tempfile.TemporaryDirectory(prefix="edge_asr-demo-") as folder, fresh_state(config) as fresh:
        tape = Path(folder) / "samples.wav"
        _write_tape(tape, [audio for _, audio in samples])
        async with serving() as broker:
            played = fresh.model_copy(
                update={
                    "sources": (FileSourceConfig(path=tape, name="samples"),),
                    "mqtt": MqttConfig(host=HOST, port=broker.port, protocol=broker.protocol, base=config.mqtt.base),
                }
            )
            showing = asyncio.current_task()
            assert showing is not None
            topic = f"{config.mqtt.base}/{config.device_id}/transcript"
            subscriber = Subscriber(broker.port, topic, on_broken_pipe=showing.cancel)
            try:
                print(f"broker     mqtt://{HOST}:{broker.port}")
                print(f"subscriber {subscriber.topic}")
                print(f"microphone {len(samples)} sample recordings of {config.model.name}, at the pace of speech\n")
                sys.stdout.flush()  # the first sentence takes a while
                missing = await _play(played, subscriber, [text for text, _ in samples])
                # In an image or a service the shell finds it; after scripts/run it does not.
                program = "edge-asr" if shutil.which("edge-asr") else ".venv/bin/edge-asr"
                print(GO_ON.format(program=program), flush=True)
                while keep:
                    print("\nagain, until Ctrl-C; watch from elsewhere:", end=" ")
                    print(f"mosquitto_sub -h {HOST} -p {broker.port} -v -t '#'\n", flush=True)
                    await _play(played, subscriber, [text for text, _ in samples])
            finally:
                subscriber.close()
    return 1 if missing else 0


async def _play(config: Config, subscriber: Subscriber, expected: list[str]) -> list[str]:
    """Run the daemon over the tape; return the texts that did not arrive, and say so."""
    before = len(subscriber.texts)
    daemon = Daemon(config)
    async with daemon.running():
        await daemon.finished()
        await subscriber.wait_for(before + len(expected))
    arrived = subscriber.texts[before:]
    missing = [text for text in expected if text not in arrived]
    print(f"\n{len(expected) - len(missing)} of {len(expected)} sentences arrived as they were spoken")
    for text in missing:
        print(f"missing: {text}")
    return missing


class Subscriber:
    """Prints every transcript of one appliance; a client of its own, as any machine on the network would be."""

    def __init__(self, port: int, topic: str, on_broken_pipe: Callable[[], object]) -> None:
        """`on_broken_pipe` is called when nothing can be printed any more, as when its reader went away."""
        self.topic = topic
        self.texts: list[str] = []
        self._on_broken_pipe = on_broken_pipe
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.on_connect = lambda client, *_: client.subscribe(self.topic, qos=1)
        self._client.on_message = self._receive
        self._client.connect_async(HOST, port)
        self._client.loop_start()

    async def wait_for(self, count: int) -> None:
        """Return when `count` transcripts have arrived in all, or when they take too long."""
        try:
            await asyncio.wait_for(self._until(count), ARRIVAL_S)
        except asyncio.TimeoutError:
            return  # the caller counts

    async def _until(self, count: int) -> None:
        while len(self.texts) < count:
            self._arrived.clear()
            await self._arrived.wait()

    def close(self) -> None:
        """Leave the broker."""
        self._client.disconnect()
        self._client.loop_stop()

    def _receive(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        self._loop.call_soon_threadsafe(self._show, json.loads(message.payload))

    def _show(self, transcript: dict[str, Any]) -> None:
        latency = transcript["latency_ms"]
        after = "speech goes on" if "total" not in latency else f"{latency['total']:4.0f} ms after the last word"
        pause = f"pause {latency['endpoint']:.0f}, " if "endpoint" in latency else ""
        try:
            print(
                f"  {transcript['text']:　<16} confidence {transcript['confidence']:.2f}   "
                f"{after} ({pause}answer {latency['response']:.0f})",
                flush=True,
            )
        except OSError:
            self._on_broken_pipe()
        self.texts.append(transcript["text"])
        self._arrived.set()


def _read_samples(folder: Path) -> list[tuple[str, Samples]]:
    """Return text and audio of each line of `transcripts.tsv`."""
    table = folder / "transcripts.tsv"
    if not table.is_file():
        remedy = "leave `model` unset" if BUNDLED_MODEL.is_dir() else "run scripts/run in a checkout of the repository"
        raise ConfigError(f"{table}: no such file; the demo plays the bundled model's samples, {remedy}")
    lines = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    return [(text, np.concatenate(list(decode(folder / name)))) for name, text in lines]


def _write_tape(path: Path, samples: list[Samples]) -> None:
    """Write the samples to one file with silence between them, as one person speaking now and then."""
    gap = np.zeros(int(GAP_S * SAMPLE_RATE), np.float32)
    tape = np.concatenate([piece for audio in samples for piece in (audio, gap)])
    with wave.open(os.fspath(path), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes((np.clip(tape, -1, 1) * 32767).astype("<i2").tobytes())
