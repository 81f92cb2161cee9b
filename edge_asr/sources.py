"""The configured sources at work: what each is made of, how it is, and what `state` and the metrics say of it."""

from __future__ import annotations

import math
from collections.abc import Callable

from edge_asr import metrics
from edge_asr.audio.file import FileSource
from edge_asr.audio.microphone import OPENING, MicrophoneHealth, MicrophoneSource
from edge_asr.audio.source import AudioSource
from edge_asr.audio.stdin import StdinSource
from edge_asr.config import FileSourceConfig, MicrophoneSourceConfig, SourceConfig
from edge_asr.errors import EdgeAsrError

LISTENING, ENDED, FAILED = "listening", "ended", "failed"
CAPTURING, MUTED = "capturing", "muted"
LOST = ("waiting", "stalled", FAILED)


def make_source(config: SourceConfig, on_change: Callable[[], None] = lambda: None) -> AudioSource:
    """Return the source that an entry of `sources` asks for; `on_change`: its health has changed."""
    if isinstance(config, FileSourceConfig):
        return FileSource(config.path, config.name, config.realtime)
    if isinstance(config, MicrophoneSourceConfig):
        return MicrophoneSource(config.device, config.channel, config.rate, config.source_name, on_change)
    return StdinSource(name=config.name or "stdin")


def is_live(config: SourceConfig) -> bool:
    """True where chunks come at the pace of time."""
    return config.realtime if isinstance(config, FileSourceConfig) else True


class WatchedSource:
    """A source, and how it is. For the event loop's thread, but `describe` and `trouble` for any."""

    def __init__(self, config: SourceConfig, on_change: Callable[[], None]) -> None:
        """`on_change` is called when `health` or `why` have changed by themselves."""
        self.audio = make_source(config, self._changed)
        self.live = is_live(config)
        self._on_change = on_change
        self._muted = False
        self._outcome: tuple[str, str] | None = None
        self._counted: MicrophoneHealth | None = None
        if isinstance(self.audio, MicrophoneSource):
            for metric in metrics.MICROPHONE:
                metric.labels(self.name)
            self._counted = self.audio.health

    @property
    def name(self) -> str:
        """What transcripts call it."""
        return self.audio.name

    def mute(self, muted: bool) -> None:
        """Close a microphone, or open it again; other sources play on and are not heard."""
        self._muted = muted
        if isinstance(self.audio, StdinSource) and not muted:
            self.audio.forget()
        if not isinstance(self.audio, MicrophoneSource):
            self._on_change()
        elif muted:
            self.audio.mute()
        else:
            self.audio.unmute()

    def end(self, error: EdgeAsrError | None = None) -> None:
        """Say that it has come to its end, or failed."""
        self._outcome = (ENDED, "") if error is None else (FAILED, str(error))

    def describe(self) -> dict[str, str]:
        """Return name, `health` (listening; waiting, stalled, muted; ended, failed) and why it is so."""
        health, why = self._condition()
        return {"name": self.name, "health": health, "why": why}

    @property
    def trouble(self) -> str:
        """Why it is not heard though it should be; empty where it is. One that is being opened is not missed yet."""
        health, why = self._condition()
        return f"{self.name} {health}: {why}" if health in LOST and why != OPENING else ""

    def count(self) -> None:
        """Bring the metrics up to date; to be called now and then, for not all of them move with the health."""
        before = self._counted
        if before is None or not isinstance(self.audio, MicrophoneSource):
            return
        now = self._counted = self.audio.health
        metrics.MICROPHONE_GAPS.labels(self.name).inc(now.gaps - before.gaps)
        metrics.MICROPHONE_LOST.labels(self.name).inc(now.lost_s - before.lost_s)
        metrics.MICROPHONE_OVERRUNS.labels(self.name).inc(now.overruns - before.overruns)
        metrics.MICROPHONE_DROPPED.labels(self.name).inc(now.dropped_chunks - before.dropped_chunks)
        health, _ = self._condition()
        metrics.MICROPHONE_UP.labels(self.name).set(math.nan if health == MUTED else health == LISTENING)
        metrics.MICROPHONE_DRIFT.labels(self.name).set(math.nan if now.drift_ppm is None else now.drift_ppm)
        metrics.MICROPHONE_CLIPPED.labels(self.name).set(now.clipped_share)

    def _changed(self) -> None:
        self.count()
        self._on_change()

    def _condition(self) -> tuple[str, str]:
        if self._outcome is not None:
            return self._outcome
        if not isinstance(self.audio, MicrophoneSource):
            return (MUTED if self._muted else LISTENING), ""
        health = self.audio.health
        return LISTENING if health.state == CAPTURING else health.state, health.why
