"""The child that builds an engine: a process of its own gives the memory back, and can be ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from edge_asr.config import EngineConfig
from edge_asr.config_reader import ENV_PREFIX
from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import Bundle

COMPLAINT = "edge-asr: "
"""What a line of build-engine that is meant for the user begins with."""
KILL_AFTER_S = 0.5
"""So long a child that is to end may take."""


class EngineBuild:
    """The child that builds an engine. Whoever waits for it on another thread may end it."""

    def __init__(self, begins: Callable[[], None] = lambda: None, nice: int = 0) -> None:
        """`begins` is called, on the thread that builds, when there is an engine to build.

        `nice`: how much the child steps back behind whoever needs the processor, 0 to 19.
        """
        self.cancelled = False
        self._nice = nice
        self._begins = begins
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def run(self, bundle: Bundle, folder: Path, config: EngineConfig) -> None:
        """Build `config.target` in a process of its own. Raises EngineError."""
        with self._start(_command(bundle, folder, config, self._nice)) as child:
            try:
                _, said = child.communicate()
            finally:
                _end(child)  # at Ctrl-C it is still at work
        if child.returncode:
            raise EngineError(_reason(child.returncode, said or ""))

    @property
    def running(self) -> bool:
        """True while the child is at work."""
        return self._child is not None and self._child.returncode is None

    def cancel(self) -> None:
        """End the child, if there is one, and let none be started from now on."""
        with self._lock:
            self.cancelled = True
        if self._child is not None:
            _end(self._child)

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        # Whoever sits at a terminal sees the progress; otherwise only what went wrong is of interest.
        errors = None if sys.stderr is not None and sys.stderr.isatty() else subprocess.PIPE
        with self._lock:  # after cancel() nothing begins
            if self.cancelled:
                raise EngineError("the building of the engine was cancelled")
            self._begins()
            try:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                    text=True, errors="replace", env=_environment(),
                )  # fmt: skip
            except OSError as error:
                raise EngineError(f"build-engine cannot be started ({error})") from error
            return self._child


def _command(bundle: Bundle, folder: Path, config: EngineConfig, nice: int) -> list[str]:
    # `-m edge_asr` would import from the working directory first, -P exists from Python 3.11 on only, and -I forgets
    # PYTHONPATH. With our own sys.path the child imports what we would, and relative paths keep their meaning.
    code = f"import os, sys; os.nice({nice}); sys.path[:] = {sys.path!a}; from edge_asr.cli import main; main()"
    # A folder that is called like a model of the catalogue must not be taken for that model.
    places = ["--model", str(bundle.folder.absolute()), "--out", str(folder.absolute())]
    # Another process may be building the same engine: then this one waits, and takes that.
    settings: dict[str, object] = {"engine.threads": config.threads, "engine.gpu": config.gpu}
    for key in ("softmax_fp16", "workspace_mb"):
        settings[f"engine.tensorrt.{key}"] = json.dumps(getattr(config.tensorrt, key))
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    return [sys.executable, "-c", code, "build-engine", *places, "--target", config.target, "--if-needed", *options]


def _environment() -> dict[str, str]:
    """Return ours without the configuration in it, which may make no sense without the file that it refines."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}


def _end(child: subprocess.Popen[str]) -> None:
    """End a child that may have ended by itself."""
    child.terminate()
    try:
        child.wait(KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _reason(code: int, said: str) -> str:
    """Return why the child failed: its last line for the user, or how it ended."""
    complaints = [line for line in said.splitlines() if line.startswith(COMPLAINT)]
    if complaints:
        return complaints[-1].removeprefix(COMPLAINT)
    if code > 0:
        return f"build-engine ended with {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return f"build-engine was killed by {name}{': out of memory?' if name == 'SIGKILL' else ''}"
