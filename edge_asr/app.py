"""The composition root: the only module that names concrete classes. It starts the parts and stops them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from edge_asr import __version__, logs, metrics
from edge_asr.answers import Gates, Labels, TranscriptSink
from edge_asr.attention import PHRASE, Attention
from edge_asr.budget import LatencyBudget, LateWatch, RecentResponses
from edge_asr.config import Config, FileSourceConfig, GatesConfig, ListenConfig, SegmentConfig, SourceConfig
from edge_asr.controls import Controls, content_endpoint
from edge_asr.device import DeviceCare
from edge_asr.errors import ConfigError, EdgeAsrError
from edge_asr.keeper import EngineKeeper
from edge_asr.ladder import load_ladder
from edge_asr.pipeline import Listener, Pace
from edge_asr.publish.client import client_id
from edge_asr.publish.dialect import Dialect
from edge_asr.publish.hermes import Hermes
from edge_asr.publish.home_assistant import HomeAssistant
from edge_asr.publish.mqtt import MqttPublisher
from edge_asr.publish.outbox import DiskOutbox, MemoryOutbox, Outbox, outbox_path
from edge_asr.recognizer.bundle import Bundle, read_bundle
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.reload import Reloader, extending
from edge_asr.service import Hearing, Pauses, SpeechService
from edge_asr.sources import WatchedSource, is_live
from edge_asr.speech.segmenter import ENDPOINTS, Rules, Segmenter
from edge_asr.speech.vad import SileroDetector, SteadyDetector
from edge_asr.speech.wake_phrase import WakePhrase
from edge_asr.systemd import Notifier, Progress, feed_watchdog
from edge_asr.transcribe import transcribe
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE, Partial, Transcript

if TYPE_CHECKING:
    from edge_asr.serve.captions import Captions
    from edge_asr.serve.server import SpeechServer

log = logging.getLogger(__name__)

STATE_EVERY_S = 10.0
SILENCE = 1e-4
"""What is not louder than that is nothing: -80 dB of full scale."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def segment_rules(config: SegmentConfig) -> Rules:
    """Turn the configuration's seconds into chunks."""
    return Rules(
        threshold=config.threshold,
        endpoint=ENDPOINTS[config.preset],
        pre_roll=round(config.pre_roll_ms / 1e3 / CHUNK_S),
        min_speech=round(config.min_speech_ms / 1e3 / CHUNK_S),
        max_length=math.ceil(config.max_s * SAMPLE_RATE / CHUNK_SAMPLES),  # a sound of exactly max_s stays whole
    )


def choose_gates(config: GatesConfig, bundle: Bundle) -> Gates:
    """Return the configured thresholds, the bundle's card where they are null, off where it has none."""
    keys = [field.name for field in dataclasses.fields(Gates)]
    configured = {key: getattr(config, key) for key in keys}
    return Gates(**{key: bundle.gates.get(key, 0.0) if configured[key] is None else configured[key] for key in keys})


def wake_phrase(config: ListenConfig) -> WakePhrase | None:
    """Return how an address is told; None: everybody is meant."""
    return WakePhrase(config.phrases) if config.mode == PHRASE else None


def pauses(config: SegmentConfig) -> dict[str, Pauses]:
    """Return what ends a segment of a stream, by the preset."""
    return {name: Pauses(ENDPOINTS[name], content_endpoint(config, name)) for name in ENDPOINTS}


def make_outbox(config: Config) -> Outbox:
    """Return what keeps transcripts until the broker has them. Raises ConfigError where another process has it."""
    if not (config.outbox.enabled and config.mqtt.enabled):
        return MemoryOutbox()
    return DiskOutbox(config.outbox, outbox_path(config.outbox, config.state_dir))


def choose_pace(source: SourceConfig, config: Config) -> Pace:
    """Return how a listener keeps up: microphones do not wait, nor do files that stand for one; a pipe can."""
    live = is_live(source)
    waits = source.kind == "stdin" or (isinstance(source, FileSourceConfig) and not live)
    return Pace(
        live,
        None if waits else config.budget.max_backlog_s,
        config.segment.partial_interval_ms if live and (config.mqtt.enabled or config.http.enabled) else 0,
    )


class _Answering:
    """The model that answers at present; see `service.Model`."""

    def __init__(self, keeper: EngineKeeper, gates: Callable[[], GatesConfig]) -> None:
        self._keeper = keeper
        self._gates = gates

    @property
    def name(self) -> str:
        return self._keeper.bundle.name

    @property
    def engine(self) -> str | None:
        return self._keeper.engine

    @property
    def gates(self) -> Gates:
        return choose_gates(self._gates(), self._keeper.bundle)


class _Shown:
    """Shows what is said to those who watch; see TranscriptSink. `settle`: None where the publisher shows finals."""

    def __init__(self, captions: Captions, settle: Callable[[Transcript], Transcript] | None) -> None:
        self._captions = captions
        self._settle = settle

    def offer(self, transcript: Transcript) -> None:
        if self._settle is not None:
            self._captions.offer(self._settle(transcript))

    def offer_partial(self, partial: Partial) -> None:
        self._captions.offer_partial(partial)


def transcribe_files(config: Config, paths: Sequence[str]) -> Iterator[tuple[str, Transcript | EdgeAsrError]]:
    """Yield every file's transcripts, or the error that a file met; the others are done all the same."""
    bundle = read_bundle(config.model)
    recognizer = load_ladder(bundle, config.engine, config.state_dir)
    try:
        for path in paths:
            labels = Labels(config.device_id, f"file:{path}", bundle.name)
            try:
                for transcript in transcribe(path, recognizer, SileroDetector(), segment_rules(config.segment), labels):
                    yield path, transcript
            except EdgeAsrError as error:
                yield path, error
    finally:
        recognizer.close()


class Daemon:
    """The always-on service: `async with Daemon(config).running() as daemon: await daemon.finished()`."""

    def __init__(self, config: Config, reread: Callable[[], Config] | None = None) -> None:
        """Read the bundle. `reread`: returns the configuration as it is now. Raises BundleError and ConfigError."""
        self._config = config
        self._notifier = Notifier()
        self._keeper = EngineKeeper(read_bundle(config.model), config.engine, config.state_dir, self._publish_state)
        self._budget = LatencyBudget(config.budget.response_ms)
        self._responses = RecentResponses()
        self._device = DeviceCare()
        self._late_watch = LateWatch(config.budget.late_share)
        self._attention = Attention(config.listen.mode, wake_phrase(config.listen), config.listen.seconds)
        self._pauses = pauses(config.segment)
        self._controls = Controls(config.segment, self._attention, config.state_dir, self._publish_state)
        self._describing = threading.Lock()
        self._outbox = make_outbox(config)
        self._publisher = self._make_publisher() if config.mqtt.enabled else None
        self._server = self._make_server()
        metrics.WAITING.set_function(lambda: self._keeper.scheduler.waiting)
        metrics.BROKER_UP.set_function(
            lambda: math.nan if (mqtt := self._publisher) is None else mqtt.stats().connected
        )
        metrics.BUILD.info({"version": __version__})
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sources: list[WatchedSource] = []
        self._failures: list[EdgeAsrError] = []
        self._listeners: list[Listener] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._published = self._late = 0
        self._stop = asyncio.Event()
        self._reloader = Reloader(config, reread, self._keeper, self._notifier, self._prepare, self._publish_state)
        self.abandoned_inference = False
        """After the stop: an inference took longer than `drain_s`, or the model is still being loaded."""
        self._drain_by: float | None = None

    def _make_publisher(self) -> MqttPublisher:
        config = self._config
        command = self.command if config.mqtt.commands else None
        dialects: list[Dialect] = []
        if config.home_assistant.enabled:
            base, commands = config.mqtt.base, config.mqtt.commands
            dialects.append(
                HomeAssistant(config.home_assistant, base, config.device_id, __version__, commands=commands)
            )
        if config.hermes.enabled:
            listen_s = config.listen.seconds
            dialects.append(Hermes(config.hermes, config.device_id, command, self._wake_publisher, listen_s=listen_s))
        return MqttPublisher(
            config.mqtt,
            config.device_id,
            self._outbox,
            client_id=client_id(config.mqtt, config.device_id, config.state_dir),
            finish=self._settled,
            command=command,
            dialects=dialects,
            changed=self._publish_state,
        )

    def _make_server(self) -> SpeechServer | None:
        """Return the speech server; None: it is not wanted. Raises ConfigError."""
        config = self._config
        if not (config.http.enabled or config.wyoming.enabled or config.funasr.enabled):
            return None
        try:
            from edge_asr.serve.server import SpeechServer
        except ImportError as error:
            asked_for = {"http", "wyoming", "funasr"} & config.model_fields_set
            if asked_for:
                raise ConfigError(
                    f"{min(asked_for)}: {error.name} is not installed: pip install 'edge-asr[serve]', or set"
                    " enabled to false"
                ) from error
            log.info("no speech server: %s is not installed (pip install 'edge-asr[serve]')", error.name)
            return None
        limits = config.http.limits
        hearing = Hearing(
            segment_rules(config.segment),
            self._pauses,
            lambda: self._controls.preset,
            config.segment.partial_interval_ms,
            SileroDetector,
            lambda: self._device.strain,
        )
        service = SpeechService(
            self._keeper.scheduler,
            _Answering(self._keeper, lambda: self._config.gates),
            hearing,
            self._budget,
            config.device_id,
            streams=limits.streams,
            wait_s=limits.wait_s,
        )
        return SpeechServer(service, config.http, config.wyoming, config.funasr, self, self._publish_state)

    def _wake_publisher(self) -> None:
        if self._publisher is not None:
            self._publisher.wake()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Daemon]:
        """Start publisher, server, engine and listeners, in this order, and stop them in reverse."""
        self._loop = asyncio.get_running_loop()
        reloading: asyncio.Task[None] | None = None
        try:
            self._start_publisher()
            if self._server is not None:
                self._server.start()
            if await self._start_engine():
                self._start_listeners()
                self._notifier.ready()
            progress = Progress(lambda: self._keeper.step)
            watchdog = asyncio.create_task(feed_watchdog(self._notifier, progress), name="watchdog")
            heartbeat = asyncio.create_task(self._report(), name="state")
            reloading = asyncio.create_task(self._reloader.run(), name="reload")
            try:
                yield self
            finally:
                heartbeat.cancel()
                watchdog.cancel()
        finally:
            self._reloader.end()
            self._notifier.stopping()
            await self._stop_listeners()
            if self._server is not None:
                await asyncio.to_thread(self._server.close, self._drain_left_s())
            await self._stop_engine()  # which ends a reload, too
            if reloading is not None:
                reloading.cancel()
            await self._stop_publisher()

    @property
    def ports(self) -> Mapping[str, int]:
        """The ports that the speech server has opened, by the section of the configuration."""
        return {} if self._server is None else self._server.ports.copy()

    @property
    def scheduler(self) -> Scheduler:
        """The one queue of all recognitions."""
        return self._keeper.scheduler

    def stop(self) -> None:
        """Ask the daemon to end."""
        self._stop.set()

    def reload_soon(self) -> None:
        """Ask for configuration and model to be reloaded once that can be."""
        self._reloader.soon()

    async def finished(self) -> None:
        """Return when asked to stop, or when all sources have ended and everything is published.

        Raises the first failure of a source once the others have ended, and BrokenEngineError at once.
        """
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        listening = asyncio.create_task(self._listened(), name="listened")
        broken = asyncio.create_task(self._keeper.broken(), name="broken")
        try:
            await asyncio.wait([stopping, listening, broken], return_when=asyncio.FIRST_COMPLETED)
            for ended in (broken, listening):
                if ended.done():
                    ended.result()
        finally:
            for waiting in (stopping, listening, broken):
                waiting.cancel()
        if not self._stop.is_set():
            await self._drained()
            self._tell_losses()
        if self._failures and not self._stop.is_set():
            raise self._failures[0]

    async def _listened(self) -> None:
        """Return when all sources have ended; without sources never: there is nothing that could end by itself."""
        if not self._tasks:
            await self._stop.wait()
        await asyncio.gather(*self._tasks)

    def _start_publisher(self) -> None:
        if self._publisher is not None:
            self._publisher.start()
            mqtt = self._config.mqtt
            log.info("publishing on %s/%s/... at %s:%d", mqtt.base, self._config.device_id, mqtt.host, mqtt.port)
        self._publish_state()

    async def _start_engine(self) -> bool:
        """Load the engine. False: asked to stop meanwhile, which does not wait for an engine to be built."""
        started = time.monotonic()
        loading = asyncio.create_task(self._keeper.start(), name="load")
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        with extending(self._notifier, lambda: self._keeper.building):
            await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            return False
        loading.result()
        model, engine = self._keeper.bundle.name, self._keeper.engine
        log.info("model %s on %s, loaded in %.1f s", model, engine, time.monotonic() - started)
        return True

    def _start_listeners(self) -> None:
        for config in self._config.sources:
            source = WatchedSource(config, self._publish_state)
            listener = self._make_listener(source, choose_pace(config, self._config))
            self._controls.add(listener, source)
            self._sources.append(source)
            self._listeners.append(listener)
            self._tasks.append(asyncio.create_task(self._listen(listener, source), name=f"listen {source.name}"))
        names = ", ".join(source.name for source in self._sources)
        log.info("listening to %s", names or "nothing: no sources are configured")
        self._publish_state()

    def _make_listener(self, source: WatchedSource, pace: Pace) -> Listener:
        sinks: list[TranscriptSink] = [] if self._publisher is None else [self._publisher]
        if self._server is not None:
            sinks.append(_Shown(self._server.captions, None if self._publisher is not None else self._settle))
        return Listener(
            source.audio,
            SteadyDetector(SileroDetector(), self._config.segment.threshold),
            Segmenter(segment_rules(self._config.segment)),
            self._keeper.scheduler,
            sinks,
            Labels(self._config.device_id, source.name, self._keeper.bundle.name),
            choose_gates(self._config.gates, self._keeper.bundle),
            pace,
            self._budget,
            self._attention.ear(),
            strained=lambda: self._device.strain,
        )

    async def _listen(self, listener: Listener, source: WatchedSource) -> None:
        """Run one listener; its failure is its own."""
        try:
            await listener.run()
            source.end()
        except EdgeAsrError as error:
            log.error("%s failed: %s", source.name, error)
            self._failures.append(error)
            source.end(error)
        self._publish_state()

    async def _stop_listeners(self) -> None:
        """End the sources, let what was being said be recognised for up to `drain_s`, then give up."""
        for listener in self._listeners:
            listener.stop()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self._drain_left_s())
            for task in late:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stop_engine(self) -> None:
        loading = self._keeper.scheduler.loading
        self.abandoned_inference = not await self._keeper.close(0 if loading else self._drain_left_s())
        if self.abandoned_inference:
            what = "the loading of the model" if loading else "the inference under way takes too long and"
            log.warning("%s is abandoned", what)

    async def _drained(self) -> None:
        """Wait for the broker to have everything, until `drain_s` have passed or somebody wants us to stop."""
        publisher = self._publisher
        left = 0
        while publisher is not None and (left := publisher.stats().queued):
            if not self._drain_left_s() or self._stop.is_set():
                break
            await asyncio.sleep(0.02)
        self._publish_state()  # with the last counts
        if left:
            where = f"{self._config.mqtt.host}:{self._config.mqtt.port}"
            lasting = self._config.outbox.enabled and not self._outbox.stats().trouble  # else they are in memory
            kept = ", which wait in the outbox for the next start" if lasting else ""
            why = (publisher and publisher.trouble) or "is it running?"
            self._failures.append(
                EdgeAsrError(f"transcripts not delivered to the broker at {where}: {left}{kept}; {why}")
            )

    def _tell_losses(self) -> None:
        """Make it a failure that something said in the sources has come to nothing."""
        if failed := sum(listener.failed for listener in self._listeners):
            self._failures.append(
                EdgeAsrError(f"segments lost because the engine failed on them: {failed}; see the log")
            )
        if lost := sum(listener.lost for listener in self._listeners):
            self._failures.append(EdgeAsrError(f"segments lost because too many waited: {lost}; take a smaller model"))
        if self._publisher is not None and (dropped := self._publisher.stats().dropped_transcripts):
            self._failures.append(
                EdgeAsrError(
                    f"transcripts dropped before the broker had them: {dropped}; is it running and fast enough?"
                )
            )

    async def _stop_publisher(self) -> None:
        if self._publisher is not None:
            await asyncio.to_thread(self._publisher.close, self._drain_left_s())

    def _drain_left_s(self) -> float:
        """Return what is left of `drain_s`, which runs from the first question on."""
        if self._drain_by is None:
            self._drain_by = time.monotonic() + self._config.drain_s
        return max(0.0, self._drain_by - time.monotonic())

    def _settled(self, transcript: Transcript) -> Transcript:
        """Complete the trace on the publisher thread, and show the transcript to whoever watches."""
        settled = self._settle(transcript)
        if self._server is not None:
            self._server.captions.offer(settled)
        return settled

    def _settle(self, transcript: Transcript) -> Transcript:
        """Complete the trace at the last moment before the transcript is serialised."""
        settled = self._budget.settle(transcript, time.monotonic())
        self._published += 1
        if settled.marks is None:  # played as fast as it goes: nobody waited for it
            return settled
        if settled.lost:
            if self._late_watch.add({"queue": settled.latency_ms["response"]}, late=True):
                self._publish_state()
            return settled
        self._responses.add(settled.latency_ms["response"])
        metrics.RESPONSE.observe(settled.latency_ms["response"] / 1e3)
        metrics.observe_stages("mqtt", settled.latency_ms)
        late = settled.within_budget is False
        if self._late_watch.add(settled.latency_ms, late):
            self._publish_state()
        if late:
            self._late += 1
            metrics.LATE.inc()
            log.warning(
                "%s: late, %.0f ms instead of %.0f: %s", settled.source, settled.latency_ms["response"],
                self._budget.response_ms, {stage: round(value) for stage, value in settled.latency_ms.items()},
            )  # fmt: skip
        return settled

    def command(self, name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        """Carry a command of any thread out on the loop's; the future raises EdgeAsrError."""
        assert self._loop is not None  # the publisher is started by `running`
        changing = {"reload": self._reloader.reload, "rollback": self._reloader.rollback}
        obeying = changing[name]() if name in changing else self._controls.obey(name, arguments)
        return asyncio.run_coroutine_threadsafe(obeying, self._loop)

    def _prepare(self, config: Config) -> Callable[[], None]:
        """Look whether a configuration can be used while we run; return what uses it. Raises ConfigError."""
        serve = None if self._server is None else self._server.prepare(config.http, config.funasr)

        def use() -> None:
            before, self._config = self._config, config
            if config.log != before.log:
                logs.set_up(config.log)
            self._controls.reconfigure(config.segment)
            self._pauses.update(pauses(config.segment))
            self._attention.use(config.listen.mode, wake_phrase(config.listen))
            bundle = self._keeper.bundle
            for listener in self._listeners:
                listener.follow(bundle.name, choose_gates(config.gates, bundle))
            if serve is not None:
                serve()

        return use

    async def _report(self) -> None:
        """Publish the state now and then: its counters move without anybody saying so."""
        while True:
            await asyncio.to_thread(self._device.look)  # sensors of a Jetson take their time
            for source in self._sources:
                source.count()
            self._publish_state()
            await asyncio.sleep(STATE_EVERY_S)

    def _publish_state(self) -> None:
        """Publish how things are now; from any thread, and the one that looked last publishes last."""
        with self._describing:
            state = self.describe()
            metrics.show_state(state["state"])
            metrics.MODEL.info({"model": state["model"]})
            self._notifier.status(": ".join(filter(None, (state["state"], state["why"]))))
            if self._publisher is not None:
                self._publisher.set_state(state)
            if self._server is not None:
                self._server.captions.set_state(state)

    def levels(self) -> dict[str, float]:
        """Return the loudest moment of each source since it was asked last, in dB of full scale; for any thread."""
        listening = zip(self._sources, self._listeners, strict=False)  # one is added to both, not at once
        return {source.name: 20 * math.log10(max(listener.take_peak(), SILENCE)) for source, listener in listening}

    def describe(self) -> dict[str, Any]:
        """Return how everything is, as `state` tells it; for any thread."""
        state, why = self._condition()
        return {
            "device_id": self._config.device_id,
            "state": state,
            "why": why,
            "engine": self._keeper.engine,
            "model": self._keeper.bundle.name,
            "sources": [source.describe() for source in self._sources],
            "mute": self._controls.muted,
            "preset": self._controls.preset,
            "listen": self._attention.mode,
            "budget": {
                "response_ms": self._budget.response_ms,
                "count": self._published,
                "late": self._late,
                **self._responses.percentiles(),
            },
            "outbox": self._outbox.stats().to_json(),
            "device": self._device.describe(),
            "broker": None if self._publisher is None else self._publisher.describe(),
            "version": __version__,
        }

    def _condition(self) -> tuple[str, str]:
        """Return the state and why it is so: an engine that is not the wanted one answers all the same."""
        if self._keeper.engine is None:
            return "starting", self._keeper.why or "the model is loading"
        sources = (source.trouble for source in self._sources)
        broker = "" if self._publisher is None else self._publisher.trouble
        server = "" if self._server is None else self._server.trouble
        others = (self._late_watch.why, self._device.strain, broker, self._outbox.stats().trouble, server)
        troubles = "; ".join(filter(None, (self._controls.trouble, *sources, *others)))
        lesser = "; ".join(filter(None, (self._keeper.why, self._reloader.why)))
        return ("degraded", troubles) if troubles else ("ready", lesser)


async def run_daemon(config: Config, reread: Callable[[], Config] | None = None) -> None:
    """Run until SIGTERM, SIGINT or the end of all sources. `reread`: see Daemon. Raises EdgeAsrError."""
    daemon = Daemon(config, reread)
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, _stop_on_signal, daemon, loop)
    with _reloading_on_hangup(daemon, loop):
        async with daemon.running():
            await daemon.finished()
    if daemon.abandoned_inference:
        logging.shutdown()
        os._exit(0)  # onnxruntime aborts the process when the interpreter ends under a running inference


@contextlib.contextmanager
def _reloading_on_hangup(daemon: Daemon, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Let SIGHUP reload, but not where it tells that the terminal is gone, or is ignored, as by nohup."""
    if _has_terminal() or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return
    loop.add_signal_handler(signal.SIGHUP, daemon.reload_soon)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the end is near, and is to be a clean one


def _has_terminal() -> bool:
    """Tell whether a terminal controls this process: SIGHUP says then that it is gone."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _stop_on_signal(daemon: Daemon, loop: asyncio.AbstractEventLoop) -> None:
    """End cleanly; a second signal ends the process at once, whatever it waits for."""
    for number in STOP_SIGNALS:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    log.info("stopping")
    daemon.stop()
