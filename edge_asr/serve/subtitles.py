"""Transcripts as words, cues and subtitles. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge_asr.recognizer.tokens import CONTINUES, join
from edge_asr.types import Token, Transcript

PAUSE_S = 0.6
"""Between two words: there a cue ends."""
LONGEST_S = 7.0
"""As long may a cue be read."""
WIDEST = 64
"""Columns of a cue: 32 Chinese characters, or 64 Latin ones."""
SHORTEST_S = 0.02
"""A word or a cue lasts at least so long: players drop what ends as it begins."""


@dataclass(frozen=True, slots=True)
class Span:
    """Text with its place in the recording, in seconds."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, slots=True)
class _Word:
    tokens: tuple[Token, ...]
    span: Span


def text_of(transcripts: Sequence[Transcript]) -> str:
    """Return what was said in all of them."""
    return join([transcript.text for transcript in transcripts])


def words(transcript: Transcript) -> list[Span]:
    """Return each word, and each Chinese character; one whose time is not known spans the transcript."""
    return [word.span for word in _words(transcript)]


def cues(transcript: Transcript) -> list[Span]:
    """Return what can be read at a time: up to a pause, and never too much. Where there are no times: all of it."""
    timed = all(token.start_ms is not None and token.end_ms is not None for token in transcript.tokens)
    found: list[list[_Word]] = []
    for word in _words(transcript):
        if found and (not timed or _fits([*found[-1], word])):
            found[-1].append(word)
        else:
            found.append([word])
    return [_cue(words) for words in found]


def srt(transcripts: Sequence[Transcript]) -> str:
    """Return SubRip subtitles."""
    return "".join(
        f"{number}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n{cue.text}\n\n"
        for number, cue in enumerate(_all_cues(transcripts), 1)
    )


def vtt(transcripts: Sequence[Transcript]) -> str:
    """Return WebVTT subtitles."""
    blocks = (
        f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n{_escaped(cue.text)}\n\n"
        for cue in _all_cues(transcripts)
    )
    return "".join(("WEBVTT\n\n", *blocks))


def _all_cues(transcripts: Sequence[Transcript]) -> Iterator[Span]:
    for transcript in transcripts:
        yield from cues(transcript)


def _words(transcript: Transcript) -> Iterator[_Word]:
    begun: list[Token] = []
    for token in transcript.tokens:
        begun.append(token)
        if not token.text.endswith(CONTINUES):
            yield _word(transcript, begun)
            begun = []
    if begun:
        yield _word(transcript, begun)


def _word(transcript: Transcript, tokens: Sequence[Token]) -> _Word:
    offset_s = transcript.offset_s or 0.0
    start_ms, end_ms = tokens[0].start_ms, tokens[-1].end_ms
    start_s = offset_s if start_ms is None else offset_s + start_ms / 1e3
    # The model's last token may last a moment longer than the sound.
    end_s = offset_s + min(transcript.duration_s, transcript.duration_s if end_ms is None else end_ms / 1e3)
    text = join([token.text for token in tokens])
    return _Word(tuple(tokens), Span(start_s, max(end_s, start_s + SHORTEST_S), text))


def _cue(words: Sequence[_Word]) -> Span:
    text = join([token.text for word in words for token in word.tokens])
    return Span(words[0].span.start_s, words[-1].span.end_s, text)


def _fits(words: Sequence[_Word]) -> bool:
    cue, before, last = _cue(words), words[-2].span, words[-1].span
    return (
        last.start_s - before.end_s <= PAUSE_S
        and cue.end_s - cue.start_s <= LONGEST_S
        and sum(1 if character.isascii() else 2 for character in cue.text) <= WIDEST
    )


def _clock(seconds: float, mark: str) -> str:
    whole, milliseconds = divmod(round(seconds * 1e3), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{mark}{milliseconds:03}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
