"""A contestant in a process of its own: it loads a model, then answers requests, a line of JSON each.

Started by measure.py. It has a process for itself, because contestants bring different builds of onnxruntime, because
memory can then be told apart, and because it must not share our modules: nothing of edge_asr is imported for a peer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

EDGE_ASR, SHERPA, FUNASR = "edge_asr", "sherpa-onnx", "funasr-onnx"
INT8, FP32 = "int8", "fp32"
CONTESTANTS = tuple((project, precision) for project in (EDGE_ASR, SHERPA, FUNASR) for precision in (INT8, FP32))
"""Every contestant: project and precision."""
SAMPLE_RATE = 16_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What a contestant makes of some samples."""

    text: str
    tokens: int
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    """Where the time went, where the contestant tells."""


Recognize = Callable[[Samples], Answer]


def load_edge_asr(options: argparse.Namespace) -> Recognize:
    """Load our engine; `options.model` is its folder."""
    from edge_asr.config import EngineConfig
    from edge_asr.loader import load_engine
    from edge_asr.recognizer.bundle import read_bundle

    recognizer = load_engine(read_bundle(options.bundle), options.model, EngineConfig(threads=options.threads))

    def recognize(samples: Samples) -> Answer:
        recognition = recognizer.recognize(samples)
        return Answer(recognition.text, len(recognition.tokens), recognition.stages_ms)

    return recognize


def load_sherpa(options: argparse.Namespace) -> Recognize:
    """Load sherpa-onnx; `options.model` is the graph, `options.tokens` the list of tokens with ids."""
    import sherpa_onnx

    recognizer = sherpa_onnx.OfflineRecognizer.from_paraformer(
        paraformer=str(options.model), tokens=str(options.tokens), num_threads=options.threads
    )

    def recognize(samples: Samples) -> Answer:
        stream = recognizer.create_stream()
        stream.accept_waveform(SAMPLE_RATE, samples)
        recognizer.decode_stream(stream)
        return Answer(stream.result.text, len(stream.result.tokens))

    return recognize


def load_funasr(options: argparse.Namespace) -> Recognize:
    """Load funasr-onnx, which finds its files in the bundle by name.

    It takes samples of full scale +-1 as we do, and scales them itself.
    """
    from funasr_onnx import Paraformer

    recognizer = Paraformer(
        str(options.bundle),
        batch_size=1,
        quantize=options.precision == INT8,
        intra_op_num_threads=options.threads,
    )

    def recognize(samples: Samples) -> Answer:
        results = recognizer(samples)
        if not results:  # it catches onnxruntime's errors and answers with nothing
            raise RuntimeError("no answer: onnxruntime failed inside it")
        return _funasr_answer(results[0])

    return recognize


def _funasr_answer(result: Mapping[str, Any]) -> Answer:
    """Read one result: `preds` is (text, words) for plain models, the text alone for those with timestamps."""
    preds = result["preds"]
    if isinstance(preds, str):
        return Answer(preds, len(result.get("raw_tokens", preds)))
    return Answer(preds[0], len(preds[1]))


LOADERS = {EDGE_ASR: load_edge_asr, SHERPA: load_sherpa, FUNASR: load_funasr}


def main() -> None:
    """Load, say so, then answer until standard input ends."""
    options = _arguments()
    channel = _own_channel()
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    recognize = LOADERS[options.project](options)
    _send(channel, {"peak_mb": _peak_mb()})
    for line in sys.stdin:
        _send(channel, _answer(json.loads(line), recognize, options.project))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("project", choices=LOADERS)
    parser.add_argument("precision", choices=(INT8, FP32))
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the graph; for edge_asr the engine's folder")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cores", type=int, nargs="*", default=[])
    return parser.parse_args()


def _own_channel() -> TextIO:
    """Keep standard output for our lines; what libraries print goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _send(channel: TextIO, message: Mapping[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def _answer(request: Mapping[str, Any], recognize: Recognize, project: str) -> Mapping[str, Any]:
    if request["do"] == "forget":
        return {"forgotten": _forget_peak()}
    if request["do"] == "versions":
        return {"versions": _versions(project)}
    samples = np.load(request["sound"])
    started, busy = time.perf_counter(), time.process_time()
    answer = recognize(samples)
    elapsed, busy = time.perf_counter() - started, time.process_time() - busy
    return {
        "ms": elapsed * 1e3,
        "processor_ms": busy * 1e3,
        "tokens": answer.tokens,
        "characters": len("".join(answer.text.split())),
        "stages_ms": dict(answer.stages_ms),
        "peak_mb": _peak_mb(),
    }


def _forget_peak() -> bool:
    """Let the kernel count the process's peak of memory anew; tell whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak_mb() -> float:
    """Return the largest resident memory since the start, or since the peak was forgotten."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _versions(project: str) -> Mapping[str, str]:
    """Return what computes: the project, its onnxruntime, numpy."""
    if project == SHERPA:
        return {SHERPA: version(SHERPA), "onnxruntime": _runtime_of_sherpa(), "numpy": np.__version__}
    import onnxruntime

    own = version("edge-asr" if project == EDGE_ASR else project)
    return {project: own, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}


def _runtime_of_sherpa() -> str:
    """Return the version of the onnxruntime that sherpa-onnx brings: the library names it, no function tells it."""
    import sherpa_onnx

    library = Path(sherpa_onnx.__file__).parent / "lib" / "libonnxruntime.so"
    try:
        found = re.search(rb"VERS_(\d+\.\d+\.\d+)", library.read_bytes())
    except OSError:
        found = None
    return found.group(1).decode() if found else "unknown"


if __name__ == "__main__":
    main()
