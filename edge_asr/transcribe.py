"""A file from beginning to end, as fast as it goes: the pipeline without clock, sinks and gates."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_asr.answers import Labels, transcript_of
from edge_asr.audio.decode import decode
from edge_asr.audio.source import Chunker
from edge_asr.recognizer.scheduler import Recognizer
from edge_asr.recording import Recording
from edge_asr.speech.segmenter import Ended, Rules, Segmenter, Split
from edge_asr.speech.vad import SpeechDetector
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Chunk, Recognition, Samples, Segment, Transcript, new_segment_id

SILENCE: Samples = np.zeros(0, np.float32)


class NamedRecognizer(Recognizer, Protocol):
    """A recogniser that says which engine it runs on."""

    @property
    def engine(self) -> str:
        """`onnx-int8` for example."""


def transcribe(
    path: str | Path, recognizer: NamedRecognizer, detector: SpeechDetector, rules: Rules, labels: Labels
) -> Iterator[Transcript]:
    """Yield a file's transcripts, at least one.

    A file no longer than the segment cap is decoded whole if there is speech in it; a longer one is cut into segments
    and streamed, so memory stays flat. No speech gives one transcript with empty text. Raises AudioError, EngineError.
    """
    blocks = decode(path)
    head: list[Samples] = []
    for block in blocks:
        head.append(block)
        if sum(map(len, head)) > rules.max_length * CHUNK_SAMPLES:
            break
    else:
        yield _whole(np.concatenate([SILENCE, *head]), recognizer, detector, rules, labels)
        return
    found = False
    for index, samples in segments(chain(head, blocks), detector, rules):
        found = True
        yield transcript_at(index, samples, recognizer.recognize(samples), labels)
    if not found:
        yield transcript_at(0, SILENCE, nothing(recognizer.engine), labels)


def _whole(
    samples: Samples, recognizer: NamedRecognizer, detector: SpeechDetector, rules: Rules, labels: Labels
) -> Transcript:
    spoken = is_spoken(samples, detector, rules)
    recognition = recognizer.recognize(samples) if spoken else nothing(recognizer.engine)
    return transcript_at(0, samples, recognition, labels)


def nothing(engine: str) -> Recognition:
    """Return what is recognised where there is no speech."""
    return Recognition("", (), None, engine=engine)


def is_spoken(samples: Samples, detector: SpeechDetector, rules: Rules) -> bool:
    """Tell whether there is speech in `[n]` samples."""
    return next(segments(iter([samples]), detector, rules), None) is not None


def segments(blocks: Iterator[Samples], detector: SpeechDetector, rules: Rules) -> Iterator[tuple[int, Samples]]:
    """Yield the segments of a stream of samples, each with the position of its first sample."""
    segmenter, recording, chunker = Segmenter(rules), Recording(), Chunker(lambda index: index / SAMPLE_RATE)

    def take(chunks: Iterator[Chunk]) -> Iterator[tuple[int, Samples]]:
        for chunk in chunks:
            recording.append(chunk)
            for event in segmenter.step(detector(chunk)):
                if isinstance(event, Ended | Split):
                    yield _cut(recording, event)
            recording.forget(segmenter.earliest_needed)

    for block in blocks:
        yield from take(chunker.push(block))
    yield from take(chunker.flush())
    for event in segmenter.finish():
        if isinstance(event, Ended | Split):
            yield _cut(recording, event)


def _cut(recording: Recording, event: Ended | Split) -> tuple[int, Samples]:
    first = recording.between(event.start, event.start + 1)[0]
    return first.index, recording.samples(event.start, event.end)


def transcript_at(index: int, samples: Samples, recognition: Recognition, labels: Labels) -> Transcript:
    """Return the transcript of samples, of which the first has this index in its source."""
    segment = Segment(new_segment_id(), 0, samples, index, speech_ratio=1.0, started_at=None, marks=None)
    return transcript_of(segment, recognition, labels)
