"""The process that records: PortAudio loaded, its devices listed, one of them opened and read.

It is a process of its own because a driver or sound server that hangs takes whoever calls it along (closing a stream of
a PulseAudio that has stopped blocks), because PortAudio sees a replugged device only when it starts anew, which would
close the streams of every other microphone, and because recording then never waits for Python's lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from edge_asr.audio.devices import InputDevice, choose, describe, read_cards
from edge_asr.audio.messages import Buffer, Report, pack_header, pack_report
from edge_asr.audio.ring import BlockRing
from edge_asr.errors import AudioError

WANTED_RATE = 16_000
BLOCK_S = 0.032
"""What PortAudio hands over at a time: a chunk, where the device takes our rate."""
RING_S = 4.0
"""Sound kept for a listener that is held up; beyond it the oldest is dropped and counted."""
FIRST_LOOK_S, LAST_LOOK_S = 0.25, 1.5
"""An absent device is looked for again after at most so long, and at least half of it; doubled from time to time."""
LOOKS = 100
"""So often one process looks, for each time PortAudio keeps 12 KB. Then it ends, and its listener starts another."""
STEADY_S = 10.0
"""After so long of recording a lost device is looked for at once."""
OLDEST_S = 2.0
"""An ADC time further back than this, or less than a block back, is not believed."""
MIXED_CHANNELS = 8
"""A device with more channels than this is a sound server, which mixes them down itself, and better."""
ANSWER_S = 30.0
"""How long listing the devices may take."""
BYTES_PER_SAMPLE = 2
NO_SOUNDDEVICE = "sounddevice is not installed; pip install 'edge-asr[microphone]'"
NO_PORTAUDIO = "the PortAudio library is not installed; sudo apt install libportaudio2"

_INVALID_RATE = -9997


def command(function: str, **arguments: object) -> list[str]:
    """Return the command line of a process that calls `function` of this module."""
    # `-m` would import from the working directory first. With our own sys.path the child imports what we would.
    call = f"{function}({', '.join(f'{name}={value!a}' for name, value in arguments.items())})"
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!a}; from {__name__} import {function}; {call}"]


def input_devices(timeout_s: float = ANSWER_S) -> list[InputDevice]:
    """Return the devices there are, found by a process of its own. Raises AudioError."""
    try:
        answer = subprocess.run(
            command("tell_devices"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=timeout_s, check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise AudioError(f"no devices listed in {timeout_s:g} s: the sound server hangs; restart it") from error
    except subprocess.CalledProcessError as error:
        raise AudioError(f"PortAudio ended with {error.returncode} while it listed devices") from error
    told = json.loads(answer.stdout)
    if "error" in told:
        raise AudioError(told["error"])
    return [InputDevice(**{**fields, "paths": tuple(fields["paths"])}) for fields in told["devices"]]


def tell_devices() -> None:
    """Write the devices there are to standard output, as JSON. For a child."""
    output = _private_output()
    told: dict[str, object]
    try:
        told = {"devices": [asdict(device) for device in find_devices(_load())]}
    except AudioError as error:
        told = {"error": str(error)}
    os.write(output, json.dumps(told).encode())


def record(device: str, channel: int | None, rate: int | None, looks: int = LOOKS) -> None:
    """Write reports and sound to standard output, until standard input ends or it has looked `looks` times in vain.

    For a child.
    """
    output = _private_output()
    # Whoever ends the listener's whole group must not end us first: that would look like a lost device.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_listener, name="listener", daemon=True).start()
    try:
        _look_and_record(_load(), output, device, channel, rate, looks)
    except AudioError as error:
        _write(output, pack_report(Report("failed", str(error))))
    except Exception as error:  # noqa: BLE001 - whatever ends this process must be told: nobody sees its traceback
        _write(output, pack_report(Report("waiting", f"microphone {device}: {type(error).__name__}: {error}")))


def _look_and_record(library: Any, output: int, device: str, channel: int | None, rate: int | None, looks: int) -> None:
    wait_s = FIRST_LOOK_S
    for _ in range(looks):
        started_at = time.monotonic()
        why = _record_once(library, output, device, channel, rate)
        _write(output, pack_report(Report("waiting", why)))
        if time.monotonic() - started_at > STEADY_S:
            wait_s = FIRST_LOOK_S
        time.sleep(wait_s * random.uniform(0.5, 1))
        wait_s = min(2 * wait_s, LAST_LOOK_S)
        library._terminate()  # its list of devices is as old as its start
        library._initialize()


def find_devices(library: Any) -> list[InputDevice]:
    """Return PortAudio's input devices. `library` is the module sounddevice."""
    cards, apis = read_cards(), library.query_hostapis()
    default = apis[library.default.hostapi]["default_input_device"] if apis else -1
    return [
        describe(
            found["index"], found["name"], apis[found["hostapi"]]["name"], found["max_input_channels"],
            round(found["default_samplerate"]), found["index"] == default, cards,
        )
        for found in library.query_devices()
        if found["max_input_channels"] > 0
    ]  # fmt: skip


def channels_to_open(available: int, channel: int | None) -> int:
    """Return how many channels to ask a device for: up to the one that is wanted, or all that are to be averaged."""
    if channel is not None:
        if channel >= available:
            raise AudioError(f"channel {channel} of a device with {available}; the first is 0")
        return channel + 1
    return available if available <= MIXED_CHANNELS else 1


def _load() -> Any:
    try:
        import sounddevice
    except ModuleNotFoundError as error:
        raise AudioError(NO_SOUNDDEVICE) from error
    except OSError as error:
        raise AudioError(f"{NO_PORTAUDIO} ({error})") from error
    return sounddevice


def _record_once(library: Any, output: int, wanted: str, channel: int | None, rate: int | None) -> str:
    """Record for as long as the device lasts; return why there is no more."""
    try:
        device = choose(find_devices(library), wanted)
        channels = channels_to_open(device.channels, channel)
        with _opened(library, device, channels, rate) as (stream, ring):
            told = Report("open", rate=round(stream.samplerate), channels=channels, device=device.name)
            _write(output, pack_report(told))
            _pump(ring, output, round(stream.samplerate * BLOCK_S) * channels * BYTES_PER_SAMPLE)
    except AudioError as error:
        return str(error)
    except library.PortAudioError as error:
        return f"microphone {wanted}: it cannot be opened ({error}); see whether another program holds it"
    return f"microphone {wanted}: the device went away"


@contextlib.contextmanager
def _opened(library: Any, device: InputDevice, channels: int, rate: int | None) -> Iterator[tuple[Any, BlockRing]]:
    """Open a stream at the rate that was asked for, else at ours, else at the device's own."""
    rates = [rate] if rate else list(dict.fromkeys((WANTED_RATE, device.rate)))
    for candidate in rates:
        frames = round(candidate * BLOCK_S)
        ring = BlockRing(round(RING_S / BLOCK_S), frames * channels * BYTES_PER_SAMPLE)
        try:
            stream = library.RawInputStream(
                samplerate=candidate, blocksize=frames, device=device.index, channels=channels, dtype="int16",
                callback=_filler(ring), finished_callback=ring.close, dither_off=True,
            )  # fmt: skip
        except library.PortAudioError as error:
            if candidate == rates[-1] or _INVALID_RATE not in error.args:
                raise
            continue
        with stream:
            yield stream, ring
        return


def _filler(ring: BlockRing) -> Callable[[Buffer, int, Any, Any], None]:
    """Return what PortAudio's thread calls: it copies the block, and no more."""

    def fill(block: Buffer, frames: int, times: Any, status: Any) -> None:
        age = times.currentTime - times.inputBufferAdcTime  # both of a clock of PortAudio's own, often the wall clock
        believable = BLOCK_S * 0.9 <= age <= OLDEST_S
        ring.put(block, time.monotonic() - (age if believable else BLOCK_S), bool(status.input_overflow))

    return fill


def _pump(ring: BlockRing, output: int, block_bytes: int) -> None:
    """Pass on what the ring gets until it is closed and empty."""
    block = bytearray(block_bytes)
    view = memoryview(block)
    while True:
        slot = ring.take(block, timeout=1.0)
        if slot is not None:
            header = pack_header(slot.size, slot.captured_at, slot.overflowed, slot.dropped)
            _write(output, header, view[: slot.size])
        elif ring.closed:
            return


def _private_output() -> int:
    """Return a copy of standard output that nothing which prints can reach."""
    output = os.dup(1)
    os.dup2(2, 1)
    return output


def _write(output: int, *parts: Buffer) -> None:
    """Write all of it, waking the reader once if it can; end the process where nobody reads any more."""
    left = [memoryview(part) for part in parts]
    try:
        while left:
            written = os.writev(output, left)
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if left:
                left[0] = left[0][written:]
    except BrokenPipeError:
        os._exit(0)


def _end_with_listener() -> None:
    """End the process when the one that started it is gone, or wants it."""
    while os.read(0, 1):
        pass
    os._exit(0)  # a proper end would close the stream, which may hang
