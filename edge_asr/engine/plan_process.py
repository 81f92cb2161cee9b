"""Plans are built in a process of their own: what crashes there, or takes the memory, ends only that."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from edge_asr.engine.profiles import Profile
from edge_asr.engine.tensorrt_build import REMEDY, PlanOptions, Report, build_plan
from edge_asr.errors import EngineError

log = logging.getLogger(__name__)

OOM_SCORE = Path("/proc/self/oom_score_adj")
MARK = "\x1e"
"""What begins what the child tells us: TensorRT's libraries may print as well."""


def build_plan_apart(model: Path, profiles: Sequence[Profile], out: Path, options: PlanOptions, report: Report) -> None:
    """Run build_plan in a child: what crashes there, or is killed for its memory, is one line here.

    Raises EngineError.
    """
    request = {"model": model, "profiles": profiles, "out": out, "options": dataclasses.asdict(options)}
    code = f"import sys; sys.path[:] = {sys.path!a}; from edge_asr.engine.plan_process import serve; serve()"
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(request, default=str)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, errors="replace",
        )  # fmt: skip
        with child:
            try:
                why = _listen(child, report)
            finally:
                child.kill()  # at Ctrl-C it is still at work
        if why is None and child.returncode:
            said.seek(0)
            why = f"TensorRT's builder {_end_of(child.returncode)} on {model.name}{_last_line(said)}; {REMEDY}"
    if why is not None:
        raise EngineError(why)


def _listen(child: subprocess.Popen[str], report: Report) -> str | None:
    """Listen to the end; return why the child gave up, None where it did not say so."""
    assert child.stdout is not None
    why = None
    for line in child.stdout:
        _, mark, told = line.partition(MARK)
        if mark:
            kind, value = json.loads(told)
            if kind == "share":
                report(value)
            elif kind == "warning":
                log.warning("%s", value)
            else:
                why = str(value)
    child.wait()
    return why


def _end_of(code: int) -> str:
    if code > 0:
        return f"ended with {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def _last_line(file: IO[str]) -> str:
    lines = file.read().strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def serve() -> None:
    """Build what the command line asks for, and say on standard output how it goes: the child's side of the above."""
    _go_first()
    request = json.loads(sys.argv[1])
    # Whoever is killed cannot end us: then its end of our standard input closes.
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    logging.getLogger().addHandler(_Forwarding(logging.WARNING))
    options = PlanOptions(**{**request["options"], "cache": Path(request["options"]["cache"])})
    paths = Path(request["model"]), Path(request["out"])
    try:
        build_plan(paths[0], request["profiles"], paths[1], options, lambda share: _tell("share", share))
    except EngineError as error:
        _tell("error", str(error))
    except OSError as error:
        _tell("error", f"{paths[1].parent}: a plan cannot be written there ({error}); name another folder with --out")


def _go_first() -> None:
    """Let the kernel end us where memory runs out: what a Jetson's GPU holds it does not count as ours."""
    with contextlib.suppress(OSError):  # other systems have no such file
        OOM_SCORE.write_text("1000", encoding="ascii")


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # not with Python's own reading, which would hold a lock when we end
    os._exit(1)


class _Forwarding(logging.Handler):
    """Hands what is logged to the parent."""

    def emit(self, record: logging.LogRecord) -> None:
        _tell("warning", record.getMessage())


def _tell(kind: str, value: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps([kind, value])}\n")
    sys.stdout.flush()
