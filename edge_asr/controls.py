"""What people may change while the appliance runs: mute, preset, listening for a moment. Mute and preset are kept."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_asr.attention import ALWAYS, Attention
from edge_asr.config import SegmentConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.pipeline import Listener
from edge_asr.sources import WatchedSource
from edge_asr.speech.completeness import ContentEndpoint, normalize
from edge_asr.speech.segmenter import ENDPOINTS

log = logging.getLogger(__name__)

FILE = "controls.json"


class UnknownPresetError(EdgeAsrError):
    """A preset that there is not."""


def content_endpoint(config: SegmentConfig, preset: str) -> ContentEndpoint | None:
    """Return what sets the length of a pause by its text; None: the preset alone does."""
    if not config.content_endpointing:
        return None
    return ContentEndpoint(ENDPOINTS[preset], frozenset(map(normalize, config.phrases)))


class Controls:
    """Mute, preset and listening, for all sources alike; for the event loop's thread, but the properties for any."""

    def __init__(
        self, config: SegmentConfig, attention: Attention, state_dir: Path, changed: Callable[[], None]
    ) -> None:
        """Take up what was chosen before the last stop. `changed` is called when a property has changed."""
        self._config = config
        self._attention = attention
        self._file = state_dir / FILE
        self._changed = changed
        self._heard: list[tuple[Listener, WatchedSource]] = []
        self._writing = asyncio.Lock()
        self._unkept = False
        chosen, self.trouble = _read(self._file)
        """Why nobody knows whether it was muted, and what to do; empty where all is well."""
        self._mute_chosen = chosen.get("mute") is True
        self._muted_by: set[str] = set()  # for as long as they last, not over a restart; one for each other language
        preset = chosen.get("preset")
        self.preset: str = preset if isinstance(preset, str) and preset in ENDPOINTS else config.preset
        if self.trouble:
            log.warning("%s", self.trouble)
        elif self.muted or self.preset != config.preset:
            log.info("%s, as was chosen before the last stop", self)

    @property
    def muted(self) -> bool:
        """Nobody is heard: it was chosen, or somebody wants silence for a moment."""
        return self._mute_chosen or bool(self._muted_by)

    def __str__(self) -> str:
        """How things are, for the log."""
        return f"{'muted' if self.muted else 'not muted'}, preset {self.preset}"

    def add(self, listener: Listener, source: WatchedSource) -> None:
        """Take charge of a listener, before it runs."""
        self._heard.append((listener, source))
        listener.use(ENDPOINTS[self.preset], content_endpoint(self._config, self.preset))
        if self.muted:
            self._mute(listener, source)

    async def obey(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry out a command (`mute`, `preset`, `listen`); return how things are, once that is kept.

        Raises EdgeAsrError.
        """
        result = self._do(name, arguments)
        await self.keep()
        return result

    async def keep(self) -> None:
        """Write what has changed, on a thread: a memory card may take its time, and nobody speaking is to wait."""
        async with self._writing:
            if not self._unkept:
                return
            self._unkept = False
            try:
                await asyncio.to_thread(_write, self._file, {"mute": self._mute_chosen, "preset": self.preset})
            except OSError as error:  # it holds all the same, until the next start
                self._unkept = True
                log.warning("cannot keep mute and preset for the next start: %s", error)

    def _do(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        match name:
            case "mute":
                return self.mute(arguments["mute"], arguments.get("by", ""))
            case "preset":
                return self.use(arguments["preset"])
            case "listen":
                return self.listen(arguments.get("seconds"))
        raise EdgeAsrError(f"unknown command {name}; known here: mute, preset, listen")

    def reconfigure(self, config: SegmentConfig) -> None:
        """Take another configuration; its preset holds only if it has changed there, for one may have been chosen."""
        before, self._config = self._config, config
        if config.preset != before.preset:
            self.use(config.preset)
        for listener, _ in self._heard:
            listener.use(ENDPOINTS[self.preset], content_endpoint(config, self.preset))

    def mute(self, muted: bool, by: str = "") -> Mapping[str, Any]:
        """Close all microphones and hear nothing of the other sources, or the reverse. Who asked to be heard is not.

        What is asked for `by` another program adds to what was chosen, is undone by that program, and is not kept; to
        choose not to be muted undoes it too.
        """
        before = self.muted, self._mute_chosen, self.trouble
        if not by:
            self._mute_chosen, self.trouble = muted, ""
        if by and muted:
            self._muted_by.add(by)
        elif by:
            self._muted_by.discard(by)
        elif not muted:
            self._muted_by.clear()
        if before != (self.muted, self._mute_chosen, self.trouble):
            if before[0] != self.muted or before[2]:
                self._attention.ignore()
                for listener, source in self._heard:
                    self._mute(listener, source)
            self._tell()
        return {"mute": self.muted}

    def use(self, preset: str) -> Mapping[str, Any]:
        """Change the preset. Raises UnknownPresetError."""
        if preset not in ENDPOINTS:
            raise UnknownPresetError(f"unknown preset {preset}; known here: {', '.join(ENDPOINTS)}")
        if preset != self.preset:
            self.preset = preset
            for listener, _ in self._heard:
                listener.use(ENDPOINTS[preset], content_endpoint(self._config, preset))
            self._tell()
        return {"preset": preset}

    def listen(self, seconds: float | None) -> Mapping[str, Any]:
        """Hear whoever speaks for so many seconds; 0: no longer, but whoever speaks just now is heard to the end.

        Raises EdgeAsrError.
        """
        if seconds == 0:
            self._attention.ignore()
            return {"listen": self._attention.mode, "seconds": 0.0}
        if self.muted:
            raise EdgeAsrError("muted; send off to cmd/mute first")
        if not self._heard:
            raise EdgeAsrError("nothing is listened to yet; wait until the state is ready, with a source")
        if self._attention.mode == ALWAYS:
            return {"listen": ALWAYS}
        return {"listen": self._attention.mode, "seconds": self._attention.listen(seconds)}

    def _mute(self, listener: Listener, source: WatchedSource) -> None:
        listener.mute(self.muted)
        source.mute(self.muted)

    def _tell(self) -> None:
        log.info("%s", self)
        self._unkept = True
        self._changed()


def _read(path: Path) -> tuple[Mapping[str, Any], str]:
    """Return what was chosen, and what is wrong with the file: who was muted may not be heard because of that."""
    try:
        chosen = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        chosen, why = {}, f" ({error})"
    else:
        chosen, why = chosen if isinstance(chosen, dict) else {}, ""
    if isinstance(chosen.get("mute"), bool):
        return chosen, ""
    remedy = "send off to cmd/mute, or remove the file and restart edge-asr"
    return {**chosen, "mute": True}, f"muted, for {path} is damaged{why}: {remedy}"


def _write(path: Path, chosen: Mapping[str, Any]) -> None:
    """Replace the file in one step, so that a power cut leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{FILE}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(chosen, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink()
        raise
