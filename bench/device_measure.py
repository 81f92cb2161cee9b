"""Measuring one engine on this machine: built, checked against fp32, timed, warm and after a pause."""

from __future__ import annotations

import contextlib
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import sensors
from bench.device_check import build_in_child, compare, hear, hear_in_child, in_child
from bench.device_machine import describe, software
from bench.device_results import (
    SCHEMA,
    AfterIdle,
    Check,
    Engine,
    Latency,
    Memory,
    Model,
    Result,
    Sensors,
    percentile,
)
from bench.floor import KNOWN, dimensions_of, floor_ms
from bench.half import ONNX_CUDA_HALF, write_half
from bench.report import without_folders
from bench.terminal import Tick
from edge_asr.config import EngineConfig
from edge_asr.engine import trial
from edge_asr.errors import BrokenEngineError, EngineError
from edge_asr.loader import load_engine
from edge_asr.recognizer.bundle import FP32, Bundle
from edge_asr.recognizer.manifest import TENSORRT, Manifest, existing, read_manifest
from edge_asr.recognizer.onnx_network import ONNX_CUDA, CudaOptions, OnnxNetwork
from edge_asr.recognizer.paraformer import Decoded, Paraformer
from edge_asr.sensors import Reading
from edge_asr.tree import Tree
from edge_asr.types import SAMPLE_RATE, Recognition, Samples

MEMORY_S = 30.0
"""How much audio memory is measured with."""
BABBLE_S = 5.0
"""Of what is repeated where nobody names a recording."""
LEAST_RUNS = 3
RECORDINGS = 8
ON_GPU = (TENSORRT, ONNX_CUDA, ONNX_CUDA_HALF)
BUILT_AS = {ONNX_CUDA: FP32, ONNX_CUDA_HALF: FP32}
"""What build-engine calls the engine of a target, where that is another."""
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "tensorrt", "pycuda")
FRAME_S = 0.06


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    seconds: Sequence[float]
    batches: Sequence[int]
    runs: int
    """Of each case, unless `case_s` is over before."""
    case_s: float
    idle_s: float
    """How long a pause is; 0: none."""
    pauses: int


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be measured, and how."""

    bundle: Bundle
    target: str
    """Of build-engine, `onnx-cuda`, or `onnx-cuda-fp16`."""
    engine: Path | None
    """Folder of an engine that is taken if it fits, and else built there; None: built, and gone afterwards."""
    threads: int
    gpu: int
    effort: Effort
    sound: Samples | None
    """Repeated or cut to each length; None: something like speech."""
    command: str
    quick: bool
    note: str
    root: Path = Path("/")
    """Where the system's files are."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run an engine; None: it has no such switch."""

    cuda_graphs: bool | None = None
    mapped_memory: bool | None = None

    def __str__(self) -> str:
        switches = {"CUDA graphs": self.cuda_graphs, "mapped memory": self.mapped_memory}
        return ", ".join(f"{name} {'on' if on else 'off'}" for name, on in switches.items() if on is not None)


VARIANTS: Mapping[str, Sequence[Variant]] = {
    TENSORRT: [Variant(graphs, mapped) for mapped in (False, True) for graphs in (False, True)],
    ONNX_CUDA: [Variant(False), Variant(True)],
    ONNX_CUDA_HALF: [Variant(False), Variant(True)],
}
"""The first is measured in full, the others at the latencies of one utterance."""


def turns(task: Task) -> int:
    """Return how often `measure` ticks, as a rule."""
    variants = len(_variants(task.target))
    cases = len(task.effort.seconds) * (variants + len(task.effort.batches) - 1)
    return 4 + variants + cases + (task.effort.pauses if task.effort.idle_s else 0)


def measure(task: Task, tick: Tick) -> Result:
    """Measure an engine; `tick` is told before each step. Raises EdgeAsrError."""
    with tempfile.TemporaryDirectory(prefix="edge_asr-device-") as work:
        return _Bench(task, Path(work), tick).run()


class _Bench:
    """One run: what is under way, and what has been found so far."""

    def __init__(self, task: Task, work: Path, tick: Tick) -> None:
        self._task, self._work, self._tick = task, work, tick
        self._tree = Tree(task.root)
        self._usual = trial.babble(BABBLE_S) if task.sound is None else task.sound
        self._load_average = os.getloadavg()[0]  # before we add to it
        self._machine = describe(self._tree, task.gpu)
        self._latency: list[Latency] = []
        self._after_idle: list[AfterIdle] = []
        self._left_out: list[str] = []

    def run(self) -> Result:
        """Take one step after another."""
        task = self._task
        self._folder, build_s = self._built(
            BUILT_AS.get(task.target, task.target), task.engine or self._work / "engine"
        )
        self._manifest = _manifest(self._folder)
        self._target = task.target if task.target in BUILT_AS else self._manifest.engine
        self._card = task.gpu if self._target in ON_GPU and sensors.read_card(task.gpu) else None
        reference = self._folder if self._manifest.engine == FP32 else self._built(FP32, self._work / "fp32")[0]
        self._dimensions = dimensions_of(*_networks(reference))
        self._paths = self._halves() if self._target == ONNX_CUDA_HALF else _networks(self._folder)
        expected = None if self._target == FP32 else self._expected(reference)
        first, *others = _variants(self._target)
        with sensors.Sampler(self._tree, self._card) as busy:
            engine, memory, check = self._first(first, expected, build_s)
            for variant in others:
                self._other(variant, expected)
        with sensors.Sampler(self._tree, self._card) as idle:
            self._pauses(first)
        return Result(
            schema=SCHEMA,
            date=datetime.date.today().isoformat(),
            command=task.command,
            quick=task.quick,
            load_average=round(self._load_average, 2),
            machine=self._machine,
            software=software(self._manifest),
            model=Model(task.bundle.name, self._dimensions.weights),
            engine=engine,
            check=check,
            latency=self._latency,
            after_idle=self._after_idle,
            memory=memory,
            sensors=_told(busy.summary, idle.summary if self._after_idle else None),
            left_out=[without_folders(reason) for reason in self._left_out],
            note=task.note,
        )

    def _built(self, target: str, folder: Path) -> tuple[Path, float | None]:
        """Return the folder of an engine that fits, and the seconds that its building took; None if it was there."""
        if existing(self._task.bundle, folder, target, self._task.gpu) is not None:
            self._tick(f"{target} is there already")
            return folder, None
        self._tick(f"building {target}")
        started = time.perf_counter()
        in_child(build_in_child, self._task.bundle, target, folder, self._task.threads, self._task.gpu)
        return folder, round(time.perf_counter() - started, 1)

    def _halves(self) -> tuple[Path, Path]:
        """Return the networks in FP16, made of the engine's."""
        self._tick("writing the networks in FP16")
        task = self._task
        made = in_child(write_half, task.bundle, *_networks(self._folder), self._work / "half", task.threads)
        encoder, decoder = made
        return encoder, decoder

    def _expected(self, reference: Path) -> list[Decoded]:
        """Return what fp32 on the processor hears, in a child, whose memory is not to be counted."""
        self._tick("fp32 on the processor says what is to be heard")
        task = self._task
        expected: list[Decoded] = in_child(hear_in_child, task.bundle, reference, task.threads)
        return expected

    def _first(
        self, variant: Variant, expected: list[Decoded] | None, build_s: float | None
    ) -> tuple[Engine, Memory, Check | None]:
        """Measure everything but the pauses with one way to run the engine."""
        task, manifest = self._task, self._manifest
        sensors.forget_peak()
        before = self._reading()
        self._tick("loading")
        started = time.perf_counter()
        with contextlib.closing(self._load(variant)) as recognizer:
            load_s = time.perf_counter() - started
            recognizer.recognize(self._sound(MEMORY_S))
            memory = _memory(before, self._reading(), sensors.resident_peak_mb())
            check = None if expected is None else compare(hear(recognizer), expected)
            for batch in task.effort.batches if recognizer.batches else (1,):
                self._latencies(recognizer, variant, batch)
            return (
                Engine(
                    target=task.target,
                    name=recognizer.engine,
                    threads=task.threads,
                    batches=recognizer.batches,
                    build_s=build_s,
                    load_s=round(load_s, 2),
                    megabytes=round(self._bytes() / 1e6, 1),
                    self_test="none" if manifest.self_test is None else "passed",  # or it would not have been loaded
                ),
                memory,
                check,
            )

    def _bytes(self) -> int:
        """Return the size of all files of the engine: constants lie beside the networks."""
        if self._target == ONNX_CUDA_HALF:
            return sum(path.stat().st_size for path in self._paths[0].parent.iterdir())
        return sum(record.size for record in self._manifest.files.values())

    def _other(self, variant: Variant, expected: list[Decoded] | None) -> None:
        self._tick(f"loading with {variant}")
        try:
            with contextlib.closing(self._load(variant)) as recognizer:
                if expected is not None:
                    # Twice through all lengths: what was recorded of one is replayed after the others.
                    check = compare([*hear(recognizer), *hear(recognizer)], [*expected, *expected])
                    if check.same_tokens < check.tokens:
                        self._left_out.append(f"{variant}: hears {check.same_tokens} of {check.tokens} tokens as fp32")
                self._latencies(recognizer, variant, 1)
        except EngineError as error:
            self._left_out.append(f"{variant}: {error}")

    def _pauses(self, variant: Variant) -> None:
        effort = self._task.effort
        if not effort.idle_s:
            return
        with contextlib.closing(self._load(variant)) as recognizer:
            for seconds in effort.seconds[: effort.pauses]:
                sound = self._sound(seconds)
                recognizer.recognize(sound)
                self._tick(f"a pause of {effort.idle_s:g} s")
                time.sleep(effort.idle_s)
                first, second = (round(_timed(recognizer, sound, 1)[0], 2) for _ in range(2))
                self._after_idle.append(AfterIdle(seconds, effort.idle_s, first, second))

    def _load(self, variant: Variant) -> Paraformer:
        task = self._task
        if self._target in BUILT_AS:
            cuda = CudaOptions(task.gpu, graphs=bool(variant.cuda_graphs))
            encoder, decoder = (OnnxNetwork(path, task.threads, cuda) for path in self._paths)
            return Paraformer(task.bundle, encoder, decoder, self._target)
        switches = {"cuda_graphs": bool(variant.cuda_graphs), "mapped_memory": bool(variant.mapped_memory)}
        settings = {"target": self._manifest.engine, "threads": task.threads, "gpu": task.gpu, "tensorrt": switches}
        config = EngineConfig.model_validate(settings)
        return load_engine(task.bundle, self._folder, config)

    def _latencies(self, recognizer: Paraformer, variant: Variant, batch: int) -> None:
        for seconds in self._task.effort.seconds:
            self._tick(" ".join(filter(None, (f"{seconds:g} s x {batch}", str(variant)))))
            try:
                self._latency.append(self._case(recognizer, variant, seconds, batch))
            except BrokenEngineError:
                raise
            except EngineError as error:  # a shape that it has no room for
                self._left_out.append(f"{seconds:g} s x {batch}: {error}")

    def _case(self, recognizer: Paraformer, variant: Variant, seconds: float, batch: int) -> Latency:
        sound, effort = self._sound(seconds), self._task.effort
        _timed(recognizer, sound, batch)  # the first of a length takes longer
        times: list[float] = []
        stages: list[Mapping[str, float]] = []
        started = time.perf_counter()
        while len(times) < effort.runs and (len(times) < LEAST_RUNS or time.perf_counter() - started < effort.case_s):
            ms, recognition = _timed(recognizer, sound, batch)
            times.append(ms)
            stages.append(recognition.stages_ms)
        p50, p95, p99 = (round(percentile(times, share), 3) for share in (0.5, 0.95, 0.99))
        tokens = len(recognition.tokens)
        return Latency(
            seconds=seconds,
            batch=batch,
            cuda_graphs=variant.cuda_graphs,
            mapped_memory=variant.mapped_memory,
            runs=len(times),
            tokens=tokens,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            stages_ms={name: round(statistics.median(each[name] for each in stages), 3) for name in stages[0]},
            floor_ms=self._floor_ms(seconds, tokens, batch),
        )

    def _floor_ms(self, seconds: float, tokens: int, batch: int) -> float | None:
        known = next((each for each in KNOWN if each.name == self._machine.known_as), None)
        if known is None or self._target not in ON_GPU:
            return None
        frames = round(seconds / FRAME_S)
        return round(floor_ms(known, self._target, self._dimensions, frames, tokens, batch), 3)

    def _sound(self, seconds: float) -> Samples:
        return np.resize(self._usual, int(seconds * SAMPLE_RATE))

    def _reading(self) -> Reading:
        return sensors.read(self._tree, None if self._card is None else sensors.read_card(self._card))


def _variants(target: str) -> Sequence[Variant]:
    return VARIANTS.get(target, [Variant()])


def _manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise EngineError(f"{folder}: the engine that was just there is gone")
    return manifest


def _networks(folder: Path) -> tuple[Path, Path]:
    manifest = _manifest(folder)
    return folder / manifest.encoder, folder / manifest.decoder


def _timed(recognizer: Paraformer, sound: Samples, batch: int) -> tuple[float, Recognition]:
    """Return the milliseconds that a batch takes, and the first of its recognitions."""
    started = time.perf_counter()
    recognition = recognizer.recognize_batch([sound] * batch)[0]
    return (time.perf_counter() - started) * 1e3, recognition


def _memory(before: Reading, after: Reading, resident_mb: float | None) -> Memory:
    return Memory(
        resident_mb=None if resident_mb is None else round(resident_mb),
        gpu_mb=_grown(before.gpu_used_mb, after.gpu_used_mb),
        taken_mb=_grown(after.available_mb, before.available_mb),
    )


def _grown(less: float | None, more: float | None) -> float | None:
    return None if less is None or more is None else float(round(more - less))


def _told(busy: sensors.Summary, idle: sensors.Summary | None) -> Sensors:
    told = [each for each in (busy.throttled, idle.throttled if idle else None) if each is not None]
    return Sensors(
        throttled=any(told) if told else None,
        highest_c=busy.highest_c,
        mean_w=busy.mean_w,
        board_w=busy.board_w,
        idle_board_w=idle.board_w if idle else None,
        highest_gpu_mhz=busy.highest_gpu_mhz,
    )
