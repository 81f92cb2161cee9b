"""The ladder: the best engine that works here answers, and below it a lesser one for what it fails on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from edge_asr import metrics
from edge_asr.child import EngineBuild
from edge_asr.config import EngineConfig
from edge_asr.errors import BrokenEngineError, BundleError, EngineError
from edge_asr.loader import UnfitError, engine_folder, load_engine, load_on_cuda, load_recognizer, processor_target
from edge_asr.recognizer.bundle import Bundle
from edge_asr.recognizer.manifest import TENSORRT, read_manifest, resolved
from edge_asr.recognizer.network import interruptible
from edge_asr.recognizer.onnx_network import ONNX_CUDA
from edge_asr.recognizer.tensorrt_network import unavailable
from edge_asr.types import Recognition, Samples

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class LoadedEngine(Protocol):
    """An engine in memory; used by one thread at a time."""

    @property
    def engine(self) -> str:
        """What transcripts call it, `onnx-int8` for example."""

    @property
    def batches(self) -> bool:
        """Whether several segments are recognised in one run."""

    @property
    def largest_batch(self) -> int:
        """How many of them a run takes at most."""

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` float32 samples at 16 kHz. Raises EngineError."""

    def recognize_batch(self, batch: Sequence[Samples]) -> list[Recognition]:
        """Recognise several segments, each as if it were alone. Raises EngineError."""

    def close(self) -> None:
        """Release it."""


@dataclass(frozen=True, slots=True)
class Rung:
    """An engine that may be loaded."""

    name: str
    """The target it stands for: what it is exactly shows when it is loaded."""
    load: Callable[[], LoadedEngine]
    """Raises BundleError or EngineError."""


class Ladder:
    """Rungs, best first, one of which answers. What it fails on is asked of the lowest, which is loaded then and kept.

    An engine that is broken is left for the lowest rung for good; what was asked is answered there, so nothing is lost.
    One thread at a time.
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        strict: bool = False,
        only_first: bool = False,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the first rung that can be; none but the first with `only_first`, nor ever after with `strict`.

        `changed` is called when another one answers. Raises BundleError or EngineError where none can be loaded.
        """
        self._changed = changed
        self.why = ""
        """Why it is not the first rung that answers; empty where it is."""
        self._spare: LoadedEngine | None = None
        self._warned = False
        self.loading = False
        """True while an engine is loaded, and perhaps built, for what another one failed on: that may take minutes."""
        try:
            self._present, passed = _first_that_loads(rungs[:1] if strict or only_first else rungs)
        except EngineError as failure:
            if strict and len(rungs) > 1:
                raise EngineError(f"{failure}; engine.strict allows nothing less than {rungs[0].name}") from failure
            raise
        for rung, error in passed:
            self._tell(rung.name, error)
        self._lower = None if strict or len(passed) == len(rungs) - 1 else rungs[-1]

    @property
    def engine(self) -> str:
        """The engine that answers at present."""
        return self._present.engine

    @property
    def batches(self) -> bool:
        """Whether that recognises several segments in one run."""
        return self._present.batches

    @property
    def largest_batch(self) -> int:
        """How many of them a run takes at most."""
        return self._present.largest_batch

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` float32 samples at 16 kHz. Raises EngineError, BrokenEngineError if nothing can any more."""
        return self._ask(lambda engine: engine.recognize(samples))

    def recognize_batch(self, batch: Sequence[Samples]) -> list[Recognition]:
        """Recognise several segments, each as if it were alone. Raises as `recognize`.

        One that fails need not take the others down to a lesser engine: ask for each alone then.
        """
        return self._ask(lambda engine: engine.recognize_batch(batch), by_itself=True)

    def interrupt(self) -> None:
        """End what is being recognised, and let nothing begin, where the engine can; see Interruptible."""
        for engine in interruptible(self._present, self._spare):
            engine.interrupt()

    def resume(self) -> None:
        """Go on recognising."""
        for engine in interruptible(self._present, self._spare):
            engine.resume()

    def close(self) -> None:
        """Release what is loaded."""
        self._present.close()
        if self._spare is not None:
            self._spare.close()

    def _ask(self, question: Callable[[LoadedEngine], Answer], by_itself: bool = False) -> Answer:
        """Ask what answers at present, and the lowest rung where that fails; with `by_itself` only if it is broken."""
        try:
            return question(self._present)
        except BrokenEngineError as error:
            if self._lower is None:
                raise
            self._step_down(error)
        except EngineError as error:
            if self._lower is None or by_itself:
                raise
            return self._ask_lower(question, error)
        return question(self._present)

    def _ask_lower(self, question: Callable[[LoadedEngine], Answer], error: EngineError) -> Answer:
        lower = self._load_lower(error)
        answer = question(lower)
        metrics.DECODED_AGAIN.inc()
        # Once is enough for people: how often it happens is a metric.
        level = logging.DEBUG if self._warned else logging.WARNING
        log.log(level, "%s failed on a segment, which %s decoded again: %s", self.engine, lower.engine, error)
        self._warned = True
        return answer

    def _step_down(self, error: BrokenEngineError) -> None:
        """Leave the present rung for the lowest: after an error of the GPU nothing else in this process can use it."""
        lower = self._load_lower(error)
        left, self._present = self._present, lower
        self._spare = self._lower = None
        self._tell(left.engine, error)
        try:
            left.close()
        except EngineError as failure:  # what is broken may not even be released
            log.debug("%s could not be released: %s", left.engine, failure)
        self._changed()

    def _load_lower(self, error: EngineError) -> LoadedEngine:
        """Return the lowest rung. Raises as bad an error as the one that makes it necessary."""
        if self._spare is None:
            assert self._lower is not None
            self.loading = True
            try:
                self._spare = self._lower.load()
            except (BundleError, EngineError) as failure:
                raise type(error)(f"{error}; and {self._lower.name} cannot be loaded: {failure}") from failure
            finally:
                self.loading = False
        return self._spare

    def _tell(self, left: str, error: Exception) -> None:
        """Say once and for all why another engine answers."""
        self.why = self.why or f"{left} cannot be used: {error}"
        metrics.STEPS_DOWN.labels(left).inc()
        # An engine that nobody has built yet is no cause for concern.
        level = logging.INFO if isinstance(error, UnfitError) and not error.why else logging.WARNING
        log.log(level, "%s answers instead of %s: %s", self.engine, left, error)


def load_ladder(
    bundle: Bundle,
    config: EngineConfig,
    state_dir: Path,
    build: EngineBuild | None = None,
    changed: Callable[[], None] = lambda: None,
) -> Ladder:
    """Load the best engine of a bundle that works here. TensorRT's is used where there is one, but not built.

    Raises BundleError or EngineError.
    """
    return Ladder(rungs_of(bundle, config, state_dir, build), config.strict, changed=changed)


def rungs_of(bundle: Bundle, config: EngineConfig, state_dir: Path, build: EngineBuild | None = None) -> list[Rung]:
    """Return what may run a bundle here, best first.

    An engine in `config.dir` is the first; only where it is TensorRT's there is another below it.
    """
    plan = plan_folder(bundle, config, state_dir)
    own = config if plan is None else config.model_copy(update={"dir": None})
    processor = Rung(processor_target(config), partial(load_recognizer, bundle, own, state_dir, build))
    rungs = [] if plan is None else [Rung(TENSORRT, partial(_load_plan, bundle, plan, config))]
    if config.cuda.enabled:
        rungs.append(Rung(ONNX_CUDA, partial(load_on_cuda, bundle, own, state_dir, build)))
    return [*rungs, processor]


def plan_folder(bundle: Bundle, config: EngineConfig, state_dir: Path) -> Path | None:
    """Return where TensorRT's engine belongs; None where none is wanted here."""
    wanted = resolved(config.target, config.gpu) == TENSORRT
    if config.dir is None:
        return engine_folder(bundle, state_dir, TENSORRT) if wanted else None
    try:
        manifest = read_manifest(config.dir)
    except EngineError:  # damaged: of which kind it was is anybody's guess
        return config.dir if wanted else None
    return config.dir if manifest is not None and manifest.engine == TENSORRT else None


def _load_plan(bundle: Bundle, folder: Path, config: EngineConfig) -> LoadedEngine:
    if lack := unavailable(config.gpu):  # rather than that there is no engine, which could not be built either
        raise EngineError(f"{lack}; put that right, or set engine.target to onnx")
    return load_engine(bundle, folder, config)


def _first_that_loads(rungs: Sequence[Rung]) -> tuple[LoadedEngine, list[tuple[Rung, Exception]]]:
    """Return the engine of the first rung that can be loaded, and which rungs before it could not, and why."""
    passed: list[tuple[Rung, Exception]] = []
    for rung in rungs[:-1]:
        try:
            return rung.load(), passed
        except (BundleError, EngineError) as error:  # whether the bundle is to blame, the last rung shows
            passed.append((rung, error))
    return rungs[-1].load(), passed
