"""Another configuration or model while the appliance runs: when somebody asks for it, or their files have changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from edge_asr.config import Config
from edge_asr.config_changes import Changes, changes
from edge_asr.errors import ConfigError, EdgeAsrError
from edge_asr.keeper import EngineKeeper
from edge_asr.systemd import Notifier, extend_timeout

log = logging.getLogger(__name__)

POLL_S = 2.0
"""So often the folders of the model and of its engine are looked at."""
QUIET_S = 5.0
"""What is put there is taken once it has been left alone for so long: copying it takes its time."""

Use = Callable[[], None]


class Reloader:
    """Reads the configuration anew, changes the model, then has everything use both; or nothing changes, and says why.

    For the event loop's thread, but `why` for any.
    """

    def __init__(
        self,
        config: Config,
        read: Callable[[], Config] | None,
        keeper: EngineKeeper,
        notifier: Notifier,
        prepare: Callable[[Config], Use],
        changed: Callable[[], None],
    ) -> None:
        """`read` returns the configuration as it is now, None: it stays; it raises ConfigError.

        `prepare` tries whether all parts can use a configuration, on any thread, raises ConfigError where they cannot,
        and returns what makes them use it, and the present model. `changed` is called when `why` has changed.
        """
        self._config = config
        self._read = read
        self._keeper = keeper
        self._notifier = notifier
        self._prepare = prepare
        self._changed = changed
        self._asked = asyncio.Event()
        self._seen = keeper.traces(config.model)
        self._failure = self._back = ""
        self._later: tuple[str, ...] = ()
        self._ending = False

    @property
    def why(self) -> str:
        """What is not as the files say; empty where all is."""
        later = f"restart edge-asr for {', '.join(self._later)}" if self._later else ""
        return "; ".join(filter(None, (self._failure, self._back, later)))

    def soon(self) -> None:
        """Ask for a reload once it can be; who asks meanwhile is content with the same."""
        self._asked.set()

    def end(self) -> None:
        """Begin no other reload of one's own: everything stops."""
        self._ending = True

    async def reload(self) -> dict[str, Any]:
        """Change to configuration and model as they are now; return what answers. Raises EdgeAsrError: nothing changed.

        The answer names the keys that have changed, and those that wait for a restart.
        """
        try:
            change, use = await asyncio.to_thread(self._try)
        except ConfigError:
            self._seen = await asyncio.to_thread(self._keeper.traces, self._config.model)  # this has had its chance
            raise
        with self._noting(change.config):
            await self._keeper.reload(change.config.model, change.config.engine)
        self._config, self._later = change.config, change.later
        self._failure = self._back = ""
        use()
        if change.now:
            log.info("the configuration has changed: %s", ", ".join(change.now))
        if change.later:
            log.warning("the configuration has changed in what waits for a restart: %s", ", ".join(change.later))
        self._changed()
        told = {"changed": list(change.now), "restart_needed": list(change.later)}
        return {**self._answering(), **{name: keys for name, keys in told.items() if keys}}

    async def rollback(self) -> dict[str, Any]:
        """Change back to the model that answered before; return what answers. Raises EdgeAsrError: nothing changed."""
        use = await asyncio.to_thread(self._prepare, self._config)
        with self._noting(self._config):
            await self._keeper.rollback()
        folder = self._keeper.bundle.folder
        is_other = folder.resolve() != self._config.model.resolve()
        self._back = f"rolled back to {folder}; a reload takes {self._config.model}" if is_other else ""
        self._failure = ""
        use()
        self._changed()
        return self._answering()

    async def run(self) -> None:
        """Reload whenever it is wanted, one time after another, and tell systemd and the state how it went."""
        self._seen = self._seen[0], self._keeper.traces(self._config.model)[1]  # the engine may have been built
        while True:
            await self._wanted()
            self._asked.clear()
            if self._ending:
                return
            self._notifier.reloading()
            try:
                with extending(self._notifier, lambda: self._keeper.building):
                    await self.reload()
            except EdgeAsrError as error:  # it is in the log
                self._fail(str(error))
            except Exception as error:  # a bug there must not end what serves well
                log.exception("not reloaded")
                self._fail(repr(error))
            finally:
                self._notifier.ready()

    def _try(self) -> tuple[Changes, Use]:
        """Return what is to change, and what makes the parts use it. Raises ConfigError, in one line."""
        try:
            change = changes(self._config, self._config if self._read is None else self._read())
            return change, self._prepare(change.config)
        except ConfigError as error:
            why = "; ".join(str(error).splitlines())
            log.error("the configuration stays as it is: %s", why)
            raise ConfigError(why) from error

    def _fail(self, why: str) -> None:
        self._failure = f"the last reload failed: {why}"
        self._changed()

    def _answering(self) -> dict[str, Any]:
        return {"model": self._keeper.bundle.name, "engine": self._keeper.engine}

    @contextlib.contextmanager
    def _noting(self, config: Config) -> Iterator[None]:
        """Note what is in the folders: what changes from here on is news, but for the engine that we build."""
        entries, _ = self._keeper.traces(config.model)
        try:
            yield
        finally:
            self._seen = entries, self._keeper.traces(config.model)[1]

    async def _wanted(self) -> None:
        """Return when a reload is asked for, or something else lies in the folders and is left alone."""
        last, since = self._seen, time.monotonic()
        while not self._asked.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._asked.wait(), POLL_S)
            if self._asked.is_set() or not self._config.engine.watch:
                continue
            now = await asyncio.to_thread(self._keeper.traces, self._config.model)
            if now != last:
                last, since = now, time.monotonic()
            elif now != self._seen and now[0] and time.monotonic() - since >= QUIET_S:  # not where it is gone
                log.info("there is something else in %s", self._config.model)
                return


@contextlib.contextmanager
def extending(notifier: Notifier, building: Callable[[], bool]) -> Iterator[None]:
    """Have systemd wait for an engine that is being built, but not for ever for anything else."""
    task = asyncio.create_task(extend_timeout(notifier, building), name="extend")
    try:
        yield
    finally:
        task.cancel()
