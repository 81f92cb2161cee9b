#!/usr/bin/env python3
"""Sentences spoken into a virtual microphone, with pauses, against the same sentences each heard alone.

Needs PulseAudio, ALSA's `pulse` plugin, espeak-ng and Mosquitto: what the tests of the microphone need.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the servers that the tests start are ours too

from bundled import BUNDLE, recipe, write_wav
from mosquitto import Mosquitto, Subscriber
from pulse import MICROPHONE, PulseServer, missing_parts

from edge_asr.app import Daemon, segment_rules
from edge_asr.audio.source import Chunker
from edge_asr.config import Config, GatesConfig, LogConfig, MicrophoneSourceConfig, SegmentConfig
from edge_asr.config_mqtt import MqttConfig
from edge_asr.ladder import load_ladder
from edge_asr.logs import set_up
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.recognizer.scheduler import Recognizer
from edge_asr.recognizer.tokens import join
from edge_asr.recording import Recording
from edge_asr.speech.energy import end_of_sound
from edge_asr.speech.segmenter import Ended, Segmenter, Split
from edge_asr.speech.vad import SileroDetector
from edge_asr.types import SAMPLE_RATE, Samples

SOURCE = f"microphone:{MICROPHONE}"
PAUSE_S = (0.5, 3.0)
LEAD_S, TAIL_S = 1.0, 2.0
NOISE = 3e-4
"""Deviation of the noise of the room, -70 dBFS: a microphone never hears true zeros."""
PHASES = (0, 128, 256, 384)
"""Samples that a sentence is heard earlier by: where chunks begin is chance, and the model's answer may hang on it."""
PRE_ROLL_S = 0.29
MARGIN_S = 0.1
"""Of a sentence that a segment holds less than this of, it holds nothing."""
PATIENCE_S = 30.0
ALL, SYNTHETIC, PEOPLE = "all", "synthesised", "people"


@dataclass(frozen=True, slots=True)
class Spoken:
    """A sentence without silence around it."""

    kind: str
    text: str
    samples: Samples


@dataclass(frozen=True, slots=True)
class Tape:
    """Sentences with pauses between them, as they are played."""

    samples: Samples
    noise: Samples
    """What is on it beside the sentences."""
    spans: tuple[tuple[float, float], ...]
    """Seconds at which each sentence begins and ends."""


def sentences(work: Path, count: int, people: Path | None = None, seed: int = 7) -> list[Spoken]:
    """Return so many sentences, mixed: by voices that no training heard, and by people where their folder is given."""
    evaluate = recipe("evaluate")
    kinds = [kind for kind in recipe("phrases").KINDS if kind not in ("random", "fixed")]
    human = [] if people is None else list(evaluate.human(people))[:count]
    spoken = [Spoken(PEOPLE, said.text, _trimmed(said.samples)) for said in human]
    for said in evaluate.synthetic(work / "voices", count - len(human), kinds, None, seed):
        spoken.append(Spoken(SYNTHETIC, said.text, _trimmed(said.samples)))
    random.Random(seed).shuffle(spoken)
    return spoken


def _trimmed(samples: Samples) -> Samples:
    """Return a sentence from its first sound to its last."""
    return samples[len(samples) - end_of_sound(samples[::-1]) : end_of_sound(samples)]


def record(spoken: Sequence[Spoken], seed: int = 7) -> Tape:
    """Put sentences on a tape, with pauses of 0.5 to 3 s between them and the noise of a room everywhere."""
    rng = random.Random(seed)
    pieces, spans, position = [np.zeros(round(LEAD_S * SAMPLE_RATE), np.float32)], [], round(LEAD_S * SAMPLE_RATE)
    for number, one in enumerate(spoken):
        if number:
            pieces.append(np.zeros(round(rng.uniform(*PAUSE_S) * SAMPLE_RATE), np.float32))
            position += len(pieces[-1])
        pieces.append(one.samples)
        spans.append((position / SAMPLE_RATE, (position + len(one.samples)) / SAMPLE_RATE))
        position += len(one.samples)
    pieces.append(np.zeros(round(TAIL_S * SAMPLE_RATE), np.float32))
    noise = NOISE * np.random.default_rng(seed).standard_normal(position + len(pieces[-1])).astype(np.float32)
    return Tape(_as_pcm(np.concatenate(pieces) + noise), noise, tuple(spans))


def _as_pcm(samples: Samples) -> Samples:
    """Return what 16 bits keep."""
    return (np.round(np.clip(samples, -1, 1) * 32767) / 32768).astype(np.float32)


def alone(spoken: Sequence[Spoken], tape: Tape, config: Config) -> list[list[str]]:
    """Return for each phase of the chunks what is recognised in each sentence by itself.

    It is cut by the same segmenter, out of the noise that surrounds it on the tape.
    """
    recognizer = load_ladder(read_bundle(config.model), config.engine, config.state_dir)
    try:
        sounds = [_alone(one, tape, span[0]) for one, span in zip(spoken, tape.spans, strict=True)]
        return [[join(list(_recognized(sound[phase:], recognizer, config))) for sound in sounds] for phase in PHASES]
    finally:
        recognizer.close()


def _alone(one: Spoken, tape: Tape, begins_s: float) -> Samples:
    first, lead, tail = round(begins_s * SAMPLE_RATE), round(LEAD_S * SAMPLE_RATE), round(TAIL_S * SAMPLE_RATE)
    noise = tape.noise[first - lead : first + len(one.samples) + tail]
    sound = np.pad(one.samples, (lead, tail))[: len(noise)]
    return _as_pcm(sound + noise)


def _recognized(samples: Samples, recognizer: Recognizer, config: Config) -> Iterator[str]:
    segmenter, detector, recording = Segmenter(segment_rules(config.segment)), SileroDetector(), Recording()
    for chunk in Chunker(lambda index: index / SAMPLE_RATE).push(samples):
        recording.append(chunk)
        for event in segmenter.step(detector(chunk)):
            if isinstance(event, Ended | Split):
                yield recognizer.recognize(recording.samples(event.start, event.end)).text


async def listen(
    server: PulseServer, port: int, config: Config, wav: Path
) -> tuple[list[Mapping[str, Any]], dict[str, float]]:
    """Play a file to a daemon's microphone; return the transcripts as they arrived, and what the metrics count."""
    with Subscriber(port) as subscriber:

        async def until(condition: Callable[[Subscriber], object], what: str) -> None:
            await asyncio.to_thread(subscriber.wait_for, condition, what, PATIENCE_S)

        def is_heard(told: Subscriber) -> bool:
            states = told.on("state")
            return bool(states) and [one["health"] for one in states[-1].json["sources"]] == ["listening"]

        async with Daemon(config).running():
            await until(is_heard, "the microphone is heard")
            with server.play(wav) as player:
                if await asyncio.to_thread(player.wait):
                    raise RuntimeError(f"paplay ended with {player.returncode}")
            told = len(subscriber.on("state"))
            await until(lambda s: len(s.on("state")) > told, "a report after the end")  # the metrics are counted then
        await until(lambda s: s.on("status")[-1].payload == "offline", "offline")
        return [message.json for message in subscriber.on("transcript")], _counted()


def _counted() -> dict[str, float]:
    names = {
        "gaps": "gaps_total", "lost_s": "lost_seconds_total", "overruns": "overruns_total",
        "dropped_chunks": "dropped_chunks_total", "drift_ppm": "drift_ppm",
    }  # fmt: skip
    values = {
        key: REGISTRY.get_sample_value(f"edge_asr_microphone_{name}", {"source": SOURCE}) for key, name in names.items()
    }
    return {key: round(value, 3) for key, value in values.items() if value is not None}


def place(
    spoken: Sequence[Spoken], tape: Tape, transcripts: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[set[int]]]:
    """Return what was heard of each sentence, and the numbers of the transcripts that hold it."""
    starts = [said["offset_s"] + PRE_ROLL_S for said in transcripts]
    shift = _shift(tape, starts)
    heard, holding = [""] * len(spoken), [set[int]() for _ in spoken]
    for number, said in enumerate(transcripts):
        begins, ends = starts[number] - shift, starts[number] - shift + said["duration_s"]
        inside = [k for k, span in enumerate(tape.spans) if min(ends, span[1]) - max(begins, span[0]) > MARGIN_S]
        for k, part in zip(inside, _parts(said["text"], [spoken[k].text for k in inside]), strict=True):
            heard[k] += part
            holding[k].add(number)
    return heard, holding


def _shift(tape: Tape, starts: Sequence[float]) -> float:
    """Return how much later the microphone heard what is on the tape: so that segments begin where sentences do."""
    begins = np.array([span[0] for span in tape.spans])
    candidates = (starts[0] - begin for begin in begins[:5]) if starts else iter([0.0])
    return float(min(candidates, key=lambda shift: sum(np.abs(begins + shift - start).min() for start in starts)))


def _parts(text: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Cut the text of several sentences, which were not told apart, where the parts fit these best."""
    distance = recipe("evaluate").distance

    if not texts:
        return ()

    def cut(places: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(text[a:b] for a, b in pairwise((0, *places, len(text))))

    ways = map(cut, combinations_with_replacement(range(len(text) + 1), len(texts) - 1))
    return min(ways, key=lambda parts: sum(map(distance, texts, parts)))


def judge(
    spoken: Sequence[Spoken], tape: Tape, transcripts: Sequence[Mapping[str, Any]], isolated: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Return the figures: each sentence as the microphone heard it, as it is heard alone, and as it is."""
    (heard, holding), by_phase = place(spoken, tape, transcripts), list(zip(*isolated, strict=True))
    ranges = [(said["offset_s"], said["offset_s"] + said["duration_s"]) for said in transcripts]
    differing = [
        {"text": one.text, "heard": got, "alone": sorted(set(wanted))}
        for one, got, wanted in zip(spoken, heard, by_phase, strict=True)
        if got not in wanted
    ]
    figures: dict[str, Any] = {
        "sentences": len(spoken),
        "transcripts": len(transcripts),
        "cut": sum(len(numbers) > 1 for numbers in holding),
        "joined": sum(bool(before & after) for before, after in pairwise(holding)),
        "in_order": ranges == sorted(ranges),
        "overlapping": sum(after[0] < before[1] - 1e-3 for before, after in pairwise(ranges)),
        "elsewhere": len(transcripts) - len(set().union(*holding)),
        "lost": sum(all(wanted) and not got for wanted, got in zip(by_phase, heard, strict=True)),
        "late": sum(said["within_budget"] is False for said in transcripts),
        "differing": differing,
    }
    for kind in (ALL, SYNTHETIC, PEOPLE):
        chosen = [k for k, one in enumerate(spoken) if kind in (ALL, one.kind)]
        if chosen:
            texts = [spoken[k].text for k in chosen]
            figures[kind] = {
                "sentences": len(chosen),
                "microphone": _quality(texts, [heard[k] for k in chosen]),
                "alone": [_quality(texts, [phase[k] for k in chosen]) for phase in isolated],
            }
    return figures


def _quality(texts: Sequence[str], heard: Sequence[str]) -> dict[str, float]:
    """Return the error rate in per cent, and how often the first and the last character are right."""
    pairs = list(zip(texts, heard, strict=True))
    return {
        "cer": recipe("evaluate").character_error_rate(pairs),
        "first": sum(got[:1] == text[0] for text, got in pairs),
        "last": sum(got[-1:] == text[-1] for text, got in pairs),
    }


def measure(
    server: PulseServer, port: int, spoken: Sequence[Spoken], work: Path, preset: str = "default"
) -> dict[str, Any]:
    """Speak the sentences into a daemon's microphone and compare. For a thread without an event loop."""
    config = Config(
        device_id="bench", model=BUNDLE, state_dir=work, mqtt=MqttConfig(port=port),
        sources=(MicrophoneSourceConfig(device=MICROPHONE),),
        segment=SegmentConfig.model_validate({"preset": preset}),
        gates=GatesConfig(min_confidence=0, min_speech_ratio=0, min_steadiness=0, max_tokens_per_s=0),
    )  # fmt: skip
    tape = record(spoken)
    isolated = alone(spoken, tape, config)
    transcripts, counted = asyncio.run(listen(server, port, config, write_wav(work / "tape.wav", tape.samples)))
    return {**judge(spoken, tape, transcripts, isolated), "seconds": round(len(tape.samples) / SAMPLE_RATE), **counted}


def main() -> None:
    """Measure, and print one JSON object."""
    options = _arguments()
    if missing := missing_parts():
        sys.exit(f"microphone: not installed: {', '.join(missing)}")
    set_up(LogConfig(level="WARNING"))
    server = PulseServer()
    os.environ.update(server.environment)
    with tempfile.TemporaryDirectory(prefix="edge_asr-bench-") as folder:
        work = Path(folder)
        broker = Mosquitto(work)
        try:
            server.start(**{MICROPHONE: (SAMPLE_RATE, 1)})
            broker.start()
            spoken = sentences(work, options.count, options.people, options.seed)
            figures = measure(server, broker.port, spoken, work, options.preset)
        finally:
            broker.kill()
            server.close()
    print(json.dumps(figures, ensure_ascii=False, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--count", type=int, default=100, help="sentences (100)")
    add("--people", type=Path, metavar="DIR", help="AISHELL's sample pack: 17 of the sentences are by people")
    add("--preset", default="default", choices=("aggressive", "default", "relaxed"), help="default")
    add("--seed", type=int, default=7, help="of sentences and pauses (7)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
