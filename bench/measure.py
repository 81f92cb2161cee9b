"""Measuring: contestants in processes of their own take turns, and never two work at the same time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench.contestants import EDGE_ASR, FP32, FUNASR, INT8, SHERPA, Samples
from bench.results import FIRST_S, MEMORY_S, Case, LeftOut, Load, Results, Run
from bench.terminal import Tick
from edge_asr.errors import EdgeAsrError, EngineError
from edge_asr.recognizer.bundle import Bundle
from edge_asr.types import SAMPLE_RATE

SETTLE_S = 0.05
"""Between two turns: pools of threads spin for a while after their work, and would take time from the next."""
PATIENCE_S = 600.0
"""A contestant that takes longer to load or to answer is left out."""
FUNASR_GRAPHS = {INT8: "model_quant.onnx", FP32: "model.onnx"}
FUNASR_FILES = ("config.yaml", "am.mvn", "tokens.json")


class OutError(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant that is ready to be started."""

    project: str
    precision: str
    bundle: Path
    model: Path
    tokens: Path

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.project} {self.precision}"

    def command(self, threads: int, cores: Sequence[int]) -> list[str]:
        """Return what starts its process."""
        script = Path(__file__).with_name("contestants.py")
        paths = ["--bundle", str(self.bundle), "--model", str(self.model), "--tokens", str(self.tokens)]
        pinned = ["--cores", *map(str, cores)] if cores else []
        return [sys.executable, str(script), self.project, self.precision, *paths, "--threads", str(threads), *pinned]


def enter(project: str, precision: str, bundle: Bundle, engines: Path, work: Path) -> Entry:
    """Prepare a contestant: build its engine, find its files. Raises OutError where it cannot take part."""
    model = {
        EDGE_ASR: lambda: _engine(precision, bundle, engines),
        SHERPA: lambda: _graph(precision, bundle),
        FUNASR: lambda: _funasr_graph(precision, bundle),
    }[project]()
    entry = Entry(project, precision, bundle.folder.resolve(), model.resolve(), _tokens(bundle, work))
    _read_into_cache(model)
    return entry


def _read_into_cache(model: Path) -> None:
    """Read a graph, or the files of an engine: everybody loads from the file cache."""
    for path in [model] if model.is_file() else model.iterdir():
        if path.is_file():
            path.read_bytes()


def _engine(precision: str, bundle: Bundle, engines: Path) -> Path:
    """Return the folder of our engine, built where there is none that fits."""
    from edge_asr.loader import existing

    target = f"onnx-{precision}"
    folder = engines / target
    if existing(bundle, folder, target) is None:
        try:  # in a process that ends with it: what it takes of memory is not the bench's
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(_build, bundle.folder, target, folder).result()
        except (EdgeAsrError, ImportError, BrokenExecutor) as error:
            raise OutError(str(error)) from error
    return folder


def _build(bundle: Path, target: str, folder: Path) -> None:
    from edge_asr.engine.build import build_engine
    from edge_asr.recognizer.bundle import read_bundle

    try:
        build_engine(read_bundle(bundle), target, folder)
    except EdgeAsrError as error:
        raise EngineError(str(error)) from None  # one that travels between processes whatever it was


def _graph(precision: str, bundle: Bundle) -> Path:
    kind = f"onnx-{precision}"
    if kind not in bundle.files:
        raise OutError(f"the bundle has no {precision} graph")
    return bundle.files[kind]


def _funasr_graph(precision: str, bundle: Bundle) -> Path:
    """Return the graph that funasr-onnx takes; it would begin to export one where it finds none."""
    missing = [name for name in (FUNASR_GRAPHS[precision], *FUNASR_FILES) if not (bundle.folder / name).is_file()]
    if missing:
        raise OutError(f"the bundle has no {', '.join(missing)}")
    return bundle.folder / FUNASR_GRAPHS[precision]


def _tokens(bundle: Bundle, work: Path) -> Path:
    """Return the list of tokens with ids that sherpa-onnx wants."""
    path = work / "tokens.txt"
    path.write_text("".join(f"{token} {number}\n" for number, token in enumerate(bundle.tokens)), encoding="utf-8")
    return path


class Child:
    """A contestant's process."""

    def __init__(self, entry: Entry, threads: int, cores: Sequence[int], sound: Path) -> None:
        """Start it, wait until it can answer, and let it recognise a sound, the first one. Raises OutError."""
        self.entry = entry
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        started = time.perf_counter()
        self._process = subprocess.Popen(
            entry.command(threads, cores), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        try:
            ready = self._read()
            load_ms = (time.perf_counter() - started) * 1e3
            self.run(sound)
        except BaseException:  # nobody else would end it
            self.close()
            raise
        first_answer_ms = (time.perf_counter() - started) * 1e3
        self.load = Load(entry.name, threads, load_ms, ready["peak_mb"], first_answer_ms)

    def run(self, sound: Path) -> Run:
        """Let it recognise a sound. Raises OutError."""
        return Run(**self._ask({"do": "run", "sound": str(sound)}))

    def forget_peak(self) -> None:
        """Let its peak of memory count from now. Raises OutError."""
        self._ask({"do": "forget"})

    def versions(self) -> dict[str, str]:
        """Return what it computes with. Raises OutError."""
        versions: dict[str, str] = self._ask({"do": "versions"})["versions"]
        return versions

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise OutError(self._why()) from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE_S)[0]:
            self._process.kill()
            raise OutError(f"no answer within {PATIENCE_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise OutError(self._why())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _why(self) -> str:
        """Return how it ended, and its last words."""
        code = self._process.wait()
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {said[-1]}" if said else how


class Bench:
    """One run of the bench over all threads and lengths."""

    def __init__(self, entries: Sequence[Entry], results: Results, sounds: Mapping[float, Path], tick: Tick) -> None:
        """`sounds`: the files of samples by length; `tick` is told before each turn what it is."""
        self._entries, self._results, self._sounds, self._tick = entries, results, sounds, tick

    def measure(self, threads: int, rounds: int, pin: bool) -> None:
        """Measure everybody on so many threads, and memory where these are the fewest."""
        cores = choose_cores(threads) if pin else []
        with contextlib.ExitStack() as stack:
            children = self._start(threads, cores, stack)
            for seconds in self._results.seconds:
                self._case(children, threads, seconds, rounds)
            if threads == min(self._results.threads):
                self._memory(children, threads)
            for child in list(children):
                with self._leaving_out(children, child, threads):
                    self._results.versions[child.entry.project] = child.versions()

    def _start(self, threads: int, cores: Sequence[int], stack: contextlib.ExitStack) -> list[Child]:
        children: list[Child] = []
        for entry in self._entries:
            self._tick(f"{entry.name} loads, {threads} threads")
            time.sleep(SETTLE_S)
            try:
                child = Child(entry, threads, cores, self._sounds[FIRST_S])
            except OutError as error:
                self._results.left_out.append(LeftOut(entry.name, threads, str(error)))
                continue
            stack.callback(child.close)
            self._results.loads.append(child.load)
            children.append(child)
        return children

    def _case(self, children: list[Child], threads: int, seconds: float, rounds: int) -> None:
        """Measure a length: one round warms up, then everybody has a turn in each, another one first each time."""
        runs: dict[str, list[Run]] = {child.entry.name: [] for child in children}
        for child in list(children):
            with self._leaving_out(children, child, threads):
                child.forget_peak()
        for number in range(rounds + 1):
            for child in rotated(children, number):
                with self._leaving_out(children, child, threads):
                    run = self._turn(child, f"{threads} threads, {seconds:g} s, round {number}", seconds)
                    if number:
                        runs[child.entry.name].append(run)
        for child in children:
            name = child.entry.name
            self._results.cases.append(Case(name, threads, seconds, tuple(runs[name])))

    def _memory(self, children: list[Child], threads: int) -> None:
        for child in list(children):
            with self._leaving_out(children, child, threads):
                child.forget_peak()
                run = self._turn(child, f"memory, {MEMORY_S:g} s", MEMORY_S)
                self._results.memory.append(Case(child.entry.name, threads, MEMORY_S, (run,)))

    def _turn(self, child: Child, what: str, seconds: float) -> Run:
        self._tick(f"{what}: {child.entry.name}")
        time.sleep(SETTLE_S)
        return child.run(self._sounds[seconds])

    @contextlib.contextmanager
    def _leaving_out(self, children: list[Child], child: Child, threads: int) -> Iterator[None]:
        """Go on without a contestant that fails within the block."""
        try:
            yield
        except OutError as error:
            children.remove(child)
            self._results.left_out.append(LeftOut(child.entry.name, threads, str(error)))


def turns(contestants: int, lengths: int, threads: int, rounds: int) -> int:
    """Return how often the bench ticks where nobody fails."""
    return contestants * (threads * (1 + lengths * (rounds + 1)) + 1)


def rotated(children: Sequence[Child], number: int) -> list[Child]:
    """Return the order of a round."""
    start = number % len(children) if children else 0
    return [*children[start:], *children[:start]]


def choose_cores(threads: int) -> list[int]:
    """Return as many cores as there are threads: of different physical ones where there are enough, the last first."""
    allowed = sorted(os.sched_getaffinity(0), reverse=True)
    physical: dict[str, int] = {}
    for core in allowed:
        physical.setdefault(_siblings(core), core)
    distinct = list(physical.values())
    return sorted((distinct if len(distinct) >= threads else allowed)[:threads])


def _siblings(core: int) -> str:
    """Return the logical cores that share a physical one; the core itself where the system does not tell."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(core)


def write_sounds(lengths: Sequence[float], sound: Samples | None, work: Path) -> dict[float, Path]:
    """Write the samples of each length, of `sound` over and over, or of white noise; return the files."""
    paths = {}
    for seconds in {*lengths, FIRST_S, MEMORY_S}:
        count = int(SAMPLE_RATE * seconds)
        samples = np.resize(sound, count) if sound is not None else noise(count)
        paths[seconds] = work / f"{seconds:g}s.npy"
        np.save(paths[seconds], samples.astype(np.float32))
    return paths


def noise(count: int) -> Samples:
    """Return `[count]` samples of white noise, always the same."""
    return (np.random.default_rng(0).standard_normal(count) * 0.1).astype(np.float32)
