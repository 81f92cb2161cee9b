"""What `bench decode` does: how long the recogniser takes for so much audio, stage by stage."""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_asr.config import Config
from edge_asr.ladder import LoadedEngine, load_ladder
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.types import SAMPLE_RATE, Samples

RUNS = 5


def bench_decode(config: Config, seconds: Sequence[float], batch: int, json_lines: bool) -> None:
    """Print a line for each length of audio. Raises BundleError or EngineError."""
    recognizer = load_ladder(read_bundle(config.model), config.engine, config.state_dir)
    try:
        for case in _cases(recognizer, config.engine.threads, seconds, batch):
            print(json.dumps(case) if json_lines else _row(case), flush=True)
    finally:
        recognizer.close()


def _cases(recognizer: LoadedEngine, threads: int, seconds: Sequence[float], batch: int) -> Iterator[dict[str, Any]]:
    for duration in seconds:
        _forget_peak()
        samples = noise(duration)
        recognizer.recognize_batch([samples] * batch)  # the first of a length takes longer
        times, stages = [], []
        for _ in range(RUNS):
            started = time.perf_counter()
            recognitions = recognizer.recognize_batch([samples] * batch)
            times.append((time.perf_counter() - started) * 1e3)
            stages.append(recognitions[0].stages_ms)
        median = statistics.median(times)
        yield {
            "engine": recognizer.engine,
            "threads": threads,
            "seconds": duration,
            "batch": batch,
            "tokens": len(recognitions[0].tokens),
            "median_ms": round(median, 2),
            "rtf": round(median / 1e3 / (duration * batch), 5),
            "peak_memory_mb": round(_peak_bytes() / 1e6, 1),
            "stages": {stage: round(statistics.median(run[stage] for run in stages), 2) for stage in stages[0]},
        }


def noise(seconds: float) -> Samples:
    """Return the sound of the bench: white noise."""
    sound = np.random.default_rng(0).standard_normal(int(SAMPLE_RATE * seconds)) * 0.1
    return sound.astype(np.float32)


def _row(case: dict[str, Any]) -> str:
    stages = ", ".join(f"{stage} {value:g}" for stage, value in case["stages"].items())
    return (
        f"{case['engine']}  {case['seconds']:g} s x {case['batch']}: {case['median_ms']:.1f} ms"
        f" (real-time factor {case['rtf']:.4f}), {case['peak_memory_mb']:.0f} MB at most; {stages}"
    )


def _forget_peak() -> None:
    """Let the kernel count the process's peak of memory anew, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
