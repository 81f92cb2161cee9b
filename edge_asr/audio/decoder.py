"""The child that decodes audio of unknown origin: libav reads it here, with little memory and nothing to write to.

A job on standard input is `HEADER` with the bytes that follow, and how much sound may come of them; the answer on
standard output is frames of `FRAME`: blocks of float32 samples, then the end, or why there is none.
"""

from __future__ import annotations

import io
import os
import resource
import struct
import sys
from collections.abc import Callable
from typing import BinaryIO

from edge_asr.audio.decode import decode
from edge_asr.errors import AudioError
from edge_asr.types import SAMPLE_RATE

HEADER = struct.Struct("<QdI")
"""Bytes of the upload, seconds of sound at most, bytes of its name."""
FRAME = struct.Struct("<cI")
"""What it is, and its bytes."""
SOUND, END, FAILED, TOO_LONG = b"s", b"e", b"f", b"l"
FILES = 32
"""Files that it may have open."""


def main() -> None:
    """Decode one job after another until standard input ends. Arguments: MB of memory, seconds of CPU for a job."""
    memory_mb, cpu_s = int(sys.argv[1]), float(sys.argv[2])
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    _answer(io.BytesIO(), "", 0.0, lambda kind, body: None)  # loads what decoding loads, before memory is limited
    _confine(memory_mb)
    while head := jobs.read(HEADER.size):
        size, longest_s, name_size = HEADER.unpack(head)
        name = jobs.read(name_size).decode()
        data = jobs.read(size)
        _allow(cpu_s)
        _answer(io.BytesIO(data), name, longest_s, lambda kind, body: _send(answers, kind, body))
        del data
        answers.flush()


def _answer(file: BinaryIO, name: str, longest_s: float, send: Callable[[bytes, bytes | memoryview], None]) -> None:
    left = round(longest_s * SAMPLE_RATE)
    try:
        for block in decode(file, name):
            left -= len(block)
            if left < 0:
                send(TOO_LONG, b"")
                return
            send(SOUND, block.data.cast("B"))
    except AudioError as error:
        send(FAILED, str(error).encode())
    except MemoryError:
        send(FAILED, f"{name}: takes too much memory to decode; convert it to WAV, FLAC, MP3 or Ogg".encode())
    else:
        send(END, b"")


def _send(answers: BinaryIO, kind: bytes, body: bytes | memoryview) -> None:
    answers.write(FRAME.pack(kind, len(body)))
    answers.write(body)


def _confine(memory_mb: int) -> None:
    """Take what hostile input could use from this process: memory, files, and whatever a core dump would tell."""
    used = _address_space()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_mb * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    os.nice(5)


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - nothing more is to be imported
        return int(file.read().split()[0]) * resource.getpagesize()


def _allow(cpu_s: float) -> None:
    """Let the next job take so much of the processor's time; beyond that the kernel ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = round(used.ru_utime + used.ru_stime + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
