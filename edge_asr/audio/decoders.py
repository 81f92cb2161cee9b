"""A pool of child processes that decode audio of unknown origin: what libav does to them, it does to nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np

from edge_asr.audio.decoder import END, FAILED, FRAME, HEADER, SOUND, TOO_LONG
from edge_asr.errors import AudioError, DecoderDiedError, TooLongAudioError
from edge_asr.types import Samples

UPLOAD = "the upload"
IDLE_S = 300.0
"""Children that nobody has needed for so long are ended: they take memory."""
CONVERT = "convert it to WAV, FLAC, MP3 or Ogg"

Upload = bytes | bytearray | memoryview


class Decoders:
    """Decodes uploads in a few children, which start with the first of them. For the thread of one event loop."""

    def __init__(
        self,
        *,
        max_audio_s: float,
        processes: int = 2,
        memory_mb: int = 512,
        cpu_s: float = 30.0,
        timeout_s: float = 60.0,
    ) -> None:
        """For one upload: seconds of sound, MB of memory beyond the child's own, seconds of CPU, and seconds in all."""
        self._max_audio_s = max_audio_s
        self._limits = str(memory_mb), str(cpu_s)
        self._timeout_s = timeout_s
        self._free: list[_Child] = []
        self._places = asyncio.Semaphore(processes)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decode upload")
        self._idle: asyncio.TimerHandle | None = None

    async def decode(self, data: Upload, *, name: str = UPLOAD) -> Samples:
        """Return the sound of an upload, `[n]` float32, 16 kHz, mono. Waits for a child that is free.

        Raises AudioError where it is no audio, TooLongAudioError, and DecoderDiedError where it took too much.
        """
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        if self._idle is not None:
            self._idle.cancel()
        child = self._free.pop() if self._free else _Child(self._limits)
        work = loop.run_in_executor(self._threads, child.decode, data, name, self._max_audio_s)
        work.add_done_callback(lambda done: self._take_back(child, done))
        patience = loop.call_later(self._timeout_s, child.kill)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            child.kill()
            raise
        finally:
            patience.cancel()

    async def close(self) -> None:
        """End the children."""
        self._end_free()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _take_back(self, child: _Child, done: asyncio.Future[Samples]) -> None:
        if not done.cancelled():
            done.exception()  # who asked has gone where nobody else looks at it
        if child.dead:
            child.kill()
        else:
            self._free.append(child)
        self._places.release()
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._end_free)

    def _end_free(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        while self._free:
            self._free.pop().kill()


class _Child:
    """One child process; `decode` blocks, and `kill` ends it from any thread."""

    def __init__(self, limits: tuple[str, str]) -> None:
        self.dead = False
        """It answers no more."""
        code = f"import sys; sys.path[:] = {sys.path!a}; from edge_asr.audio.decoder import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *limits],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def decode(self, data: Upload, name: str, longest_s: float) -> Samples:
        """Have it decode an upload. Raises AudioError."""
        jobs, answers = self._process.stdin, self._process.stdout
        assert jobs is not None
        assert answers is not None
        label = name.encode()
        try:
            jobs.write(HEADER.pack(len(data), longest_s, len(label)) + label)
            jobs.write(data)
            jobs.flush()
            return _read(answers, name, longest_s)
        except (OSError, EOFError, ValueError) as error:  # it has died, or was killed
            self.dead = True
            raise DecoderDiedError(f"{name}: took too much time or memory to decode; {CONVERT}") from error

    def kill(self) -> None:
        """End it."""
        self.dead = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it has not read
                    pipe.close()


def _read(answers: IO[bytes], name: str, longest_s: float) -> Samples:
    sound: list[Samples] = [np.zeros(0, np.float32)]
    while True:
        kind, size = FRAME.unpack(_exactly(answers, FRAME.size))
        body = _exactly(answers, size)
        if kind == SOUND:
            sound.append(np.frombuffer(body, np.float32))
        elif kind == END:
            return np.concatenate(sound)
        elif kind == TOO_LONG:
            raise TooLongAudioError(f"{name}: is longer than {longest_s:g} s; cut it, or raise http.limits.audio_s")
        elif kind == FAILED:
            raise AudioError(body.decode(errors="replace"))
        else:
            raise EOFError("the answer makes no sense")


def _exactly(answers: IO[bytes], size: int) -> bytes:
    data = answers.read(size)
    if len(data) < size:
        raise EOFError("the answer is cut off")
    return data
