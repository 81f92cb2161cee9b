"""The listener's end of the process that records: started, read without a thread, and killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Sequence

from edge_asr.audio.messages import MessageReader, Report, Sound

READ_BYTES = 65_536
REAP_S = 0.5
"""How long a killed child is waited for: one that hangs inside a driver cannot be killed."""


class Recorder:
    """One child that records. Its messages, and None once when it has ended, go to `receive`, on the event loop."""

    def __init__(self, command: Sequence[str], receive: Callable[[Sound | Report | None], None]) -> None:
        """Start the child; to be called on the event loop. Raises OSError."""
        self._receive = receive
        self._messages = MessageReader()
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        assert self._child.stdout is not None
        self._loop = asyncio.get_running_loop()
        self._output = self._child.stdout.fileno()
        os.set_blocking(self._output, False)
        self._loop.add_reader(self._output, self._read)
        self._closed = False

    def close(self) -> None:
        """Kill the child, and with it whatever it holds open; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._output)
        self._child.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then Popen itself reaps it later
            self._child.wait(REAP_S)

    def _read(self) -> None:
        """Take what is there."""
        try:
            data = os.read(self._output, READ_BYTES)
        except BlockingIOError:
            return
        for message in self._messages.feed(data):
            if self._closed:  # by whoever received the message before
                return
            self._receive(message)
        if not data:
            self.close()
            self._receive(None)
