"""Recordings and streams of the network: the same texts as files and microphones, and behind those."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from bundled import load, sound_of, transcripts
from mosquitto import PATIENCE_S

from edge_asr.answers import Gates
from edge_asr.budget import LatencyBudget
from edge_asr.errors import EngineError, NotReadyError, StreamEndedError, TooManyStreamsError
from edge_asr.recognizer.bundle import FP32
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.service import AT_ONCE, Hearing, Pauses, SpeechService
from edge_asr.speech.segmenter import ENDPOINTS, Rules
from edge_asr.speech.vad import SileroDetector
from edge_asr.types import SAMPLE_RATE, Partial, Recognition, Samples, Transcript

TEXTS = transcripts()
NAMES = sorted(TEXTS)
PAUSE = np.zeros(SAMPLE_RATE, np.float32)


@dataclass
class Answering:
    name: str = "paraformer-tiny"
    engine: str | None = FP32
    gates: Gates = field(default_factory=Gates)


@dataclass
class Sink:
    finals: list[Transcript] = field(default_factory=list)
    partials: list[Partial] = field(default_factory=list)

    def offer(self, transcript: Transcript) -> None:
        self.finals.append(transcript)

    def offer_partial(self, partial: Partial) -> None:
        self.partials.append(partial)

    @property
    def texts(self) -> list[str]:
        return [transcript.text for transcript in self.finals]


Make = Callable[..., SpeechService]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Return what makes a service on the real engine; at the end all is closed."""
    scheduler = Scheduler(lambda: load(FP32))
    await scheduler.start()
    made: list[SpeechService] = []

    def service(**keys: object) -> SpeechService:
        presets = {name: Pauses(chunks) for name, chunks in ENDPOINTS.items()}
        hearing = Hearing(Rules(), presets, lambda: "default", 300, SileroDetector)
        model = keys.pop("model", Answering())
        used = keys.pop("scheduler", scheduler)
        made.append(SpeechService(used, model, hearing, LatencyBudget(300), "hall", **keys))  # type: ignore[arg-type]
        return made[-1]

    yield service
    for one in made:
        await one.close()
    await scheduler.close(PATIENCE_S)


async def until(condition: Callable[[], object]) -> None:
    """Return when the condition holds."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), PATIENCE_S)


async def texts_of(service: SpeechService, samples: Samples) -> list[str]:
    return [transcript.text async for transcript in service.transcribe(samples, "request")]


@pytest.mark.parametrize("name", NAMES)
async def test_a_recording_has_the_text_of_the_file(make: Make, name: str) -> None:
    assert await texts_of(make(), sound_of(name)) == [TEXTS[name]]


async def test_recordings_asked_for_at_once_are_not_mixed_up(make: Make) -> None:
    service = make()
    found = await asyncio.gather(*(texts_of(service, sound_of(name)) for name in NAMES * 3))
    assert found == [[TEXTS[name]] for name in NAMES * 3]


async def test_a_long_recording_is_cut_and_told_where(make: Make) -> None:
    names = (NAMES * 8)[: max(12, len(NAMES))]
    whole = np.concatenate([part for name in names for part in (sound_of(name), PAUSE)])
    assert len(whole) > 30 * SAMPLE_RATE
    found = [transcript async for transcript in make().transcribe(whole, "request")]
    assert [transcript.text for transcript in found] == [TEXTS[name] for name in names]
    offsets = [transcript.offset_s or 0.0 for transcript in found]
    assert offsets == sorted(offsets)
    assert offsets[-1] > 20


async def test_silence_has_one_transcript_without_text(make: Make) -> None:
    for seconds in (1, 40):
        [transcript] = [one async for one in make().transcribe(np.tile(PAUSE, seconds), "request")]
        assert (transcript.text, transcript.engine, transcript.tokens) == ("", FP32, ())
    assert await texts_of(make(), PAUSE[:0]) == [""]


async def test_nothing_is_answered_before_the_model_is_there(make: Make) -> None:
    service = make(model=Answering(engine=None))
    assert not service.ready
    with pytest.raises(NotReadyError, match="being loaded"):
        await texts_of(service, PAUSE)
    with pytest.raises(NotReadyError):
        service.stream(Sink(), "client")


async def test_who_gives_up_has_nothing_waiting_any_more(make: Make) -> None:
    """The engine is busy elsewhere: what was submitted waits until its caller goes."""

    class Held(Scheduler):
        def __init__(self) -> None:
            super().__init__(lambda: load(FP32))

    scheduler = Held()  # not started: nothing is ever answered
    service = make(scheduler=scheduler)
    names = NAMES * 6
    whole = np.concatenate([part for name in names for part in (sound_of(name), PAUSE)])
    asking = asyncio.create_task(texts_of(service, whole))
    await until(lambda: len(scheduler._waiting) == AT_ONCE)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert len(scheduler._waiting) == 0


async def test_a_failing_engine_is_an_error_and_not_an_empty_text(make: Make) -> None:
    class Broken:
        def recognize(self, samples: Samples) -> Recognition:
            raise EngineError("does not work today")

        def close(self) -> None:
            pass

    scheduler = Scheduler(Broken)
    await scheduler.start()
    service = make(scheduler=scheduler)
    try:
        with pytest.raises(EngineError, match="today"):
            await texts_of(service, sound_of(NAMES[0]))
        sink = Sink()
        stream = service.stream(sink, "client")
        await stream.push(sound_of(NAMES[0]))
        stream.end()
        with pytest.raises(EngineError, match="failed on 1 segments"):
            await stream.flush()
        assert not sink.finals
    finally:
        await scheduler.close(PATIENCE_S)


async def test_everything_that_stops_is_told_as_such(make: Make) -> None:
    scheduler = Scheduler(lambda: load(FP32))
    await scheduler.start()
    service = make(scheduler=scheduler)
    await scheduler.close(PATIENCE_S)
    with pytest.raises(NotReadyError, match="stops"):
        await texts_of(service, sound_of(NAMES[0]))


async def test_a_stream_gives_one_transcript_a_sentence(make: Make) -> None:
    service, sink = make(), Sink()
    stream = service.stream(sink, "client")
    for name in NAMES:
        await stream.push(sound_of(name))
        await stream.push(PAUSE)
    stream.end()
    await stream.flush()
    assert sink.texts == [TEXTS[name] for name in NAMES]
    assert all(transcript.source == "client" for transcript in sink.finals)
    assert all("response" in transcript.latency_ms for transcript in sink.finals)
    assert service.streams == 0


async def test_a_stream_that_ends_in_the_middle_of_a_sentence_has_its_text(make: Make) -> None:
    service, sink = make(), Sink()
    stream = service.stream(sink, "client")
    sound = sound_of(NAMES[0])
    for start in range(0, len(sound), 333):
        await stream.push(sound[start : start + 333])
    stream.end()
    await stream.flush()
    assert sink.texts == [TEXTS[NAMES[0]]]
    with pytest.raises(StreamEndedError):
        await stream.push(PAUSE)


async def test_a_segment_can_be_finished_and_the_stream_goes_on(make: Make) -> None:
    service, sink = make(), Sink()
    stream = service.stream(sink, "client")
    for count, name in enumerate(NAMES, 1):
        await stream.push(sound_of(name))
        await stream.finish_segment()
        assert len(sink.finals) == count
    assert sink.texts == [TEXTS[name] for name in NAMES]
    offsets = [transcript.offset_s or 0.0 for transcript in sink.finals]
    assert offsets == sorted(offsets)
    assert offsets[-1] > 1
    assert service.streams == 1
    stream.cancel()
    stream.cancel()
    with pytest.raises(StreamEndedError):
        await stream.flush()
    with pytest.raises(StreamEndedError):
        await stream.finish_segment()
    assert service.streams == 0


async def test_streams_of_several_clients_are_not_mixed_up(make: Make) -> None:
    service = make()
    sinks = {name: Sink() for name in NAMES}

    async def speak(name: str) -> None:
        stream = service.stream(sinks[name], name)
        sound = sound_of(name)
        for start in range(0, len(sound), SAMPLE_RATE // 10):
            await stream.push(sound[start : start + SAMPLE_RATE // 10])
            await asyncio.sleep(0)
        stream.end()
        await stream.flush()

    await asyncio.gather(*map(speak, NAMES))
    assert {name: sink.texts for name, sink in sinks.items()} == {name: [TEXTS[name]] for name in NAMES}


async def test_partials_of_a_stream_grow_into_its_text(make: Make) -> None:
    service, sink = make(), Sink()
    stream = service.stream(sink, "client")
    sound = np.concatenate([sound_of(name) for name in NAMES[:3]])
    for start in range(0, len(sound), 4_000):
        await stream.push(sound[start : start + 4_000])
        await until(lambda: service.scheduler.idle)
    stream.end()
    await stream.flush()
    assert sink.partials
    assert {partial.id for partial in sink.partials} <= {transcript.id for transcript in sink.finals}


async def test_no_partials_where_nobody_wants_them(make: Make) -> None:
    service, sink = make(), Sink()
    stream = service.stream(sink, "client", partials=False)
    await stream.push(np.concatenate([sound_of(name) for name in NAMES[:3]]))
    stream.end()
    await stream.flush()
    assert sink.finals
    assert not sink.partials


async def test_there_are_so_many_streams_and_no_more(make: Make) -> None:
    service = make(streams=2)
    first, _ = (service.stream(Sink(), "client") for _ in range(2))
    with pytest.raises(TooManyStreamsError, match="2 streams") as refused:
        service.stream(Sink(), "client")
    assert refused.value.retry_after_s > 0
    first.cancel()
    with pytest.raises(StreamEndedError):
        await first.flush()
    service.stream(Sink(), "client")


async def test_an_unknown_preset_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="unknown preset hasty; known here: aggressive, default, relaxed"):
        make().stream(Sink(), "client", preset="hasty")


async def test_who_sends_faster_than_it_can_be_heard_is_held_up(make: Make) -> None:
    scheduler = Scheduler(lambda: load(FP32))  # not started: nothing is ever answered
    service, sink = make(scheduler=scheduler), Sink()
    stream = service.stream(sink, "client")
    pushing = asyncio.create_task(stream.push(np.tile(np.concatenate([sound_of(NAMES[0]), PAUSE]), 40)))
    done, _ = await asyncio.wait([pushing], timeout=0.5)
    assert not done
    stream.cancel()
    with pytest.raises(StreamEndedError):
        await pushing
    assert not sink.finals
