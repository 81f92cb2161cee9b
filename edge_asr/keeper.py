"""The engine of the daemon: it serves with what there is, and changes to a better one, or another model, meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from edge_asr import metrics
from edge_asr.canary import try_canary
from edge_asr.child import EngineBuild
from edge_asr.config import EngineConfig
from edge_asr.errors import BundleError, EngineError
from edge_asr.ladder import Ladder, load_ladder, plan_folder, rungs_of
from edge_asr.loader import engine_folder, existing, processor_target
from edge_asr.memory import ON_BOTH, available_bytes, give_back, lack, too_little
from edge_asr.recognizer.bundle import CHECKPOINT, FP32, INT8, Bundle, read_bundle
from edge_asr.recognizer.cuda import free_bytes
from edge_asr.recognizer.manifest import FILE, TENSORRT, read_manifest
from edge_asr.recognizer.runs import Step
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.recognizer.tensorrt_network import machine, unavailable

log = logging.getLogger(__name__)

POLL_S = 2.0
"""So often the manifest is looked at, which somebody else may have written."""
NICE = 19
"""The build beside a microphone takes what is left of the processor."""
SCARCE = 4
"""With less free memory than so many times the weights, nothing is served while a plan is built: that takes three."""
INT8_SHARE = 4
"""fp32 weights take so many times the memory of int8 ones."""

Stamp = tuple[int, int, int] | None
Entries = tuple[tuple[str, int, int, int], ...]
Traces = tuple[Entries, Stamp]


class EngineKeeper:
    """Loads the engine, tells which one it is, and looks after a better one."""

    def __init__(
        self, bundle: Bundle, config: EngineConfig, state_dir: Path, changed: Callable[[], None], poll_s: float = POLL_S
    ) -> None:
        """`changed` is called, on any thread, when `engine` or `why` has changed."""
        self.bundle = bundle
        """The model that answers, or will when it is loaded."""
        self._place = bundle.folder.resolve()
        self._config, self._state_dir = config, state_dir
        self._changed = changed
        self._poll_s = poll_s
        self.scheduler = Scheduler(self._load, config.batch_wait_ms / 1e3)
        self._build = EngineBuild(lambda: self._say("its engine is being built") if self._ladder is None else None)
        self._plan_build = EngineBuild(lambda: self._say("its TensorRT engine is being built"), NICE)
        self._ladder: Ladder | None = None
        self._plan: Path | None = None
        self._previous: Path | None = None
        """Where the model lies that answered before, links resolved."""
        self._seen: Stamp = None
        self._doing = self._failure = ""
        self._watching: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        """Held while another engine is built or loaded."""

    @property
    def engine(self) -> str | None:
        """The engine that answers; None before it is loaded."""
        return None if self._ladder is None else self._ladder.engine

    @property
    def step(self) -> Step | None:
        """What the inference thread is at; None while it waits, or loads an engine, however long that takes."""
        return None if self._ladder is None or self._ladder.loading else self.scheduler.step

    @property
    def building(self) -> bool:
        """True while an engine is being built, which may take the better part of an hour."""
        return self._build.running or self._plan_build.running

    @property
    def why(self) -> str:
        """Why it does not answer yet, or a lesser engine does than is wanted; empty where all is well."""
        below = "" if self._ladder is None else self._ladder.why
        return self._doing or (below and self._failure) or below

    async def start(self) -> None:
        """Load the engine, building it first where that must be. Raises BundleError or EngineError."""
        await self.scheduler.start()
        self._begin_to_watch()

    async def reload(self, folder: Path | None = None, config: EngineConfig | None = None) -> None:
        """Read the folder of a bundle anew, load its engine beside the one that answers, and change to that.

        None: those that are in use. What must be built is built before. Raises BundleError or EngineError; then
        nothing has changed.
        """
        await self._change_to(folder or self.bundle.folder, config or self._config)

    async def rollback(self) -> None:
        """Change back to the model that answered before, where it lies in another folder. Raises as `reload`."""
        if self._previous is None:
            raise EngineError(
                f"there is no other model to go back to beside {self.bundle.folder}: put each into a folder of its own,"
                " and have `model` name it, or a link to it"
            )
        await self._change_to(self._previous, self._config)

    def traces(self, folder: Path) -> Traces:
        """Return what changes whenever somebody puts something else into the folder of a model, or of our engine.

        For any thread; it looks into these folders. TensorRT's plan is another matter: `_watch`.
        """
        engine = self._config.dir or engine_folder(self.bundle, self._state_dir)
        return _entries(folder), None if engine == self._plan else _stamp(engine)

    async def _change_to(self, folder: Path, config: EngineConfig) -> None:
        if self._ladder is None:
            raise EngineError("the model is still being loaded; try again when the state is ready")
        try:
            await self._reload(folder, config)
        except (BundleError, EngineError) as error:
            log.error("%s of %s goes on: %s", self.engine, self.bundle.name, error)
            raise
        log.info("model %s on %s answers from now on", self.bundle.name, self.engine)
        self._tell()

    async def _reload(self, folder: Path, config: EngineConfig) -> None:
        if self._changing.locked():
            raise EngineError("another engine is being built or loaded already; try again when it is done")
        async with self._changing:
            try:
                await self._change_model(folder, config)
            finally:
                await asyncio.to_thread(give_back)  # what was left, or has failed
                if self._plan is not None:
                    self._seen = _stamp(self._plan)  # whatever was built there has had its chance

    async def _change_model(self, folder: Path, config: EngineConfig) -> None:
        bundle = await asyncio.to_thread(read_bundle, folder)
        loaded: list[Ladder] = []
        before = self._config, self._failure
        self._config, self._failure = config, ""
        try:
            await self.scheduler.swap(lambda: self._load_anew(bundle, loaded))
        except BaseException:
            self._config, self._failure = before
            raise
        if (left := self._place) != (place := bundle.folder.resolve()):
            self._previous = left
        self.bundle, self._ladder, self._place = bundle, loaded[0], place
        self.scheduler.batch_wait_s = config.batch_wait_ms / 1e3
        self._plan = plan_folder(bundle, config, self._state_dir)
        self._begin_to_watch()

    async def broken(self) -> None:
        """Wait until nothing can be recognised any more, and the process must start anew: raise BrokenEngineError."""
        await asyncio.wrap_future(self.scheduler.broken)

    async def close(self, timeout_s: float) -> bool:
        """End all builds, finish the request under way, release the engine. False: a thread was left behind."""
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self._plan_build.cancel)  # else it would go on beside that of the next start
        if self._ladder is None or self._changing.locked():
            await asyncio.to_thread(self._build.cancel)
        ended = await self.scheduler.close(timeout_s)
        await asyncio.to_thread(self._build.cancel)
        return ended

    def _load(self) -> Ladder:
        """Load the engine, on the inference thread."""
        self._plan = plan_folder(self.bundle, self._config, self._state_dir)
        if self._plan is not None and self._is_lacking(self.bundle, self._plan) and self._cannot_wait():
            self._build_plan(self.bundle, self._plan, self._config.strict)
        self._seen = None if self._plan is None else _stamp(self._plan)
        ladder = load_ladder(self.bundle, self._config, self._state_dir, self._build, self._tell)
        self._ladder, self._doing = ladder, ""
        metrics.show_engine(ladder.engine)
        return ladder

    def _load_anew(self, bundle: Bundle, loaded: list[Ladder]) -> Ladder:
        """Load the engine of a bundle beside the present one, on the thread `swap`, and note it in `loaded`.

        Where the best engine answers at present, no lesser one replaces it. Raises BundleError or EngineError.
        """
        assert self._ladder is not None
        best = not self._ladder.why
        plan = plan_folder(bundle, self._config, self._state_dir)
        self._check_memory(bundle)
        if plan is not None and self._is_lacking(bundle, plan):
            self._build_plan(bundle, plan, best or self._config.strict)
        if plan is not None and read_manifest(plan) is not None:
            self._check_room(plan)
        rungs = rungs_of(bundle, self._config, self._state_dir, self._build)
        ladder = Ladder(rungs, self._config.strict, only_first=best, changed=self._tell)
        try:
            try_canary(bundle, ladder)
        except BaseException:  # whatever it was: nobody else knows of this ladder
            ladder.close()
            raise
        loaded.append(ladder)
        return ladder

    def _check_memory(self, bundle: Bundle) -> None:
        """Raise EngineError where there is not enough memory to load a bundle, or to build its engine, beside ours."""
        folder = self._config.dir or engine_folder(bundle, self._state_dir)
        manifest = existing(bundle, folder, processor_target(self._config))
        built = 0 if manifest is None else sum(record.size for record in manifest.files.values())
        needed = SCARCE * _weights(bundle) if manifest is None else ON_BOTH * built
        if why := too_little("memory", available_bytes(), needed):
            raise EngineError(
                f"{bundle.folder}: there is no room for it beside {self.engine}: {why}; restart edge-asr to use it"
            )

    def _is_lacking(self, bundle: Bundle, plan: Path) -> bool:
        """Tell whether TensorRT's engine must be built, and can be: a configured folder is not ours to fill."""
        if self._config.dir is not None or unavailable(self._config.gpu) is not None:
            return False
        return existing(bundle, plan, TENSORRT, self._config.gpu, self._config.tensorrt) is None

    def _cannot_wait(self) -> bool:
        """Tell whether nothing may, or can, be served while the plan is built."""
        return self._config.strict or available_bytes() < SCARCE * _weights(self.bundle)

    def _build_plan(self, bundle: Bundle, plan: Path, needed: bool) -> None:
        """Build TensorRT's engine in a child. Raises EngineError where nothing less will do."""
        log.info("building TensorRT's engine of %s, once for this machine, in %s", bundle.name, plan)
        config = self._config.model_copy(update={"target": TENSORRT})
        try:
            self._plan_build.run(bundle, plan, config)
        except EngineError as error:
            if self._plan_build.cancelled or needed:
                raise
            self._failure = f"its TensorRT engine could not be built: {error}"
            log.warning("%s: %s", bundle.name, self._failure)
        finally:
            self._doing = ""

    def _begin_to_watch(self) -> None:
        if self._plan is not None and self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="engine")

    async def _watch(self) -> None:
        """Have TensorRT's plan built where one is wanted and there is none, and use whatever is put in its place."""
        async with self._changing:
            plan = None if self._failure else self._plan
            if plan is not None and await asyncio.to_thread(self._is_lacking, self.bundle, plan):
                await asyncio.to_thread(self._build_beside, plan)
                self._tell()
        while True:
            async with self._changing:
                if self._plan is not None and (stamp := _stamp(self._plan)) not in (self._seen, None):
                    self._seen = stamp
                    await self._swap()
            await asyncio.sleep(self._poll_s)

    def _build_beside(self, plan: Path) -> None:
        try:
            self._build_plan(self.bundle, plan, self._config.strict)
        except EngineError as error:
            log.debug("%s", error)  # everything stops

    async def _swap(self) -> None:
        """Change to the plan, if it can be loaded beside what answers, and agrees with that."""
        loaded: list[Ladder] = []
        try:
            await self.scheduler.swap(lambda: self._load_beside(loaded))
        except (BundleError, EngineError) as error:
            self._failure = f"its new TensorRT engine is not used: {error}"
            log.warning("%s goes on: %s", self.engine, self._failure)
        except Exception:  # a bug there must not end what serves well
            log.exception("%s goes on, for its new TensorRT engine cannot be loaded", self.engine)
        else:
            self._ladder, self._failure = loaded[0], ""
            log.info("%s answers from now on", self.engine)
        await asyncio.to_thread(give_back)
        self._tell()

    def _load_beside(self, loaded: list[Ladder]) -> Ladder:
        """Load the plan, on the thread `swap`, and note it in `loaded`. Raises EngineError."""
        assert self._plan is not None
        self._check_room(self._plan)
        rungs = rungs_of(self.bundle, self._config, self._state_dir, self._build)
        ladder = Ladder(rungs, self._config.strict, only_first=True, changed=self._tell)
        loaded.append(ladder)
        return ladder

    def _check_room(self, plan: Path) -> None:
        """Raise EngineError where the plan and what answers now do not fit into memory together."""
        manifest = read_manifest(plan)
        if manifest is None:
            raise EngineError(f"{plan}: its manifest is gone")
        facts = machine(self._config.gpu)
        size = sum(record.size for record in manifest.files.values())
        if why := lack(size, available_bytes(), None if facts.integrated else free_bytes(self._config.gpu)):
            raise EngineError(
                f"{plan}: there is no room for it beside {self.engine}: {why}; restart edge-asr to use it"
            )

    def _tell(self) -> None:
        metrics.show_engine(self.engine or "")
        self._changed()

    def _say(self, doing: str) -> None:
        self._doing = doing
        self._changed()


def _weights(bundle: Bundle) -> int:
    """Return how many bytes the weights of a bundle take in fp32."""
    kind = next(kind for kind in (FP32, CHECKPOINT, INT8) if kind in bundle.files)
    return bundle.files[kind].stat().st_size * (INT8_SHARE if kind == INT8 else 1)


def _stamp(folder: Path) -> Stamp:
    """Return what changes whenever a manifest is written anew; None where there is none."""
    try:
        status = (folder / FILE).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _entries(folder: Path) -> Entries:
    """Return what changes whenever a file right in a folder does, or a link to it points elsewhere; empty: it is gone.

    The times of access do not count.
    """
    try:
        found = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
    except OSError:
        return ()
    return tuple(sorted((name, at.st_mtime_ns, at.st_ino, at.st_size) for name, at in found))
