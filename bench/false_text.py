#!/usr/bin/env python3
"""Count what is published though nobody spoke to the appliance, and what the gates cost of what was said to it.

An hour of music, half an hour of babble, half an hour of foreign speech, an hour of Mandarin that is not meant for the
appliance, all synthesised from a seed, go through detector, segmenter, recogniser and gates as fast as they can; so do
commands, to see how many of the right ones a gate drops. Needs espeak-ng.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only

from bench import false_sounds
from bench.false_sounds import ROOT, Sound
from bench.terminal import Tick, positive, progress
from edge_asr.answers import Gates
from edge_asr.app import choose_gates, segment_rules
from edge_asr.audio.source import Chunker
from edge_asr.config import EngineConfig, GatesConfig, SegmentConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.ladder import load_ladder
from edge_asr.recognizer.bundle import Bundle, read_bundle
from edge_asr.recognizer.scheduler import Recognizer
from edge_asr.recording import Recording
from edge_asr.speech.segmenter import Ended, Event, Rules, Segmenter, Split
from edge_asr.speech.vad import SileroDetector
from edge_asr.speech.wake_phrase import WakePhrase
from edge_asr.steadiness import disturbed, is_short, steadiness
from edge_asr.types import SAMPLE_RATE, Recognition, Samples, Segment, new_segment_id

WAKE_PHRASES = ("小度小度", "小爱同学")
"""The bundled model can write the first of them."""
MUSIC, BABBLE, FOREIGN, MANDARIN, COMMANDS = "music", "babble", "foreign", "mandarin", "commands"
SHARES = {MUSIC: 1.0, BABBLE: 0.5, FOREIGN: 0.5, MANDARIN: 1.0}
"""Of `--minutes`."""
CONFIDENCES = (0.0, 0.5, 0.6, 0.65, 0.7, 0.75, 0.78, 0.8, 0.82, 0.84, 0.855, 0.86, 0.88)
"""Values of `min_confidence` in the table of what they drop."""

STEADINESS = 0.8
"""Short texts that are less steady are dropped in the second half of the table."""

PHRASE_LENGTHS = (2, 3, 4)
"""Characters of wake phrases that are drawn at random."""
PHRASES_DRAWN = 100


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """A segment and what was made of it."""

    kind: str
    segment: Segment
    """Its samples are zeros: hours of sound are not kept."""
    recognition: Recognition
    sound: int
    """Which of its kind's sounds it ended in."""
    expected: str | None
    """What was said, where that is known."""

    def to_json(self, gates: Gates) -> dict[str, Any]:
        """Return what there is to know, numbers rounded."""
        recognition = self.recognition
        return {
            "kind": self.kind,
            "at_s": round(self.segment.index / SAMPLE_RATE, 2),
            "duration_s": round(self.segment.duration_s, 3),
            "speech_ratio": round(self.segment.speech_ratio, 4),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "confidence": recognition.confidence and round(recognition.confidence, 4),
            "tokens": [[token.text, round(token.confidence, 4)] for token in recognition.tokens],
            "steadiness": recognition.steadiness and round(recognition.steadiness, 4),
            "text": recognition.text,
            "expected": self.expected,
            "gate": gates.refuse(self.segment, recognition),
        }

    @property
    def tokens_per_s(self) -> float:
        """Tokens in a second of speech."""
        return len(self.recognition.tokens) / max(0.1, self.segment.speech_ratio * self.segment.duration_s)


def listen(kind: str, sounds: Iterable[Sound], recognizer: Recognizer, rules: Rules) -> Iterator[Heard]:
    """Yield every segment of the sounds, with the parts of the pipeline; commands are heard one by one."""
    ear = _Ear(rules)
    for number, sound in enumerate(sounds):
        if sound.expected is not None:
            ear = _Ear(rules)
        for segment in ear.segments(sound.samples, alone=sound.expected is not None):
            recognition = recognizer.recognize(segment.samples)
            silence = np.broadcast_to(np.float32(0), len(segment.samples))
            if is_short(recognition):
                again = [recognizer.recognize(other) for other in disturbed(segment.samples)]
                recognition = dataclasses.replace(recognition, steadiness=steadiness(recognition, again))
            silent = dataclasses.replace(segment, samples=silence)
            yield Heard(kind, silent, recognition, number, sound.expected)


class _Ear:
    """Cuts segments out of one stream."""

    def __init__(self, rules: Rules) -> None:
        self._detector, self._segmenter, self._recording = SileroDetector(), Segmenter(rules), Recording()
        self._chunker = Chunker(lambda index: index / SAMPLE_RATE)

    def segments(self, samples: Samples, alone: bool) -> Iterator[Segment]:
        """Yield the segments that end in the samples; `alone`: nothing comes after them."""
        for chunk in self._chunker.push(samples):
            self._recording.append(chunk)
            yield from self._cut(self._segmenter.step(self._detector(chunk)))
            self._recording.forget(self._segmenter.earliest_needed)
        if alone:
            yield from self._cut(self._segmenter.finish())

    def _cut(self, events: Iterable[Event]) -> Iterator[Segment]:
        for event in events:
            if isinstance(event, Ended | Split):
                yield self._recording.cut(new_segment_id(), event.start, event.end, event.speech, live=False)


def counts(heard: Sequence[Heard], minutes: dict[str, int], gates: Gates) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind: its segments, which gate dropped how many, what is published."""
    for kind, length in minutes.items():
        mine = [one for one in heard if one.kind == kind]
        dropped = Counter(gates.refuse(one.segment, one.recognition) for one in mine)
        published = dropped.pop(None, 0)
        yield {
            "sound": kind,
            "minutes": length,
            "segments": len(mine),
            "speech_min": round(sum(one.segment.speech_ratio * one.segment.duration_s for one in mine) / 60, 1),
            "dropped": {str(gate): count for gate, count in sorted(dropped.items(), key=str)},
            "published": published,
            "per_hour": round(published * 60 / length, 2),
            "highest_confidence": round(max((one.recognition.confidence or 0.0 for one in mine), default=0.0), 3),
        }


def addressed(heard: Sequence[Heard], gates: Gates, wake_phrase: WakePhrase) -> list[Heard]:
    """Return the Mandarin that would be published in the mode `phrase`."""
    return [
        one
        for one in heard
        if one.kind == MANDARIN
        and gates.refuse(one.segment, one.recognition) is None
        and wake_phrase.after([token.text for token in one.recognition.tokens]) is not None
    ]


def alarms(heard: Sequence[Heard], hours: float, gates: Gates, characters: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each length of a wake phrase: how often the Mandarin is taken for one made of any characters."""
    passed = [one for one in heard if one.kind == MANDARIN and gates.refuse(one.segment, one.recognition) is None]
    rng = Random(0)
    for length in PHRASE_LENGTHS:
        drawn = ["".join(rng.sample(characters, length)) for _ in range(PHRASES_DRAWN)]
        rates = [len(addressed(passed, gates, WakePhrase([phrase]))) / hours for phrase in drawn]
        yield {
            "characters": length,
            "phrases": len(drawn),
            "per_hour": round(sum(rates) / len(rates), 3),
            "most": max(rates),
            "above_half": sum(rate > 0.5 for rate in rates),
        }


def costs(heard: Sequence[Heard], minutes: dict[str, int], gates: Gates) -> Iterator[dict[str, Any]]:
    """Yield a row for each `min_confidence`, with and without a look at steadiness.

    In it are false transcripts an hour, and how many commands are dropped, recognised rightly or not.
    """
    commands = [one for one in heard if one.kind == COMMANDS]
    alone = Counter(one.sound for one in commands)
    right = [one for one in commands if one.recognition.text == one.expected and alone[one.sound] == 1]
    wrong = [one for one in commands if one.recognition.text != one.expected]
    for least in (0.0, STEADINESS):
        for value in CONFIDENCES:
            changed = dataclasses.replace(gates, min_confidence=value, min_steadiness=least)
            row: dict[str, Any] = {"steadiness": least, "min_confidence": value}
            for kind, length in minutes.items():
                mine = [one for one in heard if one.kind == kind]
                row[kind] = round(_passed(mine, changed) * 60 / length, 2)
            for name, some in (("right", right), ("wrong", wrong)):
                row[f"{name}_dropped"] = len(some) - _passed(some, changed)
                row[name] = len(some)
            yield row


def _passed(heard: Sequence[Heard], gates: Gates) -> int:
    return sum(gates.refuse(one.segment, one.recognition) is None for one in heard)


def run(options: argparse.Namespace, bundle: Bundle, tick: Tick) -> tuple[list[Heard], dict[str, int]]:
    """Hear everything. Raises EdgeAsrError."""
    minutes = {kind: max(1, round(share * options.minutes)) for kind, share in SHARES.items()}
    seed, recordings = options.seed, options.recordings
    sounds = {
        MUSIC: false_sounds.music(seed, minutes[MUSIC]),
        BABBLE: false_sounds.babble(seed, minutes[BABBLE], recordings),
        FOREIGN: false_sounds.foreign(seed, minutes[FOREIGN], recordings),
        MANDARIN: false_sounds.mandarin(seed, minutes[MANDARIN], recordings),
        COMMANDS: false_sounds.commands(seed, options.commands, recordings),
    }
    rules = segment_rules(SegmentConfig())
    with tempfile.TemporaryDirectory(prefix="edge_asr-bench-") as folder:
        recognizer = load_ladder(bundle, EngineConfig(threads=1, target=options.target), Path(folder))
        try:
            heard = [
                one for kind, some in sounds.items() for one in listen(kind, _told(kind, some, tick), recognizer, rules)
            ]
        finally:
            recognizer.close()
    return heard, minutes


def _told(kind: str, sounds: Iterable[Sound], tick: Tick) -> Iterator[Sound]:
    for number, sound in enumerate(sounds, 1):
        tick(f"{kind}, round {number}")
        yield sound


def main(arguments: Sequence[str] | None = None) -> None:
    """Listen, and print what was published."""
    options = _options(arguments)
    if shutil.which("espeak-ng") is None:
        sys.exit("false_text: espeak-ng is not installed: sudo apt-get install -y espeak-ng")
    count = sum(max(1, round(share * options.minutes)) for share in SHARES.values()) + options.commands
    try:
        bundle = read_bundle(options.model)
        with progress(count) as tick:
            heard, minutes = run(options, bundle, tick)
    except EdgeAsrError as error:
        sys.exit(f"false_text: {error}")
    gates = choose_gates(GatesConfig(), bundle)
    found = addressed(heard, gates, WakePhrase(options.phrases))
    characters = [token for token in bundle.tokens if len(token) == 1 and "一" <= token <= "鿿"]
    result = {
        "seed": options.seed,
        "gates": dataclasses.asdict(gates),
        "counts": list(counts(heard, minutes, gates)),
        "addressed": {"phrases": options.phrases, "per_hour": round(len(found) * 60 / minutes[MANDARIN], 2)},
        "alarms": list(alarms(heard, minutes[MANDARIN] / 60, gates, characters)),
        "costs": list(costs(heard, minutes, gates)),
    }
    _print(result)
    if options.json:
        everything = {**result, "heard": [one.to_json(gates) for one in heard]}
        options.json.write_text(json.dumps(everything, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _print(result: dict[str, Any]) -> None:
    """Print the tables in Markdown."""
    print(
        _row("sound", "minutes", "segments", "speech, min", "dropped by", "published", "an hour", "highest confidence")
    )
    print(_row(*["---"] * 8))
    for row in result["counts"]:
        dropped = ", ".join(f"{gate} {count}" for gate, count in row["dropped"].items()) or "none"
        print(_row(*(dropped if key == "dropped" else value for key, value in row.items())))
    told = result["addressed"]
    print(f"\nMandarin taken for an address ({', '.join(told['phrases'])}): {told['per_hour']} an hour\n")
    print(_row("characters", "phrases", "an hour", "most", "more than 0.5"), _row(*["---"] * 5), sep="\n")
    for row in result["alarms"]:
        print(_row(*row.values()))
    print()
    kinds = list(SHARES)
    heads = ("steadiness", "min_confidence", *(f"{kind}, an hour" for kind in kinds))
    print(_row(*heads, "right commands dropped", "wrong ones"), _row(*["---"] * (2 + len(heads))), sep="\n")
    for row in result["costs"]:
        shares = (f"{row[f'{name}_dropped']} of {row[name]}" for name in ("right", "wrong"))
        print(_row(row["steadiness"], row["min_confidence"], *(row[kind] for kind in kinds), *shares))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=positive(int), default=60, help="of music; half of it of babble (60)")
    parser.add_argument("--seed", type=int, default=2, help="of everything that is synthesised (2)")
    parser.add_argument("--commands", type=positive(int), default=400, help="sentences that should be published (400)")
    parser.add_argument("--model", type=Path, default=ROOT / "engines" / "paraformer-tiny", help="the bundle")
    parser.add_argument("--target", choices=("onnx-int8", "onnx-fp32"), default="onnx-fp32", help="the engine")
    parser.add_argument("--recordings", type=Path, help="a folder with sets of recordings of people")
    parser.add_argument("--phrases", nargs="+", default=list(WAKE_PHRASES), help="wake phrases")
    parser.add_argument("--json", type=Path, help="write every segment to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
